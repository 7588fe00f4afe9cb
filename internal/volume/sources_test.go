package volume_test

import (
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"

	"github.com/larder-project/larder/internal/gc"
	"github.com/larder-project/larder/internal/reference"
	"github.com/larder-project/larder/internal/store"
	"github.com/larder-project/larder/internal/usage"
	"github.com/larder-project/larder/internal/usage/usagetest"
	"github.com/larder-project/larder/internal/volume"
)

func sourceOf(t *testing.T, n *usagetest.Node, name string) usage.Source {
	t.Helper()
	for _, s := range n.Volumes.Sources() {
		if s.Name() == name {
			return s
		}
	}
	t.Fatalf("no source %s", name)
	return nil
}

// only finds the one file that a pattern means.
func only(t *testing.T, pattern string) string {
	t.Helper()
	found, err := filepath.Glob(pattern)
	if err != nil || len(found) != 1 {
		t.Fatalf("%s is %v (%v), want one file", pattern, found, err)
	}
	return found[0]
}

func TestRecordsAreASource(t *testing.T) {
	t.Parallel()
	usagetest.Run(t, func(t *testing.T, n *usagetest.Node) usagetest.Subject {
		return usagetest.Subject{
			Source: sourceOf(t, n, "volumes"),
			Use: func(t *testing.T) func() {
				n.Create(t, "qwen")
				if _, err := n.Volumes.Mount(t.Context(), "qwen", "run"); err != nil {
					t.Fatal(err)
				}
				return func() {
					if err := n.Volumes.Unmount(t.Context(), "qwen", "run"); err != nil {
						t.Error(err)
					}
					if err := n.Volumes.Remove(t.Context(), "qwen"); err != nil {
						t.Error(err)
					}
				}
			},
			Faults: map[string]func(*testing.T) func(){
				"a volume's record is empty": func(t *testing.T) func() {
					return usagetest.Write(t, only(t, n.Root+"/node/volumes/*.json"), "")
				},
				"a mount's record is cut short": func(t *testing.T) func() {
					return usagetest.Write(t, only(t, n.Root+"/node/mounts/*/qwen/*.json"), `{"format":1,"volume":"qw`)
				},
				"the folder of the mounts is gone": func(t *testing.T) func() {
					return away(t, only(t, n.Root+"/node/mounts/*"))
				},
			},
		}
	})
}

func TestMountTablesAreASource(t *testing.T) {
	t.Parallel()
	usagetest.Run(t, func(t *testing.T, n *usagetest.Node) usagetest.Subject {
		return usagetest.Subject{
			Source: sourceOf(t, n, "mounts"),
			Use: func(t *testing.T) func() {
				dir := filepath.Join(n.Root, "here")
				n.MountAt(t, dir)
				return func() { n.UnmountAt(t, dir) }
			},
			Faults: map[string]func(*testing.T) func(){
				"what a view shows is not known": func(t *testing.T) func() {
					return away(t, only(t, n.Root+"/node/views/*/*.json"))
				},
				"the record of a view is empty": func(t *testing.T) func() {
					return usagetest.Write(t, only(t, n.Root+"/node/views/*/*.json"), "")
				},
			},
		}
	})
}

// away takes a file or folder away, and returns what brings it back.
func away(t *testing.T, path string) (restore func()) {
	t.Helper()
	if err := os.Rename(path, path+".away"); err != nil {
		t.Fatal(err)
	}
	return func() {
		if err := os.Rename(path+".away", path); err != nil {
			t.Error(err)
		}
	}
}

// process starts a shell script and returns its number once the script has
// said that it is ready. In a mount namespace of its own it holds a copy of
// every mount of this package's tests, and is a user of each as long as it
// lives: no test that makes one runs beside others.
func process(t *testing.T, namespaces uintptr, script string) int {
	t.Helper()
	cmd := exec.Command("sh", "-c", script)
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL, Cloneflags: namespaces}
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
	if _, err := out.Read(make([]byte, 16)); err != nil {
		t.Fatalf("%s: %v", script, err)
	}
	return cmd.Process.Pid
}

