package volume

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"

	"github.com/larder-project/larder/internal/modelpack"
	"github.com/larder-project/larder/internal/pull"
	"github.com/larder-project/larder/internal/reference"
	"github.com/larder-project/larder/internal/source/directory"
	"github.com/larder-project/larder/internal/store"
	"github.com/larder-project/larder/internal/usage"
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

// Podman mounts a container's volume with the same ID each time. A run that
// begins while the download of the one before is waiting has a mount and an
// upper of its own.
func TestARunThatBeginsAgainIsNotAbsorbed(t *testing.T) {
	n := newNode(t)
	n.create("cache", "model=*", "absorb=on")
	commit := strings.Repeat("1", 40)
	download(t, n.mount("cache", "a"), commit, "weights")
	n.unmount("cache", "a")
	dir := n.mount("cache", "a")
	if _, err := os.Stat(dir + "/models--org--name"); err == nil {
		t.Error("the new run has what the one before wrote")
	}
	write(t, dir+"/live", "x")
	download(t, dir, strings.Repeat("2", 40), "weights of the live run")
	if err := n.Absorb(t.Context()); err != nil {
		t.Fatal(err)
	}
	if _, err := n.resolve1("hf://org/name@" + commit); err != nil {
		t.Errorf("the first run's download: %v", err)
	}
	if _, err := n.resolve1("hf://org/name@" + strings.Repeat("2", 40)); err == nil {
		t.Error("a download was taken from a live run")
	}
	n.mustMounts(1)
	if got := read(t, dir+"/live") + read(t, dir+"/models--org--name/snapshots/"+strings.Repeat("2", 40)+"/model.safetensors"); got != "xweights of the live run" {
		t.Errorf("the live run has %q", got)
	}
	n.unmount("cache", "a")
	if err := errors.Join(n.Absorb(t.Context()), n.Remove(t.Context(), "cache")); err != nil {
		t.Fatal(err)
	}
	n.empty()
}

// The last Unmount never comes: the run is reaped, and absorbed all the same.
func TestAForgottenRunIsAbsorbed(t *testing.T) {
	n := newNode(t)
	n.create("cache", "model=*", "absorb=on")
	commit := strings.Repeat("1", 40)
	download(t, n.mount("cache", "a"), commit, "weights")
	mr, _, err := n.readMount("cache", "a")
	if err != nil {
		t.Fatal(err)
	}
	mr.Called -= startGrace + 1
	if err := n.writeMount(mr); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(n.Reap(t.Context()), n.Absorb(t.Context())); err != nil {
		t.Fatal(err)
	}
	n.mustMounts(0)
	if _, err := n.resolve1("hf://org/name@" + commit); err != nil {
		t.Error(err)
	}
	if err := n.Remove(t.Context(), "cache"); err != nil {
		t.Fatal(err)
	}
	n.empty()
}

// A commit that shares files with one in the store lies only partly in the
// upper: the rest is in the view that the run was shown.
func TestANewCommitOfAKnownModelIsAbsorbed(t *testing.T) {
	for _, upper := range []string{"disk", "tmpfs"} {
		t.Run(upper, func(t *testing.T) {
			n := newNode(t)
			n.create("cache", "model=*", "absorb=on", "upper="+upper)
			first, second := strings.Repeat("1", 40), strings.Repeat("2", 40)
			download(t, n.mount("cache", "a"), first, "weights")
			n.unmount("cache", "a")
			if err := n.Absorb(t.Context()); err != nil {
				t.Fatal(err)
			}
			dir := n.mount("cache", "b")
			snapshot := filepath.Join(dir, "models--org--name", "snapshots", second)
			if err := os.MkdirAll(snapshot, 0o755); err != nil {
				t.Fatal(err)
			}
			if err := os.Symlink("../../blobs/"+digest.FromString("weights").Encoded(), snapshot+"/renamed.safetensors"); err != nil {
				t.Fatal(err)
			}
			n.unmount("cache", "b")
			// Until it is looked at, what it shares must not go.
			uses, err := n.Sources()[0].Uses(t.Context())
			if err != nil || !slices.ContainsFunc(uses, func(u usage.Use) bool { return strings.Contains(u.By, "taken over") }) {
				t.Errorf("uses: %v %v", uses, err)
			}
			if err := n.Absorb(t.Context()); err != nil {
				t.Fatal(err)
			}
			if _, err := n.resolve1("hf://org/name@" + second); err != nil {
				t.Error(err)
			}
			if err := n.Remove(t.Context(), "cache"); err != nil {
				t.Fatal(err)
			}
			n.empty()
		})
	}
}

