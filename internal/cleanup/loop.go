package cleanup

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"sync"
	"time"

	"github.com/larder-project/larder/internal/disk"
	"github.com/larder-project/larder/internal/gc"
	"github.com/larder-project/larder/internal/retention"
)

// Config of a Loop.
type Config struct {
	Cleaner *Cleaner
	State   string            // folder of this node's state
	Policy  *retention.Policy // to begin with; nil: there is none, nothing is removed

	// Watch are functions that call changed when uses or the store may have
	// changed, until the context ends.
	Watch []func(ctx context.Context, changed func())

	Grace time.Duration // before the first run by schedule: containers may still be starting; 0: a minute
	Log   *slog.Logger  // nil: none
	Ran   func(Finished)
}

// Finished is a run that has ended.
type Finished struct {
	Cause  Cause
	Result Result
	Report *Report
	Err    error
	Ended  time.Time
}

// Cause is why a run was started.
type Cause string

// The causes.
const (
	Schedule Cause = "schedule"
	Pressure Cause = "pressure"
)

// Result is how a run ended: a word for metrics.
type Result string

// The results.
const (
	Good        Result = "ok"
	Short       Result = "short" // all was done that may be, and space stays short of its target
	Failed      Result = "failed"
	Interrupted Result = "interrupted" // by the end of the process, or because a more urgent one had to begin
)

const (
	defaultGrace = time.Minute
	// lookEvery is how often the store is looked at where nothing says that
	// anything has changed, and lookShort where space is short.
	lookEvery = 5 * time.Minute
	lookShort = time.Minute
	// lookSoon gathers changes that come together.
	lookSoon = time.Second
	// stuckAfter is how long a run may be without a sign of life.
	stuckAfter = 10 * time.Minute
)

// Loop cleans up again and again. Make it with NewLoop.
type Loop struct {
	c   Config
	log *slog.Logger

	// What it does, and by which tests take its place.
	space func() (free, capacity int64, err error)
	look  func(context.Context) (*gc.Inventory, error)
	clean func(ctx context.Context, o Options, emptying func()) (*Report, error)

	changed  chan struct{}
	reloaded chan struct{}

	mu     sync.Mutex
	status Status
	beat   time.Time // last sign of life of the loop
	step   time.Time // and of the run
	policy *retention.Policy

	samples *samples
	said    map[string]said // by what it is about
}

// said is a complaint that need not be repeated at every turn.
type said struct {
	text string
	at   time.Time
}

// sayAgain is how often the same complaint is logged.
const sayAgain = 10 * time.Minute

// complain logs an error unless it has said the same of the same thing not long
// ago.
func (l *Loop) complain(about, message string, err error, more ...any) {
	if last := l.said[about]; last.text == err.Error() && time.Since(last.at) < sayAgain {
		return
	}
	l.said[about] = said{err.Error(), time.Now()}
	l.log.Error(message, append(more, "error", err)...)
}

// NewLoop makes a loop, which Run starts.
func NewLoop(c Config) *Loop {
	l := &Loop{c: c, log: c.Log, changed: make(chan struct{}, 1), reloaded: make(chan struct{}, 1), policy: c.Policy, beat: time.Now(), said: map[string]said{}}
	if l.log == nil {
		l.log = slog.New(slog.DiscardHandler)
	}
	if l.c.Grace == 0 {
		l.c.Grace = defaultGrace
	}
	l.status.Totals = newTotals()
	l.status.Started = time.Now()
	l.space = func() (int64, int64, error) { return disk.Free(c.Cleaner.Collector.Store.Dir()) }
	l.look = l.lookAtStore
	l.clean = func(ctx context.Context, o Options, emptying func()) (*Report, error) {
		run, err := c.Cleaner.Prepare(ctx, o)
		if err != nil {
			return run.Report, err
		}
		run.emptying = emptying
		return run.Report, run.Do(ctx)
	}
	return l
}

// SetPolicy puts another policy in force; nil: none.
func (l *Loop) SetPolicy(p *retention.Policy) {
	l.mu.Lock()
	l.policy = p
	l.status.plan = nil
	l.mu.Unlock()
	select {
	case l.reloaded <- struct{}{}:
	default:
	}
}

func (l *Loop) current() *retention.Policy {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.policy
}

// Stuck says what has been without a sign of life for too long; empty: nothing.
func (l *Loop) Stuck() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	if d := time.Since(l.beat); d > stuckAfter {
		return fmt.Sprintf("the loop has not gone round for %s", d.Round(time.Second))
	}
	if d := time.Since(l.step); !l.step.IsZero() && d > stuckAfter {
		return fmt.Sprintf("a clean-up has done nothing for %s", d.Round(time.Second))
	}
	return ""
}

