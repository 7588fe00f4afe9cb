// Package source is the contract between whoever fetches models and the places
// they come from: a hub, a folder, a registry.
//
// A source first gives a Snapshot: the list of files of one fixed revision,
// with what is known about their content beforehand. Then it gives bytes of
// those files, in ranges, from several goroutines at once. It verifies nothing
// and stores nothing: whoever reads checks sizes and digests.
//
// Paths in a snapshot are safe (modelpack.CheckPath holds for each) and differ
// from each other; no path is a folder of another. The suite in sourcetest
// checks this and the rest of the contract against every implementation.
package source

import (
	"context"
	"errors"
	"io"
	"os"

	"github.com/larder-project/larder/internal/reference"
	"github.com/opencontainers/go-digest"
)

// File is one file of a snapshot.
type File struct {
	Path   string        // slash-separated, relative, checked by modelpack.CheckPath
	Size   int64         // bytes
	SHA256 digest.Digest // of the content; empty where only the git id is known
	GitOID string        // git blob id of the content (SHA-1, 40 hex digits), or empty
}

// Snapshot is one fixed revision of a source.
type Snapshot struct {
	Source     string                // for instance hf://org/name; empty when unknown
	Revision   string                // commit, 40 hex digits; empty when unknown
	Partial    bool                  // files of the source are left out by choice
	Files      []File                // sorted by Path
	References []reference.Reference // what to publish it as
}

// Source is a place that a model comes from. Its methods may be called from
// several goroutines.
type Source interface {
	// Snapshot resolves the source to one revision and lists its files. It
	// asks for the content of none. Later calls give the same snapshot.
	Snapshot(ctx context.Context) (Snapshot, error)

	// Open reads length bytes of f from offset on, as they are at the
	// snapshot's revision. The reader gives exactly length bytes, or an error
	// that is not io.EOF. A range that is not within the file is an error.
	// Once ctx is done, reads fail. ErrChanged is wrapped where the file is
	// seen to be another one than the snapshot promised.
	Open(ctx context.Context, f File, offset, length int64) (io.ReadCloser, error)
}

// Local is implemented by sources whose files lie on this machine, so that
// they can be cloned, linked or moved instead of copied.
type Local interface {
	// OpenFile opens the file for reading. ErrChanged is wrapped where it is
	// no longer the file of the snapshot.
	OpenFile(f File) (*os.File, error)
}

// What can go wrong at a source, for errors.Is. Everything else (a full disk,
// a cancelled context) comes as it is.
var (
	ErrUnauthorized = errors.New("not authorized")
	ErrGated        = errors.New("access to this model must be granted first")
	ErrNotFound     = errors.New("not found")
	ErrRateLimited  = errors.New("too many requests")
	ErrChanged      = errors.New("the file is not the one that was listed")
	ErrUnavailable  = errors.New("not reachable")
	ErrInvalid      = errors.New("invalid answer") // hostile or broken: retrying does not help
)

// Error is a failure with advice. It wraps one of the sentinels where one fits.
type Error struct {
	Op   string // what was tried: "list files"
	What string // of what: "hf://org/name@main", with the path where one file is meant
	Hint string // what a person can do about it; may be empty
	Err  error
}

// Error is one line, with the hint last.
func (e *Error) Error() string {
	s := e.Op + " " + e.What + ": " + e.Err.Error()
	if e.Hint != "" {
		s += " (" + e.Hint + ")"
	}
	return s
}

// Unwrap gives the cause to errors.Is and errors.As.
func (e *Error) Unwrap() error { return e.Err }
