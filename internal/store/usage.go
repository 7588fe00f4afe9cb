package store

import (
	"fmt"
	"io/fs"
	"path/filepath"

	"github.com/larder-project/larder/internal/disk"
)

// Usage is what the store's folders hold, in bytes on the disk.
type Usage struct {
	Blobs    int64 // blobs/
	Ingest   int64 // downloads under way or cut short
	Trash    int64 // removed, can be undone or is being deleted
	Files    int64 // number of blobs
	Free     int64 // free on the file system, for an ordinary user
	Capacity int64 // of the file system
}

// Usage adds up what the store holds.
func (s *Store) Usage() (Usage, error) {
	u, err := s.UsageBesideBlobs()
	if err != nil {
		return u, err
	}
	err = s.Blobs(func(_ Hash, stat func() (BlobStat, bool, error)) error {
		st, there, err := stat()
		if there {
			u.Blobs += st.Allocated
			u.Files++
		}
		return err
	})
	if err != nil {
		return u, fmt.Errorf("measure store: %w", err)
	}
	return u, nil
}

// UsageBesideBlobs is Usage without what blobs take, for whoever has listed
// them anyway.
func (s *Store) UsageBesideBlobs() (Usage, error) {
	var u Usage
	for _, part := range []struct {
		name  string
		bytes *int64
	}{{"ingest", &u.Ingest}, {trashName, &u.Trash}} {
		err := filepath.WalkDir(s.path(part.name), func(_ string, e fs.DirEntry, err error) error {
			if err != nil || e.IsDir() {
				return ignoreAbsent(err)
			}
			fi, err := e.Info()
			if err != nil {
				return ignoreAbsent(err)
			}
			*part.bytes += disk.Allocated(fi)
			return nil
		})
		if err != nil {
			return u, fmt.Errorf("measure store: %w", err)
		}
	}
	free, capacity, err := disk.Free(s.dir)
	if err != nil {
		return u, fmt.Errorf("measure store: %w", err)
	}
	u.Free, u.Capacity = free, capacity
	return u, nil
}
