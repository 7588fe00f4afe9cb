// Package prometheus runs a real Prometheus for tests, which scrapes what the
// test has and evaluates the rules that Larder comes with.
package prometheus

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/larder-project/larder/internal/testenv"
)

// Server is a Prometheus of a test's own, on a port of 127.0.0.1.
type Server struct {
	URL string
	log string // path
	t   testing.TB
}

// Start starts a Prometheus that asks the target (HOST:PORT) every second, as
// the job "larder", and evaluates rules (paths of files) as often. It ends with
// the test.
func Start(t testing.TB, target string, rules ...string) *Server {
	t.Helper()
	testenv.NeedPrograms(t, "prometheus")
	dir := t.TempDir()
	address := testenv.Port(t)
	for i, r := range rules {
		path, err := filepath.Abs(r)
		if err != nil {
			t.Fatal(err)
		}
		rules[i] = fmt.Sprintf("%q", path)
	}
	config := fmt.Sprintf(`
global: {scrape_interval: 1s, scrape_timeout: 1s, evaluation_interval: 1s}
rule_files: [%s]
scrape_configs:
  - job_name: larder
    static_configs: [{targets: [%q]}]
`, strings.Join(rules, ", "), target)
	if err := os.WriteFile(filepath.Join(dir, "prometheus.yml"), []byte(config), 0o600); err != nil {
		t.Fatal(err)
	}
	s := &Server{URL: "http://" + address, log: filepath.Join(dir, "log"), t: t}
	log, err := os.Create(s.log)
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close()
	cmd := exec.Command("prometheus", "--config.file="+filepath.Join(dir, "prometheus.yml"), "--storage.tsdb.path="+filepath.Join(dir, "data"),
		"--web.listen-address="+address, "--log.level=warn")
	cmd.Stdout, cmd.Stderr = log, log
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Signal(syscall.SIGTERM)
		_ = cmd.Wait()
	})
	s.Until(30*time.Second, "Prometheus is ready", func() bool {
		res, err := http.Get(s.URL + "/-/ready")
		if err != nil {
			return false
		}
		res.Body.Close()
		return res.StatusCode == http.StatusOK
	})
	return s
}

// Until waits for a condition.
func (s *Server) Until(limit time.Duration, what string, ok func() bool) {
	s.t.Helper()
	for deadline := time.Now().Add(limit); !ok(); time.Sleep(200 * time.Millisecond) {
		if time.Now().After(deadline) {
			log, _ := os.ReadFile(s.log)
			s.t.Fatalf("not after %s: %s\n%s", limit, what, log)
		}
	}
}

// Sample is one series of the answer to a query.
type Sample struct {
	Labels map[string]string
	Value  string
}

// Query asks for the value of an expression now.
func (s *Server) Query(expression string) ([]Sample, error) {
	var data struct {
		Result []struct {
			Metric map[string]string
			Value  [2]any
		}
	}
	if err := s.get("/api/v1/query?query="+url.QueryEscape(expression), &data); err != nil {
		return nil, err
	}
	var out []Sample
	for _, r := range data.Result {
		out = append(out, Sample{Labels: r.Metric, Value: fmt.Sprint(r.Value[1])})
	}
	return out, nil
}

// Alert is an alert that is pending or firing.
type Alert struct {
	Labels      map[string]string
	Annotations map[string]string
	State       string
	ActiveAt    time.Time
}

// Firing tells whether an alert fires, and gives it.
func (s *Server) Firing(name string) (Alert, bool) {
	var data struct{ Alerts []Alert }
	if err := s.get("/api/v1/alerts", &data); err != nil {
		s.t.Error(err)
	}
	for _, a := range data.Alerts {
		if a.Labels["alertname"] == name && a.State == "firing" {
			return a, true
		}
	}
	return Alert{}, false
}

// Rules lists the alerts that are loaded, with the error of the last
// evaluation, which is empty as a rule.
func (s *Server) Rules() map[string]string {
	var data struct {
		Groups []struct {
			Rules []struct{ Name, LastError string }
		}
	}
	if err := s.get("/api/v1/rules", &data); err != nil {
		s.t.Error(err)
	}
	out := map[string]string{}
	for _, g := range data.Groups {
		for _, r := range g.Rules {
			out[r.Name] = r.LastError
		}
	}
	return out
}

func (s *Server) get(path string, data any) error {
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, s.URL+path, nil)
	if err != nil {
		return err
	}
	res, err := http.DefaultClient.Do(req)
	if err != nil {
		return err
	}
	defer res.Body.Close()
	body, err := io.ReadAll(res.Body)
	if err != nil {
		return err
	}
	answer := struct {
		Status, Error string
		Data          any
	}{Data: data}
	if err := json.Unmarshal(body, &answer); err != nil {
		return fmt.Errorf("%s: %w: %s", path, err, body)
	}
	if answer.Status != "success" {
		return fmt.Errorf("%s: %s", path, answer.Error)
	}
	return nil
}
