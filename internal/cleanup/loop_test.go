package cleanup

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"

	"github.com/larder-project/larder/internal/gc"
	"github.com/larder-project/larder/internal/retention"
	"github.com/larder-project/larder/internal/usage"
)

const gib = 1 << 30

// bench is a loop whose disk and runs a test makes up. Times are those of the
// bubble.
type bench struct {
	*Loop
	begun time.Time

	mu       sync.Mutex
	free     int64
	capacity int64
	rate     int64 // bytes a second that are written
	since    time.Time
	takes    time.Duration // a run
	empties  time.Duration // and its slow end
	gives    int64         // bytes, by a run
	err      error         // of a run
	inv      *gc.Inventory
	measured []time.Duration // since the beginning
	runs     []ran
	looks    []time.Duration
}

type ran struct {
	at     time.Duration
	policy *retention.Policy
	ended  time.Duration
	err    error
}

func newBench(t *testing.T, policy *retention.Policy) *bench {
	n := newNode(t)
	b := &bench{begun: time.Now(), since: time.Now(), free: 500 * gib, capacity: 1000 * gib, inv: &gc.Inventory{Time: time.Now()}}
	b.Loop = NewLoop(Config{Cleaner: n.cleaner, State: t.TempDir(), Policy: policy})
	b.Loop.space = func() (int64, int64, error) {
		b.mu.Lock()
		defer b.mu.Unlock()
		b.measured = append(b.measured, time.Since(b.begun))
		return b.freeNow(), b.capacity, nil
	}
	b.Loop.look = func(context.Context) (*gc.Inventory, error) {
		b.mu.Lock()
		defer b.mu.Unlock()
		b.looks = append(b.looks, time.Since(b.begun))
		inv := *b.inv
		return &inv, nil
	}
	b.Loop.clean = func(ctx context.Context, o Options, emptying func()) (*Report, error) {
		b.mu.Lock()
		r := ran{at: time.Since(b.begun), policy: o.Policy}
		takes, empties, gives, err := b.takes, b.empties, b.gives, b.err
		b.mu.Unlock()
		time.Sleep(takes)
		emptying()
		select {
		case <-ctx.Done():
			err = ctx.Err()
		case <-time.After(empties):
		}
		b.write(-gives)
		b.mu.Lock()
		defer b.mu.Unlock()
		r.ended, r.err = time.Since(b.begun), err
		b.runs = append(b.runs, r)
		return &Report{Inventory: b.inv}, err
	}
	return b
}

// freeNow is what is free at this moment, with the mutex held.
func (b *bench) freeNow() int64 {
	b.free -= int64(time.Since(b.since).Seconds() * float64(b.rate))
	b.since = time.Now()
	return b.free
}

func (b *bench) write(bytes int64) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.free = b.freeNow() - bytes
}

func (b *bench) writing(rate int64) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.freeNow()
	b.rate = rate
}

// run runs the loop for as long as f takes, in a bubble.
func (b *bench) run(t *testing.T, f func()) {
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() {
		defer close(done)
		b.Loop.Run(ctx)
	}()
	f()
	cancel()
	<-done
}

func (b *bench) all() []ran {
	b.mu.Lock()
	defer b.mu.Unlock()
	return slices.Clone(b.runs)
}

func (b *bench) ranAt() []time.Duration {
	var out []time.Duration
	for _, r := range b.all() {
		out = append(out, r.at)
	}
	return out
}

func (b *bench) forget() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.runs = nil
}

func (b *bench) looked() int {
	b.mu.Lock()
	defer b.mu.Unlock()
	return len(b.looks)
}

func (b *bench) seeing(inv *gc.Inventory) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.inv = inv
}

const hourly = `
rules: [{models: ["*"], unusedFor: 7d, rollback: 0, minAge: 0s}]
pressure: {minFree: 10%, target: 15%}
interval: 1h
`

