// Package engine runs private Docker engines for tests and benchmarks: Debian's
// and a current one, side by side, each with a socket, data and processes of
// its own, and a network namespace of its own too, so that an engine which the
// host runs notices nothing (a second dockerd with --bridge=none would delete
// its docker0).
//
// Containers are to run with --network none. Plugins are found where every
// engine looks, in /run/docker/plugins, so a test's driver needs a name that
// nobody else has.
//
// The package starts and stops engines and runs the docker client on them; what
// is tested with them it leaves to others.
package engine

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"
)

// Kind is a release of the engine.
type Kind struct {
	Name    string   // for tests' names
	Dockerd string   // the program
	Path    string   // PATH of the engine: its containerd, shim and runc
	Args    []string // what it needs beside what every engine gets
	API     string   // the API version that old clients must ask for; empty: their own
}

// CacheDir is where test/setup.sh keeps what is built once for all checkouts.
func CacheDir() string {
	if dir := os.Getenv("LARDER_TEST_CACHE"); dir != "" {
		return dir
	}
	return "/var/cache/larder-test"
}

// Debian is the engine on the PATH: 20.10 on Debian 12.
func Debian() (Kind, error) {
	dockerd, err := exec.LookPath("dockerd")
	if err != nil {
		return Kind{}, fmt.Errorf("find the distribution's engine (run test/setup.sh): %w", err)
	}
	return Kind{Name: "debian", Dockerd: dockerd, Path: os.Getenv("PATH")}, nil
}

// Current is the engine of the 29 line that test/setup.sh builds.
func Current() (Kind, error) {
	bin := filepath.Join(CacheDir(), "engine")
	for _, program := range []string{"dockerd", "containerd", "containerd-shim-runc-v2", "runc"} {
		if _, err := exec.LookPath(filepath.Join(bin, program)); err != nil {
			return Kind{}, fmt.Errorf("find the current engine (run test/setup.sh): %w", err)
		}
	}
	return Kind{
		Name:    "current",
		Dockerd: filepath.Join(bin, "dockerd"),
		Path:    bin + string(os.PathListSeparator) + os.Getenv("PATH"),
		Args:    []string{"--userland-proxy=false"},
		API:     "1.44",
	}, nil
}

// Image is the name of the image that every engine here has: a static busybox.
const Image = "larder-test-busybox"

// Options of an engine. They may be changed between Kill or Stop and Start.
type Options struct {
	LiveRestore bool          // containers outlive the engine
	StartLimit  time.Duration // how long it may take to answer; 0: 90 s
}

// Engine is one private engine.
type Engine struct {
	Kind Kind
	Dir  string // everything of this engine lies under it
	Options

	mu    sync.Mutex
	netns *os.File
	cmd   *exec.Cmd
	done  chan struct{} // closed when cmd has ended
}

// New prepares an engine below dir, which must exist and should be a short
// path: sockets lie under it. It starts nothing.
func New(kind Kind, dir string, o Options) (*Engine, error) {
	ns, err := newNetns()
	if err != nil {
		return nil, fmt.Errorf("make a network namespace for the engine: %w", err)
	}
	e := &Engine{Kind: kind, Dir: dir, Options: o, netns: ns}
	return e, nil
}

// Host is the engine's address as the docker client takes it (-H, DOCKER_HOST).
func (e *Engine) Host() string { return "unix://" + e.Socket() }

// Socket is the path of the engine's API socket.
func (e *Engine) Socket() string { return filepath.Join(e.Dir, "docker.sock") }

// DataRoot is the engine's --data-root.
func (e *Engine) DataRoot() string { return filepath.Join(e.Dir, "data") }

// ContainerdSocket is where the engine's own containerd listens.
func (e *Engine) ContainerdSocket() string {
	return filepath.Join(e.execRoot(), "containerd", "containerd.sock")
}

func (e *Engine) execRoot() string { return filepath.Join(e.Dir, "exec") }
func (e *Engine) pidFile() string  { return filepath.Join(e.Dir, "docker.pid") }

// LogFile has what the engine printed, of all its runs.
func (e *Engine) LogFile() string { return filepath.Join(e.Dir, "dockerd.log") }

// Start starts the engine and returns when it answers.
func (e *Engine) Start(ctx context.Context) error {
	if err := e.StartAsync(); err != nil {
		return err
	}
	return e.WaitReady(ctx)
}

