package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"time"

	dockervolume "github.com/docker/go-plugins-helpers/volume"

	"github.com/larder-project/larder/internal/volume"
)

// Time limits of the engine: it gives Create and Mount two minutes and all
// other calls one. A call ends a little earlier, so that its error is heard.
const (
	longCall  = 110 * time.Second
	shortCall = 50 * time.Second
)

// driver translates between the engine's protocol and package volume.
// Protocol: https://docs.docker.com/engine/extend/plugins_volume/
type driver struct {
	ctx     context.Context
	volumes *volume.Manager
	log     *slog.Logger
	calls   sync.WaitGroup
}

var _ dockervolume.Driver = (*driver)(nil)

// call runs one call of the engine. The engine shows errors as they are, so
// what to do next goes into the text.
func (d *driver) call(verb, name string, limit time.Duration, f func(context.Context) error) error {
	d.calls.Add(1)
	defer d.calls.Done()
	// A plugin that is asked to stop finishes what it has begun.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(d.ctx), limit)
	defer cancel()
	begin := time.Now()
	err := f(ctx)
	took := time.Since(begin)
	if err == nil {
		d.log.Debug(verb, "volume", name, "took", took)
		return nil
	}
	if !errors.Is(err, volume.ErrNotFound) { // the engine asks for what it is about to create
		d.log.Warn(verb+" failed", "volume", name, "took", took, "error", err)
	}
	if hint := hintOf(err); hint != "" {
		return fmt.Errorf("larder: %w. %s", err, hint)
	}
	return fmt.Errorf("larder: %w", err)
}

// wait waits for calls that have begun.
func (d *driver) wait(limit time.Duration) {
	done := make(chan struct{})
	go func() {
		d.calls.Wait()
		close(done)
	}()
	select {
	case <-done:
	case <-time.After(limit):
		d.log.Warn("stopping in the middle of a call")
	}
}

func (d *driver) Create(r *dockervolume.CreateRequest) error {
	return d.call("create", r.Name, longCall, func(ctx context.Context) error {
		return d.volumes.Create(ctx, r.Name, r.Options)
	})
}

func (d *driver) Remove(r *dockervolume.RemoveRequest) error {
	return d.call("remove", r.Name, shortCall, func(ctx context.Context) error {
		return d.volumes.Remove(ctx, r.Name)
	})
}

func (d *driver) Mount(r *dockervolume.MountRequest) (*dockervolume.MountResponse, error) {
	out := &dockervolume.MountResponse{}
	err := d.call("mount", r.Name, longCall, func(ctx context.Context) (err error) {
		out.Mountpoint, err = d.volumes.Mount(ctx, r.Name, r.ID)
		return err
	})
	return out, err
}

// Unmount answers that all is well, unless the request makes no sense: the
// container has ended whatever the answer, and the engine asks no second time.
// What failed is in the log, and the reaper finishes it.
func (d *driver) Unmount(r *dockervolume.UnmountRequest) error {
	err := d.call("unmount", r.Name, shortCall, func(ctx context.Context) error {
		return d.volumes.Unmount(ctx, r.Name, r.ID)
	})
	if errors.Is(err, volume.ErrInvalid) {
		return err
	}
	return nil
}

func (d *driver) Path(r *dockervolume.PathRequest) (*dockervolume.PathResponse, error) {
	out := &dockervolume.PathResponse{}
	err := d.call("path", r.Name, shortCall, func(ctx context.Context) error {
		v, err := d.volumes.Get(ctx, r.Name)
		out.Mountpoint = d.volumes.Path(v.Name)
		return err
	})
	return out, err
}

func (d *driver) Get(r *dockervolume.GetRequest) (*dockervolume.GetResponse, error) {
	out := &dockervolume.GetResponse{}
	err := d.call("get", r.Name, shortCall, func(ctx context.Context) error {
		v, err := d.volumes.Get(ctx, r.Name)
		if err != nil {
			return err
		}
		out.Volume = d.describe(v)
		return nil
	})
	return out, err
}

func (d *driver) List() (*dockervolume.ListResponse, error) {
	out := &dockervolume.ListResponse{}
	err := d.call("list", "", shortCall, func(ctx context.Context) error {
		names, err := d.volumes.List(ctx)
		for _, name := range names {
			out.Volumes = append(out.Volumes, &dockervolume.Volume{Name: name, Mountpoint: d.volumes.Path(name)})
		}
		return err
	})
	return out, err
}

// Capabilities says "local": each node has volumes of its own.
func (d *driver) Capabilities() *dockervolume.CapabilitiesResponse {
	return &dockervolume.CapabilitiesResponse{Capabilities: dockervolume.Capability{Scope: "local"}}
}

// describe gives what docker volume inspect shows.
func (d *driver) describe(v volume.Volume) *dockervolume.Volume {
	out := &dockervolume.Volume{Name: v.Name, Mountpoint: d.volumes.Path(v.Name), Status: map[string]any{"mounts": len(v.Mounts)}}
	if !v.Created.IsZero() {
		out.CreatedAt = v.Created.UTC().Format(time.RFC3339)
	}
	if v.Damaged != "" {
		out.Status["damaged"] = v.Damaged
	}
	if v.Missing != "" {
		out.Status["missing"] = v.Missing
	}
	if len(v.Models) == 1 {
		for key, value := range describeModel(v.Models[0]) {
			out.Status[key] = value
		}
	} else if len(v.Models) > 1 {
		models := make([]map[string]any, len(v.Models))
		var bytes int64
		for i, one := range v.Models {
			models[i] = describeModel(one)
			bytes += one.Bytes
		}
		out.Status["models"], out.Status["bytes"] = models, bytes
	}
	return out
}

func describeModel(m volume.ModelStatus) map[string]any {
	model, version := splitVersion(m.Reference)
	return map[string]any{"model": model, "version": version, "digest": m.Digest.String(), "bytes": m.Bytes, "files": m.Files}
}

// splitVersion takes a reference apart for a person: hf://org/name@main is the
// model hf://org/name in version main, qwen:1.9.3 is qwen in version 1.9.3.
func splitVersion(ref string) (model, version string) {
	if at := strings.LastIndex(ref, "@"); at >= 0 {
		return ref[:at], ref[at+1:]
	}
	rest := strings.TrimPrefix(ref, "sha256:")
	if rest != ref {
		return "", ref
	}
	model, version, _ = strings.Cut(ref, ":")
	return model, version
}
