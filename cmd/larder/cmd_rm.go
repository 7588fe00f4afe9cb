package main

import (
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	"github.com/larder-project/larder/internal/gc"
	"github.com/larder-project/larder/internal/progress"
	"github.com/larder-project/larder/internal/reference"
)

// removed is what rm prints with --json.
type removed struct {
	References []string `json:"references"` // that are gone
	Versions   []string `json:"versions"`   // digests that are gone with their last reference
	Blobs      int      `json:"blobs"`      // moved to the trash
	Bytes      int64    `json:"bytes"`      // of those blobs
	Shared     int64    `json:"shared"`     // bytes that stay because others use them
	Removal    string   `json:"removal,omitempty"`
	DryRun     bool     `json:"dry_run,omitempty"`
	Already    bool     `json:"already,omitempty"` // it lay in the trash before
}

func (a *app) cmdRm() *cobra.Command {
	var dryRun, now bool
	cmd := &cobra.Command{
		Use:     "rm MODEL...",
		Aliases: []string{"remove"},
		GroupID: cleaning,
		Short:   "Remove models; what is in use is refused",
		Long: `Remove references. A version that loses its last one goes, and the files that
nothing else needs are moved to the trash.

A version in use is refused, and the message says by whom: there is no way to
force it. Several models are removed all or none.`,
		Args:              takes(1, -1, "models"),
		ValidArgsFunction: a.completeReferences,
		RunE: func(cmd *cobra.Command, args []string) error {
			st, err := a.store()
			if err != nil {
				return err
			}
			names := make([]reference.Reference, len(args))
			for i, arg := range args {
				if names[i], err = reference.Parse(arg); err != nil || isDigits(arg) {
					// Perhaps the digits that ls prints for a version.
					_, ref, resolveErr := resolve(st, arg)
					if resolveErr != nil {
						return resolveErr
					}
					names[i] = ref
				}
			}
			c, err := a.collector(cmd.Context())
			if err != nil {
				return err
			}
			res, err := c.Remove(cmd.Context(), names, gc.Options{Reason: "larder rm " + strings.Join(args, " "), DryRun: dryRun, Now: now})
			if err != nil {
				return err
			}
			return a.printRemoved(res, dryRun, now)
		},
	}
	cmd.Flags().BoolVar(&dryRun, "dry-run", false, "say what would be removed, and remove nothing")
	cmd.Flags().BoolVar(&now, "now", false, "delete the files at once instead of moving them to the trash")
	return cmd
}

func (a *app) printRemoved(res gc.Result, dryRun, now bool) error {
	if a.json {
		out := removed{
			References: append([]string{}, res.References...), Versions: []string{},
			Blobs: len(res.Blobs), Bytes: res.Bytes, Shared: res.Kept, Removal: res.ID, DryRun: dryRun, Already: res.Already,
		}
		for _, d := range res.Versions {
			out.Versions = append(out.Versions, d.String())
		}
		return printJSON(a.out, out)
	}
	did, verb := "removed", "moved to the trash"
	switch {
	case dryRun:
		did, verb = "would remove", "would go to the trash"
	case now:
		verb = "deleted"
	case res.Already:
		did, verb = "removed before:", "lie in the trash"
	}
	for _, ref := range res.References {
		if _, err := fmt.Fprintf(a.out, "%s %s\n", did, ref); err != nil {
			return err
		}
	}
	line := fmt.Sprintf("%s (%d bytes) in %s %s", progress.Bytes(res.Bytes), res.Bytes, plural(len(res.Blobs), "blob"), verb)
	if len(res.Blobs) == 0 {
		line = "no bytes are freed"
	}
	if res.Kept > 0 {
		line += fmt.Sprintf("; %s stay, others need them", progress.Bytes(res.Kept))
	}
	if _, err := fmt.Fprintln(a.out, line); err != nil {
		return err
	}
	if dryRun || now || len(res.Blobs) == 0 {
		return nil
	}
	_, err := fmt.Fprintf(a.out, "larder undo %s brings it back; larder trash empty frees the space\n", res.ID)
	return err
}
