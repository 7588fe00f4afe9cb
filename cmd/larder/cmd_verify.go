package main

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/spf13/cobra"

	"github.com/larder-project/larder/internal/progress"
	"github.com/larder-project/larder/internal/reference"
	"github.com/larder-project/larder/internal/store"
)

// problem is one damaged blob, as --json prints it.
type problem struct {
	Event       string   `json:"event"` // problem
	Digest      string   `json:"digest,omitempty"`
	What        string   `json:"what"` // missing, size, content, manifest, unreadable, unknown
	Detail      string   `json:"detail"`
	Files       []string `json:"files"` // REFERENCE:PATH
	Quarantined bool     `json:"quarantined,omitempty"`
}

// verified is the last object that verify prints with --json.
type verified struct {
	Event    string   `json:"event"` // verified
	Versions int      `json:"versions"`
	Bytes    int64    `json:"bytes"` // read
	Problems int      `json:"problems"`
	Repair   []string `json:"repair,omitempty"` // commands
}

func (a *app) cmdVerify() *cobra.Command {
	var quarantine, quiet bool
	cmd := &cobra.Command{
		Use:     "verify [MODEL...]",
		GroupID: models,
		Short:   "Read everything again and name what is damaged",
		Long: `Read every file of the given models again, or of the whole store, and compare it
with its digest. What is damaged is named, and how to repair it. The exit code
is then 5.

With --quarantine, damaged files are taken out of the store, so that the next
pull or import brings them in anew; until then, whoever opens them gets an error
instead of wrong bytes.`,
		Args:              takes(0, -1, "models"),
		ValidArgsFunction: a.completeReferences,
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.verify(cmd.Context(), args, quarantine, quiet)
		},
	}
	cmd.Flags().BoolVar(&quarantine, "quarantine", false, "take damaged files out of the store")
	cmd.Flags().BoolVarP(&quiet, "quiet", "q", false, "show no progress")
	return cmd
}

func (a *app) verify(ctx context.Context, names []string, quarantine, quiet bool) error {
	st, err := a.store()
	if err != nil {
		return err
	}
	all, err := st.Versions()
	if err != nil {
		return err
	}
	var some []store.Version // nil: the whole store
	for _, name := range names {
		v, _, err := resolve(st, name)
		if err != nil {
			return err
		}
		some = append(some, v)
	}
	checked := all
	if some != nil {
		checked = some
	}
	total, err := bytesToRead(st, some)
	if err != nil {
		return err
	}
	m := a.meter(quiet)
	defer m.Close()
	m.Start(progress.Plan{What: "verify " + st.Dir(), Bytes: total})
	read := newCounter(m)
	found, err := st.Verify(ctx, some, read.add)
	m.Close()
	if err != nil {
		return err
	}
	repair := repairs(st, checked, found)
	for _, p := range found {
		out := problem{Event: "problem", Digest: p.Digest.String(), What: p.What, Detail: p.Detail, Files: append([]string{}, p.Files...)}
		if quarantine && p.Digest != "" && p.What != "missing" {
			if out.Quarantined, err = st.Quarantine(ctx, p); err != nil {
				return err
			}
		}
		if err := a.printProblem(out); err != nil {
			return err
		}
	}
	if a.json {
		err = printJSON(a.out, verified{"verified", len(checked), read.total(), len(found), repair})
	} else {
		err = a.printVerified(len(checked), read.total(), found, repair, quarantine)
	}
	if err == nil && len(found) > 0 {
		err = reported(store.ErrDamaged)
	}
	return err
}

// bytesToRead is how much verify has before it: exact for some versions, what
// the disk says for the whole store.
func bytesToRead(st *store.Store, some []store.Version) (int64, error) {
	if some == nil {
		u, err := st.Usage()
		return u.Blobs, err
	}
	seen := map[string]bool{}
	var n int64
	for _, v := range some {
		m, err := st.Model(v.Digest)
		if err != nil {
			continue // Verify names it
		}
		for _, f := range m.Files {
			if !seen[f.Digest.String()] {
				seen[f.Digest.String()] = true
				n += f.Size
			}
		}
	}
	return n, nil
}

func (a *app) printProblem(p problem) error {
	if a.json {
		return printJSON(a.out, p)
	}
	name := p.Digest
	if name == "" {
		name = p.What
	}
	state := ""
	if p.Quarantined {
		state = " (taken out of the store)"
	}
	_, err := fmt.Fprintf(a.out, "%s %s: %s%s\n", a.paint(red, "damaged"), name, printable(p.Detail), state)
	for _, f := range p.Files {
		if err == nil {
			_, err = fmt.Fprintf(a.out, "  %s\n", printable(f))
		}
	}
	return err
}

func (a *app) printVerified(versions int, read int64, found []store.Problem, repair []string, quarantined bool) error {
	if len(found) == 0 {
		_, err := fmt.Fprintf(a.out, "%s: %s, %s read, all as they should be\n", a.paint(green, "clean"), plural(versions, "version"), progress.Bytes(read))
		return err
	}
	fmt.Fprintf(a.out, "\n%s, %s read\n", plural(len(found), "problem"), progress.Bytes(read))
	if len(repair) == 0 {
		return nil
	}
	fmt.Fprintln(a.out, "to repair:")
	if !quarantined && slices.ContainsFunc(found, func(p store.Problem) bool { return p.Digest != "" && p.What != "missing" }) {
		fmt.Fprintln(a.out, "  larder verify --quarantine")
	}
	var err error
	for _, r := range repair {
		_, e := fmt.Fprintln(a.out, "  "+printable(r))
		err = errors.Join(err, e)
	}
	return err
}

// repairs lists the commands that bring the damaged files in anew, one for
// each version that has some.
func repairs(st *store.Store, versions []store.Version, found []store.Problem) []string {
	damaged := map[digest.Digest]bool{}
	for _, p := range found {
		damaged[p.Digest] = true
	}
	var out []string
	for _, v := range versions {
		needs := []v1.Descriptor{{Digest: v.Digest, MediaType: v1.MediaTypeImageManifest}}
		if links, err := st.Links(needs[0]); err == nil { // else the manifest itself is damaged
			needs = append(needs, links...)
		}
		if slices.ContainsFunc(needs, func(d v1.Descriptor) bool { return damaged[d.Digest] }) {
			out = append(out, bringAgain(v))
		}
	}
	return out
}

// bringAgain is the command that brought a version in, as far as that is known.
func bringAgain(v store.Version) string {
	for _, name := range v.References {
		if ref, err := reference.Parse(name); err == nil && ref.Kind == reference.Hub {
			return "larder pull " + name
		}
	}
	if v.Source != "" && v.Revision != "" {
		return "larder pull " + v.Source + "@" + v.Revision
	}
	if len(v.References) > 0 {
		return "larder import PATH " + v.References[0]
	}
	return "larder import PATH NAME"
}
