// Package gc removes versions of models and the blobs that nothing else needs.
//
// It knows roots, marks what they reach, and gives the store a removal to
// carry out; what is in use it learns from others (package usage). The mark is
// pure. Every removal is decided under the store's exclusive lock, from roots
// gathered under that lock. A root that cannot be read means that nothing is
// removed.
package gc

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/larder-project/larder/internal/reference"
	"github.com/larder-project/larder/internal/store"
	"github.com/larder-project/larder/internal/usage"
)

// InUseError says who uses a version that was to be removed.
type InUseError struct {
	Name string // what was to be removed
	Uses []usage.Use
}

// Error implements error.
func (e *InUseError) Error() string {
	by := make([]string, 0, len(e.Uses))
	for _, u := range e.Uses {
		if !slices.Contains(by, u.By) {
			by = append(by, u.By)
		}
	}
	return fmt.Sprintf("%s is in use by %s", e.Name, strings.Join(by, ", "))
}

// Is makes errors.Is(err, store.ErrInUse) true.
func (e *InUseError) Is(target error) bool { return target == store.ErrInUse }

// Hint says what to do next.
func (e *InUseError) Hint() string {
	return "stop the containers and remove the volumes that use it first; larder ps and larder volume ls list them"
}

// ErrAmbiguous is returned for a name that could mean several versions.
var ErrAmbiguous = errors.New("the name means several versions")

// Links lists what a descriptor's content names; see store.Store.Links.
type Links func(v1.Descriptor) ([]v1.Descriptor, error)

// Reach gives every digest that the roots reach, themselves included, with
// sizes in bytes. Each digest is visited once.
func Reach(roots []v1.Descriptor, links Links) (map[digest.Digest]v1.Descriptor, error) {
	seen := make(map[digest.Digest]v1.Descriptor, len(roots))
	todo := slices.Clone(roots)
	for len(todo) > 0 {
		d := todo[len(todo)-1]
		todo = todo[:len(todo)-1]
		if _, ok := seen[d.Digest]; ok {
			continue
		}
		seen[d.Digest] = d
		next, err := links(d)
		if err != nil {
			return nil, fmt.Errorf("find what %s needs: %w", d.Digest, err)
		}
		todo = append(todo, next...)
	}
	return seen, nil
}

// remember makes links read each manifest once: manifests never change, so the
// mark under the lock costs no more than what came since the one before it.
func remember(links Links) Links {
	known := map[digest.Digest][]v1.Descriptor{}
	return func(d v1.Descriptor) ([]v1.Descriptor, error) {
		if out, ok := known[d.Digest]; ok {
			return out, nil
		}
		out, err := links(d)
		if err == nil && len(out) > 0 {
			known[d.Digest] = out
		}
		return out, err
	}
}

// Options of a removal.
type Options struct {
	Node    string         // name of this node
	Sources []usage.Source // of uses on this node
	Reason  string         // recorded with the removal
	DryRun  bool           // decide and report, change nothing
	Now     bool           // delete for good, not to be undone
}

// Result is what a removal did, or with DryRun would do.
type Result struct {
	ID         string          // of the removal in the trash; empty when nothing was moved
	References []string        // that are gone
	Versions   []digest.Digest // that are gone with their last reference
	Blobs      []store.Blob    // that nothing else needs, moved to the trash
	Bytes      int64           // sum of their sizes
	Kept       int64           // bytes of the versions that others share and that stay
	Already    bool            // an earlier call had removed them; see the trash
}

