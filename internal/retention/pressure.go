package retention

import (
	"cmp"
	"fmt"
	"slices"

	"github.com/larder-project/larder/internal/progress"
)

// census counts who needs each blob.
type census struct {
	in    *Input
	needs []int32 // by blob: how many versions that are not removed need it
}

func newCensus(in *Input) *census {
	c := &census{in: in, needs: make([]int32, len(in.Blobs))}
	for i := range in.Versions {
		for _, b := range in.Versions[i].Layers {
			c.needs[b]++
		}
	}
	return c
}

// remove takes a version away and tells how many bytes that frees.
func (c *census) remove(version int) (freed int64) {
	for _, b := range c.in.Versions[version].Layers {
		if c.needs[b]--; c.needs[b] == 0 && !c.in.Blobs[b].Held {
			freed += c.in.Blobs[b].Size
		}
	}
	return freed
}

// restore is remove undone; it tells how many bytes are needed again.
func (c *census) restore(version int) (taken int64) {
	for _, b := range c.in.Versions[version].Layers {
		if c.needs[b]++; c.needs[b] == 1 && !c.in.Blobs[b].Held {
			taken += c.in.Blobs[b].Size
		}
	}
	return taken
}

// trifling tells whether so many bytes are next to nothing of a version: less
// than a thousandth. Pressure does not take one for that, because it would be
// gone and its bytes would stay with others.
func (p *planner) trifling(bytes int64, version int) bool {
	var size int64
	for _, b := range p.in.Versions[version].Layers {
		size += p.in.Blobs[b].Size
	}
	return bytes == 0 || bytes < size/1000
}

// Beyond says that the policy wants more free space than a file system of this
// capacity should have, or is empty. A size is held to what a share may be: as
// a rule it is a slip in the unit or meant for another disk, and all that may go
// would go for it. Then nothing goes for pressure at all.
func (p *Policy) Beyond(capacity int64) string {
	w := p.Pressure
	if w == nil || capacity == 0 { // not known
		return ""
	}
	said := func(what string, a Amount, most float64) string {
		if a.Of(capacity) <= (Amount{Percent: most}).Of(capacity) {
			return ""
		}
		return fmt.Sprintf("%s: %s is more than the %g%% that can be kept free of a file system of %s, so nothing goes for want of space",
			what, a, most, progress.Bytes(capacity))
	}
	if p.Asked {
		return said("what is asked for", w.Target, maxAsked)
	}
	key := func(name string) string { return fmt.Sprintf("%s (%s)", name, p.From(name)) }
	return cmp.Or(said(key("pressure.minFree"), w.MinFree, maxMinFree), said(key("pressure.target"), w.Target, maxTarget))
}

// relieve adds to what goes by rule what goes because space is short.
func (p *planner) relieve(going []int) ([]int, *PressureReport) {
	marks := p.policy.Pressure
	if marks == nil || p.policy.Beyond(p.in.Capacity) != "" {
		return going, nil
	}
	limit := marks.MinFree.Of(p.in.Capacity)
	if p.in.Free >= limit {
		return going, nil
	}
	target := max(limit, marks.Target.Of(p.in.Capacity))
	blobs := newCensus(&p.in)
	have := p.in.Free + p.in.Trash
	for _, i := range going {
		have += blobs.remove(i)
	}
	taken, have := p.leastUseful(going, blobs, have, target)
	report := &PressureReport{
		Free: p.in.Free, Trash: p.in.Trash, Limit: limit, Target: target,
		After: have, Short: have < target,
	}
	base := fmt.Sprintf("%s is free, the limit is %s", progress.Bytes(p.in.Free), progress.Bytes(limit))
	if report.Short {
		base += fmt.Sprintf("; with all that may go it will be %s of the %s aimed at", progress.Bytes(have), progress.Bytes(target))
	}
	for _, i := range taken {
		v := &p.verdicts[i]
		what := p.lastWords(i)
		if v.reason == LaterOn {
			what += ", goes by rule anyway"
		}
		*v = verdict{Pressure, base + "; " + what, v.model}
	}
	return append(going, taken...), report
}

// leastUseful takes versions one by one until the target is reached: first what
// rules take too when their window opens, then the least recently used.
func (p *planner) leastUseful(going []int, blobs *census, have, target int64) (taken []int, _ int64) {
	queue := p.queue(going)
	within := p.withinReach(going, queue)
	for _, i := range queue {
		if have >= target {
			break
		}
		switch {
		case p.floor[i].reason != "":
			// Its turn has come, so this is what it stays for.
			p.verdicts[i] = p.floor[i]
		case p.trifling(within.of(i), i):
			p.verdicts[i].why += "; pressure leaves it, others need almost all of its bytes"
		default:
			have += blobs.remove(i)
			taken = append(taken, i)
		}
	}
	// Some went for bytes that they share with others which then did not.
	for k := len(taken) - 1; k >= 0; k-- {
		i := taken[k]
		lost := blobs.restore(i)
		if p.trifling(lost, i) && (have-lost >= target || have < target) {
			have -= lost
			taken = slices.Delete(taken, k, k+1)
			continue
		}
		blobs.remove(i)
	}
	return taken, have
}

// queue lists what pressure may look at, in the order in which it does.
func (p *planner) queue(going []int) []int {
	gone := make([]bool, len(p.in.Versions))
	for _, i := range going {
		gone[i] = true
	}
	var out []int
	for i := range p.in.Versions {
		if !gone[i] && !p.fixed[i] && !p.leftOut(i) {
			out = append(out, i)
		}
	}
	slices.SortFunc(out, func(a, b int) int {
		if la, lb := p.verdicts[a].reason == LaterOn, p.verdicts[b].reason == LaterOn; la != lb {
			if la {
				return -1
			}
			return 1
		}
		return p.leastRecent(a, b)
	})
	return out
}

// reach tells what pressure could free at most.
type reach struct {
	in    *Input
	stays []int32 // by blob: how many versions that pressure leaves need it
}

func (p *planner) withinReach(going, queue []int) reach {
	may := make([]bool, len(p.in.Versions))
	for _, i := range going {
		may[i] = true
	}
	for _, i := range queue {
		may[i] = p.floor[i].reason == ""
	}
	r := reach{&p.in, make([]int32, len(p.in.Blobs))}
	for i := range p.in.Versions {
		if may[i] {
			continue
		}
		for _, b := range p.in.Versions[i].Layers {
			r.stays[b]++
		}
	}
	return r
}

// of is how many bytes of a version could go if all that may go did.
func (r reach) of(version int) (bytes int64) {
	for _, b := range r.in.Versions[version].Layers {
		if r.stays[b] == 0 && !r.in.Blobs[b].Held {
			bytes += r.in.Blobs[b].Size
		}
	}
	return bytes
}
