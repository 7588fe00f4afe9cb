package volume

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/moby/sys/mountinfo"
	"github.com/opencontainers/go-digest"

	"github.com/larder-project/larder/internal/gc"
	"github.com/larder-project/larder/internal/modelpack"
	"github.com/larder-project/larder/internal/reference"
	"github.com/larder-project/larder/internal/store"
	"github.com/larder-project/larder/internal/testenv"
	"github.com/larder-project/larder/internal/view"
)

// node is a store and a state in a folder of the test.
type node struct {
	t     *testing.T
	root  string
	store *store.Store
	*Manager
}

func newNode(t *testing.T) *node {
	t.Helper()
	testenv.NeedRoot(t)
	// A path with all that mount options and mount tables escape.
	n := &node{t: t, root: filepath.Join(t.TempDir(), `a b,c:d=e\f`)}
	n.reopen("")
	n.publish("m:1", "one")
	t.Cleanup(n.unmountAll)
	return n
}

// reopen is what a restart of the plugin does; with a boot id, what a reboot
// of the host does to what is remembered.
func (n *node) reopen(boot string) {
	n.t.Helper()
	var err error
	if n.store, err = store.Open(filepath.Join(n.root, "store")); err != nil {
		n.t.Fatal(err)
	}
	// A machine of tests may be a container itself.
	n.Manager, err = Open(n.t.Context(), Config{Store: n.store, State: filepath.Join(n.root, "node"), Node: "test", BootID: boot, OwnPIDNamespace: true})
	if err != nil {
		n.t.Fatal(err)
	}
}

func (n *node) publish(name, content string) store.Version {
	n.t.Helper()
	return n.publishAs(modelpack.Model{}, name, content)
}

func (n *node) publishAs(m modelpack.Model, name, content string) store.Version {
	n.t.Helper()
	l, err := n.store.NewLease(n.t.Context(), "test", "test")
	if err != nil {
		n.t.Fatal(err)
	}
	defer l.Release()
	for path, content := range map[string]string{"weights": content, "sub/config.json": "{}"} {
		d, err := n.store.PutBlob(n.t.Context(), l, []byte(content))
		if err != nil {
			n.t.Fatal(err)
		}
		m.Files = append(m.Files, modelpack.File{Path: path, Digest: d, Size: int64(len(content))})
	}
	r, err := reference.Parse(name)
	if err != nil {
		n.t.Fatal(err)
	}
	v, err := n.store.Publish(n.t.Context(), l, m, []reference.Reference{r})
	if err != nil {
		n.t.Fatal(err)
	}
	return v
}

// mounts lists the mounts below the test's folder.
func (n *node) mounts() []string {
	infos, err := mountinfo.GetMounts(mountinfo.PrefixFilter(n.root))
	if err != nil {
		n.t.Fatal(err)
	}
	var out []string
	for _, i := range infos {
		out = append(out, i.Mountpoint)
	}
	return out
}

func (n *node) unmountAll() {
	for _, target := range slices.Backward(n.mounts()) {
		if err := exec.Command("umount", "-l", target).Run(); err != nil {
			n.t.Errorf("umount %s: %v", target, err)
		}
	}
}

func (n *node) create(name string, options ...string) {
	n.t.Helper()
	raw := map[string]string{}
	for _, o := range options {
		k, v, _ := strings.Cut(o, "=")
		raw[k] = v
	}
	if err := n.Create(n.t.Context(), name, raw); err != nil {
		n.t.Fatal(err)
	}
}

func (n *node) mount(name, id string) string {
	n.t.Helper()
	dir, err := n.Mount(n.t.Context(), name, id)
	if err != nil {
		n.t.Fatal(err)
	}
	return dir
}

func (n *node) unmount(name, id string) {
	n.t.Helper()
	if err := n.Unmount(n.t.Context(), name, id); err != nil {
		n.t.Fatal(err)
	}
}

// age makes a mount's last call so many seconds older.
func (n *node) age(name, id string, seconds int64) {
	n.t.Helper()
	mr, ok, err := n.readMount(name, id)
	if err != nil || !ok {
		n.t.Fatalf("%v %v", ok, err)
	}
	mr.Called -= seconds
	if err := n.writeMount(mr); err != nil {
		n.t.Fatal(err)
	}
}

