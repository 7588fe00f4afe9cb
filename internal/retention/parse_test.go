package retention

import (
	"errors"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
)

// same compares policies by what they say, not by where it was said.
var same = cmp.Options{
	cmpopts.IgnoreFields(Policy{}, "Name", "origins"),
	cmp.Comparer(func(a, b Window) bool { return a.String() == b.String() }),
}

func TestEveryKeyIsRead(t *testing.T) {
	t.Parallel()
	got, err := Parse("policy.yaml", []byte(`
version: 1
rules:
  - models: ["hf://Qwen/*", "qwen"]
    protect: true
  - models: ["ci-*"]
    newestPatch: true
    keepNewest: 3
    unusedFor: 30d
    abandonedFor: 12w
    rollback: 5
    minAge: 90m
  - {models: ["*"], protect: false, unusedFor: 1d12h}
pressure: {minFree: 500GiB, target: 15%}
trash: {hold: 0}
unfinished: {hold: 2w}
windows:
  - {start: "0 2 * * *", duration: 4h, timezone: Europe/Berlin}
  - {start: "0 0 * * 0", duration: 1d}
limits: {bytesPerSecond: 200MiB, filesPerSecond: 50}
interval: 30m
`))
	if err != nil {
		t.Fatal(err)
	}
	want := &Policy{
		Rules: []Rule{
			{Models: []string{"hf://Qwen/*", "qwen"}, Protect: true, Rollback: 2, MinAge: time.Hour},
			{Models: []string{"ci-*"}, NewestPatch: true, KeepNewest: 3, UnusedFor: 30 * day, AbandonedFor: 84 * day, Rollback: 5, MinAge: 90 * time.Minute},
			{Models: []string{"*"}, UnusedFor: 36 * time.Hour, Rollback: 2, MinAge: time.Hour},
		},
		Pressure:       &Watermarks{MinFree: Amount{Bytes: 500 << 30}, Target: Amount{Percent: 15}},
		UnfinishedHold: 14 * day,
		Windows:        []Window{window(t, "0 2 * * *", 4*time.Hour, "Europe/Berlin"), window(t, "0 0 * * 0", day, "UTC")},
		Limits:         Limits{BytesPerSecond: 200 << 20, FilesPerSecond: 50},
		Interval:       30 * time.Minute,
	}
	if diff := cmp.Diff(want, got, same); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
}

func TestWhatIsNotSaidHasDefaults(t *testing.T) {
	t.Parallel()
	if diff := cmp.Diff(None(), policy(t, ""), same); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
	for text, want := range map[string]Watermarks{
		"{minFree: 10%}":                 {Amount{Percent: 10}, Amount{Percent: 15}},
		"{minFree: 12.5%}":               {Amount{Percent: 12.5}, Amount{Percent: 17.5}},
		"{minFree: 90%}":                 {Amount{Percent: 90}, Amount{Percent: 95}},
		"{minFree: 50GiB}":               {Amount{Bytes: 50 << 30}, Amount{Bytes: 50 << 30, Percent: 5}},
		"{minFree: 1073741824}":          {Amount{Bytes: 1 << 30}, Amount{Bytes: 1 << 30, Percent: 5}},
		"{minFree: 10%, target: 10%}":    {Amount{Percent: 10}, Amount{Percent: 10}},
		"{minFree: 10 %, target: 50GiB}": {Amount{Percent: 10}, Amount{Bytes: 50 << 30}},
	} {
		if diff := cmp.Diff(&want, policy(t, "pressure: "+text).Pressure); diff != "" {
			t.Errorf("%s (-want +got):\n%s", text, diff)
		}
	}
}

