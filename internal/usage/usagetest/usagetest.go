// Package usagetest checks an implementation of usage.Source against the
// contract. Every source runs it, on a real store with real volumes and mounts.
package usagetest

import (
	"cmp"
	"context"
	"errors"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	gocmp "github.com/google/go-cmp/cmp"
	"github.com/moby/sys/mountinfo"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"

	"github.com/larder-project/larder/internal/modelpack"
	"github.com/larder-project/larder/internal/reference"
	"github.com/larder-project/larder/internal/store"
	"github.com/larder-project/larder/internal/testenv"
	"github.com/larder-project/larder/internal/usage"
	"github.com/larder-project/larder/internal/volume"
)

// Node is a node of a test's own: a store that has the versions used:1 and
// unused:1, and volumes.
type Node struct {
	Store   *store.Store
	Volumes *volume.Manager
	Root    string // folder of both
	Used    digest.Digest
	Unused  digest.Digest
}

// NewNode makes a node. It needs root, and TestMain must be that of
// testenv.PrivateMounts.
func NewNode(t *testing.T) *Node {
	t.Helper()
	testenv.NeedRoot(t)
	n := &Node{Root: t.TempDir()}
	var err error
	if n.Store, err = store.Open(filepath.Join(n.Root, "store")); err != nil {
		t.Fatal(err)
	}
	// A machine of tests may be a container itself.
	if n.Volumes, err = volume.Open(t.Context(), volume.Config{Store: n.Store, State: filepath.Join(n.Root, "node"), Node: "test", OwnPIDNamespace: true}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { n.unmount(t) })
	n.Used, n.Unused = n.Publish(t, "used:1"), n.Publish(t, "unused:1")
	return n
}

// Publish brings in a model of one file that no other has.
func (n *Node) Publish(t *testing.T, name string) digest.Digest {
	t.Helper()
	lease, err := n.Store.NewLease(t.Context(), "test", "test")
	if err != nil {
		t.Fatal(err)
	}
	defer lease.Release()
	d, err := n.Store.PutBlob(t.Context(), lease, []byte(name))
	if err != nil {
		t.Fatal(err)
	}
	ref, err := reference.Parse(name)
	if err != nil {
		t.Fatal(err)
	}
	files := []modelpack.File{{Path: "weights", Digest: d, Size: int64(len(name))}}
	v, err := n.Store.Publish(t.Context(), lease, modelpack.Model{Files: files}, []reference.Reference{ref})
	if err != nil {
		t.Fatal(err)
	}
	return v.Digest
}

// Create makes a volume of the version used:1.
func (n *Node) Create(t *testing.T, name string) {
	t.Helper()
	if err := n.Volumes.Create(t.Context(), name, map[string]string{"model": "used:1"}); err != nil {
		t.Fatal(err)
	}
}

// MountAt shows the version used:1 at a folder.
func (n *Node) MountAt(t *testing.T, dir string) {
	t.Helper()
	if err := n.Volumes.MountAt(t.Context(), "", map[string]string{"model": "used:1", "access": "ro"}, dir); err != nil {
		t.Fatal(err)
	}
}

// UnmountAt ends what MountAt began.
func (n *Node) UnmountAt(t *testing.T, dir string) {
	t.Helper()
	if err := n.Volumes.UnmountAt(t.Context(), dir); err != nil {
		t.Error(err)
	}
}

func (n *Node) unmount(t *testing.T) {
	mounts, err := mountinfo.GetMounts(mountinfo.PrefixFilter(n.Root))
	if err != nil {
		t.Error(err)
	}
	for _, m := range slices.Backward(mounts) {
		if err := unix.Unmount(m.Mountpoint, unix.MNT_DETACH); err != nil {
			t.Errorf("unmount %s: %v", m.Mountpoint, err)
		}
	}
}

// Subject is a source on a node, and what brings about what it should find.
type Subject struct {
	Source usage.Source
	// Use makes used:1 be used in the way that the source knows, and returns
	// what ends that.
	Use func(t *testing.T) (end func())
	// Faults make the source unable to tell what is in use, each in one way,
	// and return what mends it.
	Faults map[string]func(t *testing.T) (mend func())
}

// patience is how long a source may take to answer, or to say that it cannot.
const patience = 5 * time.Second

