package mounttable

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"

	"github.com/larder-project/larder/internal/testenv"
)

func TestMain(m *testing.M) { os.Exit(testenv.PrivateMounts(m.Run)) }

// elsewhere starts processes in a mount namespace of their own, with a copy of
// all mounts, and waits until it is made.
func elsewhere(t *testing.T, script string) *exec.Cmd {
	t.Helper()
	testenv.NeedPrograms(t, "unshare")
	cmd := exec.Command("unshare", "--mount", "--propagation", "private", "sh", "-c", "echo ready; "+script)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL)
		_ = cmd.Wait()
	})
	buf := make([]byte, 16)
	if n, err := out.Read(buf); err != nil || string(buf[:n]) != "ready\n" {
		t.Fatalf("%q, %v", buf[:n], err)
	}
	return cmd
}

// shown is a namespace as tests compare it.
type shown struct {
	ID     uint64
	PIDs   []int
	Points []string
}

func simple(spaces []Namespace) []shown {
	var out []shown
	for _, ns := range spaces {
		one := shown{ID: ns.ID, PIDs: ns.PIDs}
		for _, m := range ns.Mounts {
			one.Points = append(one.Points, m.Mountpoint)
		}
		out = append(out, one)
	}
	return out
}

// tmpfs mounts a file system of its own, whose source is its name.
func tmpfs(t *testing.T) (dir, name string) {
	t.Helper()
	testenv.NeedRoot(t)
	dir = t.TempDir()
	name = "test" + strings.ReplaceAll(dir, "/", "-")
	if err := unix.Mount(name, dir, "tmpfs", 0, ""); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Unmount(dir, unix.MNT_DETACH) })
	return dir, name
}

func bySource(name string) func(*mountinfo.Info) bool {
	return func(i *mountinfo.Info) bool { return i.Source == name }
}

func TestReadFindsCopiesInOtherNamespaces(t *testing.T) {
	one, nameOne := tmpfs(t)
	two, nameTwo := tmpfs(t)
	bind := t.TempDir()
	a := elsewhere(t, "sleep 1000 & mount --bind "+one+" "+bind+"; umount "+two+"; wait")
	waitFor(t, func() bool {
		return strings.Contains(mountsOf(t, a.Process.Pid), bind) && !strings.Contains(mountsOf(t, a.Process.Pid), two+" ")
	})

	spacesOne, err := Read(t.Context(), Query{Want: bySource(nameOne), Contains: nameOne})
	if err != nil {
		t.Fatal(err)
	}
	spacesTwo, err := Read(t.Context(), Query{Want: bySource(nameTwo)})
	if err != nil {
		t.Fatal(err)
	}
	if len(spacesOne) != 2 || len(spacesTwo) != 1 {
		t.Fatalf("namespaces of one: %+v, of two: %+v", simple(spacesOne), simple(spacesTwo))
	}
	if u := simple(spacesTwo)[0]; !spacesTwo[0].Own || !slices.Contains(u.PIDs, os.Getpid()) || !cmp.Equal(u.Points, []string{two}) {
		t.Errorf("the only namespace of the second is %+v", u)
	}

	theirs := slices.DeleteFunc(spacesOne, func(ns Namespace) bool { return ns.Own })
	if len(theirs) != 1 {
		t.Fatalf("besides our own: %+v", simple(theirs))
	}
	u := simple(theirs)[0]
	if !slices.Contains(u.PIDs, a.Process.Pid) || len(u.PIDs) < 2 || slices.Contains(u.PIDs, os.Getpid()) {
		t.Errorf("processes %v, want %d and its child", u.PIDs, a.Process.Pid)
	}
	slices.Sort(u.Points)
	want := []string{one, bind}
	slices.Sort(want)
	if d := cmp.Diff(want, u.Points); d != "" {
		t.Errorf("mountpoints (-want +got):\n%s", d)
	}

	// Our own unmount leaves the other namespace's copy.
	if err := unix.Unmount(one, 0); err != nil {
		t.Fatal(err)
	}
	spacesOne, err = Read(t.Context(), Query{Want: bySource(nameOne)})
	if err != nil || len(spacesOne) != 1 {
		t.Errorf("after our unmount: %+v, %v", simple(spacesOne), err)
	}
	// The child goes with its group.
	_ = syscall.Kill(-a.Process.Pid, syscall.SIGKILL)
	_ = a.Wait()
	waitFor(t, func() bool {
		spacesOne, err = Read(t.Context(), Query{Want: bySource(nameOne)})
		return err == nil && len(spacesOne) == 0
	})
}

func mountsOf(t *testing.T, pid int) string {
	t.Helper()
	b, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(pid), "mountinfo"))
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

func waitFor(t *testing.T, ok func() bool) {
	t.Helper()
	for range 200 {
		if ok() {
			return
		}
		time.Sleep(20 * time.Millisecond)
	}
	t.Fatal("waited in vain")
}

var leader = regexp.MustCompile(`^(\d+)/task/(\d+)/(.*)$`)

