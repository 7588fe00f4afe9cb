// Command larder-plugin is Larder's volume driver for Docker and Podman.
//
// It answers the engine's calls on a Unix socket and asks package volume to do
// the work. It is on no data path: containers notice nothing when it is
// killed, and it keeps no state but what package volume has on the disk. So it
// listens first and tidies up afterwards.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"sync"
	"syscall"
	"time"

	dockervolume "github.com/docker/go-plugins-helpers/volume"
	"github.com/spf13/pflag"

	"github.com/larder-project/larder/internal/config"
	"github.com/larder-project/larder/internal/service"
	"github.com/larder-project/larder/internal/store"
	"github.com/larder-project/larder/internal/volume"
)

// version is set by the linker.
var version = "dev"

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	err := run(ctx, os.Args[1:], os.Stderr)
	stop()
	var usage *usageError
	switch {
	case err == nil || errors.Is(err, pflag.ErrHelp):
	case errors.As(err, &usage):
		fmt.Fprintln(os.Stderr, "larder-plugin:", err)
		os.Exit(2)
	default:
		fmt.Fprintln(os.Stderr, "larder-plugin:", err)
		if hint := hintOf(err); hint != "" {
			fmt.Fprintln(os.Stderr, hint)
		}
		os.Exit(1)
	}
}

type usageError struct{ err error }

func (e *usageError) Error() string { return e.err.Error() + "; larder-plugin --help lists the flags" }
func (e *usageError) Unwrap() error { return e.err }

func run(ctx context.Context, args []string, out io.Writer) error {
	flags := pflag.NewFlagSet("larder-plugin", pflag.ContinueOnError)
	flags.SetOutput(out)
	flags.Usage = func() {
		fmt.Fprintf(out, "larder-plugin %s: the volume driver of Larder\n\nFlags:\n%s", version, flags.FlagUsages())
	}
	settings := config.Register(flags, "larder-plugin")
	showVersion := flags.Bool("version", false, "print the version and exit")
	debug := flags.Bool("debug", false, "log every call")
	if err := flags.Parse(args); err != nil {
		return &usageError{err}
	}
	if flags.NArg() > 0 {
		return &usageError{fmt.Errorf("unexpected argument %q", flags.Arg(0))}
	}
	if *showVersion {
		fmt.Println(version)
		return nil
	}
	cfg, err := settings.Load(os.LookupEnv)
	if err != nil {
		return &usageError{err}
	}
	level := slog.LevelInfo
	if *debug {
		level = slog.LevelDebug
	}
	log := slog.New(slog.NewTextHandler(out, &slog.HandlerOptions{Level: level}))
	return serve(ctx, cfg, log)
}

// serve runs the driver until the context ends.
func serve(ctx context.Context, cfg config.Config, log *slog.Logger) error {
	release, err := service.Claim(cfg.State, "plugin")
	if err != nil {
		return err
	}
	defer release()
	// The socket exists before anything that may take time: an engine that
	// starts meanwhile waits instead of giving up.
	listener, err := listen(cfg.Socket)
	if err != nil {
		return err
	}
	defer listener.Close()
	st, err := store.Open(cfg.Store)
	if err != nil {
		return err
	}
	puller := newPuller(ctx, st, cfg, log)
	volumes, err := volume.Open(ctx, volume.Config{
		Store: st, State: cfg.State, Mounts: os.Getenv("LARDER_MOUNTS"), Node: cfg.Node,
		Puller: puller, Log: log, LoopOnly: cfg.LoopOnly, OwnPIDNamespace: cfg.OwnPIDNamespace,
	})
	if err != nil {
		return err
	}
	d := &driver{ctx: ctx, volumes: volumes, log: log}
	served := make(chan error, 1)
	go func() {
		served <- dockervolume.NewHandler(d).Serve(&witness{Listener: listener, seen: volumes.EngineSeen})
	}()
	log.Info("listening", "socket", listener.Addr().String(), "store", cfg.Store, "state", cfg.State, "node", cfg.Node, "version", version)
	if blind := volumes.Blind(); blind != "" {
		log.Warn("until an engine calls that can be seen from here, mounts that were never unmounted stay; give the plugin the host's PID namespace", "reason", blind)
	}
	// Other nodes of a shared store see that this one works.
	if leave, err := st.Attend(ctx, cfg.Node); err != nil {
		log.Warn("show other nodes that this one is alive", "error", err)
	} else {
		defer leave()
	}
	if err := volumes.Sweep(ctx); err != nil {
		log.Warn("tidy up after an earlier run", "error", err)
	}
	var behind sync.WaitGroup
	behind.Go(func() { keep(ctx, log, "look for forgotten mounts", nil, volumes.Reap) })
	// It may be long at it, and nothing else waits.
	behind.Go(func() { keep(ctx, log, "take over downloads", volumes.Ended(), volumes.Absorb) })
	select {
	case err := <-served:
		return fmt.Errorf("serve %s: %w", listener.Addr(), err)
	case <-ctx.Done():
	}
	// Calls that have begun are finished; a mount cut short would only be
	// finished later, but an engine does not ask again.
	_ = listener.Close()
	d.wait(10 * time.Second)
	behind.Wait()
	log.Info("stopped; mounts stay as they are")
	return nil
}

// lookEvery is how often forgotten mounts and downloads are looked for.
const lookEvery = 20 * time.Second

// keep does some work at once, whenever it is called for, and every so often,
// until the context ends. What goes wrong each time in the same way is told
// once.
func keep(ctx context.Context, log *slog.Logger, what string, called <-chan struct{}, work func(context.Context) error) {
	tick := time.NewTicker(lookEvery)
	defer tick.Stop()
	told := ""
	for {
		err := work(ctx)
		switch {
		case err == nil:
			told = ""
		case ctx.Err() == nil && err.Error() != told:
			told = err.Error()
			log.Warn(what, "error", err, "hint", hintOf(err))
		}
		select {
		case <-ctx.Done():
			return
		case <-called:
		case <-tick.C:
		}
	}
}

func hintOf(err error) string {
	var h interface{ Hint() string }
	if errors.As(err, &h) {
		return h.Hint()
	}
	return ""
}
