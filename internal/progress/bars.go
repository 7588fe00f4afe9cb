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

// Files smaller than this are gone before one could read about them.
const large = 4 << 20

// barWidth is how wide a bar is where the terminal has room, in columns.
const barWidth = 24

// bars draws one bar for everything and one for each of the large files under
// way. The library draws from goroutines of its own, which must not wait for
// the meter: they read copies that the meter's calls leave here.
type bars struct {
	w     io.Writer
	p     *mpb.Progress
	total *bar
	files map[*file]*bar
}

// bar is a line of the terminal.
type bar struct {
	*mpb.Bar

	mu   sync.Mutex
	text string
}

func (b *bar) say(text string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.text = text
}

func (b *bar) said() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.text
}

func newBars(w io.Writer) *bars { return &bars{w: w} }

func (b *bars) start(m *Meter) {
	b.p = mpb.New(mpb.WithOutput(b.w), mpb.WithRefreshRate(150*time.Millisecond), mpb.WithWidth(barWidth))
	b.files = map[*file]*bar{}
	fmt.Fprintln(b.w, m.plan.What)
	total := &bar{text: m.sum()}
	total.Bar = b.p.AddBar(max(m.plan.Bytes, 1),
		mpb.BarPriority(maxBars+1),
		mpb.AppendDecorators(decor.Any(func(decor.Statistics) string { return " " + total.said() })),
	)
	total.SetCurrent(m.plan.HaveBytes)
	b.total = total
}

func (b *bars) opened(m *Meter, f *file) {
	if f.size < large || len(b.files) >= maxBars {
		return
	}
	line := &bar{text: f.sum(m.now())}
	line.Bar = b.p.AddBar(f.size,
		mpb.BarRemoveOnComplete(),
		mpb.AppendDecorators(decor.Any(func(s decor.Statistics) string {
			text := " " + line.said() + "  "
			room := s.AvailableWidth - barWidth - 2 - utf8.RuneCountInString(text)
			return text + tail(f.name, min(max(room, 24), 44))
		})),
	)
	b.files[f] = line
}

func (b *bars) moved(m *Meter, f *file) {
	// The sum's bar is ended by close alone: rounding, or bytes that are
	// taken back, must not end it early.
	b.total.SetCurrent(min(m.done(), m.plan.Bytes-1))
	if line := b.files[f]; line != nil {
		line.SetCurrent(min(f.bytes, f.size-1))
	}
}

func (b *bars) finished(m *Meter, f *file) {
	if line := b.files[f]; line != nil {
		line.SetCurrent(f.size)
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

// tick says how things are also when nothing moves: the rate falls.
func (b *bars) tick(m *Meter) {
	b.total.say(m.sum())
	now := m.now()
	for f, line := range b.files {
		line.say(f.sum(now))
	}
}

func (b *bars) close(m *Meter) {
	b.tick(m)
	for _, line := range b.files {
		line.Abort(true)
	}
	if m.done() >= m.plan.Bytes {
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