func (n *node) mustMounts(want int) {
	n.t.Helper()
	if got := n.mounts(); len(got) != want {
		n.t.Errorf("%d mounts %v, want %d", len(got), got, want)
	}
}

// empty checks that nothing of any run is left.
func (n *node) empty() {
	n.t.Helper()
	n.mustMounts(0)
	for _, dir := range []string{"uppers/run", "uppers/volume", "uppers/absorb", "uppers/dropped", "mounts/" + n.boot, "mnt", "volumes"} {
		entries, err := os.ReadDir(filepath.Join(n.state, dir))
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			n.t.Fatal(err)
		}
		for _, e := range entries {
			n.t.Errorf("left in %s: %s", dir, e.Name())
		}
	}
}

// dropped lists the uppers that are being deleted.
func (n *node) dropped() []string {
	n.t.Helper()
	return n.list(filepath.Join(uppersDir, droppedDir))
}

// list gives the names in a folder of the state.
func (n *node) list(dir string) []string {
	n.t.Helper()
	entries, err := os.ReadDir(filepath.Join(n.state, dir))
	if err != nil {
		n.t.Fatal(err)
	}
	var out []string
	for _, e := range entries {
		out = append(out, e.Name())
	}
	return out
}

func write(t *testing.T, path, content string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(content), 0o644); err != nil {
		t.Fatal(err)
	}
}

func read(t *testing.T, path string) string {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(data)
}

// container is a process in a mount namespace of its own that shows a mount at
// another place, as a container does.
func container(t *testing.T, source string) (stop func()) {
	t.Helper()
	return namespace(t, fmt.Sprintf("mount --bind %q %q && umount -l %q", source, t.TempDir(), source))
}

// namespace is a process in a mount namespace of its own in which a script has
// been run. With -Ur among the flags of unshare, a user namespace of its own
// owns it. No test that makes one runs beside others (see process).
func namespace(t *testing.T, script string, flags ...string) (stop func()) {
	t.Helper()
	cmd := exec.Command("unshare", append(flags, "-m", "--propagation", "private", "sh", "-c", script+" && echo ready && exec sleep 300")...)
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	if _, err := out.Read(make([]byte, 6)); err != nil {
		t.Fatal(err)
	}
	var once sync.Once
	stop = func() {
		once.Do(func() {
			_ = cmd.Process.Kill()
			_ = cmd.Wait()
		})
	}
	t.Cleanup(stop)
	return stop
}

func TestEachRunWritesForItself(t *testing.T) {
	n := newNode(t)
	n.create("m")
	a, b := n.mount("m", "a"), n.mount("m", "b")
	if a == b {
		t.Fatal("two runs got the same folder")
	}
	write(t, a+"/weights", "changed")
	write(t, a+"/sub/new", "x")
	if got := read(t, b+"/weights"); got != "one" {
		t.Errorf("the other run sees %q", got)
	}
	if _, err := os.Stat(b + "/sub/new"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the other run sees a new file: %v", err)
	}
	if got := read(t, n.store.BlobPath(digest.FromString("one"))); got != "one" {
		t.Errorf("the blob has become %q", got)
	}
	n.unmount("m", "a")
	n.unmount("m", "b")
	if got := read(t, n.mount("m", "a")+"/weights"); got != "one" {
		t.Errorf("the next run sees %q of the one before", got)
	}
	n.unmount("m", "a")
	if err := n.Remove(t.Context(), "m"); err != nil {
		t.Fatal(err)
	}
	n.empty()
}

