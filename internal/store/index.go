package store

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"time"

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/larder-project/larder/internal/atomicfile"
	"github.com/larder-project/larder/internal/disk"
	"github.com/larder-project/larder/internal/modelpack"
	"github.com/larder-project/larder/internal/reference"
)

// Version is one version of a model as index.json lists it.
type Version struct {
	Digest     digest.Digest // of the manifest
	Size       int64         // of the manifest, in bytes
	References []string      // canonical, sorted
	Created    time.Time     // when it first came into this store
	Source     string        // repository it came from, or empty
	Revision   string        // commit of the source, or empty
}

// cachedIndex is the parsed index.json, valid while the file is the same one.
type cachedIndex struct {
	file     os.FileInfo
	versions []Version
}

func emptyIndex() v1.Index {
	return v1.Index{
		Versioned: specs.Versioned{SchemaVersion: 2},
		MediaType: v1.MediaTypeImageIndex,
		Manifests: []v1.Descriptor{},
	}
}

// maxIndexBytes bounds what is read of index.json: some 400 bytes a reference.
const maxIndexBytes = 256 << 20

// copyName is a second file with what index.json was last replaced by, for
// whoever has to restore a list that the disk or a person has lost. Nothing
// reads it by itself: a list that may be older than the store decides nothing.
const copyName = v1.ImageIndexFile + ".copy"

// noIndex says what to do about a list of references that is damaged or gone.
// An empty one is never made in its place: by that every model would be a
// leftover.
func (s *Store) noIndex(err error) error {
	path := s.path(v1.ImageIndexFile)
	if errors.Is(err, fs.ErrNotExist) {
		err = fmt.Errorf("%w: %w", ErrDamaged, err)
	}
	if !errors.Is(err, ErrDamaged) {
		return fmt.Errorf("read the list of references: %w", err)
	}
	advice := fmt.Sprintf(`restore the file from a backup, or begin a new list with echo '{"schemaVersion":2,"manifests":[]}' >%s, and run larder pull or import again: files that are in the store are found`, path)
	if index, err := readIndex(s.path(copyName)); err == nil {
		advice = fmt.Sprintf("its copy is whole (references: %d): cp %s %s && larder verify", len(index.Manifests), s.path(copyName), path)
	}
	return fmt.Errorf("read the list of references: %w; nothing was changed; %s", err, advice)
}

func (s *Store) readIndex() (v1.Index, error) {
	index, err := readIndex(s.path(v1.ImageIndexFile))
	if err != nil {
		return v1.Index{}, s.noIndex(err)
	}
	return index, nil
}

func readIndex(path string) (v1.Index, error) {
	fi, err := os.Stat(path)
	if err != nil {
		return v1.Index{}, err
	}
	if fi.Size() > maxIndexBytes {
		return v1.Index{}, fmt.Errorf("%s: %w: %d bytes, at most %d are read", path, ErrDamaged, fi.Size(), maxIndexBytes)
	}
	data, err := os.ReadFile(path)
	if err != nil {
		return v1.Index{}, err
	}
	index, err := parseIndex(data)
	if err != nil {
		return v1.Index{}, fmt.Errorf("%s: %w", path, err)
	}
	return index, nil
}

// parseIndex reads index.json. What it cannot read in full is an error, never
// an empty list: the list decides what may be removed.
func parseIndex(data []byte) (v1.Index, error) {
	var index v1.Index
	dec := json.NewDecoder(bytes.NewReader(data))
	if err := dec.Decode(&index); err != nil {
		return v1.Index{}, fmt.Errorf("%w: not an OCI image index (%w)", ErrDamaged, err)
	}
	if dec.More() {
		return v1.Index{}, fmt.Errorf("%w: text after the JSON object", ErrDamaged)
	}
	if index.SchemaVersion != 2 || index.Manifests == nil {
		return v1.Index{}, fmt.Errorf("%w: not an OCI image index (schemaVersion %d)", ErrDamaged, index.SchemaVersion)
	}
	for _, d := range index.Manifests {
		if err := modelpack.CheckDigest(d.Digest); err != nil {
			return v1.Index{}, fmt.Errorf("%w: %w", ErrDamaged, err)
		}
	}
	return index, nil
}