func TestRunsBySchedule(t *testing.T) {
	policy := parse(t, hourly)
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t, policy)
		b.run(t, func() {
			time.Sleep(30 * time.Second)
			if next := b.Status().NextRun.Sub(b.begun); next != time.Minute || len(b.ranAt()) > 0 {
				t.Errorf("the first run is to be after %s, ran already: %v", next, b.ranAt())
			}
			time.Sleep(24 * time.Hour)
		})
		at := b.ranAt()
		if at[0] != time.Minute {
			t.Errorf("the first run is after %s, want a minute", at[0])
		}
		same := true
		for i := 1; i < len(at); i++ {
			d := at[i] - at[i-1]
			if d < 54*time.Minute || d > 66*time.Minute {
				t.Errorf("between two runs are %s", d)
			}
			same = same && d == at[1]-at[0]
		}
		if len(at) < 22 || same {
			t.Errorf("%d runs in a day, always as far apart: %v", len(at), same)
		}
	})
}

func TestRunsWhenAWindowOpens(t *testing.T) {
	policy := parse(t, `
rules: [{models: ["*"], unusedFor: 7d}]
windows: [{start: "0 2 * * *", duration: 1h}]
interval: 12h
`)
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t, policy) // the bubble begins at midnight UTC
		b.run(t, func() { time.Sleep(3 * time.Hour) })
		at := b.ranAt()
		if len(at) < 2 || at[1] != 2*time.Hour+time.Second {
			t.Errorf("runs at %v, want one when the window opens", at)
		}
	})
}

// The interval does not matter where it is longer, nor that a run ends while a
// window is open.
func TestRunsWheneverAWindowOpens(t *testing.T) {
	policy := parse(t, `
rules: [{models: ["*"], unusedFor: 7d}]
windows: [{start: "0 2 * * *", duration: 4h}, {start: "0 5 * * *", duration: 4h}]
interval: 7d
`)
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t, policy)
		b.run(t, func() { time.Sleep(3 * 24 * time.Hour) })
		want := []time.Duration{time.Minute}
		for day := range 3 {
			for _, hour := range []int{2, 5} {
				want = append(want, time.Duration(24*day+hour)*time.Hour+time.Second)
			}
		}
		if d := cmp.Diff(want, b.ranAt()); d != "" {
			t.Errorf("runs (-want +got):\n%s", d)
		}
	})
}

func TestFreeSpaceIsMeasuredInTimeAndNotAllTheTime(t *testing.T) {
	policy := parse(t, hourly)
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t, policy)
		b.run(t, func() { time.Sleep(time.Hour) })
		if n := len(b.measured); n > 300 {
			t.Errorf("with 400 GiB above the limit, free space is measured %d times an hour", n)
		}
	})
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t, policy)
		var crossed time.Duration
		b.run(t, func() {
			time.Sleep(10 * time.Minute)
			b.forget()
			b.writing(2 * gib) // as fast as a disk takes
			crossed = 10*time.Minute + 200*time.Second
			time.Sleep(205 * time.Second)
		})
		if at := b.ranAt(); len(at) == 0 || at[0] < crossed || at[0] > crossed+3*time.Second {
			t.Errorf("the limit is crossed at %s, clean-ups are at %v", crossed, at)
		}
	})
}

// However far the limit is and however fast space goes, up to what is assumed,
// it is seen within seconds that the limit was crossed.
func TestPaceNeverSleepsThroughTheLimit(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		margin := float64(rapid.Int64Range(1, 1<<45).Draw(t, "margin"))
		rate := float64(rapid.Int64Range(1, assumedRate).Draw(t, "rate"))
		for left := margin; ; {
			d := pace(int64(left), 0)
			if d < shortestPace || d > longestPace {
				t.Fatalf("with %g bytes left the pace is %s", left, d)
			}
			after := left - rate*d.Seconds()
			if after <= 0 {
				if late := -after / rate; late > 1 {
					t.Fatalf("seen %g s after the limit was crossed", late)
				}
				return
			}
			if after < margin/1e6 || rate*longestPace.Seconds()*1e4 < left {
				return // it will take long
			}
			left = after
		}
	})
}