func TestAFileOverridesItsProfileFieldByField(t *testing.T) {
	t.Parallel()
	profile := func() *Policy {
		p, err := Profile("ci")
		if err != nil {
			t.Fatal(err)
		}
		return p
	}
	for text, change := range map[string]func(*Policy){
		"":          func(*Policy) {},
		"rules: []": func(p *Policy) { p.Rules = nil },
		"rules: [{models: [a], protect: true}]": func(p *Policy) {
			p.Rules = []Rule{{Models: []string{"a"}, Protect: true, Rollback: 2, MinAge: time.Hour}}
		},
		"pressure: off":               func(p *Policy) { p.Pressure = nil },
		"pressure: {minFree: 20%}":    func(p *Policy) { p.Pressure.MinFree = Amount{Percent: 20} },
		"pressure: {target: 30%}":     func(p *Policy) { p.Pressure.Target = Amount{Percent: 30} },
		"pressure: {minFree: 40%}":    func(p *Policy) { p.Pressure = &Watermarks{Amount{Percent: 40}, Amount{Percent: 45}} },
		"trash: {hold: 1h}":           func(p *Policy) { p.TrashHold = time.Hour },
		"limits: {filesPerSecond: 5}": func(p *Policy) { p.Limits.FilesPerSecond = 5 },
		"interval: 2h":                func(p *Policy) { p.Interval = 2 * time.Hour },
	} {
		want := profile()
		change(want)
		for _, whole := range []string{"profile: ci\n" + text, text + "\nprofile: ci"} {
			if diff := cmp.Diff(want, policy(t, whole), same); diff != "" {
				t.Errorf("%s (-want +got):\n%s", whole, diff)
			}
		}
	}
	p := policy(t, "profile: conservative\nwindows: []\nlimits: off")
	if len(p.Windows) != 0 || p.Limits != (Limits{}) || p.Pressure == nil {
		t.Errorf("got %+v", p)
	}
}

func TestWhereAValueComesFrom(t *testing.T) {
	t.Parallel()
	p := policy(t, "profile: ci\npressure:\n  target: 30%\nlimits: {filesPerSecond: 5}")
	for key, want := range map[string]string{
		"pressure.target": "line 4", "pressure.minFree": "profile ci", "limits.filesPerSecond": "line 5", "limits.bytesPerSecond": "default",
		"rules[0].minAge": "profile ci", "interval": "profile ci", "windows": "default",
	} {
		if got := p.From(key); got != want {
			t.Errorf("%s comes from %s, want %s", key, got, want)
		}
	}
	p = policy(t, "profile: ci\nrules:\n  - models: [a]\n    keepNewest: 1\npressure: {minFree: 50%}")
	for key, want := range map[string]string{"rules[0].minAge": "default", "rules[0]": "line 4", "pressure.target": "default"} {
		if got := p.From(key); got != want {
			t.Errorf("%s comes from %s, want %s", key, got, want)
		}
	}
}

