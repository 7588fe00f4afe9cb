package e2e

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/larder-project/larder/internal/config"
	"github.com/larder-project/larder/internal/gc"
	"github.com/larder-project/larder/internal/reference"
	"github.com/larder-project/larder/internal/store"
	"github.com/larder-project/larder/internal/testenv"
	"github.com/larder-project/larder/internal/usage"
	"github.com/larder-project/larder/internal/usage/sources"
	"github.com/larder-project/larder/internal/volume"
	"github.com/larder-project/larder/test/engine"
)

// remover removes versions on a node in this process, with the sources of the
// test's choice.
type remover struct {
	*node
	store   *store.Store
	volumes *volume.Manager
	cfg     config.Config
}

func newRemover(n *node) *remover {
	n.t.Helper()
	r := &remover{node: n}
	host, err := os.Hostname()
	ok(n.t, err)
	r.store, err = store.Open(filepath.Join(n.root, "store"))
	ok(n.t, err)
	r.volumes, err = volume.Open(n.t.Context(), volume.Config{Store: r.store, State: filepath.Join(n.root, "node"), Node: host, OwnPIDNamespace: true})
	ok(n.t, err)
	r.cfg = config.Config{
		UsageDocker: config.Auto, UsageContainerd: config.Auto, UsageGPU: config.Auto, UsageCSI: config.Auto,
		DockerHost: n.e.Host(), Containerd: []string{n.e.ContainerdSocket()}, Kubelet: n.kubelet(), GPUHelper: filepath.Join(n.root, "larder-gpu"),
	}
	ok(n.t, os.MkdirAll(filepath.Join(n.kubelet(), "pods"), 0o755))
	r.processesOnGPU()
	return r
}

func (r *remover) sources() []usage.Source { return sources.Of(r.cfg, r.volumes).Sources() }

// remove removes a model with these sources.
func (r *remover) remove(model string, dryRun bool, from ...usage.Source) (gc.Result, error) {
	r.t.Helper()
	ref, err := reference.Parse(model)
	ok(r.t, err)
	c := gc.Collector{Store: r.store, Node: r.volumes.Node(), Sources: from}
	return c.Remove(r.t.Context(), []reference.Reference{ref}, gc.Options{DryRun: dryRun, Reason: "test"})
}

// keptBy checks that each of these sources, asked alone, keeps a model, and
// that none of the others does. says is what a refusal must say.
func (r *remover) keptBy(model, says string, by ...string) {
	r.t.Helper()
	if res, err := r.remove(model, true); err != nil || len(res.Versions) != 1 {
		r.t.Errorf("%s with no source: %v, %v; want that it would be removed", model, res, err)
	}
	for _, s := range r.sources() {
		if !slices.Contains(by, s.Name()) {
			// A container that starts beside this test has a copy of every
			// mount for a moment, and engines take theirs to forget one.
			r.within(20*time.Second, model+" would be removed with "+s.Name()+" alone", func() error {
				_, err := r.remove(model, true, s)
				return err
			})
			continue
		}
		// Every answer is a refusal; only the words for it may come later, as an
		// engine may be slow to say in which state a container is.
		r.within(20*time.Second, model+" is kept by "+s.Name()+" alone", func() error {
			_, err := r.remove(model, false, s)
			var inUse *gc.InUseError
			if !errors.As(err, &inUse) {
				r.t.Fatalf("%s with %s alone: %v, want that it is in use", model, s.Name(), err)
			}
			if !slices.ContainsFunc(inUse.Uses, func(u usage.Use) bool { return u.Source == s.Name() }) {
				r.t.Fatalf("%s with %s alone: %+v is not of that source", model, s.Name(), inUse.Uses)
			}
			if (s.Name() == "docker" || s.Name() == "containerd") && !strings.Contains(err.Error(), says) {
				return fmt.Errorf("it says %w, and not %q", err, says)
			}
			return nil
		})
	}
	if out := r.larder("show", model); !strings.Contains(out, "model.safetensors") {
		r.t.Errorf("%s is not whole any more:\n%s", model, out)
	}
}