func TestAShortageIsMetAtOnceAndNotAgainAndAgain(t *testing.T) {
	policy := parse(t, hourly)
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t, policy)
		b.run(t, func() {
			time.Sleep(5 * time.Minute)
			b.forget()
			b.write(450 * gib) // and nothing that could go
			time.Sleep(time.Hour)
		})
		at := b.ranAt()
		if at[0] > 5*time.Minute+16*time.Second {
			t.Errorf("the first clean-up is at %s", at[0])
		}
		if len(at) > 13 {
			t.Errorf("%d clean-ups in an hour that cannot help: %v", len(at), at)
		}
		if d := at[len(at)-1] - at[len(at)-2]; d > lastWait+longestPace {
			t.Errorf("after a while it is not tried for %s", d)
		}
	})
}

func TestAShortageThatGrowsIsMetAtOnce(t *testing.T) {
	policy := parse(t, hourly)
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t, policy)
		var fell time.Duration
		b.run(t, func() {
			time.Sleep(5 * time.Minute)
			b.write(450 * gib)
			time.Sleep(2 * time.Hour)
			b.forget()
			fell = time.Since(b.begun)
			b.write(10 * gib)
			time.Sleep(time.Minute)
		})
		if at := b.ranAt(); len(at) == 0 || at[0] > fell+2*time.Second {
			t.Errorf("space falls at %s, clean-ups are at %v", fell, at)
		}
	})
}

// What was in use ends to be: it may go now, so it does.
func TestAShortageIsMetWhenSomethingIsSetFree(t *testing.T) {
	policy := parse(t, hourly)
	n := newNode(t)
	d := n.publish("m:1")
	n.source.set(nil, d)
	n.pass(100 * day)
	busy, err := n.cleaner.Collector.Look(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	n.source.set(nil)
	free, err := n.cleaner.Collector.Look(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	unknown := *busy
	unknown.Failed = []*usage.Error{{Source: "engine", Err: errors.New("no answer")}}
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t, policy)
		b.inv = busy
		var freed time.Duration
		b.run(t, func() {
			time.Sleep(5 * time.Minute)
			b.write(450 * gib)
			time.Sleep(2 * time.Hour)
			b.seeing(&unknown)
			b.changed <- struct{}{}
			b.forget()
			time.Sleep(4 * time.Second)
			if len(b.ranAt()) > 0 {
				t.Error("a clean-up begins though it is not known what is in use")
			}
			b.seeing(free)
			b.changed <- struct{}{}
			freed = time.Since(b.begun)
			time.Sleep(time.Minute)
		})
		if at := b.ranAt(); len(at) == 0 || at[0] > freed+3*time.Second {
			t.Errorf("the use ends at %s, clean-ups are at %v", freed, at)
		}
	})
}

func TestALimitBeyondTheDiskIsNoShortage(t *testing.T) {
	policy := parse(t, "pressure: {minFree: 2TiB}\ninterval: 1h\n")
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t, policy)
		var log bytes.Buffer
		b.log = slog.New(slog.NewTextHandler(&log, nil))
		b.run(t, func() { time.Sleep(30 * time.Minute) })
		if at := b.ranAt(); len(at) != 1 || b.Status().Space.Limit != 0 {
			t.Errorf("runs at %v, limit %d; want the one by schedule", at, b.Status().Space.Limit)
		}
		if n := strings.Count(log.String(), "2TiB is more than the 90%"); n < 1 || n > 4 {
			t.Errorf("it is said %d times in half an hour", n)
		}
	})
}

func TestASlowEmptyingMakesWayForAShortage(t *testing.T) {
	policy := parse(t, hourly)
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t, policy)
		b.takes, b.empties = 5*time.Second, 10*time.Hour
		var fell time.Duration
		b.run(t, func() {
			time.Sleep(2 * time.Minute)
			if b.looked() < 1 || b.Status().Running != Schedule {
				t.Errorf("looks %d, running %q", b.looked(), b.Status().Running)
			}
			looks := b.looked()
			b.changed <- struct{}{}
			time.Sleep(2 * time.Second)
			if b.looked() == looks {
				t.Error("while the trash is emptied nobody looks")
			}
			b.mu.Lock()
			b.empties, b.gives = 0, 200*gib
			b.mu.Unlock()
			fell = time.Since(b.begun)
			b.write(450 * gib)
			time.Sleep(30 * time.Second)
		})
		if len(b.runs) != 2 || !errors.Is(b.runs[0].err, context.Canceled) || b.runs[1].at > fell+17*time.Second {
			t.Errorf("space falls at %s, runs are %+v", fell, b.runs)
		}
		if got := b.Status().Totals.Runs; got[Interrupted] != 1 || got[Good] != 1 {
			t.Errorf("counted %v", got)
		}
	})
}

