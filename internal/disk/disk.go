// Package disk holds every system call by which Larder changes a file system:
// files, folders, links, extended attributes and mounts. Nothing else in the
// project calls them directly.
//
// Each call is one step. In an ordinary build a step costs nothing. Built with
// the tag "faults", the process can be told to die, to cut the power of a file
// system, or to fail at the n-th step (see faults.go), so that tests visit the
// gap between any two changes instead of hoping to hit one.
//
// The package promises no more than the kernel does: durability is the
// caller's business (File.Sync, SyncDir), and package atomicfile's.
package disk

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// ErrNotSupported tells that a file system cannot do what was asked (clone,
// extended attributes, quotas).
var ErrNotSupported = errors.ErrUnsupported

// File is an open file whose writes are steps.
type File struct {
	f *os.File
}

// Create makes a new file for reading and writing. It fails when path exists.
func Create(path string, perm fs.FileMode) (*File, error) {
	return OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_EXCL, perm)
}

// OpenFile opens path as os.OpenFile does, never following a symbolic link in
// the last element.
func OpenFile(path string, flag int, perm fs.FileMode) (*File, error) {
	if flag&(os.O_CREATE|os.O_TRUNC) != 0 {
		if err := step("open", path); err != nil {
			return nil, err
		}
	}
	f, err := os.OpenFile(path, flag|unix.O_NOFOLLOW, perm)
	if err != nil {
		return nil, err
	}
	return &File{f: f}, nil
}

// CreateTemp makes a new file in dir whose name is made from pattern, as
// os.CreateTemp does.
func CreateTemp(dir, pattern string) (*File, error) {
	if err := step("open", filepath.Join(dir, pattern)); err != nil {
		return nil, err
	}
	f, err := os.CreateTemp(dir, pattern)
	if err != nil {
		return nil, err
	}
	return &File{f: f}, nil
}

// Name is the path the file was opened by.
func (f *File) Name() string { return f.f.Name() }

// Fd is the descriptor, valid until Close.
func (f *File) Fd() uintptr { return f.f.Fd() }

// Stat describes the file.
func (f *File) Stat() (fs.FileInfo, error) { return f.f.Stat() }

// Read reads from the current offset.
func (f *File) Read(p []byte) (int, error) { return f.f.Read(p) }

// ReadAt reads from off.
func (f *File) ReadAt(p []byte, off int64) (int, error) { return f.f.ReadAt(p, off) }

// Seek moves the current offset.
func (f *File) Seek(offset int64, whence int) (int64, error) { return f.f.Seek(offset, whence) }

// Write writes at the current offset.
func (f *File) Write(p []byte) (int, error) {
	if err := step("write", f.Name()); err != nil {
		return 0, err
	}
	return f.f.Write(p)
}

// WriteAt writes at off.
func (f *File) WriteAt(p []byte, off int64) (int, error) {
	if err := step("write", f.Name()); err != nil {
		return 0, err
	}
	return f.f.WriteAt(p, off)
}

// Truncate sets the size in bytes.
func (f *File) Truncate(size int64) error {
	if err := step("truncate", f.Name()); err != nil {
		return err
	}
	return f.f.Truncate(size)
}

// Allocate reserves size bytes of disk space without changing what a reader
// sees, so that a full disk is known before the first byte is fetched. File
// systems without fallocate are left alone.
func (f *File) Allocate(size int64) error {
	if size == 0 {
		return nil
	}
	if err := step("fallocate", f.Name()); err != nil {
		return err
	}
	err := unix.Fallocate(int(f.f.Fd()), unix.FALLOC_FL_KEEP_SIZE, 0, size)
	if errors.Is(err, unix.EOPNOTSUPP) {
		return nil
	}
	if err != nil {
		return &fs.PathError{Op: "fallocate", Path: f.Name(), Err: err}
	}
	return nil
}

// Chmod sets the mode.
func (f *File) Chmod(mode fs.FileMode) error {
	if err := step("chmod", f.Name()); err != nil {
		return err
	}
	return f.f.Chmod(mode)
}

// Chown sets the owner; -1 leaves a value as it is.
func (f *File) Chown(uid, gid int) error {
	if err := step("chown", f.Name()); err != nil {
		return err
	}
	return f.f.Chown(uid, gid)
}

