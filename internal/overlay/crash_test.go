package overlay

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/larder-project/larder/internal/testenv"
)

// A process that dies at any step of making or removing an upper leaves what
// the next one takes up or takes away: no mount, no loop device and no project
// id is lost.
func TestUpperDeathAtEveryStep(t *testing.T) {
	if victim := testenv.Child(); victim != "" {
		die(t, victim)
		return
	}
	onLimits(t, func(t *testing.T, h *host, dir string, limit Limit) {
		upper := filepath.Join(h.state, "upper")
		for _, what := range []string{"make", "remove"} {
			last := 0
			for step := 1; ; step++ {
				if what == "remove" {
					u, err := NewUpper(t.Context(), upper, dir, h.state, limit)
					if err != nil {
						t.Fatal(err)
					}
					if err := errors.Join(os.Mkdir(filepath.Join(u.Upper, "d"), 0o755), os.WriteFile(filepath.Join(u.Upper, "d/f"), []byte("f"), 0o644)); err != nil {
						t.Fatal(err)
					}
				}
				killed := dies(t, step, what, upper, dir, h, limit)
				if what == "make" {
					u, err := NewUpper(t.Context(), upper, dir, h.state, limit)
					if err != nil {
						t.Fatalf("made again after a death at step %d: %v", step, err)
					}
					m := Mount{Target: h.target(), View: dir, Blobs: h.blobs, Upper: u.Upper, Work: u.Work, Method: methods(t)[0]}
					h.do(m)
					if got := attributes(t, m.Target); got != "0777 0:0" {
						t.Errorf("after a death at step %d the root is %s", step, got)
					}
					if err := Unmount(m.Target); err != nil {
						t.Fatal(err)
					}
				}
				if err := RemoveUpper(upper); err != nil {
					t.Fatalf("%s: removed after a death at step %d: %v", what, step, err)
				}
				if _, err := os.Lstat(upper); !errors.Is(err, fs.ErrNotExist) {
					t.Errorf("%s: after a death at step %d: %v", what, step, err)
				}
				wantNothingMounted(t, h)
				if !killed {
					last = step
					break
				}
			}
			t.Logf("%s: %d steps", what, last)
			if last < 4 {
				t.Errorf("%s has only %d steps", what, last)
			}
		}
	})
}

// The same for a probe.
func TestProbeDeathAtEveryStep(t *testing.T) {
	if victim := testenv.Child(); victim != "" {
		die(t, victim)
		return
	}
	h := newHost(t, testenv.LoopFS(t, "ext4", 64<<20).Dir)
	for step := 1; ; step++ {
		killed := dies(t, step, "probe", "", "", h, Limit{})
		if _, err := ProbeMethods(t.Context(), h.blobs, h.state); err != nil {
			t.Fatalf("after a death at step %d: %v", step, err)
		}
		wantClean(t, h)
		if !killed {
			t.Logf("%d steps", step)
			if step < 50 {
				t.Errorf("a probe has only %d steps", step)
			}
			return
		}
	}
}

// dies runs a victim that is killed at a step, and tells whether it came that
// far.
func dies(t *testing.T, step int, what, upper, viewDir string, h *host, limit Limit) bool {
	t.Helper()
	victim := strings.Join([]string{what, upper, viewDir, h.state, h.blobs, fmt.Sprint(limit.Bytes), string(limit.Backend)}, "|")
	return testenv.Rerun(t, victim, fmt.Sprintf("kill:%d", step))
}

// die is what the process does that dies.
func die(t *testing.T, victim string) {
	a := strings.Split(victim, "|")
	var err error
	switch a[0] {
	case "make":
		limit := Limit{Backend: Backend(a[6])}
		if _, err := fmt.Sscan(a[5], &limit.Bytes); err != nil {
			t.Fatal(err)
		}
		_, err = NewUpper(t.Context(), a[1], a[2], a[3], limit)
	case "remove":
		err = RemoveUpper(a[1])
	case "probe":
		_, err = ProbeMethods(t.Context(), a[4], a[3])
	}
	if err != nil {
		t.Fatal(err)
	}
}
