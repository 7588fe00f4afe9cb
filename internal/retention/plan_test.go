package retention

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/opencontainers/go-digest"
)

var now = time.Date(2026, 3, 4, 15, 30, 0, 0, time.UTC)

// stored is a version in a test: its references, how long ago it came and was
// last used, and more.
type stored struct {
	refs   string // separated by spaces; the first names it in the test's expectations
	came   string // ago
	used   string // ago; empty: never
	pulled string // likewise: when it was last asked for again
	inUse  bool
	pinned bool
	broken bool
	size   int64   // of a blob of its own; 0: 100
	shares []int64 // sizes of blobs that it shares with all that list the same size
}

// input puts versions together into what a plan is made from.
func input(t testing.TB, versions ...stored) Input {
	t.Helper()
	in := Input{Now: now, Capacity: 10_000, Free: 10_000}
	shared := map[int64]int32{}
	for _, s := range versions {
		refs := strings.Fields(s.refs)
		v := Version{Digest: digest.FromString(s.refs), References: refs}
		ago := func(text string) time.Time {
			if text == "" {
				return time.Time{}
			}
			d, err := ParseDuration(text)
			if err != nil {
				t.Fatal(err)
			}
			return now.Add(-d)
		}
		v.Created, v.LastUsed, v.Pulled = ago(s.came), ago(s.used), ago(s.pulled)
		if s.inUse {
			v.InUse = []string{"container eager_lamport", "volume x"}
		}
		if s.pinned {
			v.Pinned = "for the demo"
		}
		if s.broken {
			v.Damaged = "manifest cut short"
		}
		own := s.size
		if own == 0 {
			own = 100
		}
		v.Layers = append(v.Layers, int32(len(in.Blobs)))
		in.Blobs = append(in.Blobs, Blob{Size: own})
		for _, size := range s.shares {
			b, ok := shared[size]
			if !ok {
				b = int32(len(in.Blobs))
				shared[size] = b
				in.Blobs = append(in.Blobs, Blob{Size: size})
			}
			v.Layers = append(v.Layers, b)
		}
		in.Versions = append(in.Versions, v)
	}
	return in
}

