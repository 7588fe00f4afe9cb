package sources

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/larder-project/larder/internal/config"
	"github.com/larder-project/larder/internal/testenv"
	"github.com/larder-project/larder/internal/usage"
	"github.com/larder-project/larder/internal/usage/usagetest"
)

func TestMain(m *testing.M) { os.Exit(testenv.PrivateMounts(m.Run)) }

// fakeEngine is a Docker engine with at most one container, which has the
// volume qwen.
type fakeEngine struct {
	t    *testing.T
	sock string

	mu   sync.Mutex
	srv  *http.Server
	used bool
}

func newFakeEngine(t *testing.T) *fakeEngine {
	t.Helper()
	dir, err := os.MkdirTemp("", "eng") // a short path: it is a socket's
	if err != nil {
		t.Fatal(err)
	}
	e := &fakeEngine{t: t, sock: filepath.Join(dir, "docker.sock")}
	t.Cleanup(func() {
		e.stop()
		_ = os.RemoveAll(dir)
	})
	return e
}

func (e *fakeEngine) host() string { return "unix://" + e.sock }

func (e *fakeEngine) start() {
	e.t.Helper()
	l, err := net.Listen("unix", e.sock)
	if err != nil {
		e.t.Fatal(err)
	}
	srv := &http.Server{Handler: e}
	e.mu.Lock()
	e.srv = srv
	e.mu.Unlock()
	go func() { _ = srv.Serve(l) }()
}

// stop ends the engine and takes its socket away.
func (e *fakeEngine) stop() {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.srv != nil {
		_ = e.srv.Close()
	}
}

func (e *fakeEngine) use(used bool) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.used = used
}

func (e *fakeEngine) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	e.mu.Lock()
	defer e.mu.Unlock()
	w.Header().Set("Content-Type", "application/json")
	switch {
	case r.URL.Path == "/_ping":
		w.Header().Set("Api-Version", "1.41")
	case r.URL.Path == "/v1.41/containers/json" && e.used:
		fmt.Fprintf(w, `[{"Id":"%064d","Names":["/c"],"State":"exited","Mounts":[{"Type":"volume","Name":"qwen","Driver":"larder"}]}]`, 1)
	case r.URL.Path == "/v1.41/containers/json":
		fmt.Fprint(w, "[]")
	default:
		http.NotFound(w, r)
	}
}

// settings are those of a node on which there is nothing.
func settings(n *usagetest.Node) config.Config {
	return config.Config{
		UsageDocker: config.Auto, UsageContainerd: config.Auto, UsageGPU: config.Auto, UsageCSI: config.Auto,
		DockerHost: "unix://" + n.Root + "/docker.sock", Containerd: []string{n.Root + "/a.sock", n.Root + "/b.sock"}, Kubelet: n.Root + "/kubelet",
	}
}

func named(t *testing.T, s *Set, name string) usage.Source {
	t.Helper()
	for _, source := range s.Sources() {
		if source.Name() == name {
			return source
		}
	}
	t.Fatalf("no source %s in %s", name, usage.Names(s.Sources()))
	return nil
}

func TestEveryKindIsAskedUnlessItIsOff(t *testing.T) {
	n := usagetest.NewNode(t)
	t.Setenv("PATH", "") // no larder-gpu
	c := settings(n)
	if got := usage.Names(Of(c, n.Volumes).Sources()); got != "volumes, mounts, docker, containerd, csi, gpu" {
		t.Errorf("the sources are %s", got)
	}
	if uses, failed := usage.Gather(t.Context(), Of(c, n.Volumes).Sources()); len(failed) > 0 || len(uses) > 0 {
		t.Errorf("where there is nothing: %v, %v", uses, failed)
	}
	if left, err := os.ReadDir(n.Root + "/node/seen"); err == nil {
		t.Errorf("where there is nothing, it remembers %v", left)
	}
	c.UsageDocker, c.UsageGPU = config.Off, config.Off
	if got := usage.Names(Of(c, n.Volumes).Sources()); got != "volumes, mounts, containerd, csi" {
		t.Errorf("the sources are %s", got)
	}
	c.UsageDocker, c.UsageContainerd, c.UsageGPU, c.UsageCSI = config.On, config.On, config.On, config.On
	_, failed := usage.Gather(t.Context(), Of(c, n.Volumes).Sources())
	if len(failed) != 4 {
		t.Errorf("what must be there and is not: %v", failed)
	}
}

