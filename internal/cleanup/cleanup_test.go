package cleanup

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/opencontainers/go-digest"
	"go.uber.org/goleak"

	"github.com/larder-project/larder/internal/gc"
	"github.com/larder-project/larder/internal/modelpack"
	"github.com/larder-project/larder/internal/reference"
	"github.com/larder-project/larder/internal/retention"
	"github.com/larder-project/larder/internal/store"
	"github.com/larder-project/larder/internal/testenv"
	"github.com/larder-project/larder/internal/usage"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// node is a store and a clock of a test's own.
type node struct {
	t       *testing.T
	dir     string
	store   *store.Store
	cleaner *Cleaner
	source  *source
	log     bytes.Buffer

	mu  sync.Mutex
	now time.Time
}

// source is what a test says is in use.
type source struct {
	mu   sync.Mutex
	uses []usage.Use
	err  error
}

func (*source) Name() string { return "engine" }

func (s *source) Uses(context.Context) ([]usage.Use, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.uses), s.err
}

func (s *source) set(err error, versions ...digest.Digest) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.err, s.uses = err, nil
	for _, d := range versions {
		s.uses = append(s.uses, usage.Use{Version: d, By: "container c"})
	}
}

func newNode(t *testing.T) *node {
	t.Helper()
	return nodeAt(t, filepath.Join(t.TempDir(), "store"))
}

// nodeAt opens the store of a node that another process may have made.
func nodeAt(t *testing.T, dir string) *node {
	t.Helper()
	n := &node{t: t, dir: dir, source: &source{}, now: time.Now()}
	var err error
	if n.store, err = store.Open(n.dir, store.WithClock(n.clock)); err != nil {
		t.Fatal(err)
	}
	n.cleaner = &Cleaner{
		Collector: &gc.Collector{Store: n.store, Node: "node", Sources: []usage.Source{n.source}, Now: n.clock},
		Log:       slog.New(slog.NewTextHandler(&n.log, nil)),
		Wall:      n.clock,
	}
	return n
}

func (n *node) clock() time.Time {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.now
}

func (n *node) pass(d time.Duration) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.now = n.now.Add(d)
}

// publish brings in a version of one file of a megabyte that no other has.
func (n *node) publish(name string) digest.Digest {
	n.t.Helper()
	lease, err := n.store.NewLease(n.t.Context(), "node", "test")
	if err != nil {
		n.t.Fatal(err)
	}
	defer lease.Release()
	content := append([]byte(name), make([]byte, 1<<20)...)
	d, err := n.store.PutBlob(n.t.Context(), lease, content)
	if err != nil {
		n.t.Fatal(err)
	}
	ref, err := reference.Parse(name)
	if err != nil {
		n.t.Fatal(err)
	}
	v, err := n.store.Publish(n.t.Context(), lease, modelpack.Model{Files: []modelpack.File{{Path: "weights", Digest: d, Size: int64(len(content))}}}, []reference.Reference{ref})
	if err != nil {
		n.t.Fatal(err)
	}
	return v.Digest
}

func (n *node) has(name string) bool {
	n.t.Helper()
	ref, err := reference.Parse(name)
	if err != nil {
		n.t.Fatal(err)
	}
	_, err = n.store.Resolve(ref)
	if err != nil && !errors.Is(err, store.ErrNotFound) {
		n.t.Fatal(err)
	}
	return err == nil
}

func (n *node) digest(name string) digest.Digest {
	n.t.Helper()
	ref, err := reference.Parse(name)
	if err != nil {
		n.t.Fatal(err)
	}
	v, err := n.store.Resolve(ref)
	if err != nil {
		n.t.Fatal(err)
	}
	return v.Digest
}

// remove does what larder rm does.
func (n *node) remove(name string) {
	n.t.Helper()
	ref, err := reference.Parse(name)
	if err != nil {
		n.t.Fatal(err)
	}
	if _, err := n.cleaner.Collector.Remove(n.t.Context(), []reference.Reference{ref}, gc.Options{Reason: "test"}); err != nil {
		n.t.Fatal(err)
	}
}

// check reads everything again.
func (n *node) check() {
	n.t.Helper()
	if problems, err := n.store.Verify(n.t.Context(), nil, nil); err != nil || len(problems) > 0 {
		n.t.Fatalf("verify: %v %v", problems, err)
	}
}

