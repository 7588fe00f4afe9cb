package main

import (
	"context"
	"errors"
	"fmt"

	"github.com/spf13/cobra"

	"github.com/larder-project/larder/internal/modelpack"
	"github.com/larder-project/larder/internal/progress"
	"github.com/larder-project/larder/internal/space"
)

// spaceUsed is what df prints with --json: one object.
type spaceUsed struct {
	Versions []versionSpace `json:"versions"`
	Logical  int64          `json:"logical"`   // what a copy of each version would take
	Stored   int64          `json:"stored"`    // what their distinct files take
	Saved    int64          `json:"saved"`     // logical less stored
	Blobs    int64          `json:"blobs"`     // on the disk: files, manifests, configs
	Ingest   int64          `json:"ingest"`    // on the disk: fetches under way or interrupted
	Trash    int64          `json:"trash"`     // on the disk: removed, not yet deleted
	Uppers   int64          `json:"uppers"`    // on the disk: what containers wrote
	Free     int64          `json:"free"`      // of the store's file system
	Capacity int64          `json:"capacity"`  // of the store's file system
	SameDisk bool           `json:"same_disk"` // store and state are on one file system
}

type versionSpace struct {
	Digest     string   `json:"digest"`
	References []string `json:"references"`
	Size       int64    `json:"size"`
	Unique     int64    `json:"unique"`
	Shared     int64    `json:"shared"`
}

func (a *app) cmdDf() *cobra.Command {
	return &cobra.Command{
		Use:     "df",
		GroupID: host,
		Short:   "Show what takes space, and what sharing saves",
		Long: `Show for each version how many bytes only it needs and how many it shares with
others, and in all what is stored, what is saved by storing each file once, what
containers wrote, what lies in the trash and what is free.`,
		Args:              takes(0, 0, "no arguments"),
		ValidArgsFunction: cobra.NoFileCompletions,
		RunE:              func(cmd *cobra.Command, _ []string) error { return a.df(cmd.Context()) },
	}
}

func (a *app) df(ctx context.Context) error {
	st, err := a.store()
	if err != nil {
		return err
	}
	versions, err := st.Versions()
	if err != nil {
		return err
	}
	packs := make([]modelpack.Model, len(versions))
	var damage error
	for i, v := range versions {
		if packs[i], err = st.Model(v.Digest); err != nil {
			damage = errors.Join(damage, err)
		}
	}
	shares, sums := space.Divide(packs)
	onDisk, err := st.Usage()
	if err != nil {
		return err
	}
	uppers, err := space.Uppers(ctx, a.cfg.State)
	if err != nil {
		return err
	}
	out := spaceUsed{
		Versions: []versionSpace{}, Logical: sums.Logical, Stored: sums.Stored, Saved: sums.Saved(),
		Blobs: onDisk.Blobs, Ingest: onDisk.Ingest, Trash: onDisk.Trash, Uppers: uppers,
		Free: onDisk.Free, Capacity: onDisk.Capacity, SameDisk: space.SameFileSystem(st.Dir(), a.cfg.State),
	}
	for i, v := range versions {
		out.Versions = append(out.Versions, versionSpace{v.Digest.String(), append([]string{}, v.References...), shares[i].Size, shares[i].Unique, shares[i].Shared})
	}
	if a.json {
		return errors.Join(printJSON(a.out, out), damage)
	}
	return errors.Join(a.printSpace(out), damage)
}

func (a *app) printSpace(s spaceUsed) error {
	t := newTable("MODEL", "VERSION", ">SIZE", ">UNIQUE", ">SHARED")
	for _, v := range s.Versions {
		name := "-"
		if len(v.References) > 0 {
			name = v.References[0]
			if more := len(v.References) - 1; more > 0 {
				name += fmt.Sprintf(" (+%d)", more)
			}
		}
		t.add(name, short(v.Digest), progress.Bytes(v.Size), progress.Bytes(v.Unique), progress.Bytes(v.Shared))
	}
	if err := t.print(a.out); err != nil {
		return err
	}
	saved := progress.Bytes(s.Saved)
	if s.Logical > 0 {
		saved += fmt.Sprintf(" (%d %%)", s.Saved*100/s.Logical)
	}
	fmt.Fprintln(a.out)
	return fields(a.out,
		"all versions", progress.Bytes(s.Logical),
		"stored", progress.Bytes(s.Stored),
		"saved by sharing", saved,
		"blobs on disk", progress.Bytes(s.Blobs),
		"unfinished fetches", progress.Bytes(s.Ingest),
		"trash", progress.Bytes(s.Trash),
		"written by containers", progress.Bytes(s.Uppers),
		"free", fmt.Sprintf("%s of %s", progress.Bytes(s.Free), progress.Bytes(s.Capacity)),
	)
}