func TestAutoIsASource(t *testing.T) {
	t.Parallel()
	usagetest.Run(t, func(t *testing.T, n *usagetest.Node) usagetest.Subject {
		e := newFakeEngine(t)
		e.start()
		c := settings(n)
		c.DockerHost = e.host()
		return usagetest.Subject{
			Source: named(t, Of(c, n.Volumes), "docker"),
			Use: func(t *testing.T) func() {
				n.Create(t, "qwen")
				e.use(true)
				return func() { e.use(false) }
			},
			Faults: map[string]func(*testing.T) func(){
				"the engine was seen and is gone": func(t *testing.T) func() {
					if _, err := Of(c, n.Volumes).Sources()[2].Uses(t.Context()); err != nil {
						t.Fatal(err)
					}
					e.stop()
					return e.start
				},
				"the memory of it is damaged": func(t *testing.T) func() {
					source := named(t, Of(c, n.Volumes), "docker")
					if _, err := source.Uses(t.Context()); err != nil {
						t.Fatal(err)
					}
					files, err := filepath.Glob(n.Root + "/node/seen/docker-*.json")
					if err != nil || len(files) != 1 {
						t.Fatalf("remembered in %v (%v), want one file", files, err)
					}
					return usagetest.Write(t, files[0], "")
				},
				"it cannot be remembered": func(t *testing.T) func() {
					seen := n.Root + "/node/seen"
					if err := os.WriteFile(seen, nil, 0o600); err != nil {
						t.Fatal(err)
					}
					return func() {
						if err := os.Remove(seen); err != nil {
							t.Fatal(err)
						}
					}
				},
			},
		}
	})
}