func (n *node) trash() int {
	n.t.Helper()
	removals, err := n.store.Trash()
	if err != nil {
		n.t.Fatal(err)
	}
	return len(removals)
}

func (n *node) once(o Options) *Report {
	n.t.Helper()
	r, err := n.cleaner.Once(n.t.Context(), o)
	if err != nil {
		n.t.Fatal(err)
	}
	return r
}

func parse(t *testing.T, text string) *retention.Policy {
	t.Helper()
	p, err := retention.Parse("policy.yaml", []byte("version: 1\n"+text))
	if err != nil {
		t.Fatal(err)
	}
	return p
}

const day = 24 * time.Hour

// nearlyAll is more than is free where tests run, as long as this test does.
func nearlyAll(t *testing.T) retention.Amount {
	t.Helper()
	testenv.UsedDisk(t)
	return retention.Amount{Percent: 99}
}

// weekly keeps one version of each model, and what was used this week.
const weekly = `
rules: [{models: ["*"], unusedFor: 7d, rollback: 0, minAge: 0s}]
trash: {hold: 2d}
unfinished: {hold: 3d}
`

func TestARunRemovesWhatThePolicySaysAndNothingElse(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	policy := parse(t, weekly)
	used := n.publish("m:1")
	n.publish("m:2")
	n.source.set(nil, used)
	n.pass(8 * day)
	n.publish("m:3")
	dry := n.once(Options{Policy: policy, DryRun: true})
	if !n.has("m:2") || n.trash() != 0 {
		t.Fatal("a dry run removed something")
	}
	got := n.once(Options{Policy: policy})
	if diff := cmp.Diff(dry.Plan, got.Plan); diff != "" {
		t.Errorf("the plan of the dry run and that of the run differ:\n%s", diff)
	}
	if versions, size := got.Removed(); versions != 1 || size != got.Plan.Frees || size < 1<<20 {
		t.Errorf("removed %d versions of %d bytes, planned %d bytes", versions, size, got.Plan.Frees)
	}
	if !n.has("m:1") || n.has("m:2") || !n.has("m:3") {
		t.Error("the wrong versions are left")
	}
	for _, want := range []string{"msg=removed", "model=m ", "reason=unused", `rule="rules[0] (*)"`, "bytes=1"} {
		if !strings.Contains(n.log.String(), want) {
			t.Errorf("the log does not say %s:\n%s", want, n.log.String())
		}
	}
	// Looked at while it was in use, it counts as used then.
	n.source.set(nil)
	n.pass(6 * day)
	n.once(Options{Policy: policy})
	if !n.has("m:1") {
		t.Error("a version goes that was in use six days ago")
	}
}

func TestTheTrashIsHeldAndThenEmptied(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	policy := parse(t, weekly)
	n.publish("m:1")
	n.pass(8 * day)
	n.once(Options{Policy: policy})
	if n.has("m:1") || n.trash() != 1 {
		t.Fatal("it was not moved to the trash")
	}
	n.pass(47 * time.Hour)
	if r := n.once(Options{Policy: policy}); len(r.Condemned) > 0 || n.trash() != 1 {
		t.Error("the trash was emptied before its time")
	}
	n.pass(2 * time.Hour)
	if r := n.once(Options{Policy: policy}); len(r.Condemned) != 1 || r.Freed < 1<<20 || n.trash() != 0 {
		t.Errorf("after its time: condemned %v, freed %d, left %d", r.Condemned, r.Freed, n.trash())
	}
}

func TestATrashThatIsNotHeldIsEmptiedInTheSameRun(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	n.publish("m:1")
	n.pass(8 * day)
	r := n.once(Options{Policy: parse(t, strings.Replace(weekly, "hold: 2d", "hold: 0s", 1))})
	if n.trash() != 0 || r.Freed < 1<<20 {
		t.Errorf("%d removals are in the trash, %d bytes were freed", n.trash(), r.Freed)
	}
}

func TestWhereSpaceIsShortEverythingInTheTrashGoesAtOnce(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	n.publish("m:1")
	n.pass(8 * day)
	n.once(Options{Policy: parse(t, weekly)})
	keep := n.publish("m:2")
	n.source.set(nil, keep)
	n.publish("m:3")
	n.pass(time.Minute)
	r := n.once(Options{Policy: parse(t, weekly+"limits: {bytesPerSecond: 1MiB}\n"), UntilFree: nearlyAll(t)})
	if n.trash() != 0 || r.Freed < 2<<20 {
		t.Errorf("in the trash are still %d removals, freed %d bytes", n.trash(), r.Freed)
	}
	if !n.has("m:2") || n.has("m:3") {
		t.Error("the wrong version went")
	}
	if !r.Short() {
		t.Error("the target cannot be reached, and the report does not say so")
	}
}

