package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"runtime/debug"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/larder-project/larder/test/engine"
)

// stage is what parts 2, 3, 4 and 6 play on: an XFS that holds store and state
// and nothing else, the plugin, an engine beside it, and a model in the store.
type stage struct {
	mark   int    // of the host, before the stage
	fs     string // the file system
	empty  int64  // what it had given out when it was new
	root   string // of Larder, on fs
	driver string // name of the volume driver
	calls  *driver
	engine *engine.Engine
	probe  string // this program, for containers
	model  string // folder that the model was imported from
	blob   string // of the model's weights
}

// The model of the stage, and its files.
const (
	modelName  = "bench"
	weightName = "model.safetensors"
	extraName  = "extra.bin"
)

// setStage builds the stage, once.
func (b *bench) setStage(ctx context.Context) (*stage, error) {
	if b.stage != nil {
		return b.stage, nil
	}
	s := &stage{mark: b.host.mark(), driver: fmt.Sprintf("larder-bench-%d", os.Getpid())}
	b.stage = s
	var err error
	if s.probe, err = staticSelf(); err != nil {
		return nil, err
	}
	if s.fs, err = b.host.fileSystem(ctx, "xfs", 3*b.Model+8*gib); err != nil {
		return nil, err
	}
	if s.empty, err = used(s.fs); err != nil {
		return nil, err
	}
	s.root = filepath.Join(s.fs, "larder")
	if err := b.startPlugin(s); err != nil {
		return nil, err
	}
	b.say("the stage: an engine and a model of %s", size(b.Model))
	if err := b.startEngine(ctx, s); err != nil {
		return nil, err
	}
	s.model = filepath.Join(b.host.dir, "model")
	if err := modelFolder(s.model, b.Model, 8, 1); err != nil {
		return nil, err
	}
	if err := writeRandom(filepath.Join(s.model, extraName), b.Changed, 2); err != nil {
		return nil, err
	}
	if _, err := timed(b.larder(ctx, s.root, "import", s.model, modelName)); err != nil {
		return nil, err
	}
	sum, err := command(ctx, "sha256sum", filepath.Join(s.model, weightName))
	if err != nil {
		return nil, err
	}
	s.blob = filepath.Join(s.root, "store", "blobs", "sha256", strings.Fields(sum)[0])
	return s, nil
}

// strike takes the stage down.
func (b *bench) strike() error {
	if b.stage == nil {
		return nil
	}
	mark := b.stage.mark
	b.stage = nil
	return b.host.backTo(mark)
}

// staticSelf is the path of this program, which containers without any library
// must be able to run.
func staticSelf() (string, error) {
	info, ok := debug.ReadBuildInfo()
	if ok {
		for _, s := range info.Settings {
			if s.Key == "CGO_ENABLED" && s.Value == "0" {
				return os.Executable()
			}
		}
	}
	return "", errors.New("this program runs in containers too and must be built with CGO_ENABLED=0 (make bench)")
}

// larder is a command on a root of this run.
func (b *bench) larder(ctx context.Context, root string, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, filepath.Join(b.bin, "larder"), append([]string{"--root", root}, args...)...)
	cmd.Env = cleanEnv()
	return cmd
}

// cleanEnv is the environment without what a person set for their own Larder
// and their own hub. The engine runs beside the benchmark, in a container perhaps.
func cleanEnv(more ...string) []string {
	var env []string
	for _, e := range os.Environ() {
		if !strings.HasPrefix(e, "LARDER_") && !strings.HasPrefix(e, "HF_") && !strings.HasPrefix(e, "DOCKER_") {
			env = append(env, e)
		}
	}
	return append(append(env, "LARDER_USAGE_PID_NAMESPACE=own"), more...)
}

func (b *bench) startPlugin(s *stage) error {
	socket := filepath.Join("/run/docker/plugins", s.driver+".sock")
	if err := os.MkdirAll(filepath.Dir(socket), 0o755); err != nil {
		return err
	}
	logName := filepath.Join(b.host.dir, "plugin.log")
	log, err := os.Create(logName)
	if err != nil {
		return err
	}
	defer log.Close()
	cmd := exec.Command(filepath.Join(b.bin, "larder-plugin"), "--root", s.root, "--socket", socket)
	cmd.Env = cleanEnv()
	cmd.Stdout, cmd.Stderr = log, log
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("start the plugin: %w", err)
	}
	done := make(chan error, 1)
	go func() { done <- cmd.Wait() }()
	b.host.later(func() error {
		defer os.Remove(socket)
		_ = cmd.Process.Signal(syscall.SIGTERM)
		select {
		case <-done:
			return nil
		case <-time.After(20 * time.Second):
			return errors.Join(errors.New("the plugin did not end on SIGTERM"), cmd.Process.Kill())
		}
	})
	s.calls = newDriver(socket)
	for range 100 {
		if err = s.calls.call("VolumeDriver.Capabilities", nil, nil); err == nil {
			return nil
		}
		time.Sleep(100 * time.Millisecond)
	}
	text, _ := os.ReadFile(logName)
	return fmt.Errorf("the plugin does not answer: %w\n%s", err, text)
}