func policy(t testing.TB, text string) *Policy {
	t.Helper()
	p, err := Parse("policy.yaml", []byte("version: 1\n"+text))
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func name(d Decision) string {
	if len(d.References) == 0 {
		return d.Digest.String()
	}
	return d.References[0]
}

// reasons checks that a plan's parts fit together and gives each version's
// reason.
func reasons(t testing.TB, p Plan, in Input) map[string]Reason {
	t.Helper()
	out := map[string]Reason{}
	stayed := false
	for _, d := range p.Decisions {
		if _, twice := out[name(d)]; twice {
			t.Errorf("%s is decided on twice", name(d))
		}
		out[name(d)] = d.Reason
		takes := slices.Contains([]Reason{Abandoned, Superseded, Surplus, Unused, Pressure}, d.Reason)
		if d.Remove != takes {
			t.Errorf("%s: Remove is %t, and the reason %s", name(d), d.Remove, d.Reason)
		}
		if d.Why == "" {
			t.Errorf("%s (%s): no Why", name(d), d.Reason)
		}
		if d.Remove && stayed {
			t.Errorf("%s goes, and stands after what stays", name(d))
		}
		stayed = stayed || !d.Remove
	}
	if len(out) != len(in.Versions) {
		t.Errorf("%d of %d versions are decided on", len(out), len(in.Versions))
	}
	return out
}

func TestRules(t *testing.T) {
	t.Parallel()
	for name, tc := range map[string]struct {
		policy   string
		versions []stored
		want     map[string]Reason
	}{
		"without rules nothing goes": {
			policy:   "trash: {hold: 1h}",
			versions: []stored{{refs: "m:1", came: "900d"}, {refs: "m:2", came: "901d"}},
			want:     map[string]Reason{"m:1": NoRule, "m:2": NoRule},
		},
		"what is unused for too long goes": {
			policy: "rules: [{models: ['*'], unusedFor: 30d}]",
			versions: []stored{
				{refs: "hf://a/old@main", came: "90d", used: "31d"},
				{refs: "hf://a/never@main", came: "31d"},
				{refs: "hf://a/used@main", came: "90d", used: "29d"},
				{refs: "hf://a/fresh@main", came: "29d"},
				{refs: "hf://a/limit@main", came: "30d"},
			},
			want: map[string]Reason{
				"hf://a/old@main": Unused, "hf://a/never@main": Unused, "hf://a/limit@main": Unused,
				"hf://a/used@main": Recent, "hf://a/fresh@main": Recent,
			},
		},
		"what was asked for again is as young as that, and not ever used by it": {
			policy: "rules: [{models: ['*'], unusedFor: 7d, minAge: 1d, rollback: 1}]",
			versions: []stored{
				{refs: "hf://a/just@main", came: "90d", pulled: "1h"},
				{refs: "hf://a/again@main", came: "90d", used: "80d", pulled: "6d"},
				{refs: "hf://a/long@main", came: "90d", pulled: "8d"},
				{refs: "m:1", came: "90d", pulled: "50d"}, {refs: "m:0", came: "99d", used: "60d"}, {refs: "m:2", came: "9d"},
			},
			want: map[string]Reason{
				"hf://a/just@main": Young, "hf://a/again@main": Recent, "hf://a/long@main": Unused,
				"m:2": Rollback, "m:0": Rollback, "m:1": Unused,
			},
		},
		"the newest N by semantic version stay, pre-releases in their place": {
			policy: "rules: [{models: [m], keepNewest: 3, rollback: 0}]",
			versions: []stored{
				{refs: "m:1.10.0", came: "9d"}, {refs: "m:1.9.0", came: "2d"}, {refs: "m:2.0.0-rc1", came: "8d"},
				{refs: "m:1.2.0", came: "1d"}, {refs: "m:v0.1", came: "1d"},
			},
			want: map[string]Reason{"m:2.0.0-rc1": Newest, "m:1.10.0": Newest, "m:1.9.0": Newest, "m:1.2.0": Surplus, "m:v0.1": Surplus},
		},
		"other tags and hubs go by the time they came": {
			policy: "rules: [{models: ['*'], keepNewest: 1, rollback: 0}]",
			versions: []stored{
				{refs: "m:nightly-b", came: "2d"}, {refs: "m:nightly-a", came: "3d"},
				{refs: "hf://a/b@main", came: "2d"}, {refs: "hf://a/b@0123456789012345678901234567890123456789", came: "3d"},
			},
			want: map[string]Reason{
				"m:nightly-b": Newest, "m:nightly-a": Surplus,
				"hf://a/b@main": Newest, "hf://a/b@0123456789012345678901234567890123456789": Surplus,
			},
		},
		"versions and other tags of one model are judged apart": {
			policy: "rules: [{models: [m], keepNewest: 1, rollback: 0}]",
			versions: []stored{
				{refs: "m:1.0.0", came: "9d"}, {refs: "m:0.9.0", came: "3d"}, {refs: "m:latest", came: "1d"}, {refs: "m:main", came: "4d"},
			},
			want: map[string]Reason{"m:1.0.0": Newest, "m:0.9.0": Surplus, "m:latest": Newest, "m:main": Surplus},
		},
		"tagged revisions of a hub are versions": {
			policy:   "rules: [{models: ['hf://*'], keepNewest: 1, rollback: 0}]",
			versions: []stored{{refs: "hf://a/b@v1.0.0", came: "1d"}, {refs: "hf://a/b@v1.2.0", came: "9d"}},
			want:     map[string]Reason{"hf://a/b@v1.2.0": Newest, "hf://a/b@v1.0.0": Surplus},
		},
		"of each minor only the newest patch is wanted": {
			policy: "rules: [{models: [m], newestPatch: true, rollback: 0}]",
			versions: []stored{
				{refs: "m:1.8.1", came: "5d"}, {refs: "m:1.8.0", came: "9d"}, {refs: "m:1.9.2", came: "5d"}, {refs: "m:1.9.1", came: "5d"},
				{refs: "m:2.9.1", came: "5d"}, {refs: "m:other", came: "5d"}, {refs: "m:another", came: "6d"},
			},
			want: map[string]Reason{
				"m:1.8.1": Wanted, "m:1.8.0": Superseded, "m:1.9.2": Wanted, "m:1.9.1": Superseded,
				"m:2.9.1": Wanted, "m:other": Wanted, "m:another": Wanted,
			},
		},
		"a release takes the place of pre-releases, and they only that of each other": {
			policy: "rules: [{models: [m], newestPatch: true, rollback: 0}]",
			versions: []stored{
				{refs: "m:1.9.0", came: "5d"}, {refs: "m:1.9.0-rc.2", came: "6d"}, {refs: "m:1.9.0-rc.1", came: "7d"},
				{refs: "m:2.0.1-rc.2", came: "5d"}, {refs: "m:2.0.1-rc.1", came: "5d"}, {refs: "m:2.0.0", came: "5d"},
				{refs: "m:3.0.0-rc.2", came: "5d"}, {refs: "m:3.0.0-rc.1", came: "5d"},
			},
			want: map[string]Reason{
				"m:1.9.0": Wanted, "m:1.9.0-rc.2": Superseded, "m:1.9.0-rc.1": Superseded,
				"m:2.0.1-rc.2": Wanted, "m:2.0.1-rc.1": Superseded, "m:2.0.0": Wanted,
				"m:3.0.0-rc.2": Wanted, "m:3.0.0-rc.1": Superseded,
			},
		},
		"two builds of one patch do not take each other's place": {
			policy:   "rules: [{models: [m], newestPatch: true, rollback: 0}]",
			versions: []stored{{refs: "m:1.0.0", came: "5d"}, {refs: "m:v1.0.0", came: "6d"}},
			want:     map[string]Reason{"m:1.0.0": Wanted, "m:v1.0.0": Wanted},
		},
		"superseded patches do not count among the newest N": {
			policy: "rules: [{models: [m], newestPatch: true, keepNewest: 2, rollback: 0}]",
			versions: []stored{
				{refs: "m:1.9.2", came: "5d"}, {refs: "m:1.9.1", came: "5d"}, {refs: "m:1.8.0", came: "5d"}, {refs: "m:1.7.0", came: "5d"},
			},
			want: map[string]Reason{"m:1.9.2": Newest, "m:1.9.1": Superseded, "m:1.8.0": Newest, "m:1.7.0": Surplus},
		},
		"a patch that is used stays where the newer one goes": {
			policy: "rules: [{models: [m], newestPatch: true, keepNewest: 1, unusedFor: 30d, rollback: 0}]",
			versions: []stored{
				{refs: "m:2.0.0", came: "80d"}, {refs: "m:1.9.2", came: "80d"}, {refs: "m:1.9.1", came: "90d", used: "1d"},
				{refs: "m:1.9.0", came: "90d", used: "1d"}, {refs: "m:1.8.1", came: "9d"}, {refs: "m:1.8.0", came: "95d", used: "1d"},
			},
			want: map[string]Reason{
				"m:2.0.0": Newest, "m:1.9.2": Surplus, "m:1.9.1": Recent, "m:1.9.0": Superseded, "m:1.8.1": Recent, "m:1.8.0": Superseded,
			},
		},
		"beyond the newest N, what was used stays": {
			policy: "rules: [{models: [m], keepNewest: 1, unusedFor: 7d, rollback: 0}]",
			versions: []stored{
				{refs: "m:3", came: "20d"}, {refs: "m:2", came: "20d", used: "6d"}, {refs: "m:1", came: "20d", used: "8d"},
			},
			want: map[string]Reason{"m:3": Newest, "m:2": Recent, "m:1": Surplus},
		},
		"the first rule that fits counts": {
			policy: "rules: [{models: [keep, 'hf://org/*'], protect: true}, {models: ['*'], unusedFor: 1d}]",
			versions: []stored{
				{refs: "keep:1", came: "90d"}, {refs: "hf://org/x@main", came: "90d"}, {refs: "hf://other/x@main", came: "90d"}, {refs: "keeper:1", came: "90d"},
			},
			want: map[string]Reason{"keep:1": Protected, "hf://org/x@main": Protected, "hf://other/x@main": Unused, "keeper:1": Unused},
		},
		"what no rule names stays": {
			policy:   "rules: [{models: ['ci-*'], unusedFor: 1d}]",
			versions: []stored{{refs: "prod:1", came: "90d"}, {refs: "ci-x:1", came: "90d"}},
			want:     map[string]Reason{"prod:1": NoRule, "ci-x:1": Unused},
		},
		"in use, pinned, damaged and young stay whatever the rule says": {
			policy: "rules: [{models: ['*'], unusedFor: 1s, rollback: 0}]",
			versions: []stored{
				{refs: "a:1", came: "90d", inUse: true}, {refs: "b:1", came: "90d", pinned: true}, {refs: "c:1", came: "90d", broken: true},
				{refs: "d:1", came: "59m"}, {refs: "e:1", came: "90d", used: "59m"}, {refs: "f:1", came: "61m"},
			},
			want: map[string]Reason{"a:1": InUse, "b:1": Pinned, "c:1": Damaged, "d:1": Young, "e:1": Young, "f:1": Unused},
		},
		"the strongest reason is the one that is told": {
			policy:   "rules: [{models: ['*'], protect: true}]",
			versions: []stored{{refs: "a:1", came: "1m", inUse: true, pinned: true}, {refs: "b:1", came: "1m", pinned: true}, {refs: "c:1", came: "1m"}},
			want:     map[string]Reason{"a:1": InUse, "b:1": Pinned, "c:1": Protected},
		},
		"a version of two models stays if one of them keeps it": {
			policy: "rules: [{models: [prod], keepNewest: 1}, {models: ['*'], unusedFor: 1d, rollback: 0}]",
			versions: []stored{
				{refs: "ci:1.0.0 prod:1.0.0", came: "90d"}, {refs: "ci:1.1.0", came: "80d"}, {refs: "ci:0.9.0 tmp:0.9.0", came: "95d"},
			},
			want: map[string]Reason{"ci:1.0.0 prod:1.0.0": Newest, "ci:1.1.0": Unused, "ci:0.9.0 tmp:0.9.0": Unused},
		},
		"of several tags the highest version counts": {
			policy: "rules: [{models: [m], newestPatch: true, rollback: 0}]",
			versions: []stored{
				{refs: "m:1.9.0 m:2.0.0 m:latest", came: "9d"}, {refs: "m:1.9.1", came: "8d"},
			},
			want: map[string]Reason{"m:1.9.0 m:2.0.0 m:latest": Wanted, "m:1.9.1": Wanted},
		},
		"a model that nobody uses goes whole": {
			policy: "rules: [{models: ['*'], keepNewest: 3, abandonedFor: 60d}]",
			versions: []stored{
				{refs: "dead:2", came: "90d", used: "60d"}, {refs: "dead:1", came: "95d"}, {refs: "dead:x", came: "95d"},
				{refs: "alive:2", came: "90d"}, {refs: "alive:1", came: "95d", used: "59d"},
				{refs: "used:1", came: "95d", inUse: true}, {refs: "used:2", came: "95d"},
				{refs: "wished:1", came: "95d", pinned: true}, {refs: "wished:2", came: "95d"},
			},
			want: map[string]Reason{
				"dead:2": Abandoned, "dead:1": Abandoned, "dead:x": Abandoned, "alive:2": Newest, "alive:1": Newest,
				"used:1": InUse, "used:2": Newest, "wished:1": Pinned, "wished:2": Newest,
			},
		},
		"a model is not abandoned where a time is not known": {
			policy:   "rules: [{models: ['*'], keepNewest: 2, abandonedFor: 60d}]",
			versions: []stored{{refs: "m:2"}, {refs: "m:1", came: "90d"}},
			want:     map[string]Reason{"m:2": Young, "m:1": Newest},
		},
		"times in the future and unknown times count as now": {
			policy: "rules: [{models: ['*'], unusedFor: 1s, rollback: 0}]",
			versions: []stored{
				{refs: "a:1", came: "-900d"}, {refs: "b:1", came: "90d", used: "-1s"}, {refs: "c:1"}, {refs: "d:1", used: "2h"},
			},
			want: map[string]Reason{"a:1": Young, "b:1": Young, "c:1": Young, "d:1": Unused},
		},
		"an unknown time stays though nothing is too young": {
			policy:   "rules: [{models: ['*'], unusedFor: 1s, rollback: 0, minAge: 0}]",
			versions: []stored{{refs: "a:1"}, {refs: "b:1", came: "2s"}},
			want:     map[string]Reason{"a:1": Young, "b:1": Unused},
		},
		"a version that no model's name is known of stays": {
			policy:   "rules: [{models: ['*'], unusedFor: 1s, rollback: 0, minAge: 0}]\npressure: {minFree: 90%}",
			versions: []stored{{refs: "registry.example.com/a:1", came: "90d"}},
			want:     map[string]Reason{"registry.example.com/a:1": NoRule},
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			in := input(t, tc.versions...)
			want := map[string]Reason{}
			for refs, reason := range tc.want {
				first, _, _ := strings.Cut(refs, " ")
				want[first] = reason
			}
			if diff := cmp.Diff(want, reasons(t, policy(t, tc.policy).Plan(in), in)); diff != "" {
				t.Errorf("-want +got:\n%s", diff)
			}
		})
	}
}

