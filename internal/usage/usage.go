// Package usage knows who uses what on this node: which processes see a mount,
// which container a process belongs to, and what an engine calls that
// container.
//
// What it finds is for telling a person. That nobody was found is no proof
// that nobody is there: an engine may be down, and a process may hide in a
// namespace that this one may not read.
package usage

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"regexp"
	"strconv"
	"strings"

	"github.com/moby/moby/client"
)

// Engine is the Docker engine that answers at a host.
type Engine struct {
	Version    string // of the engine: "20.10.24"
	APIVersion string
}

// Container is one running container.
type Container struct {
	ID    string // 64 hex digits
	Name  string // as the engine calls it; empty when no engine knows it
	Image string
}

// ErrNoEngine is wrapped where nothing answers at all.
var ErrNoEngine = errors.New("no engine answers")

// failed makes the client's error ours: its own words for "nothing there" fill
// three lines.
func failed(host string, err error) error {
	if client.IsErrConnectionFailed(err) {
		return fmt.Errorf("%w at %s", ErrNoEngine, host)
	}
	return fmt.Errorf("engine at %s: %w", host, err)
}

// ask connects to an engine. ctx bounds the whole conversation.
func ask(host string) (*client.Client, error) {
	c, err := client.New(client.WithHost(host))
	if err != nil {
		return nil, fmt.Errorf("engine at %s: %w", host, err)
	}
	return c, nil
}

// AskEngine tells what engine answers at host (unix://PATH or tcp://HOST:PORT).
func AskEngine(ctx context.Context, host string) (Engine, error) {
	c, err := ask(host)
	if err != nil {
		return Engine{}, err
	}
	defer c.Close()
	v, err := c.ServerVersion(ctx, client.ServerVersionOptions{})
	if err != nil {
		return Engine{}, failed(host, err)
	}
	return Engine{Version: v.Version, APIVersion: v.APIVersion}, nil
}

// Containers lists the running containers of the engine at host, by ID.
func Containers(ctx context.Context, host string) (map[string]Container, error) {
	c, err := ask(host)
	if err != nil {
		return nil, err
	}
	defer c.Close()
	list, err := c.ContainerList(ctx, client.ContainerListOptions{})
	if err != nil {
		return nil, failed(host, err)
	}
	out := make(map[string]Container, len(list.Items))
	for _, item := range list.Items {
		name := ""
		if len(item.Names) > 0 {
			name = strings.TrimPrefix(item.Names[0], "/")
		}
		out[item.ID] = Container{ID: item.ID, Name: name, Image: item.Image}
	}
	return out, nil
}

// ContainerID is the ID of the container that a process runs in, or "" where
// it runs in none that can be recognised.
func ContainerID(pid int) string {
	dir := "/proc/" + strconv.Itoa(pid)
	// The process may end at any moment: what cannot be read says nothing.
	if text, err := os.ReadFile(dir + "/cgroup"); err == nil {
		if id := fromCgroup(text); id != "" {
			return id
		}
	}
	if text, err := os.ReadFile(dir + "/mountinfo"); err == nil {
		return fromMountinfo(text)
	}
	return ""
}

// inCgroup finds a container's ID as the last part of a cgroup's path, in the
// forms of Docker, containerd, Podman and the kubelet: /docker/ID,
// docker-ID.scope, libpod-ID.scope, cri-containerd-ID.scope.
var inCgroup = regexp.MustCompile(`(?:^|[/:-])([0-9a-f]{64})(?:\.scope)?(?:/[^/]*)?$`)

func fromCgroup(text []byte) string {
	for line := range bytes.SplitSeq(text, []byte("\n")) {
		if m := inCgroup.FindSubmatch(line); m != nil {
			return string(m[1])
		}
	}
	return ""
}

// inMounts finds the files that Docker binds into each container from
// .../containers/ID/, for engines whose cgroups tell nothing.
var inMounts = regexp.MustCompile(`/containers/([0-9a-f]{64})/(?:resolv\.conf|hostname|hosts) /etc/`)

func fromMountinfo(text []byte) string {
	if m := inMounts.FindSubmatch(text); m != nil {
		return string(m[1])
	}
	return ""
}
