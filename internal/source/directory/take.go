package directory

import (
	"errors"
	"io/fs"
	"path"
	"strings"

	"github.com/opencontainers/go-digest"

	"github.com/larder-project/larder/internal/disk"
	"github.com/larder-project/larder/internal/modelpack"
	"github.com/larder-project/larder/internal/source"
)

// Taking files over. Whoever does it publishes the version first, then calls
// BeginMove, Remove for each file, and Finish. A crash on the way leaves the
// note of BeginMove, by which the next attempt knows that what is left is not
// a model of fewer files but the rest of one that was moved.

// moveNote is the note's name: in the folder itself, or in the folder of the
// cache's repository with the commit behind it. Clients pass it over there.
const moveNote = ".larder-moved"

const noteBytes = len("sha256:") + 64 + 1

// note is where the note is, below root; "" for a single file, which is there
// or not.
func (s *Source) note() string {
	switch {
	case s.owner != nil:
		return s.owner.mark(s)
	case s.single:
		return ""
	}
	return moveNote
}

// BeginMove notes durably that the source's files are being removed because
// they are the version with this manifest digest.
func (s *Source) BeginMove(version digest.Digest) error {
	name := s.note()
	if name == "" {
		return nil
	}
	f, err := disk.CreateIn(s.root, name, 0o644)
	if err != nil {
		return &source.Error{Op: "write", What: s.full(name), Err: err}
	}
	_, err = f.Write([]byte(version + "\n"))
	if err == nil {
		err = f.Sync()
	}
	err = errors.Join(err, f.Close())
	if err == nil {
		err = disk.SyncDir(s.full(path.Dir(name)))
	}
	if err != nil {
		return &source.Error{Op: "write", What: s.full(name), Err: err}
	}
	return nil
}

// Moving is the version that an earlier, broken off move of this source has
// published, or "". A note that is cut short was written before anything was
// removed, and means nothing.
func (s *Source) Moving() (digest.Digest, error) {
	name := s.note()
	if name == "" {
		return "", nil
	}
	fi, err := s.root.Lstat(name)
	if errors.Is(err, fs.ErrNotExist) {
		return "", nil
	}
	if err != nil {
		return "", openError(s.full(name), err)
	}
	if !fi.Mode().IsRegular() || fi.Size() != int64(noteBytes) {
		return "", nil
	}
	f, err := s.open(entry{name: name, was: identify(fi)})
	if err != nil {
		return "", err
	}
	defer f.Close()
	data := make([]byte, noteBytes)
	if _, err := f.ReadAt(data, 0); err != nil {
		return "", openError(s.full(name), err)
	}
	d := digest.Digest(strings.TrimSuffix(string(data), "\n"))
	if modelpack.CheckDigest(d) != nil {
		return "", nil
	}
	return d, nil
}

// Place is the path of the file on this machine, the same in each run, and
// whether nothing else is known to use it: then it may be taken over.
func (s *Source) Place(f source.File) (name string, sole bool, err error) {
	e, err := s.entry(f)
	if err != nil {
		return "", false, err
	}
	if s.owner != nil {
		return s.full(e.name), s.owner.sole(e), nil
	}
	return s.full(e.name), e.link == "", nil
}

// Remove takes the file out of the folder, after its bytes have found another
// home. A file that is not the one that was listed stays, with
// source.ErrChanged. Of a linked file the link goes; in a cache the file goes
// with its last link.
func (s *Source) Remove(f source.File) error {
	e, err := s.entry(f)
	if err != nil {
		return err
	}
	fi, err := s.root.Lstat(e.name)
	if err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			return changed(s.full(e.name), "it is gone")
		}
		return openError(s.full(e.name), err)
	}
	if (e.link == "" || s.owner != nil) && identify(fi) != e.was {
		return changed(s.full(e.name), "it was written to or replaced, and stays")
	}
	if s.owner != nil {
		return s.owner.remove(e)
	}
	name := e.name
	if e.link != "" {
		name = e.link
		if to, err := s.root.Readlink(name); err != nil || to != e.to {
			return changed(s.full(name), "it was replaced, and stays")
		}
	}
	if err := disk.RemoveIn(s.root, name); err != nil {
		return &source.Error{Op: "remove", What: s.full(name), Err: err}
	}
	return nil
}

// Finish is called after Remove of every file has succeeded: what the folder
// held for this version alone goes too, the note last. Folders of a plain
// folder stay.
func (s *Source) Finish() error {
	if s.owner != nil {
		s.list.Lock()
		all := make([]entry, 0, len(s.entries))
		for _, e := range s.entries {
			all = append(all, e)
		}
		s.list.Unlock()
		if err := s.owner.finish(s, all); err != nil {
			return err
		}
	}
	name := s.note()
	if name == "" {
		return nil
	}
	if err := disk.RemoveIn(s.root, name); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return &source.Error{Op: "remove", What: s.full(name), Err: err}
	}
	return nil
}
