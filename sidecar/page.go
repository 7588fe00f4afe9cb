package main

import (
	"bytes"
	"cmp"
	"crypto/sha256"
	_ "embed"
	"encoding/base64"
	"fmt"
	"html/template"
	"net/http"
	"slices"
	"strings"
	"time"

	"github.com/larder-project/larder/internal/cleanup"
	"github.com/larder-project/larder/internal/gc"
	"github.com/larder-project/larder/internal/progress"
	"github.com/larder-project/larder/internal/retention"
	"github.com/larder-project/larder/internal/store"
)

//go:embed page.html
var pageText string

//go:embed page.css
var pageStyle string

var pageTemplate = template.Must(template.New("page").Funcs(template.FuncMap{
	"bytes":  progress.Bytes,
	"plural": plural,
	"style":  func() template.HTML { return template.HTML("<style>" + pageStyle + "</style>") },
}).Parse(pageText))

// pagePolicy lets the page have its own style and nothing else: no script, no
// picture, nothing from elsewhere.
var pagePolicy = func() string {
	sum := sha256.Sum256([]byte(pageStyle))
	return "default-src 'none'; style-src 'sha256-" + base64.StdEncoding.EncodeToString(sum[:]) + "'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
}()

// How many rows a table has at most.
const (
	maxRows    = 500
	maxHistory = 50
)

// page is what the page shows. All of it is text, which the template escapes.
type page struct {
	Node, Store, Version string
	Now                  time.Time

	Ready  bool
	Checks []check

	Looked, Measured moment
	Known            bool // the store was looked at

	Space   cleanup.Space
	Parts   []part // of the file system
	Chart   chart
	Sum     numbers
	Failing string // sources that cannot tell what is in use
	Running string
	Next    string
	Last    string

	Policy  string // in words; empty: there is none
	Going   []decision
	Staying []decision
	Frees   int64
	Short   bool // what may go is not enough
	After   int64
	Hidden  int // decisions to stay that have no row

	Models []modelRows
	More   int // versions that have no row

	History []event
	Sources []sourceRow
	Nodes   []nodeRow
}

// moment is a point in time for a person, and exactly.
type moment struct {
	Ago   string
	Exact string
}

type numbers struct {
	Logical, Stored, Saved, Shared, Unique, Trash, Ingest int64
	Versions, Used, Running, Stopped, Pulls, Undo         int
	GPUs                                                  []string
}

type decision struct {
	Model, Names, Why, Rule, Reason string
	Frees                           int64
}

type modelRows struct {
	Name     string
	Bytes    int64
	Versions []versionRow
}

type versionRow struct {
	Names        []string
	Digest       string
	Size, Unique int64
	Used         moment
	Users        []string
	MoreUsers    int
	Pin, Damaged string
	Goes         string // why it goes at the next clean-up; empty: it stays
}

type event struct {
	When        moment
	What        string
	Names, Why  string
	Rule        string
	Bytes       int64
	Node        string
	RemovalName string
}

type sourceRow struct{ Name, Problem string }

type nodeRow struct {
	Name     string
	Alive    bool
	Seen     moment
	Versions int
}

// servePage writes the page.
func (n *node) servePage(w http.ResponseWriter, _ *http.Request) {
	p := n.page(time.Now())
	var out bytes.Buffer
	if err := pageTemplate.Execute(&out, p); err != nil {
		http.Error(w, "the page could not be made: "+err.Error(), http.StatusInternalServerError)
		return
	}
	h := w.Header()
	h.Set("Content-Type", "text/html; charset=utf-8")
	h.Set("Content-Security-Policy", pagePolicy)
	h.Set("Cache-Control", "no-store")
	_, _ = w.Write(out.Bytes())
}

func (n *node) page(now time.Time) page {
	s := n.loop.Status()
	p := page{Node: n.name, Store: n.store, Version: version, Now: now, Space: s.Space, Looked: ago(now, s.Looked), Measured: ago(now, s.Measured)}
	p.Checks, p.Ready = n.ready(now)
	p.Chart = drawChart(s.Samples, s.Space)
	p.runs(s, now)
	if s.Policy != nil {
		p.Policy = s.Policy.Explain()
	}
	for _, e := range slices.Backward(s.History) {
		if len(p.History) < maxHistory {
			p.History = append(p.History, events(e, now)...)
		}
	}
	for _, node := range s.Nodes {
		p.Nodes = append(p.Nodes, nodeRow{node.Name, node.Alive, ago(now, node.Seen), len(node.Versions)})
	}
	inv := s.Inventory
	if inv == nil {
		return p
	}
	p.Known = true
	p.numbers(inv, n.summaries.get(inv))
	p.Parts = parts(s.Space, inv, p.Sum)
	var failing []string
	for _, name := range n.sources {
		row := sourceRow{Name: name}
		for _, f := range inv.Failed {
			if f.Source == name {
				row.Problem = f.Err.Error()
				failing = append(failing, name)
			}
		}
		p.Sources = append(p.Sources, row)
	}
	p.Failing = strings.Join(failing, ", ")
	going := p.plan(n.loop.Plan())
	p.models(inv, going)
	return p
}

// ago tells how long ago something was.
func ago(now, t time.Time) moment {
	if t.IsZero() {
		return moment{Ago: "never"}
	}
	m := moment{Exact: t.UTC().Format("2006-01-02 15:04:05 UTC")}
	switch d := now.Sub(t); {
	case d < time.Minute:
		m.Ago = "now"
	case d < time.Hour:
		m.Ago = fmt.Sprintf("%d min ago", d/time.Minute)
	case d < 48*time.Hour:
		m.Ago = fmt.Sprintf("%d h ago", d/time.Hour)
	default:
		m.Ago = fmt.Sprintf("%d days ago", d/(24*time.Hour))
	}
	return m
}

