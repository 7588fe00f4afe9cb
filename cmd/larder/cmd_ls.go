package main

import (
	"errors"
	"fmt"
	"path"
	"slices"
	"time"

	"github.com/spf13/cobra"

	"github.com/larder-project/larder/internal/modelpack"
	"github.com/larder-project/larder/internal/progress"
)

func (a *app) cmdLs() *cobra.Command {
	return &cobra.Command{
		Use:     "ls [PATTERN...]",
		Aliases: []string{"list"},
		GroupID: models,
		Short:   "List the models in the store",
		Long: `List every version that a reference names, newest first.

A PATTERN is a name (qwen, hf://Qwen/Qwen2.5-0.5B) or has the shell's wildcards
('qwen:1.*', where '*' does not match '/').`,
		Args:              takes(0, -1, "names or patterns"),
		ValidArgsFunction: a.completeReferences,
		RunE:              func(_ *cobra.Command, args []string) error { return a.ls(args) },
	}
}

func (a *app) ls(patterns []string) error {
	for _, p := range patterns {
		if _, err := path.Match(p, ""); err != nil {
			return &usageError{err: fmt.Errorf("%q is not a pattern: %w", p, err), hint: "quote it, and close every '['"}
		}
	}
	st, err := a.store()
	if err != nil {
		return err
	}
	versions, err := st.Versions()
	if err != nil {
		return err
	}
	t := newTable("REFERENCE", "VERSION", ">FILES", ">SIZE", "ADDED")
	var damage error
	for _, v := range versions {
		refs := v.References
		if len(patterns) > 0 {
			refs = slices.DeleteFunc(slices.Clone(refs), func(ref string) bool {
				return !slices.ContainsFunc(patterns, func(p string) bool { return matches(p, ref) })
			})
			if len(refs) == 0 {
				continue
			}
		}
		m, err := st.Model(v.Digest)
		if err != nil {
			// The rest of the list is still worth having.
			damage = errors.Join(damage, err)
			m = modelpack.Model{}
		}
		info := describe(v, m)
		if a.json {
			if err != nil {
				info.Error = err.Error()
			}
			if err := printJSON(a.out, info); err != nil {
				return err
			}
			continue
		}
		for _, ref := range refs {
			files, bytes := fmt.Sprint(info.Files), progress.Bytes(info.Size)
			if err != nil {
				files, bytes = "-", "damaged"
			}
			t.add(ref, short(info.Digest), files, bytes, age(time.Now(), v.Created))
		}
	}
	if !a.json {
		if err := t.print(a.out); err != nil {
			return err
		}
	}
	return damage
}