func TestAnotherPolicyCountsFromNowOn(t *testing.T) {
	policy := parse(t, hourly)
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t, nil)
		b.run(t, func() {
			time.Sleep(5 * time.Minute)
			b.write(450 * gib)
			time.Sleep(5 * time.Minute)
			if at := b.ranAt(); len(at) != 1 || b.Status().Space.Limit != 0 {
				t.Errorf("without a policy there are runs at %v, limit %d", at, b.Status().Space.Limit)
			}
			b.SetPolicy(policy)
			time.Sleep(time.Second)
			if at := b.ranAt(); len(at) != 2 || b.all()[1].policy != policy {
				t.Errorf("with a policy runs are at %v", at)
			}
			b.write(-450 * gib)
			time.Sleep(time.Minute)
			b.SetPolicy(nil)
			time.Sleep(3 * time.Minute)
			if last := b.all()[len(b.all())-1]; last.policy != nil {
				t.Error("the policy is gone, and a run still has it")
			}
		})
	})
}

// What the new policy would not do, the old one does not go on with.
func TestAnotherPolicyStopsARunByTheOldOne(t *testing.T) {
	policy := parse(t, hourly)
	for name, next := range map[string]*retention.Policy{"none": nil, "another": retention.None()} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				b := newBench(t, policy)
				b.empties = 5 * time.Hour
				b.run(t, func() {
					time.Sleep(2 * time.Minute)
					b.SetPolicy(next)
					time.Sleep(5 * time.Minute)
					if r := b.all(); len(r) != 1 || r[0].policy != policy || r[0].ended != 2*time.Minute || !errors.Is(r[0].err, context.Canceled) {
						t.Errorf("the policy was changed after 2m0s: %+v", r)
					}
					if s := b.Status(); s.Running != Schedule || s.Totals.Runs[Interrupted] != 1 {
						t.Errorf("a run by the new policy is to be under way: %q; counted %v", s.Running, s.Totals.Runs)
					}
				})
			})
		})
	}
}

// A look may take long: a source hangs, or another process holds the store's
// lock. The loop rests meanwhile, and does not turn for a run that is due.
func TestTheLoopRestsWhileARunWaitsForALook(t *testing.T) {
	t.Parallel()
	now := time.Now()
	due, measure := now.Add(-time.Minute), now.Add(time.Second)
	for name, tc := range map[string]struct {
		round round
		want  time.Time
	}{
		"a run is due":                        {round{nextRun: due, nextLook: measure}, due},
		"a run is due while a look goes on":   {round{nextRun: due, nextLook: due, looking: true}, measure},
		"a run is due while another goes on":  {round{nextRun: due, nextLook: due, running: Schedule}, measure},
		"a look is due":                       {round{nextRun: measure, nextLook: due}, due},
		"a look is due while a run goes on":   {round{nextRun: measure, nextLook: due, running: Schedule}, measure},
		"a look is due while the trash goes":  {round{nextRun: measure, nextLook: due, running: Schedule, emptying: true}, due},
		"a look is due while another goes on": {round{nextRun: measure, nextLook: due, looking: true}, measure},
	} {
		tc.round.nextMeasure = measure
		if got := tc.round.wake(); !got.Equal(tc.want) {
			t.Errorf("%s: the next turn is in %s, want in %s", name, got.Sub(now), tc.want.Sub(now))
		}
	}
}

func TestChangesAreLookedAtSoonAndTogether(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t, nil)
		b.c.Watch = []func(context.Context, func()){func(ctx context.Context, changed func()) {
			tick := time.NewTicker(50 * time.Millisecond)
			defer tick.Stop()
			for ctx.Err() == nil {
				select {
				case <-tick.C:
					changed()
				case <-ctx.Done():
				}
			}
		}}
		b.run(t, func() { time.Sleep(time.Minute) })
		if n := len(b.looks); n < 50 || n > 70 {
			t.Errorf("%d looks in a minute of changes, want one a second", n)
		}
	})
}

