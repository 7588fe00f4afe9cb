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

// mountByHand mounts a model by hand, and returns where.
func (n *node) mountByHand(name, raw string) string {
	n.t.Helper()
	at := filepath.Join(n.t.TempDir(), "here")
	if err := n.MountAt(n.t.Context(), name, options(raw), at); err != nil {
		n.t.Fatal(err)
	}
	n.t.Cleanup(func() { _ = exec.Command("umount", "-l", at).Run() })
	return at
}

func (n *node) mustVolumes(want ...string) {
	n.t.Helper()
	if got, err := n.List(n.t.Context()); err != nil || fmt.Sprint(got) != fmt.Sprint(want) {
		n.t.Errorf("the volumes are %v, %v; want %v", got, err, want)
	}
}

func TestManualMountFetchesNothing(t *testing.T) {
	n := newNode(t)
	err := n.MountAt(t.Context(), "", options("model=hf://org/name;pull=missing"), filepath.Join(t.TempDir(), "here"))
	if !errors.Is(err, ErrInvalid) || !strings.Contains(err.Error(), "larder pull hf://org/name@main") {
		t.Errorf("got %v, want what to do instead", err)
	}
	n.mustVolumes()
}

// Somebody's mount namespace holds a copy of a manual mount: it ends all the
// same, and its volume goes when the copy has gone.
func TestManualMountThatACopyHoldsEnds(t *testing.T) {
	n := newNode(t)
	at := n.mountByHand("", "model=m")
	write(t, at+"/x", "x")
	stop := namespace(t, "true")
	if err := n.UnmountAt(t.Context(), at); err != nil {
		t.Errorf("unmount: %v", err)
	}
	n.mustMounts(0)
	if err := n.Reap(t.Context()); err != nil {
		t.Error(err)
	}
	stop()
	if err := n.Reap(t.Context()); err != nil {
		t.Error(err)
	}
	n.mustVolumes()
	n.empty()
}

// Somebody ends a manual mount with umount(8) instead of larder umount.
func TestVolumeOfAManualMountGoesWithIt(t *testing.T) {
	n := newNode(t)
	at := n.mountByHand("", "model=m")
	kept := n.mountByHand("mine", "model=m;scope=volume")
	write(t, kept+"/work", "months of it")
	for _, dir := range []string{at, kept} {
		run(t, "umount", dir)
	}
	records, err := n.allMounts()
	if err != nil || len(records) != 2 {
		t.Fatalf("%v %v", records, err)
	}
	for _, mr := range records {
		mr.Called -= endGrace + 1
		if err := n.writeMount(mr); err != nil {
			t.Fatal(err)
		}
	}
	if err := n.Reap(t.Context()); err != nil {
		t.Fatal(err)
	}
	n.mustVolumes("mine")
	if got := read(t, n.mountByHand("mine", "model=m;scope=volume")+"/work"); got != "months of it" {
		t.Errorf("the volume with a name has %q", got)
	}
}

// After a reboot, or the death of the command that was making the mount, its
// volume goes; one that a person has given a name stays, even one that looks
// like ours.
func TestVolumesOfManualMountsAreSweptAfterAReboot(t *testing.T) {
	n := newNode(t)
	n.mountByHand("", "model=m")
	write(t, n.mountByHand("mine", "model=m;scope=volume")+"/work", "x")
	n.create("manual-0123456789ab", "model=m")
	records, err := n.allMounts()
	if err != nil {
		t.Fatal(err)
	}
	for _, mr := range records {
		run(t, "umount", mr.Target)
	}
	n.reopen("next-boot")
	if err := n.Sweep(t.Context()); err != nil {
		t.Fatal(err)
	}
	n.mustVolumes("manual-0123456789ab", "mine")
	if got := read(t, filepath.Join(n.volumeUpper("mine"), "upper", "work")); got != "x" {
		t.Errorf("what was written is %q", got)
	}
	entries, err := os.ReadDir(filepath.Join(n.state, "uppers", "run"))
	if err != nil || len(entries) > 0 {
		t.Errorf("uppers of runs: %v %v", entries, err)
	}
}

func TestSecondMountOfAVolumeByHandIsRefused(t *testing.T) {
	n := newNode(t)
	n.mountByHand("mine", "model=m;scope=volume")
	err := n.MountAt(t.Context(), "mine", options("model=m;scope=volume"), filepath.Join(t.TempDir(), "there"))
	if !errors.Is(err, ErrInUse) {
		t.Errorf("got %v, want ErrInUse", err)
	}
	n.mustVolumes("mine")
}
