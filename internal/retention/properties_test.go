package retention

import (
	"fmt"
	"maps"
	"slices"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/opencontainers/go-digest"
	"pgregory.net/rapid"

	"github.com/larder-project/larder/internal/pattern"
	"github.com/larder-project/larder/internal/reference"
)

var (
	// Not IntRange, which prefers what is small: nearly all would be young.
	agesAgo    = rapid.SampledFrom([]time.Duration{-day, 0, time.Hour, 5 * time.Hour, day, 3 * day, 9 * day, 10 * day, 20 * day, 29 * day, 31 * day, 49 * day, 51 * day})
	uses       = rapid.SampledFrom([]string{"", "", "", "", "used", "used", "used", "in use", "pinned", "damaged"})
	some       = rapid.SampledFrom([]int{0, 1, 2, 3})
	seldom     = rapid.SampledFrom([]bool{false, false, false, true})
	modelNames = []string{"a", "b", "ci-x", "hf://org/m"}
	allModels  = []string{"a", "b", "ci-*", "hf://*", "*"}
)

func genReference(t *rapid.T) string {
	m := rapid.SampledFrom(modelNames).Draw(t, "model")
	if m == "hf://org/m" {
		return m + "@" + rapid.SampledFrom([]string{"main", "dev", "v1.0.0", "v1.0.1", fmt.Sprintf("%040d", 1), fmt.Sprintf("%040d", 2)}).Draw(t, "revision")
	}
	tag := rapid.SampledFrom([]string{"latest", "nightly", "%d.%d.%d", "%d.%d.%d-rc.1"}).Draw(t, "tag")
	if len(tag) > 8 || tag[0] == '%' {
		tag = fmt.Sprintf(tag, some.Draw(t, "major")/2, some.Draw(t, "minor")/2, some.Draw(t, "patch"))
	}
	return m + ":" + tag
}

func genInput(t *rapid.T) Input {
	in := Input{Now: now, Capacity: 1000, Free: rapid.SampledFrom([]int64{0, 50, 150, 199, 200, 300}).Draw(t, "free"), Trash: int64(rapid.IntRange(0, 200).Draw(t, "trash"))}
	for range rapid.IntRange(1, 12).Draw(t, "blobs") {
		in.Blobs = append(in.Blobs, Blob{Size: rapid.SampledFrom([]int64{0, 1, 10, 50, 200}).Draw(t, "size"), Held: seldom.Draw(t, "held")})
	}
	taken := map[string]bool{}
	for i := range rapid.IntRange(1, 16).Draw(t, "versions") {
		v := Version{Digest: digest.FromString(fmt.Sprint(i))}
		for range rapid.IntRange(1, 2).Draw(t, "references") {
			if ref := genReference(t); !taken[ref] {
				taken[ref] = true
				v.References = append(v.References, ref)
			}
		}
		v.Created = now.Add(-agesAgo.Draw(t, "created"))
		switch uses.Draw(t, "use") {
		case "in use":
			v.InUse = []string{"somebody"}
		case "pinned":
			v.Pinned = "a wish"
		case "damaged":
			v.Damaged = "a hole"
		case "used":
			v.LastUsed = now.Add(-agesAgo.Draw(t, "used"))
		}
		for b := range in.Blobs {
			if seldom.Draw(t, "layer") {
				v.Layers = append(v.Layers, int32(b))
			}
		}
		in.Versions = append(in.Versions, v)
	}
	return in
}

