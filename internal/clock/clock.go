// Package clock tells the time by which ages are counted.
//
// The clock on the wall jumps: a host comes up in 1970 and is put right by NTP
// a minute later, somebody mistypes a year. A policy that counted by it would
// find every model unused for a year. This clock follows the wall clock, but
// never faster than twice and never slower than half the time that really
// passes, which CLOCK_BOOTTIME tells (suspend counts). So it never goes back;
// after a jump of the wall clock it comes near it little by little; and in
// ordinary times the two are the same.
//
// It is kept in STATE/clock.json, for all processes of the node. What passed
// between two boots nobody knows but the wall clock: it is believed for at most
// a day at once.
package clock

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/gofrs/flock"
	"golang.org/x/sys/unix"

	"github.com/larder-project/larder/internal/atomicfile"
	"github.com/larder-project/larder/internal/disk"
)

// ErrDamaged is wrapped where the clock's file says nothing that can be used.
var ErrDamaged = errors.New("damaged")

// fileName and lockName lie in STATE. The file is replaced under the lock.
const (
	fileName = "clock.json"
	lockName = "clock.lock"
)

const (
	// betweenBoots is how much the wall clock is believed of the time during
	// which the host was off.
	betweenBoots = 24 * time.Hour
	// syncEvery is how often the file is looked at, by the clock of the boot.
	syncEvery = 10 * time.Second
	// saveEvery is how often the file is written. Within a boot nothing is
	// lost with what was not: the clock of the boot goes on.
	saveEvery = time.Minute
)

// state is a moment at which all clocks were read.
type state struct {
	Time     time.Time     `json:"time"`     // of this clock
	Wall     time.Time     `json:"wall"`     // of the wall clock
	BootTime time.Duration `json:"boottime"` // since the boot, in nanoseconds
	BootID   string        `json:"boot_id"`
}

// after is the state at a later moment: the wall clock's time, but no further
// from the earlier one than the time that passed allows.
func (s state) after(wall time.Time, boot time.Duration, bootID string) state {
	passed := boot - s.BootTime
	fastest := 2 * passed
	if bootID != s.BootID || passed < 0 {
		passed = min(max(wall.Sub(s.Wall), 0), betweenBoots)
		fastest = passed
	}
	t := wall
	if first := s.Time.Add(passed / 2); t.Before(first) {
		t = first
	}
	if last := s.Time.Add(fastest); t.After(last) {
		t = last
	}
	return state{Time: t, Wall: wall, BootTime: boot, BootID: bootID}
}

// source reads the kernel's clocks: the wall clock, and the time since the boot.
type source func() (wall time.Time, boot time.Duration)

func kernel() (time.Time, time.Duration) {
	var ts unix.Timespec
	// It cannot fail on a kernel that Larder runs on; if it did, the clock
	// would stand still, and nothing would age.
	_ = unix.ClockGettime(unix.CLOCK_BOOTTIME, &ts)
	return time.Now().Round(0).UTC(), time.Duration(ts.Nano())
}

// Clock is the clock of a node. Its methods may be called side by side.
type Clock struct {
	dir    string
	bootID string
	read   source

	mu     sync.Mutex
	last   state
	synced time.Duration // since the boot: when the file was last looked at
	saved  time.Duration // since the boot: when the file was last written
	err    error         // of the last attempt to read or write the file
}

// Open reads the clock in a STATE folder; where there is none it begins with
// the wall clock. A file that cannot be read is an error that wraps ErrDamaged:
// a clock that began anew could run ahead of what was given out before. A file
// that cannot be written is none, or nobody could clean up on a full disk; see
// Err. bootID is the kernel's; empty: it is read.
func Open(state, bootID string) (*Clock, error) { return open(state, bootID, kernel) }

func open(dir, bootID string, read source) (*Clock, error) {
	if bootID == "" {
		id, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
		if err != nil {
			return nil, fmt.Errorf("open clock: %w", err)
		}
		bootID = strings.TrimSpace(string(id))
	}
	if err := disk.MkdirAll(dir, 0o711); err != nil {
		return nil, fmt.Errorf("open clock: %w", err)
	}
	c := &Clock{dir: dir, bootID: bootID, read: read}
	wall, boot := read()
	if _, err := readState(c.path()); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("open clock: %w", err)
	}
	c.err = c.sync(wall, boot, true)
	return c, nil
}

func (c *Clock) path() string { return filepath.Join(c.dir, fileName) }

// Now is the time by this clock.
func (c *Clock) Now() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	wall, boot := c.read()
	if boot-c.synced >= syncEvery {
		c.err = c.sync(wall, boot, boot-c.saved >= saveEvery)
	} else {
		c.last = c.last.after(wall, boot, c.bootID)
	}
	return c.last.Time
}

// Behind is how far this clock is behind the one on the wall; negative: before
// it.
func (c *Clock) Behind() time.Duration {
	c.Now()
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.last.Wall.Sub(c.last.Time)
}

// Err is why the file could last not be read or written; nil: it could. The
// clock goes on without it.
func (c *Clock) Err() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.err
}

// Save writes the clock to the disk now.
func (c *Clock) Save() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	wall, boot := c.read()
	c.err = c.sync(wall, boot, true)
	return c.err
}

// sync brings the clock and its file together; the later of the two counts.
// Without a file the wall clock counts: whoever takes it away wants that.
func (c *Clock) sync(wall time.Time, boot time.Duration, write bool) error {
	c.synced = boot
	if !c.last.Time.IsZero() {
		c.last = c.last.after(wall, boot, c.bootID)
	}
	lock := flock.New(filepath.Join(c.dir, lockName), flock.SetPermissions(0o600))
	defer lock.Close()
	mine, lockErr := lock.TryLock() // who has it writes what this one would
	kept, err := readState(c.path())
	switch {
	case err == nil:
		kept = kept.after(wall, boot, c.bootID)
	case errors.Is(err, fs.ErrNotExist):
		kept = state{Time: wall, Wall: wall, BootTime: boot, BootID: c.bootID}
		write = true
	default:
		return err
	}
	if kept.Time.After(c.last.Time) {
		c.last = kept
	}
	if !write || !mine {
		return lockErr
	}
	c.saved = boot
	data, err := json.Marshal(c.last)
	if err != nil {
		return err
	}
	return atomicfile.Write(c.path(), append(data, '\n'), 0o600)
}

func readState(path string) (state, error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return state{}, err
	}
	var s state
	dec := json.NewDecoder(bytes.NewReader(data))
	dec.DisallowUnknownFields()
	err = dec.Decode(&s)
	if err == nil && (s.Time.IsZero() || s.Wall.IsZero() || s.BootTime < 0 || s.BootID == "" || dec.More()) {
		err = errors.New("it says nothing that a clock could go on from")
	}
	if err != nil {
		return state{}, &damagedError{path: path, err: err}
	}
	return s, nil
}

// damagedError says what to do about a file that cannot be read.
type damagedError struct {
	path string
	err  error
}

func (e *damagedError) Error() string { return fmt.Sprintf("%s is damaged: %v", e.path, e.err) }

func (e *damagedError) Is(target error) bool { return target == ErrDamaged }

func (e *damagedError) Unwrap() error { return e.err }

// Hint says what to do next.
func (e *damagedError) Hint() string {
	return "see that date tells the right time, then remove the file: ages are counted by the wall clock from then on"
}
