package retention

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"

	"go.yaml.in/yaml/v3"
)

// ErrInvalid is wrapped by every refusal of a policy.
var ErrInvalid = errors.New("not a valid policy")

// InvalidError lists everything that is wrong with a policy file.
type InvalidError struct {
	Name     string // of the file
	Problems []Problem
}

// Problem is one thing that is wrong.
type Problem struct {
	Line int // in the file, from 1; 0: the file as a whole
	Text string
}

// Error says everything, one problem a line.
func (e *InvalidError) Error() string {
	lines := []string{fmt.Sprintf("%s is %v:", e.Name, ErrInvalid)}
	for _, p := range e.Problems {
		at := e.Name
		if p.Line > 0 {
			at = fmt.Sprintf("%s:%d", e.Name, p.Line)
		}
		lines = append(lines, at+": "+p.Text)
	}
	return strings.Join(lines, "\n")
}

// Is makes errors.Is(err, ErrInvalid) true.
func (e *InvalidError) Is(target error) bool { return target == ErrInvalid }

// maxFile bounds a policy file, in bytes.
const maxFile = 1 << 20

// origin is where a value of a policy was set.
type origin struct {
	profile string // empty: in the file itself
	line    int
}

// Parse reads a policy file. It takes nothing that it does not understand: the
// error is an *InvalidError with all problems.
func Parse(name string, data []byte) (*Policy, error) {
	r := reader{}
	root := r.document(data)
	if root != nil {
		r.policy(name, root)
	}
	if len(r.problems) > 0 {
		slices.SortStableFunc(r.problems, func(a, b Problem) int { return a.Line - b.Line })
		return nil, &InvalidError{Name: name, Problems: r.problems}
	}
	return r.p, nil
}

// reader walks the nodes of a file itself, because a decoder into a struct
// stops at the first problem and names Go types.
type reader struct {
	p        *Policy
	problems []Problem
}

func (r *reader) refuse(line int, format string, args ...any) {
	r.problems = append(r.problems, Problem{line, fmt.Sprintf(format, args...)})
}

// document gives the one mapping that a file is, or nil.
func (r *reader) document(data []byte) *yaml.Node {
	if len(data) > maxFile {
		r.refuse(0, "it is larger than 1 MiB")
		return nil
	}
	dec := yaml.NewDecoder(bytes.NewReader(data))
	var doc, more yaml.Node
	switch err := dec.Decode(&doc); {
	case errors.Is(err, io.EOF):
		r.refuse(0, "it is empty; a policy begins with version: 1")
		return nil
	case err != nil:
		r.refuse(0, "%s", strings.TrimPrefix(err.Error(), "yaml: "))
		return nil
	}
	switch err := dec.Decode(&more); {
	case err == nil:
		r.refuse(more.Line, "a second document; a policy is one")
		return nil
	case !errors.Is(err, io.EOF):
		r.refuse(0, "%s", strings.TrimPrefix(err.Error(), "yaml: "))
		return nil
	}
	root := doc.Content[0]
	if root.Kind != yaml.MappingNode {
		r.refuse(root.Line, "it is not a list of KEY: VALUE; a policy begins with version: 1")
		return nil
	}
	return root
}

// field is one key that a mapping may have.
type field struct {
	name string
	read func(key string, n *yaml.Node) // key is the whole name: "trash.hold"
}

// mapping reads a node's keys, each at most once.
func (r *reader) mapping(where string, n *yaml.Node, fields ...field) {
	if n.Kind != yaml.MappingNode {
		r.refuse(n.Line, "%s takes %s", where, keysOf(fields))
		return
	}
	prefix := ""
	if where != "" {
		prefix = where + "."
	}
	seen := map[string]int{}
	for i := 0; i+1 < len(n.Content); i += 2 {
		k, v := n.Content[i], n.Content[i+1]
		if k.Kind != yaml.ScalarNode || k.Tag != "!!str" {
			r.refuse(k.Line, "a key that is not a word; known are %s", keysOf(fields))
			continue
		}
		if first, twice := seen[k.Value]; twice {
			r.refuse(k.Line, "%s%.100s is set twice, first on line %d", prefix, k.Value, first)
			continue
		}
		seen[k.Value] = k.Line
		at := slices.IndexFunc(fields, func(f field) bool { return f.name == k.Value })
		if at < 0 {
			r.unknown(prefix, k, fields)
			continue
		}
		key := prefix + k.Value
		r.p.origins[key] = origin{line: k.Line}
		fields[at].read(key, v)
	}
}