func TestVersionsOfAProcess(t *testing.T) {
	n := usagetest.NewNode(t)
	dir := filepath.Join(n.Root, "here")
	n.MountAt(t, dir)
	used := []digest.Digest{n.Used}
	for name, tc := range map[string]struct {
		namespaces uintptr
		script     string
		want       []digest.Digest
	}{
		"in another mount namespace": {unix.CLONE_NEWNS, "echo ready; exec sleep 1000", used},
		"in another that shows none": {unix.CLONE_NEWNS, "umount -l " + dir + "; echo ready; exec sleep 1000", nil},
		"here, with a file open":     {0, "exec 3<" + dir + "/weights; echo ready; exec sleep 1000", used},
		"here, in a folder of it":    {0, "cd " + dir + "; echo ready; exec sleep 1000", used},
		"here, with nothing of it":   {0, "echo ready; exec sleep 1000", nil},
	} {
		t.Run(name, func(t *testing.T) {
			pid := process(t, tc.namespaces, tc.script)
			got, err := n.Volumes.VersionsOfProcess(pid)
			if err != nil || !slices.Equal(got, tc.want) {
				t.Errorf("%v (%v), want %v", got, err, tc.want)
			}
		})
	}
	t.Run("here, with a mapping alone", func(t *testing.T) {
		f, err := os.Open(dir + "/weights")
		if err != nil {
			t.Fatal(err)
		}
		data, err := unix.Mmap(int(f.Fd()), 0, 4, unix.PROT_READ, unix.MAP_SHARED)
		f.Close()
		if err != nil {
			t.Fatal(err)
		}
		got, err := n.Volumes.VersionsOfProcess(os.Getpid())
		if err != nil || !slices.Equal(got, used) {
			t.Errorf("%v (%v), want %v", got, err, used)
		}
		if err := unix.Munmap(data); err != nil {
			t.Fatal(err)
		}
		if got, err := n.Volumes.VersionsOfProcess(os.Getpid()); err != nil || len(got) > 0 {
			t.Errorf("without the mapping: %v (%v)", got, err)
		}
	})
	t.Run("that has ended", func(t *testing.T) {
		if got, err := n.Volumes.VersionsOfProcess(1 << 30); err != nil || len(got) > 0 {
			t.Errorf("%v (%v)", got, err)
		}
	})
	t.Run("that shows a view without a record", func(t *testing.T) {
		pid := process(t, unix.CLONE_NEWNS, "echo ready; exec sleep 1000")
		defer away(t, only(t, n.Root+"/node/views/*/*.json"))()
		if got, err := n.Volumes.VersionsOfProcess(pid); err == nil || !strings.Contains(err.Error(), "record") {
			t.Errorf("%v (%v), want an error", got, err)
		}
	})
}

func TestPlacesOfVolumesAndPaths(t *testing.T) {
	t.Parallel()
	n := usagetest.NewNode(t)
	n.Create(t, "qwen")
	dir := filepath.Join(n.Root, "here")
	n.MountAt(t, dir)
	p, err := n.Volumes.Places()
	if err != nil {
		t.Fatal(err)
	}
	for what, want := range map[string]bool{
		dir: true, dir + "/": true, dir + "/sub/file": true, dir + "/../here": true,
		dir + "er": false, n.Root: false, "/": false, "here": false, "": false,
	} {
		got, ok, err := p.AtPath(what)
		if err != nil || ok != want || ok && !slices.Contains(got, n.Used) {
			t.Errorf("at %q: %v, %v (%v), want %v", what, got, ok, err, want)
		}
	}
	for name, want := range map[string]bool{"qwen": true, "other": false, "../qwen": false} {
		got, ok, err := p.OfVolume(name)
		if err != nil || ok != want || ok && !slices.Contains(got, n.Used) {
			t.Errorf("of %q: %v, %v (%v), want %v", name, got, ok, err, want)
		}
	}
}

// pidNamespaceVariable is the state, for a process of
// TestNothingIsRemovedWhereContainersAreOutOfSight.
const pidNamespaceVariable = "LARDER_TEST_PID_NAMESPACE"