func TestRollback(t *testing.T) {
	t.Parallel()
	series := func(change func(i int, s *stored)) []stored {
		var out []stored
		for i := range 8 { // m:1.9.7, the newest, came first in this list
			s := stored{refs: fmt.Sprintf("m:1.9.%d", 7-i), came: fmt.Sprintf("%dd", 50+i)}
			change(7-i, &s)
			out = append(out, s)
		}
		return out
	}
	for name, tc := range map[string]struct {
		policy string
		change func(i int, s *stored)
		want   string // the patches that stay, newest first
	}{
		"of versions never used, the newest and the R before it": {
			policy: "newestPatch: true", change: func(int, *stored) {}, want: "7 6 5",
		},
		"those ever used come first": {
			policy: "newestPatch: true",
			change: func(i int, s *stored) {
				if i == 1 || i == 7 {
					s.used = "49d"
				}
			},
			// 1 was used, then 6 is the latest of the others; 7 was used last.
			want: "7 6 1",
		},
		"the newest in use has its own": {
			policy: "newestPatch: true",
			change: func(i int, s *stored) { s.inUse = i == 4 || i == 1; s.pinned = i == 0 },
			// For 7: 4 and 1, which are in use. For 4: 1, then 3. 0 is pinned.
			want: "7 4 3 1 0",
		},
		"the one used last has its own": {
			policy: "newestPatch: true",
			change: func(i int, s *stored) {
				if i == 3 {
					s.used = "2d"
				}
			},
			want: "7 6 3 2 1",
		},
		"where all are unused, the newest does not go before the others": {
			policy: "unusedFor: 7d", change: func(int, *stored) {}, want: "7 6 5",
		},
		"R can be larger than what is there": {
			policy: "keepNewest: 1, rollback: 100", change: func(int, *stored) {}, want: "7 6 5 4 3 2 1 0",
		},
		"0 keeps nothing": {
			policy: "unusedFor: 7d, rollback: 0", change: func(int, *stored) {}, want: "",
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			p := policy(t, "rules: [{models: [m], "+tc.policy+"}]")
			in := input(t, series(tc.change)...)
			for range 3 { // what is kept to roll back to does not melt away
				plan := p.Plan(in)
				var stay []string
				for _, d := range plan.Decisions {
					if !d.Remove {
						stay = append(stay, strings.TrimPrefix(d.References[0], "m:1.9."))
					}
				}
				if got := strings.Join(stay, " "); got != tc.want {
					t.Errorf("stay %q, want %q", got, tc.want)
				}
				in = carryOut(in, plan)
			}
		})
	}
}