// Sync makes the file's bytes durable. The name is durable only after SyncDir
// of its folder.
func (f *File) Sync() error {
	if err := step("fsync", f.Name()); err != nil {
		return err
	}
	return f.f.Sync()
}

// Writeback starts writing the given range to the device without waiting, so
// that a later Sync finds little left to do.
func (f *File) Writeback(off, n int64) {
	// An advice: a file system that refuses it only makes Sync slower.
	_ = unix.SyncFileRange(int(f.f.Fd()), off, n, unix.SYNC_FILE_RANGE_WRITE)
}

// Clone makes the file share all blocks of src (FICLONE). It returns
// ErrNotSupported where the file system cannot, or the two are on different
// ones.
func (f *File) Clone(src *os.File) error {
	if err := step("clone", f.Name()); err != nil {
		return err
	}
	err := unix.IoctlFileClone(int(f.f.Fd()), int(src.Fd()))
	switch {
	case err == nil:
		return nil
	case errors.Is(err, unix.EOPNOTSUPP), errors.Is(err, unix.EXDEV), errors.Is(err, unix.ENOTTY), errors.Is(err, unix.EINVAL), errors.Is(err, unix.ENOSYS):
		return fmt.Errorf("clone into %s: %w", f.Name(), ErrNotSupported)
	}
	return &fs.PathError{Op: "clone", Path: f.Name(), Err: err}
}

// Lock takes the file's flock, shared or exclusive, without waiting. It
// reports whether the lock was had.
func (f *File) Lock(exclusive bool) (bool, error) {
	how := unix.LOCK_SH
	if exclusive {
		how = unix.LOCK_EX
	}
	err := unix.Flock(int(f.f.Fd()), how|unix.LOCK_NB)
	if errors.Is(err, unix.EWOULDBLOCK) {
		return false, nil
	}
	if err != nil {
		return false, &fs.PathError{Op: "flock", Path: f.Name(), Err: err}
	}
	return true, nil
}

// Alone tells whether nobody else can reach the file's bytes at this moment: it
// has one name, and no other open file description or mapping. It asks the
// kernel by a lease (fcntl F_SETLEASE), which it gives back at once.
func (f *File) Alone() (bool, error) {
	var st unix.Stat_t
	if err := unix.Fstat(int(f.f.Fd()), &st); err != nil {
		return false, &fs.PathError{Op: "stat", Path: f.Name(), Err: err}
	}
	if st.Nlink != 1 {
		return false, nil
	}
	if _, err := unix.FcntlInt(f.f.Fd(), unix.F_SETLEASE, unix.F_WRLCK); err != nil {
		return false, nil //nolint:nilerr // somebody has it open, or nobody can tell
	}
	_, _ = unix.FcntlInt(f.f.Fd(), unix.F_SETLEASE, unix.F_UNLCK)
	return true, nil
}

// Close closes the file and drops its locks.
func (f *File) Close() error { return f.f.Close() }

var _ io.ReadWriteCloser = (*File)(nil)

// Mkdir makes a folder with exactly perm, whatever the umask.
func Mkdir(path string, perm fs.FileMode) error {
	if err := step("mkdir", path); err != nil {
		return err
	}
	if err := os.Mkdir(path, perm); err != nil {
		return err
	}
	return exactMode(path, perm)
}

// MkdirAll makes a folder and its missing parents with exactly perm. Folders
// that are there keep their mode.
func MkdirAll(path string, perm fs.FileMode) error {
	if fi, err := os.Stat(path); err == nil {
		if !fi.IsDir() {
			return &fs.PathError{Op: "mkdir", Path: path, Err: unix.ENOTDIR}
		}
		return nil
	}
	if parent := filepath.Dir(path); parent != path {
		if err := MkdirAll(parent, perm); err != nil {
			return err
		}
	}
	if err := Mkdir(path, perm); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	return nil
}

func exactMode(path string, perm fs.FileMode) error {
	fi, err := os.Lstat(path)
	if err != nil {
		return err
	}
	if bits := fs.ModePerm | fs.ModeSticky; fi.Mode()&bits == perm&bits {
		return nil
	}
	return Chmod(path, perm)
}

