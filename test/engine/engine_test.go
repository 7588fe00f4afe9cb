package engine

import (
	"os"
	"strings"
	"testing"

	"github.com/larder-project/larder/internal/testenv"
	"github.com/moby/sys/mountinfo"
)

// Each engine starts, runs a container, comes back after a SIGKILL, and leaves
// neither a process nor a mount when it is closed.
func TestLifeOfAnEngine(t *testing.T) {
	testenv.NeedRoot(t)
	testenv.NeedPrograms(t, "docker", "busybox")
	for name, find := range map[string]func() (Kind, error){"debian": Debian, "current": Current} {
		t.Run(name, func(t *testing.T) {
			kind, err := find()
			testenv.Need(t, err == nil, "the "+name+" Docker engine")
			dir, err := os.MkdirTemp("", "larder-engine-")
			if err != nil {
				t.Fatal(err)
			}
			e, err := New(kind, dir, Options{LiveRestore: true})
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() {
				if err := e.Close(); err != nil {
					t.Error(err)
				}
				if left := processes(func(c string) bool { return strings.Contains(c, dir+"/") }); len(left) > 0 {
					t.Errorf("processes left behind: %v", left)
				}
				if left, err := mountinfo.GetMounts(mountinfo.PrefixFilter(dir)); err != nil || len(left) > 0 {
					t.Errorf("mounts left behind: %v (%v)", left, err)
				}
			})
			ctx := t.Context()
			if err := e.Start(ctx); err != nil {
				t.Fatal(err)
			}
			if err := e.LoadImage(ctx); err != nil {
				t.Fatal(err)
			}
			out, err := e.Docker(ctx, "run", "--rm", "--network", "none", "--user", "1234:99", Image, "id")
			if err != nil || !strings.Contains(out, "uid=1234 gid=99") {
				t.Fatalf("run a container: %q, %v", out, err)
			}
			if _, err := e.Docker(ctx, "run", "-d", "--name", "stays", "--network", "none", Image, "sleep", "1000"); err != nil {
				t.Fatal(err)
			}
			if err := e.Kill(); err != nil {
				t.Fatal(err)
			}
			if err := e.Start(ctx); err != nil {
				t.Fatal(err)
			}
			out, err = e.Docker(ctx, "inspect", "--format", "{{.State.Running}}", "stays")
			if err != nil || strings.TrimSpace(out) != "true" {
				t.Fatalf("with live-restore the container runs on: %q, %v\n%s", out, err, e.LogTail(20))
			}
			if l, err := e.Listen(); err != nil {
				t.Error(err)
			} else {
				l.Close()
			}
		})
	}
}