// await waits until Docker says that a container is in a state.
func (r *remover) await(container, state string) {
	r.t.Helper()
	r.within(30*time.Second, container+" is "+state, func() error {
		if got := r.docker("inspect", "--format", "{{.State.Status}}", container); got != state {
			return fmt.Errorf("it is %s", got)
		}
		return nil
	})
}

// ctr runs containerd's own client in a namespace of the engine's containerd.
func (r *remover) ctr(namespace string, args ...string) {
	r.t.Helper()
	program := ""
	for _, dir := range filepath.SplitList(r.e.Kind.Path) {
		if path, err := exec.LookPath(filepath.Join(dir, "ctr")); err == nil {
			program = path
			break
		}
	}
	if program == "" {
		r.t.Fatal("no ctr beside the engine's containerd")
	}
	// Without the test's context: it also runs when the test is over.
	cmd := exec.Command(program, append([]string{"-a", r.e.ContainerdSocket(), "-n", namespace}, args...)...)
	if out, err := cmd.CombinedOutput(); err != nil {
		r.t.Errorf("%v: %v\n%s", cmd.Args, err, out)
	}
}

// mountAt shows a model at a folder of the host until the test is over.
func (r *remover) mountAt(model string) (dir string) {
	r.t.Helper()
	dir = filepath.Join(r.root, "at", model)
	r.larder("mount", model, dir, "-o", "access=ro")
	r.t.Cleanup(func() {
		if err := r.volumes.UnmountAt(context.Background(), dir); err != nil && !errors.Is(err, volume.ErrNotMounted) {
			r.t.Errorf("unmount %s: %v", dir, err)
		}
	})
	return dir
}

// rootfs is a root folder of one static program.
func (r *remover) rootfs() string {
	r.t.Helper()
	dir := filepath.Join(r.root, "rootfs")
	ok(r.t, os.MkdirAll(filepath.Join(dir, "bin"), 0o755))
	for _, sub := range []string{"proc", "dev", "sys", "run", "models"} {
		ok(r.t, os.MkdirAll(filepath.Join(dir, sub), 0o755))
	}
	program, err := exec.LookPath("busybox")
	ok(r.t, err)
	data, err := os.ReadFile(program)
	ok(r.t, err)
	ok(r.t, os.WriteFile(filepath.Join(dir, "bin/busybox"), data, 0o755))
	return dir
}

// processesOnGPU makes the helper say that these processes are on a GPU.
func (r *remover) processesOnGPU(pids ...int) {
	r.t.Helper()
	script := "#!/bin/sh\ncat <<END\n"
	for _, pid := range pids {
		script += fmt.Sprintf(`{"gpu":0,"uuid":"GPU-1","name":"NVIDIA H100","pid":%d}`+"\n", pid)
	}
	script += fmt.Sprintf(`{"end":true,"processes":%d}`+"\nEND\n", len(pids))
	ok(r.t, testenv.WriteProgram(r.cfg.GPUHelper, script))
}

// inside starts a shell script in a private mount namespace and returns its
// number once the script is done. The namespace lets go of the copies of
// containers' mounts that it begins with, those of tests beside this one too:
// their uppers would wait for it.
func (r *remover) inside(script string) int {
	r.t.Helper()
	letGo := `awk '$5 ~ "/(node/mnt|propagated-mount)/" {print $5}' /proc/self/mountinfo | xargs -r -n 1 umount -l || true`
	cmd := exec.Command("sh", "-e", "-c", "mount --make-rprivate /; "+letGo+"; "+script+"; echo ready; exec sleep 100000")
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL, Cloneflags: unix.CLONE_NEWNS}
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	ok(r.t, err)
	ok(r.t, cmd.Start())
	r.t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
	if n, err := out.Read(make([]byte, 16)); err != nil || n == 0 {
		r.t.Fatalf("%s: %v", script, err)
	}
	return cmd.Process.Pid
}

