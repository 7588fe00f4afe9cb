package docker

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/mount"
	"github.com/moby/moby/client"
	"github.com/opencontainers/go-digest"

	"github.com/larder-project/larder/internal/usage"
)

// limit bounds one question to an engine. A busy host takes seconds to list
// some thousand containers.
const limit = 20 * time.Second

// Source knows what the containers of one Docker engine use, in whatever state
// they are: one that is stopped can be started again.
type Source struct {
	host    string
	drivers []string
	places  func() (usage.Places, error)
}

// New makes a source of the engine at host. Volumes of these drivers count, of
// any where there are none; a managed plugin's driver is called NAME:TAG.
func New(host string, drivers []string, places func() (usage.Places, error)) *Source {
	return &Source{host: host, drivers: drivers, places: places}
}

// Name implements usage.Source.
func (s *Source) Name() string { return "docker" }

// Uses implements usage.Source.
func (s *Source) Uses(ctx context.Context) ([]usage.Use, error) {
	if err := there(s.host); err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	containers, err := list(ctx, s.host)
	if err != nil {
		return nil, err
	}
	places, err := s.places()
	if err != nil {
		return nil, err
	}
	var uses []usage.Use
	for _, item := range containers {
		versions, err := s.versions(places, item)
		if err != nil {
			return nil, err
		}
		c := describe(item)
		by := "container " + c.Label()
		if c.State != "running" {
			by += " (" + c.State + ")"
		}
		for _, d := range versions {
			uses = append(uses, usage.Use{Version: d, By: by, Container: c})
		}
	}
	return uses, nil
}

// there tells an engine that is not installed from one that does not answer.
func there(host string) error {
	path, ok := strings.CutPrefix(host, "unix://")
	if !ok {
		return nil
	}
	if _, err := os.Stat(path); errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("engine at %s: %w", host, usage.ErrAbsent)
	} else if err != nil {
		return fmt.Errorf("engine at %s: %w", host, err)
	}
	return nil
}

// versions gives what a container mounts: volumes by their names, because the
// engine does not always know their folders, and folders of this host.
func (s *Source) versions(places usage.Places, item container.Summary) ([]digest.Digest, error) {
	var out []digest.Digest
	for _, m := range item.Mounts {
		if m.Type == mount.TypeVolume && (len(s.drivers) == 0 || slices.Contains(s.drivers, m.Driver)) {
			found, _, err := places.OfVolume(m.Name)
			if err != nil {
				return nil, err
			}
			out = append(out, found...)
		}
		if filepath.IsAbs(m.Source) {
			found, _, err := places.AtPath(m.Source)
			if err != nil {
				return nil, err
			}
			out = append(out, found...)
		}
	}
	slices.Sort(out)
	return slices.Compact(out), nil
}

// changes are the events after which containers may use other versions. Those
// of exec are left out: health checks make them by the second.
var changes = []string{"create", "start", "restart", "die", "pause", "unpause", "rename", "destroy"}

// How long Watch waits before it tries again to reach an engine.
const (
	retryFirst = time.Second
	retryLast  = 30 * time.Second
)

// Watch calls changed when containers may have begun or ended a use, until the
// context ends: on the engine's events, when the engine goes, and when it is
// back, because what happened meanwhile was told to nobody. Calls come one
// after another.
func (s *Source) Watch(ctx context.Context, changed func()) {
	wait := retryFirst
	for ctx.Err() == nil {
		begun := time.Now()
		s.follow(ctx, changed)
		if time.Since(begun) > retryLast {
			wait = retryFirst
		}
		select {
		case <-ctx.Done():
		case <-time.After(wait):
		}
		wait = min(2*wait, retryLast)
	}
}

// follow reads events until the stream breaks.
func (s *Source) follow(ctx context.Context, changed func()) {
	c, err := ask(s.host)
	if err != nil {
		return
	}
	defer c.Close()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	soon, done := context.WithTimeout(ctx, limit)
	_, err = c.Ping(soon, client.PingOptions{})
	done()
	if err != nil {
		return
	}
	// The engine answers before it listens to itself; what it remembers of the
	// last seconds fills that gap.
	since := time.Now().Add(-2 * time.Second)
	events := c.Events(ctx, client.EventsListOptions{
		Since:   fmt.Sprintf("%d.%09d", since.Unix(), since.Nanosecond()),
		Filters: make(client.Filters).Add("type", "container").Add("event", changes...),
	})
	changed()
	for {
		select {
		case <-events.Messages:
			changed()
		case <-events.Err:
			if ctx.Err() == nil {
				changed()
			}
			return
		}
	}
}
