package e2e

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/larder-project/larder/internal/modelpack"
	"github.com/larder-project/larder/internal/reference"
	"github.com/larder-project/larder/internal/store"
	"github.com/larder-project/larder/internal/testenv"
	"github.com/larder-project/larder/test/engine"
)

// sidecar is a larder-sidecar of a node, as a process.
type sidecar struct {
	*process
	n       *node
	address string
	policy  string // path
}

// startSidecar starts the sidecar with a policy, and returns when it answers.
func (n *node) startSidecar(policy string, env ...string) *sidecar {
	n.t.Helper()
	s := n.newSidecar(policy)
	s.start("larder-sidecar", env...)
	return s
}

func (n *node) newSidecar(policy string) *sidecar {
	n.t.Helper()
	s := &sidecar{n: n, address: testenv.Port(n.t), policy: filepath.Join(n.t.TempDir(), "policy.yaml")}
	write(n.t, s.policy, policy)
	n.t.Cleanup(func() {
		if s.process == nil {
			return
		}
		s.end(syscall.SIGTERM)
		out := s.output()
		if strings.Contains(out, "DATA RACE") {
			n.t.Errorf("the sidecar has a data race:\n%s", out)
		}
		if n.t.Failed() {
			n.t.Logf("the sidecar's last words:\n%s", out[max(0, len(out)-6000):])
		}
	})
	return s
}

func (s *sidecar) args() []string {
	return []string{"--root", s.n.root, "--listen", s.address, "--policy", s.policy, "--grace", "500ms", "--log-format", "json"}
}

// environment is that of a sidecar that asks the node's own engine, and no
// other that may be on this host.
func (s *sidecar) environment() []string {
	return []string{
		"LARDER_USAGE_DOCKER=on", "LARDER_USAGE_CONTAINERD=on", "LARDER_CONTAINERD_ADDRESS=" + s.n.e.ContainerdSocket(),
		"LARDER_USAGE_GPU=off", "LARDER_USAGE_CSI=off", "GORACE=atexit_sleep_ms=0",
	}
}

func (s *sidecar) start(program string, env ...string) {
	s.n.t.Helper()
	s.process = s.n.spawn(filepath.Join(programs, program), nil, append(s.environment(), env...), s.args()...)
	s.n.within(20*time.Second, "the sidecar answers", func() error {
		if !s.alive() {
			s.n.t.Fatalf("the sidecar ended:\n%s", s.output())
		}
		_, _, err := s.get("/healthz")
		return err
	})
}

func (s *sidecar) get(path string) (status int, body string, err error) {
	res, err := http.Get("http://" + s.address + path)
	if err != nil {
		return 0, "", err
	}
	defer res.Body.Close()
	text, err := io.ReadAll(res.Body)
	return res.StatusCode, string(text), err
}

// page is what a path answers.
func (s *sidecar) page(path string) string {
	s.n.t.Helper()
	_, body, err := s.get(path)
	ok(s.n.t, err)
	return body
}

// line is one line of the sidecar's log.
type line struct {
	Time                                       time.Time
	Level, Msg, Cause, Result, Error, Version  string
	Model, Reason, Rule, Why, Because, Removal string
	Versions                                   int
	Bytes, Free                                int64
}

// log gives the lines with a message, or all.
func (s *sidecar) log(message string) (out []line) {
	s.n.t.Helper()
	for text := range strings.Lines(s.output()) {
		var l line
		if json.Unmarshal([]byte(text), &l) == nil && (message == "" || l.Msg == message) {
			out = append(out, l)
		}
	}
	return out
}

// logged waits for the n-th line with a message.
func (s *sidecar) logged(message string, n int) line {
	s.n.t.Helper()
	var got []line
	s.n.within(30*time.Second, fmt.Sprintf("%q is logged %d times", message, n), func() error {
		if got = s.log(message); len(got) < n {
			return fmt.Errorf("%d times:\n%s", len(got), s.output())
		}
		return nil
	})
	if len(got) < n {
		s.n.t.FailNow()
	}
	return got[n-1]
}

// ready tells whether the sidecar is ready, and what it says.
func (s *sidecar) ready() (bool, string) {
	s.n.t.Helper()
	status, body, err := s.get("/readyz")
	ok(s.n.t, err)
	return status == http.StatusOK, body
}