// Each kind of use keeps a version by the word of one source alone, and the
// sources that do not know of that kind would have let it go.
func TestEachKindOfUseAloneKeepsAVersion(t *testing.T) {
	eachEngine(t, func(t *testing.T, e *engine.Engine) {
		n := newNode(t, e)
		n.startPlugin()
		r := newRemover(n)
		seed := byte(100)
		fresh := func(name string) string {
			seed++
			n.importModel(name, tiny(seed))
			return name
		}
		inVolume := func(model string) string { return n.volume(model, "model="+model) }

		restarting := n.docker("run", "-d", "--restart", "always", "--network", "none", "--label", n.label,
			"-v", inVolume(fresh("restarting"))+":/models", engine.Image, "false")

		n.start("-v", inVolume(fresh("running"))+":/models")
		r.keptBy("running", "container ", "volumes", "mounts", "docker", "containerd")

		paused := n.start("-v", inVolume(fresh("paused"))+":/models")
		n.docker("pause", paused)
		r.keptBy("paused", "(paused)", "volumes", "mounts", "docker", "containerd")
		n.docker("unpause", paused)

		exited := n.start("-v", inVolume(fresh("exited"))+":/models")
		n.docker("stop", exited)
		r.keptBy("exited", "(exited)", "volumes", "docker")

		n.docker("create", "--network", "none", "--label", n.label, "-v", inVolume(fresh("created"))+":/models", engine.Image, "true")
		r.keptBy("created", "(created)", "volumes", "docker")

		// A folder of the host, by a container that is stopped.
		folder := r.mountAt(fresh("folder"))
		n.docker("create", "--network", "none", "--label", n.label, "-v", folder+"/tokenizer:/models", engine.Image, "true")
		r.keptBy("folder", "(created)", "volumes", "mounts", "docker")

		// containerd without Docker, in two namespaces.
		rootfs := r.rootfs()
		r.ctr("one", "run", "-d", "--null-io", "--rootfs", "--mount", "type=bind,src="+r.mountAt(fresh("task"))+",dst=/models,options=rbind:ro",
			rootfs, "task-"+n.driver, "/bin/busybox", "sleep", "100000")
		t.Cleanup(func() {
			r.ctr("one", "task", "rm", "-f", "task-"+n.driver)
			r.ctr("one", "container", "rm", "task-"+n.driver)
		})
		r.keptBy("task", "container one/task-"+n.driver+" of containerd", "volumes", "mounts", "containerd")
		r.ctr("two", "container", "create", "--rootfs", "--mount", "type=bind,src="+r.mountAt(fresh("no-task"))+",dst=/models,options=rbind:ro",
			rootfs, "none-"+n.driver, "/bin/busybox", "sleep", "100000")
		t.Cleanup(func() { r.ctr("two", "container", "rm", "none-"+n.driver) })
		r.keptBy("no-task", "container two/none-"+n.driver+" of containerd (no task)", "volumes", "mounts", "containerd")

		// A bind copy in a private mount namespace, also when everything else
		// has forgotten the mount.
		source, hidden := r.mountAt(fresh("copy")), filepath.Join(n.root, "hidden")
		ok(t, os.Mkdir(hidden, 0o755))
		r.inside("mount --bind " + source + "/tokenizer " + hidden + "; umount -l " + source)
		n.larder("umount", source)
		r.keptBy("copy", "", "volumes", "mounts")
		r.forget(source)
		r.keptBy("copy", "", "mounts")

		// A process on a GPU, in a mount namespace of its own.
		r.processesOnGPU(r.inside("cd " + r.mountAt(fresh("on-gpu"))))
		r.keptBy("on-gpu", "", "volumes", "mounts", "gpu")

		// A volume that the kubelet has published.
		handle := n.unique("csi-4a1f")
		ok(t, r.volumes.Create(t.Context(), handle, map[string]string{"model": fresh("published")}))
		write(t, filepath.Join(n.kubelet(), "pods/0c4ea9b6/volumes/kubernetes.io~csi/models/vol_data.json"),
			`{"driverName":"csi.larder.dev","specVolID":"models","volumeHandle":"`+handle+`","volumeLifecycleMode":"Ephemeral"}`+"\n")
		r.keptBy("published", "", "volumes", "csi")

		// The pauses between restarts double each time: the one that begins now
		// is long enough to ask everybody.
		restarts := func() int {
			count, err := strconv.Atoi(n.docker("inspect", "--format", "{{.RestartCount}}", restarting))
			ok(t, err)
			return count
		}
		last := restarts()
		n.within(90*time.Second, "it has just been restarted, and often", func() error {
			if now := restarts(); now == last || now < 7 {
				return fmt.Errorf("restarts: %d", now)
			}
			return nil
		})
		r.await(restarting, "restarting")
		r.keptBy("restarting", "(restarting)", "volumes", "docker")
		n.docker("rm", "-f", restarting)

		// Nothing of all this keeps what nobody uses.
		fresh("idle")
		if res, err := r.remove("idle", false, r.sources()...); err != nil || len(res.Versions) != 1 {
			t.Errorf("what nobody uses: %v, %v", res, err)
		}
		out := n.larder("ps", "-a")
		for _, word := range []string{"(exited)", "(created)", "one/task-" + n.driver, "two/none-" + n.driver + " (no task)"} {
			if !strings.Contains(out, word) {
				t.Errorf("larder ps -a does not show %s:\n%s", word, out)
			}
		}
	})
}

