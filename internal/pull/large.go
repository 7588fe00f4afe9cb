package pull

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"strings"
	"sync"

	"golang.org/x/sync/errgroup"

	"github.com/larder-project/larder/internal/store"
)

// download is one large file on its way: several connections each take the
// next pieces, and one hasher follows the end of the unbroken beginning,
// reading back what the page cache still has.
type download struct {
	n   *network
	it  *item
	ing *store.Ingest

	mu     sync.Mutex
	grown  sync.Cond // a piece is done, or the download has failed
	done   []bool    // pieces whose bytes are in the file
	next   int       // the first piece that nobody has taken
	failed bool
	fresh  int64 // bytes that the saved progress does not have

	saving sync.Mutex
}

// progress is what is saved of a download. It may be wrong after a power cut,
// or claim pieces that the disk lost; so everything is hashed again.
type progress struct {
	Boot  string `json:"boot"` // id of the boot in which it was saved
	Size  int64  `json:"size"` // of the file, in bytes
	Piece int64  `json:"piece"`
	Done  []byte `json:"done"` // bit i%8 of byte i/8: piece i is there
}

func bootID() string {
	id, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return "" // then no progress is taken for this boot's
	}
	return strings.TrimSpace(string(id))
}

// large fetches a file in pieces, from where an earlier attempt was.
func (n *network) large(ctx context.Context, it *item, ing *store.Ingest) (*sums, error) {
	size := it.want.Size
	d := &download{n: n, it: it, ing: ing, done: make([]bool, (size+pieceSize-1)/pieceSize)}
	d.grown.L = &d.mu
	if err := d.resume(ctx); err != nil {
		return nil, err
	}
	// All the room now: a full disk shows before the first byte.
	if err := ing.File().Allocate(size); err != nil {
		return nil, fmt.Errorf("store file %q: %w", it.want.Path, full(err))
	}
	s := newSums(size, it.wantsGit())
	g, gctx := errgroup.WithContext(ctx)
	stop := context.AfterFunc(gctx, d.fail)
	for range min(n.o.Jobs, len(d.done)) {
		g.Go(func() error { return d.connection(gctx) })
	}
	g.Go(func() error { return d.hash(gctx, s) })
	err := g.Wait()
	stop()
	if err != nil {
		// What is there stays useful to the next attempt, also after Ctrl-C.
		return nil, errors.Join(err, d.save())
	}
	return s, nil
}

// resume takes over what an earlier attempt has saved.
func (d *download) resume(ctx context.Context) error {
	data, err := d.ing.Progress()
	if err != nil {
		return err
	}
	var p progress
	size := d.it.want.Size
	fi, err := d.ing.File().Stat()
	if err != nil {
		return err
	}
	if json.Unmarshal(data, &p) != nil || p.Size != size || p.Piece != pieceSize || len(p.Done) != (len(d.done)+7)/8 {
		// Nothing useful is known. Bytes of a file of another size must not
		// stay behind the end of this one.
		return d.ing.File().Truncate(0)
	}
	for i := range d.done {
		if p.Done[i/8]&(1<<(i%8)) == 0 {
			continue
		}
		off, n := d.piece(i)
		if off+n > fi.Size() {
			continue
		}
		if p.Boot == "" || p.Boot != bootID() {
			lost, err := d.lost(ctx, off, n)
			if err != nil {
				return err
			}
			if lost {
				continue
			}
		}
		d.done[i] = true
		d.it.resumed += n
	}
	d.n.o.Progress.Have(d.it.want.Path, d.it.resumed)
	return nil
}