// models lists the names in the node's store.
func (n *node) models() map[string]bool {
	n.t.Helper()
	st, err := store.Open(filepath.Join(n.root, "store"))
	ok(n.t, err)
	versions, err := st.Versions()
	ok(n.t, err)
	out := map[string]bool{}
	for _, v := range versions {
		for _, name := range v.References {
			out[name] = true
		}
	}
	return out
}

func (n *node) has(name string) error {
	if !n.models()[name] {
		return fmt.Errorf("%s is gone", name)
	}
	return nil
}

func (n *node) hasNot(name string) error {
	if n.models()[name] {
		return fmt.Errorf("%s is there", name)
	}
	return nil
}

// greedy takes whatever is not used at this moment, at once and for good.
const greedy = `
version: 1
rules: [{models: ["*"], unusedFor: 1s, rollback: 0, minAge: 0s}]
trash: {hold: 0s}
interval: 1s
`

// Containers that run, that are stopped, and volumes alone keep what they have;
// what nothing has goes, and the log says each.
func TestSidecarRemovesWhatNothingUses(t *testing.T) {
	eachEngine(t, func(t *testing.T, e *engine.Engine) {
		n := newNode(t, e)
		for i, name := range []string{"running:1", "stopped:1", "volume:1", "unused:1"} {
			n.importModel(name, tiny(byte(30+i)))
		}
		n.startPlugin()
		running := n.start("-v", n.volume("running", "model=running:1")+":/models")
		stopped := n.start("-v", n.volume("stopped", "model=stopped:1")+":/models")
		n.docker("stop", "-t", "0", stopped)
		alone := n.volume("volume", "model=volume:1")
		s := n.startSidecar(greedy)
		n.within(20*time.Second, "what nothing uses goes", func() error { return n.hasNot("unused:1") })
		removed := s.logged("removed", 1)
		if removed.Model != "unused" || removed.Reason != "unused" || removed.Rule != "rules[0] (*)" || removed.Bytes < 1<<20 || removed.Why == "" {
			t.Errorf("the log says %+v", removed)
		}
		s.logged("clean-up ends", len(s.log("clean-up ends"))+3)
		for _, name := range []string{"running:1", "stopped:1", "volume:1"} {
			if err := n.has(name); err != nil {
				t.Error(err)
			}
		}
		if text := s.page("/"); !strings.Contains(text, "unused:1") || !strings.Contains(text, "running:1") {
			t.Error("the page shows neither what is there nor what was removed")
		}
		if got := n.sh(running, "cat /models/tokenizer/vocab.txt"); got != "a\nb\nc" {
			t.Errorf("the container sees %q", got)
		}
		n.docker("rm", "-f", "-v", running, stopped)
		n.docker("volume", "rm", alone, n.unique("running"), n.unique("stopped"))
		for _, name := range []string{"running:1", "stopped:1", "volume:1"} {
			n.within(30*time.Second, "what nothing uses any more goes", func() error { return n.hasNot(name) })
		}
	})
}

// A source that cannot tell keeps everything, and everybody is told.
func TestSidecarWithASourceThatFails(t *testing.T) {
	eachEngine(t, func(t *testing.T, e *engine.Engine) {
		n := newNode(t, e)
		n.importModel("unused:1", tiny(40))
		socket := filepath.Join(n.root, "docker.sock")
		s := n.startSidecar(greedy, "DOCKER_HOST=unix://"+socket)
		s.logged("clean-up ends", 3)
		if err := n.has("unused:1"); err != nil {
			t.Errorf("while an engine cannot be asked: %v", err)
		}
		ready, why := s.ready()
		if ready || !strings.Contains(why, "docker") || !strings.Contains(why, "nothing is removed") {
			t.Errorf("ready %v: %s", ready, why)
		}
		for _, want := range []string{`larder_source_up{source="docker"} 0`, `larder_source_up{source="mounts"} 1`, `larder_cleanup_runs_total{result="ok"} 0`} {
			if !strings.Contains(s.page("/metrics"), want) {
				t.Errorf("the metrics do not have %s", want)
			}
		}
		if text := s.page("/"); !strings.Contains(text, "Nothing is removed while docker cannot tell what is in use") {
			t.Error("the page does not say it")
		}
		if l := s.logged("clean-up ends", 1); l.Level != "ERROR" || !strings.Contains(l.Error, "docker") {
			t.Errorf("the log says %+v", l)
		}
		ok(t, os.Symlink(e.Socket(), socket))
		n.within(30*time.Second, "it goes when the engine can be asked", func() error { return n.hasNot("unused:1") })
		n.within(10*time.Second, "the sidecar is ready", func() error {
			if ready, why := s.ready(); !ready {
				return errors.New(why)
			}
			return nil
		})
	})
}