func TestOneVersionAloneHasNoRollback(t *testing.T) {
	t.Parallel()
	in := input(t, stored{refs: "hf://a/b@main", came: "90d"}, stored{refs: "m:1", came: "90d"}, stored{refs: "m:latest", came: "90d"})
	for name, reason := range reasons(t, policy(t, "rules: [{models: ['*'], unusedFor: 30d}]").Plan(in), in) {
		if reason != Unused {
			t.Errorf("%s: %s", name, reason)
		}
	}
}

// carryOut is the input after a plan.
func carryOut(in Input, p Plan) Input {
	gone := map[digest.Digest]bool{}
	for _, d := range p.Decisions {
		gone[d.Digest] = d.Remove
	}
	out := in
	out.Versions = slices.DeleteFunc(slices.Clone(in.Versions), func(v Version) bool { return gone[v.Digest] })
	out.Free, out.Trash = in.Free+in.Trash+p.Frees, 0
	return out
}

func TestWindowsHoldBackRulesAndNotPressure(t *testing.T) {
	t.Parallel()
	const rules = `rules: [{models: ["*"], unusedFor: 30d}]
windows: [{start: "0 2 * * *", duration: 4h, timezone: Europe/Berlin}]
pressure: {minFree: 10%, target: 20%}`
	p := policy(t, rules)
	in := input(t,
		stored{refs: "due:1", came: "90d", size: 500},
		stored{refs: "recent:1", came: "20d", size: 600},
		stored{refs: "older:1", came: "25d", used: "25d", size: 700},
	)
	if got := reasons(t, p.Plan(in), in); got["due:1"] != LaterOn {
		t.Errorf("outside the window: %s", got["due:1"])
	}
	why := p.Plan(in).Decisions[0].Why
	if !strings.Contains(why, "2026-03-05 02:00 CET") || !strings.Contains(why, "the limit is 30 days") {
		t.Errorf("why: %s", why)
	}
	inside := in
	inside.Now = time.Date(2026, 3, 5, 2, 0, 0, 0, p.Windows[0].Zone)
	if got := reasons(t, p.Plan(inside), inside); got["due:1"] != Unused {
		t.Errorf("inside the window: %s", got["due:1"])
	}
	asked := in
	asked.AnyTime = true
	if got := reasons(t, p.Plan(asked), asked); got["due:1"] != Unused {
		t.Errorf("asked for: %s", got["due:1"])
	}
	// Pressure takes first what is due anyway, then by last use.
	short := in
	short.Free = 900
	want := map[string]Reason{"due:1": Pressure, "older:1": Pressure, "recent:1": Recent}
	if diff := cmp.Diff(want, reasons(t, p.Plan(short), short)); diff != "" {
		t.Errorf("short of space (-want +got):\n%s", diff)
	}
}

