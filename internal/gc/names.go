package gc

import (
	"fmt"
	"slices"
	"strings"

	v1 "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/larder-project/larder/internal/reference"
	"github.com/larder-project/larder/internal/store"
)

// selectEntries finds the entries of index.json that the names mean.
func selectEntries(st *store.Store, index []v1.Descriptor, names []reference.Reference) ([]v1.Descriptor, error) {
	var gone []v1.Descriptor
	for _, name := range names {
		entries, err := entriesOf(st, index, name)
		if err != nil {
			return nil, err
		}
		for _, e := range entries {
			if !slices.ContainsFunc(gone, func(d v1.Descriptor) bool { return entryOf(d) == entryOf(e) }) {
				gone = append(gone, e)
			}
		}
	}
	return gone, nil
}

func entriesOf(st *store.Store, index []v1.Descriptor, name reference.Reference) ([]v1.Descriptor, error) {
	pick := func(ok func(v1.Descriptor) bool) []v1.Descriptor {
		return slices.DeleteFunc(slices.Clone(index), func(d v1.Descriptor) bool { return !ok(d) })
	}
	if name.Constraint != "" {
		return nil, fmt.Errorf("remove %s: %w: name one tag, or a digest", name, ErrAmbiguous)
	}
	if name.Kind == reference.Digest {
		if out := pick(func(d v1.Descriptor) bool { return d.Digest == name.Digest }); len(out) > 0 {
			return out, nil
		}
	}
	if out := pick(func(d v1.Descriptor) bool { return d.Annotations[v1.AnnotationRefName] == name.String() }); len(out) > 0 {
		return out, nil
	}
	v, err := st.Resolve(name)
	if err != nil {
		return nil, err
	}
	if name.Kind == reference.Short && name.Tag == "" && name.Digest == "" {
		var tags []string
		for _, d := range index {
			if r, err := reference.Parse(d.Annotations[v1.AnnotationRefName]); err == nil && r.Kind == reference.Short && r.Repo == name.Repo {
				tags = append(tags, r.String())
			}
		}
		if len(tags) != 1 {
			return nil, fmt.Errorf("remove %s: %w: %s; name those to remove", name, ErrAmbiguous, strings.Join(tags, ", "))
		}
		return pick(func(d v1.Descriptor) bool { return d.Annotations[v1.AnnotationRefName] == tags[0] }), nil
	}
	// A commit or digest of a version that also has other names.
	return pick(func(d v1.Descriptor) bool { return d.Digest == v.Digest }), nil
}

// removedBefore answers a call that is repeated after a crash or by a script:
// what it names lies in the trash already.
func removedBefore(st *store.Store, finished []store.Removal, names []reference.Reference) (Result, bool) {
	trash, err := st.Trash()
	if err != nil {
		return Result{}, false
	}
	for _, r := range slices.Backward(append(trash, finished...)) {
		covers := func(name reference.Reference) bool {
			return slices.ContainsFunc(r.References, func(d v1.Descriptor) bool {
				return d.Annotations[v1.AnnotationRefName] == name.String() || string(d.Digest) == name.String()
			})
		}
		if !slices.ContainsFunc(names, func(n reference.Reference) bool { return !covers(n) }) {
			out := Result{ID: r.ID, Blobs: r.Blobs, Bytes: r.Size(), Already: true}
			for _, d := range r.References {
				out.References = append(out.References, d.Annotations[v1.AnnotationRefName])
			}
			return out, true
		}
	}
	return Result{}, false
}
