package e2e

import (
	"errors"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/larder-project/larder/internal/disk"
	"github.com/larder-project/larder/internal/testenv"
	"github.com/larder-project/larder/test/engine"
	"github.com/larder-project/larder/test/prometheus"
)

// numbered is a model of so many mebibytes, each of which begins with its
// number; the seed makes it another than others.
func (n *node) numbered(name string, mebibytes int, seed byte) {
	n.t.Helper()
	data := make([]byte, 0, mebibytes<<20)
	block := weights(seed)
	for i := range mebibytes {
		copy(block, fmt.Sprintf("%08d", i))
		data = append(data, block...)
	}
	n.importModel(name, model{"weights": data})
}

// tally is what a reader has read so far, at one moment.
type tally struct {
	at    time.Time
	bytes int64
}

// tallies reads the log of a reader.
func tallies(t *testing.T, path string) (out []tally) {
	t.Helper()
	for text := range strings.Lines(read(t, path)) {
		var at, bytes int64
		if _, err := fmt.Sscan(text, &at, &bytes); err != nil {
			t.Fatalf("a read failed: %s", text)
		}
		out = append(out, tally{time.Unix(0, at), bytes})
	}
	return out
}

// rate is how many bytes a second were read between two moments, by all
// readers.
func rate(t *testing.T, logs []string, from, to time.Time) float64 {
	t.Helper()
	sum := 0.0
	for _, path := range logs {
		all := tallies(t, path)
		// What was read at a moment lies between two lines.
		at := func(when time.Time) float64 {
			i, _ := slices.BinarySearchFunc(all, when, func(s tally, w time.Time) int { return s.at.Compare(w) })
			if i == 0 || i == len(all) {
				t.Fatalf("%s says nothing of %s", path, when)
			}
			a, b := all[i-1], all[i]
			return float64(a.bytes) + float64(b.bytes-a.bytes)*float64(when.Sub(a.at))/float64(b.at.Sub(a.at))
		}
		sum += (at(to) - at(from)) / to.Sub(from).Seconds()
	}
	return sum
}

func freeShare(t *testing.T, dir string) (free, capacity int64) {
	t.Helper()
	free, capacity, err := disk.Free(dir)
	ok(t, err)
	return free, capacity
}

// deviceReads is how many bytes were read from the device of a file system.
func deviceReads(t *testing.T, dir string) int64 {
	t.Helper()
	var st unix.Stat_t
	ok(t, unix.Stat(dir, &st))
	fields := strings.Fields(read(t, fmt.Sprintf("/sys/dev/block/%d:%d/stat", unix.Major(st.Dev), unix.Minor(st.Dev))))
	var sectors int64
	_, err := fmt.Sscan(fields[2], &sectors)
	ok(t, err)
	return sectors * 512
}

// fill takes space until so much is left, as a program does that writes a large
// file.
func fill(t *testing.T, path string, dir string, left int64) {
	t.Helper()
	free, _ := freeShare(t, dir)
	f, err := os.OpenFile(path, os.O_CREATE|os.O_WRONLY, 0o600)
	ok(t, err)
	defer f.Close()
	ok(t, unix.Fallocate(int(f.Fd()), 0, 0, free-left))
}

// Free space is pushed under the limit while ten containers read: a clean-up
// begins within seconds and makes room, no read fails, and the readers are
// hardly slowed down. Where nothing more may go, it is said so, and the alert
// for free space fires in a Prometheus.
func TestSidecarMakesRoomWhileContainersRead(t *testing.T) {
	need(t)
	testenv.NeedPrograms(t, "prometheus")
	// Not beside other tests: it is about speed.
	e := sharedOf(t, "current", engine.Current)
	for _, fstype := range []string{"ext4", "xfs"} {
		t.Run(fstype, func(t *testing.T) { makesRoom(t, e, fstype) })
	}
}

const rounds = 3

