// Package cleanup cleans up a store by a policy: one run (Cleaner), as larder
// prune makes it, and the loop that starts runs by schedule and when space gets
// short (Loop), as larder-sidecar has it.
//
// Which versions go, package retention decides; how they go, and that nothing
// in use does, is package gc's. This package knows in which order a run goes,
// and when it is time for one.
//
// # Order of a run
//
// Removals that were cut short are finished; the store and the sources of uses
// are looked at; what is in use is noted as used; the plan is made and carried
// out; what broken pulls left is dropped; the trash is emptied of what has lain
// there for long enough, or of everything where space is short. A run that is
// killed at any step leaves what package gc and package store say it leaves, and
// the next one goes on with it.
//
// Where a source of uses cannot tell, no version is removed and nothing that
// pulls left is dropped. The trash is emptied all the same: what lies there was
// removed while all sources could tell, and nobody can use it.
package cleanup

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"github.com/hashicorp/go-multierror"

	"github.com/larder-project/larder/internal/gc"
	"github.com/larder-project/larder/internal/retention"
	"github.com/larder-project/larder/internal/store"
)

// Cleaner cleans up one store, for one node. Its methods may be called side by
// side.
type Cleaner struct {
	Collector *gc.Collector
	Log       *slog.Logger // of every decision that is carried out; nil: none

	// Wall is the clock by which the kernel stamps files; nil: time.Now. The
	// collector's own may be ahead of it.
	Wall func() time.Time
}

func (c *Cleaner) log() *slog.Logger {
	if c.Log != nil {
		return c.Log
	}
	return slog.New(slog.DiscardHandler)
}

// Options of a run.
type Options struct {
	// Policy says what goes. nil: there is none, and nothing goes at all, not
	// from the trash either.
	Policy *retention.Policy
	// Models are patterns that the run is restricted to; none: all models.
	Models []string
	// UntilFree, where it is not zero, makes room until so much is free, and
	// takes nothing by the policy's rules themselves. Where so much is free,
	// nothing goes at all, not from the trash either.
	UntilFree retention.Amount
	// AnyTime: a person asks, and does not wait for a window of the policy.
	AnyTime bool
	// Wall is the time by which windows open; zero: that of the cleaner.
	Wall time.Time
	// DryRun: nothing is changed, and the report says what would be.
	DryRun bool
	// Each is told what became of each decision, as it is known; it may be nil.
	Each func(gc.Outcome)
}

// policy is the one that counts for the run.
func (o Options) policy() *retention.Policy {
	if o.UntilFree == (retention.Amount{}) {
		return o.Policy
	}
	p := o.Policy
	if p == nil {
		p = retention.None()
	}
	return p.UntilFree(o.UntilFree)
}

// Report is what a run found, planned and did.
type Report struct {
	Begun time.Time     // by the wall clock
	Took  time.Duration // all of it

	Recovered []store.Removal // that an earlier run began and this one finished
	Inventory *gc.Inventory   // before anything was removed
	Plan      retention.Plan  // empty where there is no policy

	Outcomes  []gc.Outcome    // of the plan's decisions to remove
	Leftovers gc.Leftovers    // of broken pulls, that are old enough to go
	Dropped   int64           // bytes of these that went
	Condemned []store.Removal // that cannot be undone any more
	Freed     int64           // bytes that were given back to the file system
}

// Short tells whether the plan cannot reach the target of free space.
func (r *Report) Short() bool { return r.Plan.Pressure != nil && r.Plan.Pressure.Short }

// Removed counts the versions that went and their bytes.
func (r *Report) Removed() (versions int, bytes int64) {
	for _, o := range r.Outcomes {
		if o.Fate == gc.Gone {
			versions++
			bytes += o.Bytes
		}
	}
	return versions, bytes
}

// Once makes one run. The report is not nil where the error is not nil either:
// it says how far the run got.
func (c *Cleaner) Once(ctx context.Context, o Options) (*Report, error) {
	run, err := c.Prepare(ctx, o)
	if err != nil || o.DryRun {
		return run.Report, err
	}
	return run.Report, run.Do(ctx)
}

// Run is a run whose plan is made and not yet carried out.
type Run struct {
	Report *Report

	cleaner *Cleaner
	policy  *retention.Policy
	each    func(gc.Outcome)
	hold    time.Duration // of leftovers
	begun   time.Time

	emptying func() // called when versions are removed and bytes are left to be given back; may be nil
}

// Prepare looks and plans. But for a dry run it finishes what was cut short and
// records what is in use.
func (c *Cleaner) Prepare(ctx context.Context, o Options) (*Run, error) {
	r := &Run{Report: &Report{Begun: time.Now()}, cleaner: c, policy: o.policy(), each: o.Each, begun: time.Now()}
	defer r.clock()
	var err error
	if !o.DryRun && r.policy != nil {
		if r.Report.Recovered, err = c.Collector.Recover(ctx); err != nil {
			return r, err
		}
	}
	inv, err := c.Collector.Look(ctx)
	if err != nil {
		return r, err
	}
	r.Report.Inventory = inv
	if !o.DryRun {
		if err := c.Collector.Note(ctx, inv); err != nil {
			return r, err
		}
	}
	if r.policy == nil {
		return r, nil
	}
	if o.Wall.IsZero() {
		o.Wall = c.wall()
	}
	r.Report.Plan = Plan(inv, o)
	if r.policy.Asked && r.Report.Plan.Pressure == nil {
		r.policy = nil // there is room enough, and nothing else was asked for
		return r, nil
	}
	// A file that was made while the wall clock was behind looks older than it
	// is by that much.
	r.hold = r.policy.UnfinishedHold + max(0, inv.Time.Sub(c.wall()))
	r.Report.Leftovers = inv.Leftovers(r.hold)
	return r, nil
}

