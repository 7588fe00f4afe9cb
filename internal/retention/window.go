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

// Next is when the window opens for the first time after t.
func (w Window) Next(t time.Time) time.Time { return w.opens.Next(t.In(w.Zone)) }

// String says when the window is open.
func (w Window) String() string {
	zone := w.Zone.String()
	if w.Zone == time.Local {
		zone = "the host's own time"
	}
	return fmt.Sprintf("%q for %s, %s", w.Start, span(w.Duration), zone)
}

// Open tells whether rules may remove at t, and if not, when they may next.
func (p *Policy) Open(t time.Time) (open bool, next time.Time) {
	for _, w := range p.Windows {
		if w.Open(t) {
			return true, time.Time{}
		}
		if n := w.Next(t); next.IsZero() || n.Before(next) {
			next = n
		}
	}
	return len(p.Windows) == 0, next
}
