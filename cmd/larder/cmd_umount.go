package main

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/larder-project/larder/internal/overlay"
	"github.com/larder-project/larder/internal/volume"
)

// unmounted is what umount prints with --json, one object a folder.
type unmounted struct {
	Target string `json:"target"`
}

func (a *app) cmdUmount() *cobra.Command {
	return &cobra.Command{
		Use:     "umount FOLDER...",
		Aliases: []string{"unmount"},
		GroupID: views,
		Short:   "End mounts that larder mount made",
		Args:    takes(1, -1, "folders"),
		ValidArgsFunction: func(*cobra.Command, []string, string) ([]string, cobra.ShellCompDirective) {
			return nil, cobra.ShellCompDirectiveFilterDirs
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			vols, err := a.volumes(cmd.Context())
			if err != nil {
				return err
			}
			var failed []error
			for _, arg := range args {
				target, err := filepath.Abs(arg)
				if err == nil {
					err = vols.UnmountAt(cmd.Context(), target)
				}
				if err != nil {
					failed = append(failed, sayWho(cmd.Context(), target, err))
					continue
				}
				if a.json {
					err = printJSON(a.out, unmounted{target})
				} else {
					_, err = fmt.Fprintf(a.out, "%s is unmounted\n", target)
				}
				failed = append(failed, err)
			}
			return errors.Join(failed...)
		},
	}
}

// sayWho adds to "in use" which processes hold the mount.
func sayWho(ctx context.Context, target string, err error) error {
	if !errors.Is(err, volume.ErrInUse) {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	holders, lookErr := overlay.OpenFiles(ctx, target)
	if lookErr != nil || len(holders) == 0 {
		return err
	}
	who := make([]string, len(holders))
	for i, h := range holders {
		who[i] = h.String()
		if len(h.Paths) > 0 {
			who[i] += " in " + h.Paths[0]
		}
	}
	return &hintError{err: err, hint: "held by " + strings.Join(who, ", ")}
}
