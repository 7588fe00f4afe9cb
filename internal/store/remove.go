package store

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/larder-project/larder/internal/disk"
	"github.com/larder-project/larder/internal/modelpack"
)

// Exclusive is the store while its lock is held exclusively: nobody else can
// look up, publish or remove. It is valid inside the function given to
// Store.Exclusive only.
type Exclusive struct {
	s     *Store
	index v1.Index
}

// Exclusive runs f while nobody else relies on or changes the store. f must be
// short: mounts and pulls wait for it.
func (s *Store) Exclusive(ctx context.Context, f func(*Exclusive) error) error {
	unlock, err := s.lock(ctx, true)
	if err != nil {
		return err
	}
	defer unlock()
	index, err := s.readIndex()
	if err != nil {
		return err
	}
	return f(&Exclusive{s: s, index: index})
}

// Index lists all descriptors of index.json, those of other tools included. It
// may be called without the lock; the answer is then soon out of date.
func (s *Store) Index() ([]v1.Descriptor, error) {
	index, err := s.readIndex()
	return index.Manifests, err
}

// Index lists all descriptors of index.json, those of other tools included.
func (x *Exclusive) Index() []v1.Descriptor { return x.index.Manifests }

// Leased gives the digests that running pulls and imports rely on, each with
// the name of a lease that holds it.
func (x *Exclusive) Leased() (map[digest.Digest]string, error) { return x.s.leased() }

// IsModel tells Larder's entries of index.json from what other tools may keep
// in the layout.
func IsModel(d v1.Descriptor) bool { return isModel(d) }

// isManifest tells whether a descriptor's content names other blobs. Other
// tools may keep kinds of manifests in the layout that are not known here.
func isManifest(d v1.Descriptor) bool {
	return isKnown(d) || d.MediaType == "" || strings.Contains(d.MediaType, "manifest") || strings.Contains(d.MediaType, "index")
}

// isKnown tells whether it is known how a manifest names other blobs.
func isKnown(d v1.Descriptor) bool {
	switch d.MediaType {
	case v1.MediaTypeImageManifest, v1.MediaTypeImageIndex,
		"application/vnd.docker.distribution.manifest.v2+json", "application/vnd.docker.distribution.manifest.list.v2+json":
		return true
	}
	return false
}

// Links lists the digests that a descriptor's content names: config and layers
// of a manifest, manifests of an index, with their sizes in bytes. A file has
// none. Content that cannot be read is an error: what it names is unknown, so
// nothing may be removed.
func (s *Store) Links(d v1.Descriptor) ([]v1.Descriptor, error) {
	if !isManifest(d) {
		return nil, nil
	}
	return linksOf(d, s.BlobPath(d.Digest))
}

// linksOf reads the links of a manifest whose blob is at path. In one of an
// unknown kind everything that looks like a descriptor counts as one; if it is
// no JSON, it is a file.
func linksOf(d v1.Descriptor, path string) ([]v1.Descriptor, error) {
	if fi, err := os.Lstat(path); err == nil && fi.Size() > maxIndexBytes && !isKnown(d) {
		return nil, nil
	}
	data, err := readChecked(path, d.Digest, maxIndexBytes)
	if err != nil {
		return nil, err
	}
	if !isKnown(d) {
		var content any
		if err := json.Unmarshal(data, &content); err != nil {
			return nil, nil
		}
		return descriptorsIn(content), nil
	}
	var m struct {
		Config    *v1.Descriptor  `json:"config"`
		Layers    []v1.Descriptor `json:"layers"`
		Manifests []v1.Descriptor `json:"manifests"`
		Subject   *v1.Descriptor  `json:"subject"`
	}
	if err := json.Unmarshal(data, &m); err != nil {
		return nil, fmt.Errorf("read manifest %s: %w: %w", d.Digest, ErrDamaged, err)
	}
	out := append(m.Layers, m.Manifests...)
	for _, one := range []*v1.Descriptor{m.Config, m.Subject} {
		if one != nil {
			out = append(out, *one)
		}
	}
	return out, nil
}

