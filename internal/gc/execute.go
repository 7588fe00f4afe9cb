package gc

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/larder-project/larder/internal/retention"
	"github.com/larder-project/larder/internal/store"
)

// What became of a decision to remove a version.
type Fate string

// The fates.
const (
	Gone    Fate = "removed"
	Skipped Fate = "skipped" // something has changed since the plan was made
	Failed  Fate = "failed"  // nothing of it was removed
)

// Outcome is what became of one decision of a plan.
type Outcome struct {
	Decision retention.Decision
	Fate     Fate
	Why      string // for Skipped and Failed, for a person
	Bytes    int64  // moved to the trash with it
	Removal  string // ID of the removal that undoes it
}

// Limits on how much is removed under one hold of the store's lock: mounts and
// pulls wait meanwhile.
const (
	batchVersions = 100
	batchLayers   = 20_000
	lockPause     = 20 * time.Millisecond
)

// Execute removes what a plan says, in its order. Each version is looked at
// again under the store's lock: one that has come into use, was pinned, got
// another name or was used since the plan was made stays, and the outcome says
// so. report is told each outcome as it is known; it may be nil.
//
// Where a source of uses fails, nothing more is removed, and the error says
// which.
func (c *Collector) Execute(ctx context.Context, plan retention.Plan, report func(Outcome)) ([]Outcome, error) {
	var todo []retention.Decision
	for _, d := range plan.Decisions {
		if d.Remove {
			todo = append(todo, d)
		}
	}
	var all []Outcome
	tell := func(some []Outcome) {
		for _, o := range some {
			all = append(all, o)
			if report != nil {
				report(o)
			}
		}
	}
	_, err := c.Recover(ctx)
	for len(todo) > 0 && err == nil {
		n := c.batch(todo)
		var some []Outcome
		some, err = c.executeBatch(ctx, todo[:n])
		tell(some)
		if err != nil {
			break
		}
		if todo = todo[n:]; len(todo) > 0 {
			select {
			case <-ctx.Done():
				err = ctx.Err()
			case <-time.After(lockPause): // whoever waits for the lock has it first
			}
		}
	}
	if err == nil {
		return all, nil
	}
	for _, d := range todo {
		if !slices.ContainsFunc(all, func(o Outcome) bool { return o.Decision.Digest == d.Digest }) {
			tell([]Outcome{{Decision: d, Fate: Failed, Why: err.Error()}})
		}
	}
	return all, fmt.Errorf("remove what the plan says: %w", err)
}

// batch is how many of the decisions are carried out under one lock.
func (c *Collector) batch(todo []retention.Decision) int {
	c.mu.Lock()
	defer c.mu.Unlock()
	g := c.known()
	layers := 0
	for i, d := range todo {
		layers += len(g.layers[d.Digest])
		if i > 0 && (i >= batchVersions || layers > batchLayers) {
			return i
		}
	}
	return len(todo)
}

func (c *Collector) executeBatch(ctx context.Context, batch []retention.Decision) ([]Outcome, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if entries, err := c.Store.Index(); err == nil {
		c.known().update(entries)
	}
	var out []Outcome
	err := c.exclusive(ctx, func(x *store.Exclusive, r roots) error {
		seen, err := c.seen()
		if err != nil {
			return err
		}
		byDigest := map[digest.Digest][]v1.Descriptor{}
		for _, d := range x.Index() {
			byDigest[d.Digest] = append(byDigest[d.Digest], d)
		}
		var gone []v1.Descriptor
		going := map[digest.Digest]retention.Decision{}
		for _, d := range batch {
			if why := changed(d, byDigest[d.Digest], r, seen); why != "" {
				out = append(out, Outcome{Decision: d, Fate: Skipped, Why: why})
				continue
			}
			gone = append(gone, byDigest[d.Digest]...)
			going[d.Digest] = d
		}
		if len(gone) == 0 {
			return nil
		}
		t, err := c.decide(x, r, gone)
		if err != nil {
			return err
		}
		versions := t.removed(func(v *store.RemovedVersion) {
			d := going[v.Digest]
			v.Model, v.Reason, v.Rule, v.Why = d.Model, string(d.Reason), d.Rule, d.Why
		})
		removal, err := c.carryOut(ctx, x, r, t, store.Removal{Time: c.Time(), Node: c.Node, By: byPolicy, Reason: summary(versions), Versions: versions})
		if err != nil {
			return err
		}
		for _, v := range t.versions {
			out = append(out, Outcome{Decision: going[v], Fate: Gone, Bytes: t.frees[v], Removal: removal.ID})
		}
		return nil
	})
	return out, err
}

