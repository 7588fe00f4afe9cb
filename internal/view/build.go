package view

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/larder-project/larder/internal/atomicfile"
	"github.com/larder-project/larder/internal/disk"
)

// Extended attributes of overlayfs
// (Documentation/filesystems/overlayfs.rst of Linux).
const (
	xattrMetacopy = "trusted.overlay.metacopy"
	xattrRedirect = "trusted.overlay.redirect"
	xattrOpaque   = "trusted.overlay.opaque"
)

// blobFolder is the one folder at the root of the blobs' layer.
const blobFolder = "sha256"

// Build writes a tree as the folder dir, whose parent must exist. blobsDir
// holds the blobs as sha256/HEX; each one that the tree needs must be there
// with its size. With HardLink it must be on dir's file system.
//
// The folder is made under a temporary name beside dir and renamed: after a
// crash there is a whole view or none, and perhaps a folder that
// atomicfile.SweepDead removes. If dir is there already, Build leaves it and returns nil.
//
// A view is not made durable. After a power cut a sparse file whose attributes
// were lost would read as zeros, and nothing could tell. So the caller keeps
// views in a folder named by the boot id of the kernel, and never uses one of
// an earlier boot.
func Build(ctx context.Context, dir string, t Tree, method Method, blobsDir string) (err error) {
	if err := t.Fits(method); err != nil {
		return err
	}
	if len(t.Entries) == 0 || t.Entries[0].Path != "." || t.Entries[0].Kind != Dir {
		return fmt.Errorf("%w: the tree has no root", ErrInvalid)
	}
	if _, err := os.Lstat(dir); err == nil {
		return nil
	} else if !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("build view: %w", err)
	}
	temp := filepath.Join(filepath.Dir(dir), fmt.Sprintf("%s%d-%s-%s", atomicfile.TempPrefix, os.Getpid(), filepath.Base(dir), rand.Text()))
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("build view %s: %w", dir, err), disk.RemoveAll(temp))
		}
	}()
	b := builder{root: temp, method: method, blobs: blobsDir, seen: make(map[digest.Digest]time.Time)}
	for i, e := range t.Entries {
		if i%256 == 0 && ctx.Err() != nil {
			return ctx.Err()
		}
		if err := b.entry(e); err != nil {
			return err
		}
	}
	if err := b.hideBlobs(); err != nil {
		return err
	}
	if err := disk.Rename(temp, dir); err != nil {
		// Somebody else built the same view meanwhile; it is whole, for it
		// has its name.
		if errors.Is(err, fs.ErrExist) || errors.Is(err, syscall.ENOTEMPTY) {
			return disk.RemoveAll(temp)
		}
		return err
	}
	return nil
}

type builder struct {
	root   string
	method Method
	blobs  string
	seen   map[digest.Digest]time.Time // blobs found well, with their time of change

	blobFolder Kind // of the entry named as the blobs' folder, 0 if none
}

func (b *builder) entry(e Entry) error {
	name := filepath.Join(b.root, filepath.FromSlash(e.Path))
	if e.Path == blobFolder {
		b.blobFolder = e.Kind
	}
	var err error
	switch e.Kind {
	case Dir:
		err = b.dir(name, e)
	case Blob:
		err = b.blob(name, e)
	case Inline:
		err = b.file(name, e, func(f *disk.File) error {
			_, err := f.Write(e.Data)
			return err
		})
	case Symlink:
		if err = disk.Symlink(e.Target, name); err == nil {
			err = b.owner(name, e)
		}
	default:
		err = fmt.Errorf("%w: kind %q of %q is not known", ErrInvalid, e.Kind, e.Path)
	}
	return err
}

func (b *builder) dir(name string, e Entry) error {
	if err := disk.Mkdir(name, e.Mode); err != nil {
		return err
	}
	if e.Path == "." {
		// The parent may hand down its group and its setgid bit; from the root
		// on there is nothing to hand down.
		if err := disk.Lchown(name, int(e.UID), int(e.GID)); err != nil {
			return err
		}
		return disk.Chmod(name, e.Mode)
	}
	return b.owner(name, e)
}

