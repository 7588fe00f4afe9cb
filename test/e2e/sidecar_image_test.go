package e2e

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/larder-project/larder/internal/testenv"
	"github.com/larder-project/larder/test/engine"
)

// unit gives the values of a setting of the sidecar's unit.
func unit(t *testing.T, setting string) (values []string) {
	t.Helper()
	for text := range strings.Lines(read(t, filepath.Join(checkout, "deploy/systemd/larder-sidecar.service"))) {
		if v, ok := strings.CutPrefix(strings.TrimSpace(text), setting+"="); ok {
			values = append(values, strings.Fields(v)...)
		}
	}
	if len(values) == 0 {
		t.Fatalf("the unit does not say %s", setting)
	}
	return values
}

// systemCalls are those that the unit allows, as systemd understands it.
func systemCalls(t *testing.T) []string {
	t.Helper()
	var allowed []string
	deny := false // a tilde goes for the rest of its line; in this unit for the last
	for _, word := range unit(t, "SystemCallFilter") {
		word, tilde := strings.CutPrefix(word, "~")
		deny = deny || tilde
		names := []string{word}
		if strings.HasPrefix(word, "@") {
			out, err := exec.CommandContext(t.Context(), "systemd-analyze", "syscall-filter", word).Output()
			ok(t, err)
			names = group(t, string(out))
		}
		for _, name := range names {
			if deny {
				allowed = slices.DeleteFunc(allowed, func(s string) bool { return s == name })
			} else {
				allowed = append(allowed, name)
			}
		}
	}
	if len(allowed) < 100 || slices.Contains(allowed, "mount") {
		t.Fatalf("the unit allows %d system calls: %v", len(allowed), allowed)
	}
	return allowed
}

// group lists the calls of a group, and of the groups in it.
func group(t *testing.T, text string) (names []string) {
	t.Helper()
	for text := range strings.Lines(text) {
		name := strings.TrimSpace(text)
		switch {
		case !strings.HasPrefix(text, "    ") || strings.HasPrefix(name, "#"):
		case strings.HasPrefix(name, "@"):
			out, err := exec.CommandContext(t.Context(), "systemd-analyze", "syscall-filter", name).Output()
			ok(t, err)
			names = append(names, group(t, string(out))...)
		default:
			names = append(names, name)
		}
	}
	return names
}