func (s *Store) writeIndex(index v1.Index) error {
	data, err := json.Marshal(index)
	if err != nil {
		return fmt.Errorf("encode the list of references: %w", err)
	}
	if err := atomicfile.Write(s.path(v1.ImageIndexFile), data, 0o644); err != nil {
		return full(err)
	}
	// Where the copy cannot be written, none is better than an old one.
	if err := atomicfile.Write(s.path(copyName), data, 0o644); err != nil {
		_ = disk.Remove(s.path(copyName))
	}
	return nil
}

// isModel tells Larder's entries from what other tools may keep in the layout.
func isModel(d v1.Descriptor) bool { return d.ArtifactType == modelpack.ArtifactType }

// Versions lists every version that a reference names, newest first.
func (s *Store) Versions() ([]Version, error) {
	fi, err := os.Stat(s.path(v1.ImageIndexFile))
	if err != nil {
		return nil, s.noIndex(err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	// Each replacement is a new inode written before it got the name, so the
	// same inode, time and size mean the same bytes.
	if c := s.index.file; c != nil && os.SameFile(c, fi) && c.ModTime().Equal(fi.ModTime()) && c.Size() == fi.Size() {
		return slices.Clone(s.index.versions), nil
	}
	index, err := s.readIndex()
	if err != nil {
		return nil, err
	}
	versions := versionsOf(index)
	s.index = cachedIndex{file: fi, versions: versions}
	return slices.Clone(versions), nil
}

func versionsOf(index v1.Index) []Version {
	at := map[digest.Digest]int{}
	var out []Version
	for _, d := range index.Manifests {
		if !isModel(d) {
			continue
		}
		i, ok := at[d.Digest]
		if !ok {
			i = len(out)
			at[d.Digest] = i
			out = append(out, Version{Digest: d.Digest, Size: d.Size})
		}
		v := &out[i]
		if ref := d.Annotations[v1.AnnotationRefName]; ref != "" {
			v.References = append(v.References, ref)
		}
		if t, err := time.Parse(time.RFC3339Nano, d.Annotations[v1.AnnotationCreated]); err == nil && (v.Created.IsZero() || t.Before(v.Created)) {
			v.Created = t
		}
		if v.Source == "" {
			v.Source = d.Annotations[modelpack.AnnotationSource]
		}
		if v.Revision == "" {
			v.Revision = d.Annotations[modelpack.AnnotationRevision]
		}
	}
	for i := range out {
		slices.Sort(out[i].References)
	}
	slices.SortStableFunc(out, func(a, b Version) int {
		if c := b.Created.Compare(a.Created); c != 0 {
			return c
		}
		return bytes.Compare([]byte(a.Digest), []byte(b.Digest))
	})
	return out
}

// Publish makes a model visible under refs. Every blob of it must be there;
// the lease must hold them, and holds manifest and config afterwards. A
// reference that named another version moves; a version that would lose its
// last reference by this keeps one by its commit or digest.
func (s *Store) Publish(ctx context.Context, lease *Lease, m modelpack.Model, refs []reference.Reference) (Version, error) {
	return s.publish(ctx, lease, m, refs, false)
}

// ErrTaken is returned where a name means another version already.
var ErrTaken = errors.New("the name is taken")

// PublishNew is Publish for content that is not known to be what its names
// say: where one of refs means another version, nothing is published, and the
// error is ErrTaken.
func (s *Store) PublishNew(ctx context.Context, lease *Lease, m modelpack.Model, refs []reference.Reference) (Version, error) {
	return s.publish(ctx, lease, m, refs, true)
}

func (s *Store) publish(ctx context.Context, lease *Lease, m modelpack.Model, refs []reference.Reference, onlyNew bool) (Version, error) {
	manifest, config, err := modelpack.Build(m)
	if err != nil {
		return Version{}, fmt.Errorf("publish: %w", err)
	}
	if err := checkRefs(refs); err != nil {
		return Version{}, fmt.Errorf("publish: %w", err)
	}
	held := make([]digest.Digest, len(m.Files))
	for i, f := range m.Files {
		held[i] = f.Digest
	}
	if err := lease.Hold(ctx, held...); err != nil {
		return Version{}, fmt.Errorf("publish: %w", err)
	}
	for _, f := range m.Files {
		size, ok, err := s.Stat(f.Digest)
		switch {
		case err != nil:
			return Version{}, fmt.Errorf("publish: %w", err)
		case !ok:
			return Version{}, fmt.Errorf("publish: file %q: blob %s: %w", f.Path, f.Digest, ErrNotFound)
		case size != f.Size:
			return Version{}, fmt.Errorf("publish: file %q: blob %s has %d bytes, not %d: %w", f.Path, f.Digest, size, f.Size, ErrDamaged)
		}
	}
	// The names of blobs become durable here, those that other processes
	// committed and this version reuses included; then config and manifest,
	// then the reference.
	if err := disk.SyncDir(s.path(blobsName, sha256Name)); err != nil {
		return Version{}, fmt.Errorf("publish: %w", err)
	}
	for _, data := range [][]byte{config, manifest} {
		if _, err := s.PutBlob(ctx, lease, data); err != nil {
			return Version{}, fmt.Errorf("publish: %w", err)
		}
	}
	if err := disk.SyncDir(s.path(blobsName, sha256Name)); err != nil {
		return Version{}, fmt.Errorf("publish: %w", err)
	}
	desc := v1.Descriptor{
		MediaType:    v1.MediaTypeImageManifest,
		ArtifactType: modelpack.ArtifactType,
		Digest:       digest.FromBytes(manifest),
		Size:         int64(len(manifest)),
	}
	return s.setReferences(ctx, desc, m.Source, m.Revision, refs, onlyNew)
}

// Tag gives a version that is in the store more references.
func (s *Store) Tag(ctx context.Context, version digest.Digest, refs ...reference.Reference) (Version, error) {
	if err := checkRefs(refs); err != nil {
		return Version{}, fmt.Errorf("tag: %w", err)
	}
	m, err := s.Model(version)
	if err != nil {
		return Version{}, fmt.Errorf("tag: %w", err)
	}
	size, _, err := s.Stat(version)
	if err != nil {
		return Version{}, fmt.Errorf("tag: %w", err)
	}
	desc := v1.Descriptor{MediaType: v1.MediaTypeImageManifest, ArtifactType: modelpack.ArtifactType, Digest: version, Size: size}
	return s.setReferences(ctx, desc, m.Source, m.Revision, refs, false)
}

func checkRefs(refs []reference.Reference) error {
	if len(refs) == 0 {
		return errors.New("no reference was given; a version without one would be collected")
	}
	for _, r := range refs {
		if !r.Fixed() {
			return fmt.Errorf("%s is not a fixed reference; give a tag (%s:TAG)", r, r.Source())
		}
	}
	return nil
}

func (s *Store) setReferences(ctx context.Context, desc v1.Descriptor, source, revision string, refs []reference.Reference, onlyNew bool) (Version, error) {
	unlock, err := s.lock(ctx, true)
	if err != nil {
		return Version{}, err
	}
	defer unlock()
	// Between the caller's look and this lock the version may have gone: a
	// reference to it must not come back alone.
	if _, ok, err := s.Stat(desc.Digest); err != nil || !ok {
		return Version{}, errors.Join(fmt.Errorf("publish: manifest %s: %w", desc.Digest, ErrNotFound), err)
	}
	index, err := s.readIndex()
	if err != nil {
		return Version{}, err
	}
	if onlyNew {
		versions := versionsOf(index)
		for _, r := range refs {
			// By a commit a version is found under any of its names.
			if have, ok := find(versions, r); ok && have.Digest != desc.Digest {
				return Version{}, fmt.Errorf("publish: %s: %w by %s", r, ErrTaken, have.Digest)
			}
		}
	}
	if err := atomicfile.SweepTemp(s.dir); err != nil {
		return Version{}, fmt.Errorf("sweep %s: %w", s.dir, err)
	}
	next := withReferences(index, desc, source, revision, refs, s.now())
	if !slices.EqualFunc(index.Manifests, next.Manifests, sameEntry) {
		if err := s.writeIndex(next); err != nil {
			return Version{}, err
		}
		_ = s.keepReserve() // what was published does not depend on it
	}
	for _, v := range versionsOf(next) {
		if v.Digest == desc.Digest {
			return v, nil
		}
	}
	return Version{}, fmt.Errorf("publish: %s is not in the list just written", desc.Digest)
}

func sameEntry(a, b v1.Descriptor) bool {
	return a.Digest == b.Digest && a.Annotations[v1.AnnotationRefName] == b.Annotations[v1.AnnotationRefName]
}

// withReferences is the index after refs point to desc. Pure.
func withReferences(index v1.Index, desc v1.Descriptor, source, revision string, refs []reference.Reference, now time.Time) v1.Index {
	moved := map[string]bool{}
	for _, r := range refs {
		moved[r.String()] = true
	}
	out := index
	out.Manifests = nil
	kept := map[digest.Digest]bool{desc.Digest: true}
	already := map[string]bool{}
	created := now
	for _, d := range index.Manifests {
		ref := d.Annotations[v1.AnnotationRefName]
		if isModel(d) && moved[ref] && d.Digest != desc.Digest {
			continue
		}
		if d.Digest == desc.Digest {
			already[ref] = true
			if t, err := time.Parse(time.RFC3339Nano, d.Annotations[v1.AnnotationCreated]); err == nil {
				created = t
			}
		}
		kept[d.Digest] = true
		out.Manifests = append(out.Manifests, d)
	}
	for _, d := range index.Manifests {
		if kept[d.Digest] {
			continue
		}
		// Its last reference moves away. It stays reachable by a name that
		// cannot move, until somebody or a policy removes it.
		kept[d.Digest] = true
		d.Annotations = cloneAnnotations(d.Annotations)
		d.Annotations[v1.AnnotationRefName] = lastingReference(d, index.Manifests)
		out.Manifests = append(out.Manifests, d)
	}
	for _, r := range refs {
		if already[r.String()] {
			continue
		}
		already[r.String()] = true
		entry := desc
		entry.Annotations = map[string]string{
			v1.AnnotationRefName: r.String(),
			v1.AnnotationCreated: created.UTC().Format(time.RFC3339Nano),
		}
		if source != "" {
			entry.Annotations[modelpack.AnnotationSource] = source
		}
		if revision != "" {
			entry.Annotations[modelpack.AnnotationRevision] = revision
		}
		out.Manifests = append(out.Manifests, entry)
	}
	return out
}

// lastingReference is a name that cannot move: by the commit or the digest of
// the version. One that another version has is no name: a pull of some files
// of a commit and one of all of them make two versions of that commit.
func lastingReference(d v1.Descriptor, index []v1.Descriptor) string {
	taken := func(name string) bool {
		return slices.ContainsFunc(index, func(o v1.Descriptor) bool {
			return o.Digest != d.Digest && o.Annotations[v1.AnnotationRefName] == name
		})
	}
	source, rev := d.Annotations[modelpack.AnnotationSource], d.Annotations[modelpack.AnnotationRevision]
	if r, err := reference.Parse(source + "@" + rev); err == nil && r.Kind == reference.Hub && reference.IsCommit(rev) && !taken(r.String()) {
		return r.String()
	}
	if r, err := reference.Parse(d.Annotations[v1.AnnotationRefName]); err == nil && r.Kind == reference.Short {
		return reference.Reference{Kind: reference.Short, Repo: r.Repo, Digest: d.Digest}.String()
	}
	return string(d.Digest)
}

func cloneAnnotations(in map[string]string) map[string]string {
	out := make(map[string]string, len(in)+1)
	for k, v := range in {
		out[k] = v
	}
	return out
}
