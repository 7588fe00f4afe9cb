package retention

import (
	"fmt"
	"slices"
	"strings"

	"github.com/docker/go-units"

	"github.com/larder-project/larder/internal/pattern"
)

// From tells where a value of the policy was set, in words: "line 12", "profile
// ci" or "default". The key is as in the file: "pressure.target",
// "rules[0].minAge".
func (p *Policy) From(key string) string {
	switch o := p.origins[key]; {
	case o.profile != "":
		return "profile " + o.profile
	case o.line > 0:
		return fmt.Sprintf("line %d", o.line)
	}
	return "default"
}

// Explain says in words what the policy does, and where each value comes from.
func (p *Policy) Explain() string {
	var b strings.Builder
	b.WriteString("The first rule that fits a model counts for it:\n")
	for i := range p.Rules {
		b.WriteString("\n")
		p.explainRule(&b, i)
	}
	if !slices.ContainsFunc(p.Rules, func(r Rule) bool { return slices.Contains(r.Models, "*") }) {
		fmt.Fprintf(&b, "\n  models that no rule fits\n    stay: %s\n", p.explainUnruled())
	}
	b.WriteString("\nNever removed, whatever is said: what is in use or pinned, and what is damaged.\n\n")
	p.explainRest(&b)
	return b.String()
}

func (p *Policy) explainRule(b *strings.Builder, i int) {
	r, key := p.Rules[i], fmt.Sprintf("rules[%d]", i)
	fmt.Fprintf(b, "  %s: %s (%s)\n", key, strings.Join(r.Models, ", "), p.From(key))
	if r.Protect {
		b.WriteString("    stays: every version; neither rules nor pressure take one\n")
		return
	}
	if r.AbandonedFor > 0 {
		fmt.Fprintf(b, "    goes:  the whole model, once no version of it was used or came for %s and none is pinned\n", span(r.AbandonedFor))
	}
	if r.NewestPatch {
		b.WriteString("    goes:  a patch that a newer one of the same MAJOR.MINOR takes the place of\n")
	}
	if r.KeepNewest > 0 {
		fmt.Fprintf(b, "    stays: %s\n", newestN(r))
	}
	if r.UnusedFor > 0 {
		fmt.Fprintf(b, "    stays: what was used or came within %s\n", span(r.UnusedFor))
	}
	if r.KeepNewest > 0 || r.UnusedFor > 0 {
		b.WriteString("    goes:  everything else\n")
	} else {
		b.WriteString("    stays: everything else\n")
	}
	fmt.Fprintf(b, "    minAge: what came or was used within %s stays in any case (%s)\n", span(r.MinAge), p.From(key+".minAge"))
	if r.Rollback == 0 {
		fmt.Fprintf(b, "    rollback: nothing is kept to roll back to (%s)\n", p.From(key+".rollback"))
		return
	}
	fmt.Fprintf(b, "    rollback: where there are several versions, the newest stays, the one in use or used last, and %s each (%s)\n",
		count(int64(r.Rollback), "version")+" before", p.From(key+".rollback"))
}

func newestN(r Rule) string {
	what := "the newest"
	if r.KeepNewest > 1 {
		what = fmt.Sprintf("the newest %d", r.KeepNewest)
	}
	if r.NewestPatch {
		what += " of those that are left"
	}
	return what
}

func (p *Policy) explainUnruled() string {
	if p.Pressure == nil {
		return "nothing takes them"
	}
	return fmt.Sprintf("only pressure takes them, and not what came or was used within %s, nor %s to roll back to",
		span(DefaultMinAge), count(DefaultRollback, "earlier version"))
}

func (p *Policy) explainRest(b *strings.Builder) {
	line := func(name, format string, args ...any) {
		fmt.Fprintf(b, "%-12s%s\n", name+":", fmt.Sprintf(format, args...))
	}
	if w := p.Pressure; w == nil {
		line("pressure", "off; rules alone remove, however little space is free (%s)", p.From("pressure"))
	} else {
		line("pressure", "when less than %s is free (%s), the trash is emptied, then the least recently used go until %s is free (%s)",
			w.MinFree, p.From("pressure.minFree"), w.Target, p.From("pressure.target"))
	}
	line("trash", "what was removed can be brought back for %s (%s), less where space is short", span(p.TrashHold), p.From("trash.hold"))
	line("unfinished", "partial downloads, and files that no version needs, are kept for %s (%s)", span(p.UnfinishedHold), p.From("unfinished.hold"))
	if len(p.Windows) == 0 {
		line("windows", "none, rules remove at any time (%s)", p.From("windows"))
	}
	for i, w := range p.Windows {
		line("window", "rules remove only from %s (%s); pressure does not wait", w, p.From(fmt.Sprintf("windows[%d]", i)))
	}
	line("limits", "%s", p.explainLimits())
	line("interval", "%s (%s)", every(p.Interval), p.From("interval"))
}

