package containerd

import (
	"context"
	"encoding/json"
	"errors"
	"net"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"testing"

	containersapi "github.com/containerd/containerd/api/services/containers/v1"
	eventsapi "github.com/containerd/containerd/api/services/events/v1"
	namespacesapi "github.com/containerd/containerd/api/services/namespaces/v1"
	tasksapi "github.com/containerd/containerd/api/services/tasks/v1"
	versionapi "github.com/containerd/containerd/api/services/version/v1"
	"github.com/containerd/containerd/api/types"
	"github.com/containerd/containerd/api/types/task"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/emptypb"
)

// daemon is a containerd that knows what a test gives it. The real ones are
// asked in test/e2e.
type daemon struct {
	t      *testing.T
	sock   string
	server *grpc.Server
	events chan *types.Envelope

	mu         sync.Mutex
	containers map[string][]*containersapi.Container // by namespace
	tasks      map[string][]*task.Process
	faults     map[string]error // by what is asked: namespaces, containers, tasks
	half       bool             // the list of containers breaks after the first
	filters    []string         // of the last subscription
}

// errHang is a fault: no answer.
var errHang = errors.New("no answer")

func newDaemon(t *testing.T) *daemon {
	t.Helper()
	dir, err := os.MkdirTemp("", "ctd") // a short path: it is a socket's
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	d := &daemon{
		t: t, sock: filepath.Join(dir, "c.sock"), events: make(chan *types.Envelope),
		containers: map[string][]*containersapi.Container{}, tasks: map[string][]*task.Process{}, faults: map[string]error{},
	}
	d.start()
	t.Cleanup(func() { d.stop() })
	return d
}

func (d *daemon) start() {
	l, err := net.Listen("unix", d.sock)
	if err != nil {
		d.t.Fatal(err)
	}
	d.server = grpc.NewServer()
	containersapi.RegisterContainersServer(d.server, &containerStore{d: d})
	namespacesapi.RegisterNamespacesServer(d.server, &namespaceStore{d: d})
	tasksapi.RegisterTasksServer(d.server, &taskStore{d: d})
	eventsapi.RegisterEventsServer(d.server, &eventStream{d: d})
	versionapi.RegisterVersionServer(d.server, &version{})
	go func() { _ = d.server.Serve(l) }()
}

// stop ends the daemon and takes its socket away.
func (d *daemon) stop() { d.server.Stop() }

// put makes a container, with this runtime spec unless it is nil.
func (d *daemon) put(ns string, spec any, c *containersapi.Container, tasks ...*task.Process) {
	d.t.Helper()
	if spec != nil {
		data, err := json.Marshal(spec)
		if err != nil {
			d.t.Fatal(err)
		}
		c.Spec = &anypb.Any{TypeUrl: "types.containerd.io/opencontainers/runtime-spec/1/Spec", Value: data}
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.containers[ns] = append(d.containers[ns], c)
	d.tasks[ns] = append(d.tasks[ns], tasks...)
}

func (d *daemon) change(f func()) {
	d.mu.Lock()
	defer d.mu.Unlock()
	f()
}

func (d *daemon) fault(ctx context.Context, what string) error {
	d.mu.Lock()
	err := d.faults[what]
	d.mu.Unlock()
	if errors.Is(err, errHang) {
		<-ctx.Done()
	}
	return err
}

type containerStore struct {
	containersapi.UnimplementedContainersServer
	d *daemon
}

func (s *containerStore) ListStream(_ *containersapi.ListContainersRequest, stream containersapi.Containers_ListStreamServer) error {
	if err := s.d.fault(stream.Context(), "containers"); err != nil {
		return err
	}
	ns, err := namespaces.NamespaceRequired(stream.Context())
	if err != nil {
		return err
	}
	s.d.mu.Lock()
	list, half := slices.Clone(s.d.containers[ns]), s.d.half
	s.d.mu.Unlock()
	for _, c := range list {
		if err := stream.Send(&containersapi.ListContainerMessage{Container: c}); err != nil {
			return err
		}
		if half {
			return status.Error(codes.Unavailable, "the store is closed")
		}
	}
	return nil
}

type namespaceStore struct {
	namespacesapi.UnimplementedNamespacesServer
	d *daemon
}

func (s *namespaceStore) List(ctx context.Context, _ *namespacesapi.ListNamespacesRequest) (*namespacesapi.ListNamespacesResponse, error) {
	if err := s.d.fault(ctx, "namespaces"); err != nil {
		return nil, err
	}
	s.d.mu.Lock()
	defer s.d.mu.Unlock()
	out := &namespacesapi.ListNamespacesResponse{}
	for ns := range s.d.containers {
		out.Namespaces = append(out.Namespaces, &namespacesapi.Namespace{Name: ns})
	}
	return out, nil
}

type taskStore struct {
	tasksapi.UnimplementedTasksServer
	d *daemon
}

func (s *taskStore) List(ctx context.Context, _ *tasksapi.ListTasksRequest) (*tasksapi.ListTasksResponse, error) {
	if err := s.d.fault(ctx, "tasks"); err != nil {
		return nil, err
	}
	ns, err := namespaces.NamespaceRequired(ctx)
	if err != nil {
		return nil, err
	}
	s.d.mu.Lock()
	defer s.d.mu.Unlock()
	return &tasksapi.ListTasksResponse{Tasks: s.d.tasks[ns]}, nil
}

type eventStream struct {
	eventsapi.UnimplementedEventsServer
	d *daemon
}

func (s *eventStream) Subscribe(r *eventsapi.SubscribeRequest, stream eventsapi.Events_SubscribeServer) error {
	s.d.change(func() { s.d.filters = r.Filters })
	for {
		select {
		case e := <-s.d.events:
			if err := stream.Send(e); err != nil {
				return err
			}
		case <-stream.Context().Done():
			return stream.Context().Err()
		}
	}
}

type version struct {
	versionapi.UnimplementedVersionServer
}

func (*version) Version(context.Context, *emptypb.Empty) (*versionapi.VersionResponse, error) {
	return &versionapi.VersionResponse{Version: "2.4.2"}, nil
}
