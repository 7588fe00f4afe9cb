// Package monitoring tests what is for Prometheus and Grafana with the real
// things: promtool, and a Prometheus that scrapes a real sidecar.
package monitoring

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"go.yaml.in/yaml/v3"

	"github.com/larder-project/larder/internal/testenv"
	"github.com/larder-project/larder/test/prometheus"
)

const (
	checkout  = "../.."
	rules     = checkout + "/deploy/prometheus/alerts.yaml"
	ruleTests = checkout + "/deploy/prometheus/alerts_test.yaml"
	dashboard = checkout + "/deploy/grafana/dashboard.json"
	manual    = checkout + "/docs/monitoring.md"
)

func read(t *testing.T, path string) []byte {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return data
}

func parse(t *testing.T, path string, v any) {
	t.Helper()
	if err := yaml.Unmarshal(read(t, path), v); err != nil {
		t.Fatalf("%s: %v", path, err)
	}
}

type rule struct {
	Alert       string
	Expr        string
	For         string
	Labels      map[string]string
	Annotations map[string]string
}

func alerts(t *testing.T) []rule {
	t.Helper()
	var file struct{ Groups []struct{ Rules []rule } }
	parse(t, rules, &file)
	var out []rule
	for _, g := range file.Groups {
		out = append(out, g.Rules...)
	}
	if len(out) < 8 {
		t.Fatalf("only %d alerts", len(out))
	}
	return out
}

func TestPromtoolAcceptsTheAlertsAndTheirTests(t *testing.T) {
	t.Parallel()
	testenv.NeedPrograms(t, "promtool")
	for _, args := range [][]string{{"check", "rules", rules}, {"test", "rules", ruleTests}} {
		if out, err := exec.CommandContext(t.Context(), "promtool", args...).CombinedOutput(); err != nil {
			t.Errorf("promtool %v: %v\n%s", args, err, out)
		}
	}
}

func TestEveryAlertSaysWhatToDoAndIsTestedBothWays(t *testing.T) {
	t.Parallel()
	var file struct {
		Tests []struct {
			AlertRuleTest []struct {
				Alertname string
				ExpAlerts []any `yaml:"exp_alerts"`
			} `yaml:"alert_rule_test"`
		}
	}
	parse(t, ruleTests, &file)
	fires, silent := map[string]bool{}, map[string]bool{}
	for _, test := range file.Tests {
		for _, c := range test.AlertRuleTest {
			if len(c.ExpAlerts) > 0 {
				fires[c.Alertname] = true
			} else {
				silent[c.Alertname] = true
			}
		}
	}
	text := string(read(t, manual))
	for _, a := range alerts(t) {
		if !fires[a.Alert] || !silent[a.Alert] {
			t.Errorf("%s: tested that it fires: %v, that it does not: %v", a.Alert, fires[a.Alert], silent[a.Alert])
		}
		for _, want := range []string{"summary", "description"} {
			if a.Annotations[want] == "" {
				t.Errorf("%s has no %s", a.Alert, want)
			}
		}
		if !strings.HasSuffix(a.Annotations["runbook_url"], "/docs/monitoring.md#"+strings.ToLower(a.Alert)) || !strings.Contains(text, "\n### "+a.Alert+"\n") {
			t.Errorf("%s leads to %q, and docs/monitoring.md has to have it", a.Alert, a.Annotations["runbook_url"])
		}
		if !slices.Contains([]string{"info", "warning", "critical"}, a.Labels["severity"]) {
			t.Errorf("%s has severity %q", a.Alert, a.Labels["severity"])
		}
	}
}

// sidecar is a real one, on a node with some versions, one of which it removes.
type sidecar struct {
	address string
	log     *bytes.Buffer
}

func startSidecar(t *testing.T) sidecar {
	t.Helper()
	testenv.NeedRoot(t)
	root := t.TempDir()
	build := func(program, pkg string) string {
		t.Helper()
		path := filepath.Join(root, program)
		cmd := exec.CommandContext(t.Context(), "go", "build", "-o", path, pkg)
		cmd.Dir, cmd.Env = checkout, append(os.Environ(), "CGO_ENABLED=0")
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("build %s: %v\n%s", program, err, out)
		}
		return path
	}
	env := append(slices.DeleteFunc(os.Environ(), func(s string) bool { return strings.HasPrefix(s, "LARDER_") }),
		"LARDER_ROOT="+filepath.Join(root, "node"), "LARDER_USAGE_DOCKER=off", "LARDER_USAGE_CONTAINERD=off", "LARDER_USAGE_PID_NAMESPACE=own")
	larder, program := build("larder", "./cmd/larder"), build("larder-sidecar", "./sidecar")
	for i, name := range []string{"bert:1.0.0", "bert:1.0.1", "qwen:1"} {
		dir := filepath.Join(root, "import", fmt.Sprint(i))
		if err := os.MkdirAll(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, "weights"), bytes.Repeat([]byte(name), 100_000), 0o600); err != nil {
			t.Fatal(err)
		}
		cmd := exec.CommandContext(t.Context(), larder, "import", dir, name)
		cmd.Env = env
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("import %s: %v\n%s", name, err, out)
		}
	}
	policy := filepath.Join(root, "policy.yaml")
	text := "version: 1\nrules: [{models: [\"*\"], newestPatch: true, rollback: 0, minAge: 0s}]\npressure: {minFree: 1KiB}\ntrash: {hold: 1h}\n"
	if err := os.WriteFile(policy, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	s := sidecar{address: testenv.Port(t), log: &bytes.Buffer{}}
	cmd := exec.Command(program, "--listen", s.address, "--policy", policy, "--node", "node-1", "--grace", "2s")
	cmd.Env, cmd.Stdout, cmd.Stderr = env, s.log, s.log
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Signal(syscall.SIGTERM)
		if err := cmd.Wait(); err != nil || t.Failed() {
			t.Errorf("the sidecar ended with %v\n%s", err, s.log)
		}
	})
	return s
}