func TestPressure(t *testing.T) {
	t.Parallel()
	const rules = "rules: [{models: [kept], protect: true}, {models: ['*'], unusedFor: 30d}]\npressure: {minFree: 10%, target: 20%}\n"
	for name, tc := range map[string]struct {
		policy      string
		free, trash int64
		held        bool // the blobs of the first version
		versions    []stored
		want        map[string]Reason
		after       int64
		short       bool
		none        bool // no pressure at all
	}{
		"with enough free, nothing": {
			free: 1000, none: true, versions: []stored{{refs: "a:1", came: "9d"}}, want: map[string]Reason{"a:1": Recent},
		},
		"the trash may be enough": {
			free: 999, trash: 1001, after: 2000, versions: []stored{{refs: "a:1", came: "9d"}}, want: map[string]Reason{"a:1": Recent},
		},
		"what rules take may be enough": {
			free: 999, after: 2099, versions: []stored{{refs: "a:1", came: "9d"}, {refs: "old:1", came: "90d", size: 1100}},
			want: map[string]Reason{"a:1": Recent, "old:1": Unused},
		},
		"the least recently used go, no more than needed": {
			free: 900, after: 2100,
			versions: []stored{
				{refs: "a:1", came: "9d", size: 600}, {refs: "b:1", came: "20d", used: "2d", size: 600},
				{refs: "c:1", came: "8d", size: 600}, {refs: "d:1", came: "7d", size: 600},
			},
			want: map[string]Reason{"a:1": Pressure, "c:1": Pressure, "d:1": Recent, "b:1": Recent},
		},
		"what has to stay stays, and the plan says that it is short": {
			free: 900, after: 1000, short: true,
			versions: []stored{
				{refs: "used:1", came: "9d", inUse: true}, {refs: "pin:1", came: "9d", pinned: true}, {refs: "kept:1", came: "9d"},
				{refs: "young:1", came: "9d", used: "1m"}, {refs: "broken:1", came: "9d", broken: true}, {refs: "a:1", came: "9d"},
				{refs: "m:3", came: "9d"}, {refs: "m:2", came: "9d"}, {refs: "m:1", came: "9d"},
			},
			want: map[string]Reason{
				"used:1": InUse, "pin:1": Pinned, "kept:1": Protected, "young:1": Young, "broken:1": Damaged, "a:1": Pressure,
				"m:3": Rollback, "m:2": Rollback, "m:1": Rollback,
			},
		},
		"what no rule names goes under pressure, but not its rollback": {
			policy: "pressure: {minFree: 10%, target: 20%}", free: 900, after: 1000, short: true,
			versions: []stored{
				{refs: "m:4", came: "9d"}, {refs: "m:3", came: "9d"}, {refs: "m:2", came: "9d"}, {refs: "m:1", came: "9d"}, {refs: "m:new", came: "1m"},
			},
			want: map[string]Reason{"m:4": Rollback, "m:3": Rollback, "m:2": Rollback, "m:1": Pressure, "m:new": NoRule},
		},
		"what others need almost whole is not taken": {
			free: 900, after: 1500, short: true,
			versions: []stored{
				{refs: "a:1", came: "20d", size: 1, shares: []int64{5000}}, {refs: "b:1", came: "19d", inUse: true, shares: []int64{5000}},
				{refs: "c:1", came: "3d", size: 600},
			},
			want: map[string]Reason{"a:1": Recent, "b:1": InUse, "c:1": Pressure},
		},
		"two that share go together": {
			free: 900, after: 5902,
			versions: []stored{
				{refs: "a:1", came: "20d", size: 1, shares: []int64{5000}}, {refs: "b:1", came: "19d", size: 1, shares: []int64{5000}},
				{refs: "c:1", came: "3d", size: 600},
			},
			want: map[string]Reason{"a:1": Pressure, "b:1": Pressure, "c:1": Recent},
		},
		"one that shares stays when the other is not needed": {
			free: 900, after: 2100,
			versions: []stored{
				{refs: "a:1", came: "20d", size: 1, shares: []int64{5000}}, {refs: "c:1", came: "10d", size: 1200},
				{refs: "b:1", came: "3d", size: 1, shares: []int64{5000}},
			},
			want: map[string]Reason{"a:1": Recent, "b:1": Recent, "c:1": Pressure},
		},
		"one that shares goes if its few bytes are what is missing": {
			free: 900, after: 2000,
			versions: []stored{
				{refs: "a:1", came: "20d", size: 1, shares: []int64{5000}}, {refs: "c:1", came: "10d", size: 1099},
				{refs: "b:1", came: "3d", size: 1, shares: []int64{5000}},
			},
			want: map[string]Reason{"a:1": Pressure, "b:1": Recent, "c:1": Pressure},
		},
		"what one of its models protects stays": {
			free: 900, after: 900, short: true,
			versions: []stored{{refs: "a:1 kept:1 z:1", came: "20d"}},
			want:     map[string]Reason{"a:1": Protected},
		},
		"held blobs are not counted": {
			free: 900, after: 1500, held: true, short: true,
			versions: []stored{{refs: "a:1", came: "20d", size: 300, shares: []int64{600}}},
			want:     map[string]Reason{"a:1": Pressure},
		},
		"held blobs free nothing": {
			free: 900, after: 1000, held: true, short: true,
			versions: []stored{{refs: "a:1", came: "20d", size: 5000}, {refs: "b:1", came: "10d"}},
			want:     map[string]Reason{"a:1": Recent, "b:1": Pressure},
		},
		"equal use: the one that came first, then the digest": {
			free: 900, after: 2000,
			versions: []stored{
				{refs: "a:1", came: "9d", used: "5d", size: 1100}, {refs: "b:1", came: "10d", used: "5d", size: 1100},
			},
			want: map[string]Reason{"a:1": Recent, "b:1": Pressure},
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			in := input(t, tc.versions...)
			in.Free, in.Trash = tc.free, tc.trash
			in.Blobs[0].Held = tc.held
			text := tc.policy
			if text == "" {
				text = rules
			}
			plan := policy(t, text).Plan(in)
			if diff := cmp.Diff(tc.want, reasons(t, plan, in)); diff != "" {
				t.Errorf("-want +got:\n%s", diff)
			}
			if (plan.Pressure == nil) != tc.none {
				t.Fatalf("report: %+v", plan.Pressure)
			}
			if tc.none {
				return
			}
			want := PressureReport{Free: tc.free, Trash: tc.trash, Limit: 1000, Target: 2000, After: tc.after, Short: tc.short}
			if diff := cmp.Diff(want, *plan.Pressure); diff != "" {
				t.Errorf("report (-want +got):\n%s", diff)
			}
			for _, d := range plan.Decisions {
				if d.Reason == Pressure && strings.Contains(d.Why, "aimed at") != tc.short {
					t.Errorf("%s: %s", name, d.Why)
				}
			}
		})
	}
}

