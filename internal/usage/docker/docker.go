// Package docker knows what a Docker engine tells of its containers.
package docker

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/client"

	"github.com/larder-project/larder/internal/usage"
)

// Engine is the Docker engine that answers at a host.
type Engine struct {
	Version    string // of the engine: "20.10.24"
	APIVersion string
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

// Containers lists all containers of the engine at host by ID, stopped ones
// too.
func Containers(ctx context.Context, host string) (map[string]usage.Container, error) {
	items, err := list(ctx, host)
	if err != nil {
		return nil, err
	}
	out := make(map[string]usage.Container, len(items))
	for _, item := range items {
		out[item.ID] = describe(item)
	}
	return out, nil
}

func describe(item container.Summary) usage.Container {
	name := ""
	if len(item.Names) > 0 {
		name = strings.TrimPrefix(item.Names[0], "/")
	}
	return usage.Container{Engine: "docker", ID: item.ID, Name: name, Image: item.Image, State: string(item.State)}
}

// list asks for the containers in whatever state. What is not a whole list of
// containers is an error: half of it would be taken for all of it.
func list(ctx context.Context, host string) ([]container.Summary, error) {
	c, err := ask(host)
	if err != nil {
		return nil, err
	}
	defer c.Close()
	got, err := c.ContainerList(ctx, client.ContainerListOptions{All: true})
	if err != nil {
		return nil, failed(host, err)
	}
	if got.Items == nil {
		return nil, fmt.Errorf("engine at %s: its answer is no list of containers", host)
	}
	for _, item := range got.Items {
		if item.ID == "" {
			return nil, fmt.Errorf("engine at %s: its list has a container without an ID", host)
		}
	}
	return got.Items, nil
}
