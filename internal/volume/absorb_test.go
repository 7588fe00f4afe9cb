package volume

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"

	"github.com/larder-project/larder/internal/reference"
)

// download writes what a hub's client leaves in its cache.
func download(t *testing.T, cache, commit, content string) {
	t.Helper()
	repo := filepath.Join(cache, "models--org--name")
	name := digest.FromString(content).Encoded()
	for _, dir := range []string{"blobs", "refs", "snapshots/" + commit} {
		if err := os.MkdirAll(filepath.Join(repo, dir), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	write(t, filepath.Join(repo, "blobs", name), content)
	write(t, filepath.Join(repo, "refs", "main"), commit)
	if err := os.Symlink("../../blobs/"+name, filepath.Join(repo, "snapshots", commit, "model.safetensors")); err != nil {
		t.Fatal(err)
	}
}

func (n *node) resolve1(name string) (string, error) {
	r, err := reference.Parse(name)
	if err != nil {
		n.t.Fatal(err)
	}
	v, err := n.store.Resolve(r)
	return string(v.Digest), err
}

func TestDownloadsOfARunAreTakenOver(t *testing.T) {
	n := newNode(t)
	n.create("cache", "model=*", "absorb=on")
	first, second := strings.Repeat("1", 40), strings.Repeat("2", 40)
	run := func(id, commit, content string) {
		t.Helper()
		download(t, n.mount("cache", id), commit, content)
		n.unmount("cache", id)
		select {
		case <-n.Ended():
		default:
			t.Error("nobody was told that a run has ended")
		}
		if err := n.Absorb(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	run("a", first, "weights of the first")
	n.mustMounts(0)
	got, err := n.resolve1("hf://org/name@main")
	if err != nil {
		t.Fatal(err)
	}
	dir := n.mount("cache", "b")
	if got := read(t, dir+"/models--org--name/snapshots/"+first+"/model.safetensors"); got != "weights of the first" {
		t.Errorf("the next container reads %q", got)
	}
	n.unmount("cache", "b")
	if err := n.Absorb(t.Context()); err != nil {
		t.Fatal(err)
	}
	// A second commit, whose container says that main is it now, is added and
	// takes nothing away.
	run("c", second, "weights of the second")
	if now, err := n.resolve1("hf://org/name@main"); err != nil || now != got {
		t.Errorf("main moved to %s, %v: a container must not say what others get", now, err)
	}
	if _, err := n.resolve1("hf://org/name@" + second); err != nil {
		t.Errorf("the second commit: %v", err)
	}
	if err := n.Remove(t.Context(), "cache"); err != nil {
		t.Fatal(err)
	}
	n.empty()
}

func TestDownloadsWithWrongBytesAreNotTakenOver(t *testing.T) {
	n := newNode(t)
	n.create("cache", "model=*", "absorb=on")
	commit := strings.Repeat("1", 40)
	dir := n.mount("cache", "a")
	download(t, dir, commit, "weights")
	write(t, filepath.Join(dir, "models--org--name", "blobs", digest.FromString("weights").Encoded()), "poison!")
	n.unmount("cache", "a")
	if err := n.Absorb(t.Context()); err != nil {
		t.Fatal(err)
	}
	if _, err := n.resolve1("hf://org/name@" + commit); err == nil {
		t.Error("a file that is not what its name says was taken over")
	}
	if problems, err := n.store.Verify(t.Context(), nil, nil); err != nil || len(problems) > 0 {
		t.Errorf("verify: %v %v", problems, err)
	}
	if err := n.Remove(t.Context(), "cache"); err != nil {
		t.Fatal(err)
	}
	n.empty()
}

// There may be no plugin that would do it later: the downloads of a manual mount
// are taken over when a person ends it, and not while a process is in it.
func TestDownloadsOfAManualMountAreTakenOverAtItsEnd(t *testing.T) {
	n := newNode(t)
	target := filepath.Join(t.TempDir(), "hub")
	if err := n.MountAt(t.Context(), "", map[string]string{"model": "*", "absorb": "on"}, target); err != nil {
		t.Fatal(err)
	}
	commit := strings.Repeat("1", 40)
	download(t, target, commit, "weights")
	open, err := os.Open(target)
	if err != nil {
		t.Fatal(err)
	}
	defer open.Close()
	if err := n.UnmountAt(t.Context(), target); !errors.Is(err, ErrInUse) {
		t.Errorf("with a file open in the mount its end gives %v, want ErrInUse", err)
	}
	if err := open.Close(); err != nil {
		t.Fatal(err)
	}
	if err := n.UnmountAt(t.Context(), target); err != nil {
		t.Fatal(err)
	}
	if _, err := n.resolve1("hf://org/name@" + commit); err != nil {
		t.Errorf("what was downloaded: %v", err)
	}
	n.empty()
}
