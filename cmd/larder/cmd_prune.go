package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"github.com/spf13/cobra"

	"github.com/larder-project/larder/internal/cleanup"
	"github.com/larder-project/larder/internal/gc"
	"github.com/larder-project/larder/internal/progress"
	"github.com/larder-project/larder/internal/retention"
	"github.com/larder-project/larder/internal/store"
)

// decided is what a plan says of one version, and what became of it, as --json
// prints it.
type decided struct {
	Event      string     `json:"event"`             // decision
	Action     string     `json:"action"`            // keep, remove
	Fate       string     `json:"fate,omitempty"`    // of what was to be removed: removed, skipped, failed; absent in a dry run
	Because    string     `json:"because,omitempty"` // of skipped and failed
	Model      string     `json:"model,omitempty"`
	Digest     string     `json:"digest"`
	References []string   `json:"references"`
	Reason     string     `json:"reason"` // a word; see docs/policy.md
	Why        string     `json:"why"`
	Rule       string     `json:"rule,omitempty"`
	LastUsed   *time.Time `json:"last_used,omitempty"`
	Bytes      int64      `json:"bytes"`             // that go, or went, with it
	Removal    string     `json:"removal,omitempty"` // that larder undo takes
}

// pruned sums a run up.
type pruned struct {
	Event     string         `json:"event"` // pruned
	DryRun    bool           `json:"dry_run"`
	Kept      int            `json:"kept"`
	Removed   int            `json:"removed"` // in a dry run, that would be
	Skipped   int            `json:"skipped"`
	Bytes     int64          `json:"bytes"`     // moved to the trash
	Leftovers int64          `json:"leftovers"` // bytes that broken pulls had left, and that went
	Emptied   int            `json:"emptied"`   // removals that were deleted for good
	Freed     int64          `json:"freed"`     // bytes given back to the file system
	Free      int64          `json:"free"`      // bytes free before
	Pressure  *prunePressure `json:"pressure,omitempty"`
}

type prunePressure struct {
	Limit  int64 `json:"limit"`
	Target int64 `json:"target"`
	After  int64 `json:"after"`
	Short  bool  `json:"short"` // the target cannot be reached
}

func (a *app) cmdPrune() *cobra.Command {
	var o cleanup.Options
	var untilFree, profile string
	cmd := &cobra.Command{
		Use:     "prune",
		GroupID: cleaning,
		Short:   "Remove what the policy says may go, or say what that is",
		Long: `Carry out the policy now: remove the versions that it lets go, drop what broken
pulls left, and empty the trash of what has lain there for long enough. Windows
of the policy are for larder-sidecar; who calls this does not wait for them.

With --until-free nothing goes, not from the trash either, where so much is free.

What is in use, pinned, protected or needed to roll back stays, always. If it is
not known whether something is in use, nothing is removed. larder undo brings a
removal back as long as it is in the trash.

  larder prune --dry-run                  # the plan: what goes, what stays, and why
  larder prune --model 'ci-*'             # only of these models
  larder prune --until-free 200GiB        # the least recently used, until so much is free
  larder prune --dry-run --profile ci     # what a policy of another name would do`,
		Args:              takes(0, 0, "no arguments"),
		ValidArgsFunction: cobra.NoFileCompletions,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if untilFree != "" {
				amount, err := retention.ParseAmount(untilFree)
				if err != nil {
					return &usageError{err: fmt.Errorf("--until-free %s: %w", untilFree, err), hint: "write for instance --until-free 200GiB or --until-free 15%"}
				}
				o.UntilFree = amount
			}
			policy, err := a.policyFor(profile, untilFree != "")
			if err != nil {
				return err
			}
			o.Policy = policy
			return a.prune(cmd.Context(), o)
		},
	}
	cmd.Flags().BoolVar(&o.DryRun, "dry-run", false, "print the plan, and change nothing")
	cmd.Flags().StringArrayVar(&o.Models, "model", nil, "only models that a pattern fits, such as 'hf://Qwen/*'; may be repeated")
	cmd.Flags().StringVar(&untilFree, "until-free", "", "make room by least recent use until so much is free (200GiB, 15%), instead of applying the rules")
	cmd.Flags().StringVar(&profile, "profile", "", "a profile instead of the policy file; see larder policy show")
	return cmd
}

// policyFor is the policy of a run: a profile, or the file's. Without one there
// is nothing to carry out, unless room is to be made.
func (a *app) policyFor(profile string, room bool) (*retention.Policy, error) {
	if profile != "" {
		p, err := retention.Profile(profile)
		if err != nil {
			return nil, &usageError{err: fmt.Errorf("--profile: %w", err), hint: "larder policy show lists the profiles"}
		}
		return p, nil
	}
	p, err := a.policy()
	if err == nil && p == nil && !room {
		return nil, &hintError{
			err:  fmt.Errorf("there is no policy, so nothing may go: %s is not there", a.cfg.Policy),
			hint: "larder policy show ci prints one to begin with; or say --profile NAME, or --until-free AMOUNT",
		}
	}
	return p, err
}