func (p *page) runs(s cleanup.Status, now time.Time) {
	switch s.Running {
	case cleanup.Schedule:
		p.Running = "A clean-up is running."
	case cleanup.Pressure:
		p.Running = "A clean-up is running, because space is short."
	}
	if d := s.NextRun.Sub(now); !s.NextRun.IsZero() && s.Running == "" {
		p.Next = "in " + progress.Duration(max(d, 0))
	}
	if s.Last == nil {
		return
	}
	versions, size := s.Last.Report.Removed()
	p.Last = fmt.Sprintf("%s: removed %s, %s", ago(now, s.Last.Ended).Ago, plural(versions, "version"), progress.Bytes(size))
	if s.Last.Report.Freed+s.Last.Report.Dropped > 0 {
		p.Last += ", gave back " + progress.Bytes(s.Last.Report.Freed+s.Last.Report.Dropped)
	}
	if s.Last.Err != nil {
		p.Last = fmt.Sprintf("%s, failed: %v", ago(now, s.Last.Ended).Ago, s.Last.Err)
	}
}

func plural(n int, word string) string {
	if n == 1 {
		return "1 " + word
	}
	return fmt.Sprintf("%d %ss", n, word)
}

func (p *page) numbers(inv *gc.Inventory, sum summary) {
	p.Sum = numbers{
		Logical: sum.logical, Stored: sum.stored, Saved: sum.logical - sum.stored, Shared: sum.shared, Unique: sum.unique,
		Trash: inv.Usage.Trash, Ingest: inv.Usage.Ingest,
		Versions: len(inv.Versions), Used: sum.used, Running: sum.containers.Running, Stopped: sum.containers.Stopped,
		Pulls: sum.pulls, Undo: len(inv.Trash), GPUs: sum.gpus,
	}
}

// plan lists what the plan says, and gives why each version goes that does.
func (p *page) plan(plan *retention.Plan) (going map[string]string) {
	going = map[string]string{}
	if plan == nil {
		return going
	}
	p.Frees = plan.Frees
	if plan.Pressure != nil {
		p.Short, p.After = plan.Pressure.Short, plan.Pressure.After
	}
	for _, d := range plan.Decisions {
		row := decision{Model: d.Model, Names: strings.Join(d.References, ", "), Why: d.Why, Rule: d.Rule, Reason: string(d.Reason), Frees: d.Frees}
		if row.Names == "" {
			row.Names = short(d.Digest.Encoded())
		}
		switch {
		case d.Remove:
			going[string(d.Digest)] = d.Why
			if len(p.Going) < maxRows {
				p.Going = append(p.Going, row)
			}
		case len(p.Staying) < maxRows:
			p.Staying = append(p.Staying, row)
		default:
			p.Hidden++
		}
	}
	return going
}

func short(hex string) string { return hex[:min(12, len(hex))] }

// models lists the versions by their models, the largest model first.
func (p *page) models(inv *gc.Inventory, going map[string]string) {
	byModel := map[string]*modelRows{}
	var all []*modelRows
	for i := range inv.Versions {
		v := &inv.Versions[i]
		name := cleanup.ModelOf(v.References, v.Digest)
		m := byModel[name]
		if m == nil {
			m = &modelRows{Name: name}
			byModel[name] = m
			all = append(all, m)
		}
		m.Bytes += v.Unique
		row := versionRow{
			Names: v.References, Digest: short(v.Digest.Encoded()), Size: v.Size, Unique: v.Unique, Used: ago(inv.Time, v.LastUsed),
			Damaged: v.Damaged, Goes: going[string(v.Digest)],
		}
		if len(v.Uses) > 0 {
			row.Used = moment{Ago: "in use"}
		}
		if v.Pin != nil {
			row.Pin = v.Pin.Text()
		}
		for _, u := range v.Uses {
			switch {
			case slices.Contains(row.Users, u.By):
			case len(row.Users) < 4:
				row.Users = append(row.Users, u.By)
			default:
				row.MoreUsers++
			}
		}
		m.Versions = append(m.Versions, row)
	}
	slices.SortStableFunc(all, func(a, b *modelRows) int {
		return cmp.Or(cmp.Compare(b.size(), a.size()), cmp.Compare(a.Name, b.Name))
	})
	rows := 0
	for _, m := range all {
		if left := maxRows - rows; len(m.Versions) > left {
			p.More += len(m.Versions) - left
			m.Versions = m.Versions[:left]
		}
		rows += len(m.Versions)
		if len(m.Versions) > 0 {
			p.Models = append(p.Models, *m)
		}
	}
}

func (m *modelRows) size() (n int64) {
	for _, v := range m.Versions {
		n = max(n, v.Size)
	}
	return n + m.Bytes
}

// events are the rows of one event: one for each version, or one for files that
// were no version's.
func events(e store.Event, now time.Time) []event {
	words := map[string]string{store.Removed: "removed", store.Restored: "brought back", store.Deleted: "deleted for good"}
	row := event{When: ago(now, e.Time), What: cmp.Or(words[e.Event], e.Event), Names: plural(e.Blobs, "file") + " that no version needs", Why: e.Reason, Bytes: e.Bytes, Node: e.Node, RemovalName: e.Removal}
	if len(e.Versions) == 0 {
		return []event{row}
	}
	var out []event
	for _, v := range e.Versions {
		r := row
		r.Names, r.Why, r.Rule, r.Bytes = strings.Join(v.References, ", "), cmp.Or(v.Why, e.Reason), v.Rule, v.Bytes
		if r.Names == "" {
			r.Names = short(v.Digest.Encoded())
		}
		out = append(out, r)
	}
	return out
}
