package retention

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/larder-project/larder/internal/pattern"
)

// Plan decides on every version of in. The same policy and input give the same
// plan, in whatever order the versions stand.
func (p *Policy) Plan(in Input) Plan {
	pl := planner{
		policy:   p,
		in:       in,
		last:     make([]time.Time, len(in.Versions)),
		verdicts: make([]verdict, len(in.Versions)),
		fixed:    make([]bool, len(in.Versions)),
		floor:    make([]verdict, len(in.Versions)),
	}
	for i := range in.Versions {
		pl.last[i] = lastTime(&in.Versions[i], in.Now)
	}
	pl.models, pl.of = models(in.Versions)
	pl.chooseRules()
	for _, m := range pl.models {
		pl.judgeModel(m)
	}
	pl.judgeNameless()
	pl.restrict()
	going := pl.goByRule()
	going, report := pl.relieve(going)
	return pl.plan(going, report)
}

// planner is one plan in the making. Slices are by index into Input.Versions.
type planner struct {
	policy *Policy
	in     Input
	models []*model
	of     [][]*model

	last     []time.Time // used or came
	verdicts []verdict   // so far
	fixed    []bool      // neither rules nor pressure may take it
	floor    []verdict   // needed to roll back, and why; the zero verdict: it is not
	fits     []bool      // Input.Models fits it; nil: there are none
}

// verdict is what one rule says of one version, or what all of them together say.
type verdict struct {
	reason Reason
	why    string
	model  *model
}

// stays has the reasons to stay, the strongest first.
var stays = []Reason{InUse, Pinned, Damaged, Protected, NoRule, Young, Newest, Recent, Wanted, Rollback, NotAsked, LaterOn}

// strength orders reasons: what keeps beats what takes, and the stronger of two
// that keep is the one to be told.
func (r Reason) strength() int {
	if i := slices.Index(stays, r); i >= 0 {
		return len(stays) - i
	}
	return 0
}

func (v verdict) keeps() bool { return v.reason.strength() > 0 }

func (p *planner) chooseRules() {
	rules := make([][]pattern.Pattern, len(p.policy.Rules))
	for i, r := range p.policy.Rules {
		rules[i] = compile(r.Models)
	}
	for _, m := range p.models {
		m.rule = slices.IndexFunc(rules, func(patterns []pattern.Pattern) bool { return anyMatch(patterns, m.name) })
	}
}

func compile(texts []string) []pattern.Pattern {
	out := make([]pattern.Pattern, len(texts))
	for i, s := range texts {
		out[i] = pattern.Compile(s)
	}
	return out
}

func anyMatch(patterns []pattern.Pattern, name string) bool {
	return slices.ContainsFunc(patterns, func(p pattern.Pattern) bool { return p.Match(name) })
}

// ruleOf gives the rule of a model, or what holds where there is none.
func (p *planner) ruleOf(m *model) Rule {
	if m == nil || m.rule < 0 {
		return Rule{Rollback: DefaultRollback, MinAge: DefaultMinAge}
	}
	return p.policy.Rules[m.rule]
}

// judgeModel lets a model's rule speak on each of its versions. A version of
// several models stays if one of them keeps it.
func (p *planner) judgeModel(m *model) {
	rule := p.ruleOf(m)
	abandoned := p.abandoned(m, rule)
	for order, l := range m.lineages {
		p.judgeLineage(m, rule, l, order == bySemver, abandoned)
	}
	if abandoned {
		return
	}
	for _, l := range m.lineages {
		for _, s := range floor(p.in.Versions, l, rule.Rollback) {
			if at := l[s.at].version; p.floor[at].reason == "" {
				p.floor[at] = verdict{Rollback, rollbackWhy(l, s, rule.Rollback), m}
			}
		}
	}
}

func (p *planner) judgeLineage(m *model, rule Rule, l []member, tagged, abandoned bool) {
	seen := patches{}
	place := 0 // among those with no heir, newest first, from 1
	for i := range l {
		mem := &l[i]
		var heir *member
		if rule.NewestPatch && tagged {
			heir = seen.heir(mem)
		}
		if heir == nil {
			place++
		}
		v, fixed := p.always(mem.version, m, rule)
		switch {
		case v.reason != "":
		case abandoned:
			v = verdict{Abandoned, fmt.Sprintf("no version of %s was used or came for %s", m.name, span(rule.AbandonedFor)), m}
		default:
			v = p.wanted(m, rule, mem, heir, place)
		}
		if tagged && v.keeps() {
			seen.stays(mem)
		}
		p.settle(mem.version, v, fixed)
	}
}

