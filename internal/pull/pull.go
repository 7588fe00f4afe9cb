// Package pull brings a model from a source into the store: it plans what is
// missing, fetches or copies that, checks every byte against what the source
// promised, and publishes the whole as one version.
//
// # Order
//
// All digests that are known beforehand are held in a lease before the store
// is asked for them, so that nothing that is found can be collected meanwhile.
// What the store has is never asked of the source again, whatever model it
// came with. A blob becomes visible when all its bytes are there, hashed and
// durable; the version becomes visible when all its blobs are.
//
// # After a crash
//
// A crash leaves complete blobs, which the next pull finds, and partial ones in
// the store's ingest folder, which it goes on from. Nothing partial has a name
// under blobs/, and no reference names an incomplete version. Of a large
// download the pieces that were there are saved about every 64 MiB; they are
// hashed again on resuming, and a wrong digest drops them all.
//
// # Bytes from this machine
//
// A local file is cloned where the file system can share blocks, else copied
// while it is hashed. Options.Move takes files over instead: see move.go.
package pull

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/opencontainers/go-digest"

	"github.com/larder-project/larder/internal/modelpack"
	"github.com/larder-project/larder/internal/reference"
	"github.com/larder-project/larder/internal/source"
	"github.com/larder-project/larder/internal/store"
)

// DefaultJobs is how many connections (or files, of a local source) are used
// at once unless Options say otherwise.
const DefaultJobs = 8

// Options of Run.
type Options struct {
	Node     string   // this node's name, for leases
	Jobs     int      // connections at once; 0 means DefaultJobs
	Progress Progress // may be nil
	Move     bool     // take files of a local source over and remove them there
	New      bool     // take no name away from another version: store.ErrTaken instead
}

// Result tells what a pull has done.
type Result struct {
	Version   store.Version
	Model     modelpack.Model
	Unchanged bool  // version and references were there before; nothing was written
	Fetched   int64 // bytes read from the source and stored
	Resumed   int64 // bytes that an earlier, broken off pull had left
	Reused    int64 // bytes of blobs that the store had
	Files     []FileResult
}

// FileResult tells how one file of the version came to be there.
type FileResult struct {
	Path   string
	Digest digest.Digest
	Size   int64
	How    How
}

// Run brings the source's snapshot into the store and publishes it under the
// snapshot's references. When ctx is cancelled, or the process dies, the same
// call later goes on from what is there.
func Run(ctx context.Context, st *store.Store, src source.Source, o Options) (res Result, err error) {
	if o.Jobs <= 0 {
		o.Jobs = DefaultJobs
	}
	if o.Progress == nil {
		o.Progress = silent{}
	}
	if _, local := src.(source.Local); o.Move && !local {
		return Result{}, errors.New("only files of this machine can be moved into the store")
	}
	snap, err := src.Snapshot(ctx)
	if err != nil {
		return Result{}, err
	}
	lease, err := st.NewLease(ctx, o.Node, "pull")
	if err != nil {
		return Result{}, err
	}
	r := &run{st: st, src: src, lease: lease, snap: snap, o: o}
	defer func() {
		err = errors.Join(err, r.closeMoved(), lease.Release())
	}()
	if res, was, err := r.resumeMove(ctx); err != nil {
		return res, about(snap, err)
	} else if was {
		return res, nil
	}
	if r.items, err = plan(snap); err != nil {
		return Result{}, about(snap, err)
	}
	if err := r.lookUp(ctx); err != nil {
		return Result{}, about(snap, err)
	}
	o.Progress.Start(r.plan())
	if err := r.fetch(ctx); err != nil {
		return Result{}, about(snap, err)
	}
	res = r.result()
	if res.Version, res.Unchanged, err = r.published(ctx, res.Model); err != nil {
		return Result{}, about(snap, err)
	}
	if res.Unchanged {
		st.TouchPulled(o.Node, res.Version.Digest)
	} else {
		publish := st.Publish
		if o.New {
			publish = st.PublishNew
		}
		if res.Version, err = publish(ctx, lease, res.Model, snap.References); err != nil {
			return Result{}, about(snap, err)
		}
	}
	if o.Move {
		if err := r.checkReused(ctx); err != nil {
			return res, fmt.Errorf("%s is in the store, and its files are still where they were: %w", title(snap), err)
		}
		if err := r.removeOriginals(res.Version.Digest); err != nil {
			return res, fmt.Errorf("%s is in the store, but its files could not all be removed from where they were: %w", title(snap), err)
		}
	}
	return res, nil
}

// about says which model an error is about, unless its source has.
func about(snap source.Snapshot, err error) error {
	var said *source.Error
	if errors.As(err, &said) {
		return err
	}
	return fmt.Errorf("%s: %w", title(snap), err)
}

func title(snap source.Snapshot) string {
	if len(snap.References) > 0 {
		return snap.References[0].String()
	}
	return snap.Source
}

// run is one call of Run.
type run struct {
	st    *store.Store
	src   source.Source
	lease *store.Lease
	snap  source.Snapshot
	items []*item
	o     Options

	local local
	moved moved
}

// result is complete once every item is.
func (r *run) result() Result {
	res := Result{Model: modelpack.Model{Source: r.snap.Source, Revision: r.snap.Revision, Partial: r.snap.Partial}}
	for _, it := range r.items {
		switch it.how {
		case Reused:
			res.Reused += it.want.Size
		default:
			res.Resumed += it.resumed
			res.Fetched += it.want.Size - it.resumed
		}
		for _, p := range it.paths {
			res.Files = append(res.Files, FileResult{Path: p, Digest: it.digest, Size: it.want.Size, How: it.how})
			res.Model.Files = append(res.Model.Files, modelpack.File{Path: p, Digest: it.digest, Size: it.want.Size, GitOID: it.gitOID})
		}
	}
	slices.SortFunc(res.Files, func(a, b FileResult) int { return compare(a.Path, b.Path) })
	slices.SortFunc(res.Model.Files, func(a, b modelpack.File) int { return compare(a.Path, b.Path) })
	return res
}

// published tells whether exactly this version already has all references.
// The manifest of a large model is large itself, so it is made only where the
// references are all there and name one version.
func (r *run) published(ctx context.Context, m modelpack.Model) (store.Version, bool, error) {
	none := store.Version{}
	if slices.ContainsFunc(r.items, func(it *item) bool { return it.how != Reused }) {
		return none, false, nil
	}
	versions, err := r.st.Versions()
	if err != nil {
		return none, false, err
	}
	at := slices.IndexFunc(versions, func(v store.Version) bool {
		return !slices.ContainsFunc(r.snap.References, func(ref reference.Reference) bool {
			return !slices.Contains(v.References, ref.String())
		})
	})
	if at < 0 {
		return none, false, nil
	}
	manifest, config, err := modelpack.Build(m)
	if err != nil {
		return none, false, err
	}
	if digest.FromBytes(manifest) != versions[at].Digest {
		return none, false, nil
	}
	// Held, then looked up again: it may just be removed.
	if err := r.lease.Hold(ctx, versions[at].Digest, digest.FromBytes(config)); err != nil {
		return none, false, err
	}
	v, there, err := r.version(versions[at].Digest)
	if err != nil {
		return none, false, err
	}
	if !there || slices.ContainsFunc(r.snap.References, func(ref reference.Reference) bool {
		return !slices.Contains(v.References, ref.String())
	}) {
		return none, false, nil
	}
	_, there, err = r.st.Stat(v.Digest)
	return v, there, err
}
