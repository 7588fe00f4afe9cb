// Package overlay makes, finds and takes away the kernel mounts by which
// containers see views (package view), and the folders that take what
// containers write.
//
// It knows what the kernel at hand can do (Probe), how to lay a view over the
// blobs (Mount), how to bound what is written (NewUpper), and which
// processes keep a mount busy (OpenFiles). It keeps no state of its own: which
// mount belongs to which volume is package volume's to know. Nothing here reads
// a table of all mounts, so that a mount costs the same with two thousand
// others live.
package overlay

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/larder-project/larder/internal/disk"
	"github.com/larder-project/larder/internal/view"
)

// ErrBusy is returned where something still uses a mount.
var ErrBusy = errors.New("mount is in use")

// ErrNotMounted is returned where a mount was expected and there is none.
var ErrNotMounted = errors.New("not mounted")

// source is the first field of our mounts in the mount table.
const source = "larder"

// Mount says how a view is to be mounted. Paths are absolute.
type Mount struct {
	Target string // an empty folder that exists
	View   string // as built by view.Build
	Blobs  string // the store's folder of blobs, the parent of sha256/
	// Upper and Work take what is written; both on one file system, as
	// NewUpper makes them. Of a mount that is ReadOnly they take nothing, and an
	// upper without a work folder is one more layer to be shown.
	Upper, Work string
	ReadOnly    bool
	Method      view.Method // that the view was built with
}

// maxOptions is what mount(2) takes: a page, less its final zero byte. The
// kernel would cut a longer text without a word.
const maxOptions = 4095

// Options is the text of options given to the kernel.
//
// redirect_dir and metacopy make the view's files point at blobs; as uppers
// have the same, a rename of a folder costs no copy and chmod none of data.
// index and nfs_export are off whatever the kernel's defaults: an index binds
// an upper to the very inodes of its lower, but a view is built anew after
// each reboot, and an indexed upper that some other mount namespace still
// holds gives EBUSY.
func (m Mount) Options() (string, error) {
	for _, p := range []string{m.Target, m.View, m.Blobs, m.Upper, m.Work} {
		if p != "" && !filepath.IsAbs(p) {
			return "", fmt.Errorf("mount view: path %q is not absolute", p)
		}
	}
	var b strings.Builder
	b.WriteString("lowerdir=")
	if m.ReadOnly && m.Upper != "" && m.Work == "" {
		b.WriteString(escapeLower(m.Upper) + ":")
	}
	b.WriteString(escapeLower(m.View))
	switch {
	case m.Method == view.DataOnly:
		b.WriteString("::" + escapeLower(m.Blobs))
	case m.Method == view.Lower:
		b.WriteString(":" + escapeLower(m.Blobs))
	case m.Method == view.HardLink && m.ReadOnly && m.Upper == "":
		// Without an upper the kernel wants two layers. The empty folder that
		// is about to be covered serves as the second.
		b.WriteString(":" + escapeLower(m.Target))
	case m.Method == view.HardLink:
	default:
		return "", fmt.Errorf("mount view %s: method %q is not known", m.View, m.Method)
	}
	if m.ReadOnly && m.Work == "" {
		// Without an upper nothing is redirected, and the kernel refuses
		// "on"; what the view says is followed.
		b.WriteString(",redirect_dir=follow")
	} else {
		if m.Upper == "" || m.Work == "" {
			return "", fmt.Errorf("mount view %s: a writable mount needs an upper and a work folder", m.View)
		}
		fmt.Fprintf(&b, ",upperdir=%s,workdir=%s,redirect_dir=on", escape(m.Upper), escape(m.Work))
	}
	b.WriteString(",metacopy=on,index=off,nfs_export=off")
	if b.Len() > maxOptions {
		return "", fmt.Errorf("mount view %s: the paths are too long together (%d bytes of options, the kernel takes %d); choose a shorter root folder", m.View, b.Len(), maxOptions)
	}
	return b.String(), nil
}

// Do mounts the view. Errors of the kernel come with the options and, where
// the cause is known, with what to do.
func (m Mount) Do() error {
	opts, err := m.Options()
	if err != nil {
		return err
	}
	if m.Method == view.HardLink && m.ReadOnly && m.Upper == "" {
		if err := checkEmpty(m.Target); err != nil {
			return fmt.Errorf("mount view: %w", err)
		}
	}
	flags := uintptr(unix.MS_NOSUID | unix.MS_NODEV)
	if m.ReadOnly {
		flags |= unix.MS_RDONLY
	}
	if err := disk.Mount(source, m.Target, "overlay", flags, opts); err != nil {
		return fmt.Errorf("mount view: %w%s", err, hint(err))
	}
	return nil
}