func (a *app) prune(ctx context.Context, o cleanup.Options) error {
	c, err := a.collector(ctx)
	if err != nil {
		return err
	}
	o.AnyTime = true
	cleaner := &cleanup.Cleaner{Collector: c, Log: slog.New(slog.DiscardHandler)}
	run, err := cleaner.Prepare(ctx, o)
	if err != nil {
		return err
	}
	if beyond := run.Report.Plan.Beyond; beyond != "" {
		if o.UntilFree != (retention.Amount{}) {
			return &usageError{err: fmt.Errorf("--until-free: %s", beyond), hint: "larder df says how large the file system is and what is free"}
		}
		a.warn("%s", beyond)
	}
	if !o.DryRun {
		err = run.Do(ctx)
	}
	for _, f := range run.Report.Inventory.Failed {
		if o.DryRun {
			a.warn("%v; as long as that is so, nothing would be removed", f)
		}
	}
	return errors.Join(a.printPruned(run.Report, o), err)
}

func (a *app) printPruned(r *cleanup.Report, o cleanup.Options) error {
	fates := map[string]gc.Outcome{}
	for _, out := range r.Outcomes {
		fates[out.Decision.Digest.String()] = out
	}
	sum := pruned{Event: "pruned", DryRun: o.DryRun, Bytes: 0, Leftovers: r.Dropped, Emptied: len(r.Condemned), Freed: r.Freed, Free: r.Inventory.Usage.Free}
	if o.DryRun {
		sum.Leftovers = r.Leftovers.Bytes
	}
	if p := r.Plan.Pressure; p != nil {
		sum.Pressure = &prunePressure{p.Limit, p.Target, p.After, p.Short}
	}
	t := newTable("", "MODEL", "VERSION", ">FREES", "WHY")
	for _, d := range r.Plan.Decisions {
		line := describeDecision(d)
		if !d.Remove {
			sum.Kept++
		} else if out, done := fates[line.Digest]; done {
			line.Fate, line.Because, line.Removal = string(out.Fate), out.Why, out.Removal
			if line.Bytes = out.Bytes; out.Fate == gc.Gone {
				sum.Removed++
				sum.Bytes += out.Bytes
			} else {
				sum.Skipped++
			}
		} else {
			sum.Removed++
			sum.Bytes += d.Frees
		}
		if a.json {
			if err := printJSON(a.out, line); err != nil {
				return err
			}
			continue
		}
		t.add(a.pruneRow(line)...)
	}
	if a.json {
		return printJSON(a.out, sum)
	}
	if len(r.Plan.Decisions) > 0 {
		if err := t.print(a.out); err != nil {
			return err
		}
		if _, err := fmt.Fprintln(a.out); err != nil {
			return err
		}
	}
	return a.printPruneSum(sum, fates, r.Condemned)
}

func describeDecision(d retention.Decision) decided {
	out := decided{
		Event: "decision", Action: "keep", Model: d.Model, Digest: d.Digest.String(), References: append([]string{}, d.References...),
		Reason: string(d.Reason), Why: d.Why, Rule: d.Rule, Bytes: d.Frees,
	}
	if d.Remove {
		out.Action = "remove"
	}
	if !d.LastUsed.IsZero() {
		out.LastUsed = &d.LastUsed
	}
	return out
}

func (a *app) pruneRow(d decided) []string {
	what, why, frees := "keep", d.Why, "-"
	if d.Action == "remove" {
		what, frees = "remove", progress.Bytes(d.Bytes)
		if d.Rule != "" {
			why = d.Rule + ": " + why
		}
	}
	switch d.Fate {
	case string(gc.Gone):
		what = "removed"
	case string(gc.Skipped):
		what, frees, why = "kept", "-", "was to go, but "+d.Because
	case string(gc.Failed):
		what, frees, why = "failed", "-", d.Because
	}
	return []string{what, firstOf(d.References), short(d.Digest), frees, why}
}

func (a *app) printPruneSum(s pruned, fates map[string]gc.Outcome, condemned []store.Removal) error {
	verb, trash := "removed", "moved to the trash"
	if s.DryRun {
		verb, trash = "would remove", "would go to the trash"
	}
	lines := []string{fmt.Sprintf("%s %s: %s (%d bytes) %s; %s kept", verb, plural(s.Removed, "version"), progress.Bytes(s.Bytes), s.Bytes, trash, plural(s.Kept+s.Skipped, "version"))}
	if s.Leftovers > 0 {
		lines = append(lines, fmt.Sprintf("%s that broken pulls had left", progress.Bytes(s.Leftovers)))
	}
	if s.Emptied > 0 || s.Freed > 0 {
		lines = append(lines, fmt.Sprintf("%s deleted for good, %s given back", plural(s.Emptied, "removal"), progress.Bytes(s.Freed)))
	}
	if p := s.Pressure; p != nil {
		line := fmt.Sprintf("%s free, the limit is %s, the target %s; then %s", progress.Bytes(s.Free), progress.Bytes(p.Limit), progress.Bytes(p.Target), progress.Bytes(p.After))
		if p.Short {
			line += ": THE TARGET CANNOT BE REACHED; what is left is in use, pinned, protected or needed to roll back"
		}
		lines = append(lines, line)
	}
	told := map[string]bool{}
	for _, r := range condemned {
		told[r.ID] = true
	}
	for _, o := range fates {
		if o.Removal != "" && !told[o.Removal] {
			told[o.Removal] = true
			lines = append(lines, "larder undo "+o.Removal+" brings it back")
		}
	}
	for _, l := range lines {
		if _, err := fmt.Fprintln(a.out, l); err != nil {
			return err
		}
	}
	return nil
}
