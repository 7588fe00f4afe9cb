package main

import (
	"runtime"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"

	"github.com/larder-project/larder/internal/cleanup"
	"github.com/larder-project/larder/internal/retention"
)

// metrics are what Prometheus sees. A scrape shows the last look at the store:
// it takes no lock and waits for nobody.
type metrics struct {
	registry *prometheus.Registry
	took     *prometheus.HistogramVec
}

func newMetrics() *metrics {
	m := &metrics{
		registry: prometheus.NewRegistry(),
		took: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "larder_cleanup_duration_seconds", Help: "How long clean-ups took, by what started them.",
			Buckets: []float64{.1, .3, 1, 3, 10, 30, 100, 300, 1000, 3000, 10000},
		}, []string{"cause"}),
	}
	for _, cause := range []cleanup.Cause{cleanup.Schedule, cleanup.Pressure} {
		m.took.WithLabelValues(string(cause))
	}
	return m
}

// ran notes a run that has ended.
func (m *metrics) ran(f cleanup.Finished) {
	m.took.WithLabelValues(string(f.Cause)).Observe(f.Report.Took.Seconds())
}

// watch shows a node.
func (m *metrics) watch(n *node) error {
	info := prometheus.NewGauge(prometheus.GaugeOpts{
		Name: "larder_build_info", Help: "The version of this program; the value is always 1.",
		ConstLabels: prometheus.Labels{"version": version, "goversion": runtime.Version()},
	})
	info.Set(1)
	for _, c := range []prometheus.Collector{
		collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}), info, m.took, &nodeCollector{n},
	} {
		if err := m.registry.Register(c); err != nil {
			return err
		}
	}
	return nil
}

// maxModels bounds how many models have metrics of their own: the largest.
// What the others have is added up under a name that no model can have.
const (
	maxModels   = 200
	otherModels = "(other)"
)

func desc(name, help string, labels ...string) *prometheus.Desc {
	return prometheus.NewDesc("larder_"+name, help, labels, nil)
}

var (
	descStoreBytes = desc("store_bytes", "Space on the disk that the store takes, in bytes: blobs of models, downloads under way or cut short (ingest), and what was removed and can be brought back (trash).", "kind")
	descFree       = desc("store_free_bytes", "Free space on the store's file system, in bytes.")
	descCapacity   = desc("store_capacity_bytes", "Size of the store's file system, in bytes.")
	descLimit      = desc("free_limit_bytes", "Free space below which versions are removed, in bytes; 0 where the policy has no such limit, or none that the file system can have.")
	descTarget     = desc("free_target_bytes", "Free space up to which versions are removed once it is below the limit, in bytes; 0 where the policy has no such limit, or none that the file system can have.")
	descPressure   = desc("pressure", "1 while free space is below the limit, else 0.")
	descShort      = desc("pressure_target_unreachable", "1 while all was removed that may be and free space is still below its target, else 0.")

	descLogical  = desc("logical_bytes", "Space that a copy of each version would take, in bytes.")
	descStored   = desc("stored_bytes", "Space that the distinct files of all versions take, in bytes of content.")
	descSaved    = desc("saved_bytes", "Space that is saved by keeping each file once, in bytes.")
	descShared   = desc("shared_bytes", "Part of the stored bytes that several versions have.")
	descUnique   = desc("unique_bytes", "Part of the stored bytes that one version alone has.")
	descVersions = desc("versions", "Versions in the store.")
	descUsed     = desc("versions_in_use", "Versions that anything uses.")
	descPinned   = desc("versions_pinned", "Versions that are pinned.")
	descDamaged  = desc("versions_damaged", "Versions whose manifest cannot be read; while there are any, nothing is removed.")
	descBlobs    = desc("blobs", "Files in the store.")

	descModelVersions   = desc("model_versions", "Versions of a model in the store.", "model")
	descModelBytes      = desc("model_bytes", "Space that the distinct files of a model's versions take, in bytes.", "model")
	descModelUses       = desc("model_uses", "Reasons for which versions of a model are in use: volumes, mounts, containers, other nodes.", "model")
	descModelContainers = desc("model_containers", "Containers that have a version of a model.", "model", "state")

	descContainers = desc("containers", "Containers that have a version of any model.", "state")
	descLayersUsed = desc("layers_in_use", "Files of the store that at least one container has.")
	descLayerUses  = desc("layer_containers", "Containers that have a file of the store, added up over all files.")
	descGPUs       = desc("gpus_in_use", "GPUs on which a process works with a version.")

	descSourceUp     = desc("source_up", "1 if the source could tell what is in use when it was last asked, else 0; while any is 0, nothing is removed.", "source")
	descSourceErrors = desc("source_errors_total", "Looks at which the source could not tell what is in use.", "source")

	descPulls   = desc("pulls_in_progress", "Pulls under way, on all nodes of the store.")
	descAdded   = desc("versions_added_total", "Versions that came into the store.")
	descRemoved = desc("removed_versions_total", "Versions that this node removed, by reason.", "reason")
	descGone    = desc("removed_bytes_total", "Bytes that this node removed, by reason. They take space until the trash is emptied.", "reason")
	descBack    = desc("restored_bytes_total", "Bytes that were brought back from the trash.")
	descDeleted = desc("deleted_bytes_total", "Bytes that were deleted for good.")

	descTrash     = desc("trash_removals", "Removals that can be undone.")
	descTrashAge  = desc("trash_oldest_age_seconds", "Age of the oldest removal in the trash, in seconds; 0 where there is none.")
	descTrashHold = desc("trash_hold_seconds", "How long the trash is kept, in seconds; 0 where there is no policy and it is kept for ever.")

	descRuns     = desc("cleanup_runs_total", "Clean-ups that have ended, by result: ok, short (all was done that may be, and space is short of its target), failed, interrupted.", "result")
	descRunning  = desc("cleanup_running", "1 while a clean-up runs, else 0.")
	descLastGood = desc("last_cleanup_success_timestamp_seconds", "When a clean-up last ended without an error, in seconds since 1970; 0 where none has since this process began.")
	descInterval = desc("cleanup_interval_seconds", "How often the policy has clean-ups run, in seconds.")
	descLooked   = desc("last_look_timestamp_seconds", "When the store was last looked at with success, in seconds since 1970; most metrics here are from then.")

	descPolicyValid = desc("policy_valid", "1 if the policy file is in force, or there is none; 0 if it was refused, or wants more free space than the file system can have.")
	descPolicy      = desc("policy_present", "1 if a policy is in force; 0 if there is none, so that nothing is removed.")
	descBehind      = desc("clock_behind_seconds", "How far the clock by which ages are counted is behind the one on the wall, in seconds; it is so after a jump, and makes up for it little by little.")
	descNode        = desc("node_alive", "1 if a process of the node runs, 0 if none does; what such a node used is kept.", "node")
	descNodeUses    = desc("node_versions", "Versions that a node uses.", "node")
)