// The image is built without a network, and its container, with the rights that
// its recipe and the unit give it and no others, sees what containers use,
// removes the rest, and is asked over a socket.
func TestSidecarAsAContainer(t *testing.T) {
	testenv.NeedPrograms(t, "systemd-analyze")
	eachEngine(t, func(t *testing.T, e *engine.Engine) {
		n := newNode(t, e)
		files := t.TempDir()
		write(t, filepath.Join(files, "larder-sidecar"), read(t, filepath.Join(programs, "larder-sidecar-static")))
		ok(t, os.Chmod(filepath.Join(files, "larder-sidecar"), 0o755))
		image := n.unique("larder-sidecar")
		build := exec.CommandContext(t.Context(), "docker", "build", "--network", "none", "-t", image, "-f", filepath.Join(checkout, "deploy/container/Dockerfile"), files)
		build.Env = append(e.ClientEnv(), "DOCKER_BUILDKIT=0")
		if out, err := build.CombinedOutput(); err != nil {
			t.Fatalf("docker build: %v\n%s", err, out)
		}
		t.Cleanup(func() {
			if _, err := e.Docker(context.Background(), "image", "rm", "-f", image); err != nil {
				t.Error(err)
			}
		})

		n.importModel("used:1", tiny(70))
		n.importModel("unused:1", tiny(71))
		n.startPlugin()
		n.start("-v", n.volume("v", "model=used:1")+":/models")
		etc := filepath.Join(n.root, "etc")
		write(t, filepath.Join(etc, "policy.yaml"), greedy)
		profile, err := json.Marshal(map[string]any{
			"defaultAction": "SCMP_ACT_ERRNO", "architectures": []string{"SCMP_ARCH_X86_64"},
			"syscalls": []any{map[string]any{"names": systemCalls(t), "action": "SCMP_ACT_ALLOW"}},
		})
		ok(t, err)
		write(t, filepath.Join(n.root, "seccomp.json"), string(profile))
		args := []string{
			"run", "-d", "--label", n.label, "--network", "none", "--read-only", "--cap-drop", "ALL",
			"--security-opt", "seccomp=" + filepath.Join(n.root, "seccomp.json"), "--security-opt", "no-new-privileges",
			"-v", n.root + ":" + n.root + ":rslave", "-v", etc + ":/etc/larder:ro",
			"-v", e.Socket() + ":/var/run/docker.sock", "-v", e.ContainerdSocket() + ":/run/containerd/containerd.sock",
			"-e", "LARDER_USAGE_DOCKER=on", "-e", "LARDER_USAGE_CONTAINERD=on", "-e", "LARDER_CONTAINERD_ADDRESS=/run/containerd/containerd.sock",
		}
		for _, c := range unit(t, "CapabilityBoundingSet") {
			args = append(args, "--cap-add", strings.TrimPrefix(c, "CAP_"))
			if recipe := read(t, filepath.Join(checkout, "deploy/container/Dockerfile")); !strings.Contains(recipe, "--cap-add "+strings.TrimPrefix(c, "CAP_")) {
				t.Errorf("the recipe does not name %s", c)
			}
		}
		socket := filepath.Join(n.root, "sidecar.sock")
		host, err := os.Hostname()
		ok(t, err)
		command := []string{image, "--root", n.root, "--node", host, "--listen", "unix://" + socket, "--grace", "500ms"}
		client := http.Client{Transport: &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			var d net.Dialer
			return d.DialContext(ctx, "unix", socket)
		}}}
		ready := func() (int, string) {
			res, err := client.Get("http://sidecar/readyz")
			if err != nil {
				return 0, err.Error()
			}
			defer res.Body.Close()
			body, err := io.ReadAll(res.Body)
			ok(t, err)
			return res.StatusCode, string(body)
		}

		blind := n.docker(slices.Concat(args, command)...)
		n.within(20*time.Second, "without the host's processes it says that it is blind", func() error {
			if status, body := ready(); status != http.StatusServiceUnavailable || !strings.Contains(body, "--pid=host") || !strings.Contains(body, "so nothing was removed") {
				return fmt.Errorf("readyz is %d: %s", status, body)
			}
			return nil
		})
		if err := n.has("unused:1"); err != nil {
			t.Error(err)
		}
		n.docker("rm", "-f", blind)
		client.CloseIdleConnections()

		// These tests may run in a container, and its processes are then the host's.
		id := n.docker(slices.Concat(args, []string{"--pid", "host", "-e", "LARDER_USAGE_PID_NAMESPACE=own"}, command)...)
		t.Cleanup(func() {
			if t.Failed() {
				out, _ := exec.Command("docker", "-H", e.Host(), "logs", id).CombinedOutput()
				t.Logf("the container's last words:\n%s", out[max(0, len(out)-4000):])
			}
		})
		n.within(20*time.Second, "what nothing uses goes", func() error { return n.hasNot("unused:1") })
		n.within(20*time.Second, "it is ready", func() error {
			if status, body := ready(); status != http.StatusOK {
				return fmt.Errorf("readyz is %d: %s", status, body)
			}
			return nil
		})
		if err := n.has("used:1"); err != nil {
			t.Error(err)
		}
		pid := n.docker("inspect", "--format", "{{.State.Pid}}", id)
		if status := read(t, "/proc/"+pid+"/status"); !strings.Contains(status, "Seccomp:\t2\n") || !strings.Contains(status, "NoNewPrivs:\t1\n") {
			t.Errorf("the container has other rights than were asked for:\n%s", status)
		}
		if fi, err := os.Stat(socket); err != nil || fi.Mode().Perm() != 0o600 {
			t.Errorf("the socket: %v, %v", fi, err)
		}
		// Told to stop it stops, and does not have to be killed.
		begun := time.Now()
		n.docker("stop", "-t", "30", id)
		if code := n.docker("inspect", "--format", "{{.State.ExitCode}}", id); code != "0" || time.Since(begun) > 15*time.Second {
			t.Errorf("stopped after %s with exit code %s", time.Since(begun), code)
		}
	})
}