// The mount tables tell every user of the host where the folders are, and a
// view's files and folders may be anybody's to write.
func TestOtherUsersOfTheHostReachNoView(t *testing.T) {
	n := newNode(t)
	mnt := filepath.Join(t.TempDir(), "mnt")
	above := filepath.Dir(n.root)
	dirs := []string{filepath.Dir(above), above, n.root}
	for _, name := range []string{"mnt", "views", "uppers"} { // as an earlier Larder made them
		dirs = append(dirs, filepath.Join(n.state, name))
	}
	for _, dir := range dirs {
		if err := os.Chmod(dir, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	reach := func() {
		t.Helper()
		n.create("v", "model=m", "scope=volume")
		dir := n.mount("v", "a")
		mr, _, err := n.readMount("v", "a")
		if err != nil {
			t.Fatal(err)
		}
		for _, dir := range []string{dir, filepath.Join(n.state, viewsDir, n.viewsName(), mr.View), filepath.Join(mr.Upper, "upper")} {
			cmd := exec.Command("sh", "-c", `echo evil >"$1/new.py"`, "sh", dir)
			cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
			if out, err := cmd.CombinedOutput(); err == nil || !strings.Contains(string(out), "Permission denied") {
				t.Errorf("user 65534 in %s: %v, %s; want that it is denied", dir, err, out)
			}
		}
		n.unmount("v", "a")
		if err := n.Remove(t.Context(), "v"); err != nil {
			t.Fatal(err)
		}
	}
	n.reopen("")
	reach()
	if err := os.MkdirAll(mnt, 0o755); err != nil { // with other things in it
		t.Fatal(err)
	}
	var err error
	if n.Manager, err = Open(t.Context(), Config{Store: n.store, State: n.state, Mounts: mnt, Node: "test"}); err != nil {
		t.Fatal(err)
	}
	reach()
}

func TestVolumeScopeKeepsWritesAndVersion(t *testing.T) {
	n := newNode(t)
	n.create("v", "model=m", "scope=volume")
	dir := n.mount("v", "a")
	if other := n.mount("v", "b"); other != dir {
		t.Errorf("runs of one volume got %s and %s", dir, other)
	}
	write(t, dir+"/kept", "yes")
	if err := os.Chmod(dir+"/weights", 0o600); err != nil {
		t.Fatal(err)
	}
	n.unmount("v", "a")
	n.mustMounts(1)
	n.unmount("v", "b")
	n.mustMounts(0)
	n.publish("m:2", "two")
	n.reopen("another-boot") // views are built anew
	if err := n.Sweep(t.Context()); err != nil {
		t.Fatal(err)
	}
	dir = n.mount("v", "c")
	if got := read(t, dir+"/kept"); got != "yes" {
		t.Errorf("kept file holds %q", got)
	}
	if got := read(t, dir+"/weights"); got != "one" {
		t.Errorf("the volume moved to another version: %q", got)
	}
	if fi, err := os.Stat(dir + "/weights"); err != nil || fi.Mode().Perm() != 0o600 {
		t.Errorf("mode of a file that was changed: %v %v", fi.Mode(), err)
	}
	n.create("r", "model=m")
	if got := read(t, n.mount("r", "d")+"/weights"); got != "two" {
		t.Errorf("a volume without writes of its own has %q, want the newest version", got)
	}
	n.unmount("v", "c")
	n.unmount("r", "d")
	for _, name := range []string{"v", "r"} {
		if err := n.Remove(t.Context(), name); err != nil {
			t.Fatal(err)
		}
	}
	n.empty()
}

func TestCallsThatDoNotBalance(t *testing.T) {
	n := newNode(t)
	n.create("m")
	dir := n.mount("m", "a")
	stop := container(t, dir)
	// docker cp on a running container: Mount and Unmount with the same ID.
	if again := n.mount("m", "a"); again != dir {
		t.Errorf("a repeat gave %s, not %s", again, dir)
	}
	n.unmount("m", "a")
	n.mustMounts(1)
	// The engine was killed: a second Mount, and one Unmount at the end.
	n.mount("m", "a")
	stop()
	n.unmount("m", "a")
	n.mustMounts(0)
	// Nothing is known any more: still no error.
	n.unmount("m", "a")
	n.unmount("nobody", "a")
}

func TestWritesAreNotDeletedWhileAContainerShowsThem(t *testing.T) {
	n := newNode(t)
	n.create("m")
	dir := n.mount("m", "a")
	write(t, dir+"/precious", "x")
	stop := container(t, dir)
	n.unmount("m", "a") // too early, whatever the reason
	n.mustMounts(0)
	upper := filepath.Join(n.runUpper("m", "a"), "upper", "precious")
	if got := read(t, upper); got != "x" {
		t.Fatalf("the container's file is gone: %q", got)
	}
	if err := n.Remove(t.Context(), "m"); !errors.Is(err, ErrInUse) {
		t.Errorf("remove: got %v, want ErrInUse", err)
	}
	if _, err := n.Mount(t.Context(), "m", "a"); !errors.Is(err, ErrInUse) {
		t.Errorf("mount of an upper that is still mounted: got %v, want ErrInUse", err)
	}
	if err := n.Reap(t.Context()); err != nil {
		t.Fatal(err)
	}
	if got := read(t, upper); got != "x" {
		t.Fatalf("reap deleted the container's file: %q", got)
	}
	stop()
	if err := n.Remove(t.Context(), "m"); err != nil {
		t.Fatal(err)
	}
	n.empty()
}

// Between the engine's Mount and the container's start no mount table shows a
// user of the volume.
func TestVolumeOfAContainerThatStartsIsNotRemoved(t *testing.T) {
	n := newNode(t)
	n.create("v", "model=m", "scope=volume")
	write(t, n.mount("v", "a")+"/mine", "mine")
	if err := n.Remove(t.Context(), "v"); !errors.Is(err, ErrInUse) || !strings.Contains(err.Error(), "try again") {
		t.Errorf("got %v, want ErrInUse, and what to do", err)
	}
	if got := read(t, n.mount("v", "a")+"/mine"); got != "mine" {
		t.Errorf("what was written is %q", got)
	}
	// The engine was killed and nobody will start it.
	n.age("v", "a", callGrace+1)
	if err := n.Remove(t.Context(), "v"); err != nil {
		t.Error(err)
	}
	// It does not start, and the engine says so.
	n.create("v", "model=m", "scope=volume")
	n.mount("v", "b")
	n.unmount("v", "b")
	if err := n.Remove(t.Context(), "v"); err != nil {
		t.Error(err)
	}
	n.empty()
}

func TestForgottenMountIsReaped(t *testing.T) {
	n := newNode(t)
	n.create("m")
	stop := container(t, n.mount("m", "a"))
	reap := func(want int) {
		t.Helper()
		if err := n.Reap(t.Context()); err != nil {
			t.Fatal(err)
		}
		n.mustMounts(want)
	}
	reap(1)
	stop() // and Unmount never comes
	reap(1)
	n.age("m", "a", endGrace+1)
	reap(0)
	// One that no container has shown yet may be about to start.
	n.mount("m", "b")
	n.age("m", "b", endGrace+1)
	reap(1)
	n.unmount("m", "b")
}

func TestBusyMountIsUnmountedLater(t *testing.T) {
	n := newNode(t)
	n.create("m")
	dir := n.mount("m", "a")
	f, err := os.Open(dir + "/weights")
	if err != nil {
		t.Fatal(err)
	}
	n.unmount("m", "a")
	n.mustMounts(1)
	f.Close()
	if err := n.Reap(t.Context()); err != nil {
		t.Fatal(err)
	}
	n.mustMounts(0)
}

func TestRebootLeavesNothingOfRunsAndAllOfVolumes(t *testing.T) {
	n := newNode(t)
	n.create("m")
	n.create("v", "model=m", "scope=volume")
	write(t, n.mount("m", "a")+"/x", "x")
	write(t, n.mount("v", "b")+"/y", "y")
	n.unmountAll()
	n.reopen("next-boot")
	if err := n.Sweep(t.Context()); err != nil {
		t.Fatal(err)
	}
	if entries, err := os.ReadDir(filepath.Join(n.state, "uppers", "run")); err != nil || len(entries) > 0 {
		t.Errorf("uppers of runs: %v %v", entries, err)
	}
	// The engine asks with the IDs that it had before.
	if _, err := os.Stat(n.mount("m", "a") + "/x"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a run's file outlived the run: %v", err)
	}
	if got := read(t, n.mount("v", "b")+"/y"); got != "y" {
		t.Errorf("a volume's file holds %q", got)
	}
	n.unmount("m", "a")
	n.unmount("v", "b")
	n.mustMounts(0)
}

func TestFailedMountLeavesNothing(t *testing.T) {
	n := newNode(t)
	n.create("m")
	path := n.store.BlobPath(digest.FromString("one"))
	if err := os.Rename(path, path+".away"); err != nil {
		t.Fatal(err)
	}
	if _, err := n.Mount(t.Context(), "m", "a"); err == nil || !strings.Contains(err.Error(), "weights") {
		t.Errorf("got %v, want an error that names the file", err)
	}
	if err := os.Rename(path+".away", path); err != nil {
		t.Fatal(err)
	}
	if err := n.Remove(t.Context(), "m"); err != nil {
		t.Fatal(err)
	}
	n.empty()
}

func TestUsesAreRoots(t *testing.T) {
	n := newNode(t)
	remove := func() error {
		r, err := reference.Parse("m:1")
		if err != nil {
			t.Fatal(err)
		}
		c := gc.Collector{Store: n.store, Node: "test", Sources: n.Sources()}
		_, err = c.Remove(t.Context(), []reference.Reference{r}, gc.Options{DryRun: true})
		return err
	}
	if err := remove(); err != nil {
		t.Fatal(err)
	}
	n.create("m")
	if err := remove(); !errors.Is(err, store.ErrInUse) {
		t.Errorf("a volume's record: got %v, want ErrInUse", err)
	}
	dir := n.mount("m", "a")
	stop := container(t, dir)
	// All that Larder knows is lost; the kernel still shows the mount.
	if err := os.Remove(n.recordPath("m")); err != nil {
		t.Fatal(err)
	}
	if err := remove(); !errors.Is(err, store.ErrInUse) {
		t.Errorf("a mount's record: got %v, want ErrInUse", err)
	}
	if err := os.RemoveAll(n.mountsDir("m")); err != nil {
		t.Fatal(err)
	}
	if err := remove(); !errors.Is(err, store.ErrInUse) {
		t.Errorf("a mount without a record: got %v, want ErrInUse", err)
	}
	n.unmountAll()
	if err := remove(); !errors.Is(err, store.ErrInUse) {
		t.Errorf("a copy in another namespace alone: got %v, want ErrInUse", err)
	}
	stop()
	if err := remove(); err != nil {
		t.Errorf("when nobody uses it: %v", err)
	}
	write(t, n.recordPath("broken"), "")
	if err := remove(); !errors.Is(err, ErrDamaged) {
		t.Errorf("a record that cannot be read: got %v, want ErrDamaged", err)
	}
}

func TestDamagedRecordsAreLoudAndKnown(t *testing.T) {
	n := newNode(t)
	n.create("m")
	good := read(t, n.recordPath("m"))
	for what, content := range map[string]string{
		"empty": "", "cut short": good[:len(good)/2], "another's": strings.ReplaceAll(good, `"m"`, `"x"`),
		"a later format": strings.ReplaceAll(good, `"format": 1`, `"format": 2`), "unknown field": strings.Replace(good, `{`, `{"more":1,`, 1),
	} {
		write(t, n.recordPath("m"), content)
		if v, err := n.Get(t.Context(), "m"); err != nil || v.Damaged == "" {
			t.Errorf("%s: get: %+v %v; an engine must find the volume", what, v, err)
		}
		if names, err := n.List(t.Context()); err != nil || !slices.Contains(names, "m") {
			t.Errorf("%s: list: %v %v", what, names, err)
		}
		if _, err := n.Mount(t.Context(), "m", "a"); !errors.Is(err, ErrDamaged) {
			t.Errorf("%s: mount: got %v, want ErrDamaged", what, err)
		}
		if err := n.Create(t.Context(), "m", nil); !errors.Is(err, ErrDamaged) {
			t.Errorf("%s: create: got %v, want ErrDamaged", what, err)
		}
		if got := read(t, n.recordPath("m")); got != content {
			t.Errorf("%s: the record was changed to %q", what, got)
		}
	}
}

func TestManualMount(t *testing.T) {
	n := newNode(t)
	target := filepath.Join(t.TempDir(), "here")
	if err := n.MountAt(t.Context(), "", map[string]string{"model": "m"}, target); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = exec.Command("umount", "-l", target).Run() })
	if got := read(t, target+"/weights"); got != "one" {
		t.Errorf("weights hold %q", got)
	}
	if err := n.MountAt(t.Context(), "", map[string]string{"model": "m"}, target); err == nil {
		t.Error("mounted over a mount")
	}
	if err := n.Reap(t.Context()); err != nil {
		t.Fatal(err)
	}
	all, err := n.Mounts(t.Context())
	if err != nil || len(all) != 1 || all[0].Target != target {
		t.Fatalf("mounts: %+v %v", all, err)
	}
	if err := n.UnmountAt(t.Context(), target); err != nil {
		t.Fatal(err)
	}
	if err := n.UnmountAt(t.Context(), target); !errors.Is(err, ErrNotMounted) {
		t.Errorf("second unmount: got %v, want ErrNotMounted", err)
	}
	if _, err := os.Stat(target); err != nil {
		t.Errorf("the person's folder is gone: %v", err)
	}
	n.empty()
}