// What runs of an earlier boot had downloaded is looked at, too, whether they
// had ended or not.
func TestDownloadsOutliveAReboot(t *testing.T) {
	n := newNode(t)
	for name, c := range map[string]struct{ size, ended, live string }{"disk": {"", "1", "2"}, "image": {"16MiB", "3", "4"}} {
		options := []string{"model=*", "absorb=on"}
		if c.size != "" {
			options = append(options, "size="+c.size)
		}
		n.create(name, options...)
		download(t, n.mount(name, "ended"), strings.Repeat(c.ended, 40), "weights of "+c.ended)
		n.unmount(name, "ended")
		download(t, n.mount(name, "live"), strings.Repeat(c.live, 40), "weights of "+c.live)
		n.unmountAll()
		n.reopen("next-boot-" + name)
		if err := errors.Join(n.Sweep(t.Context()), n.Absorb(t.Context())); err != nil {
			t.Fatal(err)
		}
		for _, digit := range []string{c.ended, c.live} {
			if _, err := n.resolve1("hf://org/name@" + strings.Repeat(digit, 40)); err != nil {
				t.Errorf("%s: %v", name, err)
			}
		}
		if err := n.Remove(t.Context(), name); err != nil {
			t.Fatal(err)
		}
		n.empty()
	}
}

// A name that somebody else gives the content while it is being looked at is
// not taken away.
func TestAClaimTakesNoNameAway(t *testing.T) {
	n := newNode(t)
	n.create("cache", "model=*", "absorb=on")
	commit := strings.Repeat("1", 40)
	download(t, n.mount("cache", "a"), commit, "what a container says")
	n.unmount("cache", "a")
	all, err := n.asides()
	if err != nil || len(all) != 1 {
		t.Fatalf("%v %v", all, err)
	}
	cache, err := directory.HubCache(upperOf(all[0].dir))
	if err != nil {
		t.Fatal(err)
	}
	defer cache.Close()
	genuine := n.publishAs(modelpack.Model{Source: "hf://org/name", Revision: commit}, "hf://org/name@main", "what the hub says")
	_, err = pull.Run(t.Context(), n.store, claimed{cache.Sources[0].(*directory.Source)}, pull.Options{Node: "test", New: true})
	if !errors.Is(err, store.ErrTaken) {
		t.Errorf("got %v, want ErrTaken", err)
	}
	for _, name := range []string{"hf://org/name@main", "hf://org/name@" + commit} {
		if got, err := n.resolve1(name); err != nil || got != string(genuine.Digest) {
			t.Errorf("%s is %s, %v; want %s", name, got, err, genuine.Digest)
		}
	}
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

// An error that says nothing of the download (here: the store's list of
// references cannot be read) may pass, and the download waits for that.
func TestADownloadStaysWhileTheStoreCannotBeRead(t *testing.T) {
	n := newNode(t)
	n.create("cache", "model=*", "absorb=on")
	commit := strings.Repeat("1", 40)
	download(t, n.mount("cache", "a"), commit, "weights")
	n.unmount("cache", "a")
	index := filepath.Join(n.store.Dir(), "index.json")
	good, err := os.ReadFile(index)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(index, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	if err := n.Absorb(t.Context()); !errors.Is(err, store.ErrDamaged) || !strings.Contains(err.Error(), "it stays in") {
		t.Errorf("got %v, want ErrDamaged and where the download stays", err)
	}
	if err := os.WriteFile(index, good, 0o644); err != nil {
		t.Fatal(err)
	}
	if err := n.Absorb(t.Context()); err != nil {
		t.Error(err)
	}
	if _, err := n.resolve1("hf://org/name@" + commit); err != nil {
		t.Errorf("what the container downloaded is lost: %v", err)
	}
}