// descriptorsIn finds what looks like a descriptor anywhere in a JSON value.
func descriptorsIn(content any) (out []v1.Descriptor) {
	switch c := content.(type) {
	case []any:
		for _, e := range c {
			out = append(out, descriptorsIn(e)...)
		}
	case map[string]any:
		text, _ := c["digest"].(string)
		if d := digest.Digest(text); modelpack.CheckDigest(d) == nil {
			kind, _ := c["mediaType"].(string)
			size, _ := c["size"].(float64)
			out = append(out, v1.Descriptor{MediaType: kind, Digest: d, Size: int64(size)})
		}
		for _, e := range c {
			out = append(out, descriptorsIn(e)...)
		}
	}
	return out
}

// Remove takes references out of index.json and moves blobs to the trash. The
// caller has found, under this same lock, that no root reaches those blobs.
//
// Steps: record durable, index.json without the references durable, blobs
// moved, record renamed. A crash before the second step cancels the removal, a
// later one leaves it to Recover. So does an error: only a removal that has not
// taken effect is taken back.
func (x *Exclusive) Remove(r Removal) (Removal, error) {
	r.ID = r.Time.UTC().Format("20060102T150405Z") + "-" + randomID()
	begin := func() error {
		if err := disk.Mkdir(x.s.trashDir(r.ID), 0o755); err != nil {
			return full(err)
		}
		if err := x.s.writeRemoval(r, pendingName); err != nil {
			return err
		}
		return disk.SyncDir(x.s.path(trashName))
	}
	if err := x.withReserve(begin, r.ID); err != nil {
		return r, errors.Join(fmt.Errorf("remove: %w", err), disk.RemoveAll(x.s.trashDir(r.ID)))
	}
	if len(r.References) > 0 {
		gone := entriesOf(r.References)
		next := x.index
		next.Manifests = slices.DeleteFunc(slices.Clone(x.index.Manifests), func(d v1.Descriptor) bool { return gone[entryOf(d)] })
		if next.Manifests == nil {
			next.Manifests = []v1.Descriptor{}
		}
		if err := x.withReserve(func() error { return x.s.writeIndex(next) }, ""); err != nil {
			err = fmt.Errorf("remove: %w", err)
			// It may have taken effect and not be known to be durable. Then
			// the record is all that is left of the references.
			now, readErr := x.s.readIndex()
			if readErr == nil && standing(now.Manifests, r.References) == len(r.References) {
				err = errors.Join(err, disk.RemoveAll(x.s.trashDir(r.ID)))
			}
			return r, err
		}
		x.index = next
	}
	return r, x.s.moveToTrash(r)
}

// withReserve tries again with the reserve given back where the file system is
// full. A folder of a removal that the first attempt began is made anew.
func (x *Exclusive) withReserve(f func() error, id string) error {
	err := f()
	if !errors.Is(err, ErrFull) || !x.s.spendReserve() {
		return err
	}
	if id != "" {
		if err := disk.RemoveAll(x.s.trashDir(id)); err != nil {
			return err
		}
	}
	return f()
}

type entry struct {
	digest digest.Digest
	name   string
}

// entryOf is what tells entries of index.json apart.
func entryOf(d v1.Descriptor) entry {
	return entry{d.Digest, d.Annotations[v1.AnnotationRefName]}
}

func entriesOf(list []v1.Descriptor) map[entry]bool {
	out := make(map[entry]bool, len(list))
	for _, d := range list {
		out[entryOf(d)] = true
	}
	return out
}

// standing counts how many entries of a removal index.json has.
func standing(index, entries []v1.Descriptor) int {
	want := entriesOf(entries)
	n := 0
	for _, d := range index {
		if want[entryOf(d)] {
			n++
		}
	}
	return n
}

// moveToTrash finishes a removal whose references are gone.
func (s *Store) moveToTrash(r Removal) error {
	dir := s.trashDir(r.ID)
	for _, b := range r.Blobs {
		err := disk.Rename(s.BlobPath(b.Digest), filepath.Join(dir, b.Digest.Encoded()))
		if err := ignoreAbsent(err); err != nil {
			return fmt.Errorf("move to trash: %w", err)
		}
	}
	if err := errors.Join(disk.SyncDir(s.path(blobsName, sha256Name)), disk.SyncDir(dir)); err != nil {
		return fmt.Errorf("move to trash: %w", err)
	}
	s.note(Event{Event: Removed, Removal: r.ID, Time: r.Time, Node: r.Node, By: r.By, Reason: r.Reason, Versions: r.Versions, Bytes: r.Size(), Blobs: len(r.Blobs)})
	if err := disk.Rename(filepath.Join(dir, pendingName), filepath.Join(dir, removalName)); err != nil {
		return fmt.Errorf("move to trash: %w", err)
	}
	return disk.SyncDir(dir)
}