func TestUntilFreeTakesByLastUseOnlyAndWithinThePolicy(t *testing.T) {
	t.Parallel()
	p := policy(t, `rules: [{models: [kept], protect: true}, {models: ["*"], unusedFor: 1d, abandonedFor: 2d, rollback: 1}]
windows: [{start: "0 2 * * *", duration: 4h}]`)
	in := input(t,
		stored{refs: "kept:1", came: "99d", size: 1000}, stored{refs: "a:1", came: "9d", size: 1000}, stored{refs: "b:1", came: "8d", size: 1000},
		stored{refs: "m:3", came: "20d"}, stored{refs: "m:2", came: "20d"}, stored{refs: "m:1", came: "20d"},
	)
	in.Free = 1000
	if got := p.UntilFree(Amount{Percent: 10}).Plan(in); got.Pressure != nil || got.Decisions[0].Remove {
		t.Errorf("enough is free, and yet %+v", got)
	}
	plan := p.UntilFree(Amount{Bytes: 2000}).Plan(in)
	want := map[string]Reason{"kept:1": Protected, "a:1": Pressure, "b:1": Wanted, "m:1": Pressure, "m:2": Rollback, "m:3": Rollback}
	if diff := cmp.Diff(want, reasons(t, plan, in)); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
	if p.Rules[1].UnusedFor != day || len(p.Windows) != 1 || p.Pressure != nil {
		t.Error("the policy itself was changed")
	}
	if got := None().UntilFree(Amount{Bytes: 1500}).Plan(in); got.Pressure == nil || got.Pressure.Short || !got.Decisions[0].Remove {
		t.Errorf("without a policy: %+v", got.Pressure)
	}
}

