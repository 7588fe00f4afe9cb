package main

import (
	"context"
	"log/slog"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/larder-project/larder/internal/retention"
)

// watched is a policy file that is watched, and what was put in force.
type watched struct {
	t    *testing.T
	dir  string
	file *policyFile
	log  *buffer

	mu  sync.Mutex
	set []*retention.Policy
}

func watch(t *testing.T, name string, named bool) *watched {
	t.Helper()
	w := &watched{t: t, dir: filepath.Dir(name), log: &buffer{}}
	w.file = newPolicyFile(name, named, slog.New(slog.NewTextHandler(w.log, nil)))
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		w.file.watch(ctx, func(p *retention.Policy) {
			w.mu.Lock()
			defer w.mu.Unlock()
			w.set = append(w.set, p)
		})
	}()
	t.Cleanup(func() {
		cancel()
		<-done
	})
	return w
}

func (w *watched) until(what string, ok func() bool) {
	w.t.Helper()
	for deadline := time.Now().Add(30 * time.Second); !ok(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			w.t.Fatalf("in vain: %s\n%s", what, w.log)
		}
	}
}

func (w *watched) inForce() *retention.Policy { return w.file.state().policy }

func (w *watched) days(n int) func() bool {
	return func() bool {
		p := w.inForce()
		return p != nil && p.Rules[0].UnusedFor == time.Duration(n)*24*time.Hour
	}
}

func days(n string) string { return "version: 1\nrules: [{models: [\"*\"], unusedFor: " + n + "d}]\n" }

func put(t *testing.T, path, text string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

func TestAPolicyThatChangesIsInForceAtOnce(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "policy.yaml")
	w := watch(t, path, false)
	if w.inForce() != nil || w.file.state().err != nil {
		t.Errorf("without a file: %+v", w.file.state())
	}
	put(t, path, days("30"))
	w.until("a new file", w.days(30))
	put(t, path+".new", days("20"))
	if err := os.Rename(path+".new", path); err != nil {
		t.Fatal(err)
	}
	w.until("a file that is replaced", w.days(20))
	put(t, path, "version: 1\nrules: [{models: [], unusedFor: 1d}]\n")
	w.until("one that is not valid is refused", func() bool { return w.file.state().err != nil })
	if !w.days(20)() {
		t.Error("the policy from before is not in force")
	}
	if !strings.Contains(w.log.String(), "level=ERROR") || !strings.Contains(w.log.String(), "policy.yaml:2") {
		t.Errorf("nobody is told what is wrong: %s", w.log)
	}
	put(t, path, days("10"))
	w.until("a valid one", func() bool { return w.days(10)() && w.file.state().err == nil })
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	w.until("without a file there is no policy", func() bool { return w.inForce() == nil })
	w.until("the loop is told so", func() bool {
		w.mu.Lock()
		defer w.mu.Unlock()
		return w.set[len(w.set)-1] == nil
	})
}

// As the kubelet changes a ConfigMap: policy.yaml leads through ..data to a
// folder, and ..data is replaced.
func TestAConfigMapThatChangesIsInForceAtOnce(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	generation := func(name, text string) {
		t.Helper()
		if err := os.Mkdir(filepath.Join(dir, name), 0o755); err != nil {
			t.Fatal(err)
		}
		put(t, filepath.Join(dir, name, "policy.yaml"), text)
		if err := os.Symlink(name, filepath.Join(dir, "..data_tmp")); err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(filepath.Join(dir, "..data_tmp"), filepath.Join(dir, "..data")); err != nil {
			t.Fatal(err)
		}
	}
	generation("..1", days("30"))
	if err := os.Symlink("..data/policy.yaml", filepath.Join(dir, "policy.yaml")); err != nil {
		t.Fatal(err)
	}
	w := watch(t, filepath.Join(dir, "policy.yaml"), true)
	if !w.days(30)() {
		t.Fatal("the first is not in force")
	}
	generation("..2", days("20"))
	w.until("the second", w.days(20))
}

func TestAPolicyThatCouldNotBeReadForAMomentIsValidAgain(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "policy.yaml")
	put(t, path, days("3"))
	f := newPolicyFile(path, false, slog.New(slog.DiscardHandler))
	// A folder in its place cannot be read, as a disk that fails.
	for _, step := range []func() error{
		func() error { return os.Rename(path, path+".aside") },
		func() error { return os.Mkdir(path, 0o755) },
	} {
		if err := step(); err != nil {
			t.Fatal(err)
		}
	}
	if changed := f.reload(false); changed || f.state().err == nil || f.state().policy == nil {
		t.Errorf("a file that cannot be read: %+v", f.state())
	}
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(path+".aside", path); err != nil {
		t.Fatal(err)
	}
	if f.reload(false); f.state().err != nil {
		t.Errorf("the file is the one from before, and still: %v", f.state().err)
	}
	if f.reload(false) {
		t.Error("the same policy is put in force again")
	}
}

func TestAHangupReadsThePolicyAgain(t *testing.T) {
	path := filepath.Join(t.TempDir(), "policy.yaml")
	put(t, path, days("30"))
	w := watch(t, path, true)
	before := w.file.state().since
	// Nothing tells when it listens for the signal, which kills who does not.
	survive := make(chan os.Signal, 1)
	signal.Notify(survive, syscall.SIGHUP)
	defer signal.Stop(survive)
	w.until("it is read again though nothing has changed", func() bool {
		if err := syscall.Kill(os.Getpid(), syscall.SIGHUP); err != nil {
			t.Fatal(err)
		}
		return w.file.state().since.After(before)
	})
}

func TestAPolicyThatSomebodyNamedShouldBeThere(t *testing.T) {
	t.Parallel()
	f := newPolicyFile(filepath.Join(t.TempDir(), "policy.yaml"), true, slog.New(slog.DiscardHandler))
	if s := f.state(); s.policy != nil || s.err == nil {
		t.Errorf("state %+v", s)
	}
	if f.reload(false) {
		t.Error("nothing has changed, and there is another policy")
	}
}
