package pull

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"runtime"
	"sync"
	"sync/atomic"
	"syscall"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sync/semaphore"
	"golang.org/x/sys/unix"

	"github.com/larder-project/larder/internal/disk"
	"github.com/larder-project/larder/internal/source"
)

// local is the state that taking files of this machine needs.
type local struct {
	src   source.Local
	sizes map[int64][]digest.Digest // blobs of the store, as hints

	noClone  atomic.Bool // the file system cannot share blocks with the store
	missing  []*item
	once     sync.Once // guards the check of free space
	spaceErr error
}

// placed is a local source that can say where its files are. All of this
// project can; others are copied under keys made of their paths.
type placed interface {
	Place(f source.File) (name string, sole bool, err error)
}

// takeLocal brings files of this machine into the store.
func (r *run) takeLocal(ctx context.Context, src source.Local, missing []*item) error {
	r.local.src, r.local.missing = src, missing
	var err error
	if r.local.sizes, err = r.sizes(); err != nil {
		return err
	}
	jobs := int64(r.o.Jobs)
	// Small files wait for the disk, large ones for the processor: many of the
	// former at once, of the latter one for each processor.
	large := max(1, jobs/int64(min(runtime.GOMAXPROCS(0), r.o.Jobs)))
	slots := semaphore.NewWeighted(jobs)
	g, gctx := errgroup.WithContext(ctx)
	for _, it := range missing {
		weight := int64(1)
		if it.want.Size > largeFile {
			weight = large
		}
		if slots.Acquire(gctx, weight) != nil {
			break
		}
		g.Go(func() error {
			defer slots.Release(weight)
			return r.take(gctx, it)
		})
	}
	if err := g.Wait(); err != nil {
		return err
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	return r.commitMoved(ctx)
}

// take brings one local file.
func (r *run) take(ctx context.Context, it *item) error {
	f, err := r.local.src.OpenFile(it.want)
	if err != nil {
		return err
	}
	keep := false
	defer func() {
		if !keep {
			_ = f.Close()
		}
	}()
	before, err := f.Stat()
	if err != nil {
		return err
	}
	if before.Size() != it.want.Size {
		return fmt.Errorf("%w: file %q has %d bytes, it had %d", source.ErrChanged, it.want.Path, before.Size(), it.want.Size)
	}
	_ = unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_SEQUENTIAL) // advice
	if it.key() == "" && len(r.local.sizes[it.want.Size]) > 0 {
		// The store may have it: reading costs less than copying.
		found, err := r.takeKnown(ctx, it, f, before)
		if err != nil || found {
			return err
		}
	}
	if r.o.Move {
		if keep, err = r.tryMove(ctx, it, f, before); err != nil || keep {
			return err
		}
	}
	return r.duplicate(ctx, it, f, before)
}

// takeKnown hashes a file and looks whether the store has that content.
func (r *run) takeKnown(ctx context.Context, it *item, f *os.File, before fs.FileInfo) (bool, error) {
	s := newSums(it.want.Size, it.wantsGit())
	if err := hashFile(ctx, f, it.want.Size, s, nil); err != nil {
		return false, fmt.Errorf("read file %q: %w", it.want.Path, err)
	}
	if err := unchanged(f, before, it); err != nil {
		return false, err
	}
	d := s.digest()
	if err := r.lease.Hold(ctx, d); err != nil {
		return false, err
	}
	found, err := r.find(it, d)
	if found {
		it.gitOID = s.gitOID()
		r.o.Progress.Bytes(it.want.Path, it.want.Size)
		r.o.Progress.Done(it.want.Path, Reused)
	}
	return found, err
}

// unchanged tells that nobody wrote to a file while it was read.
func unchanged(f *os.File, before fs.FileInfo, it *item) error {
	now, err := f.Stat()
	if err != nil {
		return err
	}
	if now.Size() != before.Size() || !now.ModTime().Equal(before.ModTime()) {
		return fmt.Errorf("%w: file %q was written to while it was read; run the command again when nothing writes there", source.ErrChanged, it.want.Path)
	}
	return nil
}

// localKey names the ingest of a file of unknown content: always the same for
// the same place, so that what a dead process left is written over and not
// added to.
func (r *run) localKey(it *item, prefix string) string {
	if key := it.key(); key != "" && prefix == "copy-" {
		return key
	}
	name := it.want.Path
	if p, ok := r.src.(placed); ok {
		if at, _, err := p.Place(it.want); err == nil {
			name = at
		}
	}
	return fmt.Sprintf("%s%x", prefix, sha256.Sum256([]byte(name)))
}

// duplicate clones or copies a file into the store.
func (r *run) duplicate(ctx context.Context, it *item, f *os.File, before fs.FileInfo) error {
	ing, err := r.ingest(ctx, it, r.localKey(it, "copy-"))
	if err != nil {
		return err
	}
	if it.want.SHA256 != "" {
		found, err := r.find(it, it.want.SHA256)
		if err != nil {
			return errors.Join(err, ing.Close())
		}
		if found {
			r.o.Progress.Have(it.want.Path, it.want.Size)
			r.o.Progress.Done(it.want.Path, Reused)
			return ing.Discard()
		}
	}
	s, how, err := r.fill(ctx, it, f, before, ing.File())
	if err == nil {
		err = s.check(it.want)
	}
	if err == nil {
		if it.gitOID == "" {
			it.gitOID = s.gitOID()
		}
		err = r.commit(ctx, it, ing, s, how)
	}
	if err != nil {
		// Nothing of it helps a later attempt, which reads the file again.
		return errors.Join(err, ing.Discard())
	}
	return nil
}