func (r *reader) unknown(prefix string, k *yaml.Node, fields []field) {
	plain := func(s string) string { return strings.ToLower(strings.NewReplacer("-", "", "_", "").Replace(s)) }
	for _, f := range fields {
		if plain(f.name) == plain(k.Value) {
			r.refuse(k.Line, "unknown key %q; did you mean %s?", prefix+k.Value, f.name)
			return
		}
	}
	r.refuse(k.Line, "unknown key %.100q; known are %s", prefix+k.Value, keysOf(fields))
}

func keysOf(fields []field) string {
	names := make([]string, len(fields))
	for i, f := range fields {
		names[i] = f.name
	}
	return strings.Join(names, ", ")
}

// scalar gives a node's text if it has one of these tags.
func (r *reader) scalar(key string, n *yaml.Node, what string, tags ...string) (string, bool) {
	if n.Kind != yaml.ScalarNode || !slices.Contains(tags, n.Tag) {
		r.refuse(n.Line, "%s takes %s", key, what)
		return "", false
	}
	return n.Value, true
}

func (r *reader) text(put func(string) error) func(string, *yaml.Node) {
	return func(key string, n *yaml.Node) {
		if s, ok := r.scalar(key, n, "text", "!!str"); ok {
			if err := put(s); err != nil {
				r.refuse(n.Line, "%s: %v", key, err)
			}
		}
	}
}

// duration reads one from least on.
func (r *reader) duration(to *time.Duration, least time.Duration) func(string, *yaml.Node) {
	return func(key string, n *yaml.Node) {
		const what = "a duration such as 30d, 12h or 1w"
		s, ok := r.scalar(key, n, what, "!!str", "!!int")
		if !ok {
			return
		}
		d, err := ParseDuration(s)
		switch {
		case err != nil:
			r.refuse(n.Line, "%s takes %s, %.50q is none", key, what, s)
		case d < least:
			r.refuse(n.Line, "%s is at least %s", key, FormatDuration(least))
		default:
			*to = d
		}
	}
}

const maxCount = 1_000_000

func (r *reader) count(to *int, least int) func(string, *yaml.Node) {
	return func(key string, n *yaml.Node) {
		s, ok := r.scalar(key, n, "a number", "!!int")
		if !ok {
			return
		}
		v, err := strconv.Atoi(s)
		if err != nil || v < least || v > maxCount {
			r.refuse(n.Line, "%s is a number from %d to %d", key, least, maxCount)
			return
		}
		*to = v
	}
}

func (r *reader) yes(to *bool) func(string, *yaml.Node) {
	return func(key string, n *yaml.Node) {
		if s, ok := r.scalar(key, n, "true or false", "!!bool"); ok {
			*to = strings.EqualFold(s, "true")
		}
	}
}

// off tells whether a section says that it is switched off.
func off(n *yaml.Node) bool { return n.Kind == yaml.ScalarNode && n.Tag == "!!str" && n.Value == "off" }

// policy reads the whole file over the profile that it names.
func (r *reader) policy(name string, root *yaml.Node) {
	r.p = None()
	r.p.origins = map[string]origin{}
	profile := ""
	if n := valueOf(root, "profile"); n != nil && n.Tag == "!!str" {
		if base, err := Profile(n.Value); err == nil {
			r.p, profile = base, n.Value
		} else {
			r.refuse(n.Line, "%v", err)
		}
	}
	r.p.Name, r.p.Profile = name, profile
	if valueOf(root, "version") == nil {
		r.refuse(root.Line, "version: 1 is missing")
	}
	r.mapping("", root,
		field{"version", r.version},
		field{"profile", func(key string, n *yaml.Node) { r.scalar(key, n, "the name of a profile", "!!str") }},
		field{"rules", r.rules},
		field{"pressure", r.pressure},
		field{"trash", func(key string, n *yaml.Node) {
			r.mapping(key, n, field{"hold", r.duration(&r.p.TrashHold, 0)})
		}},
		field{"unfinished", func(key string, n *yaml.Node) {
			r.mapping(key, n, field{"hold", r.duration(&r.p.UnfinishedHold, 0)})
		}},
		field{"windows", r.windows},
		field{"limits", r.limits},
		field{"interval", r.duration(&r.p.Interval, time.Second)},
	)
}