// StartAsync starts the engine and does not wait until it answers.
func (e *Engine) StartAsync() error {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.cmd != nil {
		return errors.New("start engine: it runs already")
	}
	// Where nobody reaps orphans, the killed containerd stays a zombie, and
	// its pid in this file would look alive to the new engine.
	for _, stale := range []string{e.pidFile(), filepath.Join(e.execRoot(), "containerd", "containerd.pid")} {
		if err := os.Remove(stale); err != nil && !errors.Is(err, os.ErrNotExist) {
			return fmt.Errorf("remove stale pid file: %w", err)
		}
	}
	log, err := os.OpenFile(e.LogFile(), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return fmt.Errorf("open the engine's log: %w", err)
	}
	defer log.Close()
	args := append([]string{
		"-H", e.Host(),
		"--data-root", e.DataRoot(), "--exec-root", e.execRoot(), "--pidfile", e.pidFile(),
		"--config-file", filepath.Join(e.Dir, "daemon.json"), // not there: the host's is not ours
		"--bridge=none", "--iptables=false", "--ip6tables=false",
		// A plain, old default: enough for tests, and the same everywhere.
		"--log-driver=json-file",
	}, e.Kind.Args...)
	if e.LiveRestore {
		args = append(args, "--live-restore")
	}
	if err := os.WriteFile(filepath.Join(e.Dir, "daemon.json"), []byte("{}\n"), 0o644); err != nil {
		return fmt.Errorf("write the engine's configuration: %w", err)
	}
	cmd := exec.Command(e.Kind.Dockerd, args...)
	cmd.Env = append(os.Environ(), "PATH="+e.Kind.Path)
	cmd.Stdout, cmd.Stderr = log, log
	// A test program that dies takes its engines along.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGTERM}
	if err := inNetns(e.netns, cmd.Start); err != nil {
		return fmt.Errorf("start %s: %w", e.Kind.Dockerd, err)
	}
	done := make(chan struct{})
	go func() {
		_ = cmd.Wait() // how it ended is in its log
		close(done)
	}()
	e.cmd, e.done = cmd, done
	return nil
}

// WaitReady returns when the engine answers, or says why it does not.
func (e *Engine) WaitReady(ctx context.Context) error {
	limit := e.StartLimit
	if limit == 0 {
		limit = 90 * time.Second
	}
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	e.mu.Lock()
	done := e.done
	e.mu.Unlock()
	for {
		_, err := e.Docker(ctx, "version", "--format", "{{.Server.Version}}")
		if err == nil {
			return nil
		}
		select {
		case <-done:
			return fmt.Errorf("start engine %s: it ended; its log says:\n%s", e.Kind.Name, e.LogTail(20))
		case <-ctx.Done():
			return fmt.Errorf("start engine %s: no answer (%w); its log says:\n%s", e.Kind.Name, err, e.LogTail(20))
		case <-time.After(100 * time.Millisecond):
		}
	}
}

// Kill ends the engine and its containerd by SIGKILL. Containers' processes
// go on; so do their shims.
func (e *Engine) Kill() error { return e.end(syscall.SIGKILL, 10*time.Second) }

// Stop ends the engine as a service manager does.
func (e *Engine) Stop() error { return e.end(syscall.SIGTERM, 40*time.Second) }

func (e *Engine) end(signal syscall.Signal, limit time.Duration) error {
	e.mu.Lock()
	cmd, done := e.cmd, e.done
	e.cmd, e.done = nil, nil
	e.mu.Unlock()
	if cmd == nil {
		return nil
	}
	containerd := e.containerdPID()
	if err := cmd.Process.Signal(signal); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return fmt.Errorf("signal the engine: %w", err)
	}
	select {
	case <-done:
	case <-time.After(limit):
		_ = cmd.Process.Kill()
		<-done
		if signal != syscall.SIGKILL {
			return fmt.Errorf("stop engine %s: it did not end in %s and was killed", e.Kind.Name, limit)
		}
	}
	// Its containerd dies with it; wait until the socket is free of it.
	return waitGone(containerd, 10*time.Second)
}

// Running tells whether the engine's process runs.
func (e *Engine) Running() bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.cmd != nil
}

