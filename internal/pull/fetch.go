package pull

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sync/semaphore"

	"github.com/larder-project/larder/internal/source"
	"github.com/larder-project/larder/internal/store"
)

// Files larger than this are fetched in several ranges at once, and their
// progress is saved. Variables, so that tests reach the same code with little
// data.
var (
	largeFile int64 = 64 << 20
	pieceSize int64 = 16 << 20
	saveEvery int64 = 64 << 20
)

// One request asks for at most this many pieces.
const maxRun = 4

// How often a broken connection is taken up again: in a row without one byte,
// and in all for one request.
const (
	maxTries  = 4
	maxBreaks = 20
	firstWait = 100 * time.Millisecond
)

// buffers are what bytes pass through. Their number is bounded by that of
// connections and of hashers, so memory does not depend on the model.
var buffers = sync.Pool{New: func() any { b := make([]byte, 1<<20); return &b }}

// fetch brings every item that the store lacks.
func (r *run) fetch(ctx context.Context) error {
	var missing []*item
	for _, it := range r.items {
		if it.digest == "" {
			missing = append(missing, it)
		}
	}
	if len(missing) == 0 {
		return nil
	}
	// Large files first, so that none is left alone at the end.
	slices.SortStableFunc(missing, func(a, b *item) int {
		switch {
		case a.want.Size > b.want.Size:
			return -1
		case a.want.Size < b.want.Size:
			return 1
		}
		return 0
	})
	if src, ok := r.src.(source.Local); ok {
		return r.takeLocal(ctx, src, missing)
	}
	if err := r.checkSpace(missing); err != nil {
		return err
	}
	n := &network{run: r, conns: semaphore.NewWeighted(int64(r.o.Jobs))}
	g, ctx := errgroup.WithContext(ctx)
	// More files than connections: while some are hashed and made durable, the
	// connections serve others.
	g.SetLimit(2 * r.o.Jobs)
	for _, it := range missing {
		if ctx.Err() != nil {
			break
		}
		g.Go(func() error { return n.item(ctx, it) })
	}
	return g.Wait()
}

// network fetches from a source that is not on this machine.
type network struct {
	*run
	conns *semaphore.Weighted // one unit a connection
}

// item fetches one content and commits it.
func (n *network) item(ctx context.Context, it *item) error {
	ing, err := n.ingest(ctx, it, it.key())
	if err != nil {
		return err
	}
	// Another process may have brought it while this one waited.
	if it.want.SHA256 != "" {
		found, err := n.find(it, it.want.SHA256)
		if err != nil {
			return errors.Join(err, ing.Close())
		}
		if found {
			n.o.Progress.Have(it.want.Path, it.want.Size)
			n.o.Progress.Done(it.want.Path, Reused)
			return ing.Discard()
		}
	}
	s, err := n.content(ctx, it, ing)
	if err != nil {
		var wrong *MismatchError
		if errors.As(err, &wrong) {
			return errors.Join(err, ing.Discard())
		}
		return errors.Join(err, ing.Close())
	}
	if it.gitOID == "" {
		it.gitOID = s.gitOID()
	}
	if err := n.commit(ctx, it, ing, s, Fetched); err != nil {
		return errors.Join(err, ing.Close())
	}
	return nil
}

// commit makes an ingest the blob of its digest. When it fails, the caller
// decides about the ingest.
func (r *run) commit(ctx context.Context, it *item, ing *store.Ingest, s *sums, how How) error {
	d := s.digest()
	if err := r.lease.Hold(ctx, d); err != nil {
		return err
	}
	fresh, err := ing.Commit(ctx, d, it.want.Size)
	if err != nil {
		return fmt.Errorf("file %q: %w", it.want.Path, err)
	}
	it.sound = fresh
	it.have(d, how)
	r.o.Progress.Done(it.want.Path, how)
	return nil
}