func genPolicy(t *rapid.T, pressure bool) *Policy {
	p := None()
	for range some.Draw(t, "rules") {
		r := Rule{
			Models:   []string{rapid.SampledFrom(allModels).Draw(t, "pattern")},
			Rollback: rapid.SampledFrom([]int{0, 0, 1, 2, 3}).Draw(t, "rollback"),
			MinAge:   rapid.SampledFrom([]time.Duration{0, time.Hour, day}).Draw(t, "minAge"),
		}
		if r.Protect = seldom.Draw(t, "protect"); !r.Protect {
			r.NewestPatch = rapid.Bool().Draw(t, "newestPatch")
			r.KeepNewest = some.Draw(t, "keepNewest")
			r.UnusedFor = rapid.SampledFrom([]time.Duration{0, day, 9 * day, 30 * day}).Draw(t, "unusedFor")
			if rapid.Bool().Draw(t, "abandon") {
				r.AbandonedFor = rapid.SampledFrom([]time.Duration{30 * day, 50 * day}).Draw(t, "abandonedFor")
			}
		}
		p.Rules = append(p.Rules, r)
	}
	if pressure {
		p.Pressure = &Watermarks{MinFree: Amount{Percent: 20}, Target: Amount{Percent: 35}}
	}
	return p
}

// rulesOf finds the rules of a version the plain way, one for each reference.
func rulesOf(p *Policy, v Version) (out []Rule, names []string) {
	for _, text := range v.References {
		ref, err := reference.Parse(text)
		if err != nil {
			continue
		}
		rule := Rule{Rollback: DefaultRollback, MinAge: DefaultMinAge}
		for _, r := range p.Rules {
			if pattern.Compile(r.Models[0]).Match(ref.Source()) {
				rule = r
				break
			}
		}
		out, names = append(out, rule), append(names, ref.Source())
	}
	return out, names
}

func TestWhatMustStayIsNeverRemoved(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		p, in := genPolicy(t, rapid.Bool().Draw(t, "pressure")), genInput(t)
		plan := p.Plan(in)
		byDigest := map[digest.Digest]Version{}
		for _, v := range in.Versions {
			byDigest[v.Digest] = v
		}
		seen := map[digest.Digest]bool{}
		for _, d := range plan.Decisions {
			v, ok := byDigest[d.Digest]
			if !ok || seen[d.Digest] {
				t.Fatalf("%s is decided on twice, or does not exist", d.Digest)
			}
			seen[d.Digest] = true
			if !d.Remove {
				continue
			}
			if len(v.InUse) > 0 || v.Pinned != "" || v.Damaged != "" || len(v.References) == 0 {
				t.Fatalf("%+v goes: %+v", v, d)
			}
			rules, _ := rulesOf(p, v)
			for _, r := range rules {
				last := v.Created
				if v.LastUsed.After(last) {
					last = v.LastUsed
				}
				if r.Protect || max(0, now.Sub(last)) < r.MinAge {
					t.Fatalf("%+v goes though its rule is %+v: %+v", v, r, d)
				}
			}
		}
		if len(seen) != len(in.Versions) {
			t.Fatalf("%d of %d versions are decided on", len(seen), len(in.Versions))
		}
	})
}

// The floor is checked by counting, from the order of versions alone.
func TestThereIsAlwaysSomethingToRollBackTo(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		p, in := genPolicy(t, rapid.Bool().Draw(t, "pressure")), genInput(t)
		for i := range p.Rules {
			p.Rules[i].AbandonedFor = 0
		}
		goes := map[digest.Digest]bool{}
		for _, d := range p.Plan(in).Decisions {
			goes[d.Digest] = d.Remove
		}
		for _, l := range lineagesOf(in.Versions) {
			rules, _ := rulesOf(p, Version{References: []string{l.reference}})
			r := rules[0].Rollback
			if r == 0 || len(l.versions) < 2 {
				continue
			}
			anchors := []int{0}
			if i := slices.IndexFunc(l.versions, func(v Version) bool { return len(v.InUse) > 0 }); i >= 0 {
				anchors = append(anchors, i)
			} else {
				last := 0
				for i, v := range l.versions {
					if v.LastUsed.After(l.versions[last].LastUsed) {
						last = i
					}
				}
				anchors = append(anchors, last)
			}
			for _, a := range anchors {
				if goes[l.versions[a].Digest] {
					t.Fatalf("%s: number %d goes, which the others are kept for", l.reference, a)
				}
				var stay, there, stayUsed, thereUsed int
				for _, v := range l.versions[a+1:] {
					wasUsed := len(v.InUse) > 0 || !v.LastUsed.IsZero()
					there++
					if wasUsed {
						thereUsed++
					}
					if !goes[v.Digest] {
						stay++
						if wasUsed {
							stayUsed++
						}
					}
				}
				if stay < min(r, there) || stayUsed < min(r, thereUsed) {
					t.Fatalf("%s: of %d before number %d stay %d, of %d used ones %d; rollback is %d", l.reference, there, a, stay, thereUsed, stayUsed, r)
				}
			}
		}
	})
}

