package gc

import (
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/larder-project/larder/internal/store"
	"github.com/larder-project/larder/internal/usage"
)

// Inventory is what a store holds and who uses it, at one moment.
type Inventory struct {
	Time     time.Time
	Versions []VersionInfo
	Blobs    []BlobInfo // every blob of the store, in no order
	Usage    store.Usage
	Trash    []store.Removal

	// Failed are the sources that could not tell their uses. Where there are
	// any, what seems unused may be used.
	Failed []*usage.Error

	byDigest map[digest.Digest]int // of Versions
}

// VersionInfo is one version with its uses.
type VersionInfo struct {
	store.Version
	Layers   []int32 // its distinct blobs, manifest and config among them: indices into Inventory.Blobs
	Size     int64   // bytes of its distinct blobs
	Unique   int64   // of these, bytes of blobs that no other version has
	LastUsed time.Time
	Pin      *store.Pin // nil: not pinned
	Uses     []usage.Use
	Damaged  string // why its manifest cannot be read; it is then never removed by a plan
}

// BlobInfo is one blob.
type BlobInfo struct {
	Hash     store.Hash
	Size     int64
	Versions int32  // how many versions need it
	Lease    string // name of a lease that holds it, or empty
	Foreign  bool   // an entry of another tool in the OCI layout needs it
}