// changed says what has changed about a version since it was planned to go, so
// that it stays; empty: nothing.
func changed(d retention.Decision, entries []v1.Descriptor, r roots, seen seen) string {
	if len(entries) == 0 {
		return "it is gone already"
	}
	if uses := r.uses[d.Digest]; len(uses) > 0 {
		return "it is in use now by " + strings.Join(users(uses), ", ")
	}
	if pin, ok := r.pins[d.Digest]; ok {
		return "it is " + pin.Text()
	}
	for _, e := range entries {
		if ref := e.Annotations[v1.AnnotationRefName]; ref != "" && !slices.Contains(d.References, ref) {
			return "it has got the name " + ref + " since the plan was made"
		}
	}
	if seen.used[d.Digest].After(d.LastUsed) {
		return "it was used since the plan was made"
	}
	if seen.pulled[d.Digest].After(d.Pulled) {
		return "it was pulled again since the plan was made"
	}
	return ""
}

// summary is the reason of a removal of several versions in a few words.
func summary(versions []store.RemovedVersion) string {
	var words []string
	count := map[string]int{}
	for _, v := range versions {
		if count[v.Reason] == 0 {
			words = append(words, v.Reason)
		}
		count[v.Reason]++
	}
	for i, w := range words {
		words[i] = fmt.Sprintf("%d %s", count[w], w)
	}
	return "larder prune: " + strings.Join(words, ", ")
}

// Leftovers are what nothing needs and nobody may want: files of pulls that
// broke off, and blobs that no version reaches.
type Leftovers struct {
	Partials []store.Partial
	Blobs    []store.Blob
	Bytes    int64
}

// Leftovers lists those of an inventory that are older than hold.
func (inv *Inventory) Leftovers(hold time.Duration) Leftovers {
	var out Leftovers
	old := func(t time.Time) bool { return inv.Time.Sub(t) >= hold }
	for _, p := range inv.Partials {
		if old(p.Since) {
			out.Partials = append(out.Partials, p)
			out.Bytes += p.Size
		}
	}
	for _, b := range inv.Blobs {
		if b.There && b.Versions == 0 && b.Held == "" && !b.Undo && old(b.Since) {
			out.Blobs = append(out.Blobs, store.Blob{Digest: b.Hash.Digest(), Size: b.Size})
			out.Bytes += b.Size
		}
	}
	return out
}

// DropLeftovers deletes leftovers, each only if it still is one, at a limited
// rate. It gives the bytes that it freed.
func (c *Collector) DropLeftovers(ctx context.Context, l Leftovers, limit store.Limit) (int64, error) {
	var freed int64
	// Of a removal that was cut short, files may still be in the store that no
	// version needs.
	if _, err := c.Recover(ctx); err != nil {
		return 0, err
	}
	for _, p := range l.Partials {
		ok, err := c.Store.DropPartial(p)
		if err != nil {
			return freed, err
		}
		if ok {
			freed += p.Size
		}
	}
	if len(l.Blobs) > 0 {
		n, err := c.dropBlobs(ctx, l.Blobs)
		freed += n
		if err != nil {
			return freed, fmt.Errorf("drop what no version needs: %w", err)
		}
	}
	_, err := c.Store.Shred(ctx, limit)
	return freed, err
}

// dropBlobs takes blobs that nothing needs out of the store, for good.
func (c *Collector) dropBlobs(ctx context.Context, blobs []store.Blob) (freed int64, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	err = c.exclusive(ctx, func(x *store.Exclusive, r roots) error {
		g := c.known()
		g.update(x.Index())
		if err := g.unreadable(nil); err != nil {
			return err
		}
		held, err := c.held(g, r)
		if err != nil {
			return err
		}
		if pending, err := c.Store.Pending(); err != nil || pending {
			return err // another process has died just now; there will be another time
		}
		undo, err := c.Store.Undoable()
		if err != nil {
			return err
		}
		removal := store.Removal{Time: c.Time(), Node: c.Node, By: "leftovers", Reason: "no version needs them"}
		for _, b := range blobs {
			h, ok := store.HashOf(b.Digest)
			if !ok {
				continue
			}
			n := g.id(h)
			if _, leased := r.leased[b.Digest]; !leased && !undo[b.Digest] && g.needed[n] == 0 && !held[n] {
				removal.Blobs = append(removal.Blobs, b)
			}
		}
		if len(removal.Blobs) == 0 {
			return nil
		}
		if removal, err = x.Remove(removal); err != nil {
			return err
		}
		freed = removal.Size()
		_, err = x.Condemn(func(r store.Removal) bool { return r.ID == removal.ID })
		return err
	})
	return freed, err
}
