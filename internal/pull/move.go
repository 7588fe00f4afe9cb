package pull

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"runtime"
	"slices"
	"sync"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sync/errgroup"

	"github.com/larder-project/larder/internal/modelpack"
	"github.com/larder-project/larder/internal/source"
	"github.com/larder-project/larder/internal/store"
)

// Taking files over (Options.Move).
//
// A file is never renamed into the store: a crash would leave it where its
// owner does not look, and clean-up would take it for a remnant. It gets a
// second name (a hard link), becomes a blob under that, and loses its old name
// only when the version is published. So at every moment it is where it was,
// or in a published version, or both.
//
// What a hard link alone would allow is that somebody who has the file open
// for writing changes the blob later. Therefore a file is taken over only under
// a read lease, which the kernel gives when nobody has it open or mapped for
// writing. The lease is held while the file is hashed and until its old name is
// gone; whoever wants to write meanwhile waits in open(2). If somebody does, the
// file is copied instead. Between the commit of the first file and the removal
// of the old names lies one publication; a writer that comes in that moment is
// found afterwards and reported, for the blob can then no longer be trusted.
//
// The blob belongs to whoever runs this process and has mode 0444, so that the
// file's former owner cannot write to it either.
//
// After a crash in that moment the files are where they were, read-only and
// perhaps with another owner, and the same command finishes the work. They
// share their blocks with blobs that no version uses: run it again before
// writing to them. After a crash while old names are removed, a note in the
// folder says which version they belong to, and the same command removes the
// rest.
//
// Files that are small, on another file system, linked elsewhere, or that
// cannot be leased are cloned or copied, and removed at the end as the others.

const (
	// Below this, copying is as fast as linking.
	moveAtLeast = 1 << 20
	// Each leased file is an open one.
	maxMoved = 512
)

type taking struct {
	it     *item
	f      *os.File
	place  string
	still  *stillness
	s      *sums
	linked bool
}

type moved struct {
	mu    sync.Mutex
	files []*taking
}

// tryMove hashes a file where it lies, under a lease. Whether it was taken is
// told by keep: then the file stays open until the end.
func (r *run) tryMove(ctx context.Context, it *item, f *os.File, before fs.FileInfo) (keep bool, err error) {
	p, ok := r.src.(placed)
	if !ok || it.want.Size < moveAtLeast || len(it.paths) > 1 {
		return false, nil
	}
	place, sole, err := p.Place(it.want)
	if err != nil {
		return false, err
	}
	if !sole || !r.sameDevice(before) {
		return false, nil
	}
	if links(before) == 2 {
		// A crash between link and commit left our own second name.
		ing, err := r.st.Ingest(ctx, r.localKey(it, "move-"))
		if err != nil {
			return false, err
		}
		if err := ing.Discard(); err != nil {
			return false, err
		}
		if before, err = f.Stat(); err != nil {
			return false, err
		}
	}
	if links(before) != 1 {
		return false, nil
	}
	t := &taking{it: it, f: f, place: place, still: holdStill(f), s: newSums(it.want.Size, it.wantsGit())}
	defer func() {
		if !keep {
			t.still.release()
		}
	}()
	r.moved.mu.Lock()
	room := len(r.moved.files) < maxMoved
	if room {
		r.moved.files = append(r.moved.files, t)
	}
	r.moved.mu.Unlock()
	if !room {
		return false, nil
	}
	defer func() {
		if !keep {
			r.moved.drop(t)
		}
	}()
	var counted int64
	err = hashFile(ctx, f, it.want.Size, t.s, func(n int64) error {
		if !t.still.held() {
			return errDisturbed
		}
		counted += n
		r.o.Progress.Bytes(it.want.Path, n)
		return nil
	})
	if errors.Is(err, errDisturbed) {
		r.o.Progress.Bytes(it.want.Path, -counted)
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("read file %q: %w", it.want.Path, err)
	}
	if err := errors.Join(unchanged(f, before, it), t.s.check(it.want)); err != nil {
		return false, err
	}
	return true, nil
}

func (m *moved) drop(t *taking) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for i, o := range m.files {
		if o == t {
			m.files = append(m.files[:i], m.files[i+1:]...)
			return
		}
	}
}

