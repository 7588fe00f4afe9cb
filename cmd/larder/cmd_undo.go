package main

import (
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/opencontainers/go-digest"
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
		Use:     "undo [REMOVAL [MODEL...]]",
		GroupID: cleaning,
		Short:   "Bring back what was removed, or list what can be",
		Long: `Bring a removal back whole, files and names, or of it only some models. Without a
name, list the removals in the trash. What a policy had removed is pinned then,
so that it does not go again at once; larder unpin lets it go. A name that means
another version by now stays with that one; the restored version then has its
commit or digest for a name.`,
		Args:              takes(0, -1, "a removal, and which of its models"),
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
			only, err := versionsIn(st, args[0], args[1:])
			if err != nil {
				return err
			}
			r, err := c.Undo(cmd.Context(), args[0], only...)
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

// versionsIn finds the versions of a removal that a person means, by name or by
// the digits of their digest.
func versionsIn(st *store.Store, id string, names []string) ([]digest.Digest, error) {
	if len(names) == 0 {
		return nil, nil
	}
	removals, err := st.Trash()
	if err != nil {
		return nil, err
	}
	at := slices.IndexFunc(removals, func(r store.Removal) bool { return r.ID == id })
	if at < 0 {
		return nil, nil // the store says what is wrong
	}
	var out []digest.Digest
	for _, name := range names {
		n := len(out)
		for _, d := range removals[at].References {
			fits := d.Annotations[v1.AnnotationRefName] == name || string(d.Digest) == name || isDigits(name) && strings.HasPrefix(d.Digest.Encoded(), name)
			if fits && !slices.Contains(out, d.Digest) {
				out = append(out, d.Digest)
			}
		}
		if len(out) == n {
			return nil, fmt.Errorf("undo: %s in removal %s: %w; larder trash ls --json lists what is in it", name, id, store.ErrNotFound)
		}
	}
	return out, nil
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
		first := "none, only what no model needed"
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
