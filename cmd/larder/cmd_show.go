package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"strings"
	"time"

	"github.com/opencontainers/go-digest"
	"github.com/spf13/cobra"

	"github.com/larder-project/larder/internal/progress"
)

// shown is a version with its files, as --json prints it.
type shown struct {
	versionInfo
	FileList []shownFile `json:"file_list"`
	UsedBy   []string    `json:"used_by"` // null where this user may not ask
}

type shownFile struct {
	Path   string `json:"path"`
	Size   int64  `json:"size"`
	Digest string `json:"digest"`
	GitOID string `json:"git_oid,omitempty"`
	Blob   string `json:"blob"` // where its bytes are
}

func (a *app) cmdShow() *cobra.Command {
	return &cobra.Command{
		Use:               "show MODEL",
		Aliases:           []string{"inspect"},
		GroupID:           models,
		Short:             "Show a version: its files, where it came from, who uses it",
		Args:              takes(1, 1, "one model"),
		ValidArgsFunction: a.completeOneReference,
		RunE: func(cmd *cobra.Command, args []string) error {
			st, err := a.store()
			if err != nil {
				return err
			}
			v, _, err := resolve(st, args[0])
			if err != nil {
				return err
			}
			m, err := st.Model(v.Digest)
			if err != nil {
				return err
			}
			out := shown{versionInfo: describe(v, m), FileList: []shownFile{}}
			out.UsedBy, err = a.usersOf(cmd.Context(), v.Digest)
			if err != nil && !errors.Is(err, fs.ErrPermission) {
				return err
			}
			for _, f := range m.Files {
				out.FileList = append(out.FileList, shownFile{f.Path, f.Size, f.Digest.String(), f.GitOID, st.BlobPath(f.Digest)})
			}
			if a.json {
				return printJSON(a.out, out)
			}
			return a.printShown(out)
		},
	}
}

// usersOf tells who uses a version on this node. An ordinary user may not ask.
func (a *app) usersOf(ctx context.Context, version digest.Digest) ([]string, error) {
	uses, err := a.uses(ctx)
	if err != nil {
		return nil, err
	}
	out := []string{}
	for _, u := range uses {
		if u.Version == version && !slices.Contains(out, u.By) {
			out = append(out, u.By)
		}
	}
	return out, nil
}

func (a *app) printShown(v shown) error {
	partial := ""
	if v.Partial {
		partial = "yes: the source has files that are not here"
	}
	err := fields(a.out,
		"digest", v.Digest,
		"references", strings.Join(v.References, ", "),
		"source", v.Source,
		"revision", v.Revision,
		"partial", partial,
		"size", fmt.Sprintf("%s in %s", progress.Bytes(v.Size), plural(v.Files, "file")),
		"added", fmt.Sprintf("%s (%s)", v.Created.Local().Format(time.DateTime), age(time.Now(), v.Created)),
		"used by", orNobody(v.UsedBy),
	)
	if err != nil {
		return err
	}
	fmt.Fprintln(a.out)
	t := newTable(">SIZE", "SHA-256", "FILE")
	for _, f := range v.FileList {
		_, hex, _ := strings.Cut(f.Digest, ":")
		t.add(progress.Bytes(f.Size), hex, f.Path)
	}
	return t.print(a.out)
}

func orNobody(names []string) string {
	if names == nil {
		return "not known: only root may ask"
	}
	if len(names) == 0 {
		return "nobody on this node"
	}
	return strings.Join(names, ", ")
}
