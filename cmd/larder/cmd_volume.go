package main

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/larder-project/larder/internal/progress"
	"github.com/larder-project/larder/internal/volume"
)

// volumeInfo is a volume, as --json prints it.
type volumeInfo struct {
	Name    string            `json:"name"`
	Options map[string]string `json:"options"`
	Created time.Time         `json:"created"`
	Models  []volumeModel     `json:"models"` // what a mount would show now
	Mounts  []volumeMount     `json:"mounts"`
	Damaged string            `json:"damaged,omitempty"` // why its record cannot be read
	Missing string            `json:"missing,omitempty"` // why its models cannot be found
}

type volumeModel struct {
	Reference string `json:"reference"`
	Digest    string `json:"digest"`
	Files     int    `json:"files"`
	Size      int64  `json:"size"`
}

type volumeMount struct {
	ID      string    `json:"id"`
	Target  string    `json:"target"`
	Since   time.Time `json:"since"`
	Manual  bool      `json:"manual"`
	Leaving bool      `json:"leaving"`
}

func (a *app) cmdVolume() *cobra.Command {
	cmd := &cobra.Command{
		Use:     "volume",
		GroupID: views,
		Short:   "List, inspect and remove volumes",
		Long: `List, inspect and remove the volumes of this node. They are made by the engine
("docker volume create", "docker run --mount") and by larder mount --name. What
an engine made is better removed by the engine ("docker volume rm"), which would
else go on listing it.`,
		SuggestionsMinimumDistance: 2,

		Args: a.onlyVerbs,
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	cmd.AddCommand(a.cmdVolumeLs(), a.cmdVolumeInspect(), a.cmdVolumeRm())
	return cmd
}

func (a *app) cmdVolumeLs() *cobra.Command {
	return &cobra.Command{
		Use:               "ls",
		Aliases:           []string{"list"},
		Short:             "List the volumes",
		Args:              takes(0, 0, "no arguments"),
		ValidArgsFunction: cobra.NoFileCompletions,
		RunE: func(cmd *cobra.Command, _ []string) error {
			vols, err := a.volumes(cmd.Context())
			if err != nil {
				return err
			}
			names, err := vols.List(cmd.Context())
			if err != nil {
				return err
			}
			t := newTable("VOLUME", "MODEL", "VERSION", ">MOUNTS", "CREATED", "OPTIONS")
			var damage error
			for _, name := range names {
				v, err := getVolume(cmd.Context(), vols, name)
				if errors.Is(err, volume.ErrNotFound) {
					continue // removed since List
				}
				if err != nil {
					return err
				}
				if v.Damaged != "" {
					damage = errors.Join(damage, fmt.Errorf("%w: %s", volume.ErrDamaged, v.Damaged))
				}
				if a.json {
					if err := printJSON(a.out, v); err != nil {
						return err
					}
					continue
				}
				model, version := volumeColumns(v)
				t.add(v.Name, model, version, strconv.Itoa(len(v.Mounts)), age(time.Now(), v.Created), optionText(v.Options))
			}
			if !a.json {
				err = t.print(a.out)
			}
			return errors.Join(err, damage)
		},
	}
}

func getVolume(ctx context.Context, vols *volume.Manager, name string) (volumeInfo, error) {
	v, err := vols.Get(ctx, name)
	if err != nil {
		return volumeInfo{}, err
	}
	out := volumeInfo{Name: v.Name, Options: v.Options, Created: v.Created, Models: []volumeModel{}, Mounts: []volumeMount{}, Damaged: v.Damaged, Missing: v.Missing}
	if out.Options == nil {
		out.Options = map[string]string{}
	}
	for _, m := range v.Models {
		out.Models = append(out.Models, volumeModel{m.Reference, m.Digest.String(), m.Files, m.Bytes})
	}
	for _, m := range v.Mounts {
		out.Mounts = append(out.Mounts, volumeMount{m.ID, m.Target, m.Since, m.Manual, m.Leaving})
	}
	return out, nil
}

func volumeColumns(v volumeInfo) (model, version string) {
	switch {
	case v.Damaged != "":
		return "damaged", "-"
	case v.Missing != "":
		return "missing", "-"
	}
	models := make([]mountModel, len(v.Models))
	for i, m := range v.Models {
		models[i] = mountModel{Reference: m.Reference, Digest: m.Digest}
	}
	return modelColumns(models)
}

// optionText leaves out the model, which has a column of its own.
func optionText(options map[string]string) string {
	var parts []string
	for _, k := range slices.Sorted(maps.Keys(options)) {
		if k != "model" {
			parts = append(parts, k+"="+options[k])
		}
	}
	return strings.Join(parts, " ")
}

func (a *app) cmdVolumeInspect() *cobra.Command {
	return &cobra.Command{
		Use:               "inspect VOLUME...",
		Aliases:           []string{"show"},
		Short:             "Show volumes: options, models, mounts",
		Args:              takes(1, -1, "volumes"),
		ValidArgsFunction: a.completeVolumes,
		RunE: func(cmd *cobra.Command, args []string) error {
			vols, err := a.volumes(cmd.Context())
			if err != nil {
				return err
			}
			var failed []error
			for i, name := range args {
				v, err := getVolume(cmd.Context(), vols, name)
				if err == nil && a.json {
					err = printJSON(a.out, v)
				} else if err == nil {
					if i > 0 {
						fmt.Fprintln(a.out)
					}
					err = a.printVolume(v)
				}
				failed = append(failed, err)
			}
			return errors.Join(failed...)
		},
	}
}

func (a *app) printVolume(v volumeInfo) error {
	pairs := []string{
		"volume", v.Name,
		"created", fmt.Sprintf("%s (%s)", v.Created.Local().Format(time.DateTime), age(time.Now(), v.Created)),
		"damaged", v.Damaged,
		"missing", v.Missing,
	}
	for _, k := range slices.Sorted(maps.Keys(v.Options)) {
		pairs = append(pairs, "option "+k, v.Options[k])
	}
	for _, m := range v.Models {
		pairs = append(pairs, "shows", fmt.Sprintf("%s, version %s, %s in %s", m.Reference, short(m.Digest), progress.Bytes(m.Size), plural(m.Files, "file")))
	}
	for _, m := range v.Mounts {
		pairs = append(pairs, "mounted at", fmt.Sprintf("%s (%s)", m.Target, age(time.Now(), m.Since)))
	}
	return fields(a.out, pairs...)
}

// volumeRemoved is what volume rm prints with --json, one object a volume.
type volumeRemoved struct {
	Name string `json:"name"`
}

func (a *app) cmdVolumeRm() *cobra.Command {
	return &cobra.Command{
		Use:     "rm VOLUME...",
		Aliases: []string{"remove"},
		Short:   "Remove volumes with what was written into them; one in use is refused",
		Args:    takes(1, -1, "volumes"),

		ValidArgsFunction: a.completeVolumes,
		RunE: func(cmd *cobra.Command, args []string) error {
			vols, err := a.volumes(cmd.Context())
			if err != nil {
				return err
			}
			var failed []error
			for _, name := range args {
				err := vols.Remove(cmd.Context(), name)
				switch {
				case err != nil:
				case a.json:
					err = printJSON(a.out, volumeRemoved{name})
				default:
					_, err = fmt.Fprintf(a.out, "removed volume %s\n", name)
				}
				failed = append(failed, err)
			}
			return errors.Join(failed...)
		},
	}
}
