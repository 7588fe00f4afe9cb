package store

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"strings"
	"syscall"
	"time"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"

	"github.com/larder-project/larder/internal/atomicfile"
	"github.com/larder-project/larder/internal/disk"
)

// BlobStat is what the file system says of a blob.
type BlobStat struct {
	Size      int64     // bytes
	Allocated int64     // bytes on the disk
	Since     time.Time // when it came into the store, or was last touched
}

// Blobs calls f with every blob of the store, until it gives an error. There
// may be a million, so the file system is asked about a blob only where f asks,
// and as directly as can be; there is false for one that was taken out just now.
func (s *Store) Blobs(f func(h Hash, stat func() (st BlobStat, there bool, err error)) error) error {
	dir, err := os.Open(s.path(blobsName, sha256Name))
	if err != nil {
		return fmt.Errorf("list blobs: %w", err)
	}
	defer dir.Close()
	fd := int(dir.Fd())
	for {
		names, err := dir.Readdirnames(4096)
		for _, name := range names {
			h, ok := parseHash(name)
			if !ok {
				continue
			}
			err := f(h, func() (BlobStat, bool, error) {
				var st unix.Stat_t
				err := unix.Fstatat(fd, name, &st, unix.AT_SYMLINK_NOFOLLOW)
				if err != nil {
					return BlobStat{}, false, ignoreAbsent(&fs.PathError{Op: "stat", Path: s.BlobPath(h.Digest()), Err: err})
				}
				return BlobStat{Size: st.Size, Allocated: st.Blocks * 512, Since: later(time.Unix(st.Mtim.Unix()), time.Unix(st.Ctim.Unix()))}, true, nil
			})
			if err != nil {
				return fmt.Errorf("list blobs: %w", err)
			}
		}
		if len(names) == 0 {
			if err != nil && !errors.Is(err, io.EOF) {
				return fmt.Errorf("list blobs: %w", err)
			}
			return nil
		}
	}
}

// changed is when a file was last written, or renamed, whichever is later.
func changed(fi fs.FileInfo) time.Time {
	if st, ok := fi.Sys().(*syscall.Stat_t); ok {
		return later(fi.ModTime(), time.Unix(st.Ctim.Unix()))
	}
	return fi.ModTime()
}

func later(a, b time.Time) time.Time {
	if b.After(a) {
		return b
	}
	return a
}

// Partial is a file in ingest/ that nobody writes.
type Partial struct {
	Name    string
	Size    int64 // bytes on the disk
	Since   time.Time
	Damaged digest.Digest // of the blob that it was, where verify put it there; else empty
}

// Partials lists what was left in ingest/ by pulls that broke off, and by
// verify --quarantine. Files that a process has open there are left out.
func (s *Store) Partials() ([]Partial, error) {
	entries, err := os.ReadDir(s.path("ingest"))
	if err != nil {
		return nil, fmt.Errorf("list unfinished downloads: %w", err)
	}
	var out []Partial
	for _, e := range entries {
		if strings.HasSuffix(e.Name(), progressSuffix) || !e.Type().IsRegular() {
			continue
		}
		fi, err := e.Info()
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("list unfinished downloads: %w", err)
		}
		if s.Locked(e.Name()) {
			continue
		}
		p := Partial{Name: e.Name(), Size: disk.Allocated(fi), Since: changed(fi)}
		if rest, ok := strings.CutPrefix(e.Name(), damagedPrefix); ok {
			hex, _, _ := strings.Cut(rest, "-")
			p.Damaged = digest.NewDigestFromEncoded(digest.SHA256, hex)
		}
		out = append(out, p)
	}
	return out, nil
}

// DropPartial deletes a file that Partials listed, unless somebody has taken
// it up since. It tells whether it did.
func (s *Store) DropPartial(p Partial) (bool, error) {
	if atomicfile.IsTemp(p.Name) {
		// Of a move that broke off: another name of a file that its owner has
		// as well.
		if err := ignoreAbsent(disk.Remove(s.path("ingest", p.Name))); err != nil {
			return false, fmt.Errorf("drop %s: %w", p.Name, err)
		}
		return true, nil
	}
	f, err := disk.OpenFile(s.path("ingest", p.Name), os.O_RDONLY, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("drop unfinished download: %w", err)
	}
	mine, err := f.Lock(true)
	if errors.Is(err, unix.EBADF) { // NFS locks no file that is open for reading alone
		_ = f.Close()
		f, err = openPartial(s.path("ingest", p.Name), 0)
		if errors.Is(err, errPublishing) {
			return false, nil
		}
		if err != nil {
			return false, fmt.Errorf("drop unfinished download: %w", err)
		}
		mine, err = f.Lock(true)
	}
	i := &Ingest{s: s, path: s.path("ingest", p.Name), file: f}
	if err != nil || !mine || !isAt(f, i.path) {
		return false, errors.Join(err, f.Close())
	}
	if fi, err := f.Stat(); err != nil || changed(fi).After(p.Since) {
		return false, errors.Join(err, f.Close())
	}
	if err := i.Discard(); err != nil {
		return false, fmt.Errorf("drop unfinished download: %w", err)
	}
	return true, nil
}
