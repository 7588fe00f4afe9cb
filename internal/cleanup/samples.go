package cleanup

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/larder-project/larder/internal/atomicfile"
)

// Sample is how little space was free in one stretch of time.
type Sample struct {
	Time  time.Time `json:"t"`     // when the stretch began
	Free  int64     `json:"free"`  // bytes, at the lowest
	Limit int64     `json:"limit"` // bytes, of the policy; 0: none
}

// A week in stretches of five minutes.
const (
	sampleEvery = 5 * time.Minute
	maxSamples  = 7 * 24 * 12
)

const samplesName = "free-space.json"

// samples remember free space over time.
type samples struct {
	path string
	list []Sample // oldest first
}

// readSamples reads what an earlier process left in STATE. They are nothing but
// a picture for people: where they cannot be read, new ones are begun, and the
// error is to be told.
func readSamples(state string) (*samples, error) {
	s := &samples{path: filepath.Join(state, samplesName)}
	data, err := os.ReadFile(s.path)
	if errors.Is(err, fs.ErrNotExist) {
		return s, nil
	}
	if err == nil {
		err = json.Unmarshal(data, &s.list)
	}
	if err != nil {
		s.list = nil
		return s, fmt.Errorf("read how much space was free: %s: %w; the picture begins anew", s.path, err)
	}
	return s, nil
}

// add notes a measurement. It tells whether a stretch has ended with it, so
// that it is time to save.
func (s *samples) add(now time.Time, space Space) (ended bool) {
	begun := now.Truncate(sampleEvery)
	if n := len(s.list); n > 0 && s.list[n-1].Time.Equal(begun) {
		last := &s.list[n-1]
		last.Free, last.Limit = min(last.Free, space.Free), space.Limit
		return false
	}
	// After the wall clock was set back, what lies in the future goes.
	s.list = slices.DeleteFunc(s.list, func(o Sample) bool { return !o.Time.Before(begun) })
	s.list = append(s.list, Sample{Time: begun, Free: space.Free, Limit: space.Limit})
	if over := len(s.list) - maxSamples; over > 0 {
		s.list = slices.Delete(s.list, 0, over)
	}
	return true
}

func (s *samples) save() error {
	data, err := json.Marshal(s.list)
	if err != nil {
		return err
	}
	if err := atomicfile.Write(s.path, append(data, '\n'), 0o600); err != nil {
		return fmt.Errorf("note how much space was free: %w", err)
	}
	return nil
}
