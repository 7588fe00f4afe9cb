// Package directory gives models that lie on this machine: a folder, one file,
// or the revisions of a Hugging Face cache.
//
// All access goes through one open folder (os.Root): a name can lead nowhere
// else, also when somebody exchanges folders for links meanwhile. A symbolic
// link to a regular file inside the folder counts as that file. A link that
// leads out of the folder or nowhere, a link to a folder, a device, a socket
// and a FIFO are refused by name: leaving them out in silence would give a
// model that lacks a file.
//
// Hidden files belong to the model, but for the book-keeping of tools: ".git"
// at any depth, and ".cache/huggingface" at the top, which the hub's client
// writes into folders that it downloads to.
//
// Each file is remembered as it was when it was listed (device, inode, size,
// time of change). A file that has become another one, before or while it is
// read, is source.ErrChanged.
package directory

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/larder-project/larder/internal/modelpack"
	"github.com/larder-project/larder/internal/reference"
	"github.com/larder-project/larder/internal/source"
)

// Options say as what a folder is to be published.
type Options struct {
	References []reference.Reference
}

// Source is one version of a model on this machine. It implements
// source.Source and source.Local.
type Source struct {
	root  *os.Root
	base  string // real path of root
	dir   string // below root, what is listed: "." or a snapshot of a cache
	owner taker  // what else uses a file; nil for a plain folder

	single bool // the source is one file, not a folder

	list    sync.Mutex
	listed  bool
	snap    source.Snapshot
	entries map[string]entry // by path of the model; written once
}

// entry is where a file lies and what it was when it was listed.
type entry struct {
	name string // below root; what is opened
	link string // below root: the link that stands for it, or ""
	to   string // of a link in a plain folder: where it leads
	was  identity
}

// identity tells one state of a file from another. A writer that sets the time
// of change back is not found by it; the digest is then that of what was read.
type identity struct {
	dev, ino uint64
	size     int64
	changed  time.Time
}

func identify(fi fs.FileInfo) identity {
	id := identity{size: fi.Size(), changed: fi.ModTime()}
	if st, ok := fi.Sys().(*syscall.Stat_t); ok {
		id.dev, id.ino = uint64(st.Dev), st.Ino
	}
	return id
}

// taker is told by a cache what taking a file over means for its neighbours.
type taker interface {
	sole(e entry) bool                   // nothing else refers to the file
	remove(e entry) error                // the version no longer needs it
	finish(s *Source, all []entry) error // every file of the version is gone
	mark(s *Source) string               // name of the note below
}

// New opens a folder, or a single file, as a source. The path itself may be a
// symbolic link: whoever named it meant what it points to.
func New(name string, opts Options) (*Source, error) {
	base, err := filepath.Abs(name)
	if err == nil {
		base, err = filepath.EvalSymlinks(base)
	}
	if err != nil {
		return nil, openError(name, err)
	}
	fi, err := os.Stat(base)
	if err != nil {
		return nil, openError(name, err)
	}
	s := &Source{base: base, dir: ".", snap: source.Snapshot{References: slices.Clone(opts.References)}}
	var one string
	switch {
	case fi.IsDir():
	case fi.Mode().IsRegular():
		s.base, one = filepath.Dir(base), filepath.Base(base)
	default:
		return nil, refuse(name, "is a "+kind(fi.Mode()), "a model is a folder or a regular file")
	}
	if s.root, err = os.OpenRoot(s.base); err != nil {
		return nil, openError(name, err)
	}
	if one != "" {
		if err := modelpack.CheckPath(one); err != nil {
			return nil, invalid(name, err)
		}
		s.add(one, entry{name: one, was: identify(fi)})
		s.listed, s.single = true, true
	}
	return s, nil
}

// Close lets go of the folder. Sources of one cache share theirs.
func (s *Source) Close() error { return s.root.Close() }

func openError(name string, err error) error {
	e := &source.Error{Op: "open", What: name, Err: err}
	if errors.Is(err, fs.ErrNotExist) {
		e.Err = fmt.Errorf("%w: %w", source.ErrNotFound, err)
		e.Hint = "check the path"
	}
	return e
}