// Rename moves oldpath over newpath.
func Rename(oldpath, newpath string) error {
	if err := step("rename", newpath); err != nil {
		return err
	}
	return os.Rename(oldpath, newpath)
}

// RenameNoReplace moves oldpath to newpath unless newpath exists, which gives
// fs.ErrExist. File systems that cannot do this in one step (NFS) get a check
// and a rename; the caller must then hold a lock or bear a replacement.
func RenameNoReplace(oldpath, newpath string) error {
	if err := step("rename", newpath); err != nil {
		return err
	}
	err := unix.Renameat2(unix.AT_FDCWD, oldpath, unix.AT_FDCWD, newpath, unix.RENAME_NOREPLACE)
	if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOSYS) {
		if _, statErr := os.Lstat(newpath); statErr == nil {
			err = unix.EEXIST
		} else {
			return os.Rename(oldpath, newpath)
		}
	}
	if err != nil {
		return &os.LinkError{Op: "rename", Old: oldpath, New: newpath, Err: err}
	}
	return nil
}

// Link makes newpath a hard link to oldpath.
func Link(oldpath, newpath string) error {
	if err := step("link", newpath); err != nil {
		return err
	}
	return os.Link(oldpath, newpath)
}

// Symlink makes newpath a symbolic link to oldpath.
func Symlink(oldpath, newpath string) error {
	if err := step("symlink", newpath); err != nil {
		return err
	}
	return os.Symlink(oldpath, newpath)
}

// Remove unlinks a file or an empty folder. A path that is gone is an error,
// as with os.Remove.
func Remove(path string) error {
	if err := step("remove", path); err != nil {
		return err
	}
	return os.Remove(path)
}

// CreateIn makes a new file below root, or empties the one that is there,
// without following a link out of root.
func CreateIn(root *os.Root, name string, perm fs.FileMode) (*File, error) {
	if err := step("open", filepath.Join(root.Name(), name)); err != nil {
		return nil, err
	}
	f, err := root.OpenFile(name, os.O_RDWR|os.O_CREATE|os.O_TRUNC|unix.O_NOFOLLOW, perm)
	if err != nil {
		return nil, err
	}
	return &File{f: f}, nil
}

// RemoveIn unlinks a file or an empty folder below root, without following a
// link out of it.
func RemoveIn(root *os.Root, name string) error {
	if err := step("remove", filepath.Join(root.Name(), name)); err != nil {
		return err
	}
	return root.Remove(name)
}

// RemoveAll removes path and what is below it, each entry as one step. It does
// not follow symbolic links and does not leave path's own mount: an entry on
// another device is an error. A path that is gone is not.
func RemoveAll(path string) error {
	fi, err := os.Lstat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	dev, ok := Device(fi)
	if !ok {
		return &fs.PathError{Op: "remove", Path: path, Err: unix.ENOSYS}
	}
	return removeAll(path, fi, dev)
}