func TestSizeLimitsWhatIsWritten(t *testing.T) {
	n := newNode(t)
	n.create("small", "model=m", "size=16MiB")
	n.create("memory", "model=m", "size=1MiB", "upper=tmpfs")
	for _, name := range []string{"small", "memory"} {
		dir := n.mount(name, "a")
		err := os.WriteFile(dir+"/big", make([]byte, 20<<20), 0o644)
		if err == nil {
			t.Errorf("%s: 20 MiB were written", name)
		}
		n.unmount(name, "a")
		if err := n.Remove(t.Context(), name); err != nil {
			t.Fatal(err)
		}
	}
	n.empty()
}

// A catalog of an empty store is an empty hub cache: the first container
// downloads into it.
func TestCatalogOfAnEmptyStore(t *testing.T) {
	testenv.NeedRoot(t)
	n := &node{t: t, root: t.TempDir()}
	n.reopen("")
	t.Cleanup(n.unmountAll)
	n.create("hub", "model=*")
	dir := n.mount("hub", "a")
	write(t, dir+"/new", "x")
	n.unmount("hub", "a")
	n.publish("m:1", "one")
	if _, err := os.Stat(n.mount("hub", "b") + "/models--m"); err != nil {
		t.Errorf("the next run does not see what came in: %v", err)
	}
	n.unmount("hub", "b")
}

