package gpu

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"

	"github.com/larder-project/larder/internal/testenv"
	"github.com/larder-project/larder/internal/usage"
	"github.com/larder-project/larder/internal/usage/usagetest"
)

func TestMain(m *testing.M) { os.Exit(testenv.PrivateMounts(m.Run)) }

// script is a helper that does what a shell script says.
type script struct {
	t    *testing.T
	path string
}

func newScript(t *testing.T) *script {
	s := &script{t, filepath.Join(t.TempDir(), "larder-gpu")}
	s.set(`echo '{"end":true,"processes":0}'`)
	return s
}

// set replaces the script.
func (s *script) set(text string) {
	s.t.Helper()
	if err := testenv.WriteProgram(s.path, "#!/bin/sh\n"+text+"\n"); err != nil {
		s.t.Fatal(err)
	}
}

// prints is a script that prints these lines and their end.
func prints(lines ...string) string {
	return "cat <<'END'\n" + strings.Join(append(lines, fmt.Sprintf(`{"end":true,"processes":%d}`, len(lines))), "\n") + "\nEND"
}

func line(gpu, pid int) string {
	return fmt.Sprintf(`{"gpu":%d,"uuid":"GPU-4cf8db2d-06c0-7d70-1a51-e59b25b2c16c","name":"NVIDIA H100","pid":%d,"memory":1048576}`, gpu, pid)
}

func TestSource(t *testing.T) {
	usagetest.Run(t, func(t *testing.T, n *usagetest.Node) usagetest.Subject {
		helper := newScript(t)
		var working string
		does := func(text string) func(*testing.T) func() {
			return func(*testing.T) func() {
				helper.set(text)
				return func() { helper.set(working) }
			}
		}
		return usagetest.Subject{
			Source: New(helper.path, n.Volumes.VersionsOfProcess),
			Use: func(t *testing.T) func() {
				dir := filepath.Join(n.Root, "here")
				n.MountAt(t, dir)
				// It sees the mount in a mount namespace of its own.
				cmd := exec.Command("sleep", "1000")
				cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL, Cloneflags: unix.CLONE_NEWNS}
				if err := cmd.Start(); err != nil {
					t.Fatal(err)
				}
				working = prints(line(0, cmd.Process.Pid), line(1, cmd.Process.Pid), line(1, os.Getpid()))
				helper.set(working)
				return func() {
					_ = cmd.Process.Kill()
					_ = cmd.Wait()
					n.UnmountAt(t, dir)
				}
			},
			Faults: map[string]func(*testing.T) func(){
				"it fails":                      does("echo 'the driver is of another version' >&2; exit 1"),
				"it crashes":                    does("kill -SEGV $$"),
				"a symbol is missing":           does("echo 'symbol lookup error' >&2; exit 127"),
				"it prints nothing":             does("true"),
				"it prints garbage":             does("echo garbage"),
				"it prints another object":      does("echo '{}'"),
				"its list is cut short":         does("echo '" + line(0, 1) + "'; exit 0"),
				"its list ends in a line":       does("printf '%s' '" + line(0, 1)[:40] + "'"),
				"its list has lost a line":      does(`echo '{"end":true,"processes":1}'`),
				"it goes on after the end":      does(prints() + "; echo '" + line(0, 1) + "'"),
				"a process has no number":       does(prints(line(0, 0))),
				"it hangs":                      does("exec sleep 1000"),
				"it hangs, and holds its pipes": does("sleep 1000 & exec sleep 1000"),
				"it prints without end":         does("exec yes '" + line(0, 1) + "'"),
				"it is no program":              does("\x7fELF"),
				"there is no driver: absent":    does("echo 'no driver' >&2; exit 3"),
			},
		}
	})
}

func TestProcessesOnGPUs(t *testing.T) {
	a := digest.FromString("a")
	helper := newScript(t)
	helper.set(prints(line(1, 12), line(0, 13)))
	s := New(helper.path, func(pid int) ([]digest.Digest, error) {
		if pid == 12 {
			return []digest.Digest{a}, nil
		}
		return nil, nil
	})
	got, err := s.Uses(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	want := []usage.Use{{Version: a, By: "process 12 on GPU 1 (NVIDIA H100)", PID: 12, GPU: "1 (NVIDIA H100)"}}
	if diff := cmp.Diff(want, got, cmp.FilterPath(func(p cmp.Path) bool { return p.Last().String() == ".Container" }, cmp.Ignore())); diff != "" {
		t.Errorf("uses (-want +got):\n%s", diff)
	}
}

func TestAHelperThatIsNotInstalledIsAbsentAndOneThatIsNamedMustBeThere(t *testing.T) {
	t.Setenv("PATH", t.TempDir())
	if _, err := New("", nil).Uses(t.Context()); !isAbsent(err) {
		t.Errorf("nowhere on the PATH: %v", err)
	}
	if _, err := New("/nonexistent/larder-gpu", nil).Uses(t.Context()); err == nil || isAbsent(err) {
		t.Errorf("the settings name it: %v", err)
	}
	helper := newScript(t)
	t.Setenv("PATH", filepath.Dir(helper.path)+":"+os.Getenv("PATH"))
	helper.set("echo '{\"end\":true,\"processes\":0}'")
	if _, err := New("", nil).Uses(t.Context()); err != nil {
		t.Errorf("on the PATH: %v", err)
	}
}

func isAbsent(err error) bool { return errors.Is(err, usage.ErrAbsent) }

// A process in an uninterruptible sleep is not there for tests; one that holds
// the pipes of a killed helper for longer than it may is left behind alike.
func TestAHelperThatCannotBeKilledIsNotStartedAgain(t *testing.T) {
	helper := newScript(t)
	s := New(helper.path, nil)
	left := &run{cmd: exec.Command(helper.path), done: make(chan struct{})}
	if err := left.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	s.stuck = left
	if _, err := s.Uses(t.Context()); err == nil || !strings.Contains(err.Error(), fmt.Sprint(left.cmd.Process.Pid)) {
		t.Errorf("while it is there: %v", err)
	}
	_ = left.cmd.Wait()
	close(left.done)
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	if _, err := s.Uses(ctx); err != nil {
		t.Errorf("when it has ended: %v", err)
	}
}
