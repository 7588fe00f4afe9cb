package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"

	"github.com/rogpeppe/go-internal/testscript"

	"github.com/larder-project/larder/internal/modelpack"
	"github.com/larder-project/larder/internal/reference"
	"github.com/larder-project/larder/internal/source/huggingface/hubtest"
	"github.com/larder-project/larder/internal/store"
	"github.com/larder-project/larder/internal/testenv"
	"github.com/larder-project/larder/test/engine"
)

func TestMain(m *testing.M) {
	testscript.Main(m, map[string]func(){"larder": func() { os.Exit(run()) }})
}

// The scripts of testdata/script run for everybody, those of testdata/root
// mount things.
func TestScripts(t *testing.T)     { testenv.UsedDisk(t); scripts(t, "testdata/script") }
func TestRootScripts(t *testing.T) { testenv.NeedRoot(t); scripts(t, "testdata/root") }

// Those of testdata/engine run containers of a real engine.
func TestEngineScripts(t *testing.T) {
	testenv.NeedRoot(t)
	testenv.NeedPrograms(t, "dockerd", "docker", "busybox")
	scripts(t, "testdata/engine")
}

// Those of testdata/tools use what reads the store beside larder.
func TestToolScripts(t *testing.T) {
	testenv.NeedPrograms(t, "skopeo")
	scripts(t, "testdata/tools")
}

func scripts(t *testing.T, dir string) {
	testscript.Run(t, testscript.Params{
		Dir:                 dir,
		RequireExplicitExec: true,
		RequireUniqueNames:  true,
		Setup: func(e *testscript.Env) error {
			// Nothing of this machine's own set-up may show through.
			empty := filepath.Join(e.WorkDir, "larder.yaml")
			e.Setenv("LARDER_CONFIG", empty)
			e.Setenv("LARDER_ROOT", filepath.Join(e.WorkDir, "root"))
			e.Setenv("LARDER_NODE", "tester")
			e.Setenv("LARDER_SOCKET", filepath.Join(e.WorkDir, "plugin.sock"))
			e.Setenv("DOCKER_HOST", "unix://"+filepath.Join(e.WorkDir, "docker.sock"))
			e.Setenv("LARDER_CONTAINERD_ADDRESS", filepath.Join(e.WorkDir, "containerd.sock"))
			e.Setenv("LARDER_CSI_KUBELET", filepath.Join(e.WorkDir, "kubelet"))
			e.Setenv("LARDER_USAGE_PID_NAMESPACE", "own")
			e.Setenv("HF_ENDPOINT", "http://127.0.0.1:1")
			// Some scripts run commands as another user.
			for _, dir := range []string{filepath.Dir(e.WorkDir), e.WorkDir} {
				if err := os.Chmod(dir, 0o755); err != nil {
					return err
				}
			}
			return os.WriteFile(empty, nil, 0o644)
		},
		Cmds: map[string]func(*testscript.TestScript, bool, []string){
			"exits":  exits,
			"json":   checkJSON,
			"hub":    startHub,
			"fault":  injectFault,
			"gated":  gateRepo,
			"token":  addToken,
			"asked":  wasAsked,
			"damage": damageFile,
			"engine": startEngine,
		},
	})
}

// exits CODE COMMAND ARGS... runs a command that ends with this exit code.
func exits(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 2 {
		ts.Fatalf("usage: exits CODE COMMAND [ARGS...]")
	}
	want, err := strconv.Atoi(args[0])
	ts.Check(err)
	got := 0
	var ended *exec.ExitError
	switch err := ts.Exec(args[1], args[2:]...); {
	case errors.As(err, &ended):
		got = ended.ExitCode()
	case err != nil:
		ts.Fatalf("%v", err)
	}
	if got != want {
		ts.Fatalf("exit code %d, want %d", got, want)
	}
}

// json FILE LINE PATH WANT looks into the objects of FILE (or of stdout,
// stderr), one a line. LINE counts from 0, or from the end with -1. WANT is a
// value as JSON writes it, or a plain text. The path "keys" gives the names of
// the object's fields, sorted, and a path that ends in "count" a length.
func checkJSON(ts *testscript.TestScript, neg bool, args []string) {
	if len(args) != 4 {
		ts.Fatalf("usage: json FILE LINE PATH WANT")
	}
	lines := strings.Split(strings.TrimSpace(ts.ReadFile(args[0])), "\n")
	n, err := strconv.Atoi(args[1])
	ts.Check(err)
	if n < 0 {
		n += len(lines)
	}
	if n < 0 || n >= len(lines) {
		ts.Fatalf("%s has %d lines", args[0], len(lines))
	}
	for _, line := range lines {
		if !json.Valid([]byte(line)) {
			ts.Fatalf("not JSON: %s", line)
		}
	}
	var v any
	ts.Check(json.Unmarshal([]byte(lines[n]), &v))
	got, err := dig(v, args[2])
	ts.Check(err)
	if (got == args[3]) == neg {
		ts.Fatalf("%s is %s, want (or not) %s, in %s", args[2], got, args[3], lines[n])
	}
}

func dig(v any, path string) (string, error) {
	for part := range strings.SplitSeq(path, ".") {
		switch at := v.(type) {
		case map[string]any:
			if part == "keys" {
				return strings.Join(slices.Sorted(maps.Keys(at)), ","), nil
			}
			inner, ok := at[part]
			if !ok {
				return "absent", nil
			}
			v = inner
		case []any:
			if part == "count" {
				return strconv.Itoa(len(at)), nil
			}
			i, err := strconv.Atoi(part)
			if err != nil || i >= len(at) {
				return "", fmt.Errorf("%s: no element %s in %d", path, part, len(at))
			}
			v = at[i]
		default:
			return "", fmt.Errorf("%s: %v has no %s", path, v, part)
		}
	}
	if s, ok := v.(string); ok {
		return s, nil
	}
	text, err := json.Marshal(v)
	return string(text), err
}