// Run checks everything that holds for all sources.
func Run(t *testing.T, open func(t *testing.T, n *Node) Subject) {
	subject := func(t *testing.T) (*Node, Subject) {
		n := NewNode(t)
		return n, open(t, n)
	}
	t.Run("its name is a word for metrics", func(t *testing.T) {
		_, s := subject(t)
		if name := s.Source.Name(); !regexp.MustCompile(`^[a-z][a-z0-9_]{1,31}$`).MatchString(name) {
			t.Errorf("the name is %q", name)
		}
	})
	t.Run("it finds a use while there is one", func(t *testing.T) {
		n, s := subject(t)
		none(t, s.Source)
		end := s.Use(t)
		for _, u := range found(t, n, s.Source) {
			if u.By == "" || strings.ContainsAny(u.By, "\n\t") {
				t.Errorf("who uses it is %q, want a few words", u.By)
			}
			if u.Source != s.Source.Name() {
				t.Errorf("the use says it is of %q, want %q", u.Source, s.Source.Name())
			}
		}
		end()
		none(t, s.Source)
	})
	t.Run("it says the same when asked again, and side by side", func(t *testing.T) {
		n, s := subject(t)
		defer s.Use(t)()
		want := found(t, n, s.Source)
		var wait sync.WaitGroup
		for range 8 {
			wait.Go(func() {
				uses, failed := usage.Gather(t.Context(), []usage.Source{s.Source})
				if len(failed) > 0 {
					t.Error(failed[0])
				}
				if diff := gocmp.Diff(want, sorted(uses)); diff != "" {
					t.Errorf("uses (-first +later):\n%s", diff)
				}
			})
		}
		wait.Wait()
	})
	t.Run("it answers under the store's exclusive lock", func(t *testing.T) {
		n, s := subject(t)
		defer s.Use(t)()
		err := n.Store.Exclusive(t.Context(), func(*store.Exclusive) error {
			found(t, n, s.Source)
			return nil
		})
		if err != nil {
			t.Error(err)
		}
	})
	t.Run("a context that has ended gives no half of an answer", func(t *testing.T) {
		n, s := subject(t)
		defer s.Use(t)()
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		uses, err := ask(t, ctx, s.Source)
		if err == nil && !slices.ContainsFunc(uses, func(u usage.Use) bool { return u.Version == n.Used }) {
			t.Error("no error, and the use is not found")
		}
	})
	_, s := subject(t)
	if len(s.Faults) == 0 {
		t.Error("the suite knows no way to make it fail")
	}
	for fault := range s.Faults {
		t.Run("it does not know: "+fault, func(t *testing.T) {
			n, s := subject(t)
			defer s.Use(t)()
			mend := s.Faults[fault](t)
			ctx, cancel := context.WithTimeout(t.Context(), patience/4)
			defer cancel()
			uses, err := ask(t, ctx, s.Source)
			if err == nil {
				t.Errorf("no error, and uses %v", uses)
			}
			if errors.Is(err, usage.ErrAbsent) && !strings.Contains(fault, "absent") {
				t.Errorf("it takes what fails for what is not there: %v", err)
			}
			mend()
			found(t, n, s.Source)
		})
	}
}

// ask asks the source itself; it must answer in time whatever happens.
func ask(t *testing.T, ctx context.Context, s usage.Source) ([]usage.Use, error) {
	t.Helper()
	type answer struct {
		uses []usage.Use
		err  error
	}
	got := make(chan answer, 1)
	go func() {
		uses, err := s.Uses(ctx)
		got <- answer{uses, err}
	}()
	select {
	case a := <-got:
		return a.uses, a.err
	case <-time.After(patience):
		t.Fatalf("%s gives no answer for %s, whatever its context says", s.Name(), patience)
		return nil, nil
	}
}

func gather(t *testing.T, s usage.Source) []usage.Use {
	t.Helper()
	uses, failed := usage.Gather(t.Context(), []usage.Source{s})
	if len(failed) > 0 {
		t.Fatal(failed[0])
	}
	return sorted(uses)
}

func none(t *testing.T, s usage.Source) {
	t.Helper()
	if uses := gather(t, s); len(uses) > 0 {
		t.Errorf("nothing is used, and it finds %+v", uses)
	}
}

// found gives the uses; there must be some, all of used:1.
func found(t *testing.T, n *Node, s usage.Source) []usage.Use {
	t.Helper()
	uses := gather(t, s)
	if len(uses) == 0 {
		t.Fatalf("%s does not find the use", s.Name())
	}
	for _, u := range uses {
		if u.Version != n.Used {
			t.Errorf("it finds %+v, which nobody uses", u)
		}
	}
	return uses
}

func sorted(uses []usage.Use) []usage.Use {
	slices.SortFunc(uses, func(a, b usage.Use) int {
		return cmp.Or(cmp.Compare(a.Version, b.Version), cmp.Compare(a.By, b.By), cmp.Compare(a.PID, b.PID), cmp.Compare(a.Container.ID, b.Container.ID))
	})
	return uses
}

// Write puts a file in place of another, and returns what puts the old one
// back.
func Write(t *testing.T, path, content string) (restore func()) {
	t.Helper()
	old, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	put := func(content []byte) {
		if err := os.WriteFile(path, content, 0o600); err != nil {
			t.Error(err)
		}
	}
	put([]byte(content))
	return func() { put(old) }
}
