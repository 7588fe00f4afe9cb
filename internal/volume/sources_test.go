package volume_test

import (
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"

	"github.com/larder-project/larder/internal/usage"
	"github.com/larder-project/larder/internal/usage/usagetest"
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
// said that it is ready.
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
	t.Parallel()
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
