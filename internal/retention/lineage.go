package retention

import (
	"cmp"
	"slices"
	"strings"
	"time"

	"github.com/Masterminds/semver/v3"

	"github.com/larder-project/larder/internal/reference"
)

// model is the versions that go by one name.
type model struct {
	name string
	rule int // that counts for it, -1: none
	// lineages are its versions in two orders, newest first: those with a
	// semantic version for a tag, and all others by the time they came. Each
	// version is in one of the two.
	lineages [2][]member
}

const (
	bySemver = iota
	byTime
)

// member is a version's place in a lineage.
type member struct {
	version int // index into Input.Versions
	semver  *semver.Version
	name    string // how this model calls it: "1.9.3", "qwen:latest"
}

// models groups versions by the names of their references, in the order of the
// names. of lists for each version the models that it belongs to, in the order
// of its references.
func models(versions []Version) (all []*model, of [][]*model) {
	byName := map[string]*model{}
	of = make([][]*model, len(versions))
	for i, v := range versions {
		places := map[*model]*member{}
		for _, text := range v.References {
			ref, err := reference.Parse(text)
			if err != nil || ref.Source() == "" {
				continue
			}
			m, ok := byName[ref.Source()]
			if !ok {
				m = &model{name: ref.Source(), rule: -1}
				byName[m.name] = m
				all = append(all, m)
			}
			place, ok := places[m]
			if !ok {
				place = &member{version: i, name: text}
				places[m] = place
				of[i] = append(of[i], m)
			}
			if sv, ok := semanticVersion(ref); ok && (place.semver == nil || sv.GreaterThan(place.semver)) {
				place.semver, place.name = sv, sv.Original()
			}
		}
		for _, m := range of[i] {
			order := byTime
			if places[m].semver != nil {
				order = bySemver
			}
			m.lineages[order] = append(m.lineages[order], *places[m])
		}
	}
	for _, m := range all {
		for _, l := range m.lineages {
			slices.SortFunc(l, func(a, b member) int { return newestFirst(versions, a, b) })
		}
	}
	slices.SortFunc(all, func(a, b *model) int { return strings.Compare(a.name, b.name) })
	return all, of
}

func semanticVersion(ref reference.Reference) (*semver.Version, bool) {
	tag := ref.Tag
	if ref.Kind == reference.Hub && !reference.IsCommit(ref.Revision) {
		tag = ref.Revision
	}
	return reference.Version(tag)
}

func newestFirst(versions []Version, a, b member) int {
	if a.semver != nil {
		if c := b.semver.Compare(a.semver); c != 0 {
			return c
		}
	}
	va, vb := &versions[a.version], &versions[b.version]
	return cmp.Or(vb.Created.Compare(va.Created), strings.Compare(string(va.Digest), string(vb.Digest)))
}

// patches knows of each MAJOR.MINOR the newest patches that stay, as a lineage
// is gone through from its newest member on.
type patches map[minor]newest

type (
	minor  struct{ major, minor uint64 }
	newest struct{ release, pre *member }
)

func minorOf(m *member) minor { return minor{m.semver.Major(), m.semver.Minor()} }

// heir finds the newer patch that takes m's place, or nil. A release takes that
// of earlier releases and of all pre-releases before it. A pre-release takes
// that of earlier pre-releases only: it is not yet the patch that people want.
func (p patches) heir(m *member) *member {
	n := p[minorOf(m)]
	newer := func(h *member) bool { return h != nil && h.semver.GreaterThan(m.semver) }
	switch {
	case newer(n.release):
		return n.release
	case m.semver.Prerelease() != "" && newer(n.pre):
		return n.pre
	}
	return nil
}

// stays notes that m stays. What goes takes nobody's place: else a patch that is
// used would go for the sake of a newer one that nobody uses, and that one too.
func (p patches) stays(m *member) {
	n := p[minorOf(m)]
	switch pre := m.semver.Prerelease() != ""; {
	case pre && n.pre == nil:
		n.pre = m
	case !pre && n.release == nil:
		n.release = m
	}
	p[minorOf(m)] = n
}

// floor lists the members of a lineage that must stay so that one can roll
// back: the newest, the newest in use (or, where none is, the one used last),
// and for each of the two r earlier ones, those that were ever used before
// others. It depends on nothing else that keeps or takes versions, so removing
// all but what it lists leaves it as it was. One version alone has nothing to
// be rolled back to, and no floor.
func floor(versions []Version, l []member, r int) []standing {
	if r == 0 || len(l) < 2 {
		return nil
	}
	out := []standing{{at: 0, anchor: 0}}
	if a := current(versions, l); a > 0 {
		out = append(out, standing{at: a, anchor: a})
	}
	for _, anchor := range slices.Clone(out) {
		left := r
		for _, everUsed := range []bool{true, false} {
			for i := anchor.at + 1; i < len(l) && left > 0; i++ {
				if used(&versions[l[i].version]) == everUsed {
					out = append(out, standing{at: i, anchor: anchor.at})
					left--
				}
			}
		}
	}
	return out
}

// standing says that the member at one index stays for the sake of another.
type standing struct{ at, anchor int }

// current finds the newest member in use, else the one used last, else -1.
func current(versions []Version, l []member) int {
	last := -1
	for i, m := range l {
		v := &versions[m.version]
		if len(v.InUse) > 0 {
			return i
		}
		if used(v) && (last < 0 || v.LastUsed.After(versions[l[last].version].LastUsed)) {
			last = i
		}
	}
	return last
}

func used(v *Version) bool { return len(v.InUse) > 0 || !v.LastUsed.IsZero() }

// lastTime is when a version was last used, came or was asked for again,
// whichever is latest: now for what is in use, and for what lies in the future
// or is not known at all, for nothing may go because a clock is wrong.
func lastTime(v *Version, now time.Time) time.Time {
	t := v.Created
	for _, later := range []time.Time{v.LastUsed, v.Pulled} {
		if later.After(t) {
			t = later
		}
	}
	if t.After(now) || t.IsZero() || len(v.InUse) > 0 {
		return now
	}
	return t
}