func (b *bench) startEngine(ctx context.Context, s *stage) error {
	kind, err := engine.Current()
	if err != nil {
		if kind, err = engine.Debian(); err != nil {
			return err
		}
	}
	dir := filepath.Join(b.host.dir, "engine")
	if err := os.Mkdir(dir, 0o755); err != nil {
		return err
	}
	if s.engine, err = engine.New(kind, dir, engine.Options{}); err != nil {
		return err
	}
	b.host.later(s.engine.Close)
	if err := s.engine.Start(ctx); err != nil {
		return err
	}
	return s.engine.LoadImage(ctx)
}

// volume are the arguments of docker run for a volume of its own with the
// model at /models.
func (s *stage) volume(options ...string) []string {
	m := "type=volume,volume-driver=" + s.driver + ",volume-opt=model=" + modelName
	for _, o := range options {
		m += ",volume-opt=" + o
	}
	return []string{"--mount", m + ",dst=/models"}
}

// start runs a container that waits, with the probe in it.
func (s *stage) start(ctx context.Context, mount []string) (string, error) {
	args := []string{"run", "--detach", "--network", "none", "--volume", s.probe + ":/probe:ro"}
	args = append(append(args, mount...), engine.Image, "sleep", "7200")
	id, err := s.engine.Docker(ctx, args...)
	return strings.TrimSpace(id), err
}

func (s *stage) remove(ctx context.Context, containers ...string) error {
	if len(containers) == 0 {
		return nil
	}
	_, err := s.engine.Docker(ctx, append([]string{"rm", "--force", "--volumes"}, containers...)...)
	return err
}

// probeIn runs the probe in a container and gives the time it printed.
func (s *stage) probeIn(ctx context.Context, container string, args ...string) (time.Duration, error) {
	out, err := s.engine.Docker(ctx, append([]string{"exec", container, "/probe"}, args...)...)
	if err != nil {
		return 0, err
	}
	return nanoseconds(out)
}

// probeHere runs the probe on the host, as a process of its own as well.
func (s *stage) probeHere(ctx context.Context, args ...string) (time.Duration, error) {
	out, err := command(ctx, s.probe, args...)
	if err != nil {
		return 0, err
	}
	return nanoseconds(out)
}

func nanoseconds(out string) (time.Duration, error) {
	n, err := strconv.ParseInt(strings.TrimSpace(out), 10, 64)
	if err != nil {
		return 0, fmt.Errorf("read the probe's answer: %w", err)
	}
	return time.Duration(n), nil
}

// driver speaks the volume protocol as the engine does.
type driver struct {
	http *http.Client
}

func newDriver(socket string) *driver {
	return &driver{http: &http.Client{
		Timeout: 2 * time.Minute,
		Transport: &http.Transport{
			DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
				return new(net.Dialer).DialContext(ctx, "unix", socket)
			},
		},
	}}
}

// call sends one request and waits for the whole answer.
func (d *driver) call(method string, in, out any) error {
	body := []byte("{}")
	if in != nil {
		var err error
		if body, err = json.Marshal(in); err != nil {
			return err
		}
	}
	resp, err := d.http.Post("http://plugin/"+method, "application/vnd.docker.plugins.v1.2+json", bytes.NewReader(body))
	if err != nil {
		return fmt.Errorf("call %s: %w", method, err)
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	if err != nil {
		return fmt.Errorf("call %s: %w", method, err)
	}
	var failure struct{ Err string }
	if err := json.Unmarshal(text, &failure); err == nil && failure.Err != "" {
		return fmt.Errorf("call %s: %s", method, failure.Err)
	}
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("call %s: %s: %s", method, resp.Status, text)
	}
	if out != nil {
		return json.Unmarshal(text, out)
	}
	return nil
}

func (d *driver) create(name string, options map[string]string) error {
	return d.call("VolumeDriver.Create", map[string]any{"Name": name, "Opts": options}, nil)
}

func (d *driver) mount(name, id string) (string, error) {
	var out struct{ Mountpoint string }
	err := d.call("VolumeDriver.Mount", map[string]string{"Name": name, "ID": id}, &out)
	return out.Mountpoint, err
}

func (d *driver) unmount(name, id string) error {
	return d.call("VolumeDriver.Unmount", map[string]string{"Name": name, "ID": id}, nil)
}

func (d *driver) remove(name string) error {
	return d.call("VolumeDriver.Remove", map[string]string{"Name": name}, nil)
}
