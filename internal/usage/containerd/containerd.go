// Package containerd knows what the containers of a containerd mount: those of
// every namespace, whoever made them (ctr, nerdctl, the kubelet, a Docker
// engine), with a task or without.
//
// It reads the mounts from the containers' runtime specs. That is the one place
// that has the folder which Docker really bound for a volume.
package containerd

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/containerd/containerd/api/services/tasks/v1"
	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/containers"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/runtime-spec/specs-go"
	"google.golang.org/grpc"

	"github.com/larder-project/larder/internal/usage"
)

const (
	// limit bounds all questions of one look.
	limit = 20 * time.Second
	// taskLimit bounds the question for the states of containers, which asks
	// each container's shim.
	taskLimit = 3 * time.Second
)

// Source knows what the containers of one containerd mount.
type Source struct {
	address string
	places  func() (usage.Places, error)
}

// New makes a source of the containerd that listens on a socket.
func New(address string, places func() (usage.Places, error)) *Source {
	return &Source{address: address, places: places}
}

// Name implements usage.Source.
func (s *Source) Name() string { return "containerd" }

func (s *Source) failed(err error) error {
	return fmt.Errorf("containerd at %s: %w", s.address, err)
}

// connect makes a client. Nothing is asked yet.
func (s *Source) connect() (*client.Client, error) {
	if _, err := os.Stat(s.address); errors.Is(err, fs.ErrNotExist) {
		return nil, s.failed(usage.ErrAbsent)
	} else if err != nil {
		return nil, s.failed(err)
	}
	// The client's own way to connect waits for a socket that is not there.
	dial := grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", s.address)
	})
	c, err := client.New(s.address, client.WithTimeout(limit), client.WithExtraDialOpts([]grpc.DialOption{dial}))
	if err != nil {
		return nil, s.failed(err)
	}
	return c, nil
}

// Uses implements usage.Source.
func (s *Source) Uses(ctx context.Context) ([]usage.Use, error) {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	c, err := s.connect()
	if err != nil {
		return nil, err
	}
	defer c.Close()
	spaces, err := c.NamespaceService().List(ctx)
	if err != nil {
		return nil, s.failed(fmt.Errorf("list namespaces: %w", err))
	}
	listed := make(map[string][]containers.Container, len(spaces))
	for _, ns := range spaces {
		// Containers come with their specs, in one answer: none of them can
		// vanish in between.
		found, err := c.ContainerService().List(namespaces.WithNamespace(ctx, ns))
		if err != nil && !errdefs.IsNotFound(err) {
			return nil, s.failed(fmt.Errorf("list the containers of namespace %s: %w", ns, err))
		}
		listed[ns] = found
	}
	places, err := s.places()
	if err != nil {
		return nil, err
	}
	var uses []usage.Use
	for _, ns := range spaces {
		of, err := usesOf(places, ns, listed[ns])
		if err != nil {
			return nil, s.failed(err)
		}
		if len(of) > 0 {
			tasks, known := states(namespaces.WithNamespace(ctx, ns), c)
			addStates(of, tasks, known)
		}
		uses = append(uses, of...)
	}
	return uses, nil
}

// usesOf finds what the containers of one namespace mount.
func usesOf(places usage.Places, ns string, list []containers.Container) ([]usage.Use, error) {
	var uses []usage.Use
	for _, item := range list {
		mounts, err := mountsOf(item)
		if err != nil {
			return nil, fmt.Errorf("container %s of namespace %s: %w", item.ID, ns, err)
		}
		versions, err := versionsAt(places, mounts)
		if err != nil {
			return nil, err
		}
		c := usage.Container{Engine: "containerd", Namespace: ns, ID: item.ID, Name: nameOf(item.Labels), Image: item.Image}
		for _, d := range versions {
			uses = append(uses, usage.Use{Version: d, By: "container " + c.Label() + " of containerd", Container: c})
		}
	}
	return uses, nil
}

// mountsOf reads a container's runtime spec. One that cannot be read is an
// error: what it mounts would be taken for unused.
func mountsOf(c containers.Container) ([]specs.Mount, error) {
	if c.Spec == nil {
		return nil, errors.New("it has no runtime spec, so what it mounts is not known")
	}
	var spec specs.Spec
	if err := json.Unmarshal(c.Spec.GetValue(), &spec); err != nil {
		return nil, fmt.Errorf("its runtime spec cannot be read: %w", err)
	}
	if spec.Version == "" {
		return nil, fmt.Errorf("its spec (%s) is no runtime spec, so what it mounts is not known", c.Spec.GetTypeUrl())
	}
	return spec.Mounts, nil
}

func versionsAt(places usage.Places, mounts []specs.Mount) ([]digest.Digest, error) {
	var out []digest.Digest
	for _, m := range mounts {
		if !filepath.IsAbs(m.Source) {
			continue // "proc", "tmpfs"
		}
		found, _, err := places.AtPath(m.Source)
		if err != nil {
			return nil, err
		}
		out = append(out, found...)
	}
	slices.Sort(out)
	return slices.Compact(out), nil
}

// nameOf finds the name that a person knows a container by: of nerdctl, or of
// the pod and the container in it.
func nameOf(labels map[string]string) string {
	if name := labels["nerdctl/name"]; name != "" {
		return name
	}
	pod, container := labels["io.kubernetes.pod.name"], labels["io.kubernetes.container.name"]
	if pod != "" && container != "" {
		return pod + "/" + container
	}
	return pod
}

type state struct {
	pid  int
	word string
}

// states asks for the containers that have a task. It is for people, and a
// container is used in any state, so a shim that hangs costs words alone; ok
// is false then.
func states(ctx context.Context, c *client.Client) (of map[string]state, ok bool) {
	ctx, cancel := context.WithTimeout(ctx, taskLimit)
	defer cancel()
	answer, err := c.TaskService().List(ctx, &tasks.ListTasksRequest{})
	if err != nil {
		return nil, false
	}
	of = make(map[string]state, len(answer.Tasks))
	for _, t := range answer.Tasks {
		of[cmp.Or(t.ContainerID, t.ID)] = state{pid: int(t.Pid), word: strings.ToLower(t.Status.String())}
	}
	return of, true
}

func addStates(uses []usage.Use, of map[string]state, known bool) {
	for i := range uses {
		u := &uses[i]
		s, has := of[u.Container.ID]
		switch {
		case has:
			u.PID, u.Container.State = s.pid, s.word
		case known:
			u.Container.State = "no task"
		default:
			continue
		}
		if u.Container.State != "running" {
			u.By += " (" + u.Container.State + ")"
		}
	}
}
