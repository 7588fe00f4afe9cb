package usage

import (
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/opencontainers/go-digest"
)

func version(name string) digest.Digest { return digest.FromString(name) }

func TestWhatSeveralSourcesFindOfAContainerIsPutTogether(t *testing.T) {
	t.Parallel()
	docker := strings.Repeat("d", 64)
	uses := []Use{
		// One container of Docker, as the kernel, containerd, Docker and the GPU's driver know it.
		{Version: version("a"), PID: 7, Container: Container{ID: docker}},
		{Version: version("a"), PID: 7, Container: Container{Engine: "containerd", Namespace: "moby", ID: docker, State: "running"}},
		{Version: version("b"), Container: Container{Engine: "docker", ID: docker, Name: "eager_lamport", Image: "busybox", State: "running"}},
		{Version: version("a"), PID: 9, GPU: "1 (H100)", Container: Container{ID: docker}},
		{Version: version("a"), PID: 9, GPU: "0 (H100)", Container: Container{ID: docker}},
		// Two of containerd with one name, each in its namespace; the kernel
		// knows one of them by its process.
		{Version: version("a"), PID: 20, By: "process 20"},
		{Version: version("a"), PID: 20, Container: Container{Engine: "containerd", Namespace: "one", ID: "web", State: "paused"}},
		{Version: version("b"), Container: Container{Engine: "containerd", Namespace: "two", ID: "web", State: "stopped"}},
		// No containers.
		{Version: version("c"), By: "volume qwen"},
		{Version: version("c"), PID: 30, By: "process 30", GPU: "0 (H100)"},
		{Version: version("a"), PID: 30, By: "process 30"},
	}
	// A process in no container uses a and c.
	both := []digest.Digest{min(version("a"), version("c")), max(version("a"), version("c"))}
	sorted := []digest.Digest{min(version("a"), version("b")), max(version("a"), version("b"))}
	want := []User{
		{Container: Container{Engine: "docker", ID: docker, Name: "eager_lamport", Image: "busybox", State: "running"}, Running: true,
			Versions: sorted, PIDs: []int{7, 9}, GPUs: []string{"0 (H100)", "1 (H100)"}},
		{Container: Container{Engine: "containerd", Namespace: "one", ID: "web", State: "paused"}, Running: true, Versions: []digest.Digest{version("a")}, PIDs: []int{20}},
		{Running: true, Versions: both, PIDs: []int{30}, GPUs: []string{"0 (H100)"}},
		{Container: Container{Engine: "containerd", Namespace: "two", ID: "web", State: "stopped"}, Versions: []digest.Digest{version("b")}},
	}
	if diff := cmp.Diff(want, Users(uses)); diff != "" {
		t.Errorf("users (-want +got):\n%s", diff)
	}
}

func TestContainersAreCountedOnceForALayer(t *testing.T) {
	t.Parallel()
	layers := map[digest.Digest][]int{version("a"): {1, 2}, version("b"): {2, 3}, version("unused"): {4}}
	users := []User{
		{Container: Container{ID: "1"}, Running: true, Versions: []digest.Digest{version("a"), version("b")}},
		{Container: Container{ID: "2"}, Running: true, Versions: []digest.Digest{version("b")}},
		{Container: Container{ID: "3"}, Versions: []digest.Digest{version("b"), version("gone")}},
		{PIDs: []int{4}, Running: true, Versions: []digest.Digest{version("unused")}},
	}
	got := Count(users, func(v digest.Digest) []int { return layers[v] })
	want := Counts[int]{
		Versions: map[digest.Digest]Tally{version("a"): {Running: 1}, version("b"): {Running: 2, Stopped: 1}, version("gone"): {Stopped: 1}},
		Layers:   map[int]Tally{1: {Running: 1}, 2: {Running: 2, Stopped: 1}, 3: {Running: 2, Stopped: 1}},
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("counts (-want +got):\n%s", diff)
	}
}
