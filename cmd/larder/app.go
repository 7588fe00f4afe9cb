package main

import (
	"context"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/time/rate"

	"github.com/larder-project/larder/internal/clock"
	"github.com/larder-project/larder/internal/config"
	"github.com/larder-project/larder/internal/gc"
	"github.com/larder-project/larder/internal/store"
	"github.com/larder-project/larder/internal/usage"
	"github.com/larder-project/larder/internal/usage/sources"
	"github.com/larder-project/larder/internal/volume"
)

// app is what the verbs share.
type app struct {
	out, err io.Writer
	lookup   func(string) (string, bool) // the environment
	flags    *config.Flags
	json     bool

	cfg  *config.Config  // by config()
	st   *store.Store    // by store()
	vols *volume.Manager // by volumes()
	pace *rate.Limiter   // by hubPace()
}

func (a *app) root() *cobra.Command {
	root := &cobra.Command{
		Use:   "larder",
		Short: "One copy of every AI model on a node, and a private writable view of it for every container",
		Long: `Larder keeps every file of every model once, and gives each container a private
writable view of the model it asks for.

  larder pull hf://Qwen/Qwen2.5-0.5B
  docker run --mount type=volume,volume-driver=larder,volume-opt=model=hf://Qwen/Qwen2.5-0.5B,dst=/models IMAGE`,
		Args:              a.onlyVerbs,
		RunE:              func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
		SilenceErrors:     true,
		SilenceUsage:      true,
		DisableAutoGenTag: true,

		SuggestionsMinimumDistance: 2,
	}
	root.SetOut(a.out)
	root.SetErr(a.err)
	root.SetFlagErrorFunc(func(cmd *cobra.Command, err error) error {
		return &usageError{err: err, hint: "see " + cmd.CommandPath() + " --help"}
	})
	root.PersistentFlags().BoolVar(&a.json, "json", false, "print JSON, one object a line; errors too")
	a.flags = config.Register(root.PersistentFlags(), "larder")
	root.AddGroup(
		&cobra.Group{ID: models, Title: "Models:"},
		&cobra.Group{ID: cleaning, Title: "What goes, and what stays:"},
		&cobra.Group{ID: views, Title: "Views and volumes:"},
		&cobra.Group{ID: host, Title: "This host:"},
	)
	root.SetHelpCommandGroupID(host)
	root.SetCompletionCommandGroupID(host)
	root.AddCommand(
		a.cmdPull(), a.cmdImport(), a.cmdLs(), a.cmdShow(), a.cmdTag(), a.cmdVerify(),
		a.cmdRm(), a.cmdPrune(), a.cmdUndo(), a.cmdTrash(), a.cmdHistory(), a.cmdPin(), a.cmdUnpin(), a.cmdWhy(), a.cmdPolicy(),
		a.cmdPs(), a.cmdMount(), a.cmdUmount(), a.cmdVolume(),
		a.cmdDf(), a.cmdNode(), a.cmdDoctor(), a.cmdVersion(),
		a.topicExitCodes(), a.topicConfig(),
	)
	return root
}

// Groups of verbs in the help.
const (
	models   = "models"
	cleaning = "cleaning"
	views    = "views"
	host     = "host"
)

// onlyVerbs refuses arguments of a command that has only verbs below it.
func (a *app) onlyVerbs(cmd *cobra.Command, args []string) error {
	if len(args) == 0 {
		return nil
	}
	e := &usageError{err: fmt.Errorf("there is no verb %q", args[0])}
	if near := cmd.SuggestionsFor(args[0]); len(near) > 0 {
		e.hint = "did you mean " + cmd.CommandPath() + " " + strings.Join(near, " or ") + "?"
	} else {
		e.hint = "see " + cmd.CommandPath() + " --help"
	}
	return e
}

// takes checks the number of arguments; what says what they are. max below 0
// stands for any number.
func takes(min, max int, what string) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		if len(args) >= min && (max < 0 || len(args) <= max) {
			return nil
		}
		got := fmt.Sprintf("got %d arguments", len(args))
		switch len(args) {
		case 0:
			got = "got none"
		case 1:
			got = "got one"
		}
		return &usageError{
			err:  fmt.Errorf("takes %s, %s", what, got),
			hint: "use: " + cmd.UseLine(),
		}
	}
}

// config reads the settings, once.
func (a *app) config() (config.Config, error) {
	if a.cfg == nil {
		c, err := a.flags.Load(a.lookup)
		if err != nil {
			return config.Config{}, err
		}
		a.cfg = &c
	}
	return *a.cfg, nil
}

// store opens the store, once. It is made where there is none.
//
//nolint:contextcheck // making a store is short and not to be cut off
func (a *app) store() (*store.Store, error) {
	if a.st == nil {
		c, err := a.config()
		if err != nil {
			return nil, err
		}
		s, err := store.Open(c.Store)
		if err != nil {
			return nil, err
		}
		a.st = s
	}
	return a.st, nil
}

// volumes opens this node's state, once. It is made where there is none.
func (a *app) volumes(ctx context.Context) (*volume.Manager, error) {
	if a.vols == nil {
		st, err := a.store()
		if err != nil {
			return nil, err
		}
		m, err := volume.Open(ctx, volume.Config{Store: st, State: a.cfg.State, Node: a.cfg.Node, LoopOnly: a.cfg.LoopOnly, OwnPIDNamespace: a.cfg.OwnPIDNamespace})
		if err != nil {
			return nil, err
		}
		a.vols = m
	}
	return a.vols, nil
}

// collector removes from the store for this node. Ages follow the node's own
// clock, which no jump of the wall clock rushes.
func (a *app) collector(ctx context.Context) (*gc.Collector, error) {
	set, err := a.sources(ctx)
	if err != nil {
		return nil, err
	}
	clk, err := clock.Open(a.cfg.State, "")
	if err != nil {
		return nil, err
	}
	return &gc.Collector{Store: a.st, Node: a.vols.Node(), Sources: set.Sources(), Views: a.vols, Now: clk.Now}, nil
}

// sources are all that knows what is in use on this node.
func (a *app) sources(ctx context.Context) (*sources.Set, error) {
	m, err := a.volumes(ctx)
	if err != nil {
		return nil, err
	}
	return sources.Of(*a.cfg, m), nil
}

// uses asks all sources, for a list that is worth having even where it is not
// whole. A source that cannot tell is named on stderr.
func (a *app) uses(ctx context.Context) ([]usage.Use, error) {
	set, err := a.sources(ctx)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, engineTimeout)
	defer cancel()
	uses, failed := usage.Gather(ctx, set.Sources())
	for _, f := range failed {
		a.warn("%v; what it knows is missing here", f)
	}
	return uses, nil
}

// engineTimeout bounds what a list waits for an engine.
const engineTimeout = 5 * time.Second

// getenv is os.Getenv on the app's environment.
func (a *app) getenv(name string) string {
	v, _ := a.lookup(name)
	return v
}

// asksForJSON looks for --json among arguments that could not be parsed.
func asksForJSON(args []string) bool {
	if end := slices.Index(args, "--"); end >= 0 {
		args = args[:end]
	}
	return slices.Contains(args, "--json") || slices.Contains(args, "--json=true")
}

// verbOf is how messages name a command: "pull", "volume rm", or "" for the
// root.
func verbOf(cmd *cobra.Command) string {
	_, verb, _ := strings.Cut(cmd.CommandPath(), " ")
	return verb
}
