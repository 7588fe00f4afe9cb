package volume

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/larder-project/larder/internal/store"
)

// One record of a mount that cannot be read stops nothing but what is about
// that mount: the others of its volume are reaped and listed, it is told of,
// and what it covers stays.
func TestDamagedRecordOfAMount(t *testing.T) {
	for what, damage := range map[string]func(good string) string{
		"empty": func(string) string { return "" }, "cut short": func(good string) string { return good[:len(good)/2] },
		"garbage": func(string) string { return "\x00\x01\xff" }, "another's": func(good string) string { return strings.ReplaceAll(good, `"bad"`, `"other"`) },
	} {
		t.Run(what, func(t *testing.T) {
			n := newNode(t)
			n.create("m")
			write(t, n.mount("m", "bad")+"/precious", "x")
			n.mount("m", "good")
			path := n.mountRecordPath("m", "bad")
			good := read(t, path)
			write(t, path, damage(good))
			mr, _, err := n.readMount("m", "good")
			if err != nil {
				t.Fatal(err)
			}
			mr.Called -= startGrace + 1
			if err := n.writeMount(mr); err != nil {
				t.Fatal(err)
			}
			if mounts, err := n.Mounts(t.Context()); !errors.Is(err, ErrDamaged) || len(mounts) != 1 || mounts[0].ID != "good" {
				t.Errorf("mounts: %+v, %v; want the good one, and that the other is damaged", mounts, err)
			}
			err = n.Reap(t.Context())
			var hinted interface{ Hint() string }
			if !errors.Is(err, ErrDamaged) || !errors.As(err, &hinted) || !strings.Contains(err.Error(), path) {
				t.Errorf("reap: %v, want that %s is damaged, and what to do", err, path)
			}
			if got := n.mounts(); len(got) != 1 || filepath.Base(got[0]) != "bad" {
				t.Errorf("after it %v are mounted, want the damaged one alone", got)
			}
			if v, err := n.Get(t.Context(), "m"); err != nil || v.Damaged == "" {
				t.Errorf("get: %+v, %v; want that it is damaged", v, err)
			}
			if err := n.Unmount(t.Context(), "m", "bad"); !errors.Is(err, ErrDamaged) {
				t.Errorf("unmount: %v, want ErrDamaged", err)
			}
			if err := n.Remove(t.Context(), "m"); !errors.Is(err, ErrDamaged) {
				t.Errorf("remove: %v, want ErrDamaged", err)
			}
			if _, err := n.Sources()[0].Uses(t.Context()); !errors.Is(err, ErrDamaged) {
				t.Errorf("uses: %v, want ErrDamaged", err)
			}
			if err := n.Sweep(t.Context()); err != nil {
				t.Error(err)
			}
			if got := read(t, n.Path("m")+"/bad/precious"); got != "x" {
				t.Errorf("the container's file is %q", got)
			}
			if got := read(t, path); got != damage(good) {
				t.Errorf("the record was changed to %q", got)
			}
			// What the advice says.
			if err := os.Remove(path); err != nil {
				t.Fatal(err)
			}
			n.reopen("")
			if err := errors.Join(n.Sweep(t.Context()), n.Remove(t.Context(), "m")); err != nil {
				t.Fatal(err)
			}
			n.empty()
		})
	}
}

// A damaged record says no more whether the volume keeps its writes, so a
// removal does not delete them. The advice begins anew, and the writes stay.
func TestVolumeWithADamagedRecordKeepsItsWrites(t *testing.T) {
	n := newNode(t)
	n.create("v", "model=m", "scope=volume")
	write(t, n.mount("v", "a")+"/mine", "mine")
	n.unmount("v", "a")
	write(t, n.recordPath("v"), "")
	err := n.Remove(t.Context(), "v")
	var hinted interface{ Hint() string }
	if !errors.Is(err, ErrDamaged) || !errors.As(err, &hinted) || !strings.Contains(hinted.Hint(), n.volumeUpper("v")) {
		t.Fatalf("remove: %v, want that it is damaged, and what to do with %s", err, n.volumeUpper("v"))
	}
	// What the advice says.
	away := filepath.Join(t.TempDir(), "away")
	if err := os.Rename(n.volumeUpper("v"), away); err != nil {
		t.Fatal(err)
	}
	if err := n.Remove(t.Context(), "v"); err != nil {
		t.Fatal(err)
	}
	n.create("v", "model=m", "scope=volume")
	n.mount("v", "a")
	n.unmount("v", "a")
	if got := read(t, away+"/upper/mine"); got != "mine" {
		t.Errorf("what was written is %q", got)
	}
}

