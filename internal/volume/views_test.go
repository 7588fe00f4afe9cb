package volume

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/larder-project/larder/internal/reference"
	"github.com/larder-project/larder/internal/store"
)

// views lists what lies in the folder of this boot's views.
func (n *node) views() []string {
	n.t.Helper()
	return n.list(filepath.Join(viewsDir, n.viewsName()))
}

// dropViews is what the collector does.
func (n *node) dropViews() error {
	return n.store.Exclusive(n.t.Context(), func(*store.Exclusive) error { return n.DropViews(n.t.Context()) })
}

func TestViewsThatNothingNeedsAreDropped(t *testing.T) {
	n := newNode(t)
	n.publish("m:2", "two")
	for name, options := range map[string][]string{"one": {"model=m:1"}, "one-hf": {"model=m:1", "layout=hf"}, "two": {"model=m:2"}, "all": {"model=*"}} {
		n.create(name, options...)
	}
	view := func(volume string) string {
		t.Helper()
		mr, _, err := n.readMount(volume, "a")
		if err != nil {
			t.Fatal(err)
		}
		return mr.View
	}
	kept := n.mount("one", "a")
	n.mount("one-hf", "a")
	n.mount("two", "a")
	n.mount("all", "a")
	one, hf := view("one"), view("one-hf")
	shown := view("two")
	n.unmount("one-hf", "a")
	n.unmount("all", "a")
	// Of two a container alone knows; its record is lost.
	stop := container(t, n.Path("two")+"/a")
	n.unmount("two", "a")
	if err := os.RemoveAll(n.mountsDir("two")); err != nil {
		t.Fatal(err)
	}
	if err := n.dropViews(); err != nil {
		t.Fatal(err)
	}
	// A mount of version one that has begun may want either of its views.
	want := []string{one, one + recordSuffix, hf, hf + recordSuffix, shown, shown + recordSuffix}
	slices.Sort(want)
	if got := n.views(); !slices.Equal(got, want) {
		t.Errorf("left are %v, want %v", got, want)
	}
	if got := read(t, kept+"/weights"); got != "one" {
		t.Errorf("a mount that stays reads %q", got)
	}
	stop()
	n.unmount("one", "a")
	if err := n.dropViews(); err != nil {
		t.Fatal(err)
	}
	if got := n.views(); len(got) > 0 {
		t.Errorf("when nothing is mounted these are left: %v", got)
	}
	// The manager remembers what it built.
	for _, name := range []string{"one", "one-hf", "two", "all"} {
		n.mount(name, "b")
		n.unmount(name, "b")
	}
}

func TestViewsAreKeptWhereUseCannotBeTold(t *testing.T) {
	n := newNode(t)
	n.create("m")
	n.mount("m", "a")
	n.unmount("m", "a")
	before := n.views()
	n.blind = true
	if err := n.dropViews(); err != nil || !slices.Equal(n.views(), before) {
		t.Errorf("in a PID namespace of its own: %v, left %v of %v", err, n.views(), before)
	}
	n.blind = false
	n.mount("m", "b")
	good := read(t, n.mountRecordPath("m", "b"))
	write(t, n.mountRecordPath("m", "b"), good[:10])
	if err := n.dropViews(); !errors.Is(err, ErrDamaged) || !slices.Equal(n.views(), before) {
		t.Errorf("with a mount's record damaged: %v, left %v of %v", err, n.views(), before)
	}
	write(t, n.mountRecordPath("m", "b"), good)
	n.unmount("m", "b")
	view := filepath.Join(n.state, viewsDir, n.viewsName(), before[slices.IndexFunc(before, func(s string) bool { return strings.HasSuffix(s, recordSuffix) })])
	write(t, view, "{}}")
	if err := n.dropViews(); !errors.Is(err, ErrDamaged) || !slices.Equal(n.views(), before) {
		t.Errorf("with the view's record damaged: %v, left %v of %v", err, n.views(), before)
	}
}

// A view that is mounted and whose record is damaged keeps every version, and
// what the message advises mends it.
func TestDamagedRecordOfAViewIsLoud(t *testing.T) {
	n := newNode(t)
	n.create("m")
	n.mount("m", "a")
	mr, _, err := n.readMount("m", "a")
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(n.state, viewsDir, n.viewsName(), mr.View+recordSuffix)
	good := read(t, path)
	damages := map[string]string{"empty": "", "cut short": good[:len(good)/2], "garbage": "\x00\xff\x00"}
	for what, content := range damages {
		write(t, path, content)
		if uses, err := n.Sources()[1].Uses(t.Context()); !errors.Is(err, ErrDamaged) {
			t.Errorf("%s: uses %v, %v; want ErrDamaged", what, uses, err)
		}
	}
	n.reopen("")
	n.mount("m", "b")
	if uses, err := n.Sources()[1].Uses(t.Context()); err != nil || len(uses) == 0 {
		t.Errorf("after a restart and a mount: %v, %v", uses, err)
	}
	n.unmount("m", "a")
	n.unmount("m", "b")
}

func TestOtherNodesSeeWhatAVolumeNeeds(t *testing.T) {
	n := newNode(t)
	used := func(name string) bool {
		t.Helper()
		r, err := reference.Parse(name)
		if err != nil {
			t.Fatal(err)
		}
		v, err := n.store.Resolve(r)
		if err != nil {
			t.Fatal(err)
		}
		users, err := n.store.Users()
		if err != nil {
			t.Fatal(err)
		}
		return slices.Equal(users[v.Digest], []string{"test"})
	}
	n.create("all", "model=*")
	if used("m:1") {
		t.Error("a catalog keeps what it shows")
	}
	n.create("v", "model=m", "scope=volume")
	if !used("m:1") {
		t.Error("a volume that was never mounted does not keep its version")
	}
	n.publish("m:2", "two")
	r, err := n.readRecord("v")
	if err != nil {
		t.Fatal(err)
	}
	o, err := ParseOptions("v", r.Options)
	if err != nil {
		t.Fatal(err)
	}
	if err := n.pin(t.Context(), &r, o); err != nil {
		t.Fatal(err)
	}
	if !used("m:2") {
		t.Error("a volume that is bound to a version does not keep it")
	}
}