func (s sidecar) metrics(t *testing.T) string {
	t.Helper()
	res, err := http.Get("http://" + s.address + "/metrics")
	if err != nil {
		return ""
	}
	defer res.Body.Close()
	text, err := io.ReadAll(res.Body)
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

// queries are all expressions of the dashboard by their panels, and those that
// fill its variables.
func queries(t *testing.T) (expressions map[string][]string, variables []string) {
	t.Helper()
	var d struct {
		Panels []struct {
			Title, Type, Description string
			Targets                  []struct{ Expr string }
		}
		Templating struct {
			List []struct {
				Name, Type string
				Query      any
			}
		}
	}
	if err := json.Unmarshal(read(t, dashboard), &d); err != nil {
		t.Fatal(err)
	}
	expressions = map[string][]string{}
	for _, p := range d.Panels {
		if p.Type == "row" {
			continue
		}
		if len(p.Targets) == 0 || p.Description == "" {
			t.Errorf("panel %q has %d queries and the description %q", p.Title, len(p.Targets), p.Description)
		}
		for _, target := range p.Targets {
			expressions[p.Title] = append(expressions[p.Title], target.Expr)
		}
	}
	for _, v := range d.Templating.List {
		if v.Type == "query" {
			variables = append(variables, fmt.Sprint(v.Query.(map[string]any)["query"]))
		}
	}
	if len(expressions) < 20 || len(variables) != 2 {
		t.Fatalf("the dashboard has %d panels and %d variables", len(expressions), len(variables))
	}
	return expressions, variables
}

func TestEveryQueryOfTheDashboardFindsDataOfARealSidecar(t *testing.T) {
	s := startSidecar(t)
	p := prometheus.Start(t, s.address, rules)
	p.Until(60*time.Second, "a clean-up that removed a version was scraped", func() bool {
		got, err := p.Query(`larder_removed_versions_total{reason="superseded"} == 1 and on() larder_last_cleanup_success_timestamp_seconds > 0`)
		return err == nil && len(got) == 1
	})
	p.Until(30*time.Second, "there are two samples to take a rate of", func() bool {
		got, err := p.Query(`count_over_time(larder_removed_versions_total{reason="superseded"}[1m]) > 3`)
		return err == nil && len(got) == 1
	})
	expressions, variables := queries(t)
	fill := strings.NewReplacer("$job", "larder", "$instance", ".*")
	for title, list := range expressions {
		for _, e := range list {
			got, err := p.Query(fill.Replace(e))
			if err != nil || len(got) == 0 {
				t.Errorf("panel %q: %s gives %v (%v)", title, e, got, err)
			}
		}
	}
	for _, v := range variables {
		series, _, ok := strings.Cut(strings.TrimPrefix(v, "label_values("), ", ")
		if got, err := p.Query(fill.Replace(series)); !ok || err != nil || len(got) == 0 {
			t.Errorf("variable %s: %v (%v)", v, got, err)
		}
	}
	t.Run("a number is the one that the sidecar has", func(t *testing.T) {
		for e, want := range map[string]string{"larder_versions": "2", "sum(larder_model_versions)": "2", "larder_trash_removals": "1", "larder_policy_valid": "1"} {
			if got, err := p.Query(e); err != nil || len(got) != 1 || got[0].Value != want {
				t.Errorf("%s is %v (%v), want %s", e, got, err, want)
			}
		}
	})
	t.Run("the alerts are loaded, and none of them fires", func(t *testing.T) {
		loaded := p.Rules()
		for _, a := range alerts(t) {
			if e, ok := loaded[a.Alert]; !ok || e != "" {
				t.Errorf("%s is loaded: %v, with error %q", a.Alert, ok, e)
			}
			if _, firing := p.Firing(a.Alert); firing {
				t.Errorf("%s fires", a.Alert)
			}
		}
	})
	t.Run("what they ask for is there", func(t *testing.T) {
		text := s.metrics(t)
		name := regexp.MustCompile(`\blarder_[a-z_]+`)
		asked := map[string]bool{}
		for _, list := range expressions {
			for _, e := range list {
				for _, m := range name.FindAllString(e, -1) {
					asked[m] = true
				}
			}
		}
		for _, a := range alerts(t) {
			for _, m := range name.FindAllString(a.Expr+a.Annotations["description"], -1) {
				asked[m] = true
			}
		}
		for m := range asked {
			if !strings.Contains(text, "\n"+m+" ") && !strings.Contains(text, "\n"+m+"{") {
				t.Errorf("the sidecar has no metric %s", m)
			}
		}
		documented := string(read(t, manual))
		for _, m := range regexp.MustCompile(`(?m)^# HELP (larder_\w+)`).FindAllStringSubmatch(text, -1) {
			if !strings.Contains(documented, "`"+m[1]) {
				t.Errorf("docs/monitoring.md does not have %s", m[1])
			}
		}
	})
}
