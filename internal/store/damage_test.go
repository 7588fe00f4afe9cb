package store

import (
	"errors"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/larder-project/larder/internal/modelpack"
)

// What a power cut, a full disk or a careless hand leaves of a state file.
var damages = map[string]func(data []byte) []byte{
	"emptied":   func([]byte) []byte { return nil },
	"cut short": func(data []byte) []byte { return data[:len(data)/2] },
	"garbage":   func(data []byte) []byte { return append([]byte("\x00\xff"), data...) },
}

// Each state file of the store is damaged in each way. What relies on it fails
// loudly, with the file's name, and nothing is taken for empty: whatever was
// published is there when the file is put right.
func TestDamagedStateFilesAreLoud(t *testing.T) {
	t.Parallel()
	for file, test := range map[string]struct {
		make func(t *testing.T, s *Store)
		use  func(s *Store) error
	}{
		"index.json": {
			use: func(s *Store) error { _, err := s.Versions(); return err },
		},
		"oci-layout": {
			use: func(s *Store) error { _, err := Open(s.Dir()); return err },
		},
		"leases/other/owner": {
			make: func(t *testing.T, s *Store) {
				if err := s.Claim("other", "0123456789abcdef"); err != nil {
					t.Fatal(err)
				}
			},
			use: func(s *Store) error { return s.Claim("other", "0123456789abcdef") },
		},
		"trash/20260101T000000Z-0/removal.json": {
			make: func(t *testing.T, s *Store) { makeRemoval(t, s, removalName) },
			use:  func(s *Store) error { _, err := s.Trash(); return err },
		},
		"trash/20260101T000000Z-0/pending.json": {
			make: func(t *testing.T, s *Store) { makeRemoval(t, s, pendingName) },
			use:  func(s *Store) error { _, err := s.Pending(); return err },
		},
	} {
		for how, damage := range damages {
			s := open(t)
			v := publish(t, s, modelpack.Model{}, map[string]string{"a": "content"}, "m:1")
			if test.make != nil {
				test.make(t, s)
			}
			path := filepath.Join(s.Dir(), file)
			data, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			if err := test.use(s); err != nil {
				t.Fatalf("%s, whole: %v", file, err)
			}
			time.Sleep(time.Millisecond) // the list of references is known by its time
			if err := os.WriteFile(path, damage(data), 0o644); err != nil {
				t.Fatal(err)
			}
			if err := test.use(s); err == nil {
				t.Errorf("%s, %s: nothing was noticed", file, how)
			}
			if err := os.WriteFile(path, data, 0o644); err != nil {
				t.Fatal(err)
			}
			fresh, err := Open(s.Dir())
			if err != nil {
				t.Errorf("%s, %s and put right: %v", file, how, err)
				continue
			}
			if got, err := fresh.Versions(); err != nil || len(got) != 1 || got[0].Digest != v.Digest {
				t.Errorf("%s, %s and put right: %v, %v", file, how, got, err)
			}
		}
	}
}

func makeRemoval(t *testing.T, s *Store, record string) {
	t.Helper()
	r := Removal{ID: "20260101T000000Z-0", Time: time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC), Reason: "test", Blobs: []Blob{{Digest: digest.FromString("x"), Size: 1}}}
	if err := os.Mkdir(s.trashDir(r.ID), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := s.writeRemoval(r, record); err != nil {
		t.Fatal(err)
	}
}

