package store

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"

	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/larder-project/larder/internal/disk"
)

// Restore undoes a removal, or of it only the versions in only: blobs back
// first, references after, record last. A blob that lies with another removal,
// because the versions shared it, comes from there. Where a blob is nowhere any
// more nothing is restored: a version is whole or not there. A reference that
// names another version by now is restored by a name of its own.
//
// What it returns lists the entries that were restored. A crash before the
// references are back leaves blobs that nothing needs and a removal that can
// still be undone; after that, a record of what is back already, which the next
// Tidy drops.
func (x *Exclusive) Restore(id string, only []digest.Digest) (Removal, error) {
	removals, err := x.s.Trash()
	if err != nil {
		return Removal{}, err
	}
	at := slices.IndexFunc(removals, func(r Removal) bool { return r.ID == id })
	if at < 0 {
		return Removal{}, fmt.Errorf("undo: removal %q: %w; larder undo without a name lists what can be undone", id, ErrNotFound)
	}
	r := removals[at]
	if len(r.References) == 0 {
		return Removal{}, fmt.Errorf("undo: removal %s has no version to bring back, only files that none needed: %w", id, ErrNotFound)
	}
	back, rest := r, r
	if len(only) > 0 {
		back, rest = r.split(only)
		for _, d := range only {
			if !slices.ContainsFunc(back.References, func(e v1.Descriptor) bool { return e.Digest == d }) {
				return Removal{}, fmt.Errorf("undo: version %s in removal %s: %w", d, id, ErrNotFound)
			}
		}
	} else {
		rest.References = nil
	}
	back.Blobs, err = x.s.bringBack(back)
	if err != nil {
		return Removal{}, fmt.Errorf("undo: %w", err)
	}
	next := x.index
	next.Manifests = withRestored(x.index.Manifests, back.References)
	if err := x.s.writeIndex(next); err != nil {
		return back, fmt.Errorf("undo: %w", err)
	}
	x.index = next
	x.s.note(Event{Event: Restored, Removal: r.ID, Time: x.s.now(), By: r.By, Reason: r.Reason, Versions: back.Versions, Bytes: back.Size(), Blobs: len(back.Blobs)})
	if len(rest.References) > 0 {
		moved := map[digest.Digest]bool{}
		for _, b := range back.Blobs {
			moved[b.Digest] = true
		}
		rest.Blobs = slices.DeleteFunc(slices.Clone(rest.Blobs), func(b Blob) bool { return moved[b.Digest] })
		return back, x.s.writeRemoval(rest, removalName)
	}
	return back, x.s.drop(r.ID)
}

// split divides a removal by versions.
func (r Removal) split(only []digest.Digest) (chosen, rest Removal) {
	chosen, rest = r, r
	in := func(d digest.Digest) bool { return slices.Contains(only, d) }
	chosen.References = slices.DeleteFunc(slices.Clone(r.References), func(d v1.Descriptor) bool { return !in(d.Digest) })
	chosen.Versions = slices.DeleteFunc(slices.Clone(r.Versions), func(v RemovedVersion) bool { return !in(v.Digest) })
	rest.References = slices.DeleteFunc(slices.Clone(r.References), func(d v1.Descriptor) bool { return in(d.Digest) })
	rest.Versions = slices.DeleteFunc(slices.Clone(r.Versions), func(v RemovedVersion) bool { return in(v.Digest) })
	return chosen, rest
}

// bringBack makes every blob that a removal's entries need one of the store
// again. Nothing is moved before all are found.
func (s *Store) bringBack(r Removal) ([]Blob, error) {
	needed, err := s.needs(r.References)
	if err != nil {
		return nil, fmt.Errorf("%w; larder trash ls shows what is left", err)
	}
	type move struct {
		blob Blob
		from string
	}
	var moves []move
	for d := range needed {
		path, err := s.find(d)
		if err != nil {
			return nil, fmt.Errorf("%w: it was deleted for good, and a version without it would not be whole; pull the model again", err)
		}
		if path == s.BlobPath(d) {
			continue
		}
		fi, err := os.Lstat(path)
		if err != nil {
			return nil, fmt.Errorf("look up blob %s: %w", d, err)
		}
		moves = append(moves, move{Blob{d, fi.Size()}, path})
	}
	blobs := make([]Blob, 0, len(moves))
	for _, m := range moves {
		if err := s.moveBack(m.from, m.blob.Digest); err != nil {
			return nil, err
		}
		blobs = append(blobs, m.blob)
	}
	return blobs, disk.SyncDir(s.path(blobsName, sha256Name))
}

// withRestored is the index after entries came back to it. Pure.
func withRestored(index, entries []v1.Descriptor) []v1.Descriptor {
	out := slices.Clone(index)
	have := entriesOf(index)
	names := map[string]bool{}
	for _, d := range index {
		names[d.Annotations[v1.AnnotationRefName]] = true
	}
	for _, d := range entries {
		if have[entryOf(d)] {
			continue
		}
		if names[d.Annotations[v1.AnnotationRefName]] {
			d.Annotations = cloneAnnotations(d.Annotations)
			d.Annotations[v1.AnnotationRefName] = lastingReference(d, out)
			if have[entryOf(d)] {
				continue
			}
		}
		have[entryOf(d)] = true
		names[d.Annotations[v1.AnnotationRefName]] = true
		out = append(out, d)
	}
	return out
}

// drop deletes a removal whose blobs are back, its record last: until then it
// only says what is so already.
func (s *Store) drop(id string) error {
	dir := s.trashDir(id)
	entries, err := os.ReadDir(dir)
	if err != nil {
		return ignoreAbsent(err)
	}
	for _, e := range entries {
		if e.Name() != removalName {
			if err := ignoreAbsent(disk.Remove(filepath.Join(dir, e.Name()))); err != nil {
				return fmt.Errorf("drop removal %s: %w", id, err)
			}
		}
	}
	return errors.Join(ignoreAbsent(disk.Remove(filepath.Join(dir, removalName))), ignoreAbsent(disk.Remove(dir)))
}

// Tidy drops removals whose every reference stands again, by an undo that a
// crash cut short or by a pull. Blobs that the store lacks go back first.
func (x *Exclusive) Tidy() error {
	removals, err := x.s.Trash()
	if err != nil {
		return err
	}
	for _, r := range removals {
		if len(r.References) == 0 || standing(x.index.Manifests, r.References) < len(r.References) {
			continue
		}
		if err := x.handOver(r, slices.DeleteFunc(slices.Clone(removals), func(o Removal) bool { return o.ID == r.ID })); err != nil {
			return fmt.Errorf("drop removal %s: %w", r.ID, err)
		}
		if _, err := x.s.bringBack(r); err != nil && !errors.Is(err, ErrNotFound) {
			return err
		}
		if err := x.s.drop(r.ID); err != nil {
			return err
		}
	}
	return nil
}
