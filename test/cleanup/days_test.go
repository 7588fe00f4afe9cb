package cleanup

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/larder-project/larder/internal/cleanup"
	"github.com/larder-project/larder/internal/disk"
	"github.com/larder-project/larder/internal/gc"
	"github.com/larder-project/larder/internal/pull"
	"github.com/larder-project/larder/internal/reference"
	"github.com/larder-project/larder/internal/retention"
	"github.com/larder-project/larder/internal/source/directory"
	"github.com/larder-project/larder/internal/store"
	"github.com/larder-project/larder/internal/testenv"
	"github.com/larder-project/larder/internal/volume"
)

// The case that Larder is for, at one to a hundred: a server with 480 GB whose
// disk CI has filled after three months. Here it has 4.8 GB.
const (
	capacity  = 4_800 << 20
	days      = 90
	ciModels  = 6
	freshSize = 14 << 20 // of each version, bytes that no other has
	baseSize  = 16 << 20 // of each model, bytes that all its versions share
	bigSize   = 1_500 << 20
	bigDay    = 60
	minFree   = capacity / 10
)

// What a careful operator would write: two versions to go back to, a month for
// what nobody uses, no trash that fills the disk, and room that is made a little
// before the limit below which pods are evicted.
const daysPolicy = `
version: 1
rules:
  - models: ["*"]
    keepNewest: 3
    unusedFor: 30d
    rollback: 2
    minAge: 1h
pressure: {minFree: 12%, target: 17%}
trash: {hold: 6h}
`

// ci is what happens on a node day by day: a new version of each model, and
// containers that come and go.
type ci struct {
	t     *testing.T
	rng   *rand.Rand
	dir   string
	base  [ciModels]string // file that all versions of a model have
	fresh []byte
}

func newCI(t *testing.T) *ci {
	t.Helper()
	c := &ci{t: t, rng: rand.New(rand.NewPCG(20, 26)), dir: t.TempDir(), fresh: make([]byte, freshSize)}
	base := make([]byte, baseSize)
	for m := range c.base {
		fill(base, uint64(m))
		c.base[m] = filepath.Join(c.dir, modelName(m))
		ok(t, os.WriteFile(c.base[m], base, 0o644))
	}
	return c
}

// fill writes what no compression and no deduplication makes smaller.
func fill(b []byte, seed uint64) {
	x := seed*0x9e3779b97f4a7c15 + 0x2545f4914f6cdd1d
	for i := 0; i+8 <= len(b); i += 8 {
		x ^= x << 13
		x ^= x >> 7
		x ^= x << 17
		binary.LittleEndian.PutUint64(b[i:], x)
	}
}

func modelName(m int) string { return fmt.Sprintf("ci-model-%d", m) }

func tag(day int) string { return fmt.Sprintf("1.%d.%d", day/7, day%7) }

// seed tells the bytes of a version.
func seed(m, day int) uint64 { return uint64(1000 + m*1000 + day) }

// write makes the folder that CI has built.
func (c *ci) write(m, day int) string {
	c.t.Helper()
	dir := filepath.Join(c.dir, "built")
	ok(c.t, os.RemoveAll(dir))
	ok(c.t, os.Mkdir(dir, 0o755))
	fill(c.fresh, seed(m, day))
	ok(c.t, os.WriteFile(filepath.Join(dir, "model-00002-of-00002.safetensors"), c.fresh, 0o644))
	ok(c.t, os.Link(c.base[m], filepath.Join(dir, "model-00001-of-00002.safetensors")))
	ok(c.t, os.WriteFile(filepath.Join(dir, "config.json"), fmt.Appendf(nil, `{"version":%q}`, tag(day)), 0o644))
	return dir
}

// The same load without Larder: each version is a folder of its own.
func TestThreeMonthsOfCIWithoutLarderFillTheDisk(t *testing.T) {
	testenv.NeedRoot(t)
	fsys := testenv.LoopFS(t, "xfs", capacity)
	c := newCI(t)
	for day := range days {
		for m := range ciModels {
			dir := filepath.Join(fsys.Dir, modelName(m), tag(day))
			ok(t, os.MkdirAll(filepath.Dir(dir), 0o755))
			err := os.CopyFS(dir, os.DirFS(c.write(m, day)))
			if errors.Is(err, unix.ENOSPC) {
				t.Logf("without Larder the disk is full on day %d of %d", day+1, days)
				return
			}
			ok(t, err)
		}
	}
	t.Errorf("the disk was not full after %d days: the load is too small to show anything", days)
}

// node is the server, with a simulated clock.
type node struct {
	t       *testing.T
	ci      *ci
	dir     string
	now     time.Time
	st      *store.Store
	vols    *volume.Manager
	cleaner *cleanup.Cleaner
	policy  *retention.Policy

	running  map[string]container // by volume
	lowest   int64                // bytes free, ever
	shares   []float64            // of what is used, what is wanted
	removed  int
	pressed  int // runs because space was short
	rollback int // times that an earlier version was mounted and read
}