func TestSecondSidecarIsRefused(t *testing.T) {
	anEngine(t, func(t *testing.T, e *engine.Engine) {
		n := newNode(t, e)
		s := n.startSidecar(greedy)
		second := n.spawn(filepath.Join(programs, "larder-sidecar"), nil, s.environment(), "--root", n.root, "--listen", "127.0.0.1:0")
		<-second.done
		if code := second.cmd.ProcessState.ExitCode(); code != 1 || !strings.Contains(second.output(), fmt.Sprintf("another larder-sidecar (process %d) serves", s.cmd.Process.Pid)) {
			t.Errorf("the second exits with %d and says %s", code, second.output())
		}
		for _, address := range []string{"0.0.0.0:0", ":9777"} {
			open := n.spawn(filepath.Join(programs, "larder-sidecar"), nil, s.environment(), "--root", t.TempDir(), "--listen", address)
			<-open.done
			if code := open.cmd.ProcessState.ExitCode(); code != 2 || !strings.Contains(open.output(), "--allow-remote") {
				t.Errorf("listening on %s it exits with %d and says %s", address, code, open.output())
			}
		}
	})
}

// A policy that changes counts from the next moment on; one that is not valid
// changes nothing.
func TestSidecarReloadsItsPolicy(t *testing.T) {
	anEngine(t, func(t *testing.T, e *engine.Engine) {
		n := newNode(t, e)
		n.importModel("old:1", tiny(50))
		n.importModel("other:1", tiny(51))
		const later = "version: 1\nrules: [{models: [\"*\"], unusedFor: 365d}]\ninterval: 1s\n"
		s := n.startSidecar(later)
		s.logged("clean-up ends", 2)
		write(t, s.policy, "version: 1\nrules: [{models: [\"*\"], unusedFor: soon}]\n")
		s.logged("the policy is refused", 1)
		if ready, why := s.ready(); ready || !strings.Contains(why, "the policy from before is in force") {
			t.Errorf("ready %v: %s", ready, why)
		}
		if !strings.Contains(s.page("/metrics"), "larder_policy_valid 0\n") || !strings.Contains(s.page("/metrics"), "larder_policy_present 1\n") {
			t.Error("the metrics do not say that the policy is refused")
		}
		ends := len(s.log("clean-up ends"))
		s.logged("clean-up ends", ends+2)
		ok(t, errors.Join(n.has("old:1"), n.has("other:1")))
		next := strings.Replace(greedy, `"*"`, `"old"`, 1)
		write(t, s.policy+".new", next)
		ok(t, os.Rename(s.policy+".new", s.policy))
		n.within(20*time.Second, "a file that was replaced is in force", func() error { return n.hasNot("old:1") })
		ok(t, n.has("other:1"))
		loaded := len(s.log("policy in force"))
		ok(t, s.cmd.Process.Signal(syscall.SIGHUP))
		s.logged("policy in force", loaded+1)
		ok(t, os.Remove(s.policy))
		s.logged("there is no policy, so nothing is removed", 1)
	})
}

// publish brings in many versions of one small file each, quickly.
func (n *node) publish(count int, size int64) {
	n.t.Helper()
	st, err := store.Open(filepath.Join(n.root, "store"))
	ok(n.t, err)
	lease, err := st.NewLease(n.t.Context(), "test", "test")
	ok(n.t, err)
	defer lease.Release()
	for i := range count {
		content := append([]byte(fmt.Sprintf("%d", i)), make([]byte, size)...)
		d, err := st.PutBlob(n.t.Context(), lease, content)
		ok(n.t, err)
		ref, err := reference.Parse(fmt.Sprintf("many:1.0.%d", i))
		ok(n.t, err)
		_, err = st.Publish(n.t.Context(), lease, modelpack.Model{Files: []modelpack.File{{Path: "weights", Digest: d, Size: int64(len(content))}}}, []reference.Reference{ref})
		ok(n.t, err)
	}
}

// trash counts the removals of which something is left.
func (n *node) trash() int {
	n.t.Helper()
	left, err := filepath.Glob(filepath.Join(n.root, "store", "trash", "2*"))
	ok(n.t, err)
	return len(left)
}

