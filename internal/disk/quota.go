package disk

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Project quotas, by the interface that XFS and ext4 share: linux/fs.h for the
// id of a folder, linux/dqblk_xfs.h for limits.

type fsxattr struct {
	xflags     uint32
	extsize    uint32
	nextents   uint32
	projid     uint32
	cowextsize uint32
	_          [8]byte
}

const (
	fsIocFsgetxattr    = 0x801c581f
	fsIocFssetxattr    = 0x401c5820
	fsXflagProjinherit = 0x200

	prjQuota    = 2
	qXGetQuota  = 'X'<<8 + 3
	qXSetQlim   = 'X'<<8 + 4
	qXGetQstat  = 'X'<<8 + 5
	prjEnforced = 1 << 5 // FS_QUOTA_PDQ_ENFD
)

type diskQuota struct {
	version   int8
	flags     int8
	fieldmask uint16
	id        uint32
	blkHard   uint64 // limits and counts of blocks are in units of 512 bytes
	blkSoft   uint64
	inoHard   uint64
	inoSoft   uint64
	bcount    uint64
	icount    uint64
	itimer    int32
	btimer    int32
	iwarns    uint16
	bwarns    uint16
	_         [4]int8
	rtbHard   uint64
	rtbSoft   uint64
	rtbcount  uint64
	rtbtimer  int32
	rtbwarns  uint16
	_         int16
	_         [8]byte
}

// fs_quota_stat; only the flags are read.
type quotaStat struct {
	version int8
	flags   uint16
	_       [128]byte
}

// Project is the project id of a file or folder. File systems without such ids
// give ErrNotSupported.
func Project(path string) (uint32, error) {
	a, err := getFsxattr(path)
	return a.projid, err
}

// SetProject gives an empty folder a project id, which all that is made in it
// gets too.
func SetProject(path string, id uint32) error {
	a, err := getFsxattr(path)
	if err != nil {
		return err
	}
	if err := step("setproject", path); err != nil {
		return err
	}
	a.projid = id
	a.xflags |= fsXflagProjinherit
	return withDir(path, func(fd int) error {
		return quotaError("set project id", path, ioctl(fd, fsIocFssetxattr, unsafe.Pointer(&a)))
	})
}

// takeAnyProject lets anything be moved into an open folder. One that hands its
// project on takes in nothing of another: EXDEV.
func takeAnyProject(fd int, path string) error {
	var a fsxattr
	if err := ioctl(fd, fsIocFsgetxattr, unsafe.Pointer(&a)); err != nil {
		return quotaError("read project id", path, err)
	}
	if err := step("setproject", path); err != nil {
		return err
	}
	a.xflags &^= fsXflagProjinherit
	return quotaError("set project id", path, ioctl(fd, fsIocFssetxattr, unsafe.Pointer(&a)))
}

// ProjectQuotaOn tells whether the file system that holds path enforces limits
// on projects.
func ProjectQuotaOn(path string) (bool, error) {
	var s quotaStat
	err := quotactl(path, qXGetQstat, 0, unsafe.Pointer(&s))
	if errors.Is(err, ErrNotSupported) {
		return false, nil
	}
	return s.flags&prjEnforced != 0, err
}

// ProjectInUse tells whether any file has the project id, or a limit is set
// for it, on the file system that holds path.
func ProjectInUse(path string, id uint32) (bool, error) {
	var q diskQuota
	err := quotactl(path, qXGetQuota, id, unsafe.Pointer(&q))
	if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ESRCH) {
		return false, nil
	}
	return q.bcount != 0 || q.icount != 0 || q.blkHard != 0 || q.blkSoft != 0 || q.inoHard != 0 || q.inoSoft != 0, err
}

// SetProjectLimit bounds what all files of a project hold together, in bytes;
// 0 takes the limit away.
func SetProjectLimit(path string, id uint32, bytes int64) error {
	if err := step("setquota", path); err != nil {
		return err
	}
	q := diskQuota{version: 1, flags: prjQuota, fieldmask: 1<<2 | 1<<3, id: id}
	q.blkHard = (uint64(bytes) + 511) / 512
	q.blkSoft = q.blkHard
	return quotactl(path, qXSetQlim, id, unsafe.Pointer(&q))
}

// quotactl works on the file system that holds path: by a descriptor, or
// before Linux 5.14 by its device.
func quotactl(path string, cmd, id uint32, arg unsafe.Pointer) error {
	qcmd := uintptr(cmd<<8 | prjQuota)
	return withDir(path, func(fd int) error {
		_, _, errno := unix.Syscall6(unix.SYS_QUOTACTL_FD, uintptr(fd), qcmd, uintptr(id), uintptr(arg), 0, 0)
		// A container's filter of system calls may know the old call alone.
		if errno == unix.ENOSYS || errno == unix.EPERM {
			device, err := blockDevice(fd)
			if err != nil {
				return err
			}
			name, err := unix.BytePtrFromString(device)
			if err != nil {
				return err
			}
			_, _, errno = unix.Syscall6(unix.SYS_QUOTACTL, qcmd, uintptr(unsafe.Pointer(name)), uintptr(id), uintptr(arg), 0, 0)
		}
		if errno == 0 {
			return nil
		}
		return quotaError("quotactl", path, errno)
	})
}

func blockDevice(fd int) (string, error) {
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return "", err
	}
	uevent, err := os.ReadFile(fmt.Sprintf("/sys/dev/block/%d:%d/uevent", unix.Major(st.Dev), unix.Minor(st.Dev)))
	if errors.Is(err, fs.ErrNotExist) {
		return "", fmt.Errorf("find block device: %w", ErrNotSupported)
	}
	if err != nil {
		return "", err
	}
	for line := range strings.Lines(string(uevent)) {
		if name, ok := strings.CutPrefix(strings.TrimSpace(line), "DEVNAME="); ok {
			path := filepath.Join("/dev", name)
			return path, deviceNode(path, unix.S_IFBLK, st.Dev)
		}
	}
	return "", fmt.Errorf("find block device: %w", ErrNotSupported)
}

func getFsxattr(path string) (fsxattr, error) {
	var a fsxattr
	err := withDir(path, func(fd int) error {
		return quotaError("read project id", path, ioctl(fd, fsIocFsgetxattr, unsafe.Pointer(&a)))
	})
	return a, err
}

func withDir(path string, f func(fd int) error) error {
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return &fs.PathError{Op: "open", Path: path, Err: err}
	}
	defer unix.Close(fd)
	return f(fd)
}

func ioctl(fd int, req uintptr, arg unsafe.Pointer) error {
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), req, uintptr(arg)); errno != 0 {
		return errno
	}
	return nil
}

func quotaError(op, path string, err error) error {
	switch {
	case err == nil:
		return nil
	case errors.Is(err, unix.ENOTTY), errors.Is(err, unix.EOPNOTSUPP), errors.Is(err, unix.ENOSYS), errors.Is(err, unix.EINVAL),
		errors.Is(err, unix.ENOTBLK), errors.Is(err, unix.ENODEV), op == "quotactl" && errors.Is(err, unix.ESRCH):
		return fmt.Errorf("%s of %s: %w (%w)", op, path, ErrNotSupported, err)
	}
	return &fs.PathError{Op: op, Path: path, Err: err}
}