// A stray file in the trash stops nobody.
func TestStrayFilesInTheTrashAreLeftAlone(t *testing.T) {
	t.Parallel()
	s := open(t)
	stray := filepath.Join(s.Dir(), "trash", "notes.txt")
	if err := os.WriteFile(stray, []byte("x"), 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Trash(); err != nil {
		t.Error(err)
	}
	err := s.Exclusive(t.Context(), func(x *Exclusive) error { _, err := x.Condemn(func(Removal) bool { return true }); return err })
	if err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(stray); err != nil {
		t.Errorf("the stray file: %v", err)
	}
}

func TestOneStateSpeaksForANode(t *testing.T) {
	t.Parallel()
	s := open(t)
	if err := s.Claim("n", ""); !errors.Is(err, ErrDamaged) {
		t.Errorf("an empty id: %v", err)
	}
	// Of those that begin at the same time, one wins.
	const many = 8
	results := make(chan error, many)
	for i := range many {
		go func() { results <- s.Claim("n", string(rune('a'+i))) }()
	}
	won := 0
	for range many {
		if err := <-results; err == nil {
			won++
		} else if !errors.Is(err, ErrInUse) {
			t.Error(err)
		}
	}
	if won != 1 {
		t.Errorf("%d of %d states speak for one node", won, many)
	}
}

func TestNodeIsForgottenOnlyWhenItIsGone(t *testing.T) {
	t.Parallel()
	s := open(t)
	v := publish(t, s, modelpack.Model{}, map[string]string{"a": "1"}, "m:1")
	if err := s.Claim("gone", "id"); err != nil {
		t.Fatal(err)
	}
	if err := s.Shared(t.Context(), func() error { return s.Use("gone", v.Digest) }); err != nil {
		t.Fatal(err)
	}
	leave, err := s.Attend(t.Context(), "gone")
	if err != nil {
		t.Fatal(err)
	}
	nodes, err := s.Nodes()
	if err != nil || len(nodes) == 0 || !nodes[len(nodes)-1].Alive && !nodes[0].Alive {
		t.Errorf("nodes %+v, %v", nodes, err)
	}
	if err := s.ForgetNode(t.Context(), "gone"); !errors.Is(err, ErrInUse) {
		t.Errorf("a node that works: %v", err)
	}
	leave()
	lease, err := s.NewLease(t.Context(), "gone", "pull")
	if err != nil {
		t.Fatal(err)
	}
	if err := lease.Hold(t.Context(), v.Digest); err != nil {
		t.Fatal(err)
	}
	if err := s.ForgetNode(t.Context(), "gone"); !errors.Is(err, ErrInUse) {
		t.Errorf("a node that pulls: %v", err)
	}
	if err := lease.Release(); err != nil {
		t.Fatal(err)
	}
	if err := s.ForgetNode(t.Context(), "gone"); err != nil {
		t.Fatal(err)
	}
	users, err := s.Users()
	if err != nil || len(users[v.Digest]) != 0 {
		t.Errorf("it still uses %v, %v", users, err)
	}
	if err := s.ForgetNode(t.Context(), "gone"); !errors.Is(err, ErrNotFound) {
		t.Errorf("a second time: %v", err)
	}
}

// A clock that was set back takes no use back.
func TestUseIsNotedByTheLatestTime(t *testing.T) {
	t.Parallel()
	now := time.Date(2026, 6, 1, 0, 0, 0, 0, time.UTC)
	s, err := Open(t.TempDir()+"/s", WithClock(func() time.Time { return now }))
	if err != nil {
		t.Fatal(err)
	}
	v := publish(t, s, modelpack.Model{}, map[string]string{"a": "1"}, "m:1")
	if used, _, err := s.LastSeen(); err != nil || len(used) != 0 {
		t.Errorf("before any use: %v, %v", used, err)
	}
	s.TouchUsage("n", v.Digest)
	first := now
	now = now.Add(-24 * time.Hour)
	s.TouchUsage("n", v.Digest)
	if used, _, err := s.LastSeen(); err != nil || !used[v.Digest].Equal(first) {
		t.Errorf("after the clock was set back: %v, %v", used, err)
	}
	now = first.Add(time.Hour)
	s.TouchUsage("n", v.Digest)
	if used, _, err := s.LastSeen(); err != nil || !used[v.Digest].Equal(now) {
		t.Errorf("later: %v, %v", used, err)
	}
}