// Remove takes references away, and moves to the trash what only they reached.
// Names it refuses: those that match nothing (store.ErrNotFound), several
// versions (ErrAmbiguous) or a version in use (store.ErrInUse). It removes all
// or nothing.
func Remove(ctx context.Context, st *store.Store, names []reference.Reference, o Options) (Result, error) {
	links := remember(st.Links)
	finished, err := Recover(ctx, st)
	if err != nil {
		return Result{}, err
	}
	// Warm the cache without the lock; errors come again under it.
	if index, err := st.Index(); err == nil {
		_, _ = Reach(index, links)
	}
	var result Result
	err = st.Exclusive(ctx, func(x *store.Exclusive) error {
		gone, err := selectEntries(st, x.Index(), names)
		if errors.Is(err, store.ErrNotFound) {
			if r, ok := removedBefore(st, finished, names); ok {
				result = r
				return nil
			}
		}
		if err != nil {
			return err
		}
		plan, removal, used, err := plan(ctx, st, x, gone, links, o)
		if err != nil {
			return err
		}
		result = plan
		if o.DryRun {
			return nil
		}
		if removal, err = x.Remove(removal); err != nil {
			return err
		}
		result.ID = removal.ID
		if err := x.Forget(o.Node, used); err != nil {
			return err
		}
		if o.Now {
			_, err = x.EmptyTrash(removal.Time.Add(time.Nanosecond))
			result.ID = ""
		}
		return err
	})
	return result, err
}

// selectEntries finds the entries of index.json that the names mean.
func selectEntries(st *store.Store, index []v1.Descriptor, names []reference.Reference) ([]v1.Descriptor, error) {
	var gone []v1.Descriptor
	for _, name := range names {
		entries, err := entriesOf(st, index, name)
		if err != nil {
			return nil, err
		}
		for _, e := range entries {
			if !slices.ContainsFunc(gone, func(d v1.Descriptor) bool { return entry(d) == entry(e) }) {
				gone = append(gone, e)
			}
		}
	}
	return gone, nil
}

