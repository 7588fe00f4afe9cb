package space

import (
	"github.com/opencontainers/go-digest"

	"github.com/larder-project/larder/internal/modelpack"
)

// Share is what one version needs, in bytes of its files.
type Share struct {
	Size   int64 // of its tree: a file that appears twice counts twice
	Unique int64 // of contents that no other version has: what goes with it
	Shared int64 // of contents that other versions have too
}

// Sums is what all versions need together, in bytes of their files.
type Sums struct {
	Logical int64 // what a copy of each version would take
	Stored  int64 // what their distinct contents take
}

// Saved is what keeping each content once saves.
func (s Sums) Saved() int64 { return s.Logical - s.Stored }

// Divide tells what each of the versions needs, in their order, and all
// together. The versions differ from each other.
func Divide(versions []modelpack.Model) ([]Share, Sums) {
	holders := map[digest.Digest]int{}
	for _, m := range versions {
		for d := range contents(m) {
			holders[d]++
		}
	}
	out := make([]Share, len(versions))
	var sums Sums
	for i, m := range versions {
		out[i].Size = m.Size()
		sums.Logical += out[i].Size
		for d, size := range contents(m) {
			if holders[d] == 1 {
				out[i].Unique += size
				sums.Stored += size
			} else {
				out[i].Shared += size
			}
		}
	}
	counted := map[digest.Digest]bool{}
	for _, m := range versions {
		for d, size := range contents(m) {
			if holders[d] > 1 && !counted[d] {
				counted[d] = true
				sums.Stored += size
			}
		}
	}
	return out, sums
}

// contents are a version's distinct contents with their sizes.
func contents(m modelpack.Model) map[digest.Digest]int64 {
	out := make(map[digest.Digest]int64, len(m.Files))
	for _, f := range m.Files {
		out[f.Digest] = f.Size
	}
	return out
}
