//go:build faults

package gc

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"

	"github.com/larder-project/larder/internal/disk"
	"github.com/larder-project/larder/internal/reference"
	"github.com/larder-project/larder/internal/retention"
	"github.com/larder-project/larder/internal/store"
	"github.com/larder-project/larder/internal/testenv"
	"github.com/larder-project/larder/internal/usage"
)

// A long walk of random operations, with crashes in the middle of them, clocks
// that jump and sources that fail, against a simple model: which versions there
// are, and which of them something needs. After each step no version that is
// referenced, in use or pinned misses a byte, what was removed lies whole in
// the trash unless that was emptied, and nothing went that was not to go.
//
//	LARDER_RANDOM_SEED=N LARDER_RANDOM_STEPS=N go test -tags faults -run TestRandomSteps ./internal/gc
//
// repeats a walk.
func TestRandomSteps(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	if text := os.Getenv("LARDER_RANDOM_SEED"); text != "" {
		n, err := strconv.ParseUint(text, 10, 64)
		if err != nil {
			t.Fatal(err)
		}
		seed = n
	}
	steps := 2_000
	if text := os.Getenv("LARDER_RANDOM_STEPS"); text != "" {
		n, err := strconv.Atoi(text)
		if err != nil {
			t.Fatal(err)
		}
		steps = n
	}
	t.Logf("LARDER_RANDOM_SEED=%d LARDER_RANDOM_STEPS=%d", seed, steps)
	w := newWalk(t, seed)
	for w.step = 0; w.step < steps; w.step++ {
		w.once()
		if t.Failed() {
			t.Fatalf("at step %d of the walk with seed %d:\n%s", w.step, seed, strings.Join(w.log, "\n"))
		}
	}
	w.end()
	t.Logf("%v; %d crashes", w.counts, w.crashes)
	for _, op := range []string{"pull", "rm", "prune", "undo", "empty", "leftovers"} {
		if w.counts[op] < steps/200 {
			t.Errorf("%s was done %d times in %d steps only", op, w.counts[op], steps)
		}
	}
}

// A hundred thousand steps, by a process that is built without the race
// detector.
func TestManyRandomSteps(t *testing.T) {
	if os.Getenv("LARDER_TEST_ALL") == "" {
		t.Skip("takes minutes: set LARDER_TEST_ALL=1")
	}
	t.Parallel()
	testenv.NeedPrograms(t, "go")
	const steps = 100_000
	seed := time.Now().UnixNano()
	binary := filepath.Join(t.TempDir(), "gc.test")
	build := exec.Command("go", "test", "-c", "-tags=faults", "-o", binary, ".")
	build.Env = append(os.Environ(), "CGO_ENABLED=0", "GOFLAGS=")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v: %v\n%s", build.Args, err, out)
	}
	walk := exec.Command(binary, "-test.run=^TestRandomSteps$", "-test.v", "-test.timeout=28m")
	walk.Env = append(os.Environ(), fmt.Sprintf("LARDER_RANDOM_SEED=%d", seed), fmt.Sprintf("LARDER_RANDOM_STEPS=%d", steps))
	out, err := walk.CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	t.Logf("%s", out)
}

// walk is the model, and the store that it is compared with.
type walk struct {
	t    *testing.T
	rng  *rand.Rand
	plan retention.Plan // the last that was made
	dir  string
	s    *store.Store
	c    *Collector

	step    int
	log     []string // the last operations
	counts  map[string]int
	crashes int

	began    time.Time
	now      time.Time
	failing  bool                              // a source cannot tell
	mounted  map[digest.Digest]int             // uses on this node
	elsewhat map[digest.Digest]bool            // used by another node
	pinned   map[digest.Digest]bool            //
	known    map[digest.Digest]map[string]bool // contents of every version that was ever published
	before   map[digest.Digest][]string        // referenced before the operation, with names
	trashed  map[digest.Digest]bool            // could be undone before the operation
	allowed  func(digest.Digest) bool          // which versions the operation may take away
	emptied  bool                              // the operation may delete for good
}