// content fetches until the digest is right: on a wrong one everything once
// more from the first byte, for it may have come from an earlier, damaged
// part; then it gives up.
func (n *network) content(ctx context.Context, it *item, ing *store.Ingest) (*sums, error) {
	for again := false; ; again = true {
		var s *sums
		var err error
		if it.want.Size > largeFile {
			s, err = n.large(ctx, it, ing)
		} else {
			s, err = n.small(ctx, it, ing)
		}
		if err != nil {
			return nil, err
		}
		wrong := s.check(it.want)
		if wrong == nil {
			return s, nil
		}
		// The record goes before the bytes, so that no crash leaves a promise
		// without them.
		if err := errors.Join(ing.SaveProgress(nil), ing.File().Truncate(0)); err != nil {
			return nil, errors.Join(wrong, err)
		}
		if again {
			return nil, wrong
		}
		n.o.Progress.Bytes(it.want.Path, -it.want.Size)
		it.resumed = 0
	}
}

// small fetches a file over one connection and hashes as bytes come. An
// earlier attempt's bytes are not used: they are few.
func (n *network) small(ctx context.Context, it *item, ing *store.Ingest) (*sums, error) {
	if err := ing.File().Truncate(0); err != nil {
		return nil, err
	}
	s := newSums(it.want.Size, it.wantsGit())
	err := n.stream(ctx, it, 0, it.want.Size, func(p []byte, at int64) error {
		if _, err := ing.File().WriteAt(p, at); err != nil {
			return full(err)
		}
		_, err := s.Write(p)
		return err
	})
	return s, err
}

// sinkError is a failure on this side, which no new connection cures.
type sinkError struct{ error }

func (e sinkError) Unwrap() error { return e.error }

// stream reads length bytes from offset on and hands them to sink in order.
// Where a connection breaks it goes on from the last byte, a bounded number of
// times.
func (n *network) stream(ctx context.Context, it *item, offset, length int64, sink func(p []byte, at int64) error) error {
	at, end := offset, offset+length
	for tries, breaks := 0, 0; ; {
		if err := n.conns.Acquire(ctx, 1); err != nil {
			return err
		}
		rc, err := n.src.Open(ctx, it.want, at, end-at)
		var got int64
		if err == nil {
			got, err = n.receive(it, rc, at, end, sink)
			at += got
		}
		n.conns.Release(1)
		var here sinkError
		switch {
		case err == nil:
			return nil
		case ctx.Err() != nil:
			return ctx.Err()
		case errors.As(err, &here):
			return here.error
		case final(err):
			return err
		}
		if got > 0 {
			tries = 0
		}
		tries, breaks = tries+1, breaks+1
		if tries >= maxTries || breaks >= maxBreaks {
			return err
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(firstWait << (tries - 1)):
		}
	}
}

// final tells errors that come back however often one asks: the hub has said
// no, or the source has tried as often as makes sense.
func final(err error) bool {
	for _, target := range []error{
		source.ErrUnauthorized, source.ErrGated, source.ErrNotFound,
		source.ErrRateLimited, source.ErrUnavailable, source.ErrInvalid,
	} {
		if errors.Is(err, target) {
			return true
		}
	}
	return false
}

// receive hands the bytes [at, end) of rc to sink and closes rc. It returns
// how many bytes sink has taken.
func (n *network) receive(it *item, rc io.ReadCloser, at, end int64, sink func([]byte, int64) error) (got int64, err error) {
	defer func() {
		if cerr := rc.Close(); err == nil && cerr != nil {
			err = cerr
		}
	}()
	buf := buffers.Get().(*[]byte)
	defer buffers.Put(buf)
	for start := at; at < end; {
		p := (*buf)[:min(int64(len(*buf)), end-at)]
		have, err := io.ReadFull(rc, p)
		if have > 0 {
			if err := sink(p[:have], at); err != nil {
				return at - start, sinkError{fmt.Errorf("store file %q: %w", it.want.Path, err)}
			}
			n.o.Progress.Bytes(it.want.Path, int64(have))
			at += int64(have)
		}
		if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
			return at - start, fmt.Errorf("%w: file %q: the body ends at byte %d, %d were promised", source.ErrChanged, it.want.Path, at, end)
		}
		if err != nil {
			return at - start, fmt.Errorf("file %q: %w", it.want.Path, err)
		}
		got = at - start
	}
	var one [1]byte
	switch extra, err := io.ReadFull(rc, one[:]); {
	case extra > 0:
		return got, fmt.Errorf("%w: file %q: more bytes came than the %d that were promised", source.ErrChanged, it.want.Path, end)
	case !errors.Is(err, io.EOF):
		return got, fmt.Errorf("file %q: %w", it.want.Path, err)
	}
	return got, nil
}
