package usage

import (
	"context"
	"errors"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

const id = "7a3c1e5b9d2f4068a1c3e5f7092b4d6e8fa1c3b5d7e9f0123456789abcdef012"

func TestContainerOfAProcess(t *testing.T) {
	t.Parallel()
	for name, tc := range map[string]struct {
		find func([]byte) string
		text string
		want string
	}{
		"docker, cgroup v1":     {fromCgroup, "12:pids:/docker/" + id + "\n11:cpu:/docker/" + id + "\n", id},
		"docker, cgroup v2":     {fromCgroup, "0::/system.slice/docker-" + id + ".scope\n", id},
		"docker, nested init":   {fromCgroup, "0::/system.slice/docker-" + id + ".scope/init\n", id},
		"podman":                {fromCgroup, "0::/machine.slice/libpod-" + id + ".scope/container\n", id},
		"kubelet":               {fromCgroup, "0::/kubepods.slice/kubepods-pod1.slice/cri-containerd-" + id + ".scope\n", id},
		"kubelet, cgroupfs":     {fromCgroup, "5:memory:/kubepods/burstable/podaaaa/" + id + "\n", id},
		"of the host":           {fromCgroup, "0::/user.slice/user-0.slice/session-1.scope\n", ""},
		"digits that are no ID": {fromCgroup, "0::/x/" + id + "0\n", ""},
		"mounts of docker": {fromMountinfo,
			"700 699 8:1 / / rw - ext4 /dev/sda1 rw\n712 700 8:1 /var/lib/docker/containers/" + id + "/hostname /etc/hostname rw - ext4 /dev/sda1 rw\n", id},
		"mounts of the host": {fromMountinfo, "24 1 8:1 / / rw - ext4 /dev/sda1 rw\n", ""},
	} {
		if got := tc.find([]byte(tc.text)); got != tc.want {
			t.Errorf("%s: %q, want %q", name, got, tc.want)
		}
	}
	if got := ContainerID(1 << 30); got != "" {
		t.Errorf("a process that is not there is in container %q", got)
	}
}

// The shapes are those of a Docker Engine 20.10.24 on API 1.41.
func TestContainersOfAnEngine(t *testing.T) {
	t.Parallel()
	sock := filepath.Join(t.TempDir(), "docker.sock")
	l, err := net.Listen("unix", sock)
	if err != nil {
		t.Fatal(err)
	}
	srv := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		switch {
		case r.URL.Path == "/_ping":
			w.Header().Set("Api-Version", "1.41")
		case strings.HasSuffix(r.URL.Path, "/v1.41/version"):
			_, _ = w.Write([]byte(`{"Version":"20.10.24+dfsg1","ApiVersion":"1.41","MinAPIVersion":"1.12"}`))
		case r.URL.Path == "/v1.41/containers/json" && r.URL.RawQuery == "":
			_, _ = w.Write([]byte(`[{"Id":"` + id + `","Names":["/eager_lamport"],"Image":"busybox","State":"running","Mounts":[]}]`))
		default:
			http.NotFound(w, r)
		}
	})}
	go func() { _ = srv.Serve(l) }()
	t.Cleanup(func() { _ = srv.Close() })

	got, err := Containers(t.Context(), "unix://"+sock)
	if err != nil {
		t.Fatal(err)
	}
	want := map[string]Container{id: {ID: id, Name: "eager_lamport", Image: "busybox"}}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("containers (-want +got):\n%s", diff)
	}
	e, err := AskEngine(t.Context(), "unix://"+sock)
	if err != nil || e.Version != "20.10.24+dfsg1" || e.APIVersion != "1.41" {
		t.Errorf("engine %+v, error %v", e, err)
	}
}

func TestAnEngineThatDoesNotAnswerIsAnErrorInTime(t *testing.T) {
	t.Parallel()
	if _, err := Containers(t.Context(), "unix:///nonexistent/docker.sock"); !errors.Is(err, ErrNoEngine) {
		t.Errorf("where there is no engine: %v", err)
	}
	sock := filepath.Join(t.TempDir(), "deaf.sock")
	l, err := net.Listen("unix", sock)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	defer os.Remove(sock)
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if _, err := AskEngine(ctx, "unix://"+sock); err == nil {
		t.Error("an engine answered that never does")
	}
}
