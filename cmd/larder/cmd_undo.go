package main

import (
	"fmt"
	"time"

	v1 "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/spf13/cobra"

	"github.com/larder-project/larder/internal/progress"
	"github.com/larder-project/larder/internal/store"
)

// removal is one removal in the trash, as --json prints it.
type removal struct {
	Removal    string    `json:"removal"`
	Time       time.Time `json:"time"`
	Reason     string    `json:"reason"`
	References []string  `json:"references"`
	Blobs      int       `json:"blobs"`
	Bytes      int64     `json:"bytes"`
}

func describeRemoval(r store.Removal) removal {
	out := removal{Removal: r.ID, Time: r.Time, Reason: r.Reason, References: []string{}, Blobs: len(r.Blobs), Bytes: r.Size()}
	for _, d := range r.References {
		out.References = append(out.References, d.Annotations[v1.AnnotationRefName])
	}
	return out
}

func (a *app) cmdUndo() *cobra.Command {
	return &cobra.Command{
		Use:     "undo [REMOVAL]",
		GroupID: models,
		Short:   "Bring back what was removed, or list what can be",
		Long: `Bring a removal back whole, files and names. Without a name, list the removals in
the trash. A name that means another version by now stays with that one; the
restored version then has its commit or digest for a name.`,
		Args:              takes(0, 1, "at most one removal"),
		ValidArgsFunction: cobra.NoFileCompletions,
		RunE: func(cmd *cobra.Command, args []string) error {
			st, err := a.store()
			if err != nil {
				return err
			}
			if len(args) == 0 {
				return a.listTrash(st)
			}
			c, err := a.collector(cmd.Context())
			if err != nil {
				return err
			}
			r, err := c.Undo(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			out := describeRemoval(r)
			if a.json {
				return printJSON(a.out, out)
			}
			for _, ref := range out.References {
				if _, err := fmt.Fprintf(a.out, "restored %s\n", ref); err != nil {
					return err
				}
			}
			return nil
		},
	}
}

func (a *app) listTrash(st *store.Store) error {
	removals, err := st.Trash()
	if err != nil {
		return err
	}
	t := newTable("REMOVAL", "AGE", ">SIZE", "MODELS", "REASON")
	for _, r := range removals {
		out := describeRemoval(r)
		if a.json {
			if err := printJSON(a.out, out); err != nil {
				return err
			}
			continue
		}
		first := ""
		if len(out.References) > 0 {
			first = out.References[0]
		}
		if more := len(out.References) - 1; more > 0 {
			first += fmt.Sprintf(" and %d more", more)
		}
		t.add(out.Removal, age(time.Now(), out.Time), progress.Bytes(out.Bytes), first, out.Reason)
	}
	if a.json {
		return nil
	}
	return t.print(a.out)
}