func (c *Cleaner) wall() time.Time {
	if c.Wall != nil {
		return c.Wall()
	}
	return time.Now()
}

func (r *Run) clock() { r.Report.Took = time.Since(r.begun) }

// Plan is what a run with these options would do about versions, as far as the
// inventory says.
func Plan(inv *gc.Inventory, o Options) retention.Plan {
	p := o.policy()
	if p == nil {
		return retention.Plan{Time: inv.Time}
	}
	in := inv.Input()
	in.Models, in.AnyTime, in.Wall = o.Models, o.AnyTime, o.Wall
	return p.Plan(in)
}

// Do carries out what was planned.
func (r *Run) Do(ctx context.Context) error {
	defer r.clock()
	if r.policy == nil {
		return nil
	}
	out := r.Report
	var failed *multierror.Error
	for _, f := range out.Inventory.Failed {
		failed = multierror.Append(failed, f)
	}
	if failed == nil {
		err := r.remove(ctx)
		if err != nil {
			failed = multierror.Append(failed, err)
		}
	} else {
		failed = multierror.Append(failed, errors.New("so nothing was removed"))
	}
	if ctx.Err() == nil {
		if r.emptying != nil {
			r.emptying()
		}
		if err := r.emptyTrash(ctx); err != nil {
			failed = multierror.Append(failed, err)
		}
	}
	if err := failed.ErrorOrNil(); err != nil {
		failed.ErrorFormat = joined
		return err
	}
	return nil
}

// joined writes several errors in one line.
func joined(all []error) string {
	text := ""
	for i, err := range all {
		if i > 0 {
			text += "; "
		}
		text += err.Error()
	}
	return text
}

// remove takes out what the plan says, and what broken pulls left.
func (r *Run) remove(ctx context.Context) error {
	c, out := r.cleaner, r.Report
	var err error
	out.Outcomes, err = c.Collector.Execute(ctx, out.Plan, func(o gc.Outcome) {
		c.tell(o)
		if r.each != nil {
			r.each(o)
		}
	})
	if err != nil {
		return err
	}
	if len(out.Leftovers.Partials)+len(out.Leftovers.Blobs) == 0 {
		return nil
	}
	if r.emptying != nil {
		r.emptying()
	}
	out.Dropped, err = c.Collector.DropLeftovers(ctx, out.Leftovers, r.limit())
	if err != nil {
		return err
	}
	c.log().Info("dropped what broken pulls left", "files", len(out.Leftovers.Partials)+len(out.Leftovers.Blobs), "bytes", out.Dropped)
	return nil
}

// emptyTrash deletes for good what has lain in the trash for long enough; where
// space is short, everything.
func (r *Run) emptyTrash(ctx context.Context) error {
	c, out := r.cleaner, r.Report
	now := c.Collector.Time() // with a hold of nothing, what has just gone too
	before := now.Add(-r.policy.TrashHold)
	if out.Plan.Pressure != nil || r.policy.TrashHold == 0 {
		before = now.AddDate(1000, 0, 0) // everything, and that of nodes whose clock is ahead
	}
	var err error
	out.Condemned, err = c.Collector.Condemn(ctx, before)
	for _, removal := range out.Condemned {
		c.log().Info("deleting for good", "removal", removal.ID, "removed", removal.Time, "bytes", removal.Size(), "reason", removal.Reason)
	}
	if err != nil {
		return err
	}
	out.Freed, err = c.Collector.Store.Shred(ctx, r.limit())
	if err != nil {
		return fmt.Errorf("give space back: %w", err)
	}
	return nil
}

// limit is how fast space is given back: as the policy says, unless there is no
// time for that.
func (r *Run) limit() store.Limit {
	if r.Report.Plan.Pressure != nil {
		return store.Limit{}
	}
	l := r.policy.Limits
	return store.Limit{BytesPerSecond: l.BytesPerSecond, FilesPerSecond: int64(l.FilesPerSecond)}
}

// tell logs what became of one decision.
func (c *Cleaner) tell(o gc.Outcome) {
	d := o.Decision
	about := []any{"version", d.Digest.String(), "model", d.Model, "references", d.References, "reason", string(d.Reason), "rule", d.Rule, "why", d.Why}
	switch o.Fate {
	case gc.Gone:
		c.log().Info("removed", append(about, "bytes", o.Bytes, "removal", o.Removal)...)
	case gc.Skipped:
		c.log().Info("not removed", append(about, "because", o.Why)...)
	default:
		c.log().Error("could not be removed", append(about, "error", o.Why)...)
	}
}