// In a PID namespace of its own, as a sidecar in a container that was not given
// the host's, a process sees neither the containers nor the mounts that the host
// made for them: whatever the propagation of its own mounts, it removes nothing.
func TestNothingIsRemovedWhereContainersAreOutOfSight(t *testing.T) {
	if root := os.Getenv(pidNamespaceVariable); root != "" {
		outOfSight(t, root)
		return
	}
	n := usagetest.NewNode(t)
	dir, bind := filepath.Join(n.Root, "here"), t.TempDir()
	n.MountAt(t, dir)
	container := process(t, unix.CLONE_NEWNS, "mount --make-rprivate / && mount --bind "+dir+" "+bind+" && umount "+dir+" && echo ready && exec sleep 1000")
	n.UnmountAt(t, dir) // no record is left of it
	for _, propagation := range []string{"shared", "slave", "private"} {
		cmd := exec.Command("unshare", "--pid", "--fork", "--mount", "--propagation", propagation, "--mount-proc",
			os.Args[0], "-test.v", "-test.run=^"+t.Name()+"$")
		cmd.Env = append(os.Environ(), pidNamespaceVariable+"="+n.Root)
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Errorf("%s: %v\n%s", propagation, err, out)
		}
	}
	if got, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(container), "root", bind, "weights")); err != nil || string(got) != "used:1" {
		t.Errorf("the container reads %q, %v", got, err)
	}
}

func outOfSight(t *testing.T, root string) {
	st, err := store.Open(filepath.Join(root, "store"))
	if err != nil {
		t.Fatal(err)
	}
	c := volume.Config{Store: st, State: filepath.Join(root, "node"), Node: "test"}
	m, err := volume.Open(t.Context(), c)
	if err != nil {
		t.Fatal(err)
	}
	used, err := reference.Parse("used:1")
	if err != nil {
		t.Fatal(err)
	}
	collector := &gc.Collector{Store: st, Node: "test", Sources: m.Sources(), Views: m}
	_, err = collector.Remove(t.Context(), []reference.Reference{used}, gc.Options{})
	if err == nil || !strings.Contains(err.Error(), m.Blind()) || !strings.Contains(err.Error(), volume.BlindHint) {
		t.Errorf("removing what a container uses: %v; want that and why nothing is removed, and what to do", err)
	}

	// With an engine inside the same container, somebody has to say so.
	c.OwnPIDNamespace = true
	if m, err = volume.Open(t.Context(), c); err != nil {
		t.Fatal(err)
	}
	unused, err := reference.Parse("unused:1")
	if err != nil {
		t.Fatal(err)
	}
	collector.Sources, collector.Views = m.Sources(), m
	if _, err := collector.Remove(t.Context(), []reference.Reference{unused}, gc.Options{DryRun: true}); err != nil || m.Blind() != "" {
		t.Errorf("where all containers are in the same namespace: %v %s", err, m.Blind())
	}
}

// An overlay that has a view for its lower folder, as of podman's -v DIR:/m:O,
// holds it in no mount table, and the view's own mount can be unmounted under it. The
// version stays until that overlay has gone.
func TestAnOverlayOverAViewKeepsIt(t *testing.T) {
	t.Parallel()
	n := usagetest.NewNode(t)
	dir := filepath.Join(n.Root, "here")
	n.MountAt(t, dir)
	for _, d := range []string{"up", "work", "merged"} {
		if err := os.Mkdir(filepath.Join(n.Root, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	merged := filepath.Join(n.Root, "merged")
	options := "lowerdir=" + dir + ",upperdir=" + filepath.Join(n.Root, "up") + ",workdir=" + filepath.Join(n.Root, "work")
	if err := unix.Mount("overlay", merged, "overlay", 0, options); err != nil {
		t.Fatal(err)
	}
	mounted := true
	defer func() {
		if mounted {
			_ = unix.Unmount(merged, unix.MNT_DETACH)
		}
	}()
	inUse := func() bool {
		t.Helper()
		if err := n.Volumes.Reap(t.Context()); err != nil {
			t.Fatal(err)
		}
		uses, failed := usage.Gather(t.Context(), n.Volumes.Sources())
		if len(failed) > 0 {
			t.Fatal(failed[0])
		}
		return slices.ContainsFunc(uses, func(u usage.Use) bool { return u.Version == n.Used })
	}
	n.UnmountAt(t, dir) // what is held goes with who holds it: Reap sees to that
	if !inUse() {
		t.Error("nobody is said to use the version")
	}
	if got, err := os.ReadFile(filepath.Join(merged, "weights")); err != nil || string(got) != "used:1" {
		t.Errorf("who uses it reads %q, %v", got, err)
	}
	if err := unix.Unmount(merged, 0); err != nil {
		t.Fatal(err)
	}
	mounted = false
	if inUse() {
		t.Error("the version is in use after the overlay has gone")
	}
}
