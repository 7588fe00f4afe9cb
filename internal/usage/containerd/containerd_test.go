package containerd

import (
	"context"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	containersapi "github.com/containerd/containerd/api/services/containers/v1"
	"github.com/containerd/containerd/api/types"
	"github.com/containerd/containerd/api/types/task"
	"github.com/google/go-cmp/cmp"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/runtime-spec/specs-go"
	"go.uber.org/goleak"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

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

// mounting is the runtime spec of a container that mounts these folders, and
// what every container mounts.
func mounting(sources ...string) *specs.Spec {
	s := &specs.Spec{Version: specs.Version, Mounts: []specs.Mount{
		{Destination: "/proc", Type: "proc", Source: "proc"},
		{Destination: "/dev", Type: "tmpfs", Source: "tmpfs"},
		{Destination: "/etc/hosts", Type: "bind", Source: "/var/lib/x/hosts"},
	}}
	for _, source := range sources {
		s.Mounts = append(s.Mounts, specs.Mount{Destination: "/models", Type: "bind", Source: source, Options: []string{"rbind"}})
	}
	return s
}

func TestSource(t *testing.T) {
	t.Parallel()
	usagetest.Run(t, func(t *testing.T, n *usagetest.Node) usagetest.Subject {
		d := newDaemon(t)
		dir := filepath.Join(n.Root, "here")
		fault := func(what string, err error) func(*testing.T) func() {
			return func(*testing.T) func() {
				d.change(func() { d.faults[what] = err })
				return func() { d.change(func() { delete(d.faults, what) }) }
			}
		}
		spoilt := func(spec any) func(*testing.T) func() {
			return func(*testing.T) func() {
				d.put("later", spec, &containersapi.Container{ID: "spoilt"})
				return func() { d.change(func() { delete(d.containers, "later") }) }
			}
		}
		// instead puts something else in the place of the daemon.
		instead := func(answer func(net.Conn)) func(*testing.T) func() {
			return func(t *testing.T) func() {
				d.stop()
				l, err := net.Listen("unix", d.sock)
				if err != nil {
					t.Fatal(err)
				}
				go func() {
					for {
						c, err := l.Accept()
						if err != nil {
							return
						}
						answer(c)
					}
				}()
				return func() {
					_ = l.Close()
					d.start()
				}
			}
		}
		return usagetest.Subject{
			Source: New(d.sock, n.Volumes.Places),
			Use: func(t *testing.T) func() {
				n.MountAt(t, dir)
				d.put("k8s.io", mounting(dir+"/sub"), &containersapi.Container{ID: "a"}, &task.Process{ID: "a", Pid: 12, Status: task.Status_PAUSED})
				d.put("default", mounting(), &containersapi.Container{ID: "b"})
				return func() {
					d.change(func() { clear(d.containers) })
					n.UnmountAt(t, dir)
				}
			},
			Faults: map[string]func(*testing.T) func(){
				"namespaces cannot be listed":  fault("namespaces", status.Error(codes.Internal, "no")),
				"containers cannot be listed":  fault("containers", status.Error(codes.Internal, "no")),
				"it does not answer":           fault("containers", errHang),
				"it is something that is deaf": instead(func(net.Conn) {}),
				"it closes the connection":     instead(func(c net.Conn) { _ = c.Close() }),
				"it answers garbage":           instead(func(c net.Conn) { _, _ = c.Write([]byte(strings.Repeat("garbage\n", 99))) }),
				"a spec is no JSON":            spoilt("not an object"),
				"a spec is empty":              spoilt(map[string]any{}),
				"a container has no spec":      spoilt(nil),
				"the list of containers breaks off": func(*testing.T) func() {
					d.put("k8s.io", mounting(), &containersapi.Container{ID: "c"})
					d.change(func() { d.half = true })
					return func() { d.change(func() { d.half = false }) }
				},
				"it is dead and its socket is there": func(t *testing.T) func() {
					d.stop()
					if err := os.WriteFile(d.sock, nil, 0o600); err != nil {
						t.Fatal(err)
					}
					return func() {
						if err := os.Remove(d.sock); err != nil {
							t.Fatal(err)
						}
						d.start()
					}
				},
				"it is absent": func(*testing.T) func() {
					d.stop()
					return d.start
				},
				"what is mounted is not known": func(t *testing.T) func() {
					files, err := filepath.Glob(n.Root + "/node/mounts/*/*/*.json")
					if err != nil || len(files) != 1 {
						t.Fatalf("mount records: %v (%v)", files, err)
					}
					return usagetest.Write(t, files[0], "{")
				},
			},
		}
	})
}

// places are made-up answers.
type places map[string]digest.Digest

func (p places) OfVolume(string) ([]digest.Digest, bool, error) { return nil, false, nil }
func (p places) AtPath(path string) ([]digest.Digest, bool, error) {
	d, ok := p[path]
	if !ok {
		return nil, false, nil
	}
	return []digest.Digest{d}, true, nil
}
func (p places) now() (usage.Places, error) { return p, nil }

func TestContainersOfEveryNamespaceAndState(t *testing.T) {
	t.Parallel()
	a, b := digest.FromString("a"), digest.FromString("b")
	p := places{"/mnt/a": a, "/mnt/b": b}
	d := newDaemon(t)
	long := strings.Repeat("e", 64)
	d.put("moby", mounting("/mnt/a"), &containersapi.Container{ID: long}, &task.Process{ID: long, Pid: 7, Status: task.Status_RUNNING})
	d.put("default", mounting("/mnt/b", "/mnt/b"), &containersapi.Container{ID: "web", Image: "busybox", Labels: map[string]string{"nerdctl/name": "shop"}})
	d.put("k8s.io", mounting("/mnt/a"), &containersapi.Container{ID: "p", Labels: map[string]string{
		"io.kubernetes.pod.name": "llm-0", "io.kubernetes.container.name": "server",
	}}, &task.Process{ContainerID: "p", ID: "p", Pid: 8, Status: task.Status_PAUSED})
	d.put("k8s.io", mounting("/elsewhere"), &containersapi.Container{ID: "q"})
	want := []usage.Use{
		{Version: a, By: "container eeeeeeeeeeee of containerd", PID: 7, Container: usage.Container{Engine: "containerd", Namespace: "moby", ID: long, State: "running"}},
		{Version: a, By: "container k8s.io/llm-0/server of containerd (paused)", PID: 8,
			Container: usage.Container{Engine: "containerd", Namespace: "k8s.io", ID: "p", Name: "llm-0/server", State: "paused"}},
		{Version: b, By: "container shop of containerd (no task)",
			Container: usage.Container{Engine: "containerd", Namespace: "default", ID: "web", Name: "shop", Image: "busybox", State: "no task"}},
	}
	check := func(what string) {
		t.Helper()
		got, err := New(d.sock, p.now).Uses(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		slices.SortFunc(got, func(a, b usage.Use) int { return strings.Compare(a.By, b.By) })
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("%s (-want +got):\n%s", what, diff)
		}
	}
	check("all answers")

	// A shim that hangs costs words, and no container.
	d.change(func() { d.faults["tasks"] = status.Error(codes.DeadlineExceeded, "a shim hangs") })
	for i := range want {
		want[i].PID, want[i].Container.State = 0, ""
		want[i].By, _, _ = strings.Cut(want[i].By, " (")
	}
	check("tasks cannot be listed")
}

func TestWatchTellsOfEventsAndOfWhatItMissed(t *testing.T) {
	t.Parallel()
	d := newDaemon(t)
	ctx, cancel := context.WithCancel(t.Context())
	changed, ended := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(ended)
		New(d.sock, nil).Watch(ctx, func() { changed <- struct{}{} })
	}()
	await := func(what string) {
		t.Helper()
		select {
		case <-changed:
		case <-time.After(10 * time.Second):
			t.Fatalf("not told: %s", what)
		}
	}
	await("the first look")
	await("the second, a second later")
	select {
	case <-changed:
		t.Fatal("told before anything has happened")
	case <-time.After(100 * time.Millisecond):
	}
	d.events <- &types.Envelope{Namespace: "new", Topic: "/containers/create"}
	await("a container in a new namespace")
	d.stop()
	await("containerd has gone")
	d.start()
	await("containerd is back")
	cancel()
	<-ended
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, f := range d.filters {
		if strings.Contains(f, "namespace") {
			t.Errorf("it listens to one namespace alone: %s", f)
		}
	}
	if len(d.filters) == 0 {
		t.Error("it listens to everything")
	}
}
