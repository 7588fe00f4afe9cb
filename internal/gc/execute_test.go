package gc

import (
	"errors"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/larder-project/larder/internal/retention"
	"github.com/larder-project/larder/internal/store"
	"github.com/larder-project/larder/internal/usage"
)

// planFor says of the named versions that they go.
func planFor(t *testing.T, c *Collector, names ...string) retention.Plan {
	t.Helper()
	inv, err := c.Look(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	plan := retention.Plan{Time: inv.Time}
	for _, v := range inv.Versions {
		if slices.ContainsFunc(names, func(n string) bool { return slices.Contains(v.References, n) }) {
			plan.Decisions = append(plan.Decisions, retention.Decision{Digest: v.Digest, Model: "m", References: v.References, LastUsed: v.LastUsed, Remove: true, Reason: retention.Unused, Rule: "rules[0]", Why: "test"})
		}
	}
	if len(plan.Decisions) != len(names) {
		t.Fatalf("planned %d of %d", len(plan.Decisions), len(names))
	}
	return plan
}

// Whatever has changed since a plan was made keeps its version, and only that.
func TestWhatChangesAfterThePlanStays(t *testing.T) {
	t.Parallel()
	for what, change := range map[string]struct {
		do  func(t *testing.T, s *store.Store, v store.Version, used *uses)
		why string
	}{
		"a container begins": {func(_ *testing.T, _ *store.Store, v store.Version, used *uses) {
			*used = uses{{Version: v.Digest, By: "container x"}}
		}, "container x"},
		"another node mounts it": {func(t *testing.T, s *store.Store, v store.Version, _ *uses) {
			if err := s.Shared(t.Context(), func() error { return s.Use("other", v.Digest) }); err != nil {
				t.Fatal(err)
			}
		}, "node other"},
		"a container began and ended": {func(_ *testing.T, s *store.Store, v store.Version, _ *uses) {
			s.TouchUsage("node", v.Digest)
		}, "used since"},
		"it is pinned": {func(t *testing.T, s *store.Store, v store.Version, _ *uses) {
			if err := s.Pin(t.Context(), v.Digest, store.Pin{Time: time.Now(), Why: "audit"}); err != nil {
				t.Fatal(err)
			}
		}, "audit"},
		"it gets another name": {func(t *testing.T, s *store.Store, v store.Version, _ *uses) {
			if _, err := s.Tag(t.Context(), v.Digest, ref(t, "prod:1")); err != nil {
				t.Fatal(err)
			}
		}, "prod:1"},
		"somebody removes it": {func(t *testing.T, s *store.Store, _ store.Version, _ *uses) {
			remove(t, s, "m:1")
		}, "gone already"},
	} {
		t.Run(what, func(t *testing.T) {
			t.Parallel()
			s := open(t, t.TempDir()+"/s")
			v := mustPublish(t, s, "m:1", "shared", "one")
			mustPublish(t, s, "m:2", "shared", "two")
			used := uses{}
			c := collect(s, &used)
			plan := planFor(t, c, "m:1", "m:2")
			change.do(t, s, v, &used)
			outcomes, err := c.Execute(t.Context(), plan, nil)
			if err != nil || len(outcomes) != 2 {
				t.Fatalf("%+v, %v", outcomes, err)
			}
			for _, o := range outcomes {
				switch {
				case o.Decision.Digest != v.Digest && (o.Fate != Gone || o.Removal == "" || o.Bytes == 0):
					t.Errorf("the other one: %+v", o)
				case o.Decision.Digest == v.Digest && (o.Fate != Skipped || !strings.Contains(o.Why, change.why)):
					t.Errorf("%+v; want that it stays, because of %q", o, change.why)
				}
			}
			if what != "somebody removes it" && (!has(t, s, "one") || !has(t, s, "shared")) {
				t.Error("the version that stays is not whole")
			}
			checkClean(t, s)
		})
	}
}

func TestSourceThatFailsStopsAPlan(t *testing.T) {
	t.Parallel()
	s := open(t, t.TempDir()+"/s")
	mustPublish(t, s, "m:1", "one")
	plan := planFor(t, collect(s), "m:1")
	failure := errors.New("the engine does not answer")
	outcomes, err := collect(s, uses{}, broken{failure}).Execute(t.Context(), plan, nil)
	var source *usage.Error
	if !errors.Is(err, failure) || !errors.As(err, &source) || source.Source != "broken" {
		t.Errorf("got %v", err)
	}
	if len(outcomes) != 1 || outcomes[0].Fate != Failed || !has(t, s, "one") {
		t.Errorf("outcomes %+v", outcomes)
	}
	inv, err := collect(s, broken{failure}).Look(t.Context())
	if err != nil || len(inv.Failed) != 1 {
		t.Errorf("an inventory with a source that fails: %+v, %v", inv, err)
	}
}

// Several collectors carry the same plans out while versions that share their
// blobs are published, removed by hand and undone.
func TestCollectorsSideBySide(t *testing.T) {
	t.Parallel()
	s := open(t, t.TempDir()+"/s")
	var versions []string
	for i := range 30 {
		name := "m:" + string(rune('a'+i%26)) + string(rune('0'+i/26))
		versions = append(versions, name)
		mustPublish(t, s, name, "shared one", "shared two", "only "+name)
	}
	keep := mustPublish(t, s, "keep:1", "shared one", "shared two", "kept")
	plan := planFor(t, collect(s), versions...)
	var group sync.WaitGroup
	gone := make(chan digest.Digest, 10*len(versions))
	for range 3 {
		group.Go(func() {
			c := collect(open(t, s.Dir()))
			outcomes, err := c.Execute(t.Context(), plan, nil)
			if err != nil {
				t.Error(err)
			}
			for _, o := range outcomes {
				if o.Fate == Gone {
					gone <- o.Decision.Digest
				}
			}
			if _, _, err := c.EmptyTrash(t.Context(), time.Now().Add(-time.Hour), store.Limit{}); err != nil {
				t.Error(err)
			}
		})
	}
	group.Go(func() {
		own := open(t, s.Dir())
		for i := range 20 {
			if _, err := publish(t.Context(), own, "new:"+string(rune('a'+i)), "shared one", "shared two", string(rune('a'+i))); err != nil {
				t.Error(err)
			}
		}
	})
	group.Wait()
	close(gone)
	seen := map[digest.Digest]bool{}
	for d := range gone {
		if seen[d] {
			t.Errorf("version %s was removed twice", d)
		}
		seen[d] = true
	}
	if len(seen) != len(versions) {
		t.Errorf("%d of %d versions were removed", len(seen), len(versions))
	}
	if _, err := s.Resolve(ref(t, "keep:1")); err != nil {
		t.Errorf("version %s: %v", keep.Digest, err)
	}
	checkClean(t, s)
	left, err := s.Versions()
	if err != nil || len(left) != 21 {
		t.Errorf("%d versions are left, %v; want 21", len(left), err)
	}
	trash, err := s.Trash()
	if err != nil {
		t.Fatal(err)
	}
	for _, r := range trash {
		undo(t, s, r.ID)
	}
	for _, name := range versions {
		if !resolves(t, s, name) {
			t.Errorf("%s cannot be brought back", name)
		}
	}
	checkClean(t, s)
}
