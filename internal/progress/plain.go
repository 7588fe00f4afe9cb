package progress

import (
	"encoding/json"
	"fmt"
	"io"
	"time"
)

// none prints nothing.
type none struct{}

func (none) start(*Meter)                               {}
func (none) opened(*Meter, *file)                       {}
func (none) moved(*Meter, *file)                        {}
func (none) finished(*Meter, *file)                     {}
func (none) note(*Meter, string, string, time.Duration) {}
func (none) tick(*Meter)                                {}
func (none) close(*Meter)                               {}

// lines prints a line at the start and one every few seconds. A log that
// cannot be written stops no work, so errors of w are not looked at.
type lines struct {
	none
	w io.Writer
}

func (l *lines) start(m *Meter) {
	p := m.plan
	have := ""
	if p.HaveFiles > 0 {
		have = fmt.Sprintf("; %d of them, %s, are in the store already", p.HaveFiles, Bytes(p.HaveBytes))
	}
	files := ""
	if p.Files > 0 {
		files = fmt.Sprintf("%d files, ", p.Files)
	}
	if p.Files == 1 {
		files = "1 file, "
	}
	fmt.Fprintf(l.w, "%s: %s%s%s\n", p.What, files, Bytes(p.Bytes), have)
}

// mentioned is how many files a line has room for beside the sum.
const mentioned = 2

func (l *lines) tick(m *Meter) {
	line := m.plan.What + ": " + m.sum()
	if m.plan.Files > 1 { // of one file, the sum says it all
		files := m.underWay(large)
		for _, f := range files[:min(mentioned, len(files))] {
			line += fmt.Sprintf("; %s %s", tail(f.name, 32), f.sum(m.now()))
		}
	}
	fmt.Fprintln(l.w, line)
}

func (l *lines) note(m *Meter, _, text string, wait time.Duration) {
	if wait > 0 {
		text += "; waiting " + Duration(wait)
	}
	fmt.Fprintln(l.w, text)
}

// events prints JSON.
type events struct {
	none
	w io.Writer
}

// The objects of the JSON style. Numbers of bytes and files are always there;
// what cannot be said is left out.
type (
	planEvent struct {
		Event     string `json:"event"` // plan
		Model     string `json:"model"`
		Files     int    `json:"files"`
		Bytes     int64  `json:"bytes"`
		HaveFiles int    `json:"have_files"` // in the store already
		HaveBytes int64  `json:"have_bytes"`
	}
	progressEvent struct {
		Event      string `json:"event"` // progress
		Model      string `json:"model"`
		Files      int    `json:"files"` // done, those that were there included
		TotalFiles int    `json:"total_files"`
		Bytes      int64  `json:"bytes"`
		TotalBytes int64  `json:"total_bytes"`
		speed
		Open []openFile `json:"open,omitempty"` // the largest first
	}
	openFile struct {
		Path       string `json:"path"`
		Bytes      int64  `json:"bytes"`
		TotalBytes int64  `json:"total_bytes"`
		speed
	}
	speed struct {
		Rate int64   `json:"rate"`                   // bytes a second
		Left float64 `json:"seconds_left,omitempty"` // at this rate
	}
	fileEvent struct {
		Event string `json:"event"` // file
		Path  string `json:"path"`
		Bytes int64  `json:"bytes"`
	}
	noteEvent struct {
		Event   string  `json:"event"` // wait, note
		Reason  string  `json:"reason"`
		Seconds float64 `json:"seconds,omitempty"`
	}
)

func (e *events) print(v any) {
	enc := json.NewEncoder(e.w)
	enc.SetEscapeHTML(false)
	_ = enc.Encode(v) // as with lines
}

func (e *events) start(m *Meter) {
	p := m.plan
	e.print(planEvent{"plan", p.What, p.Files, p.Bytes, p.HaveFiles, p.HaveBytes})
}

func (e *events) finished(_ *Meter, f *file) {
	e.print(fileEvent{"file", f.name, max(f.size, f.bytes)})
}

func newSpeed(todo int64, rate float64) speed {
	return speed{Rate: int64(rate), Left: max(0, left(todo, rate)).Seconds()}
}

func (e *events) tick(m *Meter) {
	now := m.now()
	v := progressEvent{
		Event: "progress", Model: m.plan.What,
		Files: m.plan.HaveFiles + m.files, TotalFiles: m.plan.Files,
		Bytes: m.done(), TotalBytes: m.plan.Bytes,
		speed: newSpeed(m.plan.Bytes-m.done(), m.all.rate(now)),
	}
	for _, f := range m.underWay(0) {
		v.Open = append(v.Open, openFile{f.name, f.bytes, f.size, newSpeed(f.size-f.bytes, f.rate(now))})
	}
	e.print(v)
}

func (e *events) close(m *Meter) { e.tick(m) }

func (e *events) note(_ *Meter, event, text string, wait time.Duration) {
	e.print(noteEvent{event, text, wait.Seconds()})
}
