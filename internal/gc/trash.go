package gc

import (
	"context"
	"fmt"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/larder-project/larder/internal/store"
)

// Recover finishes or cancels removals that a crash cut short.
func (c *Collector) Recover(ctx context.Context) ([]store.Removal, error) {
	pending, err := c.Store.Pending()
	if err != nil || !pending {
		return nil, err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if entries, err := c.Store.Index(); err == nil {
		c.known().update(entries)
	}
	var finished []store.Removal
	err = c.Store.Exclusive(ctx, func(x *store.Exclusive) error {
		g := c.known()
		g.update(x.Index())
		// What a version needs that cannot be read is not known, so every blob
		// stays. Without that the version could not be removed either.
		unsure := g.unreadable(nil) != nil
		leased, err := x.Leased()
		if err != nil {
			return err
		}
		finished, err = x.Recover(func(d digest.Digest) bool {
			if _, ok := leased[d]; ok || unsure {
				return true
			}
			h, ok := store.HashOf(d)
			if !ok {
				return true
			}
			n, ok := g.number[h]
			return ok && g.needed[n] > 0
		})
		return err
	})
	if err != nil {
		return finished, fmt.Errorf("finish an earlier removal: %w", err)
	}
	return finished, nil
}

// Undo brings a removal back whole, or of it only the given versions: blobs,
// then references. A name that another version has by now is not taken away;
// the restored version then gets one by its digest or commit. Versions that a
// policy had removed are pinned, so that it does not remove them again at once.
func (c *Collector) Undo(ctx context.Context, id string, only ...digest.Digest) (store.Removal, error) {
	if _, err := c.Recover(ctx); err != nil {
		return store.Removal{}, err
	}
	var out store.Removal
	err := c.Store.Exclusive(ctx, func(x *store.Exclusive) (err error) {
		out, err = x.Restore(id, only)
		return err
	})
	if err != nil || out.By != byPolicy {
		return out, err
	}
	for _, v := range out.Versions {
		pin := store.Pin{Time: c.Time(), Node: c.Node, Why: "brought back by larder undo " + id}
		if err := c.Store.Pin(ctx, v.Digest, pin); err != nil {
			return out, fmt.Errorf("everything is back, but not pinned: %w", err)
		}
	}
	return out, nil
}

// byPolicy is in the record of a removal that a plan made.
const byPolicy = "prune"

// Condemn makes removals from before the given time ones that cannot be undone
// any more. Their files are deleted by Shred.
func (c *Collector) Condemn(ctx context.Context, before time.Time) ([]store.Removal, error) {
	if _, err := c.Recover(ctx); err != nil {
		return nil, err
	}
	var out []store.Removal
	err := c.Store.Exclusive(ctx, func(x *store.Exclusive) (err error) {
		if err := x.Tidy(); err != nil {
			return err
		}
		if out, err = x.Condemn(func(r store.Removal) bool { return r.Time.Before(before) }); err != nil {
			return err
		}
		return x.ForgetUsage()
	})
	return out, err
}

// EmptyTrash deletes for good what was removed before the given time, as fast
// as limit says, and returns those removals.
func (c *Collector) EmptyTrash(ctx context.Context, before time.Time, limit store.Limit) ([]store.Removal, int64, error) {
	gone, err := c.Condemn(ctx, before)
	if err != nil {
		return gone, 0, err
	}
	freed, err := c.Store.Shred(ctx, limit)
	return gone, freed, err
}
