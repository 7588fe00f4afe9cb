package volume

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/larder-project/larder/internal/overlay"
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

// Two people choose one folder at the same moment, and both find it empty.
func TestSecondMountAtAFolderIsRefused(t *testing.T) {
	n := newNode(t)
	n.publish("other:1", "two")
	at := filepath.Join(t.TempDir(), "here")
	unlock, err := n.lock(t.Context(), "b")
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan error)
	go func() { done <- n.MountAt(context.Background(), "b", options("model=other"), at) }()
	for !exists(at) {
		time.Sleep(time.Millisecond)
	}
	time.Sleep(100 * time.Millisecond) // until it waits for the lock
	if err := n.MountAt(t.Context(), "", options("model=m"), at); err != nil {
		t.Fatal(err)
	}
	unlock()
	if err := <-done; err == nil || !strings.Contains(err.Error(), "is mounted at "+at+" already") {
		t.Errorf("got %v, want a refusal", err)
	}
	if got := read(t, at+"/weights"); got != "one" {
		t.Errorf("the folder shows %q", got)
	}
	if err := n.UnmountAt(t.Context(), at); err != nil {
		t.Error(err)
	}
	n.mustMounts(0)
}

// Many at once: one of them gets the folder, and the mount is its own.
func TestManyMountsAtAFolder(t *testing.T) {
	n := newNode(t)
	at := filepath.Join(t.TempDir(), "here")
	var won atomic.Int32
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			if n.MountAt(context.Background(), "", options("model=m"), at) == nil {
				won.Add(1)
			}
		})
	}
	wg.Wait()
	if won.Load() != 1 {
		t.Errorf("%d mounts at one folder succeeded", won.Load())
	}
	if err := n.UnmountAt(t.Context(), at); err != nil {
		t.Error(err)
	}
	if left, err := overlay.IsMounted(at); err != nil || left {
		t.Errorf("still mounted: %v %v", left, err)
	}
	n.mustVolumes()
	n.empty()
}

// Somebody has mounted something over a mount by hand.
func TestMountUnderAnotherMountIsNotEnded(t *testing.T) {
	for _, access := range []string{"ro", "overlay"} {
		n := newNode(t)
		at := n.mountByHand("", "model=m;access="+access)
		run(t, "mount", "-t", "tmpfs", "x", at)
		t.Cleanup(func() { _ = exec.Command("umount", "-l", at).Run() })
		if err := n.UnmountAt(t.Context(), at); !errors.Is(err, ErrInUse) || !strings.Contains(err.Error(), "over it") {
			t.Errorf("%s: %v, want that it is in use, and why", access, err)
		}
		if all, err := n.Mounts(t.Context()); err != nil || len(all) != 1 || all[0].Leaving {
			t.Errorf("%s: the mounts are %+v, %v", access, all, err)
		}
		run(t, "umount", at)
		if err := n.UnmountAt(t.Context(), at); err != nil {
			t.Errorf("%s: when it has gone: %v", access, err)
		}
		n.empty()
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
