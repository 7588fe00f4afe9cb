package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"strings"

	"github.com/larder-project/larder/internal/config"
	"github.com/larder-project/larder/internal/gc"
	"github.com/larder-project/larder/internal/modelpack"
	"github.com/larder-project/larder/internal/reference"
	"github.com/larder-project/larder/internal/retention"
	"github.com/larder-project/larder/internal/source"
	"github.com/larder-project/larder/internal/store"
	"github.com/larder-project/larder/internal/view"
	"github.com/larder-project/larder/internal/volume"
)

// Exit codes. They are part of the interface: docs/cli.md lists them.
const (
	exitDone     = 0
	exitFailed   = 1
	exitUsage    = 2
	exitNotFound = 3
	exitInUse    = 4
	exitDamaged  = 5
)

// usageError is a command that was written wrongly.
type usageError struct {
	err  error
	hint string
}

func (e *usageError) Error() string { return e.err.Error() }
func (e *usageError) Unwrap() error { return e.err }

// hintError adds advice to a failure.
type hintError struct {
	err  error
	hint string
}

func (e *hintError) Error() string { return e.err.Error() }
func (e *hintError) Unwrap() error { return e.err }

// code is the word for an exit code in JSON.
func code(exit int) string {
	return [...]string{"done", "failed", "usage", "not_found", "in_use", "damaged"}[exit]
}

// is tells whether err wraps one of these.
func is(err error, targets ...error) bool {
	for _, t := range targets {
		if errors.Is(err, t) {
			return true
		}
	}
	return false
}

// classify maps an error to an exit code. It is the one place that does. Damage
// comes before "not found", because a blob that is missing from a version is
// both.
func classify(err error) int {
	var usage *usageError
	switch {
	case err == nil:
		return exitDone
	case errors.As(err, &usage), is(err, config.ErrInvalid, retention.ErrInvalid, gc.ErrAmbiguous, store.ErrNotStore):
		return exitUsage
	case is(err, store.ErrDamaged, volume.ErrDamaged, modelpack.ErrInvalid):
		return exitDamaged
	case is(err, store.ErrInUse, volume.ErrInUse):
		return exitInUse
	case is(err, store.ErrNotFound, source.ErrNotFound, volume.ErrNotFound, volume.ErrNotMounted, fs.ErrNotExist):
		return exitNotFound
	case is(err, reference.ErrInvalid, volume.ErrInvalid, view.ErrInvalid):
		return exitUsage
	}
	return exitFailed
}

// hintOf finds the advice that an error carries, or what is advised for its
// kind.
func hintOf(err error) string {
	var usage *usageError
	var hinted *hintError
	var src *source.Error
	var other interface{ Hint() string }
	switch {
	case errors.As(err, &usage):
		return usage.hint
	case errors.As(err, &hinted):
		return hinted.hint
	case errors.As(err, &src) && src.Hint != "":
		return src.Hint
	case errors.As(err, &other) && other.Hint() != "":
		return other.Hint()
	case is(err, fs.ErrPermission) && os.Geteuid() != 0:
		return "run it as root, or name a folder of your own with --root"
	case is(err, store.ErrFull):
		return "larder df shows what takes the space; larder rm frees some"
	case is(err, store.ErrDamaged, modelpack.ErrInvalid):
		return "larder verify names what is damaged and how to repair it"
	case is(err, volume.ErrNotFound):
		return "larder volume ls lists the volumes"
	}
	return ""
}

// failure is an error as --json prints it.
type failure struct {
	Error string `json:"error"`
	Hint  string `json:"hint,omitempty"`
	Code  string `json:"code"` // usage, failed, not_found, in_use, damaged
	Exit  int    `json:"exit"`
}

// report tells about an error and returns the exit code.
func report(w io.Writer, verb string, err error, asJSON bool) int {
	exit := classify(err)
	if errors.Is(err, errReported) {
		return exit
	}
	f := failure{Error: err.Error(), Hint: hintOf(err), Code: code(exit), Exit: exit}
	// A source's error says its hint at the end of its line; here it has a
	// line of its own.
	if f.Hint != "" {
		f.Error = strings.Replace(f.Error, " ("+f.Hint+")", "", 1)
	}
	if asJSON {
		_ = printJSON(w, f) // nobody is left to tell
		return exit
	}
	name := "larder"
	if verb != "" {
		name += ": " + verb
	}
	lines := strings.Split(f.Error, "\n")
	for i := range lines {
		lines[i] = printable(lines[i])
	}
	fmt.Fprintf(w, "%s: %s\n", name, strings.Join(lines, "\n  "))
	if f.Hint != "" {
		fmt.Fprintf(w, "  %s\n", printable(f.Hint))
	}
	return exit
}

// errReported marks a failure whose parts are printed already; only the exit
// code is left to give.
var errReported = errors.New("see above")

// reported marks err as told to the user.
func reported(err error) error { return errors.Join(errReported, err) }

// interrupted says what a signal leaves behind.
func interrupted(err error) error {
	if !errors.Is(err, context.Canceled) {
		return err
	}
	return &hintError{err: errors.New("interrupted"), hint: "the same command goes on where this one stopped"}
}