// settle adds a verdict of one model to what is known of a version.
func (p *planner) settle(version int, v verdict, fixed bool) {
	p.fixed[version] = p.fixed[version] || fixed
	if have := &p.verdicts[version]; have.reason == "" || v.reason.strength() > have.reason.strength() {
		*have = v
	} else if v.reason.strength() == have.reason.strength() && p.rank(version, v.model) < p.rank(version, have.model) {
		*have = v
	}
}

// rank is a model's place among those of a version.
func (p *planner) rank(version int, m *model) int { return slices.Index(p.of[version], m) }

// always finds what keeps a version before its rule is asked. fixed is set
// where it keeps it from pressure as well.
func (p *planner) always(version int, m *model, rule Rule) (v verdict, fixed bool) {
	in := &p.in.Versions[version]
	since := p.in.Now.Sub(p.last[version])
	unknown := in.Created.IsZero() && in.LastUsed.IsZero() && in.Pulled.IsZero()
	young := since < rule.MinAge || unknown
	switch {
	case len(in.InUse) > 0:
		return verdict{InUse, "in use by " + andMore(in.InUse), m}, true
	case in.Pinned != "":
		return verdict{Pinned, "pinned: " + in.Pinned, m}, true
	case in.Damaged != "":
		return verdict{Damaged, "damaged, so that what it needs is not known: " + in.Damaged, m}, true
	case rule.Protect:
		return verdict{Protected, "its rule says protect", m}, true
	case m != nil && m.rule < 0:
		return verdict{NoRule, "no rule names " + m.name, m}, young
	case unknown:
		return verdict{Young, "when it came and when it was used is not known", m}, true
	case young:
		return verdict{Young, fmt.Sprintf("%s, less than %s ago", p.lastWords(version), span(rule.MinAge)), m}, true
	}
	return verdict{}, false
}

// wanted applies the conditions of a rule to a version; place is its number
// among those whose place no heir takes.
func (p *planner) wanted(m *model, rule Rule, mem, heir *member, place int) verdict {
	since := p.in.Now.Sub(p.last[mem.version])
	switch {
	case heir != nil:
		return verdict{Superseded, fmt.Sprintf("%s is a newer patch of %d.%d", heir.name, mem.semver.Major(), mem.semver.Minor()), m}
	case rule.KeepNewest == 1 && place == 1:
		return verdict{Newest, "the newest", m}
	case place <= rule.KeepNewest:
		return verdict{Newest, fmt.Sprintf("number %d of the newest %d", place, rule.KeepNewest), m}
	case since < rule.UnusedFor:
		return verdict{Recent, fmt.Sprintf("%s, the limit is %s", p.lastWords(mem.version), span(rule.UnusedFor)), m}
	case rule.KeepNewest == 0 && rule.UnusedFor == 0:
		return verdict{Wanted, "nothing in its rule says that it goes", m}
	}
	reason := Unused
	var failed []string
	if rule.UnusedFor > 0 {
		text := "not used for " + age(since)
		switch v := &p.in.Versions[mem.version]; {
		case pulledLast(v):
			text = "pulled again " + age(since) + " ago, not used since"
		case !used(v):
			text = "never used, came " + age(since) + " ago"
		}
		failed = append(failed, fmt.Sprintf("%s, the limit is %s", text, span(rule.UnusedFor)))
	}
	if rule.KeepNewest > 0 {
		reason = Surplus
		failed = append(failed, fmt.Sprintf("number %d of the newest, the limit is %d", place, rule.KeepNewest))
	}
	return verdict{reason, strings.Join(failed, "; "), m}
}

// lastWords tells when a version was last used or came.
func (p *planner) lastWords(version int) string {
	v := &p.in.Versions[version]
	what := "came"
	switch {
	case pulledLast(v):
		what = "was pulled again"
	case used(v) && !v.LastUsed.Before(v.Created):
		what = "was used"
	}
	return fmt.Sprintf("%s %s ago", what, age(p.in.Now.Sub(p.last[version])))
}

// pulledLast tells whether nothing has happened to a version since it was asked
// for again.
func pulledLast(v *Version) bool {
	return len(v.InUse) == 0 && v.Pulled.After(v.LastUsed) && v.Pulled.After(v.Created)
}

// abandoned tells whether nobody wants a model any more: no version that is
// there was used or came for the rule's time. A pin is somebody's wish.
func (p *planner) abandoned(m *model, rule Rule) bool {
	if rule.AbandonedFor == 0 {
		return false
	}
	for _, l := range m.lineages {
		for _, mem := range l {
			if p.in.Versions[mem.version].Pinned != "" || p.in.Now.Sub(p.last[mem.version]) < rule.AbandonedFor {
				return false
			}
		}
	}
	return true
}

