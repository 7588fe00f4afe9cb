package usage

import "testing"

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