// Run goes on until the context ends. A run that is under way is then stopped
// where it is; the next process goes on with it.
func (l *Loop) Run(ctx context.Context) {
	var err error
	if l.samples, err = readSamples(l.c.State); err != nil {
		l.log.Warn("free space over time", "error", err)
	}
	history, err := l.c.Cleaner.Collector.Store.History()
	if err != nil {
		l.log.Error("read what became of versions", "error", err)
	}
	l.set(func(s *Status) { s.History = history }) // what comes after it is counted
	var wait sync.WaitGroup
	defer wait.Wait()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	for _, watch := range l.c.Watch {
		wait.Go(func() {
			watch(ctx, func() {
				select {
				case l.changed <- struct{}{}:
				default:
				}
			})
		})
	}
	r := round{l: l, looked: make(chan lookResult, 1), ended: make(chan Finished, 1)}
	now := time.Now()
	r.nextLook, r.nextMeasure = now, now
	r.schedule(now.Add(l.c.Grace))
	for {
		r.turn(ctx)
		timer := time.NewTimer(time.Until(r.wake()))
		select {
		case <-ctx.Done():
			timer.Stop()
			r.stop()
			return
		case <-timer.C:
		case <-l.changed:
			r.soon()
		case <-l.reloaded:
			r.reload()
		case res := <-r.looked:
			r.seen(res)
		case f := <-r.ended:
			r.finish(f)
		}
		timer.Stop()
	}
}

// round is the state of the loop that nobody else sees.
type round struct {
	l *Loop

	nextMeasure time.Time
	nextLook    time.Time
	nextRun     time.Time // by schedule

	space    Space
	measured time.Time
	rate     float64 // bytes a second by which free space falls

	looking  bool
	lastLook time.Duration // how long it took
	lookedAt time.Time     // when the last one ended
	looked   chan lookResult

	running  Cause // empty: no run is under way
	emptying bool  // it only gives space back, slowly perhaps
	outdated bool  // there is another policy since it began
	stopRun  context.CancelFunc
	ended    chan Finished
	emptied  chan struct{} // receives when a run has got so far

	tried *attempt // the last clean-up for want of space that did not help; nil: none
}

type lookResult struct {
	inv  *gc.Inventory
	err  error
	took time.Duration
}

// turn does what it is time for.
func (r *round) turn(ctx context.Context) {
	now := time.Now()
	r.l.alive()
	if !now.Before(r.nextMeasure) {
		r.measure(now)
	}
	policy := r.l.current()
	short := policy != nil && r.space.Short()
	if !short {
		r.tried = nil
	}
	if r.emptied != nil {
		select {
		case <-r.emptied:
			r.emptying, r.emptied = true, nil
		default:
		}
	}
	switch {
	case r.running == Schedule && r.emptying && short && r.tried.due(now, r.space):
		r.stopRun() // its end starts the urgent one
	case r.running != "" || r.looking:
	case short && r.tried.due(now, r.space):
		r.start(ctx, Pressure, policy)
	case !now.Before(r.nextRun):
		r.start(ctx, Schedule, policy)
	}
	if !r.looking && (r.running == "" || r.emptying) && !now.Before(r.nextLook) {
		r.lookNow(ctx)
	}
}

// wake is when the next turn is due if nothing happens before.
func (r *round) wake() time.Time {
	next := r.nextMeasure
	if r.running == "" && !r.looking && r.nextRun.Before(next) {
		next = r.nextRun
	}
	if !r.looking && (r.running == "" || r.emptying) && r.nextLook.Before(next) {
		next = r.nextLook
	}
	return next
}

func (r *round) measure(now time.Time) {
	free, capacity, err := r.l.space()
	if err != nil {
		r.l.complain("space", "measure free space", err)
		r.nextMeasure = now.Add(longestPace)
		r.l.set(func(s *Status) { s.SpaceErr = err })
		return
	}
	before, since := r.space.Free, now.Sub(r.measured).Seconds()
	policy := r.l.current()
	r.space = spaceFor(policy, free, capacity)
	if policy != nil {
		if beyond := policy.Beyond(capacity); beyond != "" {
			r.l.complain("limit", "the policy's limit does not count", errors.New(beyond))
		}
	}
	if !r.measured.IsZero() && since > 0 {
		r.rate = max(float64(before-free)/since, r.rate/2)
	}
	r.measured = now
	r.nextMeasure = now.Add(pace(r.space.Free-r.space.Limit, r.rate))
	was := r.l.measured(r.space)
	if is := r.space.Short(); is != was {
		if is {
			r.l.log.Warn("space is short", "free", free, "limit", r.space.Limit, "target", r.space.Target)
		} else {
			r.l.log.Info("space is no longer short", "free", free, "limit", r.space.Limit)
		}
	}
}