// forget loses the records of a mount by hand.
func (r *remover) forget(target string) {
	r.t.Helper()
	mounts, err := filepath.Glob(filepath.Join(r.root, "node", "mounts", "*", "manual-*", "*.json"))
	ok(r.t, err)
	found := false
	for _, path := range mounts {
		data, err := os.ReadFile(path)
		ok(r.t, err)
		if strings.Contains(string(data), `"`+target+`"`) {
			found = true
			volume := filepath.Base(filepath.Dir(path))
			ok(r.t, os.Remove(path))
			ok(r.t, os.Remove(filepath.Join(r.root, "node", "volumes", volume+".json")))
		}
	}
	if !found {
		r.t.Errorf("no record of %s among %v", target, mounts)
	}
}

// unremoved checks that a removal of the model idle fails for want of a
// source's word, and that nothing at all was removed.
func (r *remover) unremoved(what, source string) {
	r.t.Helper()
	before, err := r.store.Usage()
	ok(r.t, err)
	ctx, cancel := context.WithTimeout(r.t.Context(), 5*time.Second)
	defer cancel()
	ref, err := reference.Parse("idle")
	ok(r.t, err)
	c := gc.Collector{Store: r.store, Node: r.volumes.Node(), Sources: r.sources()}
	_, err = c.Remove(ctx, []reference.Reference{ref}, gc.Options{Reason: "test"})
	var failed *usage.Error
	switch {
	case !errors.As(err, &failed):
		r.t.Errorf("%s: %v, want that %s cannot tell", what, err, source)
	case failed.Source != source:
		r.t.Errorf("%s: %v, want that it is %s which cannot tell", what, err, source)
	case !strings.Contains(err.Error(), "nothing was removed"):
		r.t.Errorf("%s: %v does not say that nothing was removed", what, err)
	}
	if _, err := r.store.Resolve(ref); err != nil {
		r.t.Fatalf("%s: the model is gone: %v", what, err)
	}
	after, err := r.store.Usage()
	ok(r.t, err)
	if after.Blobs != before.Blobs || after.Trash != before.Trash {
		r.t.Errorf("%s: the store was %+v and is %+v", what, before, after)
	}
}

// answers listens on a socket and does what it is told with each connection
// once something is asked.
func answers(t *testing.T, path string, do func(net.Conn)) (end func()) {
	t.Helper()
	l, err := net.Listen("unix", path)
	ok(t, err)
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				if _, err := c.Read(make([]byte, 4096)); err == nil {
					do(c)
				}
			}()
		}
	}()
	return func() { ok(t, l.Close()) }
}