type container struct {
	model, day int
	until      int // day
}

func TestThreeMonthsOfCIWithLarder(t *testing.T) {
	testenv.NeedRoot(t)
	fsys := testenv.LoopFS(t, "xfs", capacity)
	n := newDays(t, fsys.Dir)
	for day := range days {
		for m := range ciModels {
			n.pull(m, day)
			n.start(m, day, day+1+n.ci.rng.IntN(5))
			if day%20 == 10 && m == day/20 { // one stays on an old version for long
				n.start(m, day, day+35)
			}
			n.measure()
			n.watch()
		}
		if day == bigDay {
			n.loadBigModel()
		}
		for range 4 {
			n.now = n.now.Add(6 * time.Hour)
			n.cleanUp()
		}
		n.stop(day)
		n.rollBack(day)
		n.stillRead()
	}
	least := slices.Min(n.shares)
	sum := 0.0
	for _, s := range n.shares {
		sum += s
	}
	t.Logf("%d versions came, %d were removed, %d runs because space was short; free space was never under %s of %s (the limit is %s); wanted of what is used: %.1f %% at least, %.1f %% on average; %d rollbacks",
		days*ciModels, n.removed, n.pressed, mib(n.lowest), mib(capacity), mib(minFree), 100*least, 100*sum/float64(len(n.shares)), n.rollback)
	if n.lowest < minFree {
		t.Errorf("free space fell to %s", mib(n.lowest))
	}
	if least < 0.9 {
		t.Errorf("only %.1f %% of what is used is wanted", 100*least)
	}
	if n.pressed == 0 {
		t.Error("space was never short: the load is too small to show anything")
	}
	if n.removed < days*ciModels/3 {
		t.Errorf("only %d versions were removed", n.removed)
	}
	problems, err := n.st.Verify(t.Context(), nil, nil)
	if err != nil || len(problems) > 0 {
		t.Errorf("verify: %v, %v", problems, err)
	}
}

func newDays(t *testing.T, dir string) *node {
	t.Helper()
	n := &node{t: t, ci: newCI(t), dir: dir, now: time.Now().Add(-(days + 1) * 24 * time.Hour), running: map[string]container{}, lowest: capacity}
	clock := func() time.Time { return n.now }
	var err error
	n.st, err = store.Open(filepath.Join(dir, "store"), store.WithClock(clock))
	ok(t, err)
	n.vols, err = volume.Open(t.Context(), volume.Config{Store: n.st, State: filepath.Join(dir, "node"), Node: "days", OwnPIDNamespace: true})
	ok(t, err)
	n.policy, err = retention.Parse("policy.yaml", []byte(daysPolicy))
	ok(t, err)
	n.cleaner = &cleanup.Cleaner{
		Collector: &gc.Collector{Store: n.st, Node: "days", Sources: n.vols.Sources(), Now: clock},
		Wall:      clock,
	}
	t.Cleanup(func() {
		for name := range n.running {
			_ = n.vols.Unmount(context.Background(), name, "run")
		}
	})
	return n
}

func (n *node) pull(m, day int) {
	n.t.Helper()
	n.importAs(n.ci.write(m, day), modelName(m)+":"+tag(day))
}

func (n *node) importAs(dir, name string) {
	n.t.Helper()
	ref, err := reference.Parse(name)
	ok(n.t, err)
	src, err := directory.New(dir, directory.Options{References: []reference.Reference{ref}})
	ok(n.t, err)
	defer src.Close()
	_, err = pull.Run(n.t.Context(), n.st, src, pull.Options{Node: "days"})
	ok(n.t, err)
}

// start runs a container on a version, until the end of a day.
func (n *node) start(m, day, until int) {
	n.t.Helper()
	name := fmt.Sprintf("c-%d-%d-%d", m, day, until)
	ok(n.t, n.vols.Create(n.t.Context(), name, map[string]string{"model": modelName(m) + ":" + tag(day)}))
	_, err := n.vols.Mount(n.t.Context(), name, "run")
	ok(n.t, err)
	n.running[name] = container{m, day, until}
}

func (n *node) stop(day int) {
	n.t.Helper()
	for name, c := range n.running {
		if c.until > day {
			continue
		}
		ok(n.t, n.vols.Unmount(n.t.Context(), name, "run"))
		ok(n.t, n.vols.Remove(n.t.Context(), name))
		delete(n.running, name)
	}
}

func (n *node) measure() {
	n.t.Helper()
	free, _, err := disk.Free(n.dir)
	ok(n.t, err)
	n.lowest = min(n.lowest, free)
}