// commitMoved makes the leased files blobs, all at the end, so that they have
// two names for as short as possible.
func (r *run) commitMoved(ctx context.Context) error {
	for _, t := range r.moved.files {
		done, err := r.commitOne(ctx, t)
		if err != nil {
			return err
		}
		if done {
			continue
		}
		// It could not be linked, or somebody wants to write: a copy it is.
		t.still.release()
		before, err := t.f.Stat()
		if err != nil {
			return err
		}
		r.o.Progress.Bytes(t.it.want.Path, -t.it.want.Size)
		if err := r.duplicate(ctx, t.it, t.f, before); err != nil {
			return err
		}
	}
	return nil
}

func (r *run) commitOne(ctx context.Context, t *taking) (bool, error) {
	if !t.still.held() {
		return false, nil
	}
	ing, err := r.st.Ingest(ctx, r.localKey(t.it, "move-"))
	if err != nil {
		return false, err
	}
	if err := ing.Adopt(t.place); err != nil {
		return false, ing.Discard() // for instance too many links, or a policy
	}
	mine, err1 := t.f.Stat()
	theirs, err2 := ing.File().Stat()
	if err := errors.Join(err1, err2); err != nil {
		return false, errors.Join(err, ing.Discard())
	}
	if !os.SameFile(mine, theirs) || !t.still.held() {
		return false, ing.Discard() // another file has its name now
	}
	if err := ing.File().Chown(os.Geteuid(), os.Getegid()); err != nil {
		return false, ing.Discard()
	}
	t.linked = true
	if t.it.gitOID == "" {
		t.it.gitOID = t.s.gitOID()
	}
	if err := r.commit(ctx, t.it, ing, t.s, Moved); err != nil {
		return false, errors.Join(err, ing.Discard())
	}
	return true, nil
}

// movable is a source whose files can be removed one by one, and what is left
// of the version at the end. BeginMove leaves a note that tells an interrupted
// move from a model of fewer files.
type movable interface {
	Moving() (digest.Digest, error)
	BeginMove(version digest.Digest) error
	Remove(f source.File) error
	Finish() error
}

// resumeMove ends a move that a crash broke off after it had published: the
// files that are still there and are those of the version are removed. It
// tells whether there was such a move.
func (r *run) resumeMove(ctx context.Context) (Result, bool, error) {
	src, ok := r.src.(movable)
	if !ok {
		return Result{}, false, nil
	}
	d, err := src.Moving()
	if err != nil || d == "" {
		return Result{}, false, err
	}
	if err := r.lease.Hold(ctx, d); err != nil {
		return Result{}, true, err
	}
	_, there, err := r.version(d)
	if err != nil {
		return Result{}, true, err
	}
	if !there {
		return Result{}, true, fmt.Errorf("these are the remains of a folder that was moved into a store as %s, and store %s does not have it; import what is left after removing the file .larder-moved", d, r.st.Dir())
	}
	if !r.o.Move {
		return Result{}, true, fmt.Errorf("a move of these files into the store broke off; the version is there as %s; say --move again to remove what is left of them", d)
	}
	m, err := r.st.Model(d)
	if err != nil {
		return Result{}, true, err
	}
	// Held, then looked up again: a removal may have come between.
	hold := make([]digest.Digest, len(m.Files))
	for i, f := range m.Files {
		hold[i] = f.Digest
	}
	if err := r.lease.Hold(ctx, hold...); err != nil {
		return Result{}, true, err
	}
	version, there, err := r.version(d)
	if err != nil {
		return Result{}, true, err
	}
	if !there {
		return Result{}, true, fmt.Errorf("%s was removed from the store just now; larder undo brings it back, and the same command then goes on", d)
	}
	res := Result{Version: version, Model: m, Unchanged: true}
	r.o.Progress.Start(Plan{Source: m.Source, Revision: m.Revision, Reused: m.Size()})
	known := map[string]modelpack.File{}
	for _, f := range m.Files {
		known[f.Path] = f
		res.Reused += f.Size
		res.Files = append(res.Files, FileResult{Path: f.Path, Digest: f.Digest, Size: f.Size, How: Reused})
	}
	var failed []error
	for _, f := range r.linksFirst() {
		if err := r.removeKnown(ctx, src, f, known[f.Path]); err != nil {
			failed = append(failed, err)
		}
	}
	if len(failed) > 0 {
		return res, true, fmt.Errorf("the version is in the store as %s, but these files were not removed: %w", d, errors.Join(few(failed)...))
	}
	return res, true, src.Finish()
}

