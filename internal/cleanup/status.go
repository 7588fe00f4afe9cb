package cleanup

import (
	"slices"
	"strings"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/larder-project/larder/internal/gc"
	"github.com/larder-project/larder/internal/reference"
	"github.com/larder-project/larder/internal/retention"
	"github.com/larder-project/larder/internal/store"
)

// Status is what a loop knows, at one moment. What it points to is not changed
// any more.
type Status struct {
	Started time.Time

	Policy *retention.Policy // in force; nil: none

	Space    Space
	Measured time.Time // zero: not yet
	SpaceErr error     // of the last attempt to measure
	Samples  []Sample  // of free space, oldest first

	Inventory *gc.Inventory // of the last look; nil: there was none yet
	LookErr   error         // of the last look, if it failed
	Looked    time.Time     // when the store was last looked at with success
	Nodes     []store.Node
	History   []store.Event // what became of versions, oldest first

	Running Cause     // the run that is under way; empty: none
	NextRun time.Time // by schedule
	Last    *Finished // the last run that was not interrupted; nil: none yet
	Good    time.Time // when a run last ended without an error

	Totals Totals

	plan *retention.Plan // by inventory and policy, once it is made
}

// Totals are counted from the start of the process.
type Totals struct {
	Removed      map[string]Amount // by reason: moved to the trash, on this node
	Restored     Amount            // brought back from it
	Deleted      Amount            // for good
	Added        int               // versions that came into the store
	Runs         map[Result]int
	SourceErrors map[string]int // by source: looks in which it could not tell
}

// Amount is a number of versions and their bytes.
type Amount struct {
	Versions int
	Bytes    int64
}

func (a Amount) plus(versions int, bytes int64) Amount {
	return Amount{a.Versions + versions, a.Bytes + bytes}
}

func newTotals() Totals {
	return Totals{Removed: map[string]Amount{}, Runs: map[Result]int{}, SourceErrors: map[string]int{}}
}

func (t Totals) clone() Totals {
	out := t
	out.Removed, out.Runs, out.SourceErrors = map[string]Amount{}, map[Result]int{}, map[string]int{}
	for k, v := range t.Removed {
		out.Removed[k] = v
	}
	for k, v := range t.Runs {
		out.Runs[k] = v
	}
	for k, v := range t.SourceErrors {
		out.SourceErrors[k] = v
	}
	return out
}

// Status tells what the loop knows. It waits for nothing and takes no lock of
// the store.
func (l *Loop) Status() Status {
	l.mu.Lock()
	defer l.mu.Unlock()
	s := l.status
	s.Policy = l.policy
	s.Totals = s.Totals.clone()
	return s
}

// Plan is what a run would do now, as far as the last look says; nil before
// that. It is made when it is first asked for.
func (l *Loop) Plan() *retention.Plan {
	l.mu.Lock()
	inv, policy, plan := l.status.Inventory, l.policy, l.status.plan
	l.mu.Unlock()
	if inv == nil || plan != nil {
		return plan
	}
	made := Plan(inv, Options{Policy: policy, Wall: time.Now()})
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.status.Inventory == inv && l.policy == policy {
		l.status.plan = &made
	}
	return &made
}

func (l *Loop) set(f func(*Status)) {
	l.mu.Lock()
	defer l.mu.Unlock()
	f(&l.status)
}

func (l *Loop) alive() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.beat = time.Now()
}

// progress is a sign of life of the run; noProgress says that none is to be
// waited for.
func (l *Loop) progress() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.step = time.Now()
}

func (l *Loop) noProgress() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.step = time.Time{}
}

func (l *Loop) begin(cause Cause) {
	l.progress()
	l.log.Info("clean-up begins", "cause", string(cause))
	l.set(func(s *Status) { s.Running = cause })
}