func TestARunThatFailsIsTriedAgain(t *testing.T) {
	policy := parse(t, hourly)
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t, policy)
		b.err = errors.New("no answer")
		b.run(t, func() {
			b.write(450 * gib)
			time.Sleep(2 * time.Minute)
			s := b.Status()
			if s.Totals.Runs[Failed] < 2 || !s.Good.IsZero() || s.Last == nil || s.Last.Err == nil {
				t.Errorf("status %+v", s)
			}
			b.mu.Lock()
			b.err, b.gives = nil, 450*gib
			b.mu.Unlock()
			time.Sleep(5 * time.Minute)
		})
		if s := b.Status(); s.Good.IsZero() || s.Last.Err != nil || s.Space.Short() {
			t.Errorf("status %+v", s)
		}
	})
}

func TestStuckIsWhatGivesNoSignOfLife(t *testing.T) {
	policy := parse(t, hourly)
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t, policy)
		b.takes, b.empties = 30*time.Minute, 10*time.Hour
		b.run(t, func() {
			time.Sleep(11 * time.Minute)
			if b.Stuck() != "" {
				t.Errorf("after ten minutes of a run: %s", b.Stuck())
			}
			time.Sleep(time.Minute)
			if b.Stuck() == "" {
				t.Error("a run does nothing for eleven minutes, and nobody knows")
			}
			time.Sleep(40 * time.Minute) // it only gives space back
			if b.Stuck() != "" {
				t.Errorf("while space is given back: %s", b.Stuck())
			}
		})
		time.Sleep(11 * time.Minute)
		if b.Stuck() == "" {
			t.Error("a loop that has ended gives signs of life")
		}
	})
}

func TestFreeSpaceIsRememberedAcrossProcesses(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t, nil)
		b.run(t, func() {
			for range 6 {
				b.write(10 * gib)
				time.Sleep(30 * time.Second)
				b.write(-5 * gib)
				time.Sleep(5 * time.Minute)
			}
		})
		first := b.Status().Samples
		again := newBench(t, nil)
		again.c.State = b.c.State
		again.run(t, func() { time.Sleep(time.Minute) })
		got := again.Status().Samples
		if len(first) < 6 || len(got) < len(first) || !cmp.Equal(got[:len(first)-1], first[:len(first)-1]) {
			t.Errorf("samples %v, after a restart %v", first, got)
		}
		if err := os.WriteFile(filepath.Join(b.c.State, samplesName), []byte("[{"), 0o600); err != nil {
			t.Fatal(err)
		}
		third := newBench(t, nil)
		third.c.State = b.c.State
		third.run(t, func() { time.Sleep(time.Minute) })
		if got := third.Status().Samples; len(got) == 0 {
			t.Error("after damage nothing is remembered any more")
		}
	})
}

func TestSamplesAreAWeekAtMost(t *testing.T) {
	t.Parallel()
	s := &samples{}
	now := time.Now()
	for i := range 3 * maxSamples {
		s.add(now.Add(time.Duration(i)*sampleEvery), Space{Free: int64(i)})
	}
	if len(s.list) != maxSamples || s.list[maxSamples-1].Free != 3*maxSamples-1 {
		t.Errorf("%d samples, the last %+v", len(s.list), s.list[len(s.list)-1])
	}
	s.add(now, Space{Free: 7})
	if len(s.list) != 1 || s.list[0].Free != 7 {
		t.Errorf("after the wall clock was put back: %+v", s.list)
	}
}

func TestTheSameComplaintIsNotLoggedAtEveryTurn(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t, nil)
		var out bytes.Buffer
		b.log = slog.New(slog.NewTextHandler(&out, nil))
		b.inv.Failed = []*usage.Error{{Source: "engine", Err: errors.New("no answer")}}
		b.run(t, func() {
			for range 30 {
				b.changed <- struct{}{}
				time.Sleep(10 * time.Second)
			}
		})
		if n := strings.Count(out.String(), "source=engine"); n != 1 {
			t.Errorf("in five minutes and %d looks it was logged %d times", b.looked(), n)
		}
	})
}