// Runs that share a mount: a record that cannot be read may be of one of them.
func TestMountIsNotEndedUnderADamagedRecord(t *testing.T) {
	n := newNode(t)
	n.create("v", "model=m", "scope=volume")
	n.mount("v", "a")
	n.mount("v", "b")
	good := read(t, n.mountRecordPath("v", "a"))
	write(t, n.mountRecordPath("v", "a"), "{")
	if err := n.Unmount(t.Context(), "v", "b"); !errors.Is(err, ErrDamaged) {
		t.Errorf("unmount: %v, want ErrDamaged", err)
	}
	n.mustMounts(1)
	write(t, n.mountRecordPath("v", "a"), good)
	n.unmount("v", "a")
	if err := n.Reap(t.Context()); err != nil {
		t.Fatal(err)
	}
	n.mustMounts(0)
}

// An empty id would match that of another state that was emptied too.
func TestDamagedIDOfAStateIsNoOtherState(t *testing.T) {
	n := newNode(t)
	n.create("m")
	path := filepath.Join(n.state, "id")
	good := read(t, path)
	for what, content := range map[string]string{"empty": "", "cut short": good[:7], "garbage": strings.Repeat("\x00", len(good))} {
		write(t, path, content)
		_, err := Open(t.Context(), Config{Store: n.store, State: n.state, Node: "test"})
		var hinted interface{ Hint() string }
		if !errors.Is(err, ErrDamaged) || errors.Is(err, store.ErrInUse) || !errors.As(err, &hinted) {
			t.Fatalf("%s: %v, want that the id is damaged, and what to do", what, err)
		}
		_, cp, _ := strings.Cut(hinted.Hint(), ": cp ")
		from, _, _ := strings.Cut(cp, " ")
		if from == "" {
			t.Fatalf("%s: the hint %q names no copy of the id", what, hinted.Hint())
		}
		if got := read(t, path); got != content {
			t.Errorf("%s: the id was changed to %q", what, got)
		}
		write(t, path, read(t, filepath.Join(n.store.Dir(), "leases", "test", "owner")))
		n.reopen("")
		n.mustVolumes("m")
	}
}

// The folder for mounts may be one of the host's that has other things in it.
func TestFoldersOfOthersAmongTheMountsStay(t *testing.T) {
	n := newNode(t)
	mnt := filepath.Join(t.TempDir(), "mnt")
	open := func(boot string) {
		t.Helper()
		var err error
		if n.Manager, err = Open(t.Context(), Config{Store: n.store, State: filepath.Join(n.root, "node"), Mounts: mnt, Node: "test", BootID: boot, OwnPIDNamespace: true}); err != nil {
			t.Fatal(err)
		}
	}
	open("")
	n.create("m")
	n.create("gone", "model=m")
	id := strings.Repeat("0a", 32)
	theirs := []string{"backup/2026", "m/thing", "usb", id + "/" + id}
	for _, dir := range append([]string{"m/" + id, "gone/run"}, theirs...) {
		if err := os.MkdirAll(filepath.Join(mnt, dir), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	n.mount("gone", "run")
	run(t, "umount", mnt+"/gone/run")
	open("next-boot")
	if err := n.Sweep(t.Context()); err != nil {
		t.Fatal(err)
	}
	for _, dir := range theirs {
		if !exists(filepath.Join(mnt, dir)) {
			t.Errorf("%s was removed", dir)
		}
	}
	for _, dir := range []string{"m/" + id, "gone/run"} {
		if exists(filepath.Join(mnt, dir)) {
			t.Errorf("%s is left", dir)
		}
	}
}