// With each source made to fail in turn nothing is removed, not even what
// nobody uses and every other source would let go.
func TestASourceThatFailsKeepsEverything(t *testing.T) {
	ownEngine(t, engine.Options{}, func(t *testing.T, e *engine.Engine) {
		n := newNode(t, e)
		n.importModel("idle", tiny(130))
		n.importModel("used", tiny(131))
		n.startPlugin()
		r := newRemover(n)
		shown, held := filepath.Join(n.root, "shown"), n.unique("held")
		n.larder("mount", "used", shown, "-o", "access=ro", "--name", held)
		t.Cleanup(func() {
			if err := r.volumes.UnmountAt(context.Background(), shown); err != nil {
				t.Error(err)
			}
		})
		published := filepath.Join(n.kubelet(), "pods/0c4ea9b6/volumes/kubernetes.io~csi/models/vol_data.json")
		write(t, published, `{"driverName":"csi.larder.dev","volumeHandle":"`+held+`","specVolID":"models"}`)
		all := func(what string) {
			t.Helper()
			if res, err := r.remove("idle", true, r.sources()...); err != nil || len(res.Versions) != 1 {
				t.Fatalf("%s: %v, %v; want that idle would be removed", what, res, err)
			}
		}
		all("every source answers")

		// What lies on the disk, damaged.
		spoil := func(source, pattern, text string) {
			t.Helper()
			files, err := filepath.Glob(pattern)
			if err != nil || len(files) != 1 {
				t.Fatalf("%s: %v, %v", pattern, files, err)
			}
			old := read(t, files[0])
			ok(t, testenv.WriteProgram(files[0], text)) // one of them is
			r.unremoved(files[0]+" is damaged", source)
			ok(t, testenv.WriteProgram(files[0], old))
			all(files[0] + " is whole again")
		}
		spoil("volumes", filepath.Join(n.root, "node/volumes", held+".json"), "")
		spoil("volumes", filepath.Join(n.root, "node/mounts/*", held, "*.json"), `{"format":`)
		spoil("mounts", filepath.Join(n.root, "node/views/*/*.json"), "")
		spoil("csi", published, `{"driverName":"csi.lar`)
		spoil("gpu", r.cfg.GPUHelper, "#!/bin/sh\nexit 1\n")
		spoil("gpu", r.cfg.GPUHelper, "#!/bin/sh\nexec sleep 1000\n")
		spoil("gpu", r.cfg.GPUHelper, "#!/bin/sh\necho garbage\n")
		spoil("gpu", r.cfg.GPUHelper, "#!/bin/sh\nexit 3\n") // the driver is gone

		// What answers on a socket, replaced by something else.
		good, fake := r.cfg, filepath.Join(e.Dir, "fake.sock")
		for what, do := range map[string]func(net.Conn){
			"answers garbage": func(c net.Conn) { _, _ = c.Write([]byte(strings.Repeat("\x00garbage\n", 9000))) },
			"closes":          func(c net.Conn) { _ = c.Close() },
			"is deaf":         func(net.Conn) {},
		} {
			end := answers(t, fake, do)
			r.cfg.UsageDocker, r.cfg.DockerHost = config.On, "unix://"+fake
			r.unremoved("docker's socket "+what, "docker")
			r.cfg = good
			r.cfg.UsageContainerd, r.cfg.Containerd = config.On, []string{e.ContainerdSocket(), fake}
			r.unremoved("one of containerd's sockets "+what, "containerd")
			r.cfg = good
			end()
		}
		all("the real ones are asked again")

		// The engine killed, then stopped in good order and its sockets gone.
		ok(t, e.Kill())
		r.cfg.UsageContainerd = config.Off
		r.unremoved("the engine is killed", "docker")
		r.cfg.UsageContainerd, r.cfg.UsageDocker = config.Auto, config.Off
		r.unremoved("containerd is killed", "containerd")
		r.cfg = good
		ok(t, e.Start(t.Context()))
		all("the engine runs again")
		ok(t, e.Stop())
		for _, socket := range []string{e.Socket(), e.ContainerdSocket()} {
			if err := os.Remove(socket); err != nil && !errors.Is(err, os.ErrNotExist) {
				t.Fatal(err)
			}
		}
		r.unremoved("the engine is stopped", "docker")
		out, err := n.larderErr("rm", "idle")
		if exitCode(err) != 1 || !strings.Contains(err.Error(), "docker: it was seen at "+e.Host()) {
			t.Errorf("larder rm while the engine is stopped: %s%v", out, err)
		}
		r.cfg.UsageDocker = config.Off
		r.unremoved("containerd is stopped", "containerd")
		r.cfg.UsageContainerd = config.Off
		all("a person says that both were uninstalled")
		r.cfg = good
		ok(t, e.Start(t.Context()))
		if res, err := r.remove("idle", false, r.sources()...); err != nil || len(res.Versions) != 1 {
			t.Errorf("when everything answers again: %v, %v", res, err)
		}
	})
}