// finished notes the end of a run and tells of it.
func (l *Loop) finished(f Finished) {
	l.noProgress()
	l.set(func(s *Status) {
		s.Running = ""
		s.Totals.Runs[f.Result]++
		if f.Result != Interrupted {
			s.Last = &f
		}
		if f.Err == nil {
			s.Good = f.Ended
		}
	})
	versions, bytes := f.Report.Removed()
	about := []any{"cause", string(f.Cause), "result", string(f.Result), "versions", versions, "bytes", bytes,
		"leftovers", f.Report.Dropped, "freed", f.Report.Freed, "took", f.Report.Took.Round(time.Millisecond)}
	switch {
	case f.Result == Failed:
		l.log.Error("clean-up ends", append(about, "error", f.Err)...)
	case f.Result == Short:
		p := f.Report.Plan.Pressure
		l.log.Warn("clean-up ends, and space stays short: what is left is in use, pinned, protected, young or needed to roll back",
			append(about, "free", p.Free, "after", p.After, "target", p.Target)...)
	default:
		l.log.Info("clean-up ends", about...)
	}
	if l.c.Ran != nil {
		l.c.Ran(f)
	}
}

// measured notes what is free, and tells whether it was short before.
func (l *Loop) measured(space Space) (wasShort bool) {
	now := time.Now()
	if l.samples.add(now, space) {
		if err := l.samples.save(); err != nil {
			l.log.Warn("free space over time", "error", err)
		}
	}
	list := slices.Clone(l.samples.list)
	l.set(func(s *Status) {
		wasShort = s.Space.Short()
		s.Space, s.Measured, s.SpaceErr, s.Samples = space, now, nil, list
	})
	return wasShort
}

// seen notes what a look found.
func (l *Loop) seen(inv *gc.Inventory) {
	st := l.c.Cleaner.Collector.Store
	nodes, err := st.Nodes()
	if err != nil {
		l.complain("nodes", "list the nodes of the store", err)
	}
	history, err := st.History()
	if err != nil {
		l.complain("history", "read what became of versions", err)
	}
	for _, f := range inv.Failed {
		l.complain("source "+f.Source, "a source cannot tell what is in use, so that nothing is removed", f.Err, "source", f.Source)
	}
	l.set(func(s *Status) {
		s.Totals.count(s.Inventory, inv)
		s.Totals.add(s.History, history, l.c.Cleaner.Collector.Node)
		s.Inventory, s.plan = inv, nil
		s.Looked, s.LookErr = time.Now(), nil
		s.Nodes, s.History = nodes, history
	})
}

// count adds what is new in an inventory after an earlier one.
func (t *Totals) count(before, now *gc.Inventory) {
	for _, f := range now.Failed {
		t.SourceErrors[f.Source]++
	}
	if before == nil {
		return
	}
	for _, v := range now.Versions {
		if _, known := before.Version(v.Digest); !known {
			t.Added++
		}
	}
}

// add adds the events that were not in an earlier history; of removals, those
// that one node made.
func (t *Totals) add(before, now []store.Event, node string) {
	type key struct {
		event, removal string
		time           time.Time
	}
	known := make(map[key]bool, len(before))
	for _, e := range before {
		known[key{e.Event, e.Removal, e.Time}] = true
	}
	for _, e := range now {
		if known[key{e.Event, e.Removal, e.Time}] {
			continue
		}
		switch {
		case e.Event == store.Deleted:
			t.Deleted = t.Deleted.plus(len(e.Versions), e.Bytes)
		case e.Event == store.Restored:
			t.Restored = t.Restored.plus(len(e.Versions), e.Bytes)
		case e.Node != node:
		case len(e.Versions) == 0:
			t.Removed[e.By] = t.Removed[e.By].plus(0, e.Bytes)
		default:
			for _, v := range e.Versions {
				reason := v.Reason
				if reason == "" {
					reason = e.By
				}
				t.Removed[reason] = t.Removed[reason].plus(1, v.Bytes)
			}
		}
	}
}

// ModelOf is the model that a version counts for: that of its first reference
// which has one, else its digest.
func ModelOf(references []string, d digest.Digest) string {
	for _, text := range references {
		if ref, err := reference.Parse(text); err == nil && ref.Source() != "" {
			return ref.Source()
		}
	}
	return strings.TrimPrefix(d.String(), "sha256:")[:12]
}
