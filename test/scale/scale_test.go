// Package scale shows what clean-up costs on a large node: ten thousand
// versions of a hundred files each, two hundred containers that run.
package scale

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/larder-project/larder/internal/store"
	"github.com/larder-project/larder/internal/store/storetest"
	"github.com/larder-project/larder/internal/testenv"
	"github.com/larder-project/larder/internal/volume"
)

func TestMain(m *testing.M) { os.Exit(testenv.PrivateMounts(m.Run)) }

const (
	containers = 200
	layers     = 100 // files of a version
	fresh      = 20  // of these, files that no other version has

	maxCPU    = 3 * time.Second
	maxMemory = 400 << 20
	maxWhy    = time.Second
	// maxGrowth: ten times the versions cost at most so many times as much.
	maxGrowth = 12.0
)

// cost is what one process took.
type cost struct {
	cpu, wall time.Duration
	memory    int64
}

// node is a root folder with a store and containers.
type node struct {
	t      *testing.T
	larder string
	root   string
	store  *store.Store
}

func TestPlanOfALargeNode(t *testing.T) {
	testenv.NeedRoot(t)
	testenv.NeedPrograms(t, "go", "unshare", "busybox", "pivot_root")
	larder := filepath.Join(t.TempDir(), "larder")
	build := exec.Command("go", "build", "-o", larder, "../../cmd/larder")
	build.Env = append(os.Environ(), "CGO_ENABLED=0", "GOFLAGS=")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	costs := map[int]cost{}
	for _, versions := range []int{1_000, 10_000} {
		n := newNode(t, larder, versions)
		n.run()
		// The first reading brings the manifests into memory; what is measured
		// is what the work takes.
		n.prune(versions)
		best := n.prune(versions)
		for range 2 {
			if again := n.prune(versions); again.cpu < best.cpu {
				best = again
			}
		}
		costs[versions] = best
		t.Logf("plan over %d versions, %d layer references, %d running containers: %.2f s of CPU, %.2f s, %d MiB",
			versions, versions*layers, containers, best.cpu.Seconds(), best.wall.Seconds(), best.memory>>20)
		if best.cpu > maxCPU || best.memory > maxMemory {
			t.Errorf("that is more than %s of CPU and %d MiB", maxCPU, maxMemory>>20)
		}
		n.why(versions)
	}
	growth := float64(costs[10_000].cpu) / float64(costs[1_000].cpu)
	t.Logf("ten times the versions take %.1f times the CPU", growth)
	if growth > maxGrowth {
		t.Errorf("that is more than %.0f times", maxGrowth)
	}
}

