package main

import (
	"encoding/json"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/larder-project/larder/internal/config"
)

const keepAll = "version: 1\nrules: [{models: [\"*\"], unusedFor: 30d}]\n"

func (b *bench) get(path string) (*http.Response, string) {
	b.t.Helper()
	res, err := http.Get(b.server.URL + path)
	if err != nil {
		b.t.Fatal(err)
	}
	defer res.Body.Close()
	body, err := io.ReadAll(res.Body)
	if err != nil {
		b.t.Fatal(err)
	}
	return res, string(body)
}

func TestOnlyReadingAndOnlyByItsOwnName(t *testing.T) {
	t.Parallel()
	b := newBench(t, keepAll)
	for name, tc := range map[string]struct {
		method, path, host string
		want               int
	}{
		"the page":              {"GET", "/", "", 200},
		"its head":              {"HEAD", "/", "", 200},
		"metrics":               {"GET", "/metrics", "", 200},
		"health":                {"GET", "/healthz", "", 200},
		"something else":        {"GET", "/etc/passwd", "", 404},
		"a path that climbs":    {"GET", "/../metrics/x", "", 404},
		"post":                  {"POST", "/", "", 405},
		"delete":                {"DELETE", "/metrics", "", 405},
		"put":                   {"PUT", "/readyz", "", 405},
		"a page of the web":     {"GET", "/", "evil.example", 421},
		"the same with a port":  {"GET", "/metrics", "evil.example:9777", 421},
		"its address, no port":  {"GET", "/healthz", "127.0.0.1", 200},
		"an empty name":         {"GET", "/healthz", ":9777", 421},
		"a name with brackets":  {"GET", "/healthz", "[evil]", 421},
		"a page of the web, v6": {"GET", "/healthz", "[::2]:9777", 421},
	} {
		req, err := http.NewRequestWithContext(t.Context(), tc.method, b.server.URL+tc.path, nil)
		if err != nil {
			t.Fatal(err)
		}
		req.Host = tc.host
		res, err := http.DefaultClient.Do(req)
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		res.Body.Close()
		if res.StatusCode != tc.want {
			t.Errorf("%s: %d, want %d", name, res.StatusCode, tc.want)
		}
		if csp := res.Header.Get("Content-Security-Policy"); !strings.HasPrefix(csp, "default-src 'none'") || strings.Contains(csp, "unsafe") {
			t.Errorf("%s: content security policy %q", name, csp)
		}
		if res.Header.Get("X-Content-Type-Options") != "nosniff" || res.Header.Get("X-Frame-Options") != "DENY" {
			t.Errorf("%s: headers %v", name, res.Header)
		}
	}
}