func newWalk(t *testing.T, seed uint64) *walk {
	w := &walk{
		t: t, rng: rand.New(rand.NewPCG(seed, 1)), counts: map[string]int{},
		began:   time.Now(),
		mounted: map[digest.Digest]int{}, elsewhat: map[digest.Digest]bool{}, pinned: map[digest.Digest]bool{}, known: map[digest.Digest]map[string]bool{},
	}
	w.now = w.began
	w.dir = filepath.Join(memory(t), "s")
	w.reopen()
	return w
}

// memory is a folder in memory: a walk makes a million files durable.
func memory(t *testing.T) string {
	t.Helper()
	if os.Geteuid() == 0 {
		return testenv.LoopFS(t, "tmpfs", 0).Dir
	}
	return t.TempDir()
}

// reopen is what a process does that starts after a crash.
func (w *walk) reopen() {
	w.t.Helper()
	s, err := store.Open(w.dir, store.WithClock(func() time.Time { return w.now }))
	if err != nil {
		w.t.Fatal(err)
	}
	w.s = s
	w.c = &Collector{Store: s, Node: "node", Sources: []usage.Source{w}, Now: func() time.Time { return w.now }}
}

func (w *walk) Name() string { return "walk" }

func (w *walk) Uses(context.Context) ([]usage.Use, error) {
	if w.failing {
		return nil, errors.New("this source fails")
	}
	var out []usage.Use
	for d := range w.mounted {
		out = append(out, usage.Use{Version: d, By: "a container of the walk"})
	}
	return out, nil
}

func (w *walk) note(format string, args ...any) {
	w.log = append(w.log, fmt.Sprintf("%6d ", w.step)+fmt.Sprintf(format, args...))
	if len(w.log) > 40 {
		w.log = w.log[1:]
	}
}

func pick[T any](w *walk, list []T) (T, bool) {
	var none T
	if len(list) == 0 {
		return none, false
	}
	return list[w.rng.IntN(len(list))], true
}

func (w *walk) versions() []store.Version {
	w.t.Helper()
	v, err := w.s.Versions()
	if err != nil {
		w.t.Fatal(err)
	}
	return v
}

func (w *walk) trash() []store.Removal {
	w.t.Helper()
	r, err := w.s.Trash()
	if err != nil {
		w.t.Fatal(err)
	}
	return r
}

func (w *walk) inUse(d digest.Digest) bool { return w.mounted[d] > 0 || w.elsewhat[d] || w.pinned[d] }

// once does one operation, perhaps one that is cut short, and checks.
func (w *walk) once() {
	w.now = w.now.Add(time.Duration(w.rng.IntN(7200)) * time.Second)
	w.before, w.trashed = map[digest.Digest][]string{}, map[digest.Digest]bool{}
	for _, v := range w.versions() {
		w.before[v.Digest] = v.References
	}
	for _, r := range w.trash() {
		for _, d := range r.References {
			w.trashed[d.Digest] = true
		}
	}
	w.allowed, w.emptied = func(digest.Digest) bool { return false }, false
	crash := w.rng.IntN(12) == 0
	if crash {
		disk.Inject(1+w.rng.IntN(40), unix.EIO)
	}
	name, err := w.operation()
	if crash {
		disk.Inject(0, 0)
	}
	died := crash && errors.Is(err, unix.EIO)
	w.note("%s: %v%s", name, err, map[bool]string{true: " (crash)"}[died])
	w.counts[name]++
	switch {
	case died:
		w.crashes++
		w.reopen()
	case err != nil && !expected(err):
		w.t.Errorf("%s: %v", name, err)
	}
	w.check(w.step%25 == 0 || died)
}

// expected errors are refusals.
func expected(err error) bool {
	return errors.Is(err, store.ErrInUse) || errors.Is(err, store.ErrNotFound) || strings.Contains(err.Error(), "this source fails")
}

