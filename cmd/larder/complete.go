package main

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"

	"github.com/spf13/cobra"

	"github.com/larder-project/larder/internal/store"
)

// completeReferences offers the references in the store. A shell that asks for
// names must not make a store, wait, or print errors.
func (a *app) completeReferences(_ *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
	const done = cobra.ShellCompDirectiveNoFileComp
	c, err := a.config()
	if err != nil {
		return nil, done
	}
	if _, err := os.Stat(filepath.Join(c.Store, "oci-layout")); errors.Is(err, fs.ErrNotExist) {
		return nil, done
	}
	st, err := store.Open(c.Store)
	if err != nil {
		return nil, done
	}
	versions, err := st.Versions()
	if err != nil {
		return nil, done
	}
	var out []string
	for _, v := range versions {
		for _, ref := range v.References {
			if !slices.Contains(args, ref) {
				out = append(out, ref)
			}
		}
	}
	return out, done
}

// completeOneReference is completeReferences for verbs that take one.
func (a *app) completeOneReference(cmd *cobra.Command, args []string, part string) ([]string, cobra.ShellCompDirective) {
	if len(args) > 0 {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	return a.completeReferences(cmd, args, part)
}

// completeVolumes offers the names of this node's volumes.
func (a *app) completeVolumes(cmd *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
	const done = cobra.ShellCompDirectiveNoFileComp
	c, err := a.config()
	if err != nil {
		return nil, done
	}
	if _, err := os.Stat(filepath.Join(c.State, "volumes")); err != nil {
		return nil, done // nothing is made for the sake of a completion
	}
	vols, err := a.volumes(cmd.Context())
	if err != nil {
		return nil, done
	}
	names, err := vols.List(cmd.Context())
	if err != nil {
		return nil, done
	}
	return slices.DeleteFunc(names, func(n string) bool { return slices.Contains(args, n) }), done
}