func newNode(t *testing.T, larder string, versions int) *node {
	t.Helper()
	n := &node{t: t, larder: larder, root: t.TempDir()}
	t.Cleanup(n.unmount)
	now := time.Now()
	s, err := storetest.Fill(filepath.Join(n.root, "store"), storetest.Shape{
		Models: versions / 200, Versions: versions, Layers: layers, Fresh: fresh, Size: 1 << 20,
		Created: func(v int) time.Time {
			return now.Add(-time.Duration(versions-v) * 90 * 24 * time.Hour / time.Duration(versions))
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	n.store = s
	return n
}

// container is what an engine does: a root of its own with the volume in it, and
// nothing of the host's.
const container = `set -e
mount -t tmpfs -o size=8m tmpfs "$2"
mkdir "$2/models" "$2/old"
cp "$(command -v busybox)" "$2/busybox"
mount --bind "$1" "$2/models"
cd "$2"
pivot_root . old
/busybox umount -l /old
echo ready
exec /busybox sleep 1000`

// run starts containers: processes in mount namespaces of their own that show a
// volume each, as containers do.
func (n *node) run() {
	n.t.Helper()
	ctx := n.t.Context()
	m, err := volume.Open(ctx, volume.Config{Store: n.store, State: filepath.Join(n.root, "node"), Node: "scale", OwnPIDNamespace: true})
	if err != nil {
		n.t.Fatal(err)
	}
	at := n.t.TempDir()
	var group errgroup.Group
	group.SetLimit(8)
	for i := range containers {
		group.Go(func() error {
			name := fmt.Sprintf("v%d", i)
			if err := m.Create(ctx, name, map[string]string{"model": fmt.Sprintf("m%d:1.%d.%d", i%5, i/5/10, i/5%10), "access": "ro"}); err != nil {
				return err
			}
			target, err := m.Mount(ctx, name, "run")
			if err != nil {
				return err
			}
			cmd := exec.Command("unshare", "-m", "--propagation", "private", "sh", "-c", container, "sh", target, at)
			out, err := cmd.StdoutPipe()
			if err != nil {
				return err
			}
			if err := cmd.Start(); err != nil {
				return err
			}
			n.t.Cleanup(func() {
				_ = cmd.Process.Kill()
				_ = cmd.Wait()
			})
			_, err = out.Read(make([]byte, 6))
			return err
		})
	}
	if err := group.Wait(); err != nil {
		n.t.Fatal(err)
	}
}

func (n *node) unmount() {
	mounts, err := mountinfo.GetMounts(mountinfo.PrefixFilter(n.root))
	if err != nil {
		n.t.Error(err)
	}
	for _, m := range mounts {
		if err := unix.Unmount(m.Mountpoint, unix.MNT_DETACH); err != nil {
			n.t.Errorf("umount %s: %v", m.Mountpoint, err)
		}
	}
}

func (n *node) larderRun(args ...string) (cost, []byte) {
	n.t.Helper()
	cmd := exec.Command(n.larder, append([]string{"--root", n.root, "--node", "scale"}, args...)...)
	cmd.Env = append(os.Environ(), "LARDER_USAGE_DOCKER=off", "LARDER_USAGE_CONTAINERD=off", "LARDER_USAGE_GPU=off", "LARDER_USAGE_CSI=off", "LARDER_USAGE_PID_NAMESPACE=own")
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	begin := time.Now()
	if err := cmd.Run(); err != nil {
		n.t.Fatalf("larder %s: %v\n%s", strings.Join(args, " "), err, errs.String())
	}
	usage := cmd.ProcessState.SysUsage().(*syscall.Rusage)
	return cost{
		cpu: cmd.ProcessState.UserTime() + cmd.ProcessState.SystemTime(), wall: time.Since(begin), memory: usage.Maxrss << 10,
	}, out.Bytes()
}

// prune makes the plan that the profile ci makes, and checks that it is one.
func (n *node) prune(versions int) cost {
	n.t.Helper()
	c, out := n.larderRun("prune", "--dry-run", "--json", "--profile", "ci")
	lines := bytes.Split(bytes.TrimSpace(out), []byte("\n"))
	var sum struct{ Kept, Removed int }
	if err := json.Unmarshal(lines[len(lines)-1], &sum); err != nil {
		n.t.Fatal(err)
	}
	inUse := bytes.Count(out, []byte(`"reason":"in_use"`))
	if sum.Kept+sum.Removed != versions || inUse != containers || sum.Removed < versions/3 {
		n.t.Fatalf("the plan keeps %d and removes %d of %d versions, %d of them in use", sum.Kept, sum.Removed, versions, inUse)
	}
	return c
}

// why asks for a file that a container reads.
func (n *node) why(versions int) {
	n.t.Helper()
	_, shown := n.larderRun("show", "--json", "m0:1.0.0")
	var model struct {
		FileList []struct{ Digest string } `json:"file_list"`
	}
	if err := json.Unmarshal(shown, &model); err != nil {
		n.t.Fatal(err)
	}
	best := cost{wall: time.Hour}
	for range 3 {
		c, out := n.larderRun("why", "--json", model.FileList[0].Digest)
		if !bytes.Contains(out, []byte(`"volume v0"`)) {
			n.t.Fatalf("why does not name the volume: %.2000s", out)
		}
		if c.wall < best.wall {
			best = c
		}
	}
	n.t.Logf("why over %d versions: %.2f s, %.2f s of CPU, %d MiB", versions, best.wall.Seconds(), best.cpu.Seconds(), best.memory>>20)
	if best.wall > maxWhy {
		n.t.Errorf("that is more than %s", maxWhy)
	}
}
