package store

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"regexp"
	"strings"
	"time"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"

	"github.com/larder-project/larder/internal/atomicfile"
	"github.com/larder-project/larder/internal/disk"
	"github.com/larder-project/larder/internal/modelpack"
)

const progressSuffix = ".progress"

var ingestKey = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$`)

// Ingest is a blob being written. One process at a time has the ingest of a
// key; what it wrote stays for the next one until Commit or Discard.
type Ingest struct {
	s    *Store
	path string
	file *disk.File
}

// Ingest opens the partial blob of a key, new or left by an earlier process.
// It waits while another process writes the same key; the caller then looks
// again whether the blob is there. Keys are sha256-HEX where the digest is
// known, git-HEX where only the git object id is, or anything unique.
func (s *Store) Ingest(ctx context.Context, key string) (*Ingest, error) {
	if !ingestKey.MatchString(key) || strings.HasSuffix(key, progressSuffix) {
		return nil, fmt.Errorf("ingest: %.100q is not a key", key)
	}
	i := &Ingest{s: s, path: s.path("ingest", key)}
	for {
		mine, err := i.open()
		if err != nil {
			return nil, fmt.Errorf("ingest: %w", err)
		}
		if mine {
			return i, nil
		}
		select {
		case <-ctx.Done():
			return nil, fmt.Errorf("wait for another process that fetches %s: %w", key, ctx.Err())
		case <-time.After(50 * time.Millisecond):
		}
	}
}

// open takes the ingest, and tells whether it is free.
func (i *Ingest) open() (mine bool, err error) {
	for {
		f, err := openPartial(i.path, os.O_CREATE)
		if errors.Is(err, errPublishing) {
			return false, nil
		}
		if err != nil {
			return false, err
		}
		mine, err := f.Lock(true)
		if mine && isAt(f, i.path) {
			i.file = f
			return true, nil
		}
		_ = f.Close()
		if !mine {
			return false, err
		}
		// Its last owner published or dropped it meanwhile.
	}
}

// errPublishing is said of a partial file that a Commit is about to make a blob,
// or has just made one.
var errPublishing = errors.New("another process publishes it")

// openPartial opens a file of ingest/ for writing, also one that Commit has made
// read-only and a death kept from its name. One whose Commit lives stays
// read-only, as a blob is: errPublishing.
func openPartial(path string, flag int) (*disk.File, error) {
	f, err := disk.OpenFile(path, os.O_RDWR|flag, 0o644)
	if !errors.Is(err, fs.ErrPermission) {
		return f, err
	}
	f, err = disk.OpenFile(path, os.O_RDONLY, 0)
	if errors.Is(err, fs.ErrNotExist) { // it was just published, or may not be made here
		return disk.OpenFile(path, os.O_RDWR|flag, 0o644)
	}
	if err != nil {
		return nil, err
	}
	defer f.Close()
	free, err := f.Lock(false)
	if err != nil {
		return nil, err
	}
	if !free || !isAt(f, path) {
		return nil, errPublishing
	}
	if err := f.Chmod(0o644); err != nil {
		return nil, err
	}
	return disk.OpenFile(path, os.O_RDWR|flag, 0o644)
}

// isAt tells whether f is the file that has this path now.
func isAt(f *disk.File, path string) bool {
	mine, err := f.Stat()
	if err != nil {
		return false
	}
	named, err := os.Lstat(path)
	return err == nil && os.SameFile(mine, named)
}

// Locked tells whether some process has the ingest of this key open, for a
// message to the person who waits.
func (s *Store) Locked(key string) bool {
	f, err := disk.OpenFile(s.path("ingest", key), os.O_RDONLY, 0)
	if err != nil {
		return false
	}
	defer f.Close()
	free, err := f.Lock(false)
	return err == nil && !free
}

// File is the partial blob, open for reading and writing.
func (i *Ingest) File() *disk.File { return i.file }

// Progress is what the last SaveProgress stored, or nil.
func (i *Ingest) Progress() ([]byte, error) {
	data, err := os.ReadFile(i.path + progressSuffix)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read progress: %w", err)
	}
	return data, nil
}

// SaveProgress stores which parts of the file are there. It survives the death
// of the process, and is not to be trusted after a power cut: what it promises
// must be checked by hash before Commit.
func (i *Ingest) SaveProgress(data []byte) error {
	if err := atomicfile.WriteVolatile(i.path+progressSuffix, data, 0o644); err != nil {
		return fmt.Errorf("save progress: %w", err)
	}
	return nil
}

// Adopt makes the ingest a hard link to src, a regular file on the store's
// file system, instead of a copy. src keeps its name until the caller removes
// it, which it may do only after the version is published; a process that has
// src open for writing can still change the blob, so src must be a file that
// nobody writes.
func (i *Ingest) Adopt(src string) error {
	tmp := i.s.path("ingest", atomicfile.TempPrefix+randomID())
	if err := disk.Link(src, tmp); err != nil {
		return fmt.Errorf("adopt %s: %w", src, err)
	}
	// For reading only: the caller may hold a read lease on the file, which
	// opening it for writing would break, and Commit needs no more.
	f, err := disk.OpenFile(tmp, os.O_RDONLY, 0)
	if err == nil {
		var ok bool
		if ok, err = f.Lock(true); err == nil && !ok {
			err = fmt.Errorf("%s is locked by another process", src)
		}
	}
	if err == nil {
		err = disk.Rename(tmp, i.path)
	}
	if err != nil {
		if f != nil {
			_ = f.Close()
		}
		return errors.Join(fmt.Errorf("adopt %s: %w", src, err), ignoreAbsent(disk.Remove(tmp)))
	}
	_ = i.file.Close()
	i.file = f
	return nil
}

// Commit makes the file the blob of d: its bytes durable, its mode 0444, its
// name the digest. The caller has computed d from the file's bytes and holds d
// in a lease. The new name is durable once Publish has returned.
// When the blob is there already, the file is dropped, and fresh is false.
func (i *Ingest) Commit(_ context.Context, d digest.Digest, size int64) (fresh bool, err error) {
	if err := modelpack.CheckDigest(d); err != nil {
		return false, fmt.Errorf("commit blob: %w", err)
	}
	fi, err := i.file.Stat()
	if err != nil {
		return false, fmt.Errorf("commit blob %s: %w", d, err)
	}
	if fi.Size() != size {
		return false, fmt.Errorf("commit blob %s: %w: the file has %d bytes, not %d", d, ErrDamaged, fi.Size(), size)
	}
	if err := i.file.Chmod(0o444); err != nil {
		return false, fmt.Errorf("commit blob %s: %w", d, err)
	}
	if err := i.file.Sync(); err != nil {
		return false, fmt.Errorf("commit blob %s: %w", d, full(err))
	}
	err = disk.RenameNoReplace(i.path, i.s.BlobPath(d))
	if errors.Is(err, fs.ErrExist) {
		have, ok, err := i.s.Stat(d)
		if err != nil {
			return false, err
		}
		if ok && have != size {
			return false, fmt.Errorf("commit blob %s: %w: %s has %d bytes, not %d", d, ErrDamaged, i.s.BlobPath(d), have, size)
		}
		return false, i.Discard()
	}
	if err != nil {
		return false, fmt.Errorf("commit blob %s: %w", d, err)
	}
	return true, errors.Join(ignoreAbsent(disk.Remove(i.path+progressSuffix)), i.file.Close())
}

// Discard drops the partial blob.
func (i *Ingest) Discard() error {
	err := ignoreAbsent(disk.Remove(i.path + progressSuffix))
	err = errors.Join(err, ignoreAbsent(disk.Remove(i.path)))
	return errors.Join(err, i.file.Close())
}

// Close leaves the partial blob for a later attempt.
func (i *Ingest) Close() error { return i.file.Close() }

// PutBlob stores a small blob. Like Commit, it leaves the durability of the
// name to Publish.
func (s *Store) PutBlob(ctx context.Context, lease *Lease, data []byte) (digest.Digest, error) {
	d := digest.FromBytes(data)
	if err := lease.Hold(ctx, d); err != nil {
		return "", err
	}
	if _, ok, err := s.Stat(d); err != nil || ok {
		return d, err
	}
	i, err := s.Ingest(ctx, "sha256-"+d.Encoded())
	if err != nil {
		return "", err
	}
	if err := i.file.Truncate(0); err != nil {
		return "", errors.Join(fmt.Errorf("write blob %s: %w", d, full(err)), i.Close())
	}
	if _, err := i.file.WriteAt(data, 0); err != nil {
		return "", errors.Join(fmt.Errorf("write blob %s: %w", d, full(err)), i.Discard())
	}
	if _, err := i.Commit(ctx, d, int64(len(data))); err != nil {
		_ = i.Close()
		return "", err
	}
	return d, nil
}

// full adds ErrFull to the kernel's ways of saying that there is no room.
func full(err error) error {
	if errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT) {
		return fmt.Errorf("%w: %w", ErrFull, err)
	}
	return err
}