func valueOf(mapping *yaml.Node, key string) *yaml.Node {
	for i := 0; i+1 < len(mapping.Content); i += 2 {
		if mapping.Content[i].Value == key {
			return mapping.Content[i+1]
		}
	}
	return nil
}

func (r *reader) version(key string, n *yaml.Node) {
	if s, ok := r.scalar(key, n, "the number 1", "!!int"); ok && s != "1" {
		r.refuse(n.Line, "version %.20s is not known here; this Larder reads version 1", s)
	}
}

func (r *reader) rules(key string, n *yaml.Node) {
	if n.Kind != yaml.SequenceNode {
		r.refuse(n.Line, "rules takes a list; leave it out, or write [] for none")
		return
	}
	maps.DeleteFunc(r.p.origins, func(k string, _ origin) bool { return strings.HasPrefix(k, key+"[") })
	r.p.Rules = nil
	for i, node := range n.Content {
		at := fmt.Sprintf("%s[%d]", key, i)
		r.p.origins[at] = origin{line: node.Line}
		r.p.Rules = append(r.p.Rules, r.rule(at, node))
	}
}

func (r *reader) rule(where string, n *yaml.Node) Rule {
	rule := Rule{Rollback: DefaultRollback, MinAge: DefaultMinAge}
	before := len(r.problems)
	r.mapping(where, n,
		field{"models", func(key string, n *yaml.Node) { rule.Models = r.patterns(key, n) }},
		field{"protect", r.yes(&rule.Protect)},
		field{"newestPatch", r.yes(&rule.NewestPatch)},
		field{"keepNewest", r.count(&rule.KeepNewest, 1)},
		field{"unusedFor", r.duration(&rule.UnusedFor, time.Second)},
		field{"abandonedFor", r.duration(&rule.AbandonedFor, time.Second)},
		field{"rollback", r.count(&rule.Rollback, 0)},
		field{"minAge", r.duration(&rule.MinAge, 0)},
	)
	if n.Kind == yaml.MappingNode && valueOf(n, "models") == nil {
		r.refuse(n.Line, `%s has no models; write models: ["*"] for all`, where)
	}
	if len(r.problems) > before {
		return rule
	}
	switch {
	case rule.Protect && rule.removes():
		r.refuse(n.Line, "%s protects all versions, so that its other conditions mean nothing; make two rules of it", where)
	case !rule.Protect && !rule.removes():
		r.refuse(n.Line, "%s would keep everything; say protect: true if that is meant, or give newestPatch, keepNewest, unusedFor or abandonedFor", where)
	case rule.AbandonedFor > 0 && rule.AbandonedFor < rule.UnusedFor:
		r.refuse(n.Line, "%s: abandonedFor (%s) is shorter than unusedFor (%s)", where, FormatDuration(rule.AbandonedFor), FormatDuration(rule.UnusedFor))
	}
	return rule
}

func (r *reader) patterns(key string, n *yaml.Node) []string {
	const what = `a list of patterns such as ["qwen", "hf://Qwen/*"]`
	if n.Kind != yaml.SequenceNode {
		r.refuse(n.Line, "%s takes %s", key, what)
		return nil
	}
	if len(n.Content) == 0 {
		r.refuse(n.Line, `%s is empty; write ["*"] for all`, key)
	}
	var out []string
	for i, node := range n.Content {
		s, ok := r.scalar(fmt.Sprintf("%s[%d]", key, i), node, "a pattern in quotes", "!!str")
		if !ok {
			continue
		}
		if err := checkPattern(s); err != nil {
			r.refuse(node.Line, "%s: %v", key, err)
			continue
		}
		out = append(out, s)
	}
	return out
}

// checkPattern refuses what can fit no model: a rule that protects would seem
// to protect.
func checkPattern(s string) error {
	name, _ := strings.CutPrefix(s, "hf://")
	switch {
	case s == "":
		return errors.New("a pattern is empty")
	case len(s) > 512:
		return errors.New("a pattern is longer than 512 bytes")
	case !strings.Contains(s, "[") && strings.ContainsAny(name, ":@"):
		return fmt.Errorf("%.100q has a tag or a revision, and a rule is about a model: write %.100q; one version alone is kept by larder pin", s, s[:len(s)-len(name)+strings.IndexAny(name, ":@")])
	}
	return nil
}