func TestBadPoliciesAreRefusedWithTheirLines(t *testing.T) {
	t.Parallel()
	rule := func(s string) string { return "version: 1\nrules:\n  - " + s }
	for name, tc := range map[string]struct{ text, want string }{
		"an empty file":              {"", "policy.yaml: it is empty; a policy begins with version: 1"},
		"nothing but comments":       {"# nothing\n", "policy.yaml: it is empty"},
		"a file cut short":           {"version: 1\nrules: [", "line 2"},
		"a list":                     {"- version: 1\n", "policy.yaml:1: it is not a list of KEY: VALUE"},
		"null":                       {"~", "policy.yaml:1: it is not a list of KEY: VALUE"},
		"two documents":              {"version: 1\n---\nversion: 1\n", "a second document"},
		"a broken second document":   {"version: 1\n---\n[", "line 3"},
		"too large":                  {"version: 1 #" + strings.Repeat("x", maxFile), "larger than 1 MiB"},
		"no version":                 {"trash: {hold: 1d}\n", "policy.yaml:1: version: 1 is missing"},
		"another version":            {"version: 2\n", "policy.yaml:1: version 2 is not known here; this Larder reads version 1"},
		"a version of text":          {"version: \"1\"\n", "policy.yaml:1: version takes the number 1"},
		"an unknown profile":         {"version: 1\nprofile: prod\n", `policy.yaml:2: there is no profile "prod"; there are ci, conservative, inference-node`},
		"a profile that is no text":  {"version: 1\nprofile: [ci]\n", "policy.yaml:2: profile takes the name of a profile"},
		"an unknown key":             {"version: 1\nrule: []\n", `policy.yaml:2: unknown key "rule"; known are version, profile, rules`},
		"a key in other letters":     {rule("{models: [a], keep_newest: 1}"), `policy.yaml:3: unknown key "rules[0].keep_newest"; did you mean keepNewest?`},
		"a key twice":                {"version: 1\ntrash: {hold: 1d}\ntrash: {hold: 2d}\n", "policy.yaml:3: trash is set twice, first on line 2"},
		"a key of a rule twice":      {rule("models: [a]\n    unusedFor: 1d\n    unusedFor: 2d"), "policy.yaml:5: rules[0].unusedFor is set twice, first on line 4"},
		"a key that is no word":      {"version: 1\n1: 2\n", "policy.yaml:2: a key that is not a word"},
		"a merge key":                {"version: 1\n<<: {interval: 1h}\n", "policy.yaml:2: a key that is not a word"},
		"an alias":                   {"version: 1\ntrash: &a {hold: 1d}\nunfinished: *a\n", "policy.yaml:3: unfinished takes hold"},
		"rules that are no list":     {"version: 1\nrules: {models: [a]}\n", "policy.yaml:2: rules takes a list"},
		"rules of nothing":           {"version: 1\nrules:\n", "policy.yaml:2: rules takes a list"},
		"a rule that is text":        {rule("keep"), "policy.yaml:3: rules[0] takes models, protect"},
		"a rule without models":      {rule("unusedFor: 1d"), "policy.yaml:3: rules[0] has no models"},
		"no models":                  {rule("{models: [], unusedFor: 1d}"), "policy.yaml:3: rules[0].models is empty"},
		"models as text":             {rule("{models: a, unusedFor: 1d}"), "policy.yaml:3: rules[0].models takes a list of patterns"},
		"a pattern that is a number": {rule("{models: [1], unusedFor: 1d}"), "policy.yaml:3: rules[0].models[0] takes a pattern in quotes"},
		"an empty pattern":           {rule(`{models: [""], unusedFor: 1d}`), "policy.yaml:3: rules[0].models: a pattern is empty"},
		"a pattern with a tag":       {rule(`{models: ["qwen:1.9"], protect: true}`), `"qwen:1.9" has a tag or a revision, and a rule is about a model: write "qwen"`},
		"a pattern with a revision":  {rule(`{models: ["hf://a/b@main"], protect: true}`), `write "hf://a/b"`},
		"a rule that keeps all":      {rule("{models: [a], rollback: 3}"), "policy.yaml:3: rules[0] would keep everything; say protect: true if that is meant"},
		"protect and more":           {rule("{models: [a], protect: true, unusedFor: 1d}"), "policy.yaml:3: rules[0] protects all versions"},
		"abandoned before unused":    {rule("{models: [a], unusedFor: 30d, abandonedFor: 7d}"), "abandonedFor (7d) is shorter than unusedFor (30d)"},
		"protect as text":            {rule("{models: [a], protect: on}"), "policy.yaml:3: rules[0].protect takes true or false"},
		"keepNewest 0":               {rule("{models: [a], keepNewest: 0}"), "policy.yaml:3: rules[0].keepNewest is a number from 1 to 1000000"},
		"a negative rollback":        {rule("{models: [a], rollback: -1}"), "rules[0].rollback is a number from 0"},
		"a count that is text":       {rule("{models: [a], keepNewest: three}"), "rules[0].keepNewest takes a number"},
		"a duration without unit":    {rule("{models: [a], unusedFor: 30}"), `rules[0].unusedFor takes a duration such as 30d, 12h or 1w, "30" is none`},
		"a duration in months":       {rule("{models: [a], unusedFor: 3mo}"), `"3mo" is none`},
		"a duration of nothing":      {rule("{models: [a], unusedFor: 0s}"), "rules[0].unusedFor is at least 1s"},
		"a negative duration":        {"version: 1\ntrash: {hold: -1d}\n", "policy.yaml:2: trash.hold is at least 0s"},
		"a duration beyond all":      {"version: 1\ntrash: {hold: 99999999999w}\n", "policy.yaml:2: trash.hold takes a duration"},
		"trash that is a duration":   {"version: 1\ntrash: 1d\n", "policy.yaml:2: trash takes hold"},
		"pressure without minFree":   {"version: 1\npressure: {target: 10%}\n", "policy.yaml:2: pressure needs minFree"},
		"pressure that is true":      {"version: 1\npressure: true\n", "policy.yaml:2: pressure takes minFree, target"},
		"a target below minFree":     {"version: 1\npressure: {minFree: 10%, target: 9%}\n", "policy.yaml:2: pressure.target (9%) is below minFree (10%)"},
		"a target in bytes below":    {"version: 1\npressure: {minFree: 2GiB, target: 1GiB}\n", "pressure.target (1GiB) is below minFree (2GiB)"},
		"a target below, by profile": {"version: 1\nprofile: ci\npressure: {target: 10%}\n", "pressure.target (10%) is below minFree (15%)"},
		"nothing free":               {"version: 1\npressure: {minFree: 0%}\n", `pressure.minFree: "0%" is not a share between 0% and 100%`},
		"all free":                   {"version: 1\npressure: {minFree: 91%}\n", "pressure.minFree is at most 90%"},
		"free that is no amount":     {"version: 1\npressure: {minFree: much}\n", `"much" is neither a size such as 500GiB nor a share such as 10%`},
		"a size beyond all":          {"version: 1\npressure: {minFree: 99999999999999PiB}\n", "is neither a size"},
		"windows that are off":       {"version: 1\nwindows: off\n", "policy.yaml:2: windows takes a list; leave it out, or write [] for any time"},
		"a window without duration":  {"version: 1\nwindows: [{start: '0 2 * * *'}]\n", "policy.yaml:2: windows[0] needs start and duration"},
		"a window that never comes":  {"version: 1\nwindows: [{start: '0 0 31 4 *', duration: 1h}]\n", "policy.yaml:2: windows[0]: \"0 0 31 4 *\" never comes"},
		"an unknown time zone":       {"version: 1\nwindows: [{start: '0 0 * * *', duration: 1h, timezone: Berlin}]\n", `"Berlin" is not a time zone`},
		"limits too low":             {"version: 1\nlimits: {bytesPerSecond: 1KiB}\n", "policy.yaml:2: limits.bytesPerSecond takes a size such as 200MiB, at least 1MiB"},
		"an interval of nothing":     {"version: 1\ninterval: 1ms\n", "policy.yaml:2: interval is at least 1s"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			p, err := Parse("policy.yaml", []byte(tc.text))
			if err == nil {
				t.Fatalf("accepted: %+v", p)
			}
			if !errors.Is(err, ErrInvalid) || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("got %v, want %q", err, tc.want)
			}
		})
	}
}