// fakeProc makes a folder that looks like /proc.
func fakeProc(t *testing.T, files map[string]string) string {
	t.Helper()
	dir := t.TempDir()
	for name, content := range files {
		// A thread of the process's own number is the process itself.
		if m := leader.FindStringSubmatch(name); m != nil && m[1] == m[2] {
			files[m[1]+"/"+m[3]] = content
		}
	}
	for name, content := range files {
		path := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		var err error
		if target, ok := strings.CutPrefix(content, "->"); ok {
			err = os.Symlink(target, path)
		} else {
			err = os.WriteFile(path, []byte(content), 0o644)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

const mountLine = "36 35 0:77 / %s rw,nosuid - overlay larder rw\n"

func byDevice(minor int) func(*mountinfo.Info) bool {
	return func(i *mountinfo.Info) bool { return i.Major == 0 && i.Minor == minor }
}

func TestReadAsksOneProcessOfEachNamespace(t *testing.T) {
	t.Parallel()
	line := strings.ReplaceAll(mountLine, "%s", `/with\040space`)
	proc := fakeProc(t, map[string]string{
		"thread-self/ns/mnt":   "->mnt:[1]",
		"1/task/1/ns/mnt":      "->mnt:[1]",
		"1/task/1/root":        "->/",
		"1/task/1/mountinfo":   line,
		"7/task/7/ns/mnt":      "->mnt:[2]", // its table is gone: it has ended
		"8/task/8/ns/mnt":      "->mnt:[2]",
		"8/task/8/mountinfo":   line,
		"9/task/9/ns/mnt":      "->mnt:[1]",
		"9/task/10/ns/mnt":     "->mnt:[3]", // a thread in a namespace of its own
		"9/task/10/mountinfo":  line,
		"13/task/13/ns/mnt":    "->mnt:[4]", // has changed its root, and sees little
		"13/task/13/root":      "->/var/empty",
		"13/task/13/mountinfo": "40 35 0:1 / / rw - ext4 x rw\n",
		"14/task/14/ns/mnt":    "->mnt:[4]",
		"14/task/14/root":      "->/",
		"14/task/14/mountinfo": line,
		"15/task/15/ns/mnt":    "->mnt:[4]", // is not asked: all is known
		"15/task/15/mountinfo": "not a mount table",
		"16/task/16/ns/mnt":    "->mnt:[5]", // shows nothing that is wanted
		"16/task/16/root":      "->/",
		"16/task/16/mountinfo": "50 35 0:1 / / rw - ext4 x rw\n",
		"11/task/11/comm":      "a zombie has no namespace",
		"12/comm":              "has ended altogether",
		"uptime":               "1",
	})
	got, err := Read(t.Context(), Query{Proc: proc, Want: byDevice(77)})
	if err != nil {
		t.Fatal(err)
	}
	points := []string{"/with space"}
	want := []shown{{1, []int{1, 9}, points}, {2, []int{7, 8}, points}, {3, []int{9}, points}, {4, []int{13, 14, 15}, points}}
	if d := cmp.Diff(want, simple(got)); d != "" {
		t.Errorf("namespaces (-want +got):\n%s", d)
	}
	if got, err := Read(t.Context(), Query{Proc: proc, Want: byDevice(77), Contains: "no such text"}); err != nil || len(got) > 0 {
		t.Errorf("tables without the text that all wanted ones have: %+v, %v", simple(got), err)
	}
}

func TestAnUnreadableProcIsAnError(t *testing.T) {
	t.Parallel()
	for name, files := range map[string]map[string]string{
		"empty":           {"thread-self/ns/mnt": "->mnt:[9]"},
		"no process":      {"thread-self/ns/mnt": "->mnt:[9]", "uptime": "1"},
		"table cut short": {"thread-self/ns/mnt": "->mnt:[9]", "1/task/1/ns/mnt": "->mnt:[2]", "1/task/1/mountinfo": "36 35 0:77 / /x rw"},
		"strange link":    {"thread-self/ns/mnt": "->mnt:[9]", "1/task/1/ns/mnt": "->nothing", "1/task/1/mountinfo": ""},
	} {
		got, err := Read(t.Context(), Query{Proc: fakeProc(t, files), Want: byDevice(77)})
		if err == nil {
			t.Errorf("%s: no error, but %v", name, got)
		}
	}
	if _, err := Read(t.Context(), Query{Proc: filepath.Join(t.TempDir(), "absent"), Want: byDevice(77)}); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("absent: %v", err)
	}
	if _, err := Read(t.Context(), Query{Proc: fakeProc(t, map[string]string{"1/comm": "x"}), Want: byDevice(77)}); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("own namespace not known: %v", err)
	}
}

// A container may own its mount namespace by a user namespace of its own.
func TestNamespacesOfOtherUserNamespacesAreForeign(t *testing.T) {
	_, name := tmpfs(t)
	elsewhere(t, "sleep 1000; :")
	elsewhere(t, "unshare --user --map-root-user --mount sleep 1000; :")
	var got []bool
	waitFor(t, func() bool {
		spaces, err := Read(t.Context(), Query{Want: bySource(name)})
		got = nil
		for _, ns := range spaces {
			got = append(got, ns.Foreign)
		}
		return err == nil && len(got) == 4
	})
	// Ours, the two of elsewhere, and the one within.
	if n := len(slices.DeleteFunc(slices.Clone(got), func(foreign bool) bool { return !foreign })); n != 1 {
		t.Errorf("foreign: %v, want one", got)
	}
}

// Without the right to trace others, namespaces have no number, but their
// mounts are known, and one that is ours is not taken for another.
func TestReadWithoutTheRightToTrace(t *testing.T) {
	_, name := tmpfs(t)
	self := filepath.Join(t.TempDir(), "self.test")
	b, err := os.ReadFile("/proc/self/exe")
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(self, b, 0o755); err != nil {
		t.Fatal(err)
	}
	for dir := filepath.Dir(self); dir != filepath.Clean(os.TempDir()) && dir != "/"; dir = filepath.Dir(dir) {
		if err := os.Chmod(dir, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	ask := func() string {
		t.Helper()
		cmd := exec.Command(self, "-test.v", "-test.run", "^TestReadPrinted$")
		cmd.Env = append(os.Environ(), "LARDER_TEST_SOURCE="+name)
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
		out, err := cmd.CombinedOutput()
		if err != nil {
			t.Fatalf("%v\n%s", err, out)
		}
		return string(out)
	}
	if out := ask(); !strings.Contains(out, "all: 1\n") || !strings.Contains(out, "others: 0\n") {
		t.Errorf("mounted here only:\n%s", out)
	}
	a := elsewhere(t, "sleep 1000; :")
	if out := ask(); !strings.Contains(out, "all: 2\n") || !strings.Contains(out, "others: 1\n") || !strings.Contains(out, strconv.Itoa(a.Process.Pid)) {
		t.Errorf("mounted here and elsewhere:\n%s", out)
	}
}

// TestReadPrinted is what TestReadWithoutTheRightToTrace runs as another user.
func TestReadPrinted(t *testing.T) {
	name := os.Getenv("LARDER_TEST_SOURCE") // empty when run by itself: no mount has it
	if name == "" {
		name = "no mount has this source"
	}
	all, err := Read(t.Context(), Query{Want: bySource(name)})
	if err != nil {
		t.Fatal(err)
	}
	others := slices.DeleteFunc(slices.Clone(all), func(ns Namespace) bool { return ns.Own })
	fmt.Printf("all: %d\nothers: %d\n%+v\n", len(all), len(others), simple(all))
	if os.Getenv("LARDER_TEST_SOURCE") == "" && len(all) != 0 {
		t.Error("mounts that nobody made were found")
	}
}

// The place of a mount is what it covers, by whatever name: copies of one have
// the same, and a bind of the same file system elsewhere has another.
func TestPlaceIsWhatAMountCovers(t *testing.T) {
	dir, name := tmpfs(t)
	bind, tree := t.TempDir(), t.TempDir()
	elsewhere(t, fmt.Sprintf("mount --rbind %[3]s %[4]s; mount --bind %[1]s %[2]s; sleep 1000; :", dir, bind, filepath.Dir(dir), tree))
	at, err := PlaceOf(filepath.Dir(dir))
	if err != nil {
		t.Fatal(err)
	}
	at += "/" + filepath.Base(dir)
	var got []string
	waitFor(t, func() bool {
		spaces, err := Read(t.Context(), Query{Want: bySource(name)})
		if err != nil {
			t.Fatal(err)
		}
		got = nil
		for _, ns := range spaces {
			for _, m := range ns.Mounts {
				if !ns.Own {
					got = append(got, fmt.Sprint(m.Mountpoint, " ", ns.Place(m) == at))
				} else if ns.Place(m) != at {
					t.Errorf("our own mount at %s has the place %q, want %q", m.Mountpoint, ns.Place(m), at)
				}
			}
		}
		return len(got) == 3
	})
	want := []string{dir + " true", bind + " false", filepath.Join(tree, filepath.Base(dir)) + " true"}
	slices.Sort(want)
	slices.Sort(got)
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("is it a copy (-want +got):\n%s", d)
	}
}

func TestPlaceOfAFolderThatIsMountedOn(t *testing.T) {
	dir, _ := tmpfs(t)
	if err := os.Mkdir(filepath.Join(dir, "sub"), 0o755); err != nil {
		t.Fatal(err)
	}
	var st unix.Stat_t
	if err := unix.Stat(dir, &st); err != nil {
		t.Fatal(err)
	}
	at, err := PlaceOf(filepath.Join(dir, "sub"))
	if want := fmt.Sprintf("%d:%d:/sub", unix.Major(st.Dev), unix.Minor(st.Dev)); at != want || err != nil {
		t.Errorf("got %q, %v; want %q", at, err, want)
	}
}
