//go:build faults

package gc

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/larder-project/larder/internal/reference"
	"github.com/larder-project/larder/internal/retention"
	"github.com/larder-project/larder/internal/store"
	"github.com/larder-project/larder/internal/testenv"
)

// Each operation is stopped at every step between two changes of the disk: by
// SIGKILL, by a power cut of the file system, by an error of that one step, by
// a disk that is full from there on. Whenever that is, nothing that was not to
// go is touched, what was to go is whole in the store or whole in the trash,
// and the same operation again succeeds.

// operation is something that changes a store.
type operation struct {
	// prepare comes before, undisturbed.
	prepare func(t *testing.T, s *store.Store)
	do      func(t *testing.T, s *store.Store) error
	// done checks what holds after do has succeeded.
	done func(t *testing.T, s *store.Store)
	// lost: what was removed before may be gone for good.
	lost bool
}

// Every store has m:1 and m:2 with a blob in common, m:3, and a blob that no
// version needs.
func prepareStore(t *testing.T, s *store.Store) {
	t.Helper()
	mustPublish(t, s, "m:1", "shared", "only in 1")
	mustPublish(t, s, "m:2", "shared", "only in 2")
	mustPublish(t, s, "m:3", "only in 3")
	l, err := s.NewLease(t.Context(), "node", "test")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.PutBlob(t.Context(), l, []byte("in no version")); err != nil {
		t.Fatal(err)
	}
	if err := l.Release(); err != nil {
		t.Fatal(err)
	}
}

func gone(t *testing.T, s *store.Store, name, content string) {
	t.Helper()
	if resolves(t, s, name) {
		t.Errorf("%s is still there", name)
	}
	if has(t, s, content) {
		t.Errorf("%q is still in the store", content)
	}
}

func removeOne(t *testing.T, s *store.Store) error {
	_, err := collect(s).Remove(t.Context(), []reference.Reference{ref(t, "m:1")}, Options{})
	return err
}

// prune is a plan that removes m:1 and m:3.
func prune(t *testing.T, s *store.Store) error {
	c := collect(s)
	inv, err := c.Look(t.Context())
	if err != nil {
		return err
	}
	plan := retention.Plan{Time: inv.Time}
	for _, v := range inv.Versions {
		if name := v.References[0]; name == "m:1" || name == "m:3" {
			plan.Decisions = append(plan.Decisions, retention.Decision{Digest: v.Digest, References: v.References, Remove: true, Reason: retention.Unused})
		}
	}
	_, err = c.Execute(t.Context(), plan, nil)
	return err
}

func undoAll(t *testing.T, s *store.Store) error {
	c := collect(s)
	if _, err := c.Recover(t.Context()); err != nil {
		return err
	}
	trash, err := s.Trash()
	if err != nil {
		return err
	}
	for _, r := range trash {
		_, err := c.Undo(t.Context(), r.ID)
		if len(r.References) == 0 && errors.Is(err, store.ErrNotFound) {
			continue // leftovers: refused, and they stay
		}
		if err != nil {
			return err
		}
	}
	return nil
}

func leftovers(t *testing.T, s *store.Store) error {
	c := collect(s)
	inv, err := c.Look(t.Context())
	if err != nil {
		return err
	}
	_, err = c.DropLeftovers(t.Context(), inv.Leftovers(0), store.Limit{})
	return err
}

func must(f func(*testing.T, *store.Store) error) func(*testing.T, *store.Store) {
	return func(t *testing.T, s *store.Store) {
		t.Helper()
		if err := f(t, s); err != nil {
			t.Fatal(err)
		}
	}
}