func (w *walk) operation() (string, error) {
	ctx := context.Background()
	versions := w.versions()
	switch n := w.rng.IntN(100); {
	case n < 25:
		return "pull", w.pull(ctx)
	case n < 29:
		v, ok := pick(w, versions)
		if !ok {
			return "nothing", nil
		}
		_, err := w.s.Tag(ctx, v.Digest, w.name())
		w.allowed = func(digest.Digest) bool { return false }
		return "tag", err
	case n < 38:
		v, ok := pick(w, versions)
		if !ok {
			return "nothing", nil
		}
		// As package volume does it: found and recorded under one lock.
		err := w.s.Shared(ctx, func() error { return w.s.Use("node", v.Digest) })
		if err == nil {
			w.mounted[v.Digest]++
			w.s.TouchUsage("node", v.Digest)
		}
		return "mount", err
	case n < 48:
		d, ok := pick(w, slices.Sorted(maps.Keys(w.mounted)))
		if ok {
			if w.mounted[d]--; w.mounted[d] <= 0 {
				delete(w.mounted, d)
			}
		}
		return "unmount", nil
	case n < 51:
		v, ok := pick(w, versions)
		if !ok {
			return "nothing", nil
		}
		err := w.s.Shared(ctx, func() error { return w.s.Use("other", v.Digest) })
		if err == nil {
			w.elsewhat[v.Digest] = true
		}
		return "mount elsewhere", err
	case n < 54:
		err := w.s.Exclusive(ctx, func(x *store.Exclusive) error { return x.Forget("other", nil) })
		if err == nil {
			clear(w.elsewhat)
		} else {
			w.elsewhat = w.usersOf("other")
		}
		return "unmount elsewhere", err
	case n < 57:
		v, ok := pick(w, versions)
		if !ok {
			return "nothing", nil
		}
		err := w.s.Pin(ctx, v.Digest, store.Pin{Time: w.now})
		w.readPins()
		return "pin", err
	case n < 63:
		var err error
		for _, d := range slices.Sorted(maps.Keys(w.pinned)) {
			if err == nil && w.rng.IntN(2) == 0 {
				_, err = w.s.Unpin(ctx, d)
			}
		}
		w.readPins()
		return "unpin", err
	case n < 70:
		return "rm", w.rm(ctx, versions)
	case n < 82:
		return "prune", w.prune(ctx)
	case n < 87:
		r, ok := pick(w, w.trash())
		if !ok {
			return "nothing", nil
		}
		var only []digest.Digest
		if d, ok := pick(w, r.References); ok && w.rng.IntN(2) == 0 {
			only = append(only, d.Digest)
		}
		_, err := w.c.Undo(ctx, r.ID, only...)
		w.readPins()
		return "undo", err
	case n < 93:
		w.emptied = true
		_, _, err := w.c.EmptyTrash(ctx, w.now.Add(-time.Duration(w.rng.IntN(24))*time.Hour), store.Limit{})
		return "empty", err
	case n < 95:
		return "leftovers", w.leftovers(ctx)
	case n < 97:
		w.now = w.began.Add(time.Duration(w.rng.IntN(4*365*24)-2*365*24) * time.Hour)
		return "clock", nil
	case n < 98:
		w.failing = !w.failing && w.rng.IntN(2) == 0
		return "source", nil
	case n < 99:
		w.reopen() // and a collector that knows nothing
		return "restart", nil
	default:
		inv, err := w.c.Look(ctx)
		if err == nil {
			err = w.c.Note(ctx, inv)
		}
		return "look", err
	}
}

func (w *walk) leftovers(ctx context.Context) error {
	inv, err := w.c.Look(ctx)
	if err != nil {
		return err
	}
	inv.Time = w.began.Add(20 * 365 * 24 * time.Hour) // files have the real time
	_, err = w.c.DropLeftovers(ctx, inv.Leftovers(0), store.Limit{})
	return err
}

func (w *walk) usersOf(node string) map[digest.Digest]bool {
	w.t.Helper()
	users, err := w.s.Users()
	if err != nil {
		w.t.Fatal(err)
	}
	out := map[digest.Digest]bool{}
	for d, nodes := range users {
		if slices.Contains(nodes, node) {
			out[d] = true
		}
	}
	return out
}

// readPins takes over what is pinned: a crash may have come before or after.
func (w *walk) readPins() {
	w.t.Helper()
	pins, err := w.s.Pins()
	if err != nil {
		w.t.Fatal(err)
	}
	clear(w.pinned)
	for d := range pins {
		w.pinned[d] = true
	}
}

