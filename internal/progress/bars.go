package progress

import (
	"fmt"
	"io"
	"sync"
	"time"
	"unicode/utf8"

	"github.com/vbauerster/mpb/v8"
	"github.com/vbauerster/mpb/v8/decor"
)

// maxBars bounds the lines below the sum: a repository of a thousand files
// must not push everything else off the screen.
const maxBars = 6

// Files smaller than this are gone before a bar could be read.
const worthABar = 4 << 20

// bars draws one bar for everything and one for each of the large files under
// way. The library draws from goroutines of its own, which must not wait for
// the meter: they read copies that the meter's calls leave here.
type bars struct {
	w     io.Writer
	p     *mpb.Progress
	total *mpb.Bar
	files map[*file]*mpb.Bar

	mu   sync.Mutex
	line string
}

func newBars(w io.Writer) *bars { return &bars{w: w} }

func (b *bars) start(m *Meter) {
	b.p = mpb.New(mpb.WithOutput(b.w), mpb.WithRefreshRate(150*time.Millisecond), mpb.WithWidth(24))
	b.files = map[*file]*mpb.Bar{}
	b.say(m)
	fmt.Fprintln(b.w, m.plan.What)
	b.total = b.p.AddBar(max(m.plan.Bytes, 1),
		mpb.BarPriority(maxBars+1),
		mpb.AppendDecorators(decor.Any(func(decor.Statistics) string {
			b.mu.Lock()
			defer b.mu.Unlock()
			return " " + b.line
		})),
	)
	b.total.SetCurrent(m.plan.HaveBytes)
}

// say leaves a copy of the sum for the drawing.
func (b *bars) say(m *Meter) {
	line := m.sum()
	b.mu.Lock()
	b.line = line
	b.mu.Unlock()
}

func (b *bars) opened(_ *Meter, f *file) {
	if f.size < worthABar || len(b.files) >= maxBars {
		return
	}
	b.files[f] = b.p.AddBar(f.size,
		mpb.BarRemoveOnComplete(),
		mpb.AppendDecorators(decor.Any(func(s decor.Statistics) string {
			return fmt.Sprintf(" %s of %s  %s", Bytes(s.Current), Bytes(s.Total), tail(f.name, 44))
		})),
	)
}

func (b *bars) moved(m *Meter, f *file) {
	b.say(m)
	// The sum's bar is ended by close alone: rounding, or bytes that are
	// taken back, must not end it early.
	b.total.SetCurrent(min(m.plan.HaveBytes+m.bytes, m.plan.Bytes-1))
	if bar := b.files[f]; bar != nil {
		bar.SetCurrent(min(f.bytes, f.size-1))
	}
}

func (b *bars) finished(m *Meter, f *file) {
	b.say(m)
	if bar := b.files[f]; bar != nil {
		bar.SetCurrent(f.size)
		delete(b.files, f)
	}
}

func (b *bars) note(_ *Meter, _, text string, wait time.Duration) {
	if wait > 0 {
		text += "; waiting " + Duration(wait)
	}
	if b.p == nil {
		fmt.Fprintln(b.w, text)
		return
	}
	fmt.Fprintln(b.p, text) // above the bars
}

func (b *bars) tick(*Meter) {}

func (b *bars) close(m *Meter) {
	b.say(m)
	for _, bar := range b.files {
		bar.Abort(true)
	}
	if m.plan.HaveBytes+m.bytes >= m.plan.Bytes {
		b.total.SetTotal(-1, true)
	} else {
		b.total.Abort(false)
	}
	b.p.Wait()
	b.p = nil
}

// tail keeps the end of a long name, which is what tells files apart.
func tail(name string, n int) string {
	if utf8.RuneCountInString(name) <= n {
		return name
	}
	r := []rune(name)
	return "…" + string(r[len(r)-n+1:])
}