// soon has the store looked at before long, but not so often that looking is
// all that is done.
func (r *round) soon() {
	at := time.Now().Add(lookSoon)
	if gap := r.lookedAt.Add(10 * r.lastLook); gap.After(at) {
		at = gap
	}
	if at.Before(r.nextLook) {
		r.nextLook = at
	}
}

// reload follows a change of the policy. A run by the one before is stopped; the
// next, by the new one, goes on from where it was.
func (r *round) reload() {
	if r.running != "" {
		r.stopRun()
		r.outdated = true
	}
	r.tried = nil
	r.nextMeasure = time.Now()
	r.schedule(time.Now().Add(r.l.c.Grace))
}

func (r *round) schedule(at time.Time) {
	r.nextRun = at
	r.l.set(func(s *Status) { s.NextRun = at })
}

func (r *round) lookNow(ctx context.Context) {
	r.looking = true
	go func() {
		begun := time.Now()
		inv, err := r.l.look(ctx)
		r.looked <- lookResult{inv, err, time.Since(begun)}
	}()
}

func (r *round) seen(res lookResult) {
	now := time.Now()
	r.looking, r.lastLook, r.lookedAt = false, res.took, now
	r.nextLook = now.Add(lookEvery)
	if r.space.Short() {
		r.nextLook = now.Add(lookShort)
	}
	if res.err != nil {
		if !errors.Is(res.err, context.Canceled) {
			r.l.complain("store", "look at the store", res.err)
		}
		r.l.set(func(s *Status) { s.LookErr = res.err })
		return
	}
	r.l.seen(res.inv)
	if r.tried != nil && len(res.inv.Failed) == 0 {
		plan := r.l.Plan()
		r.tried.hope = plan.Frees > 0 || len(res.inv.Trash) > 0
	}
}

func (r *round) start(ctx context.Context, cause Cause, policy *retention.Policy) {
	r.running, r.emptying, r.outdated = cause, false, false
	var run context.Context
	run, r.stopRun = context.WithCancel(ctx)
	emptied := make(chan struct{}, 1)
	r.emptied = emptied
	r.l.begin(cause)
	go func() {
		report, err := r.l.clean(run, Options{Policy: policy, Each: func(gc.Outcome) { r.l.progress() }}, func() {
			select {
			case emptied <- struct{}{}:
			default:
			}
			r.l.noProgress()
		})
		f := Finished{Cause: cause, Report: report, Err: err, Ended: time.Now(), Result: Good}
		switch {
		case err != nil && run.Err() != nil:
			f.Result = Interrupted
		case err != nil:
			f.Result = Failed
		case report.Short():
			f.Result = Short
		}
		r.ended <- f
	}()
}

// finish follows the end of a run.
func (r *round) finish(f Finished) {
	now := time.Now()
	r.stopRun()
	r.running, r.emptying, r.emptied = "", false, nil
	r.l.finished(f)
	if !r.outdated { // else the next is near: see reload
		r.schedule(r.afterwards(now))
	}
	r.measure(now)
	if f.Cause == Pressure && r.space.Short() && !r.outdated {
		r.tried = r.tried.next(now, r.space)
	}
	r.nextLook = now // what is left
}

// afterwards is when the next run by schedule is due: after the policy's
// interval, a little more or less, so that nodes which began together do not
// stay together; or when a window opens, if that is earlier.
func (r *round) afterwards(now time.Time) time.Time {
	p := r.l.current()
	if p == nil {
		p = retention.None()
	}
	jitter := 0.9 + 0.2*rand.Float64()
	next := now.Add(time.Duration(float64(p.Interval) * jitter))
	if _, opens := p.Open(now); !opens.IsZero() && opens.Before(next) {
		next = opens.Add(time.Second)
	}
	return next
}

// stop ends what is under way, and waits for it.
func (r *round) stop() {
	if r.running != "" {
		r.stopRun()
		r.l.finished(<-r.ended)
	}
	if r.looking {
		<-r.looked
	}
	if err := r.l.samples.save(); err != nil {
		r.l.log.Warn("free space over time", "error", err)
	}
}

// lookAtStore takes the inventory and notes what is in use.
func (l *Loop) lookAtStore(ctx context.Context) (*gc.Inventory, error) {
	inv, err := l.c.Cleaner.Collector.Look(ctx)
	if err != nil {
		return nil, err
	}
	return inv, l.c.Cleaner.Collector.Note(ctx, inv)
}
