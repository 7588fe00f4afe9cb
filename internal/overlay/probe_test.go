package overlay

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/larder-project/larder/internal/testenv"
	"github.com/larder-project/larder/internal/view"
)

// methods are those that this kernel must be able to use. A probe that finds
// fewer fails the test instead of hiding the rest.
func methods(t testing.TB) []view.Method {
	t.Helper()
	if atLeast(kernel(t), 6, 5) {
		return []view.Method{view.DataOnly, view.Lower, view.HardLink}
	}
	return []view.Method{view.Lower, view.HardLink}
}

// metacopy is those methods in which mode and owner belong to the view.
func metacopy(t testing.TB) []view.Method {
	t.Helper()
	all := methods(t)
	return all[:len(all)-1]
}

func kernel(t testing.TB) string {
	t.Helper()
	b, err := os.ReadFile("/proc/sys/kernel/osrelease")
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(string(b))
}

func TestProbeFindsWhatTheHostCanDo(t *testing.T) {
	for _, c := range []struct {
		fstype         string
		options        []string
		reflink, quota bool
	}{
		{"ext4", nil, false, false},
		{"ext4", []string{"prjquota"}, false, true},
		{"xfs", nil, true, false},
		{"xfs", []string{"prjquota"}, true, true},
		{"btrfs", nil, true, false},
		{"tmpfs", nil, false, false},
	} {
		t.Run(c.fstype+strings.Join(c.options, ","), func(t *testing.T) {
			testenv.NeedPrograms(t, "mkfs.ext4")
			h := newHost(t, testenv.LoopFS(t, c.fstype, 400<<20, c.options...).Dir)
			start := time.Now()
			got, err := Probe(t.Context(), h.blobs, h.state)
			if err != nil {
				t.Fatal(err)
			}
			t.Logf("%v: %+v", time.Since(start), got)
			if got.Method != methods(t)[0] {
				t.Errorf("method %q, want %q", got.Method, methods(t)[0])
			}
			ok := map[string]bool{
				"data-only": got.DataOnly.OK, "lower": got.Lower.OK, "hard-link": got.HardLink.OK, "reflink": got.Reflink.OK,
				"quota": got.Quota.OK, "tmpfs": got.Tmpfs.OK, "loop": got.Loop.OK,
			}
			want := map[string]bool{
				"data-only": len(methods(t)) == 3, "lower": true, "hard-link": true, "reflink": c.reflink,
				"quota": c.quota, "tmpfs": true, "loop": true,
			}
			if d := cmp.Diff(want, ok); d != "" {
				t.Errorf("capabilities (-want +got):\n%s", d)
			}
			for name, c := range map[string]Capability{"data-only": got.DataOnly, "reflink": got.Reflink, "quota": got.Quota} {
				if c.Reason == "" || !c.OK && c.Advice == "" {
					t.Errorf("%s has no reason or advice: %+v", name, c)
				}
			}
			wantClean(t, h)

			start = time.Now()
			quick, err := ProbeMethods(t.Context(), h.blobs, h.state)
			if err != nil {
				t.Fatal(err)
			}
			t.Logf("methods alone: %v", time.Since(start))
			got.Quota, got.Tmpfs, got.Loop = Capability{}, Capability{}, Capability{}
			// Reasons of methods that fail name temporary files.
			if quick.Method != got.Method || quick.Reflink != got.Reflink {
				t.Errorf("methods alone: %+v, in all: %+v", quick, got)
			}
			wantClean(t, h)
		})
	}
}

// wantClean checks that a probe has left nothing mounted and nothing made.
func wantClean(t *testing.T, h *host) {
	t.Helper()
	if d := cmp.Diff([]string{"blobs"}, names(t, filepath.Dir(h.blobs))); d != "" {
		t.Errorf("in the store (-want +got):\n%s", d)
	}
	for _, name := range names(t, h.state) {
		if name != probeLock && name != projectLock {
			t.Errorf("in the state folder: %s", name)
		}
	}
	wantNothingMounted(t, h)
}

// wantNothingMounted looks below the file system of the host only: other tests
// run beside this one.
func wantNothingMounted(t *testing.T, h *host) {
	t.Helper()
	b, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(b)) {
		if strings.Contains(line, " "+h.state+"/") {
			t.Errorf("still mounted: %s", line)
		}
	}
}

func TestProbeOfSeparateFileSystems(t *testing.T) {
	h := newHost(t, testenv.LoopFS(t, "xfs", 400<<20).Dir)
	h.state = filepath.Join(testenv.LoopFS(t, "ext4", 64<<20).Dir, "node")
	if err := os.Mkdir(h.state, 0o755); err != nil {
		t.Fatal(err)
	}
	got, err := Probe(t.Context(), h.blobs, h.state)
	if err != nil {
		t.Fatal(err)
	}
	if got.Method != methods(t)[0] || got.HardLink.OK || got.Reflink.OK || !strings.Contains(got.HardLink.Advice, "one file system") {
		t.Errorf("capabilities %+v", got)
	}
	wantClean(t, h)
}

// In a container's own file system, which is an overlay, no upper can be.
func TestProbeWhereNothingCanBeMounted(t *testing.T) {
	h := newHost(t, testenv.LoopFS(t, "ext4", 64<<20).Dir)
	m := h.model(map[string][]byte{"f": []byte("f")})
	method := methods(t)[0]
	mt, _ := h.mount(h.view(view.Spec{Models: []view.Model{m}}, method), method, Limit{})
	inner := newHost(t, mt.Target)
	got, err := Probe(t.Context(), inner.blobs, inner.state)
	if err != nil {
		t.Fatal(err)
	}
	if got.Method != "" || got.DataOnly.OK || got.Lower.OK || got.HardLink.OK || got.HardLink.Reason == "" || got.HardLink.Advice == "" {
		t.Errorf("capabilities %+v", got)
	}
	wantClean(t, inner)
}

func TestProbeCleansUpAfterOneThatWasKilled(t *testing.T) {
	h := newHost(t, testenv.LoopFS(t, "ext4", 64<<20).Dir)
	p := prober{dir: filepath.Join(h.state, probeName), state: h.state}
	if err := p.prepare(h.blobs); err != nil {
		t.Fatal(err)
	}
	func() {
		defer func() {
			if recover() == nil {
				t.Fatal("the probe was not killed")
			}
			// try's own cleaning has run; mount again what it took away.
		}()
		_ = p.try(t.Context(), "case", methods(t)[0], Limit{}, func(m Mount) error { panic("killed here") })
	}()
	target := filepath.Join(p.dir, "left", "target")
	if err := os.MkdirAll(target, 0o755); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command("mount", "-t", "tmpfs", "t", target).CombinedOutput(); err != nil {
		t.Fatalf("%v %s", err, out)
	}
	if _, err := NewUpper(t.Context(), filepath.Join(p.dir, "left", "upper"), h.state, h.state, Limit{Bytes: MinBytes, Backend: Tmpfs}); err != nil {
		t.Fatal(err)
	}
	if _, err := Probe(t.Context(), h.blobs, h.state); err != nil {
		t.Fatal(err)
	}
	wantClean(t, h)
}
