package retention

import (
	"fmt"
	"os"
	"regexp"
	"strings"
	"testing"
)

func manual(t *testing.T) string {
	t.Helper()
	text, err := os.ReadFile("../../docs/policy.md")
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

func TestEveryExampleOfTheManualIsValid(t *testing.T) {
	t.Parallel()
	blocks := regexp.MustCompile("(?s)```yaml\n(.*?)```").FindAllStringSubmatch(manual(t), -1)
	if len(blocks) < 4 {
		t.Fatalf("found only %d examples", len(blocks))
	}
	for _, b := range blocks {
		p, err := Parse("docs/policy.md", []byte(b[1]))
		if err != nil {
			t.Errorf("%v\n%s", err, b[1])
			continue
		}
		if w := p.Warnings(); len(w) > 0 {
			t.Errorf("%v\n%s", w, b[1])
		}
	}
}

func TestEveryKeyAndReasonIsInTheManual(t *testing.T) {
	t.Parallel()
	text := manual(t)
	_, err := Parse("x", []byte("version: 1\nx: 1\nrules: [{x: 1}]\npressure: {x: 1}\nwindows: [{x: 1}]\nlimits: {x: 1}"))
	if err == nil {
		t.Fatal("unknown keys are accepted")
	}
	lists := regexp.MustCompile("known are (.*)").FindAllStringSubmatch(err.Error(), -1)
	if len(lists) != 5 {
		t.Fatalf("the refusals do not list the keys: %v", err)
	}
	for _, l := range lists {
		for key := range strings.SplitSeq(l[1], ", ") {
			if !strings.Contains(text, key+":") {
				t.Errorf("docs/policy.md does not have the key %s", key)
			}
		}
	}
	source, err := os.ReadFile("retention.go")
	if err != nil {
		t.Fatal(err)
	}
	reasons := regexp.MustCompile(`Reason = "([a-z_]+)"`).FindAllStringSubmatch(string(source), -1)
	if len(reasons) < 15 {
		t.Fatalf("found only %d reasons", len(reasons))
	}
	for _, r := range reasons {
		want := "stays"
		if Reason(r[1]).strength() == 0 {
			want = "goes"
		}
		if !strings.Contains(text, fmt.Sprintf("| `%s` | %s |", r[1], want)) {
			t.Errorf("docs/policy.md has no row for the reason %s (%s)", r[1], want)
		}
	}
}

func TestTheManualsExampleOfRollingBackIsTrue(t *testing.T) {
	t.Parallel()
	rows := regexp.MustCompile(`(?m)^\| (1\.9\.\d)(?:, used last (week|month))? \| (stays|goes)`).FindAllStringSubmatch(manual(t), -1)
	if len(rows) != 6 {
		t.Fatalf("%d versions in the example", len(rows))
	}
	var versions []stored
	goes := map[string]bool{}
	for _, r := range rows {
		versions = append(versions, stored{refs: "qwen:" + r[1], came: "60d", used: map[string]string{"week": "7d", "month": "30d"}[r[2]]})
		goes["qwen:"+r[1]] = r[3] == "goes"
	}
	in := input(t, versions...)
	for _, d := range policy(t, "rules: [{models: [qwen], newestPatch: true, rollback: 2}]").Plan(in).Decisions {
		if d.Remove != goes[name(d)] {
			t.Errorf("%s: %s (%s)", name(d), d.Reason, d.Why)
		}
	}
}

func TestTheManualsTableOfProfilesIsTrue(t *testing.T) {
	t.Parallel()
	_, table, ok := strings.Cut(manual(t), "## Profiles")
	if !ok {
		t.Fatal("no table of profiles")
	}
	columns := strings.Split(strings.Split(strings.TrimSpace(table), "\n")[0], "|")[2:5]
	for i, name := range columns {
		p, err := Profile(strings.Trim(name, " `"))
		if err != nil {
			t.Fatal(err)
		}
		r := p.Rules[0]
		duration := func(d int64, text string) string {
			if d == 0 {
				return ""
			}
			return text
		}
		for row, want := range map[string]string{
			"newest that stay":       strings.TrimSuffix(fmt.Sprint(r.KeepNewest), "0"),
			"unused for":             FormatDuration(r.UnusedFor),
			"whole model unused for": duration(int64(r.AbandonedFor), FormatDuration(r.AbandonedFor)),
			"rollback":               fmt.Sprint(r.Rollback),
			"`minAge`":               FormatDuration(r.MinAge),
			"pressure":               fmt.Sprintf("%s to %s", p.Pressure.MinFree, p.Pressure.Target),
			"trash":                  FormatDuration(p.TrashHold),
		} {
			_, rest, ok := strings.Cut(table, "\n| "+row+" |")
			if !ok {
				t.Errorf("no row %s", row)
				continue
			}
			line, _, _ := strings.Cut(rest, "\n")
			if got := strings.TrimSpace(strings.Split(line, "|")[i]); got != want {
				t.Errorf("%s of %s: the manual says %q, it is %q", row, name, got, want)
			}
		}
	}
}
