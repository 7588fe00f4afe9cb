package main

import (
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"github.com/larder-project/larder/internal/progress"
	"github.com/larder-project/larder/internal/pull"
)

// meter makes what shows progress: events with --json, nothing with --quiet,
// else bars or lines on stderr, so that stdout has the result alone.
func (a *app) meter(quiet bool) *progress.Meter {
	switch {
	case quiet:
		return progress.New(a.err, progress.None)
	case a.json:
		return progress.New(a.out, progress.JSON)
	}
	return progress.New(a.err, progress.Choose(a.err))
}

// pullProgress shows a pull's progress on a meter.
type pullProgress struct {
	m    *progress.Meter
	what string // the model, as the user knows it; empty: what the plan says

	mu    sync.Mutex
	sizes map[string]int64 // of files that no byte came of yet
}

func (p *pullProgress) Start(plan pull.Plan) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.sizes = make(map[string]int64, len(plan.Files))
	out := progress.Plan{What: p.what, Files: len(plan.Files), Bytes: plan.Bytes + plan.Reused, HaveBytes: plan.Reused}
	if out.What == "" {
		out.What = plan.Source + "@" + plan.Revision
	}
	for _, f := range plan.Files {
		if f.Have {
			out.HaveFiles++
		} else {
			p.sizes[f.Path] = f.Size
		}
	}
	p.m.Start(out)
}

func (p *pullProgress) Wait(path string) {
	p.m.Note(fmt.Sprintf("%s: another process is fetching it; waiting for that", path))
}

// begin opens a file when it is first heard of.
func (p *pullProgress) begin(path string) {
	p.mu.Lock()
	size, first := p.sizes[path]
	delete(p.sizes, path)
	p.mu.Unlock()
	if first {
		p.m.Open(path, size)
	}
}

func (p *pullProgress) Bytes(path string, n int64) {
	p.begin(path)
	p.m.Add(path, n)
}

func (p *pullProgress) Have(path string, n int64) {
	p.begin(path)
	p.m.Have(path, n)
}

func (p *pullProgress) Done(path string, _ pull.How) {
	p.begin(path)
	p.m.Done(path)
}

// waits tells of the waits that a hub asks for.
func waits(m *progress.Meter) func(string, time.Duration, error) {
	return func(what string, d time.Duration, cause error) {
		m.Wait(fmt.Sprintf("%s: %v", what, cause), d)
	}
}

var _ pull.Progress = (*pullProgress)(nil)

// counter adds up bytes read, for verify.
type counter struct {
	m *progress.Meter
	n atomic.Int64
}

func newCounter(m *progress.Meter) *counter { return &counter{m: m} }

func (c *counter) add(n int64) {
	c.n.Add(n)
	c.m.Add("", n)
}

func (c *counter) total() int64 { return c.n.Load() }
