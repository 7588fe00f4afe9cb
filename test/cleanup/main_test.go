// Package cleanup shows clean-up at its work: three months of CI on a small
// disk, a real model in ten patches, pulls and removals at the same time.
package cleanup

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/larder-project/larder/internal/testenv"
)

func TestMain(m *testing.M) { os.Exit(testenv.PrivateMounts(m.Run)) }

// larder is the program, built once, and a root folder of its own.
type larder struct {
	t    *testing.T
	path string
	root string
	env  []string
}

func newLarder(t *testing.T, root string, env ...string) *larder {
	t.Helper()
	testenv.NeedPrograms(t, "go")
	l := &larder{t: t, path: filepath.Join(t.TempDir(), "larder"), root: root}
	build := exec.Command("go", "build", "-o", l.path, "../../cmd/larder")
	build.Env = append(os.Environ(), "CGO_ENABLED=0", "GOFLAGS=")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	l.env = append(os.Environ(), "LARDER_USAGE_DOCKER=off", "LARDER_USAGE_CONTAINERD=off", "LARDER_USAGE_GPU=off", "LARDER_USAGE_CSI=off", "LARDER_USAGE_PID_NAMESPACE=own")
	l.env = append(l.env, env...)
	return l
}

func (l *larder) command(args ...string) *exec.Cmd {
	cmd := exec.Command(l.path, append([]string{"--root", l.root, "--node", "test"}, args...)...)
	cmd.Env = l.env
	return cmd
}

func (l *larder) run(args ...string) string {
	l.t.Helper()
	cmd := l.command(args...)
	var errs strings.Builder
	cmd.Stderr = &errs
	out, err := cmd.Output()
	if err != nil {
		l.t.Fatalf("larder %s: %v\n%s%s", strings.Join(args, " "), err, out, errs.String())
	}
	return string(out)
}

func ok(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func mib(n int64) string { return fmt.Sprintf("%d MiB", n>>20) }
