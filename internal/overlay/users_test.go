package overlay

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/larder-project/larder/internal/testenv"
	"github.com/larder-project/larder/internal/view"
)

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

func TestUsersInOtherNamespaces(t *testing.T) {
	h := newHost(t, testenv.LoopFS(t, "ext4", 64<<20).Dir)
	m := h.model(map[string][]byte{"f": []byte("data")})
	method := methods(t)[0]
	dir := h.view(view.Spec{Models: []view.Model{m}}, method)
	one, _ := h.mount(dir, method, Limit{})
	two, _ := h.mount(dir, method, Limit{})
	devOne, err := DeviceOf(one.Target)
	if err != nil {
		t.Fatal(err)
	}
	devTwo, err := DeviceOf(two.Target)
	if err != nil {
		t.Fatal(err)
	}
	if devOne == devTwo {
		t.Fatalf("two mounts have the device %v", devOne)
	}
	bind := h.target()
	// The shell stays, so that the namespace has two processes.
	a := elsewhere(t, "mount --bind "+one.Target+" "+bind+"; umount "+two.Target+"; sleep 1000; :")
	waitFor(t, func() bool {
		return strings.Contains(mountsOf(t, a.Process.Pid), bind) && !strings.Contains(mountsOf(t, a.Process.Pid), two.Target)
	})

	got, err := Users(t.Context(), false, devOne, devTwo)
	if err != nil {
		t.Fatal(err)
	}
	if len(got[devOne]) != 2 || len(got[devTwo]) != 1 {
		t.Fatalf("users of one: %+v, of two: %+v", got[devOne], got[devTwo])
	}
	for _, u := range got[devTwo] {
		if !slices.Contains(u.PIDs, os.Getpid()) || !cmp.Equal(u.Mountpoints, []string{two.Target}) {
			t.Errorf("the only user of the second mount is %+v", u)
		}
	}

	got, err = Users(t.Context(), true, devOne, devTwo)
	if err != nil {
		t.Fatal(err)
	}
	if len(got[devOne]) != 1 || len(got[devTwo]) != 0 {
		t.Fatalf("without our own: users of one: %+v, of two: %+v", got[devOne], got[devTwo])
	}
	u := got[devOne][0]
	if !slices.Contains(u.PIDs, a.Process.Pid) || len(u.PIDs) < 2 || slices.Contains(u.PIDs, os.Getpid()) {
		t.Errorf("processes %v, want %d and its child", u.PIDs, a.Process.Pid)
	}
	slices.Sort(u.Mountpoints)
	want := []string{one.Target, bind}
	slices.Sort(want)
	if d := cmp.Diff(want, u.Mountpoints); d != "" {
		t.Errorf("mountpoints (-want +got):\n%s", d)
	}

	// Our own unmount leaves the other namespace's copy.
	if err := Unmount(one.Target); err != nil {
		t.Fatal(err)
	}
	got, err = Users(t.Context(), false, devOne)
	if err != nil || len(got[devOne]) != 1 {
		t.Errorf("after our unmount: %+v, %v", got, err)
	}
	// The child goes with its group.
	_ = syscall.Kill(-a.Process.Pid, syscall.SIGKILL)
	_ = a.Wait()
	waitFor(t, func() bool {
		got, err = Users(t.Context(), false, devOne)
		return err == nil && len(got[devOne]) == 0
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

// fakeProc makes a folder that looks like /proc.
func fakeProc(t *testing.T, files map[string]string) string {
	t.Helper()
	dir := t.TempDir()
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

func TestUsersAsksOneProcessOfEachNamespace(t *testing.T) {
	t.Parallel()
	line := strings.ReplaceAll(mountLine, "%s", `/with\040space`)
	proc := fakeProc(t, map[string]string{
		"thread-self/ns/mnt":   "->mnt:[1]",
		"1/task/1/ns/mnt":      "->mnt:[1]",
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
		"11/task/11/comm":      "a zombie has no namespace",
		"12/comm":              "has ended altogether",
		"uptime":               "1",
	})
	dev := Device{0, 77}
	got, err := users(t.Context(), proc, true, []Device{dev, {0, 78}})
	if err != nil {
		t.Fatal(err)
	}
	points := []string{"/with space"}
	want := map[Device][]User{dev: {{2, []int{7, 8}, points}, {3, []int{9}, points}, {4, []int{13, 14, 15}, points}}}
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("users (-want +got):\n%s", d)
	}
}

func TestUsersOfAnUnreadableProcIsAnError(t *testing.T) {
	t.Parallel()
	dev := Device{0, 77}
	for name, files := range map[string]map[string]string{
		"empty":           {"thread-self/ns/mnt": "->mnt:[9]"},
		"no process":      {"thread-self/ns/mnt": "->mnt:[9]", "uptime": "1"},
		"table cut short": {"thread-self/ns/mnt": "->mnt:[9]", "1/task/1/ns/mnt": "->mnt:[2]", "1/task/1/mountinfo": "36 35 0:77 / /x rw"},
		"strange link":    {"thread-self/ns/mnt": "->mnt:[9]", "1/task/1/ns/mnt": "->nothing", "1/task/1/mountinfo": ""},
	} {
		got, err := users(t.Context(), fakeProc(t, files), false, []Device{dev})
		if err == nil {
			t.Errorf("%s: no error, but %v", name, got)
		}
	}
	if _, err := users(t.Context(), filepath.Join(t.TempDir(), "absent"), false, []Device{dev}); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("absent: %v", err)
	}
	if _, err := users(t.Context(), fakeProc(t, map[string]string{"1/comm": "x"}), true, []Device{dev}); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("own namespace not known: %v", err)
	}
}

// Without the right to trace others, namespaces have no number, but their
// mounts are known, and one that is ours is not taken for another.
func TestUsersWithoutTheRightToTrace(t *testing.T) {
	h := newHost(t, testenv.LoopFS(t, "ext4", 64<<20).Dir)
	method := methods(t)[0]
	dir := h.view(view.Spec{Models: []view.Model{h.model(map[string][]byte{"f": []byte("data")})}}, method)
	mt, _ := h.mount(dir, method, Limit{})
	dev, err := DeviceOf(mt.Target)
	if err != nil {
		t.Fatal(err)
	}
	self := filepath.Join(h.root, "self.test")
	b, err := os.ReadFile("/proc/self/exe")
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(self, b, 0o755); err != nil {
		t.Fatal(err)
	}
	ask := func() string {
		t.Helper()
		out, err := as(65534, `LARDER_TEST_DEVICE="$2" "$1" -test.v -test.run '^TestUsersPrinted$'`, self, dev.String())
		if err != nil {
			t.Fatalf("%v\n%s", err, out)
		}
		return string(out)
	}
	if out := ask(); !strings.Contains(out, "users: 1\n") || !strings.Contains(out, "others: 0\n") {
		t.Errorf("mounted here only:\n%s", out)
	}
	a := elsewhere(t, "sleep 1000; :")
	if out := ask(); !strings.Contains(out, "users: 2\n") || !strings.Contains(out, "others: 1\n") || !strings.Contains(out, strconv.Itoa(a.Process.Pid)) {
		t.Errorf("mounted here and elsewhere:\n%s", out)
	}
}

// TestUsersPrinted is what TestUsersWithoutTheRightToTrace runs as another user.
func TestUsersPrinted(t *testing.T) {
	var dev Device
	if _, err := fmt.Sscanf(os.Getenv("LARDER_TEST_DEVICE"), "%d:%d", &dev.Major, &dev.Minor); err != nil {
		dev = Device{} // when run by itself: a device that no mount has
	}
	all, err := Users(t.Context(), false, dev)
	if err != nil {
		t.Fatal(err)
	}
	others, err := Users(t.Context(), true, dev)
	if err != nil {
		t.Fatal(err)
	}
	fmt.Printf("users: %d\nothers: %d\n%+v\n", len(all[dev]), len(others[dev]), all)
	if dev == (Device{}) && len(all) != 0 {
		t.Error("a device that no mount has has users")
	}
}
