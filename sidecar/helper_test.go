package main

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/larder-project/larder/internal/cleanup"
	"github.com/larder-project/larder/internal/clock"
	"github.com/larder-project/larder/internal/gc"
	"github.com/larder-project/larder/internal/modelpack"
	"github.com/larder-project/larder/internal/reference"
	"github.com/larder-project/larder/internal/store"
	"github.com/larder-project/larder/internal/usage"
)

// bench is a node of a test's own: a real store, a real loop, and sources that
// say what the test wants.
type bench struct {
	t      *testing.T
	root   string
	store  *store.Store
	node   *node
	engine *engine
	server *httptest.Server
	log    *buffer

	collector *gc.Collector
	changed   func()        // tells the loop
	watched   chan struct{} // closed when it can be told

	mu  sync.Mutex
	now time.Time // by which ages are counted, ahead of the wall clock
}

// buffer is a log that may be read while it is written.
type buffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (b *buffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}

func (b *buffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.String()
}

// engine is a source of uses.
type engine struct {
	mu   sync.Mutex
	uses []usage.Use
	err  error
}

func (*engine) Name() string { return "engine" }

func (e *engine) Uses(context.Context) ([]usage.Use, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	return slices.Clone(e.uses), e.err
}

func (e *engine) set(err error, uses ...usage.Use) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.uses, e.err = uses, err
}

const week = 7 * 24 * time.Hour

// newBench makes a node with a policy; its loop does not run yet.
func newBench(t *testing.T, policy string) *bench {
	t.Helper()
	b := &bench{t: t, root: t.TempDir(), engine: &engine{}, log: &buffer{}, watched: make(chan struct{}), now: time.Now()}
	var err error
	if b.store, err = store.Open(filepath.Join(b.root, "store"), store.WithClock(b.clock)); err != nil {
		t.Fatal(err)
	}
	steady, err := clock.Open(filepath.Join(b.root, "node"), "")
	if err != nil {
		t.Fatal(err)
	}
	b.write("policy.yaml", policy)
	log := slog.New(slog.NewTextHandler(b.log, nil))
	file := newPolicyFile(filepath.Join(b.root, "policy.yaml"), false, log)
	b.collector = &gc.Collector{Store: b.store, Node: "node-1", Sources: []usage.Source{b.engine}, Now: b.clock}
	metrics := newMetrics()
	loop := cleanup.NewLoop(cleanup.Config{
		Cleaner: &cleanup.Cleaner{Collector: b.collector, Log: log, Wall: b.clock}, State: filepath.Join(b.root, "node"), Policy: file.state().policy,
		Watch: []func(context.Context, func()){func(ctx context.Context, changed func()) {
			b.changed = changed
			close(b.watched)
			<-ctx.Done()
		}},
		Grace: time.Hour, Log: log, Ran: metrics.ran,
	})
	b.node = &node{name: "node-1", store: b.store.Dir(), loop: loop, policy: file, clock: steady, sources: sourceNames(b.collector)}
	server, err := newServer(b.node, metrics, map[string]bool{"127.0.0.1": true}, log)
	if err != nil {
		t.Fatal(err)
	}
	b.server = httptest.NewServer(server.Handler)
	t.Cleanup(b.server.Close)
	return b
}

// run starts the loop, and returns once it has looked.
func (b *bench) run() {
	b.t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		b.node.loop.Run(ctx)
	}()
	b.t.Cleanup(func() {
		cancel()
		<-done
	})
	b.until("the store was looked at", func() bool { return b.node.loop.Status().Inventory != nil })
}

// look has the loop look again, and returns once it has.
func (b *bench) look() {
	b.t.Helper()
	<-b.watched
	before := b.node.loop.Status().Looked
	b.changed()
	b.until("the store was looked at again", func() bool { return b.node.loop.Status().Looked.After(before) })
}

// until waits for something that is to happen soon.
func (b *bench) until(what string, ok func() bool) {
	b.t.Helper()
	for deadline := time.Now().Add(2 * time.Minute); !ok(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			b.t.Fatalf("in vain: %s\n%s", what, b.log)
		}
	}
}

func (b *bench) write(name, text string) {
	b.t.Helper()
	if err := os.WriteFile(filepath.Join(b.root, name), []byte(text), 0o600); err != nil {
		b.t.Fatal(err)
	}
}

func (b *bench) clock() time.Time {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.now
}

func (b *bench) pass(d time.Duration) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.now = b.now.Add(d)
}

// publish brings in a version of files whose contents are their names, filled
// up to a size.
func (b *bench) publish(name string, files map[string]int) digest.Digest {
	b.t.Helper()
	lease, err := b.store.NewLease(b.t.Context(), "node-1", "test")
	if err != nil {
		b.t.Fatal(err)
	}
	defer lease.Release()
	var m modelpack.Model
	for path, size := range files {
		content := append([]byte(path), bytes.Repeat([]byte{1}, size-len(path))...)
		d, err := b.store.PutBlob(b.t.Context(), lease, content)
		if err != nil {
			b.t.Fatal(err)
		}
		m.Files = append(m.Files, modelpack.File{Path: path, Digest: d, Size: int64(size)})
	}
	slices.SortFunc(m.Files, func(a, b modelpack.File) int { return bytes.Compare([]byte(a.Path), []byte(b.Path)) })
	ref, err := reference.Parse(name)
	if err != nil {
		b.t.Fatal(err)
	}
	v, err := b.store.Publish(b.t.Context(), lease, m, []reference.Reference{ref})
	if err != nil {
		b.t.Fatal(err)
	}
	return v.Digest
}

func container(id int, name, state string, d digest.Digest) usage.Use {
	return usage.Use{Version: d, By: "container " + name, Container: usage.Container{Engine: "docker", ID: fmt.Sprintf("%064x", id), Name: name, State: state}}
}

func removeByName(t *testing.T, c *gc.Collector, name string) {
	t.Helper()
	ref, err := reference.Parse(name)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := c.Remove(t.Context(), []reference.Reference{ref}, gc.Options{Reason: "larder rm " + name}); err != nil {
		t.Fatal(err)
	}
}