func (p *Policy) explainLimits() string {
	var out []string
	if n := p.Limits.BytesPerSecond; n > 0 {
		out = append(out, fmt.Sprintf("%s a second (%s)", units.BytesSize(float64(n)), p.From("limits.bytesPerSecond")))
	}
	if n := p.Limits.FilesPerSecond; n > 0 {
		out = append(out, fmt.Sprintf("%s a second (%s)", count(int64(n), "file"), p.From("limits.filesPerSecond")))
	}
	if len(out) == 0 {
		return "none, the trash is emptied as fast as the disk can (" + p.From("limits") + ")"
	}
	return "the trash is emptied at no more than " + strings.Join(out, " and ")
}

// kubeletEvicts is nodefs.available below which a kubelet evicts pods unless it
// is told otherwise, in percent.
const kubeletEvicts = 10

// Warnings names what is allowed and is probably not meant.
func (p *Policy) Warnings() []string {
	out := p.unreachable()
	warn := func(key, format string, args ...any) {
		out = append(out, fmt.Sprintf("%s (%s): %s", key, p.From(key), fmt.Sprintf(format, args...)))
	}
	for i, r := range p.Rules {
		key := fmt.Sprintf("rules[%d]", i)
		for _, m := range r.Models {
			if low := strings.ToLower(m); low != m && !strings.HasPrefix(m, "hf://") && !strings.ContainsAny(m[:1], "*?[") && !strings.Contains(m, "[") {
				warn(key, "short names are lower-case, so %q fits none; models of a hub are written hf://ORG/NAME", m)
			}
		}
		if r.UnusedFor > 0 && r.MinAge > r.UnusedFor {
			warn(key, "minAge (%s) keeps everything for longer than unusedFor (%s)", FormatDuration(r.MinAge), FormatDuration(r.UnusedFor))
		}
	}
	if w := p.Pressure; w != nil {
		if w.MinFree.Bytes == 0 && w.MinFree.Percent < kubeletEvicts {
			warn("pressure.minFree", "%s is less than the %d%% at which a kubelet begins to evict pods; raise it above that where the store lies on a kubelet's disk", w.MinFree, kubeletEvicts)
		}
		if w.Target.Percent > 50 {
			warn("pressure.target", "%s, more than half of the file system, is to be free; that can be had only where the models take less than the rest", w.Target)
		}
	}
	if p.Pressure == nil && !slices.ContainsFunc(p.Rules, Rule.removes) {
		out = append(out, "the policy removes nothing: no rule takes anything, and pressure is off")
	}
	return out
}

// unreachable finds patterns that an earlier rule leaves nothing for.
func (p *Policy) unreachable() []string {
	var out []string
	for i, later := range p.Rules {
		for _, m := range later.Models {
			for j, earlier := range p.Rules[:i] {
				if k := slices.IndexFunc(earlier.Models, func(e string) bool { return covers(e, m) }); k >= 0 {
					key := fmt.Sprintf("rules[%d]", i)
					out = append(out, fmt.Sprintf("%s (%s): %q is never reached, rules[%d] (%s) takes all that it fits by %q",
						key, p.From(key), m, j, p.From(fmt.Sprintf("rules[%d]", j)), earlier.Models[k]))
					break
				}
			}
		}
	}
	return out
}

// covers tells whether pattern a surely fits every name that b fits. With only
// stars in a, a star or question mark of b can be met by a star of a alone, so
// it is enough that a fits the text of b.
func covers(a, b string) bool {
	if a == b {
		return true
	}
	return !strings.ContainsAny(a, "?[") && !strings.Contains(b, "[") && pattern.Compile(a).Match(b)
}