func refuse(name, why, hint string) error {
	return &source.Error{Op: "import", What: name, Hint: hint, Err: fmt.Errorf("%w: it %s", source.ErrInvalid, why)}
}

func invalid(name string, err error) error {
	return &source.Error{Op: "import", What: name, Err: fmt.Errorf("%w: %w", source.ErrInvalid, err)}
}

func kind(m fs.FileMode) string {
	switch {
	case m&fs.ModeSymlink != 0:
		return "symbolic link"
	case m&fs.ModeDir != 0:
		return "folder"
	case m&fs.ModeNamedPipe != 0:
		return "FIFO"
	case m&fs.ModeSocket != 0:
		return "socket"
	case m&fs.ModeDevice != 0:
		return "device"
	}
	return "special file"
}

// Snapshot lists the folder, once.
func (s *Source) Snapshot(ctx context.Context) (source.Snapshot, error) {
	s.list.Lock()
	defer s.list.Unlock()
	if !s.listed {
		s.snap.Files, s.entries = nil, nil
		if err := s.walk(ctx, s.dir, ""); err != nil {
			return source.Snapshot{}, err
		}
		if moving, err := s.Moving(); err != nil {
			return source.Snapshot{}, err
		} else if len(s.snap.Files) == 0 && moving == "" {
			return source.Snapshot{}, refuse(s.base, "has no files", "a model needs at least one")
		}
		s.sort()
		s.listed = true
	}
	snap := s.snap
	snap.Files = slices.Clone(s.snap.Files)
	snap.References = slices.Clone(s.snap.References)
	return snap, nil
}

func (s *Source) sort() {
	slices.SortFunc(s.snap.Files, func(a, b source.File) int { return strings.Compare(a.Path, b.Path) })
}

func (s *Source) add(name string, e entry) {
	if s.entries == nil {
		s.entries = map[string]entry{}
	}
	s.entries[name] = e
	s.snap.Files = append(s.snap.Files, source.File{Path: name, Size: e.was.size})
}

// leftOut tells whether a path of the model is a tool's book-keeping.
func leftOut(name string) bool {
	return path.Base(name) == ".git" || name == ".cache/huggingface" || name == moveNote
}

// walk lists the folder at dir below root, which is at prefix in the model.
func (s *Source) walk(ctx context.Context, dir, prefix string) error {
	if err := ctx.Err(); err != nil {
		return fmt.Errorf("list %s: %w", s.base, err)
	}
	d, err := s.root.Open(dir)
	if err != nil {
		return openError(s.full(dir), err)
	}
	entries, err := d.ReadDir(-1)
	_ = d.Close()
	if err != nil {
		return openError(s.full(dir), err)
	}
	for _, e := range entries {
		name, real := path.Join(prefix, e.Name()), path.Join(dir, e.Name())
		if leftOut(name) {
			continue
		}
		if err := modelpack.CheckPath(name); err != nil {
			return invalid(s.full(real), err)
		}
		if e.IsDir() {
			if err := s.walk(ctx, real, name); err != nil {
				return err
			}
			continue
		}
		found, err := s.look(real)
		if err != nil {
			if d, _ := s.Moving(); d != "" && e.Type() == fs.ModeSymlink && errors.Is(err, source.ErrInvalid) {
				continue // what it led to has been moved
			}
			return err
		}
		if len(s.snap.Files) >= modelpack.MaxFiles {
			return refuse(s.base, fmt.Sprintf("has more than %d files", modelpack.MaxFiles), "is this the folder of one model?")
		}
		s.add(name, found)
	}
	return nil
}

