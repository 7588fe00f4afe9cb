package volume

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// alias opens the node's store and state by another path: through a bind mount
// of its root, as a managed plugin and the host's command line have one state
// under two names.
func (n *node) alias() *node {
	n.t.Helper()
	at := n.t.TempDir()
	run(n.t, "mount", "--bind", n.root, at)
	n.t.Cleanup(func() { run(n.t, "umount", "-l", at) })
	other := &node{t: n.t, root: at}
	other.reopen("")
	return other
}

func run(t *testing.T, name string, args ...string) {
	t.Helper()
	if out, err := exec.Command(name, args...).CombinedOutput(); err != nil {
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
}

func TestAMountIsKnownByEveryPathToItsState(t *testing.T) {
	n := newNode(t)
	for _, options := range [][]string{{"model=m"}, {"model=m", "scope=volume"}, {"model=m", "access=ro"}} {
		t.Run(strings.Join(options, ","), func(t *testing.T) {
			n.t = t
			n.create("v", options...)
			dir := n.mount("v", "a")
			ro := options[len(options)-1] == "access=ro"
			if !ro {
				write(t, dir+"/precious", "x")
			}
			stop := container(t, dir)
			other := n.alias()
			if err := other.Remove(t.Context(), "v"); !errors.Is(err, ErrInUse) {
				t.Errorf("remove by another path: %v, want ErrInUse", err)
			}
			mounts, err := other.Mounts(t.Context())
			if err != nil || len(mounts) != 1 || len(mounts[0].Holders) != 1 {
				t.Errorf("the mounts, asked by another path: %+v, %v; want one, with its container", mounts, err)
			}
			// All records are lost: the kernel alone knows.
			away := filepath.Join(n.root, "away")
			if err := os.Rename(n.mountsDir("v"), away); err != nil {
				t.Fatal(err)
			}
			uses, err := other.Sources()[1].Uses(t.Context())
			if err != nil || len(uses) == 0 {
				t.Errorf("the versions in use, asked by another path: %v, %v", uses, err)
			}
			if err := other.Sweep(t.Context()); err != nil {
				t.Error(err)
			}
			if err := os.Rename(away, n.mountsDir("v")); err != nil {
				t.Fatal(err)
			}
			if !ro {
				if got := read(t, dir+"/precious"); got != "x" {
					t.Errorf("the container's file is %q", got)
				}
			}
			stop()
			n.unmount("v", "a")
			if err := other.Remove(t.Context(), "v"); err != nil {
				t.Error(err)
			}
			n.empty()
		})
	}
}

// Another state of this host, with the same model, is another matter.
func TestMountsOfAnotherStateAreNotOurs(t *testing.T) {
	n := newNode(t)
	n.create("v", "scope=volume", "model=m")
	container(t, n.mount("v", "a"))
	other := newNode(t)
	other.create("v", "scope=volume", "model=m")
	if err := other.Remove(t.Context(), "v"); err != nil {
		t.Errorf("remove: %v", err)
	}
	if uses, err := other.Sources()[1].Uses(t.Context()); err != nil || len(uses) > 0 {
		t.Errorf("uses: %v %v", uses, err)
	}
}

// A container's mountpoint may look like the host's own: it is a use all the
// same, by whatever path, and only a copy of the host's own tree is not.
func TestAMountpointThatLooksLikeOursIsAUse(t *testing.T) {
	n := newNode(t)
	n.create("v", "model=m", "scope=volume")
	dir := n.mount("v", "a")
	for _, at := range []string{"/srv/v/volume", dir} {
		root := t.TempDir()
		inside := filepath.Join(root, at)
		if err := os.MkdirAll(inside, 0o755); err != nil {
			t.Fatal(err)
		}
		stop := namespace(t, fmt.Sprintf("mount --bind %q %q && umount -l %q", dir, inside, dir))
		mounts, err := n.Mounts(t.Context())
		if err != nil || len(mounts) != 1 || len(mounts[0].Holders) != 1 {
			t.Errorf("%s: mounts %+v, %v; want one with one user", inside, mounts, err)
		}
		mr, _, err := n.readMount("v", "a")
		if err != nil {
			t.Fatal(err)
		}
		mr.Called -= startGrace + 1
		if err := n.writeMount(mr); err != nil {
			t.Fatal(err)
		}
		if err := n.Reap(t.Context()); err != nil {
			t.Fatal(err)
		}
		n.mustMounts(1)
		stop()
	}
	// The host's tree as a container sees it that has the host's root folder.
	host := t.TempDir()
	defer namespace(t, fmt.Sprintf("mount --rbind %q %q", filepath.Dir(n.root), host))()
	mounts, err := n.Mounts(t.Context())
	if err != nil || len(mounts) != 1 || len(mounts[0].Holders) != 0 {
		t.Errorf("with copies of the host's tree: mounts %+v, %v; want no user", mounts, err)
	}
}

// Whoever has a user namespace of his own mounts in it what he likes, with any
// names. That is no use of the volume and the view that it names.
func TestAMadeUpMountIsNoUse(t *testing.T) {
	n := newNode(t)
	n.create("victim", "model=m", "scope=volume")
	n.mount("victim", "a")
	n.unmount("victim", "a")
	state := t.TempDir()
	view, upper, work := state+"/views/"+n.viewsName()+"/key", state+"/uppers/volume/victim/upper", state+"/uppers/volume/victim/work"
	defer namespace(t, fmt.Sprintf("mount -t tmpfs t %[1]q && mkdir -p %[2]q %[3]q %[4]q %[1]q/at && "+
		"mount -t overlay -o lowerdir=%[2]q,upperdir=%[3]q,workdir=%[4]q,userxattr o %[1]q/at", state, view, upper, work), "-Ur")()
	n.mount("victim", "b")
	mounts, err := n.Mounts(t.Context())
	if err != nil || len(mounts) != 1 || len(mounts[0].Holders) != 0 {
		t.Errorf("mounts: %+v, %v; want one without users", mounts, err)
	}
	for _, s := range n.Sources() {
		if _, err := s.Uses(t.Context()); err != nil {
			t.Errorf("source %s: %v", s.Name(), err)
		}
	}
	n.unmount("victim", "b")
	if err := n.Remove(t.Context(), "victim"); err != nil {
		t.Errorf("remove: %v", err)
	}
	n.empty()
}

// A container with a user namespace of its own shows a copy of our mount, which
// counts also when the host's own mount has gone, and with it the record.
func TestABindCopyInAUserNamespaceIsAUse(t *testing.T) {
	n := newNode(t)
	for _, options := range [][]string{{"model=m", "scope=volume"}, {"model=m", "access=ro"}} {
		t.Run(strings.Join(options, ","), func(t *testing.T) {
			n.t = t
			n.create("v", options...)
			dir := n.mount("v", "a")
			stop := namespace(t, fmt.Sprintf("mount --bind %q %q", dir, t.TempDir()), "-Ur")
			if err := n.Reap(t.Context()); err != nil { // notes that a container has it
				t.Fatal(err)
			}
			used := func(when string) {
				t.Helper()
				mounts, err := n.Mounts(t.Context())
				if err != nil || len(mounts) != 1 || len(mounts[0].Holders) != 1 {
					t.Errorf("%s: mounts %+v, %v; want one with one user", when, mounts, err)
				}
				if err := n.Remove(t.Context(), "v"); !errors.Is(err, ErrInUse) {
					t.Errorf("%s: remove: %v, want ErrInUse", when, err)
				}
			}
			used("mounted here too")
			run(t, "umount", "-l", dir)
			used("unmounted here")
			away := filepath.Join(n.root, "away")
			if err := os.Rename(n.mountsDir("v"), away); err != nil {
				t.Fatal(err)
			}
			if uses, err := n.Sources()[1].Uses(t.Context()); err != nil || len(uses) == 0 {
				t.Errorf("without the record, versions in use: %v, %v", uses, err)
			}
			if err := os.Rename(away, n.mountsDir("v")); err != nil {
				t.Fatal(err)
			}
			stop()
			n.unmount("v", "a")
			if err := n.Remove(t.Context(), "v"); err != nil {
				t.Error(err)
			}
			n.empty()
		})
	}
}

func TestTwoWaysToOneUpperAreRefused(t *testing.T) {
	n := newNode(t)
	at := filepath.Join(t.TempDir(), "here")
	if err := n.MountAt(t.Context(), "v", options("model=m;scope=volume"), at); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = exec.Command("umount", "-l", at).Run() })
	if _, err := n.Mount(t.Context(), "v", "a"); !errors.Is(err, ErrInUse) {
		t.Errorf("mount of what is mounted by hand: %v, want ErrInUse", err)
	}
	if err := n.UnmountAt(t.Context(), at); err != nil {
		t.Fatal(err)
	}
	n.mount("v", "a")
	n.unmount("v", "a")
	if err := n.Remove(t.Context(), "v"); err != nil {
		t.Fatal(err)
	}
	n.empty()
}

