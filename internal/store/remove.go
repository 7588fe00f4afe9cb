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
	"time"

	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/larder-project/larder/internal/atomicfile"
	"github.com/larder-project/larder/internal/disk"
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

// Links lists the digests that a descriptor's content names: config and layers
// of a manifest, manifests of an index, with their sizes in bytes. A file has
// none. Content that cannot be read is an error: what it names is unknown, so
// nothing may be removed.
func (s *Store) Links(d v1.Descriptor) ([]v1.Descriptor, error) {
	switch d.MediaType {
	case v1.MediaTypeImageManifest, v1.MediaTypeImageIndex,
		"application/vnd.docker.distribution.manifest.v2+json", "application/vnd.docker.distribution.manifest.list.v2+json":
	default:
		return nil, nil
	}
	data, err := s.readBlob(d.Digest, maxIndexBytes)
	if err != nil {
		return nil, err
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

// Blob is a blob with its size in bytes.
type Blob struct {
	Digest digest.Digest `json:"digest"`
	Size   int64         `json:"size"`
}

// Removal is the record of one removal, kept beside what it removed. It is
// what undo works from.
type Removal struct {
	ID         string          `json:"id"`
	Time       time.Time       `json:"time"`
	Reason     string          `json:"reason"`     // why, for a person
	References []v1.Descriptor `json:"references"` // entries taken from index.json
	Blobs      []Blob          `json:"blobs"`      // taken from blobs/, manifests first
}

// Size is the sum of the blobs' sizes, in bytes.
func (r Removal) Size() int64 {
	var n int64
	for _, b := range r.Blobs {
		n += b.Size
	}
	return n
}

// A removal's record has the first name while it is under way, the second once
// everything it lists is in its folder.
const (
	pendingName = "pending.json"
	removalName = "removal.json"
)

// Remove takes references out of index.json and moves blobs to the trash. The
// caller has found, under this same lock, that no root reaches those blobs.
//
// Steps: record durable, index.json without the references durable, blobs
// moved, record renamed. A crash before the second step cancels the removal, a
// later one leaves it to Recover.
func (x *Exclusive) Remove(r Removal) (Removal, error) {
	r.ID = r.Time.UTC().Format("20060102T150405Z") + "-" + randomID()
	dir := x.s.path("trash", r.ID)
	if err := disk.Mkdir(dir, 0o755); err != nil {
		return r, fmt.Errorf("remove: %w", full(err))
	}
	data, err := json.Marshal(r)
	if err != nil {
		return r, fmt.Errorf("remove: %w", err)
	}
	if err := atomicfile.Write(filepath.Join(dir, pendingName), data, 0o644); err != nil {
		return r, errors.Join(fmt.Errorf("remove: %w", full(err)), disk.RemoveAll(dir))
	}
	if err := disk.SyncDir(x.s.path("trash")); err != nil {
		return r, fmt.Errorf("remove: %w", err)
	}
	next := x.index
	next.Manifests = slices.DeleteFunc(slices.Clone(x.index.Manifests), func(d v1.Descriptor) bool {
		return slices.ContainsFunc(r.References, func(gone v1.Descriptor) bool { return sameEntry(d, gone) })
	})
	if next.Manifests == nil {
		next.Manifests = []v1.Descriptor{}
	}
	if err := x.s.writeIndex(next); err != nil {
		return r, errors.Join(fmt.Errorf("remove: %w", err), disk.RemoveAll(dir))
	}
	x.index = next
	return r, x.s.moveToTrash(dir, r.Blobs)
}

// moveToTrash finishes a removal whose references are gone.
func (s *Store) moveToTrash(dir string, blobs []Blob) error {
	for _, b := range blobs {
		err := disk.Rename(s.BlobPath(b.Digest), filepath.Join(dir, b.Digest.Encoded()))
		if err := ignoreAbsent(err); err != nil {
			return fmt.Errorf("move to trash: %w", err)
		}
	}
	if err := errors.Join(disk.SyncDir(s.path(blobsName, sha256Name)), disk.SyncDir(dir)); err != nil {
		return fmt.Errorf("move to trash: %w", err)
	}
	if err := disk.Rename(filepath.Join(dir, pendingName), filepath.Join(dir, removalName)); err != nil {
		return fmt.Errorf("move to trash: %w", err)
	}
	return disk.SyncDir(dir)
}

// Recover finishes removals that a crash cut short, and cancels those that had
// not taken effect. reachable must hold every digest that any root reaches now.
// It returns the removals it finished.
func (x *Exclusive) Recover(reachable map[digest.Digest]bool) ([]Removal, error) {
	pending, err := x.s.pending()
	if err != nil {
		return nil, err
	}
	var done []Removal
	for _, r := range pending {
		dir := x.s.path("trash", r.ID)
		standing := slices.ContainsFunc(r.References, func(gone v1.Descriptor) bool {
			return slices.ContainsFunc(x.index.Manifests, func(d v1.Descriptor) bool { return sameEntry(d, gone) })
		})
		if standing {
			if err := x.cancel(dir); err != nil {
				return done, err
			}
			continue
		}
		r.Blobs = slices.DeleteFunc(r.Blobs, func(b Blob) bool { return reachable[b.Digest] })
		if err := x.s.moveToTrash(dir, r.Blobs); err != nil {
			return done, err
		}
		done = append(done, r)
	}
	return done, nil
}

// cancel drops the record of a removal whose references stand (again). Blobs
// that it had moved go back first.
func (x *Exclusive) cancel(dir string) error {
	if err := x.s.moveBack(dir); err != nil {
		return err
	}
	return disk.RemoveAll(dir)
}

func (s *Store) moveBack(dir string) error {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return fmt.Errorf("restore from trash: %w", err)
	}
	for _, e := range entries {
		if !isBlobName(e.Name()) {
			continue
		}
		from := filepath.Join(dir, e.Name())
		err := disk.RenameNoReplace(from, s.path(blobsName, sha256Name, e.Name()))
		if errors.Is(err, fs.ErrExist) {
			err = disk.Remove(from)
		}
		if err != nil {
			return fmt.Errorf("restore from trash: %w", err)
		}
	}
	return disk.SyncDir(s.path(blobsName, sha256Name))
}

// Restore undoes a removal: blobs back first, references after. A reference
// that names another version by now is restored by a name of its own.
func (x *Exclusive) Restore(id string) (Removal, error) {
	removals, err := x.s.Trash()
	if err != nil {
		return Removal{}, err
	}
	at := slices.IndexFunc(removals, func(r Removal) bool { return r.ID == id })
	if at < 0 {
		return Removal{}, fmt.Errorf("undo: removal %q: %w; larder undo without a name lists what can be undone", id, ErrNotFound)
	}
	r := removals[at]
	dir := x.s.path("trash", r.ID)
	if err := x.s.moveBack(dir); err != nil {
		return r, err
	}
	next := x.index
	next.Manifests = slices.Clone(x.index.Manifests)
	for _, d := range r.References {
		if slices.ContainsFunc(next.Manifests, func(have v1.Descriptor) bool { return sameEntry(have, d) }) {
			continue
		}
		taken := slices.ContainsFunc(next.Manifests, func(have v1.Descriptor) bool {
			return have.Annotations[v1.AnnotationRefName] == d.Annotations[v1.AnnotationRefName]
		})
		if taken {
			d.Annotations = cloneAnnotations(d.Annotations)
			d.Annotations[v1.AnnotationRefName] = lastingReference(d)
		}
		next.Manifests = append(next.Manifests, d)
	}
	if err := x.s.writeIndex(next); err != nil {
		return r, fmt.Errorf("undo: %w", err)
	}
	x.index = next
	return r, x.s.drop(r.ID)
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

// Trash lists the removals that can be undone, oldest first.
func (s *Store) Trash() ([]Removal, error) { return s.removals(removalName) }

// pending lists the removals that a crash cut short.
func (s *Store) pending() ([]Removal, error) { return s.removals(pendingName) }

func (s *Store) removals(record string) ([]Removal, error) {
	entries, err := os.ReadDir(s.path("trash"))
	if err != nil {
		return nil, fmt.Errorf("read trash: %w", err)
	}
	var out []Removal
	for _, e := range entries {
		data, err := os.ReadFile(s.path("trash", e.Name(), record))
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("read trash: %w", err)
		}
		var r Removal
		if err := json.Unmarshal(data, &r); err != nil || r.ID != e.Name() {
			return nil, fmt.Errorf("read %s: %w: it is not the record of a removal", s.path("trash", e.Name(), record), ErrDamaged)
		}
		out = append(out, r)
	}
	return out, nil
}

// Pending tells whether a removal was cut short, so that Recover has work.
func (s *Store) Pending() (bool, error) {
	pending, err := s.pending()
	return len(pending) > 0, err
}

// EmptyTrash deletes for good what was removed before the given time. It
// returns the removals that can no longer be undone.
func (x *Exclusive) EmptyTrash(before time.Time) ([]Removal, error) {
	removals, err := x.s.Trash()
	if err != nil {
		return nil, err
	}
	var gone []Removal
	for _, r := range removals {
		if !r.Time.Before(before) {
			continue
		}
		if err := x.s.drop(r.ID); err != nil {
			return gone, err
		}
		gone = append(gone, r)
	}
	return gone, x.s.sweepTrash()
}

// drop deletes one removal, its record first: a folder without a record is
// rubbish, whoever finds it.
func (s *Store) drop(id string) error {
	dir := s.path("trash", id)
	if err := ignoreAbsent(disk.Remove(filepath.Join(dir, removalName))); err != nil {
		return fmt.Errorf("empty trash: %w", err)
	}
	if err := disk.RemoveAll(dir); err != nil {
		return fmt.Errorf("empty trash: %w", err)
	}
	return nil
}

func (s *Store) sweepTrash() error {
	entries, err := os.ReadDir(s.path("trash"))
	if err != nil {
		return fmt.Errorf("empty trash: %w", err)
	}
	for _, e := range entries {
		names, err := os.ReadDir(s.path("trash", e.Name()))
		if err != nil {
			return fmt.Errorf("empty trash: %w", err)
		}
		has := func(name string) bool {
			return slices.ContainsFunc(names, func(n fs.DirEntry) bool { return n.Name() == name })
		}
		if !has(removalName) && !has(pendingName) {
			if err := disk.RemoveAll(s.path("trash", e.Name())); err != nil {
				return fmt.Errorf("empty trash: %w", err)
			}
		}
	}
	return nil
}

// Usage is what the store's folders hold, in bytes on the disk.
type Usage struct {
	Blobs    int64 // blobs/
	Ingest   int64 // downloads under way or cut short
	Trash    int64 // removed, can be undone
	Files    int64 // number of blobs
	Free     int64 // free on the file system, for an ordinary user
	Capacity int64 // of the file system
}

// Usage adds up what the store holds.
func (s *Store) Usage() (Usage, error) {
	var u Usage
	for _, part := range []struct {
		name  string
		bytes *int64
	}{{blobsName, &u.Blobs}, {"ingest", &u.Ingest}, {"trash", &u.Trash}} {
		err := filepath.WalkDir(s.path(part.name), func(path string, e fs.DirEntry, err error) error {
			if err != nil || e.IsDir() {
				return ignoreAbsent(err)
			}
			fi, err := e.Info()
			if err != nil {
				return ignoreAbsent(err)
			}
			*part.bytes += disk.Allocated(fi)
			if part.name == blobsName && !strings.HasPrefix(e.Name(), ".") {
				u.Files++
			}
			return nil
		})
		if err != nil {
			return u, fmt.Errorf("measure store: %w", err)
		}
	}
	free, capacity, err := disk.Free(s.dir)
	if err != nil {
		return u, fmt.Errorf("measure store: %w", err)
	}
	u.Free, u.Capacity = free, capacity
	return u, nil
}
