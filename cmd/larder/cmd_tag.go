package main

import (
	"fmt"

	"github.com/spf13/cobra"

	"github.com/larder-project/larder/internal/reference"
)

func (a *app) cmdTag() *cobra.Command {
	return &cobra.Command{
		Use:     "tag MODEL REFERENCE...",
		GroupID: models,
		Short:   "Give a version in the store another name",
		Long: `Give a version in the store more references. A reference that named another
version moves; that version stays reachable by its commit or digest.

  larder tag hf://Qwen/Qwen2.5-0.5B qwen:2.5.0`,
		Args: takes(2, -1, "a model and the names to give it"),
		ValidArgsFunction: func(cmd *cobra.Command, args []string, part string) ([]string, cobra.ShellCompDirective) {
			return a.completeReferences(cmd, args, part)
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			refs := make([]reference.Reference, len(args)-1)
			for i, name := range args[1:] {
				r, err := parseFixed(name)
				if err != nil {
					return err
				}
				refs[i] = r
			}
			st, err := a.store()
			if err != nil {
				return err
			}
			v, _, err := resolve(st, args[0])
			if err != nil {
				return err
			}
			v, err = st.Tag(cmd.Context(), v.Digest, refs...)
			if err != nil {
				return err
			}
			st.TouchPulled(a.cfg.Node, v.Digest)
			m, err := st.Model(v.Digest)
			if err != nil {
				return err
			}
			if a.json {
				return printJSON(a.out, describe(v, m))
			}
			for _, r := range refs {
				if _, err := fmt.Fprintf(a.out, "%s is %s\n", r, short(v.Digest.String())); err != nil {
					return err
				}
			}
			return nil
		},
	}
}

// parseFixed reads a reference that something is to be published as.
func parseFixed(name string) (reference.Reference, error) {
	r, err := reference.Parse(name)
	if err != nil {
		return r, err
	}
	if r.Kind != reference.Short || r.Tag == "" {
		return r, &usageError{
			err:  fmt.Errorf("%q is not a name to give: it has no tag of its own", name),
			hint: "write NAME:TAG, for instance qwen:2.5.0 or qwen:latest",
		}
	}
	return r, nil
}
