package main

import (
	"fmt"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"
)

// mounted is what mount prints with --json.
type mounted struct {
	Model  string `json:"model"`
	Target string `json:"target"`
	Volume string `json:"volume,omitempty"` // as given with --name
}

func (a *app) cmdMount() *cobra.Command {
	var options []string
	var name string
	cmd := &cobra.Command{
		Use:     "mount MODEL FOLDER",
		GroupID: views,
		Short:   "Mount a view of a model at a folder, without a container engine",
		Long: `Mount a view of a model at an empty folder; it is made when it is missing. The
options are those of a volume. What is written goes when the mount goes, unless
--name gives the volume a name and --option scope=volume keeps what is written.

  larder mount qwen /srv/qwen
  larder mount 'hf://Qwen/Qwen2.5-0.5B' /srv/qwen --option layout=hf --option access=ro`,
		Args: takes(2, 2, "a model and a folder"),
		ValidArgsFunction: func(cmd *cobra.Command, args []string, part string) ([]string, cobra.ShellCompDirective) {
			if len(args) == 0 {
				return a.completeReferences(cmd, args, part)
			}
			return nil, cobra.ShellCompDirectiveFilterDirs
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			raw, err := parseOptions(options)
			if err != nil {
				return err
			}
			if _, given := raw["model"]; given {
				return &usageError{err: fmt.Errorf("--option model: the model is the first argument")}
			}
			raw["model"] = args[0]
			target, err := filepath.Abs(args[1])
			if err != nil {
				return err
			}
			vols, err := a.volumes(cmd.Context())
			if err != nil {
				return err
			}
			if err := vols.MountAt(cmd.Context(), name, raw, target); err != nil {
				return err
			}
			if a.json {
				return printJSON(a.out, mounted{args[0], target, name})
			}
			_, err = fmt.Fprintf(a.out, "%s is mounted at %s; larder umount %s ends it\n", args[0], target, target)
			return err
		},
	}
	cmd.Flags().StringArrayVarP(&options, "option", "o", nil, "an option of the volume, `KEY=VALUE`; may be repeated")
	cmd.Flags().StringVar(&name, "name", "", "name of the volume, to keep or take up again what was written")
	_ = cmd.RegisterFlagCompletionFunc("name", a.completeVolumes)
	_ = cmd.RegisterFlagCompletionFunc("option", func(*cobra.Command, []string, string) ([]string, cobra.ShellCompDirective) {
		return []string{"layout=files", "layout=hf", "access=overlay", "access=ro", "scope=run", "scope=volume", "size=", "upper=disk", "upper=tmpfs", "uid=", "gid=", "mode=", "absorb=off", "absorb=on"},
			cobra.ShellCompDirectiveNoFileComp | cobra.ShellCompDirectiveNoSpace
	})
	return cmd
}

// parseOptions reads KEY=VALUE; what keys and values mean is the volume's
// business.
func parseOptions(list []string) (map[string]string, error) {
	out := map[string]string{}
	for _, o := range list {
		k, v, ok := strings.Cut(o, "=")
		if !ok || k == "" {
			return nil, &usageError{err: fmt.Errorf("--option %q is not KEY=VALUE", o), hint: "for instance --option access=ro"}
		}
		if _, twice := out[k]; twice {
			return nil, &usageError{err: fmt.Errorf("--option %s is given twice", k)}
		}
		out[k] = v
	}
	return out, nil
}