func entry(d v1.Descriptor) [2]string {
	return [2]string{string(d.Digest), d.Annotations[v1.AnnotationRefName]}
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

// plan decides what goes with the given entries, or refuses.
func plan(ctx context.Context, st *store.Store, x *store.Exclusive, gone []v1.Descriptor, links Links, o Options) (Result, store.Removal, map[digest.Digest]bool, error) {
	fail := func(err error) (Result, store.Removal, map[digest.Digest]bool, error) {
		return Result{}, store.Removal{}, nil, err
	}
	leaving := map[[2]string]bool{}
	for _, d := range gone {
		leaving[entry(d)] = true
	}
	var stay []v1.Descriptor
	staying := map[digest.Digest]bool{}
	for _, d := range x.Index() {
		if !leaving[entry(d)] {
			stay = append(stay, d)
			staying[d.Digest] = true
		}
	}
	uses, used, err := gather(ctx, st, o)
	if err != nil {
		return fail(err)
	}
	if err := refuse(gone, staying, uses); err != nil {
		return fail(err)
	}
	keep, err := Reach(stay, links)
	if err != nil {
		return fail(fmt.Errorf("%w; nothing was removed, larder verify tells what is damaged", err))
	}
	leased, err := x.Leased()
	if err != nil {
		return fail(fmt.Errorf("%w; nothing was removed", err))
	}
	reached, err := Reach(gone, links)
	if err != nil {
		// What is damaged can still be removed: what it named is then found
		// by no mark and stays as an unreachable blob, never the reverse.
		if !errors.Is(err, store.ErrDamaged) && !errors.Is(err, store.ErrNotFound) {
			return fail(err)
		}
		reached = map[digest.Digest]v1.Descriptor{}
		for _, d := range gone {
			reached[d.Digest] = d
		}
	}
	result := Result{}
	removal := store.Removal{Time: time.Now(), Reason: o.Reason, References: gone}
	for _, d := range gone {
		result.References = append(result.References, d.Annotations[v1.AnnotationRefName])
		if !staying[d.Digest] && !slices.Contains(result.Versions, d.Digest) {
			result.Versions = append(result.Versions, d.Digest)
		}
	}
	for dgst := range reached {
		_, needed := keep[dgst]
		_, held := leased[dgst]
		size, there, err := st.Stat(dgst)
		switch {
		case err != nil && !errors.Is(err, store.ErrDamaged):
			return fail(err)
		case !there:
		case needed || held || staying[dgst]:
			result.Kept += size
		default:
			removal.Blobs = append(removal.Blobs, store.Blob{Digest: dgst, Size: size})
			result.Bytes += size
		}
	}
	// Manifests go first: what is half removed must not look whole.
	isVersion := func(b store.Blob) bool { return slices.Contains(result.Versions, b.Digest) }
	slices.SortFunc(removal.Blobs, func(a, b store.Blob) int {
		if isVersion(a) != isVersion(b) {
			if isVersion(a) {
				return -1
			}
			return 1
		}
		return strings.Compare(string(a.Digest), string(b.Digest))
	})
	result.Blobs = removal.Blobs
	return result, removal, used, nil
}

// gather asks all roots, and the records of the other nodes that share the
// store. It returns the versions that this node uses beside all uses.
func gather(ctx context.Context, st *store.Store, o Options) (uses []usage.Use, here map[digest.Digest]bool, err error) {
	here = map[digest.Digest]bool{}
	uses, failed := usage.Gather(ctx, o.Sources)
	if len(failed) > 0 {
		return nil, nil, fmt.Errorf("%w; nothing was removed", failed[0])
	}
	for _, u := range uses {
		here[u.Version] = true
	}
	nodes, err := st.Users()
	if err != nil {
		return nil, nil, fmt.Errorf("%w; nothing was removed", err)
	}
	for version, names := range nodes {
		for _, name := range names {
			if name != o.Node {
				uses = append(uses, usage.Use{Version: version, By: "node " + name})
			}
		}
	}
	return uses, here, nil
}

// refuse says no when a version in use would lose its last reference, or the
// reference that its user goes by.
func refuse(gone []v1.Descriptor, staying map[digest.Digest]bool, uses []usage.Use) error {
	for _, d := range gone {
		ref := d.Annotations[v1.AnnotationRefName]
		var by []usage.Use
		for _, u := range uses {
			if u.Version == d.Digest && (!staying[d.Digest] || u.Reference == ref) {
				by = append(by, u)
			}
		}
		if len(by) > 0 {
			name := ref
			if name == "" {
				name = string(d.Digest)
			}
			return &InUseError{Name: name, Uses: by}
		}
	}
	return nil
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

// Recover finishes or cancels removals that a crash cut short.
func Recover(ctx context.Context, st *store.Store) ([]store.Removal, error) {
	pending, err := st.Pending()
	if err != nil || !pending {
		return nil, err
	}
	var finished []store.Removal
	err = st.Exclusive(ctx, func(x *store.Exclusive) error {
		reached, err := Reach(x.Index(), st.Links)
		if err != nil {
			return err
		}
		leased, err := x.Leased()
		if err != nil {
			return err
		}
		keep := make(map[digest.Digest]bool, len(reached)+len(leased))
		for d := range reached {
			keep[d] = true
		}
		for d := range leased {
			keep[d] = true
		}
		finished, err = x.Recover(keep)
		return err
	})
	if err != nil {
		return finished, fmt.Errorf("finish an earlier removal: %w", err)
	}
	return finished, nil
}

// Undo brings a removal back whole: its blobs, then its references. A name that
// another version has by now is not taken away; the restored version then gets
// one by its digest or commit.
func Undo(ctx context.Context, st *store.Store, id string) (store.Removal, error) {
	if _, err := Recover(ctx, st); err != nil {
		return store.Removal{}, err
	}
	var out store.Removal
	err := st.Exclusive(ctx, func(x *store.Exclusive) (err error) {
		out, err = x.Restore(id)
		return err
	})
	return out, err
}

// EmptyTrash deletes for good what was removed before the given time, and
// returns those removals.
func EmptyTrash(ctx context.Context, st *store.Store, before time.Time) ([]store.Removal, error) {
	if _, err := Recover(ctx, st); err != nil {
		return nil, err
	}
	var out []store.Removal
	err := st.Exclusive(ctx, func(x *store.Exclusive) (err error) {
		out, err = x.EmptyTrash(before)
		return err
	})
	return out, err
}