func TestASourceThatFailsKeepsEverythingButTheOldTrash(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	weeks := Options{Policy: parse(t, weekly)}
	short := Options{Policy: weeks.Policy, UntilFree: nearlyAll(t)}
	n.publish("m:1")
	n.pass(8 * day)
	n.once(weeks)
	n.publish("m:2")
	n.partial("broken")
	n.pass(8 * day)
	n.source.set(errors.New("no answer"))
	r, err := n.cleaner.Once(t.Context(), short)
	var failed *usage.Error
	if !errors.As(err, &failed) || failed.Source != "engine" {
		t.Errorf("error %v, want one that names the source", err)
	}
	if !n.has("m:2") || len(r.Outcomes) > 0 || !n.partialThere("broken") {
		t.Error("something was removed though it was not known what is in use")
	}
	if len(r.Plan.Decisions) != 1 {
		t.Errorf("the report has no plan: %+v", r.Plan)
	}
	if n.trash() != 0 {
		t.Error("the trash was not emptied")
	}
	n.source.set(nil)
	n.once(short)
	if n.has("m:2") || n.partialThere("broken") {
		t.Error("when the source answers again, nothing is removed")
	}
}

// partial leaves what a pull leaves that broke off at this moment.
func (n *node) partial(name string) {
	n.t.Helper()
	path := filepath.Join(n.dir, "ingest", name)
	if err := os.WriteFile(path, make([]byte, 4096), 0o600); err != nil {
		n.t.Fatal(err)
	}
	if err := os.Chtimes(path, n.clock(), n.clock()); err != nil {
		n.t.Fatal(err)
	}
}

func (n *node) partialThere(name string) bool {
	_, err := os.Stat(filepath.Join(n.dir, "ingest", name))
	return err == nil
}

func TestWhatBrokenPullsLeftGoesInItsTime(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	policy := parse(t, weekly)
	n.partial("broken")
	lease, err := n.store.NewLease(t.Context(), "node", "test")
	if err != nil {
		t.Fatal(err)
	}
	blob, err := n.store.PutBlob(t.Context(), lease, make([]byte, 1<<20))
	if err != nil {
		t.Fatal(err)
	}
	if err := lease.Release(); err != nil {
		t.Fatal(err)
	}
	n.pass(70 * time.Hour)
	n.once(Options{Policy: policy})
	if _, there, _ := n.store.Stat(blob); !there || !n.partialThere("broken") {
		t.Fatal("they went before their time")
	}
	// A wall clock that was put back a day makes new files look a day older.
	n.pass(4 * time.Hour)
	n.cleaner.Wall = func() time.Time { return n.clock().Add(-day) }
	n.once(Options{Policy: policy})
	if _, there, _ := n.store.Stat(blob); !there || !n.partialThere("broken") {
		t.Fatal("they went before their time, where the wall clock is behind")
	}
	n.cleaner.Wall = n.clock
	if r := n.once(Options{Policy: policy}); r.Dropped < 1<<20 {
		t.Errorf("dropped %d bytes", r.Dropped)
	}
	if _, there, _ := n.store.Stat(blob); there || n.partialThere("broken") {
		t.Error("they are still there")
	}
}

func TestWithoutAPolicyNothingGoes(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	used := n.publish("m:1")
	n.source.set(nil, used)
	n.publish("m:2")
	n.pass(8 * day)
	n.once(Options{Policy: parse(t, weekly)})
	n.publish("lone:1")
	n.partial("broken")
	n.pass(1000 * day)
	r := n.once(Options{})
	if !n.has("lone:1") || n.trash() != 1 || !n.partialThere("broken") {
		t.Error("something was removed without a policy")
	}
	if r.Inventory == nil || len(r.Plan.Decisions) > 0 {
		t.Errorf("inventory %v, plan %v", r.Inventory, r.Plan)
	}
	when, _, err := n.store.LastSeen()
	if err != nil || !when[used].Equal(n.clock()) && n.clock().Sub(when[used]) > time.Second {
		t.Errorf("a version in use was last used %s (%v), want %s", when[used], err, n.clock())
	}
	// Unless a person asks for room.
	n.source.set(nil)
	n.once(Options{UntilFree: nearlyAll(t), Models: []string{"other"}})
	if !n.has("lone:1") {
		t.Error("a version went of a model that was not named")
	}
	if r := n.once(Options{UntilFree: nearlyAll(t), Models: []string{"lone"}}); n.has("lone:1") {
		t.Errorf("a person asked for room, and nothing went: %+v", r.Plan)
	}
}

