// Package usage is the contract between those who remove versions of models and
// those who know which versions are in use.
//
// A Source tells the uses of one kind: what a Docker engine's containers show,
// those of containerd, what the kernel's mount tables show, records of volumes
// and mounts, processes on GPUs. Each source has a package of its own below
// this one, or is the package that has the records (package volume). All of
// them pass the suite in usagetest.
//
// The rule for removing is the union of all sources: one that finds a use keeps
// the version, and one that cannot tell keeps everything.
package usage

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/opencontainers/go-digest"
)

// Use is one reason why a version must stay.
type Use struct {
	Version digest.Digest // of the manifest
	Source  string        // name of the source that found it; Gather sets it
	// By says who uses it, for a person: "volume qwen", "container eager_lamport".
	By string
	// Reference is the reference that the user goes by, or empty: it must not
	// go even where the version keeps others.
	Reference string
	// Container is the container that uses the version; zero where the user is
	// none, or it is not known which.
	Container Container
	PID       int    // a process that shows the version; 0 where none is known
	GPU       string // the GPU it runs on: "0 (NVIDIA H100)"; empty if none
}

// Container is a container as its engine calls it.
type Container struct {
	Engine    string // "docker", "containerd"; empty where no engine was asked
	Namespace string // of containerd: "moby", "k8s.io", "default"
	ID        string
	Name      string // empty when no engine knows it
	Image     string
	State     string // as the engine says: running, paused, exited, created
}

// Label is how a person knows the container.
func (c Container) Label() string {
	id := c.ID
	if len(id) == 64 { // an engine made it up; a shorter one is a name
		id = id[:12]
	}
	name := c.Name
	if name == "" {
		name = id
	}
	if c.Namespace != "" && c.Namespace != "moby" && c.Namespace != "default" {
		name = c.Namespace + "/" + name
	}
	return name
}

// Source knows the uses of one kind.
type Source interface {
	// Name is a word that metrics, logs and messages call the source by.
	Name() string
	// Uses lists all uses of this kind at this moment. An error means that
	// they are not known, and then nothing may be removed. It does not take the
	// store's lock, so that it can be asked by who holds it.
	Uses(ctx context.Context) ([]Use, error)
}

// ErrAbsent is wrapped by a source's error where there is nothing to ask: no
// socket, no driver, no folder. Package sources tells whether that is no use at
// all or a reason to remove nothing.
var ErrAbsent = errors.New("nothing there")

// Places tells which versions a volume or a folder of this node shows. Sources
// that know containers by what they mount are made with a function that gives
// the places of this moment. They call it after they have listed the
// containers: what those mount was recorded before.
type Places interface {
	// OfVolume gives the versions of a volume and of its mounts, by the name
	// that an engine calls it; ok is false where there is no such volume.
	OfVolume(name string) (versions []digest.Digest, ok bool, err error)
	// AtPath gives the versions of the mount that a path of the host is in; ok
	// is false where that is no mount of ours.
	AtPath(path string) (versions []digest.Digest, ok bool, err error)
}

// Error says which source could not tell its uses.
type Error struct {
	Source string
	Err    error
}

// Error implements error.
func (e *Error) Error() string {
	return fmt.Sprintf("find out what is in use: %s: %v", e.Source, e.Err)
}

func (e *Error) Unwrap() error { return e.Err }

// Gather asks all sources, side by side. It returns the uses that were found
// and an *Error for each source that failed, in the order of the sources.
func Gather(ctx context.Context, sources []Source) ([]Use, []*Error) {
	type answer struct {
		uses []Use
		err  error
	}
	answers := make([]chan answer, len(sources))
	for i, s := range sources {
		answers[i] = make(chan answer, 1)
		go func() {
			uses, err := s.Uses(ctx)
			answers[i] <- answer{uses, err}
		}()
	}
	var all []Use
	var failed []*Error
	for i, s := range sources {
		var a answer
		select {
		case a = <-answers[i]:
		case <-ctx.Done():
			select {
			case a = <-answers[i]: // it came in time, before another that did not
			default:
				a.err = fmt.Errorf("no answer: %w", ctx.Err())
			}
		}
		if a.err != nil {
			failed = append(failed, &Error{Source: s.Name(), Err: a.err})
		}
		for _, u := range a.uses {
			u.Source = s.Name()
			all = append(all, u)
		}
	}
	return all, failed
}

// Names lists the sources' names for a message.
func Names(sources []Source) string {
	names := make([]string, len(sources))
	for i, s := range sources {
		names[i] = s.Name()
	}
	return strings.Join(names, ", ")
}
