package sources

import (
	"cmp"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/larder-project/larder/internal/atomicfile"
	"github.com/larder-project/larder/internal/disk"
)

// memory is STATE/seen/SOURCE-HASH.json: which sources were ever seen on this
// node, and where. Each has a file of its own, so that two programs which see
// something at the same time do not lose what the other saw.
type memory struct{ dir string } // STATE

// sight is one such file.
type sight struct {
	Source  string    `json:"source"`
	Address string    `json:"address"`
	Time    time.Time `json:"time"` // when it was first seen

	path string // of the file
}

const suffix = ".json"

func (m memory) folder() string { return filepath.Join(m.dir, "seen") }

// of reads where a source was seen, in the order of addresses. A file that
// cannot be read is an error: the source would be forgotten.
func (m memory) of(source string) ([]sight, error) {
	entries, err := os.ReadDir(m.folder())
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read which sources were seen: %w", err)
	}
	var out []sight
	for _, e := range entries {
		if !strings.HasPrefix(e.Name(), source+"-") || !strings.HasSuffix(e.Name(), suffix) {
			continue
		}
		path := filepath.Join(m.folder(), e.Name())
		text, err := os.ReadFile(path)
		if err != nil {
			return nil, fmt.Errorf("read which sources were seen: %w", err)
		}
		var s sight
		if err := json.Unmarshal(text, &s); err != nil || s.Source != source || s.Address == "" {
			return nil, fmt.Errorf("read which sources were seen: %s is damaged; delete it if %s is not on this node, else restore it", path, source)
		}
		s.path = path
		out = append(out, s)
	}
	slices.SortFunc(out, func(a, b sight) int { return cmp.Compare(a.Address, b.Address) })
	return out, nil
}

// add remembers durably that a source was seen.
func (m memory) add(source, address string) error {
	text, err := json.Marshal(sight{Source: source, Address: address, Time: time.Now().UTC().Truncate(time.Second)})
	if err == nil {
		err = disk.MkdirAll(m.folder(), 0o711)
	}
	if err == nil {
		err = disk.SyncDir(m.dir)
	}
	if err == nil {
		name := fmt.Sprintf("%s-%x%s", source, sha256.Sum256([]byte(address)), suffix)
		err = atomicfile.Write(filepath.Join(m.folder(), name), append(text, '\n'), 0o600)
	}
	if err != nil {
		return fmt.Errorf("remember that %s was seen at %s: %w", source, address, err)
	}
	return nil
}