func TestAllProblemsAreToldAtOnceInTheOrderOfTheFile(t *testing.T) {
	t.Parallel()
	_, err := Parse("policy.yaml", []byte(`rules:
  - {models: [a], unusedFor: soon}
  - {models: ["b:1"], keepnewest: 2}
trash: {hold: 1 day}
pressure: {minFree: 10%, target: 5%}
profile: none
interval: 1h
`))
	var invalid *InvalidError
	if !errors.As(err, &invalid) {
		t.Fatal(err)
	}
	var lines []int
	for _, p := range invalid.Problems {
		lines = append(lines, p.Line)
	}
	if want := []int{1, 2, 3, 3, 4, 5, 6}; !slices.Equal(lines, want) {
		t.Errorf("problems on lines %v, want %v:\n%v", lines, want, err)
	}
	if first, _, _ := strings.Cut(err.Error(), "\n"); first != "policy.yaml is not a valid policy:" {
		t.Errorf("it begins with %q", first)
	}
}

func TestDurations(t *testing.T) {
	t.Parallel()
	for text, want := range map[string]time.Duration{
		"30d": 30 * day, "1w": 7 * day, "1w2d3h4m5s": 9*day + 3*time.Hour + 4*time.Minute + 5*time.Second,
		"1.5d": 36 * time.Hour, "90m": 90 * time.Minute, "0": 0, "0s": 0, "-1d": -day,
	} {
		got, err := ParseDuration(text)
		if err != nil || got != want {
			t.Errorf("%s: %s, %v; want %s", text, got, err, want)
		}
		if again, err := ParseDuration(FormatDuration(want)); err != nil || again != want {
			t.Errorf("%s is written %s, which is %s (%v)", want, FormatDuration(want), again, err)
		}
	}
	for _, text := range []string{"", "d", "30", "3mo", "1y", "30 d", "30D", "99999999w", "1..5d"} {
		if got, err := ParseDuration(text); err == nil {
			t.Errorf("%q is %s", text, got)
		}
	}
}