// lost tells whether a piece saved in an earlier boot may lack bytes: file
// systems give back zeros for pages that a power cut kept from the disk. A
// piece with a page of zeros is fetched again; if they belong there, that
// costs one piece.
func (d *download) lost(ctx context.Context, off, n int64) (bool, error) {
	const page = 4096
	var zero [page]byte
	buf := buffers.Get().(*[]byte)
	defer buffers.Put(buf)
	for end := off + n; off < end; {
		if err := ctx.Err(); err != nil {
			return false, err
		}
		p := (*buf)[:min(int64(len(*buf)), end-off)]
		if _, err := d.ing.File().ReadAt(p, off); err != nil {
			return false, fmt.Errorf("read partial file: %w", err)
		}
		off += int64(len(p))
		for len(p) > 0 {
			k := min(page, len(p))
			if bytes.Equal(p[:k], zero[:k]) {
				return true, nil
			}
			p = p[k:]
		}
	}
	return false, nil
}

// piece is the range of piece i.
func (d *download) piece(i int) (off, n int64) {
	off = int64(i) * pieceSize
	return off, min(pieceSize, d.it.want.Size-off)
}

// take gives the next run of pieces that nobody has, shorter towards the end
// so that all connections finish together.
func (d *download) take() (from, to int) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for d.next < len(d.done) && d.done[d.next] {
		d.next++
	}
	from = d.next
	run := min(maxRun, 1+(len(d.done)-from)/(2*d.n.o.Jobs))
	for d.next < len(d.done) && d.next < from+run && !d.done[d.next] {
		d.next++
	}
	return from, d.next
}

func (d *download) connection(ctx context.Context) error {
	for {
		from, to := d.take()
		if from == to {
			return nil
		}
		off, _ := d.piece(from)
		last, n := d.piece(to - 1)
		i, begun := from, off
		err := d.n.stream(ctx, d.it, off, last+n-off, func(p []byte, at int64) error {
			if _, err := d.ing.File().WriteAt(p, at); err != nil {
				return full(err)
			}
			for at += int64(len(p)); i < to; i++ {
				off, n := d.piece(i)
				if at < off+n {
					break
				}
				d.ing.File().Writeback(begun, off+n-begun)
				begun = off + n
				if err := d.mark(i, n); err != nil {
					return err
				}
			}
			return nil
		})
		if err != nil {
			return err
		}
	}
}

// mark records that a piece is there.
func (d *download) mark(i int, n int64) error {
	d.mu.Lock()
	d.done[i] = true
	d.fresh += n
	due := d.fresh >= saveEvery
	d.grown.Broadcast()
	d.mu.Unlock()
	if due {
		return d.save()
	}
	return nil
}

func (d *download) fail() {
	d.mu.Lock()
	d.failed = true
	d.grown.Broadcast()
	d.mu.Unlock()
}

// save stores which pieces are there.
func (d *download) save() error {
	d.saving.Lock()
	defer d.saving.Unlock()
	d.mu.Lock()
	if d.fresh == 0 {
		d.mu.Unlock()
		return nil
	}
	p := progress{Boot: bootID(), Size: d.it.want.Size, Piece: pieceSize, Done: make([]byte, (len(d.done)+7)/8)}
	for i, ok := range d.done {
		if ok {
			p.Done[i/8] |= 1 << (i % 8)
		}
	}
	d.fresh = 0
	d.mu.Unlock()
	data, err := json.Marshal(p)
	if err != nil {
		return err
	}
	return full(d.ing.SaveProgress(data))
}

// hash follows the download from the first piece to the last.
func (d *download) hash(ctx context.Context, s *sums) error {
	buf := buffers.Get().(*[]byte)
	defer buffers.Put(buf)
	for i := range d.done {
		d.mu.Lock()
		for !d.done[i] && !d.failed {
			d.grown.Wait()
		}
		failed := d.failed
		d.mu.Unlock()
		if failed {
			return ctx.Err()
		}
		off, n := d.piece(i)
		for end := off + n; off < end; {
			p := (*buf)[:min(int64(len(*buf)), end-off)]
			if _, err := d.ing.File().ReadAt(p, off); err != nil {
				return fmt.Errorf("read back file %q: %w", d.it.want.Path, err)
			}
			_, _ = s.Write(p)
			off += int64(len(p))
		}
	}
	return nil
}
