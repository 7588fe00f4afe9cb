package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"os/signal"
	"path/filepath"
	"sync"
	"syscall"
	"time"

	"github.com/fsnotify/fsnotify"

	"github.com/larder-project/larder/internal/retention"
)

// policyFile is the file with the policy, and what became of it.
type policyFile struct {
	path  string
	named bool // by somebody, so that it should be there
	log   *slog.Logger

	mu      sync.Mutex
	read    []byte // of the file when it was last read; nil: it was not there
	refused error  // why that is no policy; nil: it is one
	now     policyState
}

// policyState is the policy in force.
type policyState struct {
	policy *retention.Policy // nil: none
	since  time.Time
	err    error // why what the file says now is not in force; nil: it is
}

const (
	// policySettles is how long a change of the file is waited for to be whole.
	policySettles = 500 * time.Millisecond
	// policyEvery is how often the file is read where nothing tells of a
	// change, as on a file system of another host.
	policyEvery = time.Minute
)

// newPolicyFile reads the file for the first time. One that is not valid is no
// reason not to start: what the sidecar knows is wanted most when something is
// wrong.
func newPolicyFile(path string, named bool, log *slog.Logger) *policyFile {
	f := &policyFile{path: path, named: named, log: log}
	f.reload(true)
	return f
}

func (f *policyFile) state() policyState {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.now
}

// reload reads the file again, and tells whether another policy is in force
// now. A policy that is not valid is refused, and the one before stays in force.
// Without a file there is none: whoever takes it away wants nothing removed.
func (f *policyFile) reload(force bool) (changed bool) {
	data, err := os.ReadFile(f.path)
	f.mu.Lock()
	defer f.mu.Unlock()
	if err == nil && !force && f.read != nil && bytes.Equal(data, f.read) {
		f.now.err = f.refused // and no more that it could not be read
		return false
	}
	switch {
	case errors.Is(err, fs.ErrNotExist):
		changed = force || f.read != nil
		f.read = nil
		if !changed {
			return false
		}
		f.now = policyState{since: time.Now()}
		if f.named {
			f.now.err = fmt.Errorf("read policy: %w", err)
		}
		f.log.Warn("there is no policy, so nothing is removed", "file", f.path)
		return true
	case err == nil:
		f.read = append([]byte{}, data...)
		var p *retention.Policy
		p, err = retention.Parse(f.path, data)
		if f.refused = err; err == nil {
			f.now = policyState{policy: p, since: time.Now()}
			f.log.Info("policy in force", "file", f.path, "profile", p.Profile, "rules", len(p.Rules))
			for _, w := range p.Warnings() {
				f.log.Warn("policy", "file", f.path, "warning", w)
			}
			return true
		}
	}
	kept := "none, so that nothing is removed"
	if f.now.policy != nil {
		kept = "the one from before"
	}
	f.now.err = err
	f.log.Error("the policy is refused", "file", f.path, "in_force", kept, "error", err)
	return false
}

// watch reads the file again when it changes and on SIGHUP, until the context
// ends.
func (f *policyFile) watch(ctx context.Context, set func(*retention.Policy)) {
	hangup := make(chan os.Signal, 1)
	signal.Notify(hangup, syscall.SIGHUP)
	defer signal.Stop(hangup)
	// Its folder is watched and not the file: a file that is replaced, or that
	// a link leads to, as in a ConfigMap, is another one afterwards.
	var events chan fsnotify.Event
	var lost chan error // so many events that some were dropped
	if w, err := fsnotify.NewWatcher(); err == nil {
		defer w.Close()
		if err := w.Add(filepath.Dir(f.path)); err == nil {
			events, lost = w.Events, w.Errors
		}
	}
	if events == nil {
		f.log.Info("changes of the policy are seen within a minute, or on SIGHUP", "file", f.path)
	}
	tick := time.NewTicker(policyEvery)
	defer tick.Stop()
	// Once now: it may have changed since it was read and before it was watched.
	settled := time.After(policySettles)
	for {
		force := false
		select {
		case <-ctx.Done():
			return
		case <-events:
			settled = time.After(policySettles)
			continue
		case <-lost:
			settled = time.After(policySettles)
			continue
		case <-hangup:
			force = true
		case <-settled:
			settled = nil
		case <-tick.C:
		}
		if f.reload(force) {
			set(f.state().policy)
		}
	}
}
