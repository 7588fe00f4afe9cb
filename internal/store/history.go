package store

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"time"

	"github.com/larder-project/larder/internal/disk"
)

// What an Event tells.
const (
	Removed  = "removed"  // moved to the trash
	Restored = "restored" // brought back from it
	Deleted  = "deleted"  // for good
)

// Event is one line of what became of versions: the history of a store. It
// outlives the trash.
type Event struct {
	Event    string           `json:"event"`
	Time     time.Time        `json:"time"`
	Removal  string           `json:"removal"` // its ID
	Node     string           `json:"node,omitempty"`
	By       string           `json:"by,omitempty"`
	Reason   string           `json:"reason,omitempty"`
	Versions []RemovedVersion `json:"versions,omitempty"`
	Bytes    int64            `json:"bytes"`
	Blobs    int              `json:"blobs,omitempty"`
}

const (
	historyName    = "history.jsonl"
	oldHistoryName = "history.1.jsonl"
	// maxHistoryBytes is when a new file is begun; one old one is kept.
	maxHistoryBytes = 16 << 20
)

// note adds an event to the history. The caller holds the store's lock
// exclusively. A history that cannot be written stops nothing: until the trash
// is emptied, the removal's own record says the same.
func (s *Store) note(e Event) {
	line, err := json.Marshal(e)
	if err != nil {
		return
	}
	path := s.path(historyName)
	if fi, err := os.Lstat(path); err == nil && fi.Size() > maxHistoryBytes {
		_ = disk.Rename(path, s.path(oldHistoryName))
	}
	f, err := disk.OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_APPEND, 0o644)
	if err != nil {
		return
	}
	defer f.Close()
	// A line that a crash cut short is ended, so that this one can be read.
	if fi, err := f.Stat(); err == nil && fi.Size() > 0 {
		last := make([]byte, 1)
		if _, err := f.ReadAt(last, fi.Size()-1); err == nil && last[0] != '\n' {
			line = append([]byte{'\n'}, line...)
		}
	}
	if _, err := f.Write(append(line, '\n')); err == nil {
		_ = f.Sync()
	}
}

// History lists what became of versions, oldest first. Lines that a crash cut
// short are passed over, and so are repeats: a removal that is finished after a
// crash may be noted twice.
func (s *Store) History() ([]Event, error) {
	var out []Event
	seen := map[[2]string]int{}
	for _, name := range []string{oldHistoryName, historyName} {
		data, err := os.ReadFile(s.path(name))
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("read history: %w", err)
		}
		lines := bufio.NewScanner(bytes.NewReader(data))
		lines.Buffer(nil, maxHistoryBytes)
		for lines.Scan() {
			var e Event
			if json.Unmarshal(lines.Bytes(), &e) != nil || e.Removal == "" {
				continue
			}
			key := [2]string{e.Event, e.Removal}
			if at, ok := seen[key]; ok && e.Event != Restored { // parts are restored one by one
				out[at] = e
				continue
			}
			seen[key] = len(out)
			out = append(out, e)
		}
		if err := lines.Err(); err != nil {
			return nil, fmt.Errorf("read history %s: %w", s.path(name), err)
		}
	}
	return out, nil
}
