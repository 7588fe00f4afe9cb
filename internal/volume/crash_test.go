package volume

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/larder-project/larder/internal/testenv"
	"github.com/larder-project/larder/internal/view"
)

// life is what an engine asks of the plugin for a volume and its containers, and
// what the plugin does by itself.
type life struct {
	options map[string]string
	use     func(n *node, l life)
	early   bool // the engine asks before the plugin, started again, has tidied up
}

var lives = map[string]life{
	"run":    {map[string]string{"model": "m"}, twoContainers, false},
	"volume": {map[string]string{"model": "m", "scope": "volume"}, twoContainers, true},
	"ro":     {map[string]string{"model": "m", "access": "ro", "layout": "hf"}, twoContainers, false},
	"size":   {map[string]string{"model": "m", "size": "16MiB"}, twoContainers, false},
	"kept":   {map[string]string{"model": "m", "scope": "volume", "size": "16MiB"}, twoContainers, false},
	"tmpfs":  {map[string]string{"model": "m", "upper": "tmpfs", "size": "1MiB", "uid": "1000"}, twoContainers, false},
	"absorb": {map[string]string{"model": "*", "absorb": "on"}, downloadAndAbsorb, false},
	"views":  {map[string]string{"model": "m"}, dropUsedAndUnusedViews, false},
}

func (l life) live(n *node) {
	n.t.Helper()
	if err := n.Create(n.t.Context(), "v", l.options); err != nil {
		n.t.Fatal(err)
	}
	l.use(n, l)
	n.forget("new") // whoever removes the volume wants no more of it
	if err := n.Remove(n.t.Context(), "v"); err != nil {
		n.t.Fatal(err)
	}
}

func twoContainers(n *node, l life) {
	n.t.Helper()
	dir := n.mount("v", "a")
	n.keeps("new", dir)
	if l.options["access"] != "ro" {
		write(n.t, dir+"/new", "x")
	}
	if l.options["scope"] == "volume" {
		n.note("new")
	}
	n.keeps("new", n.mount("v", "b"))
	n.unmount("v", "a")
	n.unmount("v", "b")
	if l.options["scope"] == "volume" {
		n.keeps("new", n.mount("v", "c"))
		n.unmount("v", "c")
	}
}

// note writes down, outside of the state, that a container has written
// something whole: from then on it must not be lost.
func (n *node) note(what string) { write(n.t, filepath.Join(n.root, "wrote-"+what), "") }

func (n *node) noted(what string) bool { return exists(filepath.Join(n.root, "wrote-"+what)) }

func (n *node) forget(what string) {
	n.t.Helper()
	if err := os.RemoveAll(filepath.Join(n.root, "wrote-"+what)); err != nil {
		n.t.Fatal(err)
	}
}

// keeps checks that a mount shows a file that was noted.
func (n *node) keeps(name, dir string) {
	n.t.Helper()
	if !n.noted(name) {
		return
	}
	if data, err := os.ReadFile(filepath.Join(dir, name)); err != nil || string(data) != "x" {
		n.t.Errorf("what a container wrote is lost: %q, %v", data, err)
	}
}

const downloaded = "0123456789012345678901234567890123456789"

func downloadAndAbsorb(n *node, _ life) {
	n.t.Helper()
	dir := n.mount("v", "a")
	if err := os.RemoveAll(dir + "/models--org--name"); err != nil {
		n.t.Fatal(err)
	}
	download(n.t, dir, downloaded, "weights")
	n.note("download")
	n.unmount("v", "a")
	if err := n.Absorb(n.t.Context()); err != nil {
		n.t.Fatal(err)
	}
}

func dropUsedAndUnusedViews(n *node, _ life) {
	n.t.Helper()
	n.mount("v", "a")
	if err := n.dropViews(); err != nil {
		n.t.Fatal(err)
	}
	n.unmount("v", "a")
	if err := n.dropViews(); err != nil {
		n.t.Fatal(err)
	}
}

// The plugin is killed at every step between two changes of the disk or of the
// mount table. Started again, it serves the same calls, and at the end nothing
// is left over.
//
// Nothing here is made durable, so the state lies in memory: power cuts are the
// business of the packages below. How a host can mount is found out, killed in
// each step of that, in one of the lives.
func TestPluginKilledAtEveryStep(t *testing.T) {
	testenv.NeedRoot(t)
	if root := testenv.Child(); root != "" {
		n := &node{t: t, root: root}
		n.start()
		lives[filepath.Base(root)].live(n)
		return
	}
	memory := testenv.LoopFS(t, "tmpfs", 0).Dir
	t.Run("lives", func(t *testing.T) { // all of them have ended when it has
		for _, name := range []string{"absorb", "run", "kept", "views", "size", "tmpfs", "volume", "ro"} { // the longest first
			l := lives[name]
			t.Run(name, func(t *testing.T) {
				t.Parallel()
				steps := 0
				for killed := true; killed; steps++ {
					n := &node{t: t, root: filepath.Join(memory, fmt.Sprint(steps), name)}
					n.start()
					n.publish("m:1", "one")
					killed = testenv.Rerun(t, n.root, fmt.Sprintf("kill:%d", steps+1))
					n.check(l)
					n.unmountAll()
					if err := os.RemoveAll(n.root); err != nil {
						t.Error(err)
					}
					if t.Failed() {
						t.Fatalf("after a kill at step %d", steps+1)
					}
				}
				if steps < 30 {
					t.Errorf("only %d steps were found", steps-1)
				}
				t.Logf("killed at each of %d steps", steps-1)
			})
		}
	})
}

// start is a start of the plugin. Each finds out how the host can mount; all
// but those of one life are told.
func (n *node) start() {
	n.t.Helper()
	n.reopen("")
	if filepath.Base(n.root) != "run" {
		n.method = view.DataOnly
	}
}

// check starts the plugin again and lives the same life.
func (n *node) check(l life) {
	n.t.Helper()
	n.start()
	ctx := n.t.Context()
	if l.early && n.noted("new") {
		for _, id := range []string{"a", "b", "c"} {
			n.keeps("new", n.mount("v", id))
			n.unmount("v", id)
		}
	}
	if err := errors.Join(n.Sweep(ctx), n.Reap(ctx)); err != nil {
		n.t.Error(err)
	}
	if n.noted("download") {
		n.unmount("v", "a") // the engine has not heard of the first one's end
		if err := n.Absorb(ctx); err != nil {
			n.t.Error(err)
		}
		if _, err := n.resolve1("hf://org/name@" + downloaded); err != nil {
			n.t.Errorf("what a container downloaded is lost: %v", err)
		}
	}
	l.live(n)
	if err := errors.Join(n.Absorb(ctx), n.dropViews()); err != nil {
		n.t.Error(err)
	}
	n.empty()
	for _, left := range n.views() {
		n.t.Errorf("left of the views: %s", left)
	}
	for _, dir := range []string{"uppers/run", "uppers/volume", "uppers/absorb", "."} {
		entries, err := os.ReadDir(filepath.Join(n.state, dir))
		if err != nil && dir != "uppers/absorb" {
			n.t.Error(err)
		}
		for _, e := range entries {
			if strings.HasPrefix(e.Name(), ".tmp-") {
				n.t.Errorf("left in %s: %s", dir, e.Name())
			}
		}
	}
	if problems, err := n.store.Verify(ctx, nil, nil); err != nil || len(problems) > 0 {
		n.t.Errorf("verify: %v %v", problems, err)
	}
}