// Pending tells whether a removal was cut short, so that Recover has work.
func (s *Store) Pending() (bool, error) {
	pending, err := s.removals(pendingName)
	return len(pending) > 0, err
}

// Recover finishes removals that a crash cut short, and cancels those that had
// not taken effect. reachable must tell for each digest whether any root
// reaches it now. It returns the removals it finished.
func (x *Exclusive) Recover(reachable func(digest.Digest) bool) ([]Removal, error) {
	pending, err := x.s.removals(pendingName)
	if err != nil {
		return nil, err
	}
	var done []Removal
	for _, r := range pending {
		stand := standing(x.index.Manifests, r.References)
		if len(r.References) > 0 && stand == len(r.References) {
			if err := x.cancel(r); err != nil {
				return done, err
			}
			continue
		}
		// Some may have come back since, and with them blobs.
		next := r
		have := entriesOf(x.index.Manifests)
		back := map[digest.Digest]bool{}
		next.References = slices.DeleteFunc(slices.Clone(r.References), func(d v1.Descriptor) bool {
			if have[entryOf(d)] {
				back[d.Digest] = true
				return true
			}
			return false
		})
		next.Versions = slices.DeleteFunc(slices.Clone(r.Versions), func(v RemovedVersion) bool { return back[v.Digest] })
		next.Blobs = slices.DeleteFunc(slices.Clone(r.Blobs), func(b Blob) bool { return reachable(b.Digest) })
		if len(next.Blobs) < len(r.Blobs) || stand > 0 {
			for _, b := range r.Blobs {
				if reachable(b.Digest) {
					if err := x.s.moveBack(filepath.Join(x.s.trashDir(r.ID), b.Digest.Encoded()), b.Digest); err != nil {
						return done, err
					}
				}
			}
			if err := disk.SyncDir(x.s.path(blobsName, sha256Name)); err != nil {
				return done, err
			}
			if err := x.s.writeRemoval(next, pendingName); err != nil {
				return done, err
			}
		}
		if err := x.s.moveToTrash(next); err != nil {
			return done, err
		}
		done = append(done, next)
	}
	return done, nil
}

// cancel drops the record of a removal whose references stand. Blobs that it
// had moved go back first.
func (x *Exclusive) cancel(r Removal) error {
	dir := x.s.trashDir(r.ID)
	entries, err := os.ReadDir(dir)
	if err != nil {
		return fmt.Errorf("cancel removal %s: %w", r.ID, err)
	}
	for _, e := range entries {
		if isBlobName(e.Name()) {
			if err := x.s.moveBack(filepath.Join(dir, e.Name()), digest.NewDigestFromEncoded(digest.SHA256, e.Name())); err != nil {
				return fmt.Errorf("cancel removal %s: %w", r.ID, err)
			}
		}
	}
	if err := disk.SyncDir(x.s.path(blobsName, sha256Name)); err != nil {
		return fmt.Errorf("cancel removal %s: %w", r.ID, err)
	}
	return disk.RemoveAll(dir)
}

// moveBack gives a blob of the trash its name in the store again, unless the
// store has got it anew.
func (s *Store) moveBack(from string, d digest.Digest) error {
	err := disk.RenameNoReplace(from, s.BlobPath(d))
	if errors.Is(err, fs.ErrExist) {
		err = disk.Remove(from)
	}
	if err := ignoreAbsent(err); err != nil {
		return fmt.Errorf("restore from trash: %w", err)
	}
	return nil
}

// Forget removes this node's records that it uses versions, except those in
// keep. The caller has found, under this lock, that the node uses no others.
func (x *Exclusive) Forget(node string, keep map[digest.Digest]bool) error {
	entries, err := os.ReadDir(x.s.path("leases", node))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("forget uses: %w", err)
	}
	for _, e := range entries {
		if !isBlobName(e.Name()) || keep[digest.NewDigestFromEncoded(digest.SHA256, e.Name())] {
			continue
		}
		if err := ignoreAbsent(disk.Remove(x.s.path("leases", node, e.Name()))); err != nil {
			return fmt.Errorf("forget uses: %w", err)
		}
	}
	return nil
}