// hub DIR serves every DIR/ORG/NAME as a repository and sets HF_ENDPOINT.
func startHub(ts *testscript.TestScript, _ bool, args []string) {
	if len(args) != 1 {
		ts.Fatalf("usage: hub DIR")
	}
	hub := hubtest.NewHub(hubtest.Options{})
	ts.Check(hub.AddDir(ts.MkAbs(args[0])))
	ctx, stop := context.WithCancel(context.Background())
	ready, done := make(chan *hubtest.Server, 1), make(chan error, 1)
	go func() {
		done <- hubtest.ListenAndServe(ctx, hub, "127.0.0.1:0", func(s *hubtest.Server) { ready <- s })
	}()
	ts.Defer(func() { stop(); <-done })
	select {
	case s := <-ready:
		ts.Setenv("HF_ENDPOINT", s.URL)
		hubs.Store(ts.Getenv("WORK"), hub)
	case err := <-done:
		ts.Fatalf("hub: %v", err)
	}
}

// hubs are the hubs of the running scripts, by their folder.
var hubs sync.Map

func hubOf(ts *testscript.TestScript) *hubtest.Hub {
	h, ok := hubs.Load(ts.Getenv("WORK"))
	if !ok {
		ts.Fatalf("no hub was started")
	}
	return h.(*hubtest.Hub)
}

// fault KIND STATUS [CODE] makes the hub answer so, fault KIND stall begin an
// answer that never goes on; "fault none" ends it.
func injectFault(ts *testscript.TestScript, _ bool, args []string) {
	h := hubOf(ts)
	h.ClearFaults()
	if args[0] == "none" {
		return
	}
	if args[1] == "stall" {
		h.Inject(hubtest.Fault{Kind: args[0], StallAfter: hubtest.At(1)})
		return
	}
	status, err := strconv.Atoi(args[1])
	ts.Check(err)
	f := hubtest.Fault{Kind: args[0], Status: status, Text: "as the test wants it"}
	if len(args) > 2 {
		f.Code = args[2]
	}
	h.Inject(f)
}

// gated ORG/NAME asks for access to a repository.
func gateRepo(ts *testscript.TestScript, _ bool, args []string) { hubOf(ts).Repo(args[0]).Gated() }

// token TOKEN [ORG/NAME...] makes a token known to the hub, with access to these
// repositories.
func addToken(ts *testscript.TestScript, _ bool, args []string) {
	hubOf(ts).AddToken(args[0], args[1:]...)
}

// asked KIND PATH token|nothing tells that the hub was asked for the file and
// gave it, each time to a token or each time without one; and that its second
// host saw neither token nor cookie.
func wasAsked(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 3 || args[2] != "token" && args[2] != "nothing" {
		ts.Fatalf("usage: asked KIND PATH token|nothing")
	}
	h := hubOf(ts)
	n := 0
	for _, r := range h.Requests() {
		if r.Kind != args[0] || r.Path != args[1] || r.Status >= 400 {
			continue
		}
		n++
		if r.Token != (args[2] == "token") {
			ts.Fatalf("%s %s came with a token: %v", r.Method, r.URL, r.Token)
		}
	}
	if n == 0 {
		ts.Fatalf("nobody was given %s", args[1])
	}
	if leaks := h.Leaks(); len(leaks) > 0 {
		ts.Fatalf("a token or cookie came to another host than the hub: %v", leaks)
	}
}

// engine starts a private Docker engine and sets DOCKER_HOST.
func startEngine(ts *testscript.TestScript, _ bool, _ []string) {
	kind, err := engine.Debian()
	ts.Check(err)
	dir, err := os.MkdirTemp("", "larder-cli-") // sockets have short names
	ts.Check(err)
	e, err := engine.New(kind, dir, engine.Options{})
	ts.Check(err)
	ts.Defer(func() {
		if err := e.Close(); err != nil {
			ts.Logf("engine: %v", err)
		}
		_ = os.RemoveAll(dir)
	})
	ts.Check(e.Start(context.Background()))
	ts.Check(e.LoadImage(context.Background()))
	ts.Setenv("DOCKER_HOST", e.Host())
}

// damage REFERENCE PATH flips a bit of a file in the store; damage REFERENCE
// alone one of the manifest; damage -missing REFERENCE PATH removes the file.
func damageFile(ts *testscript.TestScript, _ bool, args []string) {
	missing := args[0] == "-missing"
	if missing {
		args = args[1:]
	}
	st, err := store.Open(filepath.Join(ts.Getenv("LARDER_ROOT"), "store"))
	ts.Check(err)
	ref, err := reference.Parse(args[0])
	ts.Check(err)
	v, err := st.Resolve(ref)
	ts.Check(err)
	d := v.Digest
	if len(args) > 1 {
		m, err := st.Model(v.Digest)
		ts.Check(err)
		at := slices.IndexFunc(m.Files, func(f modelpack.File) bool { return f.Path == args[1] })
		if at < 0 {
			ts.Fatalf("%s has no file %s", args[0], args[1])
		}
		d = m.Files[at].Digest
	}
	path := st.BlobPath(d)
	if missing {
		ts.Check(os.Remove(path))
		return
	}
	data, err := os.ReadFile(path)
	ts.Check(err)
	data[len(data)/2] ^= 1
	ts.Check(os.Chmod(path, 0o644))
	ts.Check(os.WriteFile(path, data, 0o444))
	ts.Check(os.Chmod(path, 0o444))
}