func (w *walk) name() reference.Reference {
	r, err := reference.Parse(fmt.Sprintf("m%d:%d.%d.%d", w.rng.IntN(4), w.rng.IntN(2), w.rng.IntN(3), w.rng.IntN(4)))
	if err != nil {
		w.t.Fatal(err)
	}
	return r
}

func (w *walk) pull(ctx context.Context) error {
	contents := map[string]bool{}
	for range 1 + w.rng.IntN(5) {
		contents[fmt.Sprint("content ", w.rng.IntN(40))] = true
	}
	v, err := publish(ctx, w.s, w.name().String(), slices.Sorted(maps.Keys(contents))...)
	if err == nil {
		w.known[v.Digest] = contents
	} else {
		// It may have been published all the same.
		for _, v := range w.versions() {
			if w.known[v.Digest] == nil {
				w.known[v.Digest] = contents
			}
		}
	}
	return err
}

func (w *walk) rm(ctx context.Context, versions []store.Version) error {
	v, ok := pick(w, versions)
	if !ok {
		return nil
	}
	name := string(v.Digest)
	if ref, ok := pick(w, v.References); ok && w.rng.IntN(3) > 0 {
		name = ref
	}
	r, err := reference.Parse(name)
	if err != nil {
		return err
	}
	stays := name != string(v.Digest) && len(v.References) > 1
	if !stays && !w.inUse(v.Digest) && !w.failing {
		w.allowed = func(d digest.Digest) bool { return d == v.Digest }
	}
	now := w.rng.IntN(4) == 0
	w.emptied = now // of this removal; check finds nothing of it in the trash
	_, err = w.c.Remove(ctx, []reference.Reference{r}, Options{Reason: "walk", Now: now})
	return err
}

// prune carries out a plan that no policy made: it says of any version that it
// goes, and may be old when it is carried out.
func (w *walk) prune(ctx context.Context) error {
	inv, err := w.c.Look(ctx)
	if err != nil {
		return err
	}
	plan := retention.Plan{Time: inv.Time}
	for _, v := range inv.Versions {
		if w.rng.IntN(2) == 0 {
			plan.Decisions = append(plan.Decisions, retention.Decision{Digest: v.Digest, References: v.References, LastUsed: v.LastUsed, Remove: true, Reason: retention.Unused})
		}
	}
	// One that was made some steps ago is as good: what has changed since stays.
	plan, w.plan = w.plan, plan
	if w.rng.IntN(2) == 0 {
		plan, w.plan = w.plan, plan
	}
	planned := map[digest.Digest][]string{}
	for _, d := range plan.Decisions {
		planned[d.Digest] = d.References
	}
	if !w.failing {
		w.allowed = func(d digest.Digest) bool {
			names, ok := planned[d]
			return ok && !w.inUse(d) && !slices.ContainsFunc(w.before[d], func(name string) bool { return !slices.Contains(names, name) })
		}
	}
	outcomes, err := w.c.Execute(ctx, plan, nil)
	if err == nil && len(outcomes) != len(planned) {
		w.t.Errorf("%d outcomes of %d decisions", len(outcomes), len(planned))
	}
	return err
}

// check compares the store with the model.
func (w *walk) check(all bool) {
	w.t.Helper()
	now := map[digest.Digest]bool{}
	for _, v := range w.versions() {
		now[v.Digest] = true
		if w.known[v.Digest] == nil {
			w.t.Errorf("version %s came from nowhere", v.Digest)
		}
	}
	inTrash := map[digest.Digest]bool{}
	for _, r := range w.trash() {
		for _, d := range r.References {
			inTrash[d.Digest] = true
		}
	}
	pending := w.pending()
	for d, names := range w.before {
		switch {
		case now[d]:
		case w.inUse(d) && !pending[d]:
			w.t.Errorf("version %s %v is in use or pinned, and is gone", d, names)
		case !w.allowed(d):
			w.t.Errorf("version %s %v is gone, and nobody said so", d, names)
		case !inTrash[d] && !pending[d] && !w.emptied:
			w.t.Errorf("version %s %v is gone, and cannot be brought back", d, names)
		}
	}
	for d := range w.trashed {
		if !now[d] && !inTrash[d] && !pending[d] && !w.emptied {
			w.t.Errorf("version %s could be brought back, and no longer can", d)
		}
	}
	for d, contents := range w.known {
		if now[d] && (all || w.rng.IntN(8) == 0) {
			w.whole(d, contents, false)
		}
		if inTrash[d] && (all || w.rng.IntN(16) == 0) {
			w.whole(d, contents, true)
		}
	}
	if w.step%2_000 == 0 {
		checkClean(w.t, w.s)
	}
}

