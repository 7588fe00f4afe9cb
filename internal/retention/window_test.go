package retention

import (
	"strings"
	"testing"
	"time"
)

func window(t interface{ Fatal(...any) }, start string, length time.Duration, zone string) Window {
	w, err := NewWindow(start, length, zone)
	if err != nil {
		t.Fatal(err)
	}
	return w
}

func TestWindowIsOpenFromItsStartForItsDuration(t *testing.T) {
	t.Parallel()
	for _, tc := range []struct {
		start, zone string
		length      time.Duration
		at          string
		open        bool
	}{
		{"0 2 * * *", "", 4 * time.Hour, "2026-03-04T01:59:59Z", false},
		{"0 2 * * *", "", 4 * time.Hour, "2026-03-04T02:00:00Z", true},
		{"0 2 * * *", "", 4 * time.Hour, "2026-03-04T05:59:59Z", true},
		{"0 2 * * *", "", 4 * time.Hour, "2026-03-04T06:00:00Z", false},
		{"0 2 * * *", "Europe/Berlin", 4 * time.Hour, "2026-03-04T01:00:00Z", true},
		{"0 2 * * *", "Europe/Berlin", 4 * time.Hour, "2026-07-04T00:00:00Z", true}, // summer time
		{"0 2 * * *", "Europe/Berlin", 4 * time.Hour, "2026-07-04T04:00:00Z", false},
		{"0 22 * * *", "", 4 * time.Hour, "2026-03-04T01:00:00Z", true}, // over midnight
		{"0 0 * * 6,0", "", 24 * time.Hour, "2026-03-07T12:00:00Z", true},
		{"0 0 * * 6,0", "", 24 * time.Hour, "2026-03-09T00:00:00Z", false},
		{"0 * * * *", "", 2 * time.Hour, "2026-03-04T12:34:56Z", true}, // longer than its period
		{"0 2 * * *", "", time.Nanosecond, "2026-03-04T02:00:00Z", true},
	} {
		at, err := time.Parse(time.RFC3339, tc.at)
		if err != nil {
			t.Fatal(err)
		}
		if got := window(t, tc.start, tc.length, tc.zone).Open(at); got != tc.open {
			t.Errorf("%q for %s in %q at %s: open is %t", tc.start, tc.length, tc.zone, tc.at, got)
		}
	}
}

// Where the hour of its start is skipped or comes twice, as clocks are put
// forward or back, a window is open all the same, once and no longer.
func TestWindowOpensOnceANightForItsDurationWhateverClocksDo(t *testing.T) {
	t.Parallel()
	for _, zone := range []string{"Europe/Berlin", "America/New_York", "Australia/Lord_Howe"} {
		for _, start := range []string{"0 2 * * *", "30 2 * * *", "0 0 * * *", "30 1 * * *", "59 2 * * *"} {
			w := window(t, start, 4*time.Hour, zone)
			for day := range 365 {
				noon := time.Date(2026, 1, 1+day, 12, 0, 0, 0, w.Zone)
				if tomorrow := noon.AddDate(0, 0, 1); tomorrow.Sub(noon) != 24*time.Hour {
					opensOnceBetween(t, w, noon, tomorrow)
				}
			}
		}
	}
}

func opensOnceBetween(t *testing.T, w Window, from, to time.Time) {
	t.Helper()
	opened, minutes, before := 0, 0, false
	for at := from; at.Before(to); at = at.Add(time.Minute) {
		open := w.Open(at)
		if open {
			minutes++
		}
		if open && !before {
			opened++
			for _, early := range []time.Duration{time.Second, 20 * time.Minute, 100 * time.Minute} {
				if next := w.Next(at.Add(-early)); !next.Equal(at) {
					t.Errorf("%s opens at %s; %s before, it was to open at %s", w, at, early, next)
				}
			}
		}
		before = open
	}
	if opened != 1 || minutes != int(w.Duration/time.Minute) {
		t.Errorf("%s opens %d times from %s on, for %d minutes", w, opened, from, minutes)
	}
}

func TestPolicyIsOpenWhenOneOfItsWindowsIs(t *testing.T) {
	t.Parallel()
	p := None()
	if open, _ := p.Open(now); !open {
		t.Error("closed without windows")
	}
	p.Windows = []Window{window(t, "0 2 * * *", time.Hour, ""), window(t, "0 20 * * *", time.Hour, "")}
	open, next := p.Open(now)
	if open || next.Format(time.RFC3339) != "2026-03-04T20:00:00Z" {
		t.Errorf("at %s: %t, next %s", now, open, next)
	}
	if open, _ := p.Open(next.Add(time.Minute)); !open {
		t.Error("closed within the second window")
	}
}

func TestWindowsThatCannotBeAreRefused(t *testing.T) {
	t.Parallel()
	for _, tc := range []struct {
		start, zone string
		length      time.Duration
		want        string
	}{
		{"", "", time.Hour, "not a cron expression"},
		{"0 2 * *", "", time.Hour, "of five fields"},
		{"@every 1h", "", time.Hour, "not a cron expression"},
		{"TZ=UTC", "", time.Hour, "give the time zone as timezone"},
		{"0 0 30 2 *", "", time.Hour, "never comes"},
		{"0 2 * * *", "Mars/Olympus", time.Hour, "not a time zone"},
		{"0 2 * * *", "../../etc/passwd", time.Hour, "not a time zone"},
		{"0 2 * * *", "", 0, "up to 31 days"},
		{"0 2 * * *", "", 32 * day, "up to 31 days"},
	} {
		if _, err := NewWindow(tc.start, tc.length, tc.zone); err == nil || !strings.Contains(err.Error(), tc.want) {
			t.Errorf("%q for %s in %q: got %v, want %q", tc.start, tc.length, tc.zone, err, tc.want)
		}
	}
}
