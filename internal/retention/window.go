package retention

import (
	"errors"
	"fmt"
	"strings"
	"time"
	_ "time/tzdata" // a container image may have no zones of its own, and a policy means the same there

	"github.com/robfig/cron/v3"
)

// Window is a time of the day or week at which rules may remove.
type Window struct {
	Start    string // cron expression of when it opens: minute, hour, day, month, day of the week
	Duration time.Duration
	Zone     *time.Location

	opens cron.Schedule
}

const longestWindow = 31 * day

// fiveFields has no descriptors: "@every 1h" counts from whenever it is asked,
// so nobody could say whether such a window is open.
var fiveFields = cron.NewParser(cron.Minute | cron.Hour | cron.Dom | cron.Month | cron.Dow)

// NewWindow makes a window. zone is a name of the IANA database, "Local" for
// that of the host, or empty for UTC.
func NewWindow(start string, length time.Duration, zone string) (Window, error) {
	if strings.Contains(start, "TZ=") {
		return Window{}, errors.New("give the time zone as timezone, not in start")
	}
	opens, err := fiveFields.Parse(start)
	if err != nil {
		return Window{}, fmt.Errorf("%.100q is not a cron expression of five fields (minute hour day month weekday): %w", start, err)
	}
	loc, err := time.LoadLocation(zone)
	if err != nil {
		return Window{}, fmt.Errorf("%.100q is not a time zone such as Europe/Berlin or UTC", zone)
	}
	if length <= 0 || length > longestWindow {
		return Window{}, fmt.Errorf("a window is open for up to %s", span(longestWindow))
	}
	w := Window{Start: start, Duration: length, Zone: loc, opens: opens}
	if w.Next(time.Date(2000, 1, 1, 0, 0, 0, 0, loc)).IsZero() {
		return Window{}, fmt.Errorf("%.100q never comes", start)
	}
	return w, nil
}

// Open tells whether the window is open at t.
func (w Window) Open(t time.Time) bool {
	began := w.Next(t.Add(-w.Duration))
	return !began.IsZero() && !began.After(t)
}

// Next is when the window opens for the first time after t, or zero if it never
// does. The clock on the wall may skip the time at which it is to open, or show
// it twice: then it opens up to an hour beside it, or at one of the two.
func (w Window) Next(t time.Time) time.Time {
	// By a clock that never jumps, which UTC stands for here; from earlier on,
	// because the wall's may have been put back since.
	t = t.In(w.Zone)
	_, offset := t.Zone()
	wall := t.UTC().Add(time.Duration(offset)*time.Second - clockChange)
	for {
		if wall = w.opens.Next(wall); wall.IsZero() {
			return wall
		}
		at := time.Date(wall.Year(), wall.Month(), wall.Day(), wall.Hour(), wall.Minute(), wall.Second(), 0, w.Zone)
		if at.After(t) {
			return at
		}
	}
}

// clockChange is more than clocks are put forward or back by.
const clockChange = 2 * time.Hour

// String says when the window is open.
func (w Window) String() string {
	zone := w.Zone.String()
	if w.Zone == time.Local {
		zone = "the host's own time"
	}
	return fmt.Sprintf("%q for %s, %s", w.Start, span(w.Duration), zone)
}

// Open tells whether rules may remove at t, and when a window opens for the
// first time after t; zero: there is none.
func (p *Policy) Open(t time.Time) (open bool, next time.Time) {
	open = len(p.Windows) == 0
	for _, w := range p.Windows {
		open = open || w.Open(t)
		if n := w.Next(t); next.IsZero() || !n.IsZero() && n.Before(next) {
			next = n
		}
	}
	return open, next
}
