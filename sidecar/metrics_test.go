package main

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus/testutil/promlint"

	"github.com/larder-project/larder/internal/gc"
	"github.com/larder-project/larder/internal/store"
	"github.com/larder-project/larder/internal/usage"
)

func TestMetricsKeepTheConventions(t *testing.T) {
	t.Parallel()
	b := crowded(t)
	b.run()
	_, text := b.get("/metrics")
	problems, err := promlint.New(strings.NewReader(text)).Lint()
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range problems {
		t.Errorf("%s: %s", p.Metric, p.Text)
	}
	if n := strings.Count(text, "# HELP larder_"); n < 40 {
		t.Errorf("only %d metrics", n)
	}
}

func TestMetricsAreTheNumbersOfTheStore(t *testing.T) {
	t.Parallel()
	b := newBench(t, keepAll)
	one := b.publish("m:1", map[string]int{"shared": 1 << 20, "one": 2 << 20})
	two := b.publish("m:2", map[string]int{"shared": 1 << 20, "two": 4 << 20})
	b.publish("n:1", map[string]int{"three": 8 << 20})
	b.engine.set(nil, container(1, "a", "running", one), container(1, "a", "running", two), container(2, "b", "exited", two),
		usage.Use{Version: two, By: "volume v", GPU: "0 (NVIDIA H100)", PID: 7, Container: usage.Container{ID: fmt.Sprintf("%064x", 1), Engine: "docker"}})
	lease, err := b.store.NewLease(t.Context(), "node-1", "pull")
	if err != nil {
		t.Fatal(err)
	}
	defer lease.Release()
	if err := b.store.Pin(t.Context(), one, store.Pin{}); err != nil {
		t.Fatal(err)
	}
	b.run()
	inv := b.node.loop.Status().Inventory
	var small int64 // manifests and configs
	for _, blob := range inv.Blobs {
		if blob.Size < 1<<20 {
			small += blob.Size
		}
	}
	_, text := b.get("/metrics")
	for name, want := range map[string]any{
		"larder_versions": 3, "larder_versions_in_use": 2, "larder_versions_pinned": 1, "larder_versions_damaged": 0,
		"larder_stored_bytes":                                15<<20 + small,
		"larder_logical_bytes":                               inv.Versions[0].Size + inv.Versions[1].Size + inv.Versions[2].Size,
		`larder_model_versions{model="m"}`:                   2,
		`larder_model_uses{model="m"}`:                       4,
		`larder_model_uses{model="n"}`:                       0,
		`larder_model_containers{model="m",state="running"}`: 1,
		`larder_model_containers{model="m",state="stopped"}`: 1,
		`larder_containers{state="running"}`:                 1,
		`larder_containers{state="stopped"}`:                 1,
		"larder_gpus_in_use":                                 1,
		"larder_pulls_in_progress":                           1,
		"larder_policy_valid":                                1,
		"larder_policy_present":                              1,
		"larder_pressure":                                    0,
		`larder_source_up{source="engine"}`:                  1,
		"larder_cleanup_interval_seconds":                    3600,
		`larder_removed_bytes_total{reason="unused"}`:        0,
		"larder_trash_removals":                              0,
	} {
		if got := value(text, name); got != fmt.Sprint(want) && got != fmt.Sprintf("%g", toFloat(want)) {
			t.Errorf("%s is %s, want %v", name, got, want)
		}
	}
	// A file counts once for each container that has it, whichever of its
	// versions has it.
	if used, uses := value(text, "larder_layers_in_use"), value(text, "larder_layer_containers"); used == "0" || uses == used {
		t.Errorf("%s files in use, by %s containers in all", used, uses)
	}
}

func toFloat(v any) float64 {
	switch v := v.(type) {
	case int:
		return float64(v)
	case int64:
		return float64(v)
	}
	return 0
}

// value is that of a metric, by its name and labels as they are written.
func value(text, name string) string {
	for line := range strings.Lines(text) {
		if v, ok := strings.CutPrefix(strings.TrimSpace(line), name+" "); ok {
			return v
		}
	}
	return "missing"
}

func TestCountersCountWhatHappensOnThisNode(t *testing.T) {
	t.Parallel()
	b := newBench(t, "version: 1\nrules: [{models: [\"*\"], unusedFor: 30d, rollback: 0}]\n")
	b.publish("m:1", map[string]int{"one": 1 << 20})
	b.run()
	b.pass(5 * week)
	b.publish("m:2", map[string]int{"two": 1 << 20})
	b.look()
	_, text := b.get("/metrics")
	if got := value(text, "larder_versions_added_total"); got != "1" {
		t.Errorf("added %s", got)
	}
	plan := *b.node.loop.Plan()
	if _, err := b.collector.Execute(t.Context(), plan, nil); err != nil {
		t.Fatal(err)
	}
	elsewhere := &gc.Collector{Store: b.store, Node: "node-2", Now: b.clock}
	removeByName(t, elsewhere, "m:2")
	b.look()
	_, text = b.get("/metrics")
	for name, want := range map[string]string{
		`larder_removed_versions_total{reason="unused"}`: "1", `larder_removed_versions_total{reason="rm"}`: "0",
		"larder_trash_removals": "2", "larder_versions": "0", "larder_restored_bytes_total": "0", "larder_deleted_bytes_total": "0",
	} {
		if got := value(text, name); got != want {
			t.Errorf("%s is %s, want %s", name, got, want)
		}
	}
	if got := value(text, `larder_removed_bytes_total{reason="unused"}`); got == "0" || got == "missing" {
		t.Errorf("removed %s bytes", got)
	}
	trash, err := b.store.Trash()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := b.collector.Undo(t.Context(), trash[0].ID); err != nil {
		t.Fatal(err)
	}
	if _, _, err := b.collector.EmptyTrash(t.Context(), b.clock().Add(time.Hour), store.Limit{}); err != nil {
		t.Fatal(err)
	}
	b.look()
	_, text = b.get("/metrics")
	for _, name := range []string{"larder_restored_bytes_total", "larder_deleted_bytes_total"} {
		if got := value(text, name); got == "0" || got == "missing" {
			t.Errorf("%s is %s", name, got)
		}
	}
}

func TestAScrapeWaitsForNobody(t *testing.T) {
	t.Parallel()
	b := crowded(t)
	b.run()
	err := b.store.Exclusive(t.Context(), func(*store.Exclusive) error {
		begun := time.Now()
		for _, path := range []string{"/metrics", "/", "/readyz", "/healthz"} {
			if res, _ := b.get(path); res.StatusCode != 200 {
				t.Errorf("%s is %d while the store is locked", path, res.StatusCode)
			}
		}
		if d := time.Since(begun); d > 5*time.Second {
			t.Errorf("while the store is locked a scrape takes %s", d)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

func TestModelsInMetricsAreBounded(t *testing.T) {
	t.Parallel()
	var many []modelSummary
	for i := range 1000 {
		many = append(many, modelSummary{name: fmt.Sprint("m", i), versions: 1, bytes: int64(1000 - i), uses: 2, containers: usage.Tally{Running: 1}})
	}
	got := bounded(many)
	rest := got[len(got)-1]
	if len(got) != maxModels+1 || rest.name != otherModels || rest.versions != 1000-maxModels || rest.uses != 2*(1000-maxModels) || rest.containers.Running != 1000-maxModels {
		t.Errorf("%d models, the last %+v", len(got), rest)
	}
	if few := bounded(many[:3]); len(few) != 3 {
		t.Errorf("of three models there are %d", len(few))
	}
}