func TestRoomThatIsThereAlreadyTakesNothing(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	n.publish("m:1")
	n.publish("m:2")
	n.remove("m:1")
	n.partial("broken")
	n.pass(8 * day)
	for _, policy := range []*retention.Policy{nil, parse(t, weekly)} {
		for _, dry := range []bool{true, false} {
			r := n.once(Options{Policy: policy, UntilFree: retention.Amount{Bytes: 1}, DryRun: dry})
			if n.trash() != 1 || !n.has("m:2") || !n.partialThere("broken") || len(r.Condemned) > 0 || r.Leftovers.Bytes > 0 {
				t.Errorf("a byte is free, and with policy %v there went %+v", policy, r)
			}
		}
	}
}

// Windows are of the wall clock: ages may lag behind it.
func TestWindowsOpenByTheWallClock(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	n.publish("m:1")
	n.pass(8 * day)
	policy := parse(t, weekly+"windows: [{start: \"0 2 * * *\", duration: 1h}]\n")
	at := func(hour int) time.Time { return time.Date(2026, 3, 1, hour, 30, 0, 0, time.UTC) }
	n.cleaner.Wall = func() time.Time { return at(3) }
	if r := n.once(Options{Policy: policy}); !n.has("m:1") || r.Plan.Decisions[0].Reason != retention.LaterOn {
		t.Errorf("outside the window: %+v", r.Plan.Decisions)
	}
	n.cleaner.Wall = func() time.Time { return at(2) }
	if n.once(Options{Policy: policy}); n.has("m:1") {
		t.Error("in the window nothing goes")
	}
}

func TestARemovalThatWasCutShortIsFinished(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	n.publish("m:1")
	n.publish("m:2")
	n.pass(8 * day)
	// What a removal leaves that was killed after its second step.
	removed, err := n.cleaner.Collector.Remove(t.Context(), []reference.Reference{{Kind: reference.Short, Repo: "m", Tag: "1"}}, gc.Options{Reason: "test"})
	if err != nil {
		t.Fatal(err)
	}
	dir := filepath.Join(n.dir, "trash", removed.ID)
	if err := os.Rename(filepath.Join(dir, "removal.json"), filepath.Join(dir, "pending.json")); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(filepath.Join(dir, removed.Blobs[0].Digest.Encoded()), n.store.BlobPath(removed.Blobs[0].Digest)); err != nil {
		t.Fatal(err)
	}
	if r := n.once(Options{DryRun: true, Policy: parse(t, weekly)}); len(r.Recovered) > 0 {
		t.Error("a dry run finished it")
	}
	if r := n.once(Options{Policy: parse(t, weekly)}); len(r.Recovered) != 1 || len(r.Outcomes) != 1 {
		t.Errorf("recovered %v, outcomes %v", r.Recovered, r.Outcomes)
	}
	if pending, err := n.store.Pending(); err != nil || pending {
		t.Errorf("pending %v, %v", pending, err)
	}
}

func TestARunThatIsStoppedCanBeRepeated(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	for i := range 5 {
		n.publish(fmt.Sprintf("m:%d", i))
	}
	n.pass(8 * day)
	policy := parse(t, weekly)
	ctx, cancel := context.WithCancel(t.Context())
	run, err := n.cleaner.Prepare(ctx, Options{Policy: policy})
	if err != nil {
		t.Fatal(err)
	}
	cancel()
	if err := run.Do(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("error %v", err)
	}
	for _, o := range run.Report.Outcomes {
		if o.Fate == gc.Gone {
			t.Errorf("removed %s after it was stopped", o.Decision.Digest)
		}
	}
	n.once(Options{Policy: policy})
	if versions, err := n.store.Versions(); err != nil || len(versions) > 0 {
		t.Errorf("left %v (%v)", versions, err)
	}
}
