package main

import (
	"fmt"
	"strings"
	"time"

	"github.com/larder-project/larder/internal/cleanup"
	"github.com/larder-project/larder/internal/gc"
	"github.com/larder-project/larder/internal/progress"
)

// part is a part of the file system, drawn as a part of a bar.
type part struct {
	Class, Name, Note string
	Bytes             int64
	X, Width          string // of 1000
}

// parts divides the file system.
func parts(s cleanup.Space, inv *gc.Inventory, sum numbers) []part {
	if s.Capacity <= 0 {
		return nil
	}
	used := s.Capacity - s.Free
	ours := sum.Stored + sum.Trash + sum.Ingest
	leftovers := max(0, inv.Usage.Blobs-sum.Stored)
	all := []part{
		{Class: "shared", Name: "Shared", Note: "files that several versions have", Bytes: sum.Shared},
		{Class: "unique", Name: "Of one version", Note: "files that one version alone has", Bytes: sum.Unique},
		{Class: "ingest", Name: "Downloads and leftovers", Note: "under way, cut short, or of no version", Bytes: sum.Ingest + leftovers},
		{Class: "trash", Name: "Trash", Note: "removed, can be brought back", Bytes: sum.Trash},
		{Class: "other", Name: "Everything else", Note: "of this file system: what containers wrote, other programs, its own use", Bytes: max(0, used-ours-leftovers)},
		{Class: "free", Name: "Free", Note: "for use", Bytes: s.Free},
	}
	var whole int64
	for _, p := range all {
		whole += p.Bytes
	}
	x := 0.0
	for i := range all {
		width := 1000 * float64(all[i].Bytes) / float64(max(whole, 1))
		all[i].X, all[i].Width = fmt.Sprintf("%.2f", x), fmt.Sprintf("%.2f", width)
		x += width
	}
	return all
}

// chart is free space over time, as lines in a field of 1000 by 240.
type chart struct {
	Free, Area, Limit string // points; Limit is empty where there is none
	Top               string // what the upper edge is
	From, To          string
	Days              []tick
	Lowest, Newest    int64
}

type tick struct {
	X    string
	Text string
}

const (
	chartWidth  = 1000.0
	chartHeight = 240.0
)

func drawChart(samples []cleanup.Sample, s cleanup.Space) chart {
	if len(samples) < 2 {
		return chart{}
	}
	first, last := samples[0].Time, samples[len(samples)-1].Time
	top := int64(1)
	for _, p := range samples {
		top = max(top, p.Free, p.Limit)
	}
	top = min(top+top/10, max(s.Capacity, top))
	x := func(t time.Time) float64 { return chartWidth * float64(t.Sub(first)) / float64(last.Sub(first)) }
	y := func(bytes int64) float64 { return chartHeight * (1 - float64(bytes)/float64(top)) }
	c := chart{
		Top: progress.Bytes(top), From: first.UTC().Format("Mon 2 Jan 15:04"), To: last.UTC().Format("Mon 2 Jan 15:04 UTC"),
		Lowest: samples[0].Free, Newest: samples[len(samples)-1].Free,
	}
	var free, limit strings.Builder
	limited := false
	for _, p := range samples {
		fmt.Fprintf(&free, "%.1f,%.1f ", x(p.Time), y(p.Free))
		fmt.Fprintf(&limit, "%.1f,%.1f ", x(p.Time), y(p.Limit))
		limited = limited || p.Limit > 0
		c.Lowest = min(c.Lowest, p.Free)
	}
	c.Free = strings.TrimSpace(free.String())
	c.Area = fmt.Sprintf("0,%.0f %s %.0f,%.0f", chartHeight, c.Free, chartWidth, chartHeight)
	if limited {
		c.Limit = strings.TrimSpace(limit.String())
	}
	for day := first.UTC().Truncate(24 * time.Hour).Add(24 * time.Hour); day.Before(last); day = day.Add(24 * time.Hour) {
		c.Days = append(c.Days, tick{X: fmt.Sprintf("%.1f", x(day)), Text: day.Format("2 Jan")})
	}
	return c
}