func TestABindCopyOnThisHostIsAUse(t *testing.T) {
	n := newNode(t)
	n.create("m")
	dir := n.mount("m", "a")
	write(t, dir+"/precious", "x")
	at := t.TempDir()
	run(t, "mount", "--bind", dir, at)
	bound := true
	t.Cleanup(func() {
		if bound {
			run(t, "umount", "-l", at)
		}
	})
	n.unmount("m", "a")
	if got := read(t, at+"/precious"); got != "x" {
		t.Errorf("what was written is gone: %q", got)
	}
	if err := n.Remove(t.Context(), "m"); !errors.Is(err, ErrInUse) {
		t.Errorf("remove: %v, want ErrInUse", err)
	}
	run(t, "umount", at)
	bound = false
	if err := n.Remove(t.Context(), "m"); err != nil {
		t.Fatal(err)
	}
	n.empty()
}

// An upgraded plugin meets mounts of the one before it, whose views lie in a
// folder named by the boot alone.
func TestMountsOfAnEarlierLarderAreKnown(t *testing.T) {
	n := newNode(t)
	n.create("v", "model=m", "scope=volume")
	dir := n.mount("v", "a")
	write(t, dir+"/precious", "x")
	// As the earlier one would have made it.
	now := filepath.Join(n.state, "views", n.viewsName())
	before := filepath.Join(n.state, "views", n.boot)
	mr, _, err := n.readMount("v", "a")
	if err != nil {
		t.Fatal(err)
	}
	n.unmountAll()
	if err := os.Rename(now, before); err != nil {
		t.Fatal(err)
	}
	lower := strings.NewReplacer(`\`, `\\`, `:`, `\:`, `,`, `\,`)
	upper := strings.NewReplacer(`\`, `\\`, `,`, `\,`)
	opts := fmt.Sprintf("lowerdir=%s::%s,upperdir=%s,workdir=%s,redirect_dir=on,metacopy=on,index=off", lower.Replace(filepath.Join(before, mr.View)),
		lower.Replace(n.store.BlobsDir()), upper.Replace(mr.Upper+"/upper"), upper.Replace(mr.Upper+"/work"))
	run(t, "mount", "-t", "overlay", "larder", "-o", opts, dir)
	stop := container(t, dir)
	n.reopen("")
	if err := n.Sweep(t.Context()); err != nil {
		t.Fatal(err)
	}
	for name, look := range map[string]*node{"the same path": n, "another path": n.alias()} {
		if err := look.Remove(t.Context(), "v"); !errors.Is(err, ErrInUse) {
			t.Errorf("remove by %s: %v, want ErrInUse", name, err)
		}
		if uses, err := look.Sources()[1].Uses(t.Context()); err != nil || len(uses) == 0 {
			t.Errorf("uses by %s: %v %v", name, uses, err)
		}
		if got := read(t, dir+"/precious") + read(t, dir+"/weights"); got != "xone" {
			t.Errorf("by %s: the container's files are %q", name, got)
		}
	}
	stop()
	n.unmount("v", "a")
	if err := n.Sweep(t.Context()); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(before); err == nil {
		t.Error("the earlier views are not swept though nothing shows them")
	}
	if got := read(t, n.mount("v", "b")+"/precious"); got != "x" {
		t.Errorf("the volume has kept %q", got)
	}
	n.unmount("v", "b")
}
