package store

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/larder-project/larder/internal/atomicfile"
	"github.com/larder-project/larder/internal/disk"
)

// Pin keeps a version from every policy and from larder rm, on all nodes that
// share the store, until it is taken away.
type Pin struct {
	Time time.Time `json:"time"`
	Node string    `json:"node"` // where it was set
	Why  string    `json:"why,omitempty"`
}

// Text is the pin in words.
func (p Pin) Text() string {
	text := "pinned on " + p.Time.UTC().Format(time.DateOnly)
	if p.Node != "" {
		text += " on node " + p.Node
	}
	if p.Why != "" {
		text += ": " + p.Why
	}
	return text
}

// Pins lie in DIR/pins/HEX, one file a version.
const pinsName = "pins"

func (s *Store) pinPath(version digest.Digest) string { return s.path(pinsName, version.Encoded()) }

// Pin sets a pin on a version that is in the store. A pin that is there is
// replaced.
func (s *Store) Pin(ctx context.Context, version digest.Digest, p Pin) error {
	return s.Shared(ctx, func() error {
		versions, err := s.Versions()
		if err != nil {
			return err
		}
		for _, v := range versions {
			if v.Digest == version {
				return s.setPin(version, p)
			}
		}
		return fmt.Errorf("pin %s: %w", version, ErrNotFound)
	})
}

func (s *Store) setPin(version digest.Digest, p Pin) error {
	data, err := json.Marshal(p)
	if err != nil {
		return fmt.Errorf("pin %s: %w", version, err)
	}
	if err := disk.MkdirAll(s.path(pinsName), 0o755); err != nil {
		return fmt.Errorf("pin %s: %w", version, err)
	}
	if err := atomicfile.Write(s.pinPath(version), append(data, '\n'), 0o644); err != nil {
		return fmt.Errorf("pin %s: %w", version, full(err))
	}
	return disk.SyncDir(s.dir)
}

// Unpin takes a pin away. It tells whether there was one.
func (s *Store) Unpin(ctx context.Context, version digest.Digest) (was bool, err error) {
	err = s.Shared(ctx, func() error {
		err := disk.Remove(s.pinPath(version))
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		was = err == nil
		if err == nil {
			err = disk.SyncDir(s.path(pinsName))
		}
		if err != nil {
			return fmt.Errorf("unpin %s: %w", version, err)
		}
		return nil
	})
	return was, err
}

// Pins lists all pins by version. A pin whose record cannot be read is one, and
// says so; a folder that cannot be read is an error: then nothing may be
// removed.
func (s *Store) Pins() (map[digest.Digest]Pin, error) {
	out := map[digest.Digest]Pin{}
	entries, err := os.ReadDir(s.path(pinsName))
	if errors.Is(err, fs.ErrNotExist) {
		return out, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read pins: %w", err)
	}
	for _, e := range entries {
		if !isBlobName(e.Name()) {
			continue
		}
		d := digest.NewDigestFromEncoded(digest.SHA256, e.Name())
		data, err := os.ReadFile(s.pinPath(d))
		if errors.Is(err, fs.ErrNotExist) {
			continue // taken away just now
		}
		var p Pin
		if err != nil || json.Unmarshal(data, &p) != nil {
			p = Pin{Why: "its record cannot be read"}
		}
		out[d] = p
	}
	return out, nil
}
