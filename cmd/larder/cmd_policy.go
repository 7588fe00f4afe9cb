package main

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"

	"github.com/spf13/cobra"

	"github.com/larder-project/larder/internal/disk"
	"github.com/larder-project/larder/internal/retention"
)

// policyInfo is a policy, as --json prints it. Durations and amounts are
// written as in a policy file.
type policyInfo struct {
	File     string      `json:"file,omitempty"` // absent for a profile
	From     string      `json:"from,omitempty"` // who named the file: a flag, a variable, default
	Policy   *policyText `json:"policy"`         // null: there is none
	Warnings []string    `json:"warnings"`
}

type policyText struct {
	Profile        string         `json:"profile,omitempty"`
	Rules          []policyRule   `json:"rules"`
	Pressure       *policyLimit   `json:"pressure"` // null: off
	TrashHold      string         `json:"trash_hold"`
	UnfinishedHold string         `json:"unfinished_hold"`
	Windows        []policyWindow `json:"windows"`
	BytesPerSecond int64          `json:"bytes_per_second,omitempty"`
	FilesPerSecond int            `json:"files_per_second,omitempty"`
	Interval       string         `json:"interval"`
}

type policyRule struct {
	Models       []string `json:"models"`
	Protect      bool     `json:"protect,omitempty"`
	NewestPatch  bool     `json:"newest_patch,omitempty"`
	KeepNewest   int      `json:"keep_newest,omitempty"`
	UnusedFor    string   `json:"unused_for,omitempty"`
	AbandonedFor string   `json:"abandoned_for,omitempty"`
	Rollback     int      `json:"rollback"`
	MinAge       string   `json:"min_age"`
}

type policyLimit struct {
	MinFree string `json:"min_free"`
	Target  string `json:"target"`
}

type policyWindow struct {
	Start    string `json:"start"`
	Duration string `json:"duration"`
	Timezone string `json:"timezone"`
}