// pending are versions of removals that a crash cut short.
func (w *walk) pending() map[digest.Digest]bool {
	out := map[digest.Digest]bool{}
	found, err := filepath.Glob(filepath.Join(w.dir, "trash", "*", "pending.json"))
	if err != nil {
		w.t.Fatal(err)
	}
	if len(found) == 0 {
		return out
	}
	for d := range w.known {
		for _, path := range found {
			if text, err := os.ReadFile(path); err == nil && strings.Contains(string(text), string(d)) {
				out[d] = true
			}
		}
	}
	return out
}

// whole checks that all blobs of a version are in the store, or can be brought
// back from the trash.
func (w *walk) whole(d digest.Digest, contents map[string]bool, trash bool) {
	w.t.Helper()
	there := func(d digest.Digest) bool {
		if _, ok, err := w.s.Stat(d); err != nil || ok {
			return err == nil
		}
		if !trash {
			return false
		}
		found, err := filepath.Glob(filepath.Join(w.dir, "trash", "*", d.Encoded()))
		return err == nil && slices.ContainsFunc(found, func(path string) bool {
			_, err := os.Lstat(filepath.Join(filepath.Dir(path), "gone.json"))
			return err != nil
		})
	}
	if !there(d) {
		w.t.Errorf("version %s lacks its manifest (in the trash: %t)", d, trash)
	}
	for c := range contents {
		if !there(digest.FromString(c)) {
			w.t.Errorf("version %s lacks %q (in the trash: %t)", d, c, trash)
		}
	}
}

// end takes all roots away: then nothing may be left.
func (w *walk) end() {
	w.t.Helper()
	w.failing = false
	clear(w.mounted)
	ctx := context.Background()
	if err := w.s.Exclusive(ctx, func(x *store.Exclusive) error { return x.Forget("other", nil) }); err != nil {
		w.t.Fatal(err)
	}
	w.readPins()
	for d := range w.pinned {
		if _, err := w.s.Unpin(ctx, d); err != nil {
			w.t.Fatal(err)
		}
	}
	inv, err := w.c.Look(ctx)
	if err != nil {
		w.t.Fatal(err)
	}
	plan := retention.Plan{Time: inv.Time}
	for _, v := range inv.Versions {
		plan.Decisions = append(plan.Decisions, retention.Decision{Digest: v.Digest, References: v.References, LastUsed: v.LastUsed, Remove: true})
	}
	if _, err := w.c.Execute(ctx, plan, nil); err != nil {
		w.t.Fatal(err)
	}
	if err := w.leftovers(ctx); err != nil {
		w.t.Fatal(err)
	}
	if _, _, err := w.c.EmptyTrash(ctx, w.began.Add(20*365*24*time.Hour), store.Limit{}); err != nil {
		w.t.Fatal(err)
	}
	// What an undo that was cut short had brought back was kept for another.
	if err := w.leftovers(ctx); err != nil {
		w.t.Fatal(err)
	}
	for _, dir := range []string{"blobs/sha256", "trash", "ingest"} {
		entries, err := os.ReadDir(filepath.Join(w.dir, dir))
		if err != nil {
			w.t.Fatal(err)
		}
		for _, e := range entries {
			if e.Name() != ".shredding" {
				w.t.Errorf("left in %s: %s", dir, e.Name())
			}
		}
	}
	index, err := w.s.Index()
	if err != nil || len(index) != 0 {
		w.t.Errorf("index.json has %d entries, %v", len(index), err)
	}
}