// nodeCollector makes metrics of what the loop knows.
type nodeCollector struct{ n *node }

// Describe implements prometheus.Collector.
func (c *nodeCollector) Describe(ch chan<- *prometheus.Desc) { prometheus.DescribeByCollect(c, ch) }

// Collect implements prometheus.Collector.
func (c *nodeCollector) Collect(ch chan<- prometheus.Metric) {
	s := c.n.loop.Status()
	e := emitter{ch}
	e.space(s)
	e.runs(s)
	e.totals(s.Totals, c.n.sources)
	e.gauge(descBehind, c.n.clock.Behind().Seconds())
	p := c.n.policy.state()
	e.gauge(descPolicyValid, number(c.n.checkPolicy(s).OK))
	e.gauge(descPolicy, number(p.policy != nil))
	if p.policy != nil {
		e.gauge(descTrashHold, p.policy.TrashHold.Seconds())
		e.gauge(descInterval, p.policy.Interval.Seconds())
	} else {
		e.gauge(descTrashHold, 0)
		e.gauge(descInterval, retention.None().Interval.Seconds())
	}
	if s.Inventory != nil {
		e.inventory(s, c.n.summaries.get(s.Inventory), c.n.clock.Now())
		e.sources(s, c.n.sources)
	}
	for _, n := range s.Nodes {
		e.gauge(descNode, number(n.Alive), n.Name)
		e.gauge(descNodeUses, float64(len(n.Versions)), n.Name)
	}
}

type emitter struct{ ch chan<- prometheus.Metric }

func (e emitter) gauge(d *prometheus.Desc, v float64, labels ...string) {
	e.ch <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, v, labels...)
}

func (e emitter) counter(d *prometheus.Desc, v float64, labels ...string) {
	e.ch <- prometheus.MustNewConstMetric(d, prometheus.CounterValue, v, labels...)
}

func number(yes bool) float64 {
	if yes {
		return 1
	}
	return 0
}

func seconds(t time.Time) float64 {
	if t.IsZero() {
		return 0
	}
	return float64(t.UnixMilli()) / 1000
}

func (e emitter) space(s cleanup.Status) {
	if s.Measured.IsZero() {
		return
	}
	e.gauge(descFree, float64(s.Space.Free))
	e.gauge(descCapacity, float64(s.Space.Capacity))
	e.gauge(descLimit, float64(s.Space.Limit))
	e.gauge(descTarget, float64(s.Space.Target))
	e.gauge(descPressure, number(s.Space.Short()))
	e.gauge(descShort, number(unreachable(s)))
}

