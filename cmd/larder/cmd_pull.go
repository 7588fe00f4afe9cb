package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"

	"github.com/spf13/cobra"
	"golang.org/x/time/rate"

	"github.com/larder-project/larder/internal/config"
	"github.com/larder-project/larder/internal/progress"
	"github.com/larder-project/larder/internal/pull"
	"github.com/larder-project/larder/internal/reference"
	"github.com/larder-project/larder/internal/source"
	"github.com/larder-project/larder/internal/source/huggingface"
)

func (a *app) cmdPull() *cobra.Command {
	var o struct {
		include, exclude, as []string
		jobs                 int
		quiet                bool
	}
	cmd := &cobra.Command{
		Use:     "pull hf://ORG/NAME[@REVISION]",
		GroupID: models,
		Short:   "Fetch a model from a Hugging Face hub into the store",
		Long: `Fetch a model from a Hugging Face hub into the store, at one fixed commit. Files
that the store has are not fetched again, whatever model they came with. A pull
that was interrupted goes on where it stopped.

  larder pull hf://Qwen/Qwen2.5-0.5B
  larder pull hf://Qwen/Qwen2.5-0.5B@main --exclude '*.onnx' --as qwen:2.5

The hub is HF_ENDPOINT (https://huggingface.co), the token HF_TOKEN or what
"hf auth login" stored.`,
		Args:              takes(1, 1, "one model"),
		ValidArgsFunction: cobra.NoFileCompletions,
		RunE: func(cmd *cobra.Command, args []string) error {
			ref, err := reference.Parse(args[0])
			if err != nil {
				return err
			}
			if ref.Kind != reference.Hub {
				e := &usageError{err: fmt.Errorf("%q is not on a hub", args[0]), hint: "write hf://ORG/NAME or hf://ORG/NAME@REVISION"}
				if reference.CheckHubRepo(ref.Repo) == nil && strings.Contains(ref.Repo, "/") {
					e.hint = "did you mean hf://" + ref.Repo + "?"
				}
				return e
			}
			names, err := parseNames(o.as)
			if err != nil {
				return err
			}
			if cmd.Flags().Changed("jobs") && (o.jobs < 1 || o.jobs > config.MaxJobs) {
				return &usageError{err: fmt.Errorf("--jobs %d: from 1 to %d", o.jobs, config.MaxJobs)}
			}
			c, err := a.config()
			if err != nil {
				return err
			}
			if o.jobs == 0 {
				o.jobs = c.Jobs
			}
			m := a.meter(o.quiet)
			defer m.Close()
			src, err := a.hub(c, ref, o.include, o.exclude, m)
			if err != nil {
				return err
			}
			return a.bring(cmd.Context(), src, bringing{what: ref.String(), names: names, jobs: o.jobs, meter: m})
		},
	}
	f := cmd.Flags()
	f.StringArrayVar(&o.include, "include", nil, "fetch only files that match this `pattern`; may be repeated")
	f.StringArrayVar(&o.exclude, "exclude", nil, "leave out files that match this `pattern`; may be repeated")
	f.StringArrayVar(&o.as, "as", nil, "also give it this short name, `NAME:TAG`; may be repeated")
	f.IntVar(&o.jobs, "jobs", 0, "connections at the same time (default: the setting jobs)")
	f.BoolVarP(&o.quiet, "quiet", "q", false, "show no progress")
	return cmd
}

// hub is the source of a reference to a hub.
func (a *app) hub(c config.Config, ref reference.Reference, include, exclude []string, m *progress.Meter) (source.Source, error) {
	token, err := a.token(c)
	if err != nil {
		return nil, err
	}
	src, err := huggingface.New(huggingface.Options{
		Endpoint: c.HubEndpoint, Token: token,
		Repo: ref.Repo, Revision: ref.Revision,
		Include: include, Exclude: exclude,
		UserAgent: "larder/" + thisBuild().Version,
		Pace:      a.hubPace(c),
		OnWait:    waits(m),
	})
	if err != nil {
		return nil, &usageError{err: err} // New has asked nobody: it is the request that is wrong
	}
	return src, nil
}

// hubPace is one for all models of a command.
func (a *app) hubPace(c config.Config) *rate.Limiter {
	if a.pace == nil {
		a.pace = huggingface.PerMinute(c.HubCalls)
	}
	return a.pace
}

// token is what the setting hub.token-file names, else what the hub's own
// client would use.
func (a *app) token(c config.Config) (string, error) {
	if c.HubTokenFile == "" {
		return huggingface.Token(a.getenv)
	}
	text, err := os.ReadFile(c.HubTokenFile)
	if err != nil {
		return "", fmt.Errorf("read the hub's token (hub.token-file): %w", err)
	}
	return strings.TrimSpace(string(text)), nil
}

// parseNames reads names that a version is to be given.
func parseNames(names []string) ([]reference.Reference, error) {
	out := make([]reference.Reference, len(names))
	for i, name := range names {
		r, err := parseFixed(name)
		if err != nil {
			return nil, err
		}
		out[i] = r
	}
	return out, nil
}

// bringing is one model on its way into the store.
type bringing struct {
	what  string // as the user knows it; empty: what it calls itself
	names []reference.Reference
	jobs  int
	move  bool
	meter *progress.Meter
}

// brought is the last object that pull and import print for a model with
// --json.
type brought struct {
	Event string `json:"event"` // done
	versionInfo
	Unchanged bool  `json:"unchanged"` // it was there before
	Fetched   int64 `json:"fetched"`   // bytes that were fetched or copied now
	Resumed   int64 `json:"resumed"`   // bytes that an interrupted attempt had left
	Reused    int64 `json:"reused"`    // bytes that the store had
}

// bring gets one model into the store and tells about it.
func (a *app) bring(ctx context.Context, src source.Source, b bringing) error {
	st, err := a.store()
	if err != nil {
		return err
	}
	res, err := pull.Run(ctx, st, src, pull.Options{
		Node: a.cfg.Node, Jobs: b.jobs, Move: b.move,
		Progress: &pullProgress{m: b.meter, what: b.what},
	})
	b.meter.Finish()
	if err != nil && res.Version.Digest == "" {
		return err
	}
	v := res.Version
	if len(b.names) > 0 {
		tagged, tagErr := st.Tag(ctx, v.Digest, b.names...)
		if tagErr != nil {
			return errors.Join(err, tagErr)
		}
		v = tagged
	}
	// An error beside a version: it is in the store, but not all is well, as
	// when files could not be removed after --move.
	info := describe(v, res.Model)
	if a.json {
		return errors.Join(printJSON(a.out, brought{"done", info, res.Unchanged, res.Fetched, res.Resumed, res.Reused}), err)
	}
	how := "nothing was to be done"
	if !res.Unchanged {
		var parts []string
		for _, part := range []struct {
			n    int64
			text string
		}{{res.Fetched, "new"}, {res.Resumed, "from an earlier attempt"}, {res.Reused, "in the store before"}} {
			if part.n > 0 {
				parts = append(parts, progress.Bytes(part.n)+" "+part.text)
			}
		}
		how = strings.Join(parts, ", ")
	}
	name := b.what
	switch {
	case len(b.names) > 0:
		name = b.names[0].String()
	case name == "" && len(v.References) > 0:
		name = v.References[0]
	}
	line := fmt.Sprintf("%s is %s: %s, %s", name, short(info.Digest), plural(info.Files, "file"), progress.Bytes(info.Size))
	if how != "" {
		line += " (" + how + ")"
	}
	_, printErr := fmt.Fprintln(a.out, line)
	return errors.Join(printErr, err)
}
