package retention

import (
	"fmt"
	"regexp"
	"strconv"
	"strings"
	"time"
)

var daysAndWeeks = regexp.MustCompile(`[0-9]+(\.[0-9]+)?[dw]`)

// ParseDuration reads a duration as Go writes it, with d for days of 24 hours
// and w for weeks: "30d", "1h30m", "1w12h".
func ParseDuration(s string) (time.Duration, error) {
	inHours := daysAndWeeks.ReplaceAllStringFunc(s, func(part string) string {
		n, err := strconv.ParseFloat(part[:len(part)-1], 64)
		if err != nil {
			return part
		}
		hours := 24.0
		if strings.HasSuffix(part, "w") {
			hours *= 7
		}
		return strconv.FormatFloat(n*hours, 'f', -1, 64) + "h"
	})
	d, err := time.ParseDuration(inHours)
	if err != nil {
		return 0, fmt.Errorf("%.50q is not a duration such as 30d, 12h or 1w", s)
	}
	return d, nil
}

// FormatDuration is how ParseDuration reads it, short: "30d", "1h30m".
func FormatDuration(d time.Duration) string {
	if d != 0 && d%day == 0 {
		return strconv.FormatInt(int64(d/day), 10) + "d"
	}
	s := d.String()
	if cut, ok := strings.CutSuffix(s, "m0s"); ok {
		s = cut + "m"
	}
	if cut, ok := strings.CutSuffix(s, "h0m"); ok {
		s = cut + "h"
	}
	return s
}

// span writes a duration for people, whole: "30 days", "90 minutes".
func span(d time.Duration) string {
	switch {
	case d != 0 && d%day == 0:
		return count(int64(d/day), "day")
	case d != 0 && d%time.Hour == 0:
		return count(int64(d/time.Hour), "hour")
	case d != 0 && d%time.Minute == 0:
		return count(int64(d/time.Minute), "minute")
	case d%time.Second == 0:
		return count(int64(d/time.Second), "second")
	}
	return d.String()
}

// every writes how often: "every hour", "every 30 minutes".
func every(d time.Duration) string { return "every " + strings.TrimPrefix(span(d), "1 ") }

// age writes how long something is past, in full units: "41 days".
func age(d time.Duration) string {
	switch {
	case d < time.Minute:
		return span(d.Truncate(time.Second))
	case d < time.Hour:
		return count(int64(d/time.Minute), "minute")
	case d < 2*day:
		return count(int64(d/time.Hour), "hour")
	}
	return count(int64(d/day), "day")
}

func count(n int64, noun string) string {
	if n == 1 {
		return "1 " + noun
	}
	return strconv.FormatInt(n, 10) + " " + noun + "s"
}