type plainLineage struct {
	reference string // one of its model
	versions  []Version
}

// lineagesOf groups and sorts versions the plain way.
func lineagesOf(versions []Version) []plainLineage {
	type key struct {
		model  string
		tagged bool
	}
	type place struct {
		v   Version
		tag string
	}
	groups, refs := map[key][]place{}, map[key]string{}
	for _, v := range versions {
		best := map[string]string{}
		for _, text := range v.References {
			ref, err := reference.Parse(text)
			if err != nil {
				continue
			}
			tag := ref.Tag + ref.Revision
			if sv, ok := reference.Version(tag); !ok || reference.IsCommit(tag) {
				if _, has := best[ref.Source()]; !has {
					best[ref.Source()] = ""
				}
			} else if old, ok := reference.Version(best[ref.Source()]); !ok || sv.GreaterThan(old) {
				best[ref.Source()] = tag
			}
			refs[key{ref.Source(), true}], refs[key{ref.Source(), false}] = text, text
		}
		for m, tag := range best {
			k := key{m, tag != ""}
			groups[k] = append(groups[k], place{v, tag})
		}
	}
	var out []plainLineage
	for k, g := range groups {
		slices.SortFunc(g, func(a, b place) int {
			if k.tagged {
				va, _ := reference.Version(a.tag)
				vb, _ := reference.Version(b.tag)
				if c := vb.Compare(va); c != 0 {
					return c
				}
			}
			if c := b.v.Created.Compare(a.v.Created); c != 0 {
				return c
			}
			if a.v.Digest < b.v.Digest {
				return -1
			}
			return 1
		})
		l := plainLineage{reference: refs[k]}
		for _, p := range g {
			l.versions = append(l.versions, p.v)
		}
		out = append(out, l)
	}
	return out
}

func TestFreedBytesAreThoseThatNothingNeedsAfterwards(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		p, in := genPolicy(t, rapid.Bool().Draw(t, "pressure")), genInput(t)
		plan := p.Plan(in)
		needed := func(versions []Version) map[int32]bool {
			out := map[int32]bool{}
			for _, v := range versions {
				for _, b := range v.Layers {
					out[b] = true
				}
			}
			return out
		}
		var bytes, sum int64
		after := needed(carryOut(in, plan).Versions)
		for b := range maps.Keys(needed(in.Versions)) {
			if !after[b] && !in.Blobs[b].Held {
				bytes += in.Blobs[b].Size
			}
		}
		for _, d := range plan.Decisions {
			sum += d.Frees
			if d.Frees != 0 && !d.Remove {
				t.Fatalf("%+v stays and frees %d", d, d.Frees)
			}
		}
		if plan.Frees != bytes || sum != bytes {
			t.Fatalf("the plan says %d, its lines %d, and it is %d", plan.Frees, sum, bytes)
		}
		r := plan.Pressure
		if (r != nil) != (p.Pressure != nil && in.Free < 200) {
			t.Fatalf("%d of 1000 bytes are free, the report is %+v", in.Free, r)
		}
		if r != nil && (r.After != in.Free+in.Trash+bytes || r.Short != (r.After < r.Target)) {
			t.Fatalf("report %+v, %d are free, %d in the trash, %d freed", r, in.Free, in.Trash, bytes)
		}
	})
}