func TestReadinessNamesWhatIsWrong(t *testing.T) {
	t.Parallel()
	b := newBench(t, keepAll)
	ready := func() (int, map[string]check) {
		t.Helper()
		res, body := b.get("/readyz")
		var out struct {
			Ready  bool
			Checks []check
		}
		if err := json.Unmarshal([]byte(body), &out); err != nil {
			t.Fatalf("%v: %s", err, body)
		}
		if out.Ready != (res.StatusCode == http.StatusOK) {
			t.Errorf("status %d and ready %v", res.StatusCode, out.Ready)
		}
		checks := map[string]check{}
		for _, c := range out.Checks {
			checks[c.Name] = c
		}
		return res.StatusCode, checks
	}
	if status, checks := ready(); status != 503 || checks["store"].OK || checks["sources"].OK {
		t.Errorf("before the first look: %d %v", status, checks)
	}
	b.run()
	if status, checks := ready(); status != 200 {
		t.Errorf("with nothing wrong: %d %v", status, checks)
	}

	b.engine.set(errors.New("no answer"))
	b.look()
	if status, checks := ready(); status != 503 || checks["sources"].OK || !strings.Contains(checks["sources"].Detail, "engine: no answer") || !checks["store"].OK {
		t.Errorf("a source that fails: %d %v", status, checks)
	}
	if _, text := b.get("/metrics"); !strings.Contains(text, `larder_source_up{source="engine"} 0`) || !strings.Contains(text, `larder_source_errors_total{source="engine"} 1`) {
		t.Error("a source that fails is not in the metrics")
	}
	b.engine.set(nil)
	b.look()

	b.write("policy.yaml", "version: 1\nrules: [{}]\n")
	b.node.policy.reload(false)
	if status, checks := ready(); status != 503 || checks["policy"].OK || !strings.Contains(checks["policy"].Detail, "the policy from before is in force") || !strings.Contains(checks["policy"].Detail, "has no models") {
		t.Errorf("a policy that is refused: %d %v", status, checks)
	}
	b.write("policy.yaml", "version: 1\npressure: {minFree: 500PiB}\n")
	b.node.policy.reload(false)
	if status, checks := ready(); status != 503 || checks["policy"].OK || !strings.Contains(checks["policy"].Detail, "500PiB is more than the 90% that can be kept free") {
		t.Errorf("a limit beyond the disk: %d %v", status, checks)
	}
	if _, text := b.get("/metrics"); !strings.Contains(text, "larder_policy_valid 0") {
		t.Error("a limit beyond the disk is not in the metrics")
	}
	b.write("policy.yaml", keepAll)
	b.node.policy.reload(false)

	// A store whose list of references cannot be read.
	index := filepath.Join(b.store.Dir(), "index.json")
	good, err := os.ReadFile(index)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(index, []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	<-b.watched
	b.changed()
	b.until("the damage was seen", func() bool { return b.node.loop.Status().LookErr != nil })
	if status, checks := ready(); status != 503 || checks["store"].OK || !strings.Contains(checks["store"].Detail, "index.json") {
		t.Errorf("a store that cannot be read: %d %v", status, checks)
	}
	if err := os.WriteFile(index, good, 0o600); err != nil {
		t.Fatal(err)
	}
	b.look()
	if status, checks := ready(); status != 200 {
		t.Errorf("with everything put right: %d %v", status, checks)
	}
	all, _ := b.node.ready(time.Now().Add(time.Hour))
	if all[0].OK {
		t.Error("the store was last looked at an hour ago, and that is well")
	}
	if res, body := b.get("/healthz"); res.StatusCode != 200 || body != "ok\n" {
		t.Errorf("health is %d %q", res.StatusCode, body)
	}
}

// Any process of the host may connect. One that keeps connections open takes
// neither the files that a clean-up needs to open, nor the answers of others for
// long.
func TestIdleConnectionsAreFewAndNotForLong(t *testing.T) {
	t.Parallel()
	b := newBench(t, keepAll)
	server, err := newServer(b.node, newMetrics(), nil, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	server.ReadHeaderTimeout = 5 * time.Second
	var accepted atomic.Int64
	server.ConnState = func(_ net.Conn, state http.ConnState) {
		if state == http.StateNew {
			accepted.Add(1)
		}
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	served := make(chan error, 1)
	go func() { served <- server.Serve(l) }()
	for range 2 * maxConnections {
		c, err := net.Dial("tcp", l.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
	}
	for deadline := time.Now().Add(4 * time.Second); accepted.Load() < maxConnections && time.Now().Before(deadline); {
		time.Sleep(time.Millisecond)
	}
	time.Sleep(100 * time.Millisecond)
	if n := accepted.Load(); n != maxConnections {
		t.Errorf("%d connections are open at once, want %d", n, maxConnections)
	}
	client := http.Client{Timeout: 20 * time.Second}
	res, err := client.Get("http://" + l.Addr().String() + "/healthz")
	if err != nil {
		t.Fatal(err)
	}
	res.Body.Close()
	client.CloseIdleConnections()
	server.stop()
	if err := <-served; !errors.Is(err, http.ErrServerClosed) {
		t.Error(err)
	}
}

func TestAddressesThatOthersReachAreRefused(t *testing.T) {
	t.Parallel()
	for address, ok := range map[string]bool{
		"127.0.0.1:9777": true, "127.8.9.1:0": true, "[::1]:9777": true, "localhost:9777": true, "unix:///run/s.sock": true,
		":9777": false, "0.0.0.0:9777": false, "[::]:9777": false, "192.0.2.1:9777": false, "[2001:db8::1]:1": false, "[::ffff:192.0.2.1]:1": false,
	} {
		err := checkListen(t.Context(), address, false)
		if (err == nil) != ok {
			t.Errorf("listen on %s: %v", address, err)
		}
		if err != nil && !strings.Contains(err.Error(), "--allow-remote") {
			t.Errorf("listen on %s: %v does not say how it is allowed", address, err)
		}
		if err := checkListen(t.Context(), address, true); err != nil {
			t.Errorf("listen on %s, allowed: %v", address, err)
		}
	}
}

func TestASocketIsRootsAlone(t *testing.T) {
	t.Parallel()
	for allow, mode := range map[bool]os.FileMode{false: 0o600, true: 0o666} {
		path := filepath.Join(t.TempDir(), "s.sock")
		l, err := listen("unix://"+path, allow)
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		if fi, err := os.Stat(path); err != nil || fi.Mode().Perm() != mode {
			t.Errorf("allowed %v: mode %v (%v), want %v", allow, fi.Mode(), err, mode)
		}
		if hosts(config.Config{}, l) != nil {
			t.Error("a socket is asked by whatever name")
		}
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if h := hosts(config.Config{Listen: "127.0.0.9:1"}, l); !h["127.0.0.9"] || !h["localhost"] || h["example.com"] {
		t.Errorf("names %v", h)
	}
	if hosts(config.Config{Listen: "0.0.0.0:1", AllowRemote: true}, l) != nil {
		t.Error("where others are allowed they may ask by any name")
	}
}