func hint(err error) string {
	switch {
	case errors.Is(err, unix.EPERM):
		return " (mounting needs CAP_SYS_ADMIN)"
	case errors.Is(err, unix.ENODEV):
		return " (this kernel has no overlay file system; load the module overlay)"
	case errors.Is(err, unix.EINVAL):
		return " (the kernel log says more: dmesg | grep overlayfs; `larder doctor` tells what this host can do)"
	case errors.Is(err, unix.ENOENT):
		return " (target, view, blobs, upper or work is not there)"
	}
	return ""
}

// escapeLower quotes what separates layers and options.
func escapeLower(path string) string { return lowerEscapes.Replace(path) }

// escape quotes what separates options; a colon means nothing in an upper.
func escape(path string) string { return optionEscapes.Replace(path) }

var (
	lowerEscapes  = strings.NewReplacer(`\`, `\\`, `:`, `\:`, `,`, `\,`)
	optionEscapes = strings.NewReplacer(`\`, `\\`, `,`, `\,`)
)

func checkEmpty(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	if names, _ := d.Readdirnames(1); len(names) > 0 {
		return fmt.Errorf("%s is not empty", dir)
	}
	return nil
}

// Unmount takes away the topmost mount at target. It returns ErrBusy while
// something in this mount namespace uses it (OpenFiles tells what), and
// ErrNotMounted where nothing is mounted. It never detaches lazily: such a
// mount would live on where nobody can count it.
func Unmount(target string) error {
	err := disk.Unmount(target, false)
	switch {
	case errors.Is(err, unix.EBUSY):
		return fmt.Errorf("%w: %w", ErrBusy, err)
	case errors.Is(err, unix.EINVAL), errors.Is(err, fs.ErrNotExist):
		return fmt.Errorf("%w: %w", ErrNotMounted, err)
	}
	return err
}

// IsMounted tells whether path itself is the root of a mount. A path that is
// not there is not mounted.
func IsMounted(path string) (bool, error) {
	var st unix.Statx_t
	err := unix.Statx(unix.AT_FDCWD, path, unix.AT_SYMLINK_NOFOLLOW|unix.AT_NO_AUTOMOUNT|unix.AT_STATX_DONT_SYNC, unix.STATX_TYPE, &st)
	if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENOTDIR) {
		return false, nil
	}
	if err != nil {
		return false, &fs.PathError{Op: "statx", Path: path, Err: err}
	}
	if st.Attributes_mask&unix.STATX_ATTR_MOUNT_ROOT != 0 {
		return st.Attributes&unix.STATX_ATTR_MOUNT_ROOT != 0, nil
	}
	// Before Linux 5.8: our mounts are file systems of their own, so the
	// device differs from the parent's. Bind mounts would not be seen.
	var parent unix.Statx_t
	if err := unix.Statx(unix.AT_FDCWD, filepath.Dir(path), unix.AT_STATX_DONT_SYNC, unix.STATX_TYPE, &parent); err != nil {
		return false, &fs.PathError{Op: "statx", Path: filepath.Dir(path), Err: err}
	}
	return st.Dev_major != parent.Dev_major || st.Dev_minor != parent.Dev_minor, nil
}

// Device names a file system as the mount table does. While one of its mounts
// lives anywhere, no other has the same; afterwards the kernel may use the
// number again.
type Device struct {
	Major, Minor uint32
}

func (d Device) String() string { return fmt.Sprintf("%d:%d", d.Major, d.Minor) }

// DeviceOf gives the device of the file system mounted at target.
func DeviceOf(target string) (Device, error) {
	var st unix.Statx_t
	if err := unix.Statx(unix.AT_FDCWD, target, unix.AT_SYMLINK_NOFOLLOW|unix.AT_NO_AUTOMOUNT|unix.AT_STATX_DONT_SYNC, unix.STATX_TYPE, &st); err != nil {
		return Device{}, &fs.PathError{Op: "statx", Path: target, Err: err}
	}
	return Device{Major: st.Dev_major, Minor: st.Dev_minor}, nil
}
