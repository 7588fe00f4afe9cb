// Package progress tells how far work on many files is: as bars on a terminal,
// as plain lines every few seconds without one, as JSON events for programs.
//
// A Meter counts; a style prints. The methods of a Meter may be called from
// many goroutines, before Start and after Close too, and never block for long:
// work does not wait for its own progress.
package progress

import (
	"cmp"
	"fmt"
	"io"
	"slices"
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

// Choose picks the style for w: bars where it is a terminal, else lines. A
// terminal that does not know its size (of "docker exec -t" at first, of
// script(1)) would show no bar at all.
func Choose(w io.Writer) Style {
	f, ok := w.(interface{ Fd() uintptr })
	if !ok || !IsTerminal(w) {
		return Lines
	}
	if size, err := unix.IoctlGetWinsize(int(f.Fd()), unix.TIOCGWINSZ); err != nil || size.Row == 0 || size.Col == 0 {
		return Lines
	}
	return Bars
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
	all     tally // without HaveBytes
	files   int
	open    map[string]*file
	now     func() time.Time
}

// file is one under way.
type file struct {
	name string
	size int64 // negative: not known
	tally
}

// sum is one line about the file.
func (f *file) sum(now time.Time) string {
	return fmt.Sprintf("%s of %s%s", Bytes(f.bytes), Bytes(f.size), pace(f.size-f.bytes, f.rate(now)))
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
		m.style, m.every = newBars(w), 250*time.Millisecond
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
	m.plan, m.all, m.files = p, newTally(m.now()), 0
	m.open = map[string]*file{}
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

// Open tells that work on a file of so many bytes begins.
func (m *Meter) Open(name string, size int64) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.started {
		m.file(name, size)
	}
}

// Have tells that n bytes of a file took no time: they were there from an
// earlier attempt, or another process brought them.
func (m *Meter) Have(name string, n int64) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if !m.started {
		return
	}
	f := m.file(name, -1)
	f.have(n)
	m.all.have(n)
	m.style.moved(m, f)
}

func (m *Meter) file(name string, size int64) *file {
	f := m.open[name]
	if f == nil {
		f = &file{name: name, size: size, tally: newTally(m.now())}
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
	f, now := m.file(name, -1), m.now()
	f.add(now, n)
	m.all.add(now, n)
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

// done is all bytes that are there.
func (m *Meter) done() int64 { return m.plan.HaveBytes + m.all.bytes }

// sum is one line about everything.
func (m *Meter) sum() string {
	done, total := m.done(), m.plan.Bytes
	s := fmt.Sprintf("%s of %s", Bytes(done), Bytes(total))
	if total > 0 {
		s += fmt.Sprintf(" (%d %%)", done*100/total)
	}
	s += pace(total-done, m.all.rate(m.now()))
	if m.plan.Files > 0 {
		s += fmt.Sprintf(", %d of %d files", m.plan.HaveFiles+m.files, m.plan.Files)
	}
	return s
}

// underWay lists the open files of at least so many bytes, the largest first.
func (m *Meter) underWay(least int64) []*file {
	var files []*file
	for _, f := range m.open {
		if f.size >= least {
			files = append(files, f)
		}
	}
	slices.SortFunc(files, func(a, b *file) int {
		return cmp.Or(cmp.Compare(b.size, a.size), cmp.Compare(a.name, b.name))
	})
	return files
}
