package progress

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
)

func TestLinesTellPlanRateAndWaits(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		var out bytes.Buffer
		m := New(&out, Lines)
		m.Start(Plan{What: "hf://a/b@main", Files: 3, Bytes: 300 << 20, HaveFiles: 1, HaveBytes: 100 << 20})
		m.Open("w", 200<<20, 50<<20)
		for range 10 {
			time.Sleep(490 * time.Millisecond) // none of them at the very moment of the line
			m.Add("w", 5<<20)
		}
		time.Sleep(200 * time.Millisecond)
		synctest.Wait()
		m.Wait("the hub asks to wait", 90*time.Second)
		m.Add("w", 100<<20)
		m.Done("w")
		m.Close()
		m.Add("w", 1) // ignored, no panic
		const want = "hf://a/b@main: 3 files, 300 MiB; 1 of them, 100 MiB, are in the store already\n" +
			"hf://a/b@main: 200 MiB of 300 MiB (66 %), 10 MiB/s, 10 s left, 1 of 3 files\n" +
			"the hub asks to wait; waiting 1 min 30 s\n"
		if diff := cmp.Diff(want, out.String()); diff != "" {
			t.Errorf("lines (-want +got):\n%s", diff)
		}
	})
}

func TestEventsAreOneObjectALine(t *testing.T) {
	t.Parallel()
	var out bytes.Buffer
	m := New(&out, JSON)
	m.Start(Plan{What: "m", Files: 2, Bytes: 10, HaveFiles: 1, HaveBytes: 4})
	m.Open("a/<b>", 6, 0)
	m.Add("a/<b>", 6)
	m.Done("a/<b>")
	m.Wait("slow down", 2*time.Second)
	m.Close()
	want := []map[string]any{
		{"event": "plan", "model": "m", "files": 2., "bytes": 10., "have_files": 1., "have_bytes": 4.},
		{"event": "file", "path": "a/<b>", "bytes": 6.},
		{"event": "wait", "reason": "slow down", "seconds": 2.},
		{"event": "progress", "model": "m", "files": 2., "total_files": 2., "bytes": 10., "total_bytes": 10., "rate": 0.},
	}
	var got []map[string]any
	for line := range strings.Lines(out.String()) {
		var v map[string]any
		if err := json.Unmarshal([]byte(line), &v); err != nil {
			t.Fatalf("%q: %v", line, err)
		}
		got = append(got, v)
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("events (-want +got):\n%s", diff)
	}
}

// terminal is a pseudo-terminal; what is written to the file comes out of the
// function.
func terminal(t *testing.T) (*os.File, func() string) {
	t.Helper()
	master, err := os.OpenFile("/dev/ptmx", os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.IoctlSetPointerInt(int(master.Fd()), unix.TIOCSPTLCK, 0); err != nil {
		t.Fatal(err)
	}
	n, err := unix.IoctlGetInt(int(master.Fd()), unix.TIOCGPTN)
	if err != nil {
		t.Fatal(err)
	}
	tty, err := os.OpenFile(fmt.Sprintf("/dev/pts/%d", n), os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.IoctlSetWinsize(int(tty.Fd()), unix.TIOCSWINSZ, &unix.Winsize{Row: 24, Col: 120}); err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	done := make(chan struct{})
	go func() {
		defer close(done)
		_, _ = io.Copy(&out, master) // ends with EIO when the tty is closed
	}()
	return tty, func() string {
		_ = tty.Close()
		<-done
		_ = master.Close()
		return out.String()
	}
}

func TestBarsOnATerminal(t *testing.T) {
	t.Parallel()
	tty, read := terminal(t)
	if Choose(tty) != Bars {
		t.Fatal("a terminal gets no bars")
	}
	m := New(tty, Bars)
	const files, each = 40, 8 << 20
	m.Start(Plan{What: "hf://org/name@main", Files: files, Bytes: files * each})
	var work sync.WaitGroup
	for i := range files {
		work.Go(func() {
			name := fmt.Sprintf("weights-%d.safetensors", i)
			m.Open(name, each, 0)
			for range 8 {
				time.Sleep(50 * time.Millisecond)
				m.Add(name, each/8)
			}
			m.Done(name)
		})
	}
	time.Sleep(200 * time.Millisecond)
	m.Wait("too many requests", time.Second)
	work.Wait()
	m.Close()
	out := read()
	for _, want := range []string{"hf://org/name@main", "320 MiB of 320 MiB (100 %)", "40 of 40 files", "too many requests; waiting 1 s", ".safetensors"} {
		if !strings.Contains(out, want) {
			t.Errorf("the terminal does not say %q", want)
		}
	}
	// Between two drawings there are never more lines than bars.
	for _, frame := range strings.Split(out, "\x1b[") {
		if n := strings.Count(frame, ".safetensors"); n > maxBars {
			t.Errorf("%d bars of files at once, at most %d: %q", n, maxBars, frame)
		}
	}
}

func TestAnInterruptedMeterCloses(t *testing.T) {
	t.Parallel()
	tty, read := terminal(t)
	m := New(tty, Bars)
	m.Start(Plan{What: "m", Files: 1, Bytes: 100 << 20})
	m.Open("f", 100<<20, 0)
	m.Add("f", 10<<20)
	closed := make(chan struct{})
	go func() { m.Close(); m.Close(); close(closed) }()
	select {
	case <-closed:
	case <-time.After(10 * time.Second):
		t.Fatal("Close does not return while a file is under way")
	}
	if out := read(); !strings.Contains(out, "10 MiB of 100 MiB (10 %)") {
		t.Errorf("the last state is not shown: %q", out)
	}
}

func TestBytes(t *testing.T) {
	t.Parallel()
	for n, want := range map[int64]string{
		0: "0 B", 1023: "1023 B", 1024: "1.0 KiB", 10 << 10: "10 KiB", 1023<<10 + 600: "1.0 MiB", 1<<20 - 1: "1.0 MiB",
		1536 << 20: "1.5 GiB", 9<<30 + 1<<29: "9.5 GiB", 1 << 40: "1.0 TiB", 1<<63 - 1: "8.0 EiB", -2048: "-2.0 KiB",
	} {
		if got := Bytes(n); got != want {
			t.Errorf("Bytes(%d) = %q, want %q", n, got, want)
		}
	}
}

func TestDuration(t *testing.T) {
	t.Parallel()
	for d, want := range map[time.Duration]string{
		0: "0 s", 1499 * time.Millisecond: "1 s", 200 * time.Second: "3 min 20 s", 2 * time.Minute: "2 min", 1000 * time.Second: "16 min",
		125 * time.Minute: "2 h 5 min", 72 * time.Hour: "3 days",
	} {
		if got := Duration(d); got != want {
			t.Errorf("Duration(%v) = %q, want %q", d, got, want)
		}
	}
}