func (n *node) verified() {
	n.t.Helper()
	if out, err := n.larderErr("verify"); err != nil {
		n.t.Errorf("verify: %v\n%s", err, out)
	}
}

// Killed in the middle of a clean-up, by SIGKILL, the next sidecar finishes it.
func TestSidecarKilledInTheMiddleOfACleanup(t *testing.T) {
	anEngine(t, func(t *testing.T, e *engine.Engine) {
		n := newNode(t, e)
		n.publish(250, 100)
		n.importModel("kept:1", tiny(60))
		n.startPlugin()
		n.volume("kept", "model=kept:1")
		// A few files a second: the trash is not empty before it is killed.
		s := n.newSidecar(strings.Replace(greedy, "interval: 1s", "interval: 2s\nlimits: {filesPerSecond: 40}", 1))
		for killed := 0; ; killed++ {
			s.start("larder-sidecar")
			if killed == 3 {
				break
			}
			// While versions are removed, and then while the trash is emptied,
			// which takes half a minute.
			if killed == 0 {
				s.logged("removed", 1)
			} else {
				s.logged("clean-up begins", 1)
				time.Sleep(2 * time.Second)
			}
			s.end(syscall.SIGKILL)
			if left := n.trash(); left == 0 {
				t.Fatal("it was not killed in the middle: the trash is empty")
			}
			n.verified()
			ok(t, n.has("kept:1"))
		}
		n.within(20*time.Second, "the versions are gone", func() error {
			if left := n.models(); len(left) != 1 {
				return fmt.Errorf("%d are left", len(left))
			}
			return nil
		})
		ok(t, n.has("kept:1"))
		n.within(patience, "the trash is empty", func() error {
			if left := n.trash(); left > 0 {
				return fmt.Errorf("%d removals are in it", left)
			}
			return nil
		})
		n.verified()
	})
}

// Told to stop in the middle of a slow emptying it stops at once, and in good
// order.
func TestSidecarStopsAtOnce(t *testing.T) {
	anEngine(t, func(t *testing.T, e *engine.Engine) {
		n := newNode(t, e)
		n.publish(100, 100)
		s := n.startSidecar(greedy + "limits: {filesPerSecond: 1}\n")
		s.logged("deleting for good", 1)
		begun := time.Now()
		s.end(syscall.SIGTERM)
		if d := time.Since(begun); d > 5*time.Second {
			t.Errorf("it stopped after %s", d)
		}
		if code := s.cmd.ProcessState.ExitCode(); code != 0 {
			t.Errorf("exit code %d:\n%s", code, s.output())
		}
		ends := s.log("clean-up ends")
		if last := ends[len(ends)-1]; last.Result != "interrupted" || strings.Contains(s.output(), `"level":"ERROR"`) {
			t.Errorf("the log says\n%s", s.output())
		}
		n.verified()
	})
}

// In a mount namespace of its own, as its unit gives it one, it holds up no
// volume: what was mounted when it began goes when its container goes.
func TestSidecarInANamespaceHoldsNothing(t *testing.T) {
	eachEngine(t, func(t *testing.T, e *engine.Engine) {
		n := newNode(t, e)
		n.importModel("tiny:1", tiny(61))
		n.startPlugin()
		v := n.volume("v", "model=tiny:1")
		c := n.start("-v", v+":/models")
		n.sh(c, "echo mine > /models/mine")
		s := n.newSidecar(greedy)
		s.process = n.spawn("unshare", nil, s.environment(), append([]string{"--mount", "--propagation", "slave", "--", filepath.Join(programs, "larder-sidecar")}, s.args()...)...)
		s.logged("clean-up ends", 2)
		ok(t, n.has("tiny:1"))
		n.docker("rm", "-f", c)
		n.eventually("nothing is mounted", n.nothingMounted)
		n.eventually("nothing is left of what was written", n.noUppers)
		n.docker("volume", "rm", v)
		n.within(20*time.Second, "the version goes", func() error { return n.hasNot("tiny:1") })
	})
}

// anEngine runs the test on one engine, where it matters not which.
func anEngine(t *testing.T, test func(t *testing.T, e *engine.Engine)) {
	t.Helper()
	need(t)
	t.Parallel()
	test(t, sharedOf(t, "current", engine.Current))
}