var operations = map[string]operation{
	"remove": {
		do:   removeOne,
		done: func(t *testing.T, s *store.Store) { gone(t, s, "m:1", "only in 1") },
	},
	"prune": {
		do: prune,
		done: func(t *testing.T, s *store.Store) {
			gone(t, s, "m:1", "only in 1")
			gone(t, s, "m:3", "only in 3")
		},
	},
	"undo": {
		prepare: func(t *testing.T, s *store.Store) {
			must(removeOne)(t, s)
			// The blob that both share lies with m:2 then.
			undo(t, s, remove(t, s, "m:2").ID)
		},
		do: undoAll,
		done: func(t *testing.T, s *store.Store) {
			if !resolves(t, s, "m:1") || !has(t, s, "only in 1") {
				t.Error("m:1 is not back")
			}
			if trash, err := s.Trash(); err != nil || len(trash) != 0 {
				t.Errorf("left in the trash: %v, %v", trash, err)
			}
		},
	},
	"undo of a policy's removal": {
		prepare: must(prune),
		do:      undoAll,
		done: func(t *testing.T, s *store.Store) {
			if !resolves(t, s, "m:1") || !resolves(t, s, "m:3") || !has(t, s, "only in 3") {
				t.Error("not everything is back")
			}
		},
	},
	"empty": {
		prepare: must(prune),
		do: func(t *testing.T, s *store.Store) error {
			_, _, err := collect(s).EmptyTrash(t.Context(), time.Now().Add(time.Hour), store.Limit{})
			return err
		},
		done: func(t *testing.T, s *store.Store) {
			folders, err := filepath.Glob(filepath.Join(s.Dir(), "trash", "2*"))
			if err != nil || len(folders) != 0 {
				t.Errorf("left in the trash: %v, %v", folders, err)
			}
		},
		lost: true,
	},
	"leftovers": {
		do: leftovers,
		done: func(t *testing.T, s *store.Store) {
			if has(t, s, "in no version") {
				t.Error("what no version needs is still there")
			}
		},
	},
}

// nothingLost checks what holds at every moment.
func nothingLost(t *testing.T, s *store.Store, op operation) {
	t.Helper()
	checkClean(t, s)
	if !resolves(t, s, "m:2") || !has(t, s, "shared") || !has(t, s, "only in 2") {
		t.Error("a version that was not to go is not whole")
	}
	if op.lost {
		return
	}
	// What has gone can be brought back whole. It is tried on a copy.
	dir := filepath.Join(t.TempDir(), "copy")
	if out, err := exec.Command("cp", "-a", s.Dir(), dir).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	copied := open(t, dir)
	if err := undoAll(t, copied); err != nil {
		t.Errorf("undo of what has gone so far: %v", err)
	}
	for name, content := range map[string]string{"m:1": "only in 1", "m:2": "only in 2", "m:3": "only in 3"} {
		if !resolves(t, copied, name) || !has(t, copied, content) {
			t.Errorf("%s is neither in the store nor in the trash", name)
		}
	}
	checkClean(t, copied)
}

// child is what the process does that is disturbed.
func child(t *testing.T, name string) bool {
	dir := testenv.Child()
	if dir == "" {
		return false
	}
	if err := operations[name].do(t, open(t, dir)); err != nil {
		fmt.Fprintln(os.Stderr, "larder-failed:", err)
		os.Exit(7)
	}
	return true
}

func eachOperation(t *testing.T, test func(t *testing.T, op operation)) {
	for name, op := range operations {
		t.Run(strings.ReplaceAll(name, " ", "-"), func(t *testing.T) {
			if child(t, name) {
				return
			}
			t.Parallel()
			test(t, op)
		})
	}
}

// disturb tries an operation once for each step. how makes the fault of a
// step, fresh the folder of a store; after comes when the process has ended.
func disturb(t *testing.T, op operation, how func(n int) string, fresh func(n int) string, after func()) {
	prepared := func(n int) string {
		dir := fresh(n)
		s := open(t, dir)
		prepareStore(t, s)
		if op.prepare != nil {
			op.prepare(t, s)
		}
		syncAll(t, dir)
		return dir
	}
	steps, stopped := testenv.Steps(t, prepared(0)), 0
	for n := 1; n <= steps; n++ {
		dir := prepared(n)
		if testenv.Disturb(t, dir, how(n), 7) {
			stopped++
		}
		after()
		s := open(t, dir)
		nothingLost(t, s, op)
		if err := op.do(t, s); err != nil {
			t.Errorf("step %d: the same again: %v", n, err)
		} else {
			op.done(t, s)
			nothingLost(t, s, op)
		}
		if t.Failed() {
			t.Fatalf("stopped at step %d", n)
		}
		if err := os.RemoveAll(dir); err != nil {
			t.Fatal(err)
		}
	}
	t.Logf("stopped at %d of %d steps; at the others it went on", stopped, steps)
	if steps < 8 || stopped < steps/2 {
		t.Errorf("stopped at %d of %d steps only", stopped, steps)
	}
}

