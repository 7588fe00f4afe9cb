package main

import (
	"fmt"
	"time"

	"github.com/spf13/cobra"

	"github.com/larder-project/larder/internal/progress"
	"github.com/larder-project/larder/internal/store"
)

func (a *app) cmdTrash() *cobra.Command {
	cmd := &cobra.Command{
		Use:     "trash",
		GroupID: cleaning,
		Short:   "List and empty the trash",
		Long: `What larder rm removes lies in the trash until it is emptied, and takes its
space there. larder undo brings it back.`,
		SuggestionsMinimumDistance: 2,

		Args: a.onlyVerbs,
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	ls := &cobra.Command{
		Use:               "ls",
		Aliases:           []string{"list"},
		Short:             "List what can be brought back",
		Args:              takes(0, 0, "no arguments"),
		ValidArgsFunction: cobra.NoFileCompletions,
		RunE: func(*cobra.Command, []string) error {
			st, err := a.store()
			if err != nil {
				return err
			}
			return a.listTrash(st)
		},
	}
	cmd.AddCommand(ls, a.cmdTrashEmpty())
	return cmd
}

func (a *app) cmdTrashEmpty() *cobra.Command {
	var older time.Duration
	cmd := &cobra.Command{
		Use:               "empty",
		Short:             "Delete for good what was removed",
		Args:              takes(0, 0, "no arguments"),
		ValidArgsFunction: cobra.NoFileCompletions,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if older < 0 {
				return &usageError{err: fmt.Errorf("--older-than %s is not an age", older), hint: "write for instance --older-than 24h"}
			}
			c, err := a.collector(cmd.Context())
			if err != nil {
				return err
			}
			gone, _, err := c.EmptyTrash(cmd.Context(), c.Now().Add(-older), store.Limit{})
			var bytes int64
			for _, r := range gone {
				bytes += r.Size()
				if a.json {
					if err := printJSON(a.out, describeRemoval(r)); err != nil {
						return err
					}
				}
			}
			if err != nil || a.json {
				return err
			}
			_, err = fmt.Fprintf(a.out, "deleted %s, %s\n", plural(len(gone), "removal"), progress.Bytes(bytes))
			return err
		},
	}
	cmd.Flags().DurationVar(&older, "older-than", 0, "leave what was removed less than this long ago, such as 24h")
	return cmd
}
