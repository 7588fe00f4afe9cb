package hubtest

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// Server is a hub that is served.
type Server struct {
	*Hub
	URL string // of the hub: http://127.0.0.1:PORT, for HF_ENDPOINT
	CDN string // of the second host: http://localhost:PORT
}

// Start serves a hub until the test ends. The test fails if the second host
// was ever sent a token.
func Start(t testing.TB, o Options) *Server {
	t.Helper()
	hub := NewHub(o)
	main, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	data, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		main.Close()
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(context.Background())
	done := make(chan error, 1)
	s := newServer(hub, main, data)
	go func() { done <- Serve(ctx, hub, main, data) }()
	t.Cleanup(func() {
		stop()
		if err := <-done; err != nil {
			t.Errorf("hub: %v", err)
		}
		for _, l := range hub.Leaks() {
			t.Errorf("a token or cookie came to another host than the hub: %s", l)
		}
	})
	return s
}

func newServer(hub *Hub, main, data net.Listener) *Server {
	// Clients take another name for another host, as the hub's CDN is one.
	_, port, _ := net.SplitHostPort(data.Addr().String())
	s := &Server{Hub: hub, URL: "http://" + main.Addr().String(), CDN: "http://" + net.JoinHostPort("localhost", port)}
	hub.SetCDN(s.CDN)
	return s
}

// Serve answers on both listeners until ctx ends, and closes them. data may be
// nil: then the hub has no second host. Otherwise call SetCDN first.
func Serve(ctx context.Context, hub *Hub, main, data net.Listener) error {
	quiet := log.New(io.Discard, "", 0)
	servers := []*http.Server{{Handler: hub, ErrorLog: quiet, ReadHeaderTimeout: time.Minute}}
	listeners := []net.Listener{main}
	if data != nil {
		servers = append(servers, &http.Server{Handler: hub.CDN(), ErrorLog: quiet, ReadHeaderTimeout: time.Minute})
		listeners = append(listeners, data)
	}
	done := make(chan error, len(servers))
	for i, s := range servers {
		go func() { done <- s.Serve(listeners[i]) }()
	}
	var first error
	waiting := len(servers)
	select {
	case <-ctx.Done():
	case first = <-done:
		waiting--
	}
	hub.Close()
	for _, s := range servers {
		s.Close()
	}
	for range waiting {
		if err := <-done; first == nil {
			first = err
		}
	}
	if errors.Is(first, http.ErrServerClosed) {
		return nil
	}
	return first
}

// ServeDir serves every folder DIR/ORG/NAME as a repository with one branch,
// main, and calls ready once it listens. addr is HOST:PORT of the hub; the
// second host takes a free port of localhost.
func ServeDir(ctx context.Context, addr, dir string, o Options, ready func(*Server)) error {
	hub := NewHub(o)
	if err := hub.AddDir(dir); err != nil {
		return err
	}
	return ListenAndServe(ctx, hub, addr, ready)
}

// ListenAndServe serves a hub on addr, with a second host on a free port of
// localhost, and calls ready once it listens.
func ListenAndServe(ctx context.Context, hub *Hub, addr string, ready func(*Server)) error {
	main, err := net.Listen("tcp", addr)
	if err != nil {
		return err
	}
	data, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		main.Close()
		return err
	}
	ready(newServer(hub, main, data))
	return Serve(ctx, hub, main, data)
}

// AddDir makes a repository of every folder DIR/ORG/NAME.
func (h *Hub) AddDir(dir string) error {
	orgs, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	for _, org := range orgs {
		if !org.IsDir() || strings.HasPrefix(org.Name(), ".") {
			continue
		}
		names, err := os.ReadDir(filepath.Join(dir, org.Name()))
		if err != nil {
			return err
		}
		for _, name := range names {
			if !name.IsDir() {
				continue
			}
			id := org.Name() + "/" + name.Name()
			if _, err := h.Repo(id).CommitDir("main", filepath.Join(dir, org.Name(), name.Name())); err != nil {
				return fmt.Errorf("repository %s: %w", id, err)
			}
		}
	}
	return nil
}
