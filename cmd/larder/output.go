package main

import (
	"encoding/json"
	"fmt"
	"io"
	"strconv"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/larder-project/larder/internal/progress"
)

// printJSON writes one object on one line.
func printJSON(w io.Writer, v any) error {
	enc := json.NewEncoder(w)
	enc.SetEscapeHTML(false)
	return enc.Encode(v)
}

// warning is what stderr gets with --json beside a result that lacks something.
type warning struct {
	Warning string `json:"warning"`
}

// warn tells of something that makes a result less than whole.
func (a *app) warn(format string, args ...any) {
	text := fmt.Sprintf(format, args...)
	if a.json {
		_ = printJSON(a.err, warning{text}) // nobody is left to tell
		return
	}
	fmt.Fprintf(a.err, "larder: %s\n", printable(text))
}

// table is what people get: columns, aligned, numbers to the right.
type table struct {
	head  []string
	right map[int]bool
	rows  [][]string
}

// newTable makes a table with these headings. A heading that begins with '>'
// heads a column that is aligned to the right.
func newTable(head ...string) *table {
	t := &table{right: map[int]bool{}}
	for i, h := range head {
		name, right := strings.CutPrefix(h, ">")
		t.right[i] = right
		t.head = append(t.head, name)
	}
	return t
}

func (t *table) add(cells ...string) { t.rows = append(t.rows, cells) }

func (t *table) print(w io.Writer) error {
	width := make([]int, len(t.head))
	all := append([][]string{t.head}, t.rows...)
	for r, row := range all {
		for c, cell := range row {
			row[c] = printable(cell)
			width[c] = max(width[c], utf8.RuneCountInString(row[c]))
		}
		all[r] = row
	}
	var b strings.Builder
	for _, row := range all {
		for c, cell := range row {
			pad := strings.Repeat(" ", width[c]-utf8.RuneCountInString(cell))
			switch {
			case t.right[c]:
				b.WriteString(pad + cell)
			case c == len(row)-1:
				b.WriteString(cell)
			default:
				b.WriteString(cell + pad)
			}
			if c < len(row)-1 {
				b.WriteString("  ")
			}
		}
		b.WriteByte('\n')
	}
	_, err := io.WriteString(w, b.String())
	return err
}

// fields prints "name: value" lines, the values aligned; empty values are left
// out.
func fields(w io.Writer, pairs ...string) error {
	wide := 0
	for i := 0; i+1 < len(pairs); i += 2 {
		if pairs[i+1] != "" {
			wide = max(wide, len(pairs[i]))
		}
	}
	for i := 0; i+1 < len(pairs); i += 2 {
		if pairs[i+1] == "" {
			continue
		}
		if _, err := fmt.Fprintf(w, "%-*s  %s\n", wide+1, pairs[i]+":", printable(pairs[i+1])); err != nil {
			return err
		}
	}
	return nil
}

// printable keeps what came from outside (names of containers, paths) from
// steering the terminal.
func printable(s string) string {
	return strings.Map(func(r rune) rune {
		if unicode.IsPrint(r) || r == ' ' {
			return r
		}
		return '\uFFFD'
	}, s)
}

// age writes how long ago something was, in the largest unit that fits.
func age(now, then time.Time) string {
	if then.IsZero() {
		return "-"
	}
	d := now.Sub(then)
	switch {
	case d < 0:
		return "in the future"
	case d < time.Minute:
		return plural(int(d/time.Second), "second") + " ago"
	case d < time.Hour:
		return plural(int(d/time.Minute), "minute") + " ago"
	case d < 48*time.Hour:
		return plural(int(d/time.Hour), "hour") + " ago"
	}
	return plural(int(d/(24*time.Hour)), "day") + " ago"
}

// plural writes "1 file", "2 files".
func plural(n int, noun string) string {
	if n == 1 {
		return "1 " + noun
	}
	return strconv.Itoa(n) + " " + noun + "s"
}

// short is a digest as people read it: twelve digits, enough to tell versions
// apart.
func short(digest string) string {
	_, hex, ok := strings.Cut(digest, ":")
	if !ok || len(hex) < 12 {
		return digest
	}
	return hex[:12]
}

// paint gives a word a colour where colours are wanted: on a terminal, with
// NO_COLOR unset or empty, and TERM other than dumb.
func (a *app) paint(colour, s string) string {
	if no, _ := a.lookup("NO_COLOR"); no != "" {
		return s
	}
	if term, _ := a.lookup("TERM"); term == "dumb" || !progress.IsTerminal(a.out) {
		return s
	}
	return "\x1b[" + colour + "m" + s + "\x1b[0m"
}

// Colours for paint.
const (
	red    = "31"
	green  = "32"
	yellow = "33"
)