// Who removes asks the engines while it holds the store's lock; an engine that
// waits in a Mount for that lock answers all the same.
func TestEnginesAnswerWhileAMountWaitsForTheStore(t *testing.T) {
	eachEngine(t, func(t *testing.T, e *engine.Engine) {
		n := newNode(t, e)
		n.importModel("tiny", tiny(132))
		n.startPlugin()
		r := newRemover(n)
		v := n.volume("v", "model=tiny")
		started := make(chan error, 1)
		err := r.store.Exclusive(t.Context(), func(*store.Exclusive) error {
			go func() {
				_, err := e.Docker(context.WithoutCancel(t.Context()), "run", "-d", "--network", "none", "--label", n.label, "-v", v+":/models", engine.Image, "sleep", "1000")
				started <- err
			}()
			n.within(20*time.Second, "the engine waits in Mount", func() error {
				if ids := n.docker("ps", "-aq", "--filter", "label="+n.label); ids == "" {
					return errors.New("no container yet")
				}
				return nil
			})
			select {
			case err := <-started:
				t.Errorf("the container did not wait for the store: %v", err)
			case <-time.After(500 * time.Millisecond):
			}
			ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
			defer cancel()
			uses, failed := usage.Gather(ctx, r.sources())
			for _, f := range failed {
				t.Error(f)
			}
			if !slices.ContainsFunc(uses, func(u usage.Use) bool { return u.Source == "docker" && u.Container.State == "created" }) {
				t.Errorf("the container that waits is not among %+v", uses)
			}
			return nil
		})
		ok(t, err)
		ok(t, <-started)
	})
}

// Events tell of containers that begin and end, by Docker and by containerd's
// own clients, and of an engine that was away.
func TestEventsOfRealEngines(t *testing.T) {
	ownEngine(t, engine.Options{}, func(t *testing.T, e *engine.Engine) {
		n := newNode(t, e)
		r := newRemover(n)
		told := make(chan struct{}, 1000)
		ctx, cancel := context.WithCancel(t.Context())
		ended := make(chan struct{})
		go func() {
			defer close(ended)
			sources.Of(r.cfg, r.volumes).Watch(ctx, func() { told <- struct{}{} })
		}()
		settle := func() {
			for {
				select {
				case <-told:
				case <-time.After(2500 * time.Millisecond):
					return
				}
			}
		}
		await := func(what string, limit time.Duration) {
			t.Helper()
			select {
			case <-told:
			case <-time.After(limit):
				t.Errorf("not told: %s", what)
			}
		}
		await("the first look", 5*time.Second)
		settle()
		c := n.start()
		await("a container of Docker's", 5*time.Second)
		settle()
		n.docker("rm", "-f", c)
		await("its end", 5*time.Second)
		settle()
		id := "event-" + n.driver
		r.ctr("new", "container", "create", "--rootfs", r.rootfs(), id, "/bin/busybox", "true")
		await("a container in a new namespace of containerd", 5*time.Second)
		r.ctr("new", "container", "rm", id)
		settle()
		ok(t, e.Kill())
		await("the engine has gone", 5*time.Second)
		settle()
		ok(t, e.Start(t.Context()))
		await("the engine is back", 45*time.Second)
		cancel()
		<-ended
	})
}