func TestAmountsOfAFileSystem(t *testing.T) {
	t.Parallel()
	for text, want := range map[string]int64{"10%": 100, "0.5%": 5, "1KiB": 1024, "1k": 1024, "200": 200} {
		a, err := ParseAmount(text)
		if err != nil || a.Of(1000) != want {
			t.Errorf("%s of 1000 bytes is %d, %v; want %d", text, a.Of(1000), err, want)
		}
		if again, err := ParseAmount(a.String()); err != nil || again != a {
			t.Errorf("%s is written %s, which is %v, %v", text, a, again, err)
		}
	}
	if got := (Amount{Bytes: 1 << 30, Percent: 5}).String(); got != "1GiB + 5%" {
		t.Error(got)
	}
}

func TestProfilesAreWholePolicies(t *testing.T) {
	t.Parallel()
	if want := []string{"ci", "conservative", "inference-node"}; !reflect.DeepEqual(Profiles(), want) {
		t.Errorf("profiles %v, want %v", Profiles(), want)
	}
	for _, name := range Profiles() {
		text, err := ProfileText(name)
		if err != nil {
			t.Fatal(err)
		}
		direct, err := Parse("policy.yaml", text)
		if err != nil {
			t.Fatal(err)
		}
		byName := policy(t, "profile: "+name)
		if diff := cmp.Diff(direct, byName, same, cmpopts.IgnoreFields(Policy{}, "Profile")); diff != "" {
			t.Errorf("%s: its text and its name say different things:\n%s", name, diff)
		}
		if direct.Pressure == nil || len(direct.Rules) == 0 {
			t.Errorf("%s: %+v", name, direct)
		}
	}
	if p, err := Profile("../ci"); err == nil {
		t.Errorf("got %+v", p)
	}
}

func FuzzParse(f *testing.F) {
	for _, name := range Profiles() {
		text, err := ProfileText(name)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(text)
	}
	files, err := filepath.Glob("testdata/*.yaml")
	if err != nil || len(files) == 0 {
		f.Fatalf("no seeds: %v", err)
	}
	for _, file := range files {
		text, err := os.ReadFile(file)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(text)
	}
	f.Add([]byte("version: 1\npressure: {minFree: 1e300TiB}\nwindows: [{start: '*/7 1-3 L * 7', duration: 1h}]"))
	in := crowd(20, 5)
	f.Fuzz(func(t *testing.T, data []byte) {
		p, err := Parse("policy.yaml", data)
		if err != nil {
			var invalid *InvalidError
			if !errors.As(err, &invalid) || len(invalid.Problems) == 0 {
				t.Fatalf("refused without a problem: %v", err)
			}
			return
		}
		if p.Explain() == "" {
			t.Error("nothing to explain")
		}
		p.Warnings()
		if plan := p.Plan(in); len(plan.Decisions) != len(in.Versions) {
			t.Errorf("%d of %d versions are decided on", len(plan.Decisions), len(in.Versions))
		}
	})
}