// look describes one file of a plain folder.
func (s *Source) look(name string) (entry, error) {
	fi, err := s.root.Lstat(name)
	if err != nil {
		return entry{}, openError(s.full(name), err)
	}
	e := entry{name: name}
	if fi.Mode()&fs.ModeSymlink != 0 {
		target, _ := s.root.Readlink(name)
		e.to = target
		if fi, err = s.root.Stat(name); err != nil {
			return entry{}, refuse(s.full(name), fmt.Sprintf("is a symbolic link to %s, which is missing or outside of %s", target, s.base),
				"copy the file to the link's place, or remove the link")
		}
		if fi.IsDir() {
			return entry{}, refuse(s.full(name), fmt.Sprintf("is a symbolic link to the folder %s", target), "links to folders are not followed; copy the folder to the link's place, or remove the link")
		}
		e.link = name
	}
	if !fi.Mode().IsRegular() {
		return entry{}, refuse(s.full(name), "is a "+kind(fi.Mode()), "a model has regular files only; remove it or move it away")
	}
	e.was = identify(fi)
	return e, nil
}

func (s *Source) full(name string) string { return filepath.Join(s.base, filepath.FromSlash(name)) }

func (s *Source) entry(f source.File) (entry, error) {
	s.list.Lock()
	defer s.list.Unlock()
	e, ok := s.entries[f.Path]
	if !ok {
		return entry{}, &source.Error{Op: "open", What: s.full(path.Join(s.dir, f.Path)), Err: fmt.Errorf("%w: it is not in the list of files", source.ErrNotFound)}
	}
	return e, nil
}

// OpenFile implements source.Local.
func (s *Source) OpenFile(f source.File) (*os.File, error) {
	e, err := s.entry(f)
	if err != nil {
		return nil, err
	}
	return s.open(e)
}

func (s *Source) open(e entry) (*os.File, error) {
	// O_NONBLOCK: should the file have become a FIFO, opening it does not wait.
	file, err := s.root.OpenFile(e.name, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, changed(s.full(e.name), "it is gone")
	}
	if err != nil {
		return nil, openError(s.full(e.name), err)
	}
	if err := s.same(file, e); err != nil {
		_ = file.Close()
		return nil, err
	}
	return file, nil
}

func (s *Source) same(file *os.File, e entry) error {
	fi, err := file.Stat()
	if err != nil {
		return openError(s.full(e.name), err)
	}
	now := identify(fi)
	switch {
	case !fi.Mode().IsRegular():
		return changed(s.full(e.name), "it is a "+kind(fi.Mode())+" now")
	case now.size != e.was.size:
		return changed(s.full(e.name), fmt.Sprintf("it has %d bytes, it had %d", now.size, e.was.size))
	case now != e.was:
		return changed(s.full(e.name), "it was written to or replaced")
	}
	return nil
}

func changed(name, why string) error {
	return &source.Error{Op: "read", What: name, Hint: "run the command again when nothing writes there", Err: fmt.Errorf("%w: %s", source.ErrChanged, why)}
}

// Open implements source.Source.
func (s *Source) Open(ctx context.Context, f source.File, offset, length int64) (io.ReadCloser, error) {
	e, err := s.entry(f)
	if err != nil {
		return nil, err
	}
	if offset < 0 || length < 0 || offset > e.was.size || length > e.was.size-offset {
		return nil, &source.Error{Op: "read", What: s.full(e.name), Err: fmt.Errorf("%w: bytes %d to %d of a file of %d", source.ErrInvalid, offset, offset+length, e.was.size)}
	}
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	file, err := s.open(e)
	if err != nil {
		return nil, err
	}
	return &reader{ctx: ctx, s: s, e: e, file: file, at: offset, end: offset + length}, nil
}

// reader gives one range, and looks at its end whether the file is still the
// same.
type reader struct {
	ctx     context.Context
	s       *Source
	e       entry
	file    *os.File
	at, end int64
}

func (r *reader) Read(p []byte) (int, error) {
	if err := r.ctx.Err(); err != nil {
		return 0, err
	}
	if r.at == r.end {
		if err := r.s.same(r.file, r.e); err != nil {
			return 0, err
		}
		return 0, io.EOF
	}
	if n := r.end - r.at; int64(len(p)) > n {
		p = p[:n]
	}
	n, err := r.file.ReadAt(p, r.at)
	r.at += int64(n)
	if errors.Is(err, io.EOF) {
		err = nil
		if n < len(p) {
			err = changed(r.s.full(r.e.name), "it became shorter")
		}
	}
	return n, err
}

func (r *reader) Close() error { return r.file.Close() }
