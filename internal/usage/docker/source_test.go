package docker

import (
	"context"
	"encoding/json"
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
	"github.com/opencontainers/go-digest"
	"go.uber.org/goleak"

	"github.com/larder-project/larder/internal/testenv"
	"github.com/larder-project/larder/internal/usage"
	"github.com/larder-project/larder/internal/usage/usagetest"
)

func TestMain(m *testing.M) {
	os.Exit(testenv.PrivateMounts(func() int {
		code := m.Run()
		if err := goleak.Find(); code == 0 && err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
		return code
	}))
}

// fakeEngine answers as a Docker Engine 20.10.24 does, on API 1.41, with the
// containers that a test gives it.
type fakeEngine struct {
	t    *testing.T
	sock string

	mu      sync.Mutex
	server  *http.Server
	list    string
	events  chan string // lines of /events
	fault   http.HandlerFunc
	queries []string // of /events
}

func newFakeEngine(t *testing.T) *fakeEngine {
	t.Helper()
	dir, err := os.MkdirTemp("", "eng") // a short path: it is a socket's
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	e := &fakeEngine{t: t, sock: filepath.Join(dir, "docker.sock"), list: "[]", events: make(chan string)}
	e.start()
	t.Cleanup(e.stop)
	return e
}

func (e *fakeEngine) host() string { return "unix://" + e.sock }

func (e *fakeEngine) start() {
	l, err := net.Listen("unix", e.sock)
	if err != nil {
		e.t.Fatal(err)
	}
	srv := &http.Server{Handler: e}
	e.mu.Lock()
	e.server = srv
	e.mu.Unlock()
	go func() { _ = srv.Serve(l) }()
}

// stop ends the engine and takes its socket away.
func (e *fakeEngine) stop() {
	e.mu.Lock()
	defer e.mu.Unlock()
	_ = e.server.Close()
}

func (e *fakeEngine) set(list string, fault http.HandlerFunc) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if list != "" {
		e.list = list
	}
	e.fault = fault
}

func (e *fakeEngine) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	e.mu.Lock()
	list, fault := e.list, e.fault
	e.mu.Unlock()
	w.Header().Set("Content-Type", "application/json")
	switch {
	case r.URL.Path == "/_ping":
		w.Header().Set("Api-Version", "1.41")
	case r.URL.Path == "/v1.41/events":
		e.mu.Lock()
		e.queries = append(e.queries, r.URL.Query().Get("filters"))
		e.mu.Unlock()
		w.WriteHeader(http.StatusOK)
		w.(http.Flusher).Flush()
		for {
			select {
			case line := <-e.events:
				_, _ = w.Write([]byte(line + "\n"))
				w.(http.Flusher).Flush()
			case <-r.Context().Done():
				return
			}
		}
	case r.URL.Path == "/v1.41/containers/json" && r.URL.RawQuery == "all=1":
		if fault != nil {
			fault(w, r)
			return
		}
		_, _ = w.Write([]byte(list))
	default:
		http.NotFound(w, r)
	}
}

// listed is one container as the engine lists it.
func listed(id, name, state string, mounts ...string) string {
	return fmt.Sprintf(`{"Id":%q,"Names":["/%s"],"Image":"busybox","State":%q,"Mounts":[%s]}`, id, name, state, strings.Join(mounts, ","))
}

func volumeMount(name, driver string) string {
	return fmt.Sprintf(`{"Type":"volume","Name":%q,"Source":"","Destination":"/models","Driver":%q,"Mode":"","RW":true,"Propagation":""}`, name, driver)
}

func TestSource(t *testing.T) {
	t.Parallel()
	usagetest.Run(t, func(t *testing.T, n *usagetest.Node) usagetest.Subject {
		e := newFakeEngine(t)
		answer := func(fault http.HandlerFunc) func(*testing.T) func() {
			return func(*testing.T) func() {
				e.set("", fault)
				return func() { e.set("", nil) }
			}
		}
		text := func(s string) http.HandlerFunc {
			return func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write([]byte(s)) }
		}
		return usagetest.Subject{
			Source: New(e.host(), nil, n.Volumes.Places),
			Use: func(t *testing.T) func() {
				n.Create(t, "qwen")
				e.set("["+listed(id, "eager_lamport", "exited", volumeMount("qwen", "larder"))+","+
					listed(strings.Repeat("a", 64), "other", "running", volumeMount("theirs", "local"))+"]", nil)
				return func() {
					e.set("[]", nil)
					if err := n.Volumes.Remove(t.Context(), "qwen"); err != nil {
						t.Error(err)
					}
				}
			},
			Faults: map[string]func(*testing.T) func(){
				"the engine answers an error": answer(func(w http.ResponseWriter, _ *http.Request) {
					w.WriteHeader(http.StatusInternalServerError)
					_, _ = w.Write([]byte(`{"message":"no"}`))
				}),
				"the list is cut short": answer(func(w http.ResponseWriter, _ *http.Request) {
					w.Header().Set("Content-Length", "1000")
					_, _ = w.Write([]byte("[" + listed(id, "eager_lamport", "exited")))
				}),
				"the list is cut short, and does not say so": answer(text("[" + listed(id, "eager_lamport", "exited") + ",")),
				"the answer is empty":                        answer(text("")),
				"the answer is null":                         answer(text("null")),
				"the answer is no list":                      answer(text("{}")),
				"the answer is no JSON":                      answer(text("<html>")),
				"the list is of something else":              answer(text(`[{"Name":"x"}]`)),
				"the engine closes the connection": answer(func(http.ResponseWriter, *http.Request) {
					panic(http.ErrAbortHandler)
				}),
				"the engine does not answer": answer(func(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() }),
				"the engine is absent": func(t *testing.T) func() {
					e.stop()
					return e.start
				},
				"the engine is dead and its socket is there": func(t *testing.T) func() {
					e.stop()
					if err := os.WriteFile(e.sock, nil, 0o600); err != nil {
						t.Fatal(err)
					}
					return func() {
						if err := os.Remove(e.sock); err != nil {
							t.Fatal(err)
						}
						e.start()
					}
				},
				"a volume that it names has a record that cannot be read": func(t *testing.T) func() {
					return usagetest.Write(t, n.Root+"/node/volumes/qwen.json", "{")
				},
			},
		}
	})
}

