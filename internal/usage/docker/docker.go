// Package docker knows what a Docker engine tells of its containers.
package docker

import (
	"context"
	"errors"
	"fmt"
	"strings"

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

// Containers lists the running containers of the engine at host, by ID.
func Containers(ctx context.Context, host string) (map[string]usage.Container, error) {
	c, err := ask(host)
	if err != nil {
		return nil, err
	}
	defer c.Close()
	list, err := c.ContainerList(ctx, client.ContainerListOptions{})
	if err != nil {
		return nil, failed(host, err)
	}
	out := make(map[string]usage.Container, len(list.Items))
	for _, item := range list.Items {
		name := ""
		if len(item.Names) > 0 {
			name = strings.TrimPrefix(item.Names[0], "/")
		}
		out[item.ID] = usage.Container{Engine: "docker", ID: item.ID, Name: name, Image: item.Image, State: string(item.State)}
	}
	return out, nil
}
