package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"

	"github.com/larder-project/larder/internal/reference"
	"github.com/larder-project/larder/internal/source"
	"github.com/larder-project/larder/internal/source/directory"
)

func (a *app) cmdImport() *cobra.Command {
	var move, quiet bool
	cmd := &cobra.Command{
		Use:     "import PATH [NAME[:TAG]]",
		GroupID: models,
		Short:   "Bring in a model from a folder or a Hugging Face cache",
		Long: `Bring in a model from a folder. Its files are cloned where the file system can
share blocks, else copied. NAME is what to call it; without one it has the
folder's name, and without a TAG it is "latest".

A PATH that is a Hugging Face cache (~/.cache/huggingface/hub), or one model's
folder in it, brings in every revision of every model under its hf:// name.

With --move the files are taken over: they are gone from PATH afterwards.

  larder import ./qwen qwen:2.5.0
  larder import ~/.cache/huggingface/hub`,
		Args: takes(1, 2, "a folder and at most one name"),
		ValidArgsFunction: func(_ *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
			if len(args) == 0 {
				return nil, cobra.ShellCompDirectiveDefault
			}
			return nil, cobra.ShellCompDirectiveNoFileComp
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			from, err := a.openFolder(args)
			if err != nil {
				return err
			}
			c, err := a.config()
			if err != nil {
				return err
			}
			defer from.close()
			m := a.meter(quiet)
			defer m.Close()
			for _, s := range from.skipped {
				if err := a.skip(s); err != nil {
					return err
				}
			}
			var failed []error
			for _, s := range from.sources {
				err := a.bring(cmd.Context(), s.src, bringing{what: s.what, names: s.names, jobs: c.Jobs, move: move, meter: m})
				if err != nil && cmd.Context().Err() != nil {
					return err
				}
				failed = append(failed, err)
			}
			return errors.Join(failed...)
		},
	}
	cmd.Flags().BoolVar(&move, "move", false, "take the files over instead of copying them")
	cmd.Flags().BoolVarP(&quiet, "quiet", "q", false, "show no progress")
	return cmd
}

// folder is what a path on this machine has to bring in.
type folder struct {
	sources []named
	skipped []directory.Skipped
	open    io.Closer
}

// close lets go of the folder. It was only read by it: a failure tells nothing.
func (f folder) close() { _ = f.open.Close() }

type named struct {
	src   source.Source
	what  string
	names []reference.Reference // beside the source's own
}

// openFolder tells a cache from a plain folder and names what is in it.
func (a *app) openFolder(args []string) (folder, error) {
	path, name := args[0], ""
	if len(args) > 1 {
		name = args[1]
	}
	if strings.Contains(path, "://") {
		return folder{}, &usageError{err: fmt.Errorf("%s is not a folder", path), hint: "to fetch from a hub: larder pull " + path}
	}
	if _, err := os.Stat(path); err != nil {
		return folder{}, fmt.Errorf("open what is to be imported: %w", err)
	}
	// HF_HOME has the cache below it.
	if below := filepath.Join(path, "hub"); !directory.IsHubCache(path) && directory.IsHubCache(below) {
		path = below
	}
	if directory.IsHubCache(path) {
		return openCache(path, name)
	}
	ref, err := nameFolder(path, name)
	if err != nil {
		return folder{}, err
	}
	src, err := directory.New(path, directory.Options{References: []reference.Reference{ref}})
	if err != nil {
		return folder{}, err
	}
	return folder{sources: []named{{src: src, what: ref.String()}}, open: src}, nil
}

func openCache(path, name string) (folder, error) {
	cache, err := directory.HubCache(path)
	if err != nil {
		return folder{}, err
	}
	out := folder{skipped: cache.Skipped, open: cache}
	if len(cache.Sources) == 0 {
		out.close()
		e := &hintError{err: fmt.Errorf("%s: %w: no revision of a model that is whole", path, source.ErrNotFound)}
		for _, s := range cache.Skipped {
			e.err = fmt.Errorf("%w\n%s: %s", e.err, s.Path, s.Why)
		}
		return folder{}, e
	}
	if name != "" && len(cache.Sources) > 1 {
		out.close()
		return folder{}, &usageError{
			err:  fmt.Errorf("%s is a Hugging Face cache of %s; one name cannot be given to all", path, plural(len(cache.Sources), "revision")),
			hint: "leave the name out: each gets its own; larder tag names them later",
		}
	}
	var names []reference.Reference
	if name != "" {
		ref, err := nameFolder(path, name)
		if err != nil {
			out.close()
			return folder{}, err
		}
		names = append(names, ref)
	}
	for _, src := range cache.Sources {
		out.sources = append(out.sources, named{src: src, names: names})
	}
	return out, nil
}

// nameFolder is the reference that a folder is published as.
func nameFolder(path, name string) (reference.Reference, error) {
	given := name != ""
	if !given {
		abs, err := filepath.Abs(path)
		if err != nil {
			return reference.Reference{}, err
		}
		name = strings.ToLower(filepath.Base(abs))
	}
	ref, err := reference.Parse(name)
	if err != nil && !given {
		return ref, &usageError{
			err:  fmt.Errorf("the folder's name %q cannot be a model's name", name),
			hint: "say what to call it: larder import " + path + " NAME[:TAG]",
		}
	}
	if err != nil {
		return ref, err
	}
	switch {
	case ref.Constraint != "":
		return ref, &usageError{err: fmt.Errorf("%q is a range of versions, not a name", name), hint: "write NAME:TAG, for instance " + ref.Repo + ":1.0.0"}
	case ref.Digest != "":
		return ref, &usageError{err: fmt.Errorf("%q names a digest, which the files themselves decide", name), hint: "write NAME or NAME:TAG"}
	case ref.Kind == reference.Short && ref.Tag == "":
		ref.Tag = "latest"
	}
	return ref, nil
}

// skippedEvent is a part of a cache that was left out, as --json prints it.
type skippedEvent struct {
	Event string `json:"event"` // skipped
	Path  string `json:"path"`
	Why   string `json:"reason"`
}

func (a *app) skip(s directory.Skipped) error {
	if a.json {
		return printJSON(a.out, skippedEvent{"skipped", s.Path, s.Why})
	}
	_, err := fmt.Fprintf(a.err, "skipped %s: %s\n", printable(s.Path), printable(s.Why))
	return err
}