// places are made-up answers.
type places map[string]digest.Digest

func (p places) OfVolume(name string) ([]digest.Digest, bool, error) { return p.get("volume " + name) }
func (p places) AtPath(path string) ([]digest.Digest, bool, error)   { return p.get(path) }
func (p places) get(key string) ([]digest.Digest, bool, error) {
	d, ok := p[key]
	if !ok {
		return nil, false, nil
	}
	return []digest.Digest{d}, true, nil
}
func (p places) now() (usage.Places, error) { return p, nil }

// The shapes are those of Docker Engine 20.10.24 and of the 29 line: a bind
// mount has no name, and a volume of a plugin may have no source.
func TestWhatContainersMountIsUsedInEveryState(t *testing.T) {
	t.Parallel()
	a, b := digest.FromString("a"), digest.FromString("b")
	p := places{"volume qwen": a, "/mnt/qwen": b, "volume plain": b}
	bind := `{"Type":"bind","Source":"/mnt/qwen","Destination":"/m","Mode":"","RW":true,"Propagation":"rprivate"}`
	source := `{"Type":"volume","Name":"unknown","Source":"/mnt/qwen","Destination":"/m","Driver":"other"}`
	for name, tc := range map[string]struct {
		mounts  []string
		drivers []string
		want    []digest.Digest
	}{
		"a volume":                              {mounts: []string{volumeMount("qwen", "larder")}, want: []digest.Digest{a}},
		"a volume of a managed plugin":          {mounts: []string{volumeMount("qwen", "larder:latest")}, drivers: []string{"larder", "larder:latest"}, want: []digest.Digest{a}},
		"a volume of another driver":            {mounts: []string{volumeMount("plain", "local")}, drivers: []string{"larder"}},
		"a folder":                              {mounts: []string{bind}, want: []digest.Digest{b}},
		"a folder that a volume gives":          {mounts: []string{source}, want: []digest.Digest{b}},
		"both, and one of them twice":           {mounts: []string{volumeMount("qwen", "larder"), bind, bind}, want: []digest.Digest{min(a, b), max(a, b)}},
		"a volume that the records do not know": {mounts: []string{volumeMount("gone", "larder")}},
		"nothing":                               {},
	} {
		for _, state := range []string{"created", "running", "paused", "restarting", "removing", "exited", "dead"} {
			e := newFakeEngine(t)
			e.set("["+listed(id, "c", state, tc.mounts...)+"]", nil)
			uses, err := New(e.host(), tc.drivers, p.now).Uses(t.Context())
			if err != nil {
				t.Fatalf("%s, %s: %v", name, state, err)
			}
			by := "container c"
			if state != "running" {
				by += " (" + state + ")"
			}
			var want []usage.Use
			for _, d := range tc.want {
				want = append(want, usage.Use{Version: d, By: by, Container: usage.Container{Engine: "docker", ID: id, Name: "c", Image: "busybox", State: state}})
			}
			if diff := cmp.Diff(want, uses); diff != "" {
				t.Errorf("%s, %s (-want +got):\n%s", name, state, diff)
			}
		}
	}
}

func TestWatchTellsOfEventsAndOfWhatItMissed(t *testing.T) {
	t.Parallel()
	e := newFakeEngine(t)
	ctx, cancel := context.WithCancel(t.Context())
	changed, ended := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(ended)
		New(e.host(), nil, nil).Watch(ctx, func() { changed <- struct{}{} })
	}()
	await := func(what string) {
		t.Helper()
		select {
		case <-changed:
		case <-time.After(10 * time.Second):
			t.Fatalf("not told: %s", what)
		}
	}
	quiet := func(what string) {
		t.Helper()
		select {
		case <-changed:
			t.Fatalf("told, and nothing has happened: %s", what)
		case <-time.After(100 * time.Millisecond):
		}
	}
	await("the first look")
	quiet("before the first event")
	e.events <- `{"Type":"container","Action":"die","Actor":{"ID":"` + id + `"},"time":1}`
	await("a container's end")
	e.stop()
	await("the engine has gone")
	quiet("while it is away")
	e.start()
	await("the engine is back")
	cancel()
	<-ended
	var filters map[string]map[string]bool
	e.mu.Lock()
	defer e.mu.Unlock()
	if err := json.Unmarshal([]byte(e.queries[0]), &filters); err != nil || !filters["type"]["container"] || filters["event"]["exec_start"] {
		t.Errorf("events asked for: %s (%v)", e.queries[0], err)
	}
}