// judgeNameless keeps what no model's name can be found for: nobody could say
// by a rule that it stays.
func (p *planner) judgeNameless() {
	for i := range p.in.Versions {
		if len(p.of[i]) > 0 {
			continue
		}
		v, _ := p.always(i, nil, p.ruleOf(nil))
		if v.reason == "" || v.reason == Young {
			v = verdict{NoRule, "none of its references is a model's name", nil}
		}
		p.verdicts[i], p.fixed[i] = v, true
	}
}

// restrict finds what Input.Models leaves out.
func (p *planner) restrict() {
	if len(p.in.Models) == 0 {
		return
	}
	patterns := compile(p.in.Models)
	p.fits = make([]bool, len(p.in.Versions))
	for i, of := range p.of {
		p.fits[i] = len(of) > 0 && !slices.ContainsFunc(of, func(m *model) bool { return !anyMatch(patterns, m.name) })
	}
}

func (p *planner) leftOut(version int) bool { return p.fits != nil && !p.fits[version] }

// goByRule lists the versions that go by rule, the least recently used first.
// What would go but stays for another reason gets that one.
func (p *planner) goByRule() []int {
	wall := p.in.Wall
	if wall.IsZero() {
		wall = p.in.Now
	}
	open, next := p.policy.Open(wall)
	var going []int
	for i := range p.verdicts {
		v := &p.verdicts[i]
		if v.keeps() {
			continue
		}
		switch {
		case p.floor[i].reason != "":
			*v = p.floor[i]
		case p.leftOut(i):
			v.reason = NotAsked
			v.why = "the plan is restricted to other models; else: " + v.why
		case !open && !p.in.AnyTime:
			v.reason = LaterOn
			v.why = fmt.Sprintf("goes when the window opens on %s: %s", next.Format("2006-01-02 15:04 MST"), v.why)
		default:
			going = append(going, i)
		}
	}
	slices.SortFunc(going, p.leastRecent)
	return going
}

func (p *planner) leastRecent(a, b int) int {
	va, vb := &p.in.Versions[a], &p.in.Versions[b]
	return cmp.Or(p.last[a].Compare(p.last[b]), va.Created.Compare(vb.Created), strings.Compare(string(va.Digest), string(vb.Digest)))
}

// plan writes down what was decided.
func (p *planner) plan(going []int, report *PressureReport) Plan {
	out := Plan{Time: p.in.Now, Decisions: make([]Decision, 0, len(p.in.Versions)), Pressure: report, Beyond: p.policy.Beyond(p.in.Capacity)}
	blobs := newCensus(&p.in)
	gone := make([]bool, len(p.in.Versions))
	for _, i := range going {
		d := p.decision(i)
		d.Remove, d.Frees = true, blobs.remove(i)
		gone[i] = true
		out.Frees += d.Frees
		out.Decisions = append(out.Decisions, d)
	}
	for _, i := range p.inOrder() {
		if !gone[i] {
			out.Decisions = append(out.Decisions, p.decision(i))
		}
	}
	return out
}

// inOrder lists all versions by the model that they count for, newest first,
// and then those without a name.
func (p *planner) inOrder() []int {
	out := make([]int, 0, len(p.in.Versions))
	for _, m := range p.models {
		for _, l := range m.lineages {
			for _, mem := range l {
				if p.verdicts[mem.version].model == m {
					out = append(out, mem.version)
				}
			}
		}
	}
	start := len(out)
	for i, v := range p.verdicts {
		if v.model == nil {
			out = append(out, i)
		}
	}
	slices.SortFunc(out[start:], func(a, b int) int {
		return strings.Compare(string(p.in.Versions[a].Digest), string(p.in.Versions[b].Digest))
	})
	return out
}

func (p *planner) decision(i int) Decision {
	v := p.verdicts[i]
	in := &p.in.Versions[i]
	d := Decision{Digest: in.Digest, References: in.References, LastUsed: in.LastUsed, Pulled: in.Pulled, Reason: v.reason, Why: v.why}
	if v.model != nil {
		d.Model = v.model.name
	}
	switch v.reason {
	case Pressure:
		d.Rule = "pressure"
	case InUse, Pinned, Damaged, NoRule:
	default:
		if v.model.rule >= 0 {
			d.Rule = p.policy.Rules[v.model.rule].label(v.model.rule)
		}
	}
	return d
}

func rollbackWhy(l []member, s standing, r int) string {
	switch {
	case s.at == 0:
		return "the newest; it stays as long as there are others to roll back to"
	case s.at == s.anchor:
		return "the one used last"
	}
	return fmt.Sprintf("one of %s to roll back to from %s", count(int64(r), "earlier version"), l[s.anchor].name)
}

func andMore(who []string) string {
	if more := len(who) - 1; more > 0 {
		return fmt.Sprintf("%s and %d more", who[0], more)
	}
	return who[0]
}