func TestAnEngineThatWasSeenMayNotBeMissing(t *testing.T) {
	t.Parallel()
	n := usagetest.NewNode(t)
	e := newFakeEngine(t)
	c := settings(n)
	c.DockerHost = e.host()
	// Each call is that of another program.
	ask := func(c config.Config) ([]usage.Use, error) {
		return named(t, Of(c, n.Volumes), "docker").Uses(t.Context())
	}
	gone := func(what string, err error) {
		t.Helper()
		var g *GoneError
		if !errors.As(err, &g) {
			t.Fatalf("%s: %v, want that it is gone", what, err)
		}
		for _, word := range []string{e.host(), time.Now().Format("2006-01-02"), "usage.docker: off"} {
			if !strings.Contains(err.Error(), word) {
				t.Errorf("%s: the error does not say %q: %v", what, word, err)
			}
		}
		if _, err := os.Stat(g.path); err != nil || !strings.Contains(g.Hint(), g.path) {
			t.Errorf("the hint %q does not name the file to delete: %v", g.Hint(), err)
		}
	}
	if uses, err := ask(c); err != nil || len(uses) > 0 {
		t.Fatalf("before it was ever there: %v, %v", uses, err)
	}
	// Something is there and gives no answer: that is enough.
	if err := os.WriteFile(e.sock, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := ask(c); err == nil {
		t.Fatal("a dead engine is taken for one without containers")
	}
	if err := os.Remove(e.sock); err != nil {
		t.Fatal(err)
	}
	_, err := ask(c)
	gone("its socket has gone", err)
	e.start()
	if _, err := ask(c); err != nil {
		t.Fatalf("when it is back: %v", err)
	}

	// The settings name another engine: the first one is asked all the same.
	n.Create(t, "qwen")
	e.use(true)
	elsewhere := c
	elsewhere.DockerHost = "unix://" + n.Root + "/other.sock"
	if uses, err := ask(elsewhere); err != nil || len(uses) != 1 {
		t.Errorf("an engine that is not in the settings any more: %v, %v", uses, err)
	}
	e.stop()
	_, err = ask(elsewhere)
	gone("and it is gone", err)

	off, on := elsewhere, elsewhere
	off.UsageDocker, on.UsageDocker = config.Off, config.On
	if got := usage.Names(Of(off, n.Volumes).Sources()); strings.Contains(got, "docker") {
		t.Errorf("with off, the sources are %s", got)
	}
	other := newFakeEngine(t)
	other.start()
	on.DockerHost = other.host()
	if uses, err := ask(on); err != nil || len(uses) > 0 {
		t.Errorf("with on, only what the settings name is asked: %v, %v", uses, err)
	}
}

// A shell's DOCKER_HOST may lead anywhere.
func TestAnEngineOfAnotherHostIsAskedAndNotRemembered(t *testing.T) {
	t.Parallel()
	n := usagetest.NewNode(t)
	e := newFakeEngine(t)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	srv := &http.Server{Handler: e}
	go func() { _ = srv.Serve(l) }()
	n.Create(t, "qwen")
	e.use(true)
	here, remote := settings(n), settings(n)
	remote.DockerHost = "tcp://" + l.Addr().String()
	if uses, err := named(t, Of(remote, n.Volumes), "docker").Uses(t.Context()); err != nil || len(uses) != 1 {
		t.Errorf("while the settings name it: %v, %v", uses, err)
	}
	_ = srv.Close()
	for _, host := range []string{remote.DockerHost, "ssh://me@nowhere.invalid"} {
		remote.DockerHost = host
		if uses, err := named(t, Of(remote, n.Volumes), "docker").Uses(t.Context()); err == nil {
			t.Errorf("%s does not answer: %v", host, uses)
		}
	}
	if uses, err := named(t, Of(here, n.Volumes), "docker").Uses(t.Context()); err != nil || len(uses) > 0 {
		t.Errorf("when the settings do not name it any more: %v, %v", uses, err)
	}
}

func TestAHostWithoutADriverHasNoGPUUntilOneAnswers(t *testing.T) {
	n := usagetest.NewNode(t)
	dir := t.TempDir()
	t.Setenv("PATH", dir+":"+os.Getenv("PATH"))
	helper := func(script string) {
		t.Helper()
		if err := testenv.WriteProgram(dir+"/larder-gpu", "#!/bin/sh\n"+script+"\n"); err != nil {
			t.Fatal(err)
		}
	}
	ask := func() error {
		_, err := named(t, Of(settings(n), n.Volumes), "gpu").Uses(t.Context())
		return err
	}
	helper("exit 3")
	if err := ask(); err != nil {
		t.Errorf("no driver: %v", err)
	}
	helper("exit 1")
	if err := ask(); err == nil || errors.Is(err, usage.ErrAbsent) {
		t.Errorf("a driver that fails: %v", err)
	}
	helper(`echo '{"end":true,"processes":0}'`)
	if err := ask(); err != nil {
		t.Errorf("a driver that answers: %v", err)
	}
	helper("exit 3")
	var g *GoneError
	if err := ask(); !errors.As(err, &g) {
		t.Errorf("a driver that is not loaded any more: %v", err)
	}
}

func TestStatusTellsOfEachSource(t *testing.T) {
	n := usagetest.NewNode(t)
	t.Setenv("PATH", "") // no larder-gpu
	e := newFakeEngine(t)
	e.start()
	e.use(true)
	n.Create(t, "qwen")
	c := settings(n)
	c.DockerHost, c.UsageCSI = e.host(), config.Off
	if err := os.WriteFile(c.Containerd[1], nil, 0o600); err != nil {
		t.Fatal(err)
	}
	got := Of(c, n.Volumes).Status(t.Context())
	for i := range got {
		if (got[i].Err != nil) != (got[i].State == Failing) {
			t.Errorf("%s is %s: %v", got[i].Source, got[i].State, got[i].Err)
		}
		got[i].Err = nil
	}
	want := []Status{
		{Source: "volumes", State: Answers, Uses: 1}, {Source: "mounts", State: Answers},
		{Source: "docker", State: Answers, Uses: 1, At: []string{e.host()}}, {Source: "containerd", State: Failing},
		{Source: "csi", State: Off}, {Source: "gpu", State: Absent},
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("status (-want +got):\n%s", diff)
	}
}

func TestWatchTellsOfEnginesAndEndsWithItsContext(t *testing.T) {
	t.Parallel()
	n := usagetest.NewNode(t)
	e := newFakeEngine(t)
	e.start()
	c := settings(n)
	c.DockerHost = e.host()
	ctx, cancel := context.WithCancel(t.Context())
	told, ended := make(chan struct{}, 100), make(chan struct{})
	go func() {
		defer close(ended)
		Of(c, n.Volumes).Watch(ctx, func() { told <- struct{}{} })
	}()
	select {
	case <-told:
	case <-time.After(10 * time.Second):
		t.Error("not told of an engine that is there")
	}
	cancel()
	select {
	case <-ended:
	case <-time.After(10 * time.Second):
		t.Error("it does not end")
	}
}
