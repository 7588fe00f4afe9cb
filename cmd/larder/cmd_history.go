package main

import (
	"fmt"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/larder-project/larder/internal/pattern"
	"github.com/larder-project/larder/internal/progress"
	"github.com/larder-project/larder/internal/retention"
	"github.com/larder-project/larder/internal/store"
)

// past is one line of the history, as --json prints it: one for each version of
// an event, or one for an event without versions.
type past struct {
	Event      string    `json:"event"` // removed, restored, deleted
	Time       time.Time `json:"time"`
	Removal    string    `json:"removal"`
	Node       string    `json:"node,omitempty"`
	By         string    `json:"by,omitempty"` // rm, prune, leftovers
	Digest     string    `json:"digest,omitempty"`
	Model      string    `json:"model,omitempty"`
	References []string  `json:"references,omitempty"`
	Reason     string    `json:"reason,omitempty"`
	Rule       string    `json:"rule,omitempty"`
	Why        string    `json:"why,omitempty"`
	Bytes      int64     `json:"bytes"`
}

func (a *app) cmdHistory() *cobra.Command {
	var since string
	var models []string
	cmd := &cobra.Command{
		Use:     "history",
		GroupID: cleaning,
		Short:   "Tell what was removed, brought back and deleted, when, why and how much",
		Long: `Tell what became of versions: what was removed and by which rule, what was
brought back, what was deleted for good. It outlives the trash.`,
		Args:              takes(0, 0, "no arguments"),
		ValidArgsFunction: cobra.NoFileCompletions,
		RunE: func(*cobra.Command, []string) error {
			st, err := a.store()
			if err != nil {
				return err
			}
			var after time.Time
			if since != "" {
				d, err := retention.ParseDuration(since)
				if err != nil {
					return &usageError{err: fmt.Errorf("--since %s: %w", since, err), hint: "write for instance --since 7d"}
				}
				after = time.Now().Add(-d)
			}
			events, err := st.History()
			if err != nil {
				return err
			}
			return a.printHistory(events, after, models)
		},
	}
	cmd.Flags().StringVar(&since, "since", "", "only what happened within so long, such as 7d")
	cmd.Flags().StringArrayVar(&models, "model", nil, "only of models that a pattern fits, such as 'hf://Qwen/*'; may be repeated")
	return cmd
}

func (a *app) printHistory(events []store.Event, after time.Time, models []string) error {
	fits := func(model string) bool {
		for _, m := range models {
			if pattern.Compile(m).Match(model) {
				return true
			}
		}
		return len(models) == 0
	}
	t := newTable("WHEN", "EVENT", "MODEL", "VERSION", ">SIZE", "BY", "WHY")
	for _, e := range events {
		if e.Time.Before(after) {
			continue
		}
		for _, p := range pastOf(e) {
			if !fits(p.Model) {
				continue
			}
			if a.json {
				if err := printJSON(a.out, p); err != nil {
					return err
				}
				continue
			}
			by := p.By
			if p.Rule != "" {
				by += " " + p.Rule
			}
			t.add(p.Time.Local().Format(time.DateTime), p.Event, firstOf(p.References), short(p.Digest), progress.Bytes(p.Bytes), strings.TrimSpace(by), p.Why)
		}
	}
	if a.json {
		return nil
	}
	return t.print(a.out)
}

func pastOf(e store.Event) []past {
	base := past{Event: e.Event, Time: e.Time, Removal: e.Removal, Node: e.Node, By: e.By, Why: e.Reason, Bytes: e.Bytes}
	if len(e.Versions) == 0 {
		return []past{base}
	}
	out := make([]past, len(e.Versions))
	for i, v := range e.Versions {
		p := base
		p.Digest, p.Model, p.References, p.Reason, p.Rule, p.Bytes = v.Digest.String(), v.Model, v.References, v.Reason, v.Rule, v.Bytes
		if v.Why != "" {
			p.Why = v.Why
		}
		out[i] = p
	}
	return out
}