func syncAll(t *testing.T, dir string) {
	t.Helper()
	d, err := os.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	if err := unix.Syncfs(int(d.Fd())); err != nil {
		t.Fatal(err)
	}
}

func inTemp(t *testing.T) func(int) string {
	root := t.TempDir()
	return func(n int) string { return filepath.Join(root, fmt.Sprint(n)) }
}

func TestKilledAtEveryStep(t *testing.T) {
	eachOperation(t, func(t *testing.T, op operation) {
		disturb(t, op, func(n int) string { return fmt.Sprintf("kill:%d", n) }, inTemp(t), func() {})
	})
}

func TestErrorAtEveryStep(t *testing.T) {
	eachOperation(t, func(t *testing.T, op operation) {
		disturb(t, op, func(n int) string { return fmt.Sprintf("fail:%d:%d", n, syscall.EIO) }, inTemp(t), func() {})
	})
}

func TestReadOnlyFromEveryStepOn(t *testing.T) {
	eachOperation(t, func(t *testing.T, op operation) {
		disturb(t, op, func(n int) string { return fmt.Sprintf("full:%d:%d", n, syscall.EROFS) }, inTemp(t), func() {})
	})
}

func TestPowerCutAtEveryStep(t *testing.T) {
	for _, fstype := range []string{"ext4", "xfs"} {
		t.Run(fstype, func(t *testing.T) {
			eachOperation(t, func(t *testing.T, op operation) {
				disk := testenv.LoopFS(t, fstype, 320<<20)
				disturb(t, op,
					func(n int) string { return fmt.Sprintf("cut:%d:%s", n, disk.Dir) },
					func(n int) string { return filepath.Join(disk.Dir, fmt.Sprint(n)) },
					func() {
						disk.Unmount()
						disk.Mount()
					})
			})
		})
	}
}

// A file system that is full to the last byte, so that not even a folder can be
// made, still lets something be removed.
func TestRemovalFromAFullFileSystem(t *testing.T) {
	for _, fstype := range []string{"ext4", "xfs", "btrfs"} {
		t.Run(fstype, func(t *testing.T) {
			t.Parallel()
			disk := testenv.LoopFS(t, fstype, 320<<20)
			dir := filepath.Join(disk.Dir, "s")
			s := open(t, dir)
			prepareStore(t, s)
			fill(t, disk.Dir)
			if err := prune(t, s); err != nil {
				t.Fatal(err)
			}
			if _, _, err := collect(s).EmptyTrash(t.Context(), time.Now().Add(time.Hour), store.Limit{}); err != nil {
				t.Fatal(err)
			}
			gone(t, s, "m:1", "only in 1")
			nothingLost(t, s, operation{lost: true})
		})
	}
}

func fill(t *testing.T, dir string) {
	t.Helper()
	for n, size := 0, 64<<20; size > 0; n++ {
		f, err := os.Create(filepath.Join(dir, fmt.Sprintf("filler-%d", n)))
		if errors.Is(err, unix.ENOSPC) {
			return
		}
		if err != nil {
			t.Fatal(err)
		}
		_, err = f.Write(make([]byte, size))
		if err == nil {
			err = f.Sync()
		}
		_ = f.Close()
		if errors.Is(err, unix.ENOSPC) {
			size /= 2
		} else if err != nil {
			t.Fatal(err)
		}
	}
}