func (e *Engine) containerdPID() int {
	data, err := os.ReadFile(filepath.Join(e.execRoot(), "containerd", "containerd.pid"))
	if err != nil {
		return 0
	}
	pid, err := strconv.Atoi(strings.TrimSpace(string(data)))
	if err != nil {
		return 0
	}
	return pid
}

// Close removes the engine's containers, stops it, and removes everything it
// left: processes, mounts, files.
func (e *Engine) Close() error {
	var failed []error
	if e.Running() {
		ctx, cancel := context.WithTimeout(context.Background(), 60*time.Second)
		defer cancel()
		if ids, err := e.Docker(ctx, "ps", "-aq"); err == nil && strings.TrimSpace(ids) != "" {
			_, _ = e.Docker(ctx, append([]string{"rm", "-f", "-v"}, strings.Fields(ids)...)...)
		}
		if err := e.Stop(); err != nil {
			failed = append(failed, err)
		}
	}
	e.KillContainers()
	if err := UnmountBelow(e.Dir); err != nil {
		failed = append(failed, err)
	}
	if err := os.RemoveAll(e.Dir); err != nil {
		failed = append(failed, err)
	}
	if err := e.netns.Close(); err != nil {
		failed = append(failed, err)
	}
	return errors.Join(failed...)
}

// KillContainers kills every shim of this engine and every process in its
// containers: what a reboot of the host does to them.
func (e *Engine) KillContainers() {
	for _, shim := range processes(func(cmdline string) bool {
		return strings.Contains(cmdline, "containerd-shim") && strings.Contains(cmdline, e.Dir+"/")
	}) {
		// The shim first, or it would report the exits.
		children := descendants(shim)
		_ = syscall.Kill(shim, syscall.SIGKILL)
		for _, pid := range children {
			_ = syscall.Kill(pid, syscall.SIGKILL)
		}
		for _, pid := range append(children, shim) {
			_ = waitGone(pid, 5*time.Second)
		}
	}
}

// Docker runs the docker client on this engine and returns what it printed on
// its standard output. The error has what it printed on the other.
func (e *Engine) Docker(ctx context.Context, args ...string) (string, error) {
	return e.DockerInput(ctx, nil, args...)
}

// DockerInput is Docker with a standard input.
func (e *Engine) DockerInput(ctx context.Context, stdin []byte, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, "docker", args...)
	cmd.Env = e.ClientEnv()
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if stdin != nil {
		cmd.Stdin = bytes.NewReader(stdin)
	}
	if err := cmd.Run(); err != nil {
		return stdout.String(), fmt.Errorf("docker %s: %w: %s", strings.Join(args, " "), err, bytes.TrimSpace(stderr.Bytes()))
	}
	return stdout.String(), nil
}

// ClientEnv is the environment in which docker and docker-compose reach this
// engine and read nothing of the user's configuration.
func (e *Engine) ClientEnv() []string {
	env := append(os.Environ(), "DOCKER_HOST="+e.Host(), "DOCKER_CONFIG="+filepath.Join(e.Dir, "client"), "DOCKER_CLI_HINTS=false")
	if e.Kind.API != "" {
		env = append(env, "COMPOSE_API_VERSION="+e.Kind.API)
	}
	return env
}

// LogTail returns the last lines of the engine's log.
func (e *Engine) LogTail(lines int) string {
	data, err := os.ReadFile(e.LogFile())
	if err != nil {
		return err.Error()
	}
	all := strings.Split(strings.TrimRight(string(data), "\n"), "\n")
	return strings.Join(all[max(0, len(all)-lines):], "\n")
}

// UnmountBelow unmounts everything that is mounted at dir or below it, what
// was mounted last first.
func UnmountBelow(dir string) error {
	mounts, err := mountinfo.GetMounts(mountinfo.PrefixFilter(dir))
	if err != nil {
		return fmt.Errorf("read the mount table: %w", err)
	}
	var failed []error
	for i := len(mounts) - 1; i >= 0; i-- {
		err := unix.Unmount(mounts[i].Mountpoint, unix.MNT_DETACH)
		if err != nil && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOENT) {
			failed = append(failed, fmt.Errorf("unmount %s: %w", mounts[i].Mountpoint, err))
		}
	}
	return errors.Join(failed...)
}
