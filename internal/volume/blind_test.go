package volume

import (
	"errors"
	"os"
	"path/filepath"
	"testing"
)

// Where this process cannot see who uses a mount, it takes none away that no
// engine has unmounted, until the engine proves to be one that it can see.
func TestWhatCannotBeSeenIsInUse(t *testing.T) {
	n := newNode(t)
	n.create("m")
	n.mount("m", "a")
	mr, _, err := n.readMount("m", "a")
	if err != nil {
		t.Fatal(err)
	}
	mr.Called -= startGrace + 1
	if err := n.writeMount(mr); err != nil {
		t.Fatal(err)
	}
	n.blind = true
	if n.Blind() == "" {
		t.Error("it does not say so")
	}
	if err := n.Reap(t.Context()); err != nil {
		t.Fatal(err)
	}
	n.mustMounts(1)
	if err := n.Remove(t.Context(), "m"); !errors.Is(err, ErrInUse) {
		t.Errorf("remove: %v, want ErrInUse", err)
	}
	n.mount("m", "a")
	n.unmount("m", "a")
	n.mustMounts(1) // docker cp, perhaps
	n.EngineSeen()
	if n.Blind() != "" {
		t.Errorf("when the engine was seen: %s", n.Blind())
	}
	if mr, _, err = n.readMount("m", "a"); err != nil {
		t.Fatal(err)
	}
	mr.Called -= startGrace + 1
	if err := n.writeMount(mr); err != nil {
		t.Fatal(err)
	}
	if err := n.Reap(t.Context()); err != nil {
		t.Fatal(err)
	}
	n.mustMounts(0)
}

// An upper that lives on where no mount table shows it is neither deleted nor
// mounted a second time. A file that is open in a mount which was unmounted
// lazily stands for a container in a PID namespace above.
func TestAnUpperInUseOutOfSightIsLeftAlone(t *testing.T) {
	n := newNode(t)
	n.create("run", "model=m")
	n.create("kept", "model=m", "scope=volume")
	for _, name := range []string{"run", "kept"} {
		dir := n.mount(name, "a")
		write(t, dir+"/precious", "x")
		mr, _, err := n.readMount(name, "a")
		if err != nil {
			t.Fatal(err)
		}
		f, err := os.Open(dir + "/precious")
		if err != nil {
			t.Fatal(err)
		}
		run(t, "umount", "-l", dir)
		if _, err := n.Mount(t.Context(), name, "a"); !errors.Is(err, ErrInUse) {
			t.Errorf("%s: mount: %v, want ErrInUse", name, err)
		}
		n.unmount(name, "a")
		if err := errors.Join(n.Reap(t.Context()), n.Sweep(t.Context())); err != nil {
			t.Error(err)
		}
		if err := n.Remove(t.Context(), name); err != nil {
			t.Error(err)
		}
		if got := read(t, filepath.Join(mr.Upper, "upper", "precious")); got != "x" {
			t.Errorf("%s: what was written is %q", name, got)
		}
		f.Close()
		if err := n.Reap(t.Context()); err != nil {
			t.Error(err)
		}
	}
	n.empty()
}