func removeAll(path string, fi fs.FileInfo, dev uint64) error {
	if fi.IsDir() {
		if d, _ := Device(fi); d != dev {
			return &fs.PathError{Op: "remove", Path: path, Err: unix.EXDEV}
		}
		entries, err := os.ReadDir(path)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		for _, e := range entries {
			p := filepath.Join(path, e.Name())
			sub, err := os.Lstat(p)
			if errors.Is(err, fs.ErrNotExist) {
				continue
			}
			if err != nil {
				return err
			}
			if err := removeAll(p, sub, dev); err != nil {
				return err
			}
		}
	}
	if err := Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// Device is the number of the device that holds a file.
func Device(fi fs.FileInfo) (uint64, bool) {
	st, ok := fi.Sys().(*syscall.Stat_t)
	if !ok {
		return 0, false
	}
	return uint64(st.Dev), true
}

// Chmod sets the mode of path, following symbolic links.
func Chmod(path string, mode fs.FileMode) error {
	if err := step("chmod", path); err != nil {
		return err
	}
	return os.Chmod(path, mode)
}

// Lchown sets the owner of path itself; -1 leaves a value as it is.
func Lchown(path string, uid, gid int) error {
	if err := step("chown", path); err != nil {
		return err
	}
	return os.Lchown(path, uid, gid)
}

// Touch sets path's times of access and change.
func Touch(path string, t time.Time) error {
	if err := step("utimes", path); err != nil {
		return err
	}
	return os.Chtimes(path, t, t)
}

// Setxattr sets an extended attribute of path itself. A file system without
// such attributes gives ErrNotSupported.
func Setxattr(path, name string, value []byte) error {
	if err := step("setxattr", path); err != nil {
		return err
	}
	if err := unix.Lsetxattr(path, name, value, 0); err != nil {
		if errors.Is(err, unix.EOPNOTSUPP) {
			err = ErrNotSupported
		}
		return &fs.PathError{Op: "setxattr " + name, Path: path, Err: err}
	}
	return nil
}

// Whiteout makes the character device 0:0 by which overlay hides a name of the
// layers below.
func Whiteout(path string) error {
	if err := step("mknod", path); err != nil {
		return err
	}
	if err := unix.Mknod(path, unix.S_IFCHR, 0); err != nil {
		return &fs.PathError{Op: "mknod", Path: path, Err: err}
	}
	return nil
}

// SyncDir makes the names in a folder durable.
func SyncDir(path string) error {
	if err := step("fsync", path); err != nil {
		return err
	}
	d, err := os.Open(path)
	if err != nil {
		return err
	}
	defer d.Close()
	if err := d.Sync(); err != nil && !errors.Is(err, unix.EINVAL) {
		return err
	}
	return nil
}

// Mount calls mount(2). The error carries fstype, target and data, for the
// kernel itself says no more than a number.
func Mount(source, target, fstype string, flags uintptr, data string) error {
	if err := step("mount", target); err != nil {
		return err
	}
	if err := unix.Mount(source, target, fstype, flags, data); err != nil {
		return &fs.PathError{Op: "mount " + fstype, Path: target, Err: fmt.Errorf("%w (options %q)", err, data)}
	}
	return nil
}

// MakeFileSystem makes an instance of a file system with these options (fsopen(2)),
// mounts it nowhere, and lets go of it. Errors are the kernel's as they are;
// ErrNotSupported where it cannot make one apart from a mount.
func MakeFileSystem(fstype string, options [][2]string) error {
	if err := step("fsopen", fstype); err != nil {
		return err
	}
	fd, err := unix.Fsopen(fstype, unix.FSOPEN_CLOEXEC)
	if errors.Is(err, unix.ENOSYS) {
		return ErrNotSupported
	}
	if err != nil {
		return fmt.Errorf("fsopen %s: %w", fstype, err)
	}
	defer unix.Close(fd)
	for _, o := range options {
		if err := unix.FsconfigSetString(fd, o[0], o[1]); err != nil {
			return fmt.Errorf("fsconfig %s %s=%s: %w", fstype, o[0], o[1], err)
		}
	}
	if err := unix.FsconfigCreate(fd); err != nil {
		return fmt.Errorf("make %s: %w", fstype, err)
	}
	return nil
}

// Unmount calls umount2(2) without following a symbolic link. With detach the
// mount leaves the tree at once and the kernel drops it when its last user
// goes.
func Unmount(target string, detach bool) error {
	if err := step("unmount", target); err != nil {
		return err
	}
	flags := unix.UMOUNT_NOFOLLOW
	if detach {
		flags |= unix.MNT_DETACH
	}
	if err := unix.Unmount(target, flags); err != nil {
		return &fs.PathError{Op: "unmount", Path: target, Err: err}
	}
	return nil
}

// Allocated is the space that a file takes on the disk, in bytes. Blocks that
// clones share count for each of them.
func Allocated(fi fs.FileInfo) int64 {
	if st, ok := fi.Sys().(*syscall.Stat_t); ok {
		return st.Blocks * 512
	}
	return fi.Size()
}

// Free gives the bytes that are free for an ordinary user, and in all, on the
// file system that holds path.
func Free(path string) (free, capacity int64, err error) {
	var st unix.Statfs_t
	if err := unix.Statfs(path, &st); err != nil {
		return 0, 0, &fs.PathError{Op: "statfs", Path: path, Err: err}
	}
	return int64(st.Bavail) * st.Bsize, int64(st.Blocks) * st.Bsize, nil
}
