package main

import (
	"fmt"
	"io"
	"math"
	"os"
	"slices"
	"strings"
	"text/tabwriter"
	"time"
)

// figure is one result: what Larder takes, what something else takes, and the
// number that must meet a bar.
type figure struct {
	Part    int     `json:"part"`
	What    string  `json:"what"`
	Larder  string  `json:"larder"`           // for people: "12 ms", "1.05 GiB"
	Beside  string  `json:"beside,omitempty"` // the same of the other way
	Other   string  `json:"other,omitempty"`  // which way that is
	Value   float64 `json:"value"`            // what is judged
	Unit    string  `json:"unit"`             // "×" or "MB"
	Bar     float64 `json:"bar"`
	AtLeast bool    `json:"at_least"` // the value must be at least Bar; else at most
	Space   bool    `json:"space"`    // no time in it: judged at any size
	Pass    bool    `json:"pass"`
	Binding bool    `json:"binding"`
}

// atMost and atLeast judge a value.
func (f figure) atMost(value, bar float64, unit string) figure {
	f.Value, f.Bar, f.Unit = value, bar, unit
	f.Pass = value <= bar
	return f
}

func (f figure) atLeast(value, bar float64, unit string) figure {
	f.Value, f.Bar, f.Unit, f.AtLeast = value, bar, unit, true
	f.Pass = value >= bar
	return f
}

func (f figure) verdict() string {
	switch {
	case f.Pass:
		return "PASS"
	case !f.Binding:
		return "not judged"
	}
	return "FAIL"
}

func (f figure) bar() string {
	sign := "≤"
	if f.AtLeast {
		sign = "≥"
	}
	return fmt.Sprintf("%s %s %s", sign, number(f.Bar), f.Unit)
}

// number is short and keeps three digits.
func number(v float64) string {
	switch {
	case v >= 100 || v == math.Trunc(v):
		return fmt.Sprintf("%.0f", v)
	case v >= 10:
		return fmt.Sprintf("%.1f", v)
	case v >= 0.1:
		return fmt.Sprintf("%.2f", v)
	}
	return fmt.Sprintf("%.4f", v)
}

func (f figure) String() string {
	return fmt.Sprintf("%s: %s, beside %s (%s): %s %s, must be %s: %s",
		f.What, f.Larder, f.Beside, f.Other, number(f.Value), f.Unit, f.bar(), f.verdict())
}

// printTable writes all figures in a form that is good Markdown too.
func printTable(out io.Writer, b *bench, began time.Time) error {
	m := thisMachine()
	fmt.Fprintf(out, "\n%s. %s, %s.\n\n", m, began.UTC().Format("2006-01-02"), time.Since(began).Round(time.Second))
	figures := slices.Clone(b.figures)
	slices.SortStableFunc(figures, func(a, b figure) int { return a.Part - b.Part })
	w := tabwriter.NewWriter(out, 0, 0, 1, ' ', 0)
	row := func(cells ...string) { fmt.Fprintln(w, "| "+strings.Join(cells, "\t| ")+"\t|") }
	row("part", "what", "Larder", "beside it", "figure", "bar", "verdict")
	row("---", "---", "---", "---", "---", "---", "---")
	for _, f := range figures {
		beside := f.Other
		if f.Beside != "" {
			beside = f.Beside + " " + f.Other
		}
		row(fmt.Sprint(f.Part), f.What, f.Larder, beside, number(f.Value)+" "+f.Unit, f.bar(), f.verdict())
	}
	return w.Flush()
}

// size writes bytes for people.
func size(n int64) string {
	switch {
	case n >= gib:
		return fmt.Sprintf("%.2f GiB", float64(n)/float64(gib))
	case n >= mib:
		return fmt.Sprintf("%.1f MiB", float64(n)/float64(mib))
	}
	return fmt.Sprintf("%.1f KiB", float64(n)/float64(kib))
}

// span writes a time for people.
func span(d time.Duration) string {
	switch {
	case d >= time.Second:
		return fmt.Sprintf("%.2f s", d.Seconds())
	case d >= time.Millisecond:
		return fmt.Sprintf("%.2f ms", float64(d)/float64(time.Millisecond))
	}
	return fmt.Sprintf("%.0f µs", float64(d)/float64(time.Microsecond))
}

// rate writes bytes in a time.
func rate(n int64, d time.Duration) string {
	return fmt.Sprintf("%.0f MB/s", float64(n)/1e6/d.Seconds())
}

// percentile is the smallest sample that p of all samples do not exceed; p in
// (0, 1].
func percentile(samples []time.Duration, p float64) time.Duration {
	sorted := slices.Sorted(slices.Values(samples))
	return sorted[max(0, int(math.Ceil(p*float64(len(sorted))))-1)]
}

func median(samples []time.Duration) time.Duration { return percentile(samples, 0.5) }

// ratio is a by b.
func ratio(a, b time.Duration) float64 { return float64(a) / float64(b) }

// medianRatio is the median of the ratios of pairs taken together: what the
// machine does meanwhile weighs on both sides of a pair.
func medianRatio(a, b []time.Duration) float64 {
	ratios := make([]float64, len(a))
	for i := range a {
		ratios[i] = ratio(a[i], b[i])
	}
	slices.Sort(ratios)
	n := len(ratios)
	if n%2 == 1 {
		return ratios[n/2]
	}
	return (ratios[n/2-1] + ratios[n/2]) / 2
}

// machine is where the figures were taken.
type machine struct {
	Processor string `json:"processor"`
	Cores     int    `json:"cores"`
	Memory    int64  `json:"memory"`
	Kernel    string `json:"kernel"`
	Engine    string `json:"engine,omitempty"`
}

func (m machine) String() string {
	return fmt.Sprintf("%s, %d cores, %s, Linux %s", m.Processor, m.Cores, size(m.Memory), m.Kernel)
}

func line(path, prefix string) string {
	data, err := os.ReadFile(path)
	if err != nil {
		return ""
	}
	for _, l := range strings.Split(string(data), "\n") {
		if rest, ok := strings.CutPrefix(l, prefix); ok {
			return strings.TrimSpace(strings.TrimLeft(rest, " \t:"))
		}
	}
	return ""
}
