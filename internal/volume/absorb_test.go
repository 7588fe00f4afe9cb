package volume

import (
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
	got, err := n.resolve1("hf://org/name@" + first)
	if err != nil {
		t.Fatal(err)
	}
	dir := n.mount("cache", "b")
	repo := dir + "/models--org--name"
	if got := read(t, repo+"/snapshots/"+first+"/model.safetensors"); got != "weights of the first" {
		t.Errorf("the next container reads %q", got)
	}
	if got := read(t, repo+"/refs/larder-"+first[:12]); got != first {
		t.Errorf("the ref of its own names %q", got)
	}
	n.unmount("cache", "b")
	if err := n.Absorb(t.Context()); err != nil {
		t.Fatal(err)
	}
	run("c", second, "weights of the second")
	if now, err := n.resolve1("hf://org/name@" + first); err != nil || now != got {
		t.Errorf("the first commit is now %s, %v, want %s", now, err, got)
	}
	if _, err := n.resolve1("hf://org/name@" + second); err != nil {
		t.Errorf("the second commit: %v", err)
	}
	// Which commit a branch means, no container has a say in: neither in the
	// store nor in the views of others.
	if now, err := n.resolve1("hf://org/name@main"); err == nil {
		t.Errorf("main is %s because a container said so", now)
	}
	if _, err := os.Stat(n.mount("cache", "d") + "/models--org--name/refs/main"); err == nil {
		t.Error("the next container's cache says what main is")
	}
	n.unmount("cache", "d")
	if err := n.Absorb(t.Context()); err != nil {
		t.Fatal(err)
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
