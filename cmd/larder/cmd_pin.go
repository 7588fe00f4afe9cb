package main

import (
	"fmt"
	"maps"
	"slices"
	"time"

	"github.com/opencontainers/go-digest"
	"github.com/spf13/cobra"

	"github.com/larder-project/larder/internal/store"
)

// pinned is a pin, as --json prints it.
type pinned struct {
	Digest     string     `json:"digest"`
	References []string   `json:"references"`
	Pinned     bool       `json:"pinned"`
	Time       *time.Time `json:"time,omitempty"`
	Node       string     `json:"node,omitempty"`
	Why        string     `json:"why,omitempty"`
}

func (a *app) cmdPin() *cobra.Command {
	var why string
	cmd := &cobra.Command{
		Use:     "pin [MODEL...]",
		GroupID: cleaning,
		Short:   "Keep versions whatever a policy says, or list those that are kept so",
		Long: `Keep versions from every policy, from pressure and from larder rm, on all nodes
that share the store, until larder unpin. A name means the version that it names
now: a pin does not move with it. Without a name, list the pins.

  larder pin qwen:1.9.3 --why "production, until the audit"`,
		Args:              takes(0, -1, "models"),
		ValidArgsFunction: a.completeReferences,
		RunE: func(cmd *cobra.Command, args []string) error {
			st, err := a.store()
			if err != nil {
				return err
			}
			if len(args) == 0 {
				return a.listPins(st)
			}
			found, err := resolveAll(st, args)
			if err != nil {
				return err
			}
			for i, v := range found {
				p := store.Pin{Time: time.Now().UTC().Truncate(time.Second), Node: a.cfg.Node, Why: why}
				if err := st.Pin(cmd.Context(), v.Digest, p); err != nil {
					return err
				}
				if err := a.printPin(v, &p, args[i]+" is pinned: "+short(v.Digest.String())); err != nil {
					return err
				}
			}
			return nil
		},
	}
	cmd.Flags().StringVar(&why, "why", "", "the reason, for whoever wonders later")
	return cmd
}

func (a *app) cmdUnpin() *cobra.Command {
	return &cobra.Command{
		Use:               "unpin MODEL...",
		GroupID:           cleaning,
		Short:             "Take pins away",
		Args:              takes(1, -1, "models"),
		ValidArgsFunction: a.completeReferences,
		RunE: func(cmd *cobra.Command, args []string) error {
			st, err := a.store()
			if err != nil {
				return err
			}
			found, err := resolveAll(st, args)
			if err != nil {
				return err
			}
			for i, v := range found {
				was, err := st.Unpin(cmd.Context(), v.Digest)
				if err != nil {
					return err
				}
				text := args[i] + " is not pinned any more"
				if !was {
					text = args[i] + " was not pinned"
				}
				if err := a.printPin(v, nil, text); err != nil {
					return err
				}
			}
			return nil
		},
	}
}

// resolveAll finds the versions that names mean, all or none.
func resolveAll(st *store.Store, names []string) ([]store.Version, error) {
	out := make([]store.Version, len(names))
	for i, name := range names {
		v, _, err := resolve(st, name)
		if err != nil {
			return nil, err
		}
		out[i] = v
	}
	return out, nil
}

func (a *app) printPin(v store.Version, p *store.Pin, text string) error {
	if a.json {
		return printJSON(a.out, describePin(v.Digest, v.References, p))
	}
	_, err := fmt.Fprintln(a.out, text)
	return err
}

func describePin(d digest.Digest, refs []string, p *store.Pin) pinned {
	out := pinned{Digest: d.String(), References: append([]string{}, refs...)}
	if p != nil {
		out.Pinned, out.Node, out.Why = true, p.Node, p.Why
		if !p.Time.IsZero() {
			out.Time = &p.Time
		}
	}
	return out
}

func (a *app) listPins(st *store.Store) error {
	pins, err := st.Pins()
	if err != nil {
		return err
	}
	versions, err := st.Versions()
	if err != nil {
		return err
	}
	t := newTable("MODEL", "VERSION", "PINNED", "NODE", "WHY")
	for _, d := range slices.Sorted(maps.Keys(pins)) {
		p := pins[d]
		at := slices.IndexFunc(versions, func(v store.Version) bool { return v.Digest == d })
		if at < 0 {
			continue // left by a version that is gone
		}
		refs := versions[at].References
		if a.json {
			if err := printJSON(a.out, describePin(d, refs, &p)); err != nil {
				return err
			}
			continue
		}
		t.add(firstOf(refs), short(d.String()), age(time.Now(), p.Time), p.Node, p.Why)
	}
	if a.json {
		return nil
	}
	return t.print(a.out)
}

// firstOf is how a list of references is shown in a column.
func firstOf(refs []string) string {
	switch len(refs) {
	case 0:
		return "-"
	case 1:
		return refs[0]
	}
	return fmt.Sprintf("%s (+%d)", refs[0], len(refs)-1)
}
