package progress

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"regexp"
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
		m.Open("w", 200<<20)
		m.Have("w", 50<<20)
		m.Open("small", 1<<20)
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
			"hf://a/b@main: 200 MiB of 300 MiB (66 %), 10 MiB/s, 10 s left, 1 of 3 files; w 100 MiB of 200 MiB, 10 MiB/s, 10 s left\n" +
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
	m.Open("a/<b>", 6)
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

func TestLinesNameTheTwoLargestFilesUnderWay(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		var out bytes.Buffer
		m := New(&out, Lines)
		m.Start(Plan{What: "m", Files: 4, Bytes: 1 << 30})
		for i, name := range []string{"a-rather-long-folder-name/model-1-of-3.safetensors", "b", "c"} {
			m.Open(name, int64(i+1)*100<<20)
		}
		time.Sleep(4900 * time.Millisecond)
		m.Add("b", 49<<20)
		m.Add("a-rather-long-folder-name/model-1-of-3.safetensors", 49<<20)
		time.Sleep(200 * time.Millisecond)
		synctest.Wait()
		m.Done("c")
		time.Sleep(5 * time.Second)
		synctest.Wait()
		m.Close()
		const want = "m: 4 files, 1.0 GiB\n" +
			"m: 98 MiB of 1.0 GiB (9 %), 20 MiB/s, 47 s left, 0 of 4 files; c 0 B of 300 MiB; b 49 MiB of 200 MiB, 9.8 MiB/s, 15 s left\n" +
			"m: 98 MiB of 1.0 GiB (9 %), 9.8 MiB/s, 1 min 34 s left, 1 of 4 files; b 49 MiB of 200 MiB, 4.9 MiB/s, 31 s left; …r-name/model-1-of-3.safetensors 49 MiB of 100 MiB, 4.9 MiB/s, 10 s left\n"
		if diff := cmp.Diff(want, out.String()); diff != "" {
			t.Errorf("lines (-want +got):\n%s", diff)
		}
	})
}

// What was there before says nothing about how fast the rest will come.
func TestTheRateCountsOnlyWhatComesNow(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		var out bytes.Buffer
		m := New(&out, JSON)
		m.Start(Plan{What: "m", Files: 3, Bytes: 1000})
		m.Open("slow", 500)
		m.Have("slow", 400)
		m.Open("fast", 500)
		m.Open("", -1) // of unknown size, as verify has it
		time.Sleep(900 * time.Millisecond)
		m.Add("slow", 20)
		m.Add("fast", 80)
		time.Sleep(200 * time.Millisecond)
		synctest.Wait()
		m.Close()
		lines := strings.Split(out.String(), "\n")
		const want = `{"event":"progress","model":"m","files":0,"total_files":3,"bytes":500,"total_bytes":1000,"rate":100,"seconds_left":5,` +
			`"open":[{"path":"fast","bytes":80,"total_bytes":500,"rate":80,"seconds_left":5.25},{"path":"slow","bytes":420,"total_bytes":500,"rate":20,"seconds_left":4}]}`
		if diff := cmp.Diff(want, lines[1]); diff != "" {
			t.Errorf("the first event of progress (-want +got):\n%s", diff)
		}
	})
}

// terminal is a pseudo-terminal of so many columns. What is written to the
// file comes out of the function, which closes it.
func terminal(t *testing.T, columns uint16) (*os.File, func() string) {
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
	if err := unix.IoctlSetWinsize(int(tty.Fd()), unix.TIOCSWINSZ, &unix.Winsize{Row: 24, Col: columns}); err != nil {
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

func TestEachBarOnATerminalHasRateTimeLeftAndTheEndOfItsName(t *testing.T) {
	t.Parallel()
	for _, columns := range []uint16{80, 120} {
		t.Run(fmt.Sprint(columns), func(t *testing.T) {
			t.Parallel()
			tty, read := terminal(t, columns)
			m := New(tty, Bars)
			const name = "a-folder/of-models/model-1-of-2.safetensors"
			m.Start(Plan{What: "hf://org/name@main", Files: 2, Bytes: 2 << 30})
			m.Open(name, 256<<20)
			for range 40 {
				time.Sleep(30 * time.Millisecond)
				m.Add(name, 1<<20)
			}
			m.Close()
			end := "1-of-2.safetensors"
			if columns == 120 {
				end = name
			}
			line := regexp.MustCompile(`\d+ MiB of 256 MiB, \d+ MiB/s, \d+ s left  …?\S*` + regexp.QuoteMeta(end) + `\s`)
			if out := read(); !line.MatchString(out) {
				t.Errorf("no line fits %s in %q", line, out)
			}
		})
	}
}

func TestBarsOnATerminal(t *testing.T) {
	t.Parallel()
	tty, read := terminal(t, 120)
	if Choose(tty) != Bars {
		t.Fatal("a terminal gets no bars")
	}
	unsized, readUnsized := terminal(t, 0)
	if Choose(unsized) != Lines {
		t.Error("a terminal without columns gets bars, which nobody would see")
	}
	readUnsized()
	m := New(tty, Bars)
	const files, each = 40, 8 << 20
	m.Start(Plan{What: "hf://org/name@main", Files: files, Bytes: files * each})
	var work sync.WaitGroup
	for i := range files {
		work.Go(func() {
			name := fmt.Sprintf("weights-%d.safetensors", i)
			m.Open(name, each)
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
	tty, read := terminal(t, 120)
	m := New(tty, Bars)
	m.Start(Plan{What: "m", Files: 1, Bytes: 100 << 20})
	m.Open("f", 100<<20)
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
