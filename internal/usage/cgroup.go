package usage

import (
	"bytes"
	"os"
	"regexp"
	"strconv"
)

// ContainerID is the ID of the container that a process runs in, or "" where
// it runs in none that can be recognised.
func ContainerID(pid int) string {
	dir := "/proc/" + strconv.Itoa(pid)
	// The process may end at any moment: what cannot be read says nothing.
	if text, err := os.ReadFile(dir + "/cgroup"); err == nil {
		if id := fromCgroup(text); id != "" {
			return id
		}
	}
	if text, err := os.ReadFile(dir + "/mountinfo"); err == nil {
		return fromMountinfo(text)
	}
	return ""
}

// inCgroup finds a container's ID as the last part of a cgroup's path, in the
// forms of Docker, containerd, Podman and the kubelet: /docker/ID,
// docker-ID.scope, libpod-ID.scope, cri-containerd-ID.scope.
var inCgroup = regexp.MustCompile(`(?:^|[/:-])([0-9a-f]{64})(?:\.scope)?(?:/[^/]*)?$`)

func fromCgroup(text []byte) string {
	for line := range bytes.SplitSeq(text, []byte("\n")) {
		if m := inCgroup.FindSubmatch(line); m != nil {
			return string(m[1])
		}
	}
	return ""
}

// inMounts finds the files that Docker binds into each container from
// .../containers/ID/, for engines whose cgroups tell nothing.
var inMounts = regexp.MustCompile(`/containers/([0-9a-f]{64})/(?:resolv\.conf|hostname|hosts) /etc/`)

func fromMountinfo(text []byte) string {
	if m := inMounts.FindSubmatch(text); m != nil {
		return string(m[1])
	}
	return ""
}
