// Package progress tells how far work on many files is: as bars on a terminal,
// as plain lines every few seconds without one, as JSON events for programs.
//
// A Meter counts; a style prints. The methods of a Meter may be called from
// many goroutines, before Start and after Close too, and never block for long:
// work does not wait for its own progress.
package progress

import (
	"fmt"
	"io"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// Style is how a Meter prints.
type Style int

// The styles.
const (
	None  Style = iota // nothing
	Bars               // for a terminal
	Lines              // for a log
	JSON               // for programs, one object a line
)

// Choose picks the style for w: bars where it is a terminal, else lines.
func Choose(w io.Writer) Style {
	if IsTerminal(w) {
		return Bars
	}
	return Lines
}

// IsTerminal tells whether w shows what it gets to a person.
func IsTerminal(w io.Writer) bool {
	f, ok := w.(interface{ Fd() uintptr })
	if !ok {
		return false
	}
	_, err := unix.IoctlGetTermios(int(f.Fd()), unix.TCGETS)
	return err == nil
}

// Plan is what lies ahead.
type Plan struct {
	What      string // of what, such as hf://org/name@main
	Files     int    // in all; 0 where they are not counted
	Bytes     int64  // in all
	HaveFiles int    // there already, nothing to do
	HaveBytes int64
}

// Meter counts what is done.
type Meter struct {
	style   style
	every   time.Duration
	stop    chan struct{}
	stopped sync.WaitGroup

	mu      sync.Mutex
	plan    Plan
	ticking bool
	started bool // and not finished
	closed  bool
	begin   time.Time
	bytes   int64 // done now, without HaveBytes; resumed bytes count here
	resumed int64 // of bytes, those that cost nothing
	files   int
	open    map[string]*file
	samples []sample
	now     func() time.Time
}

// file is one under way.
type file struct {
	name  string
	size  int64
	bytes int64
}

type sample struct {
	at    time.Time
	bytes int64
}

// style prints. Its methods are called with the meter locked; they must not
// wait for the terminal.
type style interface {
	start(m *Meter)
	opened(m *Meter, f *file)
	moved(m *Meter, f *file)
	finished(m *Meter, f *file)
	note(m *Meter, event, text string, wait time.Duration)
	tick(m *Meter)
	close(m *Meter)
}

// New makes a meter that prints to w.
func New(w io.Writer, s Style) *Meter {
	m := &Meter{open: map[string]*file{}, now: time.Now, stop: make(chan struct{})}
	switch s {
	case Bars:
		m.style = newBars(w)
	case Lines:
		m.style, m.every = &lines{w: w}, 5*time.Second
	case JSON:
		m.style, m.every = &events{w: w}, time.Second
	default:
		m.style = none{}
	}
	return m
}

// Start tells what lies ahead. Called again, as for the next of several
// models, it begins anew.
func (m *Meter) Start(p Plan) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.closed {
		return
	}
	if m.started {
		m.style.close(m)
	}
	m.plan, m.begin = p, m.now()
	m.bytes, m.resumed, m.files = 0, 0, 0
	m.open, m.samples = map[string]*file{}, []sample{{m.begin, 0}}
	m.style.start(m)
	m.started = true
	if !m.ticking && m.every > 0 {
		m.ticking = true
		m.stopped.Add(1)
		go m.ticks()
	}
}

// Finish ends what Start began, so that something else can be printed. Another
// Start may follow.
func (m *Meter) Finish() {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.started {
		m.style.close(m)
		m.started = false
	}
}

func (m *Meter) ticks() {
	defer m.stopped.Done()
	t := time.NewTicker(m.every)
	defer t.Stop()
	for {
		select {
		case <-m.stop:
			return
		case <-t.C:
			m.mu.Lock()
			if m.started {
				m.style.tick(m)
			}
			m.mu.Unlock()
		}
	}
}

// Open tells that work on a file of so many bytes begins, and how many of them
// were there from an earlier attempt.
func (m *Meter) Open(name string, size, have int64) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if !m.started {
		return
	}
	f := m.file(name, size)
	if have > 0 {
		f.bytes += have
		m.bytes += have
		m.resumed += have
		m.style.moved(m, f)
	}
}

func (m *Meter) file(name string, size int64) *file {
	f := m.open[name]
	if f == nil {
		f = &file{name: name, size: size}
		m.open[name] = f
		m.style.opened(m, f)
	}
	return f
}

// Add tells that n more bytes of a file are done. A negative n takes back what
// turned out to be wrong.
func (m *Meter) Add(name string, n int64) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if !m.started {
		return
	}
	f := m.file(name, -1)
	f.bytes += n
	m.bytes += n
	m.sample()
	m.style.moved(m, f)
}

// Done tells that a file is complete.
func (m *Meter) Done(name string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if !m.started {
		return
	}
	f := m.file(name, -1)
	delete(m.open, name)
	m.files++
	m.style.finished(m, f)
}

// Wait tells why nothing moves for a while.
func (m *Meter) Wait(reason string, d time.Duration) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if !m.closed {
		m.style.note(m, "wait", reason, d)
	}
}

// Note tells something that a person should know meanwhile.
func (m *Meter) Note(text string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if !m.closed {
		m.style.note(m, "note", text, 0)
	}
}

// Close ends printing; what comes later is ignored.
func (m *Meter) Close() {
	m.mu.Lock()
	if m.closed {
		m.mu.Unlock()
		return
	}
	if m.started {
		m.style.close(m)
	}
	m.started, m.closed = false, true
	m.mu.Unlock()
	close(m.stop)
	m.stopped.Wait()
}

// window is how far back the rate looks: long enough to be calm, short enough
// to be true.
const window = 10 * time.Second

func (m *Meter) sample() {
	now := m.now()
	last := &m.samples[len(m.samples)-1]
	if len(m.samples) > 1 && now.Sub(last.at) < window/20 {
		return
	}
	m.samples = append(m.samples, sample{now, m.bytes - m.resumed})
	for len(m.samples) > 2 && now.Sub(m.samples[1].at) > window {
		m.samples = m.samples[1:]
	}
}

// rate is bytes a second lately; 0 where nothing can be said.
func (m *Meter) rate() float64 {
	now := m.now()
	for _, s := range m.samples {
		if age := now.Sub(s.at); age <= window || s == m.samples[len(m.samples)-1] {
			if age < 100*time.Millisecond {
				return 0
			}
			return float64(m.bytes-m.resumed-s.bytes) / age.Seconds()
		}
	}
	return 0
}

// left is how long the rest takes at the present rate; negative where nothing
// can be said.
func (m *Meter) left() time.Duration {
	r := m.rate()
	todo := m.plan.Bytes - m.plan.HaveBytes - m.bytes
	if r <= 0 || todo < 0 {
		return -1
	}
	return time.Duration(float64(todo) / r * float64(time.Second))
}

// sum is one line about everything.
func (m *Meter) sum() string {
	done, total := m.plan.HaveBytes+m.bytes, m.plan.Bytes
	s := fmt.Sprintf("%s of %s", Bytes(done), Bytes(total))
	if total > 0 {
		s += fmt.Sprintf(" (%d %%)", done*100/total)
	}
	if r := m.rate(); r > 0 {
		s += fmt.Sprintf(", %s/s", Bytes(int64(r)))
		if left := m.left(); left >= 0 {
			s += ", " + Duration(left) + " left"
		}
	}
	if m.plan.Files > 0 {
		s += fmt.Sprintf(", %d of %d files", m.plan.HaveFiles+m.files, m.plan.Files)
	}
	return s
}