// watch is what larder-sidecar does within seconds of free space falling.
func (n *node) watch() {
	n.t.Helper()
	free, all, err := disk.Free(n.dir)
	ok(n.t, err)
	if free < n.policy.Pressure.MinFree.Of(all) {
		n.pressed++
		n.cleanUp()
	}
}

func (n *node) cleanUp() {
	n.t.Helper()
	inUse := map[string]bool{}
	for _, c := range n.running {
		inUse[modelName(c.model)+":"+tag(c.day)] = true
	}
	r, err := n.cleaner.Once(n.t.Context(), cleanup.Options{Policy: n.policy})
	ok(n.t, err)
	var wanted int64
	seen := map[int32]bool{}
	for _, d := range r.Plan.Decisions {
		if d.Remove {
			n.removed++
			for _, ref := range d.References {
				if inUse[ref] {
					n.t.Errorf("%s is in use and was removed: %s", ref, d.Why)
				}
			}
			continue
		}
		v, _ := r.Inventory.Version(d.Digest)
		for _, l := range v.Layers {
			if !seen[l] {
				seen[l] = true
				wanted += r.Inventory.Blobs[l].Size
			}
		}
	}
	usage, err := n.st.Usage()
	ok(n.t, err)
	if used := usage.Blobs + usage.Trash + usage.Ingest; used > 0 {
		n.shares = append(n.shares, float64(wanted)/float64(used))
	}
	n.measure()
}

// loadBigModel is the morning on which a new model is to be loaded. Room is
// made first, as CI does it: larder prune --until-free.
func (n *node) loadBigModel() {
	n.t.Helper()
	target, err := retention.ParseAmount(fmt.Sprint(bigSize + capacity*15/100))
	ok(n.t, err)
	r, err := n.cleaner.Once(n.t.Context(), cleanup.Options{Policy: n.policy, UntilFree: target, AnyTime: true})
	ok(n.t, err)
	if r.Short() {
		n.t.Fatalf("there is no room for the big model: %+v", r.Plan.Pressure)
	}
	count, freed := r.Removed()
	n.removed += count
	free, _, err := disk.Free(n.dir)
	ok(n.t, err)
	n.t.Logf("day %d: room for a model of %s is made by removing %d versions, %s; %s are free", bigDay+1, mib(bigSize), count, mib(freed), mib(free))
	dir := n.t.TempDir()
	f, err := os.Create(filepath.Join(dir, "model.safetensors"))
	ok(n.t, err)
	block := make([]byte, 50<<20)
	for i := range bigSize / len(block) {
		fill(block, uint64(1<<32+i))
		_, err := f.Write(block)
		ok(n.t, err)
	}
	ok(n.t, f.Close())
	n.importAs(dir, "big:1.0.0")
	n.measure()
}

// rollBack mounts the two versions before the newest of each model, and reads
// what CI had built.
func (n *node) rollBack(day int) {
	n.t.Helper()
	for m := range ciModels {
		for back := 1; back <= min(2, day); back++ {
			name := fmt.Sprintf("rollback-%d", m)
			ok(n.t, n.vols.Create(n.t.Context(), name, map[string]string{"model": modelName(m) + ":" + tag(day-back), "access": "ro"}))
			dir, err := n.vols.Mount(n.t.Context(), name, "run")
			if err != nil {
				n.t.Fatalf("day %d: rollback of %s to %s: %v", day+1, modelName(m), tag(day-back), err)
			}
			n.sameBytes(dir, m, day-back)
			ok(n.t, n.vols.Unmount(n.t.Context(), name, "run"))
			ok(n.t, n.vols.Remove(n.t.Context(), name))
			n.rollback++
		}
	}
}

// stillRead reads in every container that runs.
func (n *node) stillRead() {
	n.t.Helper()
	for name, c := range n.running {
		n.sameBytes(filepath.Join(n.vols.Path(name), "run"), c.model, c.day)
	}
}

// sameBytes compares a piece of a version's own file with what CI had built.
func (n *node) sameBytes(dir string, m, day int) {
	n.t.Helper()
	f, err := os.Open(filepath.Join(dir, "model-00002-of-00002.safetensors"))
	if err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			n.t.Errorf("%s:%s misses a file", modelName(m), tag(day))
			return
		}
		ok(n.t, err)
	}
	defer f.Close()
	got, want := make([]byte, 4096), make([]byte, 4096)
	_, err = f.ReadAt(got, 0)
	ok(n.t, err)
	fill(want, seed(m, day))
	if !bytes.Equal(got, want) {
		n.t.Errorf("%s:%s has other bytes", modelName(m), tag(day))
	}
	if fi, err := f.Stat(); err != nil || fi.Size() != freshSize {
		n.t.Errorf("%s:%s has another size: %v, %v", modelName(m), tag(day), fi, err)
	}
}