func makesRoom(t *testing.T, e *engine.Engine, fstype string) {
	const mib = 1 << 20
	fs := testenv.LoopFS(t, fstype, 4<<30, "discard")
	n := newNode(t, e)
	root := filepath.Join(fs.Dir, "larder")
	ok(t, os.Mkdir(root, 0o755))
	ok(t, os.Remove(n.root))
	n.root = root
	n.numbered("served:1", 64, 1)
	for i := range 40 {
		n.numbered(fmt.Sprintf("old%d:1", i), 64, byte(100+i))
	}
	n.startPlugin()
	logs := make([]string, 10)
	out := t.TempDir()
	for i := range logs {
		logs[i] = filepath.Join(out, fmt.Sprint(i))
		n.docker("run", "-d", "--network", "none", "--label", n.label, "-v", n.volume(fmt.Sprint("served", i), "model=served:1", "access=ro")+":/models",
			"-v", filepath.Join(programs, "reader")+":/reader:ro", "-v", out+":/out", engine.Image, "/reader", "/models/weights", fmt.Sprint("/out/", i))
	}
	s := n.newSidecar("version: 1\nrules: [{models: [\"*\"], unusedFor: 365d, rollback: 0, minAge: 0s}]\npressure: {minFree: 10%, target: 25%}\ninterval: 1h\n")
	s.start("larder-sidecar-static")
	s.logged("clean-up ends", 1)
	time.Sleep(2 * time.Second) // the readers have begun

	var ratios []float64
	for round := 1; round <= rounds; round++ {
		before, device := time.Now(), deviceReads(t, fs.Dir)
		time.Sleep(5 * time.Second)
		_, capacity := freeShare(t, fs.Dir)
		pushed := time.Now()
		fill(t, filepath.Join(fs.Dir, fmt.Sprint("filler", round)), fs.Dir, capacity*7/100)
		began := s.logged("clean-up begins", round+1)
		ended := s.logged("clean-up ends", round+1)
		if began.Cause != "pressure" || ended.Result != "ok" {
			t.Fatalf("it began for %s and ended %s", began.Cause, ended.Result)
		}
		n.within(10*time.Second, "free space is above the target", func() error {
			if free, _ := freeShare(t, fs.Dir); free < capacity/4 {
				return fmt.Errorf("%d of %d MiB", free/mib, capacity/mib)
			}
			return nil
		})
		// What it frees is told to the device for a moment longer.
		until := ended.Time.Add(2 * time.Second)
		n.within(time.Minute, "every reader has read since", func() error {
			for _, path := range logs {
				if all := tallies(t, path); all[len(all)-1].at.Before(until) {
					return fmt.Errorf("%s says nothing since %s", path, until)
				}
			}
			return nil
		})
		was, is := rate(t, logs, before, pushed), rate(t, logs, began.Time, until)
		if fromDevice := float64(deviceReads(t, fs.Dir)-device) / (was * pushed.Sub(before).Seconds()); fromDevice < 0.5 {
			t.Errorf("only %.2f of what was read came from the device: the readers do not read past the page cache", fromDevice)
		}
		ratios = append(ratios, is/was)
		free, _ := freeShare(t, fs.Dir)
		t.Logf("%s, round %d: pushed to %.1f %% free; clean-up began after %s, took %s, removed %d versions; %.1f %% free; read %.0f MiB/s before, %.0f MiB/s during: %.2f",
			fstype, round, 7.0, began.Time.Sub(pushed).Round(time.Millisecond), ended.Time.Sub(began.Time).Round(time.Millisecond), ended.Versions,
			100*float64(free)/float64(capacity), was/mib, is/mib, is/was)
		if d := began.Time.Sub(pushed); d > 10*time.Second {
			t.Errorf("the clean-up began after %s", d)
		}
		if ended.Versions < 5 {
			t.Errorf("only %d versions went", ended.Versions)
		}
	}
	slices.Sort(ratios)
	if median := ratios[rounds/2]; median < 0.8 || math.IsNaN(median) {
		t.Errorf("the readers were slowed down to %.2f of before", median)
	}
	if fstype == "ext4" {
		n.cannotMakeRoom(fs.Dir, s)
	}
	for _, path := range logs {
		tallies(t, path) // no read has failed
	}
	ok(t, n.has("served:1"))
	n.verified()
}

// cannotMakeRoom has volumes keep all that is left, and pushes free space under
// the limit again.
func (n *node) cannotMakeRoom(dir string, s *sidecar) {
	t := n.t
	p := prometheus.Start(t, s.address, filepath.Join(checkout, "deploy/prometheus/alerts.yaml"))
	var volumes []string
	for name := range n.models() {
		if name, _, _ := strings.Cut(name, ":"); strings.HasPrefix(name, "old") {
			volumes = append(volumes, n.volume("keeps-"+name, "model="+name))
		}
	}
	_, capacity := freeShare(t, dir)
	fill(t, filepath.Join(dir, "filler"), dir, capacity*8/100)
	n.within(20*time.Second, "a clean-up that cannot help says so", func() error {
		ends := s.log("clean-up ends, and space stays short: what is left is in use, pinned, protected, young or needed to roll back")
		if len(ends) == 0 || ends[0].Result != "short" {
			return fmt.Errorf("%+v", ends)
		}
		return nil
	})
	ok(t, n.has("served:1"))
	n.within(10*time.Second, "the metrics and the page say it too", func() error {
		if !strings.Contains(s.page("/metrics"), "larder_pressure_target_unreachable 1\n") || !strings.Contains(s.page("/"), "Space is short") {
			return errors.New("they do not")
		}
		return nil
	})
	began := time.Now()
	var alert prometheus.Alert
	p.Until(5*time.Minute, "the alert for free space fires", func() (firing bool) {
		alert, firing = p.Firing("LarderSpaceLow")
		return firing
	})
	t.Logf("the alert fires after %s: %s", time.Since(began).Round(time.Second), alert.Annotations["description"])
	if !strings.Contains(alert.Annotations["description"], "MiB are free") {
		t.Errorf("the alert says %q", alert.Annotations["description"])
	}
	// It tries again, but not all the time.
	if n := len(s.log("clean-up begins")) - rounds - 1; n < 2 || n > 8+4*int(time.Since(began)/time.Minute) {
		t.Errorf("in %s it tried %d times", time.Since(began), n)
	}
	// When somebody lets go, room is made at once.
	free := time.Now()
	n.docker(append([]string{"volume", "rm"}, volumes[:len(volumes)/2]...)...)
	n.within(time.Minute, "room is made from what is let go", func() error {
		if free, _ := freeShare(t, dir); free < capacity/10 {
			return fmt.Errorf("%d of %d bytes are free", free, capacity)
		}
		return nil
	})
	t.Logf("%d volumes removed; room is made after %s", len(volumes)/2, time.Since(free).Round(100*time.Millisecond))
	p.Until(30*time.Second, "the alert ends", func() bool {
		_, firing := p.Firing("LarderSpaceLow")
		return !firing
	})
	n.docker(append([]string{"volume", "rm"}, volumes[len(volumes)/2:]...)...)
}
