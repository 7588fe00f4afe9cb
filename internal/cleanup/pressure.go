package cleanup

import (
	"time"

	"github.com/larder-project/larder/internal/retention"
)

// The pace at which free space is measured.
const (
	shortestPace = time.Second
	longestPace  = 15 * time.Second
	// assumedRate is how fast a node is believed to fill its disk at most, in
	// bytes a second: what a fast NVMe disk takes for long.
	assumedRate = 2 << 30
)

// pace is how long space need not be measured, so that a limit that is margin
// bytes away cannot be crossed unseen for long. rate is how fast space was last
// seen to go, in bytes a second.
func pace(margin int64, rate float64) time.Duration {
	if margin <= 0 {
		return shortestPace
	}
	seconds := float64(margin) / max(assumedRate, 2*rate)
	return min(max(time.Duration(seconds*float64(time.Second)), shortestPace), longestPace)
}

// Space is what is free on the store's file system, and what should be.
type Space struct {
	Free, Capacity int64 // bytes
	Limit, Target  int64 // bytes, of the policy; 0: it has none that can be met
}

// Short tells whether there is less than the limit.
func (s Space) Short() bool { return s.Free < s.Limit }

func spaceFor(p *retention.Policy, free, capacity int64) Space {
	s := Space{Free: free, Capacity: capacity}
	if p != nil && p.Pressure != nil && p.Beyond(capacity) == "" {
		s.Limit = p.Pressure.MinFree.Of(capacity)
		s.Target = max(s.Limit, p.Pressure.Target.Of(capacity))
	}
	return s
}

// How long a clean-up for want of space is not repeated where one has not
// helped: longer each time, and for a moment even where another would.
const (
	firstWait = 30 * time.Second
	lastWait  = 10 * time.Minute
	leastWait = 5 * time.Second
)

// attempt is the last clean-up for want of space that left it short.
type attempt struct {
	ended time.Time
	free  int64
	wait  time.Duration
	hope  bool // something may go by now that could not then
}

// due tells whether it is time for another: after a while, at once where space
// has got shorter still, and soon where there is hope.
func (a *attempt) due(now time.Time, s Space) bool {
	if a == nil {
		return true
	}
	wait := a.wait
	if a.hope {
		wait = min(wait, leastWait)
	}
	step := max(s.Limit/20, 16<<20)
	return now.Sub(a.ended) >= wait || s.Free < a.free-step
}

// next is the attempt that has just failed after this one.
func (a *attempt) next(now time.Time, s Space) *attempt {
	wait := firstWait
	if a != nil {
		wait = min(2*a.wait, lastWait)
	}
	return &attempt{ended: now, free: s.Free, wait: wait}
}