// What this host can never mount is refused when it is made, and the refusal
// says what can be.
func TestVolumesThatCanNeverBeMountedAreRefused(t *testing.T) {
	n := newNode(t)
	n.publish("m:2", "two")
	refused := func(raw string, words ...string) {
		t.Helper()
		err := n.Create(t.Context(), "v", options(raw))
		if !errors.Is(err, ErrInvalid) && !errors.Is(err, view.ErrInvalid) {
			t.Errorf("%s: %v, want a refusal", raw, err)
			return
		}
		for _, word := range words {
			if !strings.Contains(err.Error(), word) {
				t.Errorf("%s: %v, want that it says %q", raw, err, word)
			}
		}
	}
	refused("model=m:1,m:2", "layout", "hf")
	refused("model=m;size=2MiB", "16 MiB", "larder doctor")
	if err := n.Create(t.Context(), "memory", options("model=m;size=2MiB;upper=tmpfs")); err != nil {
		t.Errorf("2 MiB of memory: %v", err)
	}
	n.method = view.HardLink
	refused("model=m;uid=7", "uid", "hard links")
	refused("model=m;mode=0600", "mode", "hard links")
	if err := n.Create(t.Context(), "plain", options("model=m")); err != nil {
		t.Errorf("without them: %v", err)
	}
	n.mustVolumes("memory", "plain")
}

