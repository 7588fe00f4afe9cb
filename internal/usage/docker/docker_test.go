package docker

import (
	"context"
	"errors"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/larder-project/larder/internal/usage"
)

const id = "7a3c1e5b9d2f4068a1c3e5f7092b4d6e8fa1c3b5d7e9f0123456789abcdef012"

// The shapes are those of a Docker Engine 20.10.24 on API 1.41.
func TestContainersOfAnEngine(t *testing.T) {
	t.Parallel()
	sock := filepath.Join(t.TempDir(), "docker.sock")
	l, err := net.Listen("unix", sock)
	if err != nil {
		t.Fatal(err)
	}
	srv := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		switch {
		case r.URL.Path == "/_ping":
			w.Header().Set("Api-Version", "1.41")
		case strings.HasSuffix(r.URL.Path, "/v1.41/version"):
			_, _ = w.Write([]byte(`{"Version":"20.10.24+dfsg1","ApiVersion":"1.41","MinAPIVersion":"1.12"}`))
		case r.URL.Path == "/v1.41/containers/json" && r.URL.RawQuery == "all=1":
			_, _ = w.Write([]byte(`[{"Id":"` + id + `","Names":["/eager_lamport"],"Image":"busybox","State":"running","Mounts":[]}]`))
		default:
			http.NotFound(w, r)
		}
	})}
	go func() { _ = srv.Serve(l) }()
	t.Cleanup(func() { _ = srv.Close() })

	got, err := Containers(t.Context(), "unix://"+sock)
	if err != nil {
		t.Fatal(err)
	}
	want := map[string]usage.Container{id: {Engine: "docker", ID: id, Name: "eager_lamport", Image: "busybox", State: "running"}}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("containers (-want +got):\n%s", diff)
	}
	e, err := AskEngine(t.Context(), "unix://"+sock)
	if err != nil || e.Version != "20.10.24+dfsg1" || e.APIVersion != "1.41" {
		t.Errorf("engine %+v, error %v", e, err)
	}
}

func TestAnEngineThatDoesNotAnswerIsAnErrorInTime(t *testing.T) {
	t.Parallel()
	if _, err := Containers(t.Context(), "unix:///nonexistent/docker.sock"); !errors.Is(err, ErrNoEngine) {
		t.Errorf("where there is no engine: %v", err)
	}
	dir, err := os.MkdirTemp("", "deaf") // a socket's path has 108 bytes
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	sock := filepath.Join(dir, "sock")
	l, err := net.Listen("unix", sock)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if _, err := AskEngine(ctx, "unix://"+sock); err == nil {
		t.Error("an engine answered that never does")
	}
}
