// Package gpu knows which versions the processes on this node's GPUs work with.
//
// It asks a helper program, larder-gpu, which processes there are: NVIDIA's
// library (NVML) ends a process that uses it wrongly, and needs cgo. Package
// volume knows what a process shows. A process on a GPU is one more reason to
// keep a version; that there is none is no reason to remove it.
package gpu

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/larder-project/larder/internal/usage"
)

// Helper is the name of the helper program.
const Helper = "larder-gpu"

// Exit codes of the helper.
const (
	ExitDone   = 0
	ExitFailed = 1
	ExitAbsent = 3 // no NVIDIA driver, or no library of it
)

// Process is one process on one GPU: a line of the helper's output.
type Process struct {
	GPU    int    `json:"gpu"` // its index
	UUID   string `json:"uuid"`
	Name   string `json:"name"` // of the GPU's model
	PID    int    `json:"pid"`
	Memory uint64 `json:"memory,omitempty"` // bytes of the GPU's; 0 where the driver does not tell
}

// End is the last line of the helper's output. Without it the list is not
// whole.
type End struct {
	End       bool `json:"end"`       // always true
	Processes int  `json:"processes"` // lines before this one
}

const (
	// limit bounds one run of the helper: without persistence mode the driver
	// takes seconds to start a GPU.
	limit = 20 * time.Second
	// outputLimit is what the helper may print; a line has some 200 bytes.
	outputLimit = 8 << 20
)

// Source knows the versions of processes on GPUs.
type Source struct {
	helper   string
	versions func(pid int) ([]digest.Digest, error)

	mu    sync.Mutex
	stuck *run // a helper that was killed and has not ended
}

// New makes a source. The helper is a path, or empty for larder-gpu beside this
// program or on the PATH.
func New(helper string, versions func(pid int) ([]digest.Digest, error)) *Source {
	return &Source{helper: helper, versions: versions}
}

// Name implements usage.Source.
func (s *Source) Name() string { return "gpu" }

// Uses implements usage.Source.
func (s *Source) Uses(ctx context.Context) ([]usage.Use, error) {
	processes, err := s.processes(ctx)
	if err != nil {
		return nil, err
	}
	var uses []usage.Use
	for _, p := range processes {
		versions, err := s.versions(p.PID)
		if err != nil {
			return nil, err
		}
		u := usage.Use{PID: p.PID, GPU: fmt.Sprintf("%d (%s)", p.GPU, p.Name)}
		u.By = fmt.Sprintf("process %d on GPU %s", p.PID, u.GPU)
		u.Container.ID = usage.ContainerID(p.PID)
		for _, d := range versions {
			u.Version = d
			uses = append(uses, u)
		}
	}
	return uses, nil
}

// find looks for the helper.
func (s *Source) find() (string, error) {
	if s.helper != "" {
		return s.helper, nil
	}
	if self, err := os.Executable(); err == nil {
		beside := filepath.Join(filepath.Dir(self), Helper)
		if _, err := os.Stat(beside); err == nil {
			return beside, nil
		}
	}
	path, err := exec.LookPath(Helper)
	if errors.Is(err, exec.ErrNotFound) {
		return "", fmt.Errorf("%s: %w", Helper, usage.ErrAbsent)
	}
	return path, err
}

func (s *Source) processes(ctx context.Context) ([]Process, error) {
	path, err := s.find()
	if err != nil {
		return nil, err
	}
	out, err := s.run(ctx, path)
	if err != nil {
		return nil, err
	}
	processes, err := parse(out)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return processes, nil
}

// run is one run of the helper.
type run struct {
	cmd            *exec.Cmd
	stdout, stderr bytes.Buffer
	done           chan struct{}
	err            error
}

// run runs the helper to its end. A driver that hangs may hold it even when it
// is killed; then it is left behind, and none is started beside it.
func (s *Source) run(ctx context.Context, path string) ([]byte, error) {
	if err := s.free(); err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	r := &run{cmd: exec.CommandContext(ctx, path), done: make(chan struct{})}
	r.cmd.Stdout, r.cmd.Stderr = &bounded{&r.stdout}, &bounded{&r.stderr}
	r.cmd.WaitDelay = time.Second
	if err := r.cmd.Start(); err != nil {
		return nil, fmt.Errorf("run %s: %w", path, err)
	}
	go func() {
		r.err = r.cmd.Wait()
		close(r.done)
	}()
	select {
	case <-r.done:
	case <-ctx.Done():
		select {
		case <-r.done:
		case <-time.After(2 * r.cmd.WaitDelay):
			s.mu.Lock()
			s.stuck = r
			s.mu.Unlock()
			return nil, fmt.Errorf("run %s: it gave no answer and cannot be killed: %w", path, ctx.Err())
		}
	}
	if err := context.Cause(ctx); err != nil {
		return nil, fmt.Errorf("run %s: it gave no answer: %w", path, err)
	}
	var exit *exec.ExitError
	switch {
	case r.err == nil:
		return r.stdout.Bytes(), nil
	case errors.As(r.err, &exit) && exit.ExitCode() == ExitAbsent:
		return nil, fmt.Errorf("%s: %w", said(r.stderr.Bytes()), usage.ErrAbsent)
	}
	return nil, fmt.Errorf("run %s: %w: %s", path, r.err, said(r.stderr.Bytes()))
}

func (s *Source) free() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.stuck == nil {
		return nil
	}
	select {
	case <-s.stuck.done:
		s.stuck = nil
		return nil
	default:
		return fmt.Errorf("%s (pid %d) has been killed and does not end; the driver hangs", s.stuck.cmd.Path, s.stuck.cmd.Process.Pid)
	}
}

// said is what the helper printed, in one line.
func said(text []byte) string {
	const enough = 300
	words := strings.Join(strings.Fields(string(text)), " ")
	if len(words) > enough {
		words = words[:enough] + "..."
	}
	if words == "" {
		return "it said nothing"
	}
	return words
}

// bounded is a buffer that takes no more than outputLimit.
type bounded struct{ to *bytes.Buffer }

func (b *bounded) Write(p []byte) (int, error) {
	if b.to.Len()+len(p) > outputLimit {
		return 0, errors.New("it prints without end")
	}
	return b.to.Write(p)
}

// parse reads the helper's output, which must be whole.
func parse(out []byte) ([]Process, error) {
	var processes []Process
	lines := bufio.NewScanner(bytes.NewReader(out))
	for lines.Scan() {
		var end End
		if err := strict(lines.Bytes(), &end); err == nil && end.End {
			if end.Processes != len(processes) || lines.Scan() {
				return nil, fmt.Errorf("its list is not whole: %d processes, and the end of it says %d", len(processes), end.Processes)
			}
			return processes, lines.Err()
		}
		var p Process
		if err := strict(lines.Bytes(), &p); err != nil {
			return nil, fmt.Errorf("it printed %.100q: %w", lines.Bytes(), err)
		}
		if p.PID <= 0 || p.Name == "" {
			return nil, fmt.Errorf("it printed %.100q, which is no process on a GPU", lines.Bytes())
		}
		processes = append(processes, p)
	}
	if err := lines.Err(); err != nil {
		return nil, err
	}
	return nil, errors.New("its list has no end")
}

func strict(line []byte, into any) error {
	dec := json.NewDecoder(bytes.NewReader(line))
	dec.DisallowUnknownFields()
	if err := dec.Decode(into); err != nil {
		return err
	}
	if _, err := dec.Token(); !errors.Is(err, io.EOF) {
		return errors.New("text after the JSON object")
	}
	return nil
}
