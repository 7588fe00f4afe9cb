// Package retention decides which versions of models stay and which may go.
//
// It is pure: it takes versions, a policy and the time, and gives a plan in
// which every version has its reason. It removes nothing; package gc carries a
// plan out, and looks again before it does. docs/policy.md tells users what is
// decided here, and in which order.
//
// Two things hold for every policy. A plan never takes what is in use, pinned,
// damaged, protected, or younger than minAge. And a plan can be repeated: once
// it is carried out, the same policy finds nothing more to take at that moment
// (but models that are abandoned by now), so that the versions kept to roll back
// to do not melt away run by run.
package retention

import (
	"time"

	"github.com/opencontainers/go-digest"
)

// Version is what a plan needs to know of one version.
type Version struct {
	Digest     digest.Digest
	References []string  // as the store lists them; what a rule's patterns see is reference.Source
	Created    time.Time // when it came into the store
	Pulled     time.Time // when it was last asked for again, by a pull or a new name; zero: never
	// LastUsed is when it was last known to be in use; zero where it never was.
	LastUsed time.Time
	InUse    []string // who uses it now, for a person; empty: nobody
	Pinned   string   // why it is pinned, for a person; empty: it is not
	Damaged  string   // why its manifest cannot be read; empty: it can
	Layers   []int32  // its distinct blobs (files, config, manifest), as indices into Input.Blobs
}

// Blob is one blob of the store, as far as a plan needs it.
type Blob struct {
	Size int64 // bytes
	// Held: it stays whatever is removed, because something else than a version
	// needs it (a pull under way, an entry of another tool).
	Held bool
}

// Input is everything that a plan is made from.
type Input struct {
	Versions []Version // each digest once, in any order
	Blobs    []Blob
	Free     int64     // bytes free on the store's file system
	Capacity int64     // bytes of that file system
	Trash    int64     // bytes in the trash, which can be had at once
	Now      time.Time // by which ages are counted
	Wall     time.Time // by which windows open; zero: Now

	// Models are patterns of models that the plan is restricted to, as those of
	// a rule; none: all models. A version of several models goes only where all
	// of them fit.
	Models []string
	// AnyTime: a person asks, and does not wait for a window.
	AnyTime bool
}

// Reason is why a version stays or goes: a word for metrics and programs.
type Reason string

// The reasons to stay, the strongest first, and those to go.
const (
	InUse     Reason = "in_use"
	Pinned    Reason = "pinned"
	Damaged   Reason = "damaged"   // what it needs is not known
	Protected Reason = "protected" // by a rule
	NoRule    Reason = "no_rule"   // no rule's pattern fits
	Young     Reason = "young"     // came or was used less than minAge ago
	Newest    Reason = "newest"    // one of the newest N
	Recent    Reason = "recent"    // used within unusedFor
	Wanted    Reason = "wanted"    // nothing in its rule says that it goes
	Rollback  Reason = "rollback"  // it would go, but is needed to roll back
	NotAsked  Reason = "not_asked" // it would go, but the plan is restricted to other models
	LaterOn   Reason = "later_on"  // it goes, but not outside the window

	Abandoned  Reason = "abandoned"  // no version of its model was used for abandonedFor
	Superseded Reason = "superseded" // a newer patch of the same minor version is there
	Surplus    Reason = "surplus"    // beyond the newest N, and nothing else keeps it
	Unused     Reason = "unused"     // not used for unusedFor
	Pressure   Reason = "pressure"   // free space is below its limit
)

// Decision is what a plan says of one version.
type Decision struct {
	Digest     digest.Digest
	Model      string // the model it counts for: "hf://org/name", "qwen"; its first where it has several
	References []string
	Remove     bool
	Reason     Reason
	// Why is the reason in words, with its numbers: "not used for 41 days, the
	// limit is 30 days; not among the newest 3".
	Why      string
	Rule     string    // of the policy: "rules[1] (ci-*)", "pressure", or empty
	LastUsed time.Time // as the plan saw it
	Pulled   time.Time // likewise
	// Frees is how many bytes go with it, after those that the plan removes
	// before it. Zero for what stays.
	Frees int64
}

// Plan is what is to be done, in the order in which it is done: what goes
// first, then what stays.
type Plan struct {
	Time      time.Time
	Decisions []Decision
	Frees     int64           // bytes, of all that goes
	Pressure  *PressureReport // nil where free space is above its limit
	Beyond    string          // see Policy.Beyond: then pressure takes nothing
}

// PressureReport tells how far a plan gets where space is short.
type PressureReport struct {
	Free   int64 // bytes now
	Trash  int64 // bytes in the trash, to be emptied before anything else
	Limit  int64 // below which it is short
	Target int64 // up to which is removed
	After  int64 // bytes free once the plan is carried out and the trash is empty
	// Short: the target cannot be reached; what is left is in use, pinned,
	// protected, young, needed to roll back, or frees next to nothing.
	Short bool
}