// Such a limit is a slip in the unit, or of another disk, and would take all
// that may go.
func TestALimitThatTheFileSystemCannotHaveTakesNothing(t *testing.T) {
	t.Parallel()
	until := func(a Amount) *Policy { return None().UntilFree(a) }
	for name, tc := range map[string]struct {
		policy *Policy
		want   string // in the plan; empty: pressure counts
	}{
		"more than all":            {policy(t, "pressure: {minFree: 500GiB}"), "pressure.minFree (line 2): 500GiB is more than the 90% that can be kept free of a file system of 9.8 KiB"},
		"as much as no share may":  {policy(t, "pressure: {minFree: 9001}"), "pressure.minFree"},
		"as much as a share may":   {policy(t, "pressure: {minFree: 9000}"), ""},
		"a target beyond":          {policy(t, "pressure: {minFree: 10%, target: 9600}"), "pressure.target (line 2): 9.375KiB is more than the 95%"},
		"a person asks for more":   {until(Amount{Bytes: 500 << 30}), "what is asked for: 500GiB is more than the 99%"},
		"a person asks for nearly": {until(Amount{Percent: 99}), ""},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			in := input(t, stored{refs: "a:1", came: "60d"}, stored{refs: "b:1", came: "50d", used: "2h"})
			in.Free = 6000
			plan := tc.policy.Plan(in)
			if tc.want == "" {
				if plan.Beyond != "" || plan.Pressure == nil || !plan.Decisions[0].Remove {
					t.Errorf("it does not count: %s, %+v", plan.Beyond, plan)
				}
				return
			}
			if !strings.Contains(plan.Beyond, tc.want) || plan.Pressure != nil || plan.Frees > 0 {
				t.Errorf("the plan says %q, want %q; it frees %d bytes, %+v", plan.Beyond, tc.want, plan.Frees, plan.Pressure)
			}
		})
	}
}

func TestPlanForSomeModelsLeavesTheOthers(t *testing.T) {
	t.Parallel()
	p := policy(t, "rules: [{models: ['*'], unusedFor: 1d, rollback: 0}]\npressure: {minFree: 90%}")
	in := input(t,
		stored{refs: "ci-a:1", came: "9d"}, stored{refs: "ci-b:1 ci-c:1", came: "9d"}, stored{refs: "ci-d:1 prod:1", came: "9d"}, stored{refs: "prod:2", came: "9d"},
	)
	in.Free, in.Models = 100, []string{"ci-*"}
	want := map[string]Reason{"ci-a:1": Unused, "ci-b:1": Unused, "ci-d:1": NotAsked, "prod:2": NotAsked}
	if diff := cmp.Diff(want, reasons(t, p.Plan(in), in)); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
}

func TestOfSeveralModelsTheFirstIsTold(t *testing.T) {
	t.Parallel()
	in := input(t, stored{refs: "z:1 b:1 a:1", came: "90d"})
	d := policy(t, "rules: [{models: [a], unusedFor: 1d}, {models: ['*'], unusedFor: 2d}]").Plan(in).Decisions[0]
	if d.Model != "z" || d.Rule != "rules[1] (*)" || !strings.Contains(d.Why, "the limit is 2 days") {
		t.Errorf("%+v", d)
	}
}