// version looks a version up by its digest.
func (r *run) version(d digest.Digest) (store.Version, bool, error) {
	versions, err := r.st.Versions()
	at := slices.IndexFunc(versions, func(v store.Version) bool { return v.Digest == d })
	if err != nil || at < 0 {
		return store.Version{}, false, err
	}
	return versions[at], true, nil
}

// removeKnown removes a file if its bytes are those of the version's file.
func (r *run) removeKnown(ctx context.Context, src movable, f source.File, want modelpack.File) error {
	stays := fmt.Errorf("file %q is not the one that was moved, and stays", f.Path)
	if want.Digest == "" || want.Size != f.Size {
		return stays
	}
	copied, err := r.hashBlob(ctx, want.Digest, want.Size)
	if err != nil {
		return err
	}
	if copied == nil || copied.digest() != want.Digest {
		return fmt.Errorf("file %q stays: its copy in the store, %s, is missing or damaged; run larder verify --quarantine, remove the file .larder-moved and import what is left", f.Path, want.Digest)
	}
	rc, err := r.src.Open(ctx, f, 0, f.Size)
	if err != nil {
		return err
	}
	s := newSums(f.Size, false)
	_, err = io.Copy(s, rc)
	if err := errors.Join(err, rc.Close()); err != nil {
		return err
	}
	if s.digest() != want.Digest {
		return stays
	}
	return src.Remove(f)
}

func few(errs []error) []error {
	const shown = 5
	if more := len(errs) - shown; more > 0 {
		errs = append(errs[:shown], fmt.Errorf("and %d more", more))
	}
	return errs
}

// linksFirst orders the files so that links go before what they lead to: after
// a crash in between what is left is still whole files.
func (r *run) linksFirst() []source.File {
	src, ok := r.src.(placed)
	if !ok {
		return r.snap.Files
	}
	link := func(f source.File) int {
		if _, sole, err := src.Place(f); err == nil && !sole {
			return 0
		}
		return 1
	}
	out := slices.Clone(r.snap.Files)
	slices.SortStableFunc(out, func(a, b source.File) int { return link(a) - link(b) })
	return out
}

// checkReused reads what the store had already, before its only other copy may
// go.
func (r *run) checkReused(ctx context.Context) error {
	var mu sync.Mutex
	var damaged []error
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(max(1, min(r.o.Jobs, runtime.GOMAXPROCS(0))))
	for _, it := range r.items {
		if it.sound {
			continue
		}
		g.Go(func() error {
			s, err := r.hashBlob(ctx, it.digest, it.want.Size)
			if err != nil {
				return err
			}
			if s == nil || s.digest() != it.digest {
				mu.Lock()
				defer mu.Unlock()
				damaged = append(damaged, fmt.Errorf("the store's copy of file %q, %s, is damaged; run larder verify --quarantine, then this command again", it.want.Path, it.digest))
			}
			return nil
		})
	}
	if err := g.Wait(); err != nil {
		return err
	}
	return errors.Join(few(damaged)...)
}

// removeOriginals ends a move: the version is published.
func (r *run) removeOriginals(version digest.Digest) error {
	src, ok := r.src.(movable)
	if !ok {
		return errors.New("this source cannot remove files")
	}
	if err := src.BeginMove(version); err != nil {
		return err
	}
	var disturbed error
	stays := map[string]bool{}
	for _, t := range r.moved.files {
		if t.linked && !t.still.held() {
			stays[t.it.want.Path] = true
			disturbed = errors.Join(disturbed, fmt.Errorf("%w: file %q was opened for writing while it was taken over; it stays where it was, and its copy in the store may change with it: run larder verify", source.ErrChanged, t.it.want.Path))
		}
	}
	var failed []error
	for _, f := range r.linksFirst() {
		if stays[f.Path] {
			continue
		}
		if err := src.Remove(f); err != nil {
			failed = append(failed, err)
		}
	}
	if err := errors.Join(append(few(failed), disturbed)...); err != nil {
		return err
	}
	return src.Finish()
}

// closeMoved lets go of all leased files.
func (r *run) closeMoved() error {
	var errs []error
	for _, t := range r.moved.files {
		t.still.release()
		errs = append(errs, t.f.Close())
	}
	r.moved.files = nil
	return errors.Join(errs...)
}