func (r *reader) pressure(key string, n *yaml.Node) {
	if off(n) {
		r.p.Pressure = nil
		maps.DeleteFunc(r.p.origins, func(k string, _ origin) bool { return strings.HasPrefix(k, key+".") })
		return
	}
	before := len(r.problems)
	var given Watermarks
	if p := r.p.Pressure; p != nil {
		given = *p
	}
	base := given.MinFree
	r.mapping(key, n,
		field{"minFree", r.amount(&given.MinFree, maxMinFree)},
		field{"target", r.amount(&given.Target, maxTarget)},
	)
	if len(r.problems) > before {
		return
	}
	from, said := r.p.origins[key+".target"]
	inFile := said && from.profile == ""
	switch {
	case given.MinFree == Amount{}:
		r.refuse(n.Line, "pressure needs minFree, such as 10%% or 50GiB; write pressure: off for none")
		return
	case given.Target == Amount{}, !inFile && given.MinFree != base && !given.Target.reaches(given.MinFree):
		given.Target = given.MinFree
		given.Target.Percent = min(given.Target.Percent+5, maxTarget)
		delete(r.p.origins, key+".target")
	case !given.Target.reaches(given.MinFree):
		r.refuse(n.Line, "pressure.target (%s) is below minFree (%s)", given.Target, given.MinFree)
		return
	}
	r.p.Pressure = &given
}

// Shares of a file system above these are no sensible room to keep free.
const (
	maxMinFree = 90
	maxTarget  = 95
	maxAsked   = 99 // by a person, for once
)

// reaches tells whether a is at least b, as far as that can be known without
// the capacity; a plan takes the larger of the two.
func (a Amount) reaches(b Amount) bool {
	return a.Bytes >= b.Bytes && a.Percent >= b.Percent || a.Percent > b.Percent || a.Percent == 0 && b.Percent > 0
}

func (r *reader) amount(to *Amount, most float64) func(string, *yaml.Node) {
	return func(key string, n *yaml.Node) {
		s, ok := r.scalar(key, n, "a size such as 500GiB or a share such as 10%", "!!str", "!!int")
		if !ok {
			return
		}
		a, err := ParseAmount(s)
		switch {
		case err != nil:
			r.refuse(n.Line, "%s: %v", key, err)
		case a.Percent > most:
			r.refuse(n.Line, "%s is at most %g%%", key, most)
		default:
			*to = a
		}
	}
}

func (r *reader) windows(key string, n *yaml.Node) {
	if n.Kind != yaml.SequenceNode {
		r.refuse(n.Line, "windows takes a list; leave it out, or write [] for any time")
		return
	}
	maps.DeleteFunc(r.p.origins, func(k string, _ origin) bool { return strings.HasPrefix(k, key+"[") })
	r.p.Windows = nil
	for i, node := range n.Content {
		r.window(fmt.Sprintf("%s[%d]", key, i), node)
	}
}

func (r *reader) window(where string, n *yaml.Node) {
	var start, zone string
	var length time.Duration
	before := len(r.problems)
	r.mapping(where, n,
		field{"start", r.text(func(s string) error { start = s; return nil })},
		field{"duration", r.duration(&length, time.Minute)},
		field{"timezone", r.text(func(s string) error { zone = s; return nil })},
	)
	if len(r.problems) > before {
		return
	}
	if start == "" || length == 0 {
		r.refuse(n.Line, `%s needs start and duration, such as start: "0 2 * * *", duration: 4h`, where)
		return
	}
	w, err := NewWindow(start, length, zone)
	if err != nil {
		r.refuse(n.Line, "%s: %v", where, err)
		return
	}
	r.p.origins[where] = origin{line: n.Line}
	r.p.Windows = append(r.p.Windows, w)
}

func (r *reader) limits(key string, n *yaml.Node) {
	if off(n) {
		r.p.Limits = Limits{}
		return
	}
	r.mapping(key, n,
		field{"bytesPerSecond", func(key string, n *yaml.Node) {
			s, ok := r.scalar(key, n, "a size such as 200MiB", "!!str", "!!int")
			if !ok {
				return
			}
			size, err := parseSize(s)
			if err != nil || size < 1<<20 {
				r.refuse(n.Line, "%s takes a size such as 200MiB, at least 1MiB", key)
				return
			}
			r.p.Limits.BytesPerSecond = size
		}},
		field{"filesPerSecond", r.count(&r.p.Limits.FilesPerSecond, 1)},
	)
}
