package clock

import (
	"errors"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"pgregory.net/rapid"
)

// host is a machine whose clocks a test turns.
type host struct {
	mu     sync.Mutex
	wall   time.Time
	boot   time.Duration
	bootID string
}

func newHost() *host {
	return &host{wall: time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC), boot: time.Hour, bootID: "boot-0"}
}

func (h *host) read() (time.Time, time.Duration) {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.wall, h.boot
}

func (h *host) pass(d time.Duration) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.wall, h.boot = h.wall.Add(d), h.boot+d
}

func (h *host) jump(d time.Duration) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.wall = h.wall.Add(d)
}

// reboot is off for a while; the wall clock may come up wrong.
func (h *host) reboot(off, wrong time.Duration) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.wall, h.boot, h.bootID = h.wall.Add(off+wrong), time.Second, h.bootID+"x"
}

func (h *host) open(t require, dir string) *Clock {
	t.Helper()
	c, err := open(dir, h.bootID, h.read)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

type require interface {
	Helper()
	Fatal(...any)
}

const year = 365 * 24 * time.Hour

func TestItIsTheWallClockInOrdinaryTimes(t *testing.T) {
	t.Parallel()
	h, dir := newHost(), t.TempDir()
	for _, off := range []time.Duration{0, time.Minute, 20 * time.Hour} {
		h.reboot(off, 0)
		c := h.open(t, dir)
		for _, d := range []time.Duration{0, time.Millisecond, time.Second, time.Minute, 30 * time.Hour} {
			h.pass(d)
			if got := c.Now(); !got.Equal(h.wall) {
				t.Fatalf("off for %s, %s later: %s, want %s", off, d, got, h.wall)
			}
		}
	}
}

func TestAJumpAgesNothingByMoreThanTwiceTheTimeThatPasses(t *testing.T) {
	t.Parallel()
	for name, jump := range map[string]time.Duration{"a year on": year, "a year back": -year} {
		h := newHost()
		c := h.open(t, t.TempDir())
		before := c.Now()
		h.jump(jump)
		if got := c.Now(); !got.Equal(before) {
			t.Errorf("%s: at the jump the clock goes from %s to %s", name, before, got)
		}
		var passed time.Duration
		for range 100 {
			h.pass(time.Hour)
			passed += time.Hour
			got := c.Now().Sub(before)
			if got > 2*passed || got < passed/2 {
				t.Errorf("%s: %s passed, and the clock says %s", name, passed, got)
			}
		}
		h.jump(-jump)
		h.pass(200 * time.Hour)
		if got := c.Now(); !got.Equal(h.wall) {
			t.Errorf("%s, and put right again: the clock says %s, want %s", name, got, h.wall)
		}
	}
}

func TestABootWithAWrongClockAgesNothingByMoreThanADay(t *testing.T) {
	t.Parallel()
	for _, wrong := range []time.Duration{year, -56 * year} {
		h, dir := newHost(), t.TempDir()
		before := h.open(t, dir).Now()
		h.reboot(time.Minute, wrong)
		c := h.open(t, dir)
		if got := c.Now().Sub(before); got < 0 || got > 24*time.Hour {
			t.Errorf("wrong by %s: the clock goes on by %s", wrong, got)
		}
		h.jump(-wrong)
		h.pass(30 * time.Hour)
		if got := c.Now().Sub(before); got < 15*time.Hour || got > 60*time.Hour {
			t.Errorf("wrong by %s and put right: the clock has gone on by %s", wrong, got)
		}
	}
}

func TestAFileThatSaysNothingIsAnError(t *testing.T) {
	t.Parallel()
	h, dir := newHost(), t.TempDir()
	h.open(t, dir)
	path := filepath.Join(dir, fileName)
	whole, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	for name, text := range map[string]string{
		"empty": "", "cut short": string(whole[:len(whole)/2]), "zeros": string(make([]byte, 100)), "no JSON": "tomorrow",
		"an empty object": "{}", "null": "null", "another file": `{"id":"x"}`, "two": string(whole) + string(whole),
	} {
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		_, err := open(dir, h.bootID, h.read)
		var hint interface{ Hint() string }
		if !errors.Is(err, ErrDamaged) || !errors.As(err, &hint) || hint.Hint() == "" {
			t.Errorf("%s: error %v, want ErrDamaged and a hint", name, err)
		}
		if now, _ := os.ReadFile(path); string(now) != text {
			t.Errorf("%s: the file was changed to %q", name, now)
		}
	}
}

func TestAClockThatIsOpenGoesOnWithoutItsFile(t *testing.T) {
	t.Parallel()
	h, dir := newHost(), t.TempDir()
	c := h.open(t, dir)
	if err := os.WriteFile(filepath.Join(dir, fileName), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	h.pass(time.Hour)
	if got := c.Now(); !got.Equal(h.wall) || !errors.Is(c.Err(), ErrDamaged) {
		t.Errorf("the clock says %s and error %v, want %s and ErrDamaged", got, c.Err(), h.wall)
	}
	// Taken away, it begins with the wall clock: the way out after a jump that
	// was none.
	if err := os.Remove(filepath.Join(dir, fileName)); err != nil {
		t.Fatal(err)
	}
	h.jump(year)
	h.pass(time.Hour)
	if got := c.Now(); !got.Equal(h.wall) || c.Err() != nil || c.Behind() != 0 {
		t.Errorf("the clock says %s and error %v, want %s", got, c.Err(), h.wall)
	}
}

func TestTheRealClocksAreRead(t *testing.T) {
	t.Parallel()
	c, err := Open(t.TempDir(), "")
	if err != nil {
		t.Fatal(err)
	}
	if d := time.Since(c.Now()).Abs(); d > time.Minute {
		t.Errorf("the clock is %s from the wall clock", d)
	}
	_, boot := kernel()
	if boot <= 0 || c.bootID == "" {
		t.Errorf("boot clock %s, boot id %q", boot, c.bootID)
	}
}

// apart is how far processes of one node may be from each other while the wall
// clock jumps: from one moment in the file one may have gone on twice as fast
// as time, another half as fast.
const apart = (saveEvery + syncEvery) * 3 / 2

// Whatever the clocks of the host do, however many processes look, and whenever
// they start and die: no process sees the clock go back, none sees it go faster
// than twice real time within a boot or a day further across one, and what one
// says is near what another says.
func TestWhateverHappens(t *testing.T) {
	t.Parallel()
	root := t.TempDir()
	rapid.Check(t, func(t *rapid.T) {
		dir, err := os.MkdirTemp(root, "")
		if err != nil {
			t.Fatal(err)
		}
		h := newHost()
		first := h.wall
		var boots, passed time.Duration
		clocks := []*Clock{h.open(t, dir)}
		said := []time.Time{clocks[0].Now()}
		span := func(label string, most time.Duration) time.Duration {
			return time.Duration(rapid.Int64Range(0, int64(most)).Draw(t, label))
		}
		t.Repeat(map[string]func(*rapid.T){
			"time passes": func(*rapid.T) {
				d := span("time", 2*time.Hour)
				h.pass(d)
				passed += d
			},
			"a moment passes": func(*rapid.T) {
				d := span("moment", time.Minute)
				h.pass(d)
				passed += d
			},
			"the wall clock jumps": func(*rapid.T) { h.jump(span("jump", 4*year) - 2*year) },
			"another process":      func(*rapid.T) { clocks, said = append(clocks, h.open(t, dir)), append(said, time.Time{}) },
			"a process ends": func(*rapid.T) {
				clocks, said = clocks[1:], said[1:]
				if len(clocks) == 0 {
					clocks, said = []*Clock{h.open(t, dir)}, []time.Time{{}}
				}
			},
			"the host boots": func(*rapid.T) {
				h.reboot(span("off", 4*24*time.Hour), span("wrong", 4*year)-2*year)
				boots += betweenBoots
				clocks, said = []*Clock{h.open(t, dir)}, []time.Time{{}}
			},
			"": func(t *rapid.T) {
				least, most := time.Time{}, time.Time{}
				for i, c := range clocks {
					now := c.Now()
					if now.Before(said[i]) {
						t.Fatalf("the clock goes back from %s to %s", said[i], now)
					}
					said[i] = now
					if least.IsZero() || now.Before(least) {
						least = now
					}
					if now.After(most) {
						most = now
					}
				}
				if d := most.Sub(first); d > 2*passed+boots {
					t.Fatalf("%s passed, %s between boots, and the clock has gone on by %s", passed, boots, d)
				}
				if d := most.Sub(least); d > apart {
					t.Fatalf("two processes are %s apart", d)
				}
			},
		})
	})
}

func TestManyAtOnce(t *testing.T) {
	t.Parallel()
	h, dir := newHost(), t.TempDir()
	var wait sync.WaitGroup
	for range 8 {
		wait.Go(func() {
			c, err := open(dir, h.bootID, h.read)
			if err != nil {
				t.Error(err)
				return
			}
			last := c.Now()
			for range 50 {
				h.pass(3 * time.Second)
				now := c.Now()
				if now.Before(last) {
					t.Errorf("the clock goes back from %s to %s", last, now)
				}
				last = now
			}
			if c.Err() != nil {
				t.Error(c.Err())
			}
		})
	}
	wait.Wait()
	if _, err := readState(filepath.Join(dir, fileName)); err != nil {
		t.Error(err)
	}
}
