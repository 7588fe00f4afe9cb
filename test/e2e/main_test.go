package e2e

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"sync"
	"testing"

	"github.com/larder-project/larder/internal/testenv"
	"github.com/larder-project/larder/test/engine"
)

// programs is where TestMain puts what it builds: larder, larder-plugin and
// larder-sidecar with the race detector, and both without it, static, for
// images and where speed counts.
var programs string

func TestMain(m *testing.M) {
	os.Exit(run(m))
}

func run(m *testing.M) int {
	if os.Geteuid() != 0 {
		return m.Run() // each test says what it needs
	}
	dir, err := os.MkdirTemp("", "larder-e2e-bin-")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer os.RemoveAll(dir)
	programs = dir
	exhume()
	for _, b := range []struct {
		program, pkg string
		args         []string
	}{
		{"larder", "./cmd/larder", nil},
		{"larder-plugin", "./plugin", []string{"-race"}},
		{"larder-plugin-static", "./plugin", nil},
		{"larder-sidecar", "./sidecar", []string{"-race"}},
		{"larder-sidecar-static", "./sidecar", nil},
		{"reader", "./test/e2e/reader", nil},
	} {
		if err := build(filepath.Join(dir, b.program), b.pkg, b.args...); err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
	}
	code := m.Run()
	for _, l := range graves.listeners {
		_ = l.Close()
	}
	for _, s := range shared {
		if s.engine != nil {
			if err := s.engine.Close(); err != nil {
				fmt.Fprintln(os.Stderr, "close the shared engine:", err)
				code = max(code, 1)
			}
		}
	}
	return code
}

func build(program, pkg string, args ...string) error {
	cmd := exec.Command("go", append(append([]string{"build", "-o", program}, args...), pkg)...)
	cmd.Dir = checkout
	cgo := "CGO_ENABLED=0"
	if slices.Contains(args, "-race") {
		cgo = "CGO_ENABLED=1"
	}
	cmd.Env = append(os.Environ(), cgo)
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("build %s: %w\n%s", pkg, err, out)
	}
	return nil
}

// withFaults are programs that can be told of a reboot that did not happen.
var withFaults = sync.OnceValues(func() (string, error) {
	dir := filepath.Join(programs, "faults")
	return dir, errors.Join(
		build(filepath.Join(dir, "larder"), "./cmd/larder", "-tags=faults"),
		build(filepath.Join(dir, "larder-plugin"), "./plugin", "-race", "-tags=faults"))
})

// checkout is the top of the repository, seen from this package.
const checkout = "../.."

// kinds are the engines that everything is tested on.
var kinds = []struct {
	name string
	find func() (engine.Kind, error)
}{{"debian", engine.Debian}, {"current", engine.Current}}

type sharedEngine struct {
	once   sync.Once
	engine *engine.Engine
	err    error
}

var shared = map[string]*sharedEngine{"debian": {}, "current": {}}

func need(t *testing.T) {
	t.Helper()
	testenv.NeedRoot(t)
	testenv.NeedPrograms(t, "docker", "busybox", "chattr")
}

// eachEngine runs the test on every engine. The engine is shared: the test
// must leave it running.
func eachEngine(t *testing.T, test func(t *testing.T, e *engine.Engine)) {
	t.Helper()
	need(t)
	t.Parallel()
	for _, k := range kinds {
		t.Run(k.name, func(t *testing.T) {
			t.Parallel()
			test(t, sharedOf(t, k.name, k.find))
		})
	}
}

// sharedOf is the shared engine of a kind, which is started when it is first
// asked for.
func sharedOf(t *testing.T, name string, find func() (engine.Kind, error)) *engine.Engine {
	t.Helper()
	s := shared[name]
	s.once.Do(func() {
		s.engine, s.err = startEngine(context.Background(), find, engine.Options{})
	})
	testenv.Need(t, s.err == nil, fmt.Sprintf("the %s engine: %v", name, s.err))
	return s.engine
}

// ownEngine runs the test on every engine, each started for it alone.
func ownEngine(t *testing.T, o engine.Options, test func(t *testing.T, e *engine.Engine)) {
	t.Helper()
	need(t)
	t.Parallel()
	for _, k := range kinds {
		t.Run(k.name, func(t *testing.T) {
			t.Parallel()
			e, err := startEngine(t.Context(), k.find, o)
			testenv.Need(t, err == nil, fmt.Sprintf("the %s engine: %v", k.name, err))
			t.Cleanup(func() {
				if t.Failed() {
					t.Logf("the engine's last words:\n%s", e.LogTail(25))
				}
				if err := e.Close(); err != nil {
					t.Errorf("close the engine: %v", err)
				}
			})
			test(t, e)
		})
	}
}

func startEngine(ctx context.Context, find func() (engine.Kind, error), o engine.Options) (*engine.Engine, error) {
	kind, err := find()
	if err != nil {
		return nil, err
	}
	dir, err := os.MkdirTemp("", "larder-e2e-eng-")
	if err != nil {
		return nil, err
	}
	e, err := engine.New(kind, dir, o)
	if err != nil {
		return nil, err
	}
	if err := e.Start(ctx); err != nil {
		return nil, fmt.Errorf("%w (%w)", err, e.Close())
	}
	if err := e.LoadImage(ctx); err != nil {
		return nil, fmt.Errorf("%w (%w)", err, e.Close())
	}
	return e, nil
}
