// Command larder-sidecar keeps a node's store clean: it counts who uses what,
// removes by policy what nothing uses, and shows what it does as metrics and as
// a page.
//
// It is on no data path and keeps nothing in memory that matters: killed at any
// step, the next one goes on. Without a policy it removes nothing, and only
// counts.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/signal"
	"sync"
	"syscall"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"
	"github.com/spf13/pflag"

	"github.com/larder-project/larder/internal/cleanup"
	"github.com/larder-project/larder/internal/clock"
	"github.com/larder-project/larder/internal/config"
	"github.com/larder-project/larder/internal/gc"
	"github.com/larder-project/larder/internal/service"
	"github.com/larder-project/larder/internal/store"
	"github.com/larder-project/larder/internal/usage/sources"
	"github.com/larder-project/larder/internal/volume"
)

// version is set by the linker.
var version = "dev"

func main() {
	signal.Ignore(syscall.SIGHUP) // until somebody listens to it: policyFile.watch
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	err := run(ctx, os.Args[1:], os.Stderr)
	stop()
	var usage *usageError
	switch {
	case err == nil || errors.Is(err, pflag.ErrHelp):
	case errors.As(err, &usage):
		fmt.Fprintln(os.Stderr, "larder-sidecar:", err)
		os.Exit(2)
	default:
		fmt.Fprintln(os.Stderr, "larder-sidecar:", err)
		var h interface{ Hint() string }
		if errors.As(err, &h) && h.Hint() != "" {
			fmt.Fprintln(os.Stderr, h.Hint())
		}
		os.Exit(1)
	}
}

type usageError struct{ err error }

func (e *usageError) Error() string {
	return e.err.Error() + "; larder-sidecar --help lists the flags"
}
func (e *usageError) Unwrap() error { return e.err }

func run(ctx context.Context, args []string, out io.Writer) error {
	flags := pflag.NewFlagSet("larder-sidecar", pflag.ContinueOnError)
	flags.SetOutput(out)
	flags.Usage = func() {
		fmt.Fprintf(out, "larder-sidecar %s: cleans up the store of a node, and shows what it holds\n\nFlags:\n%s", version, flags.FlagUsages())
	}
	settings := config.Register(flags, "larder-sidecar")
	showVersion := flags.Bool("version", false, "print the version and exit")
	debug := flags.Bool("debug", false, "log more")
	format := flags.String("log-format", "text", "how to log: text or json")
	grace := flags.Duration("grace", time.Minute, "wait so long before the first clean-up by schedule")
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
	log, err := logger(out, *format, *debug)
	if err != nil {
		return &usageError{err}
	}
	cfg, err := settings.Load(os.LookupEnv)
	if err != nil {
		return &usageError{err}
	}
	if err := checkListen(ctx, cfg.Listen, cfg.AllowRemote); err != nil {
		return &usageError{err}
	}
	return serve(ctx, cfg, *grace, log)
}

func logger(out io.Writer, format string, debug bool) (*slog.Logger, error) {
	o := &slog.HandlerOptions{Level: slog.LevelInfo}
	if debug {
		o.Level = slog.LevelDebug
	}
	switch format {
	case "text":
		return slog.New(slog.NewTextHandler(out, o)), nil
	case "json":
		return slog.New(slog.NewJSONHandler(out, o)), nil
	}
	return nil, fmt.Errorf("--log-format %q is neither text nor json", format)
}

// serve cleans up and answers until the context ends.
func serve(ctx context.Context, cfg config.Config, grace time.Duration, log *slog.Logger) error {
	release, err := service.Claim(cfg.State, "sidecar")
	if err != nil {
		return err
	}
	defer release()
	listener, err := listen(cfg.Listen, cfg.AllowRemote)
	if err != nil {
		return err
	}
	defer listener.Close()
	steady, err := clock.Open(cfg.State, "")
	if err != nil {
		return err
	}
	st, err := store.Open(cfg.Store, store.WithClock(steady.Now))
	if err != nil {
		return err
	}
	volumes, err := volume.Open(ctx, volume.Config{
		Store: st, State: cfg.State, Mounts: os.Getenv("LARDER_MOUNTS"), Node: cfg.Node,
		Log: log, OwnPIDNamespace: cfg.OwnPIDNamespace,
	})
	if err != nil {
		return err
	}
	absent, err := st.Attend(ctx, cfg.Node)
	if err != nil {
		return err
	}
	defer absent()

	set := sources.Of(cfg, volumes)
	collector := &gc.Collector{Store: st, Node: cfg.Node, Sources: set.Sources(), Views: volumes, Now: steady.Now, Log: log}
	policy := newPolicyFile(cfg.Policy, cfg.From("policy") != "default", log)
	metrics := newMetrics()
	loop := cleanup.NewLoop(cleanup.Config{
		Cleaner: &cleanup.Cleaner{Collector: collector, Log: log}, State: cfg.State, Policy: policy.state().policy,
		Watch: append(watches(cfg, log), set.Watch), Grace: grace, Log: log, Ran: metrics.ran,
	})
	node := &node{name: cfg.Node, store: cfg.Store, loop: loop, policy: policy, clock: steady, sources: sourceNames(collector)}
	server, err := newServer(node, metrics, hosts(cfg, listener), log)
	if err != nil {
		return err
	}
	return runAll(ctx, node, server, listener, log)
}

// runAll runs the parts until the context ends or the server cannot go on.
func runAll(ctx context.Context, n *node, server *server, listener net.Listener, log *slog.Logger) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	served := make(chan error, 1)
	go func() { served <- server.Serve(listener) }()
	log.Info("listening", "address", listener.Addr().String(), "store", n.store, "node", n.name, "policy", n.policy.path, "version", version)
	var parts sync.WaitGroup
	parts.Go(func() { n.loop.Run(ctx) })
	parts.Go(func() { n.policy.watch(ctx, n.loop.SetPolicy) })
	parts.Go(func() { notify(ctx, n) })
	var err error
	select {
	case err = <-served:
		err = fmt.Errorf("serve %s: %w", listener.Addr(), err)
	case <-ctx.Done():
	}
	cancel()
	parts.Wait()
	server.stop()
	if saveErr := n.clock.Save(); saveErr != nil {
		log.Warn("save the clock", "error", saveErr)
	}
	if err == nil {
		log.Info("stopped; the next one goes on where this one was")
	}
	return err
}

// notify tells systemd, where it asks, that the process is ready and lives.
func notify(ctx context.Context, n *node) {
	_, _ = daemon.SdNotify(false, daemon.SdNotifyReady)
	every, err := daemon.SdWatchdogEnabled(false)
	if err != nil || every == 0 {
		every = time.Hour
	}
	tick := time.NewTicker(every / 3)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			_, _ = daemon.SdNotify(false, daemon.SdNotifyStopping)
			return
		case <-tick.C:
			if n.loop.Stuck() == "" {
				_, _ = daemon.SdNotify(false, daemon.SdNotifyWatchdog)
			}
		}
	}
}

func sourceNames(c *gc.Collector) []string {
	names := make([]string, len(c.Sources))
	for i, s := range c.Sources {
		names[i] = s.Name()
	}
	return names
}

// node is what the server shows.
type node struct {
	name    string
	store   string // its folder
	loop    *cleanup.Loop
	policy  *policyFile
	clock   *clock.Clock
	sources []string

	summaries summaries
}
