package gc

import (
	"bytes"
	"encoding/hex"
	"fmt"
	"maps"
	"runtime"
	"slices"
	"sync"

	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/larder-project/larder/internal/modelpack"
	"github.com/larder-project/larder/internal/store"
)

// reader reads manifests; it is a store.Store.
type reader interface {
	Manifest(d digest.Digest) ([]byte, error)
	Links(d v1.Descriptor) ([]v1.Descriptor, error)
}

// graph is what the entries of an index need, counted by blob. Manifests never
// change, so each is read once, and an update costs what has come and gone
// since the one before it. It is made for ten thousand versions of a hundred
// files each: blobs are numbers.
type graph struct {
	src    reader
	number map[store.Hash]int32
	hashes []store.Hash
	sizes  []int64                   // by blob, as a manifest gives it; -1: none does
	needed []int32                   // by blob: how many of the entries' contents need it
	layers map[digest.Digest][]int32 // of every content read so far
	live   map[digest.Digest]bool    // contents that are counted now
	broken map[digest.Digest]error   // live contents that cannot be read
}

func newGraph(src reader) *graph {
	return &graph{
		src: src, number: map[store.Hash]int32{}, layers: map[digest.Digest][]int32{},
		live: map[digest.Digest]bool{}, broken: map[digest.Digest]error{},
	}
}

// id is the number of a blob, which it gets when it is first seen.
func (g *graph) id(h store.Hash) int32 {
	n, ok := g.number[h]
	if !ok {
		n = int32(len(g.hashes))
		g.number[h] = n
		g.hashes = append(g.hashes, h)
		g.sizes = append(g.sizes, -1)
		g.needed = append(g.needed, 0)
	}
	return n
}

// update makes the graph that of these entries. What cannot be read is in
// broken afterwards.
func (g *graph) update(entries []v1.Descriptor) {
	now := make(map[digest.Digest]v1.Descriptor, len(entries))
	for _, d := range entries {
		now[d.Digest] = d
	}
	for d := range g.live {
		if _, stays := now[d]; !stays {
			g.drop(d)
		}
	}
	var fresh []v1.Descriptor
	for digest, d := range now {
		if g.broken[digest] != nil {
			g.drop(digest) // it may have been repaired
		}
		if !g.live[digest] {
			fresh = append(fresh, d)
		}
	}
	g.read(fresh)
	for _, d := range fresh {
		g.live[d.Digest] = true
		for _, n := range g.layers[d.Digest] {
			g.needed[n]++
		}
	}
}

func (g *graph) drop(d digest.Digest) {
	for _, n := range g.layers[d] {
		g.needed[n]--
	}
	delete(g.live, d)
	if g.broken[d] != nil {
		delete(g.broken, d)
		delete(g.layers, d)
	}
}

// read finds the distinct blobs that entries need, each one's own content
// first, unless they are known. Of what cannot be read, the content alone is
// known, and it is in broken.
func (g *graph) read(entries []v1.Descriptor) {
	entries = slices.DeleteFunc(slices.Clone(entries), func(d v1.Descriptor) bool { return g.layers[d.Digest] != nil })
	type found struct {
		d     v1.Descriptor
		blobs []link
		err   error
	}
	todo, done := make(chan v1.Descriptor), make(chan found, 16)
	var workers sync.WaitGroup
	for range min(runtime.GOMAXPROCS(0), len(entries)) {
		workers.Go(func() {
			for d := range todo {
				blobs, err := links(g.src, d)
				done <- found{d, blobs, err}
			}
		})
	}
	go func() {
		for _, d := range entries {
			todo <- d
		}
		close(todo)
		workers.Wait()
		close(done)
	}()
	// The map of known layers is read and written here alone.
	for f := range done {
		g.layers[f.d.Digest] = g.numbers(f.blobs)
		if f.err != nil {
			g.broken[f.d.Digest] = f.err
		}
	}
}

// numbers numbers blobs, each once, the first one first.
func (g *graph) numbers(blobs []link) []int32 {
	if len(blobs) == 0 {
		return nil
	}
	out := make([]int32, len(blobs))
	for i, b := range blobs {
		out[i] = g.id(b.hash)
		if b.size >= 0 {
			g.sizes[out[i]] = b.size
		}
	}
	first := out[0]
	slices.Sort(out)
	out = slices.Compact(out)
	at := slices.Index(out, first)
	out[0], out[at] = out[at], out[0]
	return out
}

// link is a blob that something needs.
type link struct {
	hash store.Hash
	size int64 // bytes; -1: not known
}

// links gives the blobs that an entry needs, its own content first. Where that
// cannot be read, it is all that is given.
func links(src reader, d v1.Descriptor) ([]link, error) {
	own, ok := store.HashOf(d.Digest)
	if !ok {
		return nil, fmt.Errorf("%s is no SHA-256 digest", d.Digest)
	}
	out := []link{{own, d.Size}}
	if store.IsModel(d) {
		manifest, err := src.Manifest(d.Digest)
		if err != nil {
			return out, err
		}
		// A subject is a manifest of its own, with links of its own.
		if !bytes.Contains(manifest, []byte(`"subject"`)) {
			modelpack.EachDigest(manifest, func(text []byte, size int64) {
				l := link{size: size}
				_, _ = hex.Decode(l.hash[:], text) // EachDigest gives 64 hex digits
				out = append(out, l)
			})
			return out, nil
		}
	}
	// An entry of another tool may name others that name others.
	reached, err := Reach([]v1.Descriptor{d}, src.Links)
	if err != nil {
		return out, err
	}
	for d := range reached {
		h, ok := store.HashOf(d)
		if !ok {
			return out[:1], fmt.Errorf("%s is no SHA-256 digest", d)
		}
		out = append(out, link{h, -1})
	}
	return out, nil
}

// unreadable is the error of an entry that cannot be read, of those that stay
// when gone goes: what it needs is not known, so nothing may be removed.
func (g *graph) unreadable(gone map[digest.Digest]bool) error {
	for _, d := range slices.Sorted(maps.Keys(g.broken)) {
		if !gone[d] {
			return fmt.Errorf("find what %s needs: %w; nothing was removed, larder verify tells what is damaged", d, g.broken[d])
		}
	}
	return nil
}

// Links lists what a descriptor's content names; see store.Store.Links.
type Links func(v1.Descriptor) ([]v1.Descriptor, error)

// Reach gives every digest that the roots reach, themselves included. Each
// digest is visited once.
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