// unreachable tells whether all was removed that may be and it was not enough.
func unreachable(s cleanup.Status) bool {
	return s.Last != nil && s.Last.Result == cleanup.Short && s.Space.Free < s.Space.Target
}

func (e emitter) runs(s cleanup.Status) {
	for _, r := range []cleanup.Result{cleanup.Good, cleanup.Short, cleanup.Failed, cleanup.Interrupted} {
		e.counter(descRuns, float64(s.Totals.Runs[r]), string(r))
	}
	e.gauge(descRunning, number(s.Running != ""))
	e.gauge(descLastGood, seconds(s.Good))
	e.gauge(descLooked, seconds(s.Looked))
}

// reasons are those for which versions and files are removed; they are shown
// from the beginning, so that the first removal can be seen as an increase.
var reasons = []string{
	string(retention.Abandoned), string(retention.Superseded), string(retention.Surplus), string(retention.Unused), string(retention.Pressure),
	"rm", "leftovers",
}

func (e emitter) totals(t cleanup.Totals, sources []string) {
	removed := t.Removed
	for _, r := range reasons {
		if _, ok := removed[r]; !ok {
			removed[r] = cleanup.Amount{}
		}
	}
	for reason, a := range removed {
		e.counter(descRemoved, float64(a.Versions), reason)
		e.counter(descGone, float64(a.Bytes), reason)
	}
	e.counter(descBack, float64(t.Restored.Bytes))
	e.counter(descDeleted, float64(t.Deleted.Bytes))
	e.counter(descAdded, float64(t.Added))
	for _, s := range sources {
		e.counter(descSourceErrors, float64(t.SourceErrors[s]), s)
	}
}

func (e emitter) inventory(s cleanup.Status, sum summary, now time.Time) {
	inv := s.Inventory
	e.gauge(descStoreBytes, float64(inv.Usage.Blobs), "blobs")
	e.gauge(descStoreBytes, float64(inv.Usage.Ingest), "ingest")
	e.gauge(descStoreBytes, float64(inv.Usage.Trash), "trash")
	e.gauge(descBlobs, float64(inv.Usage.Files))
	e.gauge(descTrash, float64(len(inv.Trash)))
	age := 0.0
	if len(inv.Trash) > 0 {
		age = max(0, now.Sub(inv.Trash[0].Time).Seconds())
	}
	e.gauge(descTrashAge, age)
	e.gauge(descLogical, float64(sum.logical))
	e.gauge(descStored, float64(sum.stored))
	e.gauge(descSaved, float64(sum.logical-sum.stored))
	e.gauge(descShared, float64(sum.shared))
	e.gauge(descUnique, float64(sum.unique))
	e.gauge(descVersions, float64(len(inv.Versions)))
	e.gauge(descUsed, float64(sum.used))
	e.gauge(descPinned, float64(sum.pinned))
	e.gauge(descDamaged, float64(sum.damaged))
	e.gauge(descContainers, float64(sum.containers.Running), "running")
	e.gauge(descContainers, float64(sum.containers.Stopped), "stopped")
	e.gauge(descLayersUsed, float64(sum.layersUsed))
	e.gauge(descLayerUses, float64(sum.layerUses))
	e.gauge(descGPUs, float64(len(sum.gpus)))
	e.gauge(descPulls, float64(sum.pulls))
	for _, m := range bounded(sum.models) {
		e.gauge(descModelVersions, float64(m.versions), m.name)
		e.gauge(descModelBytes, float64(m.bytes), m.name)
		e.gauge(descModelUses, float64(m.uses), m.name)
		e.gauge(descModelContainers, float64(m.containers.Running), m.name, "running")
		e.gauge(descModelContainers, float64(m.containers.Stopped), m.name, "stopped")
	}
}

// bounded adds up the models beyond the largest. What they share is then
// counted for each of them.
func bounded(models []modelSummary) []modelSummary {
	if len(models) <= maxModels {
		return models
	}
	out := append([]modelSummary{}, models[:maxModels]...)
	rest := modelSummary{name: otherModels}
	for _, m := range models[maxModels:] {
		rest.versions += m.versions
		rest.bytes += m.bytes
		rest.uses += m.uses
		rest.containers.Running += m.containers.Running
		rest.containers.Stopped += m.containers.Stopped
	}
	return append(out, rest)
}

func (e emitter) sources(s cleanup.Status, names []string) {
	failed := map[string]bool{}
	for _, f := range s.Inventory.Failed {
		failed[f.Source] = true
	}
	for _, name := range names {
		e.gauge(descSourceUp, number(!failed[name]), name)
	}
}
