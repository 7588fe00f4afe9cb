package main

import (
	"context"
	"log/slog"
	"path/filepath"

	"github.com/fsnotify/fsnotify"

	v1 "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/larder-project/larder/internal/config"
	"github.com/larder-project/larder/internal/mounttable"
)

// watches tell of changes on this node, beside what engines tell: versions that
// come and go, volumes, pins, mounts. Where one cannot be had, what it would
// have told is seen at the next look all the same.
func watches(cfg config.Config, log *slog.Logger) []func(context.Context, func()) {
	out := []func(context.Context, func()){func(ctx context.Context, changed func()) {
		if err := watchFolders(ctx, changed, cfg); err != nil && ctx.Err() == nil {
			log.Info("changes of the store are seen late", "error", err)
		}
	}}
	// This process's own table, and that of the host where they differ.
	for _, pid := range []string{"self", "1"} {
		out = append(out, func(ctx context.Context, changed func()) {
			if err := mounttable.Watch(ctx, pid, changed); err != nil && ctx.Err() == nil {
				log.Debug("changes of mounts are seen late", "error", err)
			}
		})
	}
	return out
}

func watchFolders(ctx context.Context, changed func(), cfg config.Config) error {
	w, err := fsnotify.NewWatcher()
	if err != nil {
		return err
	}
	defer w.Close()
	index := filepath.Join(cfg.Store, v1.ImageIndexFile)
	for _, dir := range []string{cfg.Store, filepath.Join(cfg.Store, "pins"), filepath.Join(cfg.State, "volumes")} {
		if err := w.Add(dir); err != nil {
			return err
		}
	}
	for {
		select {
		case <-ctx.Done():
			return nil
		case err := <-w.Errors:
			return err
		case e := <-w.Events:
			// In the store's own folder also lie its lock and its history.
			if filepath.Dir(e.Name) != cfg.Store || e.Name == index {
				changed()
			}
		}
	}
}
