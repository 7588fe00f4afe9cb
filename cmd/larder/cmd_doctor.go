package main

import (
	"errors"
	"fmt"

	"github.com/spf13/cobra"

	"github.com/larder-project/larder/internal/doctor"
)

// examined is what doctor prints with --json: one object.
type examined struct {
	Usable   bool             `json:"usable"`
	Findings []doctor.Finding `json:"findings"`
}

// errUnusable is what doctor's exit code is about; the findings say why.
var errUnusable = errors.New("this host cannot be used as it is")

func (a *app) cmdDoctor() *cobra.Command {
	return &cobra.Command{
		Use:     "doctor",
		GroupID: host,
		Short:   "Tell what this host can do, and what to do about the rest",
		Long: `Tell what this host can do, found by real test mounts, and what to do about the
rest. The exit code is 1 where something must be put right.`,
		Args:              takes(0, 0, "no arguments"),
		ValidArgsFunction: cobra.NoFileCompletions,
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := a.config()
			if err != nil {
				return err
			}
			found := doctor.Examine(cmd.Context(), c)
			if a.json {
				err = printJSON(a.out, examined{doctor.Usable(found), found})
			} else {
				err = a.printFindings(found)
			}
			if err == nil && !doctor.Usable(found) {
				err = reported(errUnusable)
			}
			return err
		},
	}
}

func (a *app) printFindings(found []doctor.Finding) error {
	wide := 0
	for _, f := range found {
		wide = max(wide, len(f.Name))
	}
	for _, f := range found {
		colour := map[doctor.Verdict]string{doctor.Good: green, doctor.Better: yellow, doctor.Bad: red}[f.Verdict]
		// The word is padded before it is painted: escape codes have no width.
		word := a.paint(colour, fmt.Sprintf("%-4s", f.Verdict))
		if _, err := fmt.Fprintf(a.out, "%s  %-*s  %s\n", word, wide, f.Name, printable(f.Found)); err != nil {
			return err
		}
		if f.Advice != "" {
			if _, err := fmt.Fprintf(a.out, "      %-*s  -> %s\n", wide, "", printable(f.Advice)); err != nil {
				return err
			}
		}
	}
	return nil
}