func (b *builder) owner(name string, e Entry) error {
	if e.UID == 0 && e.GID == 0 {
		return nil
	}
	return disk.Lchown(name, int(e.UID), int(e.GID))
}

// file makes a regular file with mode and owner, and lets fill give it its
// content.
func (b *builder) file(name string, e Entry, fill func(*disk.File) error) error {
	f, err := disk.Create(name, 0o600)
	if err != nil {
		return err
	}
	if err := errors.Join(fill(f), f.Close()); err != nil {
		return err
	}
	// The owner first: a change of owner may take bits off the mode.
	if err := b.owner(name, e); err != nil {
		return err
	}
	return disk.Chmod(name, e.Mode)
}

func (b *builder) blob(name string, e Entry) error {
	source := filepath.Join(b.blobs, blobFolder, e.Digest.Encoded())
	changed, err := b.check(source, e)
	if err != nil {
		return err
	}
	if b.method == HardLink {
		err := disk.Link(source, name)
		switch {
		case errors.Is(err, syscall.EXDEV):
			return fmt.Errorf("%w; views of hard links need store and state on one file system under one mount", err)
		case errors.Is(err, syscall.EMLINK):
			return fmt.Errorf("%w: the blob has as many hard links as its file system allows", err)
		}
		return err
	}
	if err := b.file(name, e, func(f *disk.File) error { return f.Truncate(e.Size) }); err != nil {
		return err
	}
	// An empty file needs no data from below.
	if e.Size > 0 {
		if err := disk.Setxattr(name, xattrRedirect, []byte("/"+blobFolder+"/"+e.Digest.Encoded())); err != nil {
			return err
		}
		if err := disk.Setxattr(name, xattrMetacopy, nil); err != nil {
			return err
		}
	}
	// A view built again after a reboot shows the same times.
	return disk.Touch(name, changed)
}

// check looks for a blob once, and returns its time of change.
func (b *builder) check(source string, e Entry) (time.Time, error) {
	if t, ok := b.seen[e.Digest]; ok {
		return t, nil
	}
	fi, err := os.Lstat(source)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return time.Time{}, fmt.Errorf("file %q: blob %s is not in the store; run `larder verify`, then pull the model again: %w", e.Path, e.Digest, err)
	case err != nil:
		return time.Time{}, fmt.Errorf("file %q: blob %s: %w", e.Path, e.Digest, err)
	case !fi.Mode().IsRegular() || fi.Size() != e.Size:
		return time.Time{}, fmt.Errorf("file %q: blob %s is damaged: it has %d bytes instead of %d; run `larder verify`, then pull the model again", e.Path, e.Digest, fi.Size(), e.Size)
	}
	b.seen[e.Digest] = fi.ModTime()
	return fi.ModTime(), nil
}

// hideBlobs keeps the blobs' folder, which an ordinary lower layer would add to
// the root of the view, out of sight: by a whiteout, or, where the model has
// an entry of that name itself, by that entry. A file hides a folder below it;
// a folder would be merged with it unless it is opaque.
func (b *builder) hideBlobs() error {
	if b.method != Lower {
		return nil
	}
	name := filepath.Join(b.root, blobFolder)
	switch b.blobFolder {
	case 0:
		return disk.Whiteout(name)
	case Dir:
		return disk.Setxattr(name, xattrOpaque, []byte("y"))
	}
	return nil
}

// Root describes the root of a built view: upper layers must have the same
// mode and owner, for overlay shows the root of the upper.
func Root(dir string) (mode fs.FileMode, uid, gid int, err error) {
	fi, err := os.Lstat(dir)
	if err != nil {
		return 0, 0, 0, fmt.Errorf("look at view: %w", err)
	}
	st, ok := fi.Sys().(*syscall.Stat_t)
	if !ok || !fi.IsDir() {
		return 0, 0, 0, fmt.Errorf("look at view %s: it is not a folder", dir)
	}
	return fi.Mode() & (fs.ModePerm | fs.ModeSticky), int(st.Uid), int(st.Gid), nil
}