func TestManyMountsInParallel(t *testing.T) {
	n := newNode(t)
	n.create("m")
	n.create("v", "model=m", "scope=volume")
	var wg sync.WaitGroup
	for i := range 24 {
		wg.Go(func() {
			name := []string{"m", "v"}[i%2]
			id := fmt.Sprint("id", i)
			dir, err := n.Mount(context.Background(), name, id)
			if err != nil {
				t.Error(err)
				return
			}
			if data, err := os.ReadFile(dir + "/weights"); err != nil || string(data) != "one" {
				t.Errorf("%s: %q %v", dir, data, err)
			}
			if err := n.Unmount(context.Background(), name, id); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	for _, name := range []string{"m", "v"} {
		if err := n.Remove(t.Context(), name); err != nil {
			t.Fatal(err)
		}
	}
	n.empty()
}

func TestSecondWriterOfAnUpperIsRefusedAfterItsRecordIsGone(t *testing.T) {
	n := newNode(t)
	n.create("v", "model=m", "scope=volume")
	dir := n.mount("v", "a")
	container(t, dir)
	if err := os.RemoveAll(n.mountsDir("v")); err != nil {
		t.Fatal(err)
	}
	n.unmountAll()
	if _, err := n.Mount(t.Context(), "v", "b"); !errors.Is(err, ErrInUse) {
		t.Errorf("got %v, want ErrInUse", err)
	}
}

func TestOrphanedWritesAreNotTakenForANewVolume(t *testing.T) {
	n := newNode(t)
	n.create("v", "model=m", "scope=volume")
	write(t, n.mount("v", "a")+"/work", "months of it")
	n.unmount("v", "a")
	if err := os.Remove(n.recordPath("v")); err != nil {
		t.Fatal(err)
	}
	if err := n.Create(t.Context(), "v", map[string]string{"model": "m"}); err == nil {
		t.Error("a new volume was made over what an earlier one wrote")
	}
	if err := n.Sweep(t.Context()); err != nil {
		t.Fatal(err)
	}
	if got := read(t, filepath.Join(n.volumeUpper("v"), "upper", "work")); got != "months of it" {
		t.Errorf("what was written is gone: %q", got)
	}
}

// sharesLock gives a name for a volume whose lock is that of another one.
func sharesLock(with string) string {
	for i := 0; ; i++ {
		if name := fmt.Sprint("other", i); lockName(name) == lockName(with) {
			return name
		}
	}
}

func TestDeletionHoldsNobodyUp(t *testing.T) {
	n := newNode(t)
	other := sharesLock("m")
	n.create("m")
	n.create(other, "model=m")
	dir := n.mount("m", "a")
	for i := range 20_000 {
		write(t, fmt.Sprint(dir, "/", i), "")
	}
	done := make(chan error)
	go func() { done <- n.Unmount(context.Background(), "m", "a") }()
	for exists(n.runUpper("m", "a")) {
		time.Sleep(time.Millisecond)
	}
	n.mount(other, "b")
	n.mount("m", "a") // the same run once more
	if len(n.dropped()) == 0 {
		t.Error("a mount has waited until another volume's files were deleted")
	}
	if err := <-done; err != nil {
		t.Error(err)
	}
	if left := n.dropped(); len(left) > 0 {
		t.Errorf("unmount answers, and %v is left", left)
	}
	n.unmount("m", "a")
	n.unmount(other, "b")
}

// What cannot be deleted now is in nobody's way, and is deleted later.
func TestDeletionThatFailsIsFinishedLater(t *testing.T) {
	n := newNode(t)
	n.create("m")
	dir := n.mount("m", "a")
	write(t, dir+"/x", "x")
	inside := filepath.Join(n.runUpper("m", "a"), "upper", "held")
	if err := os.Mkdir(inside, 0o755); err != nil {
		t.Fatal(err)
	}
	run(t, "mount", "-t", "tmpfs", "x", inside)
	n.unmount("m", "a")
	if err := n.Reap(t.Context()); err == nil {
		t.Error("reap says nothing of what it cannot delete")
	}
	n.mount("m", "a")
	n.unmount("m", "a")
	for _, dir := range n.dropped() {
		run(t, "umount", filepath.Join(n.state, uppersDir, droppedDir, dir, "upper", "held"))
	}
	if err := n.Reap(t.Context()); err != nil {
		t.Error(err)
	}
	if err := n.Remove(t.Context(), "m"); err != nil {
		t.Error(err)
	}
	n.empty()
}

func TestWaitForALockThatIsHeldTellsWhatToDo(t *testing.T) {
	n := newNode(t)
	n.create("m")
	unlock, err := n.lock(t.Context(), "m")
	if err != nil {
		t.Fatal(err)
	}
	defer unlock()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	_, err = n.Mount(ctx, "m", "a")
	var hinted interface{ Hint() string }
	if !errors.Is(err, context.DeadlineExceeded) || !errors.As(err, &hinted) {
		t.Errorf("%v, want that it took too long, and what to do", err)
	}
}

func TestMountIsFast(t *testing.T) {
	n := newNode(t)
	n.create("m")
	n.mount("m", "warm")
	begin := time.Now()
	const times = 20
	for i := range times {
		n.mount("m", fmt.Sprint(i))
	}
	// The exact figure is make bench's; this only finds a download, a scan of
	// all processes or a build of the view on the path.
	if took := time.Since(begin) / times; took > 50*time.Millisecond {
		t.Errorf("a mount takes %v", took)
	}
	for i := range times {
		n.unmount("m", fmt.Sprint(i))
	}
	n.unmount("m", "warm")
}