func (a *app) cmdPolicy() *cobra.Command {
	cmd := &cobra.Command{
		Use:     "policy",
		GroupID: cleaning,
		Short:   "Explain and check what clean-up may remove",
		Long: `Explain and check the policy of clean-up: which versions may go, when, and which
stay. Without a policy file nothing is ever removed by itself.`,
		SuggestionsMinimumDistance: 2,

		Args: a.onlyVerbs,
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	cmd.AddCommand(a.cmdPolicyShow(), a.cmdPolicyCheck())
	return cmd
}

func (a *app) cmdPolicyShow() *cobra.Command {
	profiles := retention.Profiles()
	return &cobra.Command{
		Use:   "show [PROFILE]",
		Short: "Say in words what the policy in force does, or print a profile",
		Long: fmt.Sprintf(`Say in words what the policy in force does, rule by rule, and where each value
comes from. With the name of a profile (%s) print that one as a
policy file, to start from:

  larder policy show %s >/etc/larder/policy.yaml`, strings.Join(profiles, ", "), profiles[0]),
		Args: takes(0, 1, "at most one profile"),
		ValidArgsFunction: func(_ *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
			if len(args) > 0 {
				return nil, cobra.ShellCompDirectiveNoFileComp
			}
			return profiles, cobra.ShellCompDirectiveNoFileComp
		},
		RunE: func(_ *cobra.Command, args []string) error {
			if len(args) == 1 {
				return a.showProfile(args[0])
			}
			return a.showPolicy()
		},
	}
}

func (a *app) cmdPolicyCheck() *cobra.Command {
	return &cobra.Command{
		Use:   "check [FILE]",
		Short: "Check a policy file and explain it",
		Long: `Check a policy file, or without a name the one in force. All that is wrong is
listed with its line; what is right is explained, with warnings about what is
probably not meant.`,
		Args: takes(0, 1, "at most one file"),
		RunE: func(_ *cobra.Command, args []string) error {
			if len(args) == 1 {
				p, err := readPolicy(args[0])
				if err != nil {
					return err
				}
				return a.explainPolicy(policyInfo{File: args[0]}, p, args[0]+" is valid")
			}
			c, err := a.config()
			if err != nil {
				return err
			}
			p, err := readPolicy(c.Policy)
			if err != nil {
				return err
			}
			return a.explainPolicy(policyInfo{File: c.Policy, From: c.From("policy")}, p, c.Policy+" is valid")
		},
	}
}

// policy reads the policy in force, or nil where there is none: the default
// file may be absent, one that somebody named may not.
func (a *app) policy() (*retention.Policy, error) {
	c, err := a.config()
	if err != nil {
		return nil, err
	}
	p, err := readPolicy(c.Policy)
	if errors.Is(err, fs.ErrNotExist) && c.From("policy") == "default" {
		return nil, nil
	}
	return p, err
}

func readPolicy(name string) (*retention.Policy, error) {
	data, err := os.ReadFile(name)
	if err != nil {
		return nil, fmt.Errorf("read policy: %w", err)
	}
	return retention.Parse(name, data)
}

func (a *app) showPolicy() error {
	p, err := a.policy()
	if err != nil {
		return err
	}
	info := policyInfo{File: a.cfg.Policy, From: a.cfg.From("policy")}
	if p != nil {
		return a.explainPolicy(info, p, fmt.Sprintf("Policy %s (%s)", info.File, info.From))
	}
	if a.json {
		info.Warnings = []string{}
		return printJSON(a.out, info)
	}
	_, err = fmt.Fprintf(a.out, `There is no policy: %s (%s) does not exist. Nothing is ever removed by itself.

To start from one of %s:
  larder policy show %s >%s
`, info.File, info.From, strings.Join(retention.Profiles(), ", "), retention.Profiles()[0], info.File)
	return err
}

func (a *app) showProfile(name string) error {
	text, err := retention.ProfileText(name)
	if err != nil {
		return &usageError{err: err, hint: "larder policy check FILE explains a file"}
	}
	if !a.json {
		_, err := a.out.Write(text)
		return err
	}
	p, err := retention.Profile(name)
	if err != nil {
		return err
	}
	return a.explainPolicy(policyInfo{}, p, "")
}

// explainPolicy prints a policy under a headline, or all of it as JSON.
func (a *app) explainPolicy(info policyInfo, p *retention.Policy, headline string) error {
	info.Warnings = append([]string{}, p.Warnings()...)
	c, err := a.config()
	if err != nil {
		return err
	}
	if _, capacity, err := disk.Free(c.Store); err == nil { // else there is no store yet
		if beyond := p.Beyond(capacity); beyond != "" {
			info.Warnings = append(info.Warnings, beyond)
		}
	}
	if a.json {
		info.Policy = describePolicy(p)
		return printJSON(a.out, info)
	}
	if p.Profile != "" {
		headline += ", on profile " + p.Profile
	}
	var b strings.Builder
	for line := range strings.Lines(headline + "\n\n" + p.Explain()) {
		b.WriteString(printable(strings.TrimSuffix(line, "\n")) + "\n")
	}
	for i, w := range info.Warnings {
		if i == 0 {
			b.WriteString("\n")
		}
		fmt.Fprintf(&b, "%s %s\n", a.paint(yellow, "warning:"), printable(w))
	}
	_, err = fmt.Fprint(a.out, b.String())
	return err
}

func describePolicy(p *retention.Policy) *policyText {
	out := &policyText{
		Profile: p.Profile, Rules: []policyRule{}, Windows: []policyWindow{},
		TrashHold: retention.FormatDuration(p.TrashHold), UnfinishedHold: retention.FormatDuration(p.UnfinishedHold),
		BytesPerSecond: p.Limits.BytesPerSecond, FilesPerSecond: p.Limits.FilesPerSecond, Interval: retention.FormatDuration(p.Interval),
	}
	for _, r := range p.Rules {
		rule := policyRule{
			Models: r.Models, Protect: r.Protect, NewestPatch: r.NewestPatch, KeepNewest: r.KeepNewest,
			Rollback: r.Rollback, MinAge: retention.FormatDuration(r.MinAge),
		}
		if r.UnusedFor > 0 {
			rule.UnusedFor = retention.FormatDuration(r.UnusedFor)
		}
		if r.AbandonedFor > 0 {
			rule.AbandonedFor = retention.FormatDuration(r.AbandonedFor)
		}
		out.Rules = append(out.Rules, rule)
	}
	if w := p.Pressure; w != nil {
		out.Pressure = &policyLimit{w.MinFree.String(), w.Target.String()}
	}
	for _, w := range p.Windows {
		out.Windows = append(out.Windows, policyWindow{w.Start, retention.FormatDuration(w.Duration), w.Zone.String()})
	}
	return out
}