func TestAPlanCarriedOutLeavesNothingForTheNext(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		p, in := genPolicy(t, rapid.Bool().Draw(t, "pressure")), genInput(t)
		after := carryOut(in, p.Plan(in))
		for _, d := range p.Plan(after).Decisions {
			// Whether a model is abandoned is seen by the versions that are left.
			if d.Remove && d.Reason != Abandoned {
				t.Fatalf("the second plan takes %+v", d)
			}
		}
	})
}

func TestPressureTakesNoMoreThanItNeeds(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		p, in := genPolicy(t, true), genInput(t)
		plan := p.Plan(in)
		var last *Decision
		for i, d := range plan.Decisions {
			if d.Reason == Pressure {
				last = &plan.Decisions[i]
			}
		}
		if last == nil {
			return
		}
		r := plan.Pressure
		if last.Frees == 0 {
			t.Fatalf("the last to go frees nothing: %+v", *last)
		}
		if r.After-last.Frees >= r.Target {
			t.Fatalf("%d would have been reached without the last, of %d", r.After-last.Frees, r.Target)
		}
	})
}

func TestWhoAsksForMoreToStayGetsIt(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		p, in := genPolicy(t, false), genInput(t)
		if len(p.Rules) == 0 {
			return
		}
		before := removed(p.Plan(in))
		r := &p.Rules[rapid.IntRange(0, len(p.Rules)-1).Draw(t, "which")]
		more := rapid.IntRange(1, 3).Draw(t, "more")
		// A patch that comes to stay takes the place of older ones: that is what
		// newestPatch asks for, so where it is set only these can be compared.
		what := rapid.SampledFrom([]string{"protect", "rollback", "abandonedFor", "window", "keepNewest", "unusedFor", "minAge", "pin"}).Draw(t, "what")
		patches := slices.ContainsFunc(p.Rules, func(r Rule) bool { return r.NewestPatch })
		switch what {
		case "protect":
			*r = Rule{Models: r.Models, Protect: true}
		case "rollback":
			r.Rollback += more
		case "abandonedFor":
			if patches {
				return
			}
			r.AbandonedFor = 0
		case "window":
			p.Windows = []Window{window(t, "0 2 * * *", time.Hour, "")}
		case "keepNewest":
			if patches || r.KeepNewest+int(r.UnusedFor) == 0 {
				return
			}
			r.KeepNewest += more
		case "unusedFor":
			if patches || r.KeepNewest+int(r.UnusedFor) == 0 {
				return
			}
			r.UnusedFor += time.Duration(more) * day
		case "minAge":
			if patches {
				return
			}
			r.MinAge += time.Duration(more) * day
		case "pin":
			if patches || len(in.Versions) == 0 {
				return
			}
			in.Versions[rapid.IntRange(0, len(in.Versions)-1).Draw(t, "pinned")].Pinned = "a wish"
		}
		for d := range removed(p.Plan(in)) {
			if !before[d] {
				t.Fatalf("%s goes since more was asked to stay (%s)", d, what)
			}
		}
	})
}

func removed(p Plan) map[digest.Digest]bool {
	out := map[digest.Digest]bool{}
	for _, d := range p.Decisions {
		if d.Remove {
			out[d.Digest] = true
		}
	}
	return out
}

func TestTheOrderOfVersionsSaysNothing(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		p, in := genPolicy(t, rapid.Bool().Draw(t, "pressure")), genInput(t)
		want := p.Plan(in)
		in.Versions = rapid.Permutation(in.Versions).Draw(t, "order")
		if diff := cmp.Diff(want, p.Plan(in)); diff != "" {
			t.Fatalf("another order, another plan:\n%s", diff)
		}
	})
}