func TestWhySaysTheNumbers(t *testing.T) {
	t.Parallel()
	p := policy(t, `rules:
  - {models: [free], unusedFor: 30d}
  - {models: [m, n], newestPatch: true, keepNewest: 2, unusedFor: 30d, rollback: 0}
  - {models: [r], unusedFor: 30d, rollback: 1}
  - {models: [dead], keepNewest: 1, abandonedFor: 60d}
pressure: {minFree: 10%, target: 15%}`)
	in := input(t,
		stored{refs: "m:2.0.1", came: "41d"}, stored{refs: "m:2.0.0", came: "42d"}, stored{refs: "m:1.9.0", came: "43d"},
		stored{refs: "m:1.8.0", came: "44d", used: "41d"}, stored{refs: "m:1.7.0", came: "45d"}, stored{refs: "m:1.6.0", came: "90d", used: "29d"},
		stored{refs: "r:2", came: "50d"}, stored{refs: "r:1", came: "51d"}, stored{refs: "r:0", came: "52d", used: "41d"},
		stored{refs: "free:1", came: "26h"}, stored{refs: "free-not:1", came: "26h", inUse: true},
		stored{refs: "dead:1", came: "61d"}, stored{refs: "n:1.0.1", came: "70d"}, stored{refs: "n:1.0.0", came: "71d", used: "2d"},
		stored{refs: "n:0.9.1", came: "70d"}, stored{refs: "n:0.8.1", came: "70d"}, stored{refs: "n:0.8.0", came: "71d", used: "50m"},
		stored{refs: "n:0.8.2", came: "70d"},
	)
	in.Free, in.Trash = 100, 300
	var lines []string
	for _, d := range p.Plan(in).Decisions {
		lines = append(lines, fmt.Sprintf("%s %s [%s] %s", name(d), d.Reason, d.Rule, d.Why))
	}
	golden(t, "why.golden", strings.Join(lines, "\n")+"\n")
}

func TestOrderOfVersionsDoesNotMatter(t *testing.T) {
	t.Parallel()
	p, err := Profile("ci")
	if err != nil {
		t.Fatal(err)
	}
	in := crowd(500, 10)
	want := p.Plan(in)
	for range 3 {
		rand.Shuffle(len(in.Versions), func(i, j int) { in.Versions[i], in.Versions[j] = in.Versions[j], in.Versions[i] })
		if diff := cmp.Diff(want, p.Plan(in)); diff != "" {
			t.Fatalf("another order, another plan:\n%s", diff)
		}
	}
}

// crowd is a store of n versions with so many layers each, of which most are
// shared with the versions before.
func crowd(n, layers int) Input {
	r := rand.New(rand.NewPCG(1, 2))
	in := Input{Now: now, Capacity: 1 << 40, Free: 1 << 34, Versions: make([]Version, n)}
	for i := range n {
		v := &in.Versions[i]
		m := r.IntN(max(1, n/50))
		v.Digest = digest.FromString(fmt.Sprint(i))
		v.References = []string{fmt.Sprintf("model-%d:%d.%d.%d", m, r.IntN(3), r.IntN(5), i)}
		if i%4 == 0 {
			v.References = []string{fmt.Sprintf("hf://org/model-%d@%040d", m, i)}
		}
		v.Created = now.Add(-time.Duration(r.IntN(100*24)) * time.Hour)
		if i%3 == 0 {
			v.LastUsed = v.Created.Add(time.Duration(r.IntN(48)) * time.Hour)
		}
		if i%50 == 0 {
			v.InUse = []string{"container x"}
		}
		v.Layers = make([]int32, 0, layers)
		for range layers / 5 {
			v.Layers = append(v.Layers, int32(len(in.Blobs)))
			in.Blobs = append(in.Blobs, Blob{Size: 1 << 20})
		}
		for k := len(v.Layers); k < layers; k++ {
			v.Layers = append(v.Layers, int32(m*layers+k)%int32(len(in.Blobs)))
		}
		slices.Sort(v.Layers)
		v.Layers = slices.Compact(v.Layers)
	}
	return in
}

func TestPlanOfTenThousandVersionsIsQuick(t *testing.T) {
	p, err := Profile("ci")
	if err != nil {
		t.Fatal(err)
	}
	in := crowd(10_000, 100)
	begin := time.Now()
	plan := p.Plan(in)
	took := time.Since(begin)
	if plan.Pressure == nil || !plan.Decisions[0].Remove {
		t.Fatal("nothing was to be decided")
	}
	t.Logf("%d versions, %d blobs: %s", len(in.Versions), len(in.Blobs), took)
	if took > 5*time.Second { // 0.1 s on an idle machine, without the race detector
		t.Errorf("it took %s", took)
	}
}

func BenchmarkPlan(b *testing.B) {
	p, err := Profile("ci")
	if err != nil {
		b.Fatal(err)
	}
	for _, n := range []int{1000, 10_000} {
		in := crowd(n, 100)
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				p.Plan(in)
			}
		})
	}
}
