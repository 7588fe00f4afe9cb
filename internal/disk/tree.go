package disk

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// maxDepth bounds how many folders RemoveTree holds open at once. A folder
// deeper than that is moved up first.
const maxDepth = 64

// RemoveTree removes path and all below it, whatever somebody hostile has made
// there: no symbolic link is followed, another mount is an error (EXDEV), and
// folders nested deeper than a path can name are removed too. A path that is
// gone is no error. It can be repeated after a crash.
func RemoveTree(path string) error {
	parent, err := unix.Open(filepath.Dir(path), unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if errors.Is(err, unix.ENOENT) {
		return nil
	}
	if err != nil {
		return &fs.PathError{Op: "open", Path: filepath.Dir(path), Err: err}
	}
	defer unix.Close(parent)
	var st unix.Stat_t
	err = unix.Fstatat(parent, filepath.Base(path), &st, unix.AT_SYMLINK_NOFOLLOW)
	if errors.Is(err, unix.ENOENT) {
		return nil
	}
	if err != nil {
		return &fs.PathError{Op: "stat", Path: path, Err: err}
	}
	r := treeRemover{root: path, dev: st.Dev}
	if err := r.entry(parent, filepath.Base(path), path, 0); err != nil {
		return err
	}
	return nil
}

type treeRemover struct {
	root  string
	dev   uint64
	top   int  // descriptor of the root folder
	moved int  // folders moved up so far
	open  bool // the root folder takes in files of any project
}

// entry removes one name of the folder dir. path is for messages and steps.
func (r *treeRemover) entry(dir int, name, path string, depth int) error {
	err := r.unlink(dir, name, path, 0)
	if err == nil || !errors.Is(err, unix.EISDIR) && !errors.Is(err, unix.EPERM) {
		return err
	}
	fd, openErr := unix.Openat(dir, name, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if openErr != nil {
		// Not a folder: the first error tells why it stays.
		if errors.Is(openErr, unix.ENOTDIR) || errors.Is(openErr, unix.ELOOP) {
			return err
		}
		return &fs.PathError{Op: "open", Path: path, Err: openErr}
	}
	defer unix.Close(fd)
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return &fs.PathError{Op: "stat", Path: path, Err: err}
	}
	if st.Dev != r.dev {
		return &fs.PathError{Op: "remove", Path: path, Err: unix.EXDEV}
	}
	if depth == 0 {
		r.top = fd
	}
	if err := r.empty(fd, path, depth); err != nil {
		return err
	}
	return r.unlink(dir, name, path, unix.AT_REMOVEDIR)
}

// empty removes all that a folder holds. Names are read in batches, and again
// from the start after each, as a folder may change its order while names go.
func (r *treeRemover) empty(fd int, path string, depth int) error {
	for {
		names, err := firstNames(fd)
		if err != nil {
			return &fs.PathError{Op: "read", Path: path, Err: err}
		}
		if len(names) == 0 {
			return nil
		}
		for _, name := range names {
			p := path + "/" + name
			if depth >= maxDepth {
				if ok, err := r.moveUp(fd, name, p); ok || err != nil {
					if err != nil {
						return err
					}
					continue
				}
			}
			if err := r.entry(fd, name, p, depth+1); err != nil {
				return err
			}
		}
	}
}

// moveUp moves a folder to the root, where a later round removes it.
func (r *treeRemover) moveUp(dir int, name, path string) (bool, error) {
	var st unix.Stat_t
	if err := unix.Fstatat(dir, name, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return false, &fs.PathError{Op: "stat", Path: path, Err: err}
	}
	if st.Mode&unix.S_IFMT != unix.S_IFDIR || st.Dev != r.dev {
		return false, nil
	}
	for {
		if err := step("rename", r.root); err != nil {
			return false, err
		}
		r.moved++
		err := unix.Renameat2(dir, name, r.top, fmt.Sprintf(".deep-%d", r.moved), unix.RENAME_NOREPLACE)
		if errors.Is(err, unix.EEXIST) {
			continue
		}
		if errors.Is(err, unix.EXDEV) && !r.open {
			r.open = true
			if err := takeAnyProject(r.top, r.root); err != nil {
				return false, err
			}
			continue
		}
		if err != nil {
			return false, &fs.PathError{Op: "rename", Path: path, Err: err}
		}
		return true, nil
	}
}

func (r *treeRemover) unlink(dir int, name, path string, flags int) error {
	if err := step("remove", path); err != nil {
		return err
	}
	err := unix.Unlinkat(dir, name, flags)
	if err == nil || errors.Is(err, unix.ENOENT) {
		return nil
	}
	return &fs.PathError{Op: "remove", Path: path, Err: err}
}

// firstNames reads up to 1,024 names of a folder, from its start.
func firstNames(fd int) ([]string, error) {
	again, err := unix.Openat(fd, ".", unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	d := os.NewFile(uintptr(again), "")
	defer d.Close()
	names, err := d.Readdirnames(1024)
	if errors.Is(err, io.EOF) {
		err = nil
	}
	return names, err
}