// fill gives the ingest the file's content and hashes it.
func (r *run) fill(ctx context.Context, it *item, f *os.File, before fs.FileInfo, to *disk.File) (*sums, How, error) {
	if err := to.Truncate(0); err != nil {
		return nil, 0, err
	}
	progress := func(n int64) { r.o.Progress.Bytes(it.want.Path, n) }
	s := newSums(it.want.Size, it.wantsGit())
	still := holdStill(f)
	defer still.release()
	if cloned, err := r.clone(it, f, to); err != nil {
		return nil, 0, err
	} else if cloned {
		return s, Cloned, errors.Join(hashClone(ctx, it, f, still, to, s, progress), unchanged(f, before, it))
	}
	still.release()
	if err := r.roomForCopies(); err != nil {
		return nil, 0, err
	}
	if it.want.Size > largeFile {
		if err := to.Allocate(it.want.Size); err != nil {
			return nil, 0, fmt.Errorf("store file %q: %w", it.want.Path, full(err))
		}
	}
	if err := copyFile(ctx, f, to, it.want.Size, s, progress); err != nil {
		return nil, 0, fmt.Errorf("copy file %q: %w", it.want.Path, full(err))
	}
	return s, Copied, unchanged(f, before, it)
}

// clone shares the file's blocks with the ingest where that can be done.
func (r *run) clone(it *item, f *os.File, to *disk.File) (bool, error) {
	if r.local.noClone.Load() || it.want.Size == 0 {
		return false, nil
	}
	err := to.Clone(f)
	switch {
	case err == nil:
		return true, nil
	case errors.Is(err, disk.ErrNotSupported):
		r.local.noClone.Store(true)
		return false, nil
	}
	return false, fmt.Errorf("clone file %q: %w", it.want.Path, full(err))
}

// roomForCopies checks the free space once, when it is known that copies must
// be made. Files that the store may have are not counted, nor is anything of a
// move, which copies exceptions only: for those the allocation tells.
func (r *run) roomForCopies() error {
	r.local.once.Do(func() {
		if r.o.Move {
			return
		}
		var rest []*item
		for _, it := range r.local.missing {
			if len(r.local.sizes[it.want.Size]) == 0 {
				rest = append(rest, it)
			}
		}
		r.local.spaceErr = r.checkSpace(rest)
	})
	return r.local.spaceErr
}

// hashClone hashes what was cloned. The original's pages are often in memory
// while the clone's never are; so the original is read where the kernel warrants
// that nobody has written to it since before it was cloned, else the clone.
func hashClone(ctx context.Context, it *item, f *os.File, still *stillness, to *disk.File, s *sums, progress func(int64)) error {
	if still.held() {
		err := hashFile(ctx, f, it.want.Size, s, func(n int64) error {
			if !still.held() {
				return errDisturbed
			}
			progress(n)
			return nil
		})
		if err == nil && still.held() {
			return nil
		}
		still.release()
		if err != nil && !errors.Is(err, errDisturbed) {
			return fmt.Errorf("read file %q: %w", it.want.Path, err)
		}
		progress(-s.n)
		*s = *newSums(it.want.Size, it.wantsGit())
	}
	err := hashFile(ctx, to, it.want.Size, s, func(n int64) error { progress(n); return nil })
	if err != nil {
		return fmt.Errorf("read the clone of file %q: %w", it.want.Path, err)
	}
	return nil
}

var errDisturbed = errors.New("the file was opened for writing")

// stillness is a read lease on a file (fcntl F_SETLEASE): it is given only
// when nobody has the file open or mapped for writing, and who wants to open it
// so then waits until the lease is released, or 45 seconds.
type stillness struct {
	f *os.File
}

func holdStill(f *os.File) *stillness {
	if _, err := unix.FcntlInt(f.Fd(), unix.F_SETLEASE, unix.F_RDLCK); err != nil {
		return &stillness{} // not ours, a network file system, or a writer
	}
	return &stillness{f: f}
}

// held tells whether still nobody has asked to write.
func (s *stillness) held() bool {
	if s.f == nil {
		return false
	}
	kind, err := unix.FcntlInt(s.f.Fd(), unix.F_GETLEASE, 0)
	return err == nil && kind == unix.F_RDLCK
}

func (s *stillness) release() {
	if s.f != nil {
		_, _ = unix.FcntlInt(s.f.Fd(), unix.F_SETLEASE, unix.F_UNLCK) // closing it does the same
		s.f = nil
	}
}

// sameDevice tells whether a file lies on the file system of the store.
func (r *run) sameDevice(fi fs.FileInfo) bool {
	at, err := os.Stat(r.st.BlobsDir())
	if err != nil {
		return false
	}
	a, ok1 := disk.Device(fi)
	b, ok2 := disk.Device(at)
	return ok1 && ok2 && a == b
}

func links(fi fs.FileInfo) uint64 {
	st, ok := fi.Sys().(*syscall.Stat_t)
	if !ok {
		return 0
	}
	return uint64(st.Nlink)
}
