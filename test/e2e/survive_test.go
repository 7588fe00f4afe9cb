package e2e

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"

	"github.com/larder-project/larder/test/engine"
)

// What engines really do to a volume plugin: each test is one case.

// docker cp on a running container: the engine mounts with the ID that is
// mounted already and unmounts that ID once, while the container goes on.
func TestCopyOnARunningContainer(t *testing.T) {
	eachEngine(t, func(t *testing.T, e *engine.Engine) {
		n := newNode(t, e)
		n.importModel("tiny", tiny(20))
		n.startPlugin()
		for _, scope := range []string{"run", "volume"} {
			v := n.volume("v-"+scope, "model=tiny", "scope="+scope)
			c := n.start("-v", v+":/models")
			n.sh(c, "echo mine > /models/mine")
			dir := t.TempDir()
			for range 2 {
				n.docker("cp", c+":/models/mine", filepath.Join(dir, "out"))
				if got := read(t, filepath.Join(dir, "out")); got != "mine\n" {
					t.Errorf("docker cp brings out %q, want what the container wrote", got)
				}
			}
			write(t, filepath.Join(dir, "in"), "from outside\n")
			n.docker("cp", filepath.Join(dir, "in"), c+":/models/in")
			if got := n.sh(c, "cat /models/mine /models/in; ls /models/tokenizer"); got != "mine\nfrom outside\nvocab.txt" {
				t.Errorf("after docker cp the container sees %q", got)
			}
			if got := len(n.views()); got != 1 {
				t.Errorf("after docker cp %d views are mounted, want 1", got)
			}
			n.docker("rm", "-f", c)
			n.eventually("nothing is mounted", n.nothingMounted)
		}
	})
}

// The engine dies without live-restore: no Unmount comes, and the next start
// mounts the same ID once more.
func TestEngineKilledWithoutLiveRestore(t *testing.T) {
	ownEngine(t, engine.Options{}, func(t *testing.T, e *engine.Engine) {
		n := newNode(t, e)
		n.importModel("tiny", tiny(21))
		n.startPlugin()
		run, kept := n.volume("run", "model=tiny"), n.volume("kept", "model=tiny", "scope=volume")
		c := n.start("-v", run+":/models", "-v", kept+":/kept")
		n.sh(c, "echo kept > /kept/mine")
		ok(t, e.Kill())
		ok(t, e.Start(t.Context()))
		n.docker("start", c)
		if got := n.sh(c, "cat /kept/mine /models/tokenizer/vocab.txt"); got != "kept\na\nb\nc" {
			t.Errorf("after the engine's death the container sees %q", got)
		}
		if got := len(n.views()); got != 2 {
			t.Errorf("%d views are mounted, want 2", got)
		}
		n.docker("stop", c)
		n.eventually("nothing is mounted, whatever the engine counted", n.nothingMounted)
		n.docker("rm", c)
		n.docker("volume", "rm", run, kept)
		n.eventually("nothing is left of what was written", n.noUppers)
	})
}

// A restart with live-restore asks the plugin nothing but who it is: mounts
// and state stay.
func TestEngineRestartedWithLiveRestore(t *testing.T) {
	ownEngine(t, engine.Options{LiveRestore: true}, func(t *testing.T, e *engine.Engine) {
		n := newNode(t, e)
		n.importModel("tiny", tiny(22))
		n.startPlugin()
		v := n.volume("v", "model=tiny")
		c := n.start("-v", v+":/models")
		n.sh(c, "echo mine > /models/mine")
		for _, end := range []func() error{e.Kill, e.Stop} {
			ok(t, end())
			ok(t, e.Start(t.Context()))
			if got := n.sh(c, "cat /models/mine; ls /models/tokenizer"); got != "mine\nvocab.txt" {
				t.Errorf("after the engine's restart the container sees %q", got)
			}
			if got := len(n.views()); got != 1 {
				t.Errorf("%d views are mounted, want 1", got)
			}
		}
		n.refused([]string{v}, "volume", "rm", v)
		n.docker("stop", c)
		n.eventually("nothing is mounted", n.nothingMounted)
	})
}

// Live-restore, docker cp, stop: 20.10 never sends the last Unmount.
func TestUnmountThatNeverComes(t *testing.T) {
	ownEngine(t, engine.Options{LiveRestore: true}, func(t *testing.T, e *engine.Engine) {
		n := newNode(t, e)
		n.importModel("tiny", tiny(23))
		n.startPlugin()
		v := n.volume("v", "model=tiny")
		c := n.start("-v", v+":/models")
		n.sh(c, "echo mine > /models/mine")
		ok(t, e.Kill())
		ok(t, e.Start(t.Context()))
		n.docker("cp", c+":/models/mine", filepath.Join(t.TempDir(), "out"))
		if got := n.sh(c, "cat /models/mine"); got != "mine" {
			t.Errorf("after docker cp the container sees %q", got)
		}
		n.docker("stop", c)
		if n.nothingMounted() != nil {
			n.age()
		}
		n.eventually("the mount that nobody unmounts is reaped", n.nothingMounted)
		n.docker("start", c)
		if got := n.sh(c, "ls /models/tokenizer"); got != "vocab.txt" {
			t.Errorf("started again the container sees %q", got)
		}
		n.docker("rm", "-f", c)
		n.eventually("nothing is mounted", n.nothingMounted)
		n.docker("volume", "rm", v)
	})
}

// A clean-up that fails is the plugin's own matter: the engine would not ask
// again. It is finished later.
func TestUnmountThatFailsIsFinishedLater(t *testing.T) {
	eachEngine(t, func(t *testing.T, e *engine.Engine) {
		n := newNode(t, e)
		n.importModel("tiny", tiny(24))
		n.startPlugin()
		for _, obstacle := range []string{"somebody-stands-in-it", "file-that-cannot-be-removed"} {
			t.Run(obstacle, func(t *testing.T) {
				n := n.in(t)
				v := n.volume(obstacle, "model=tiny")
				c := n.start("-v", v+":/models")
				n.sh(c, "echo mine > /models/mine")
				views := n.views()
				if len(views) != 1 {
					t.Fatalf("%d views are mounted, want 1", len(views))
				}
				var clear func()
				if obstacle == "somebody-stands-in-it" {
					stands := n.spawn("sh", nil, nil, "-c", `cd "$1" && echo there && exec sleep 1000`, "sh", views[0].Mountpoint)
					clear = func() { stands.end(syscall.SIGKILL) }
					n.eventually("somebody stands in the mount", func() error {
						if stands.output() == "" {
							return errors.New("not yet")
						}
						return nil
					})
				} else {
					runProgram(t, os.Environ(), "chattr", "+i", filepath.Join(upperOf(views[0]), "mine"))
					uppers := filepath.Join(n.root, "node", "uppers") // in which it gets another name
					clear = func() { runProgram(t, os.Environ(), "chattr", "-R", "-i", uppers) }
					t.Cleanup(func() { _ = exec.Command("chattr", "-R", "-i", uppers).Run() })
				}
				n.docker("stop", c)
				n.docker("rm", c)
				if log := grep(e.LogTail(200), v); strings.Contains(log, "nmount") {
					t.Errorf("the engine was told of the failure:\n%s", log)
				}
				if err := n.noUppers(); err == nil {
					t.Error("the obstacle was none: nothing is left to be finished")
				}
				clear()
				n.eventually("the mount is gone at last", n.nothingMounted)
				n.eventually("what was written is gone at last", n.noUppers)
				n.docker("volume", "rm", v)
			})
		}
	})
}

// upperOf is the upper folder of a view that is mounted; empty without one.
func upperOf(m *mountinfo.Info) string {
	for _, option := range strings.Split(m.VFSOptions, ",") {
		if dir, is := strings.CutPrefix(option, "upperdir="); is {
			return dir
		}
	}
	return ""
}

// A Mount that fails leaves nothing behind: no Unmount will come for it.
func TestMountThatFailsIsRolledBack(t *testing.T) {
	eachEngine(t, func(t *testing.T, e *engine.Engine) {
		n := newNode(t, e)
		n.importModel("tiny:1.0.0", tiny(25))
		n.startPlugin()
		v := n.volume("v", "model=tiny:1.0.0")
		digest := n.inspect(v, "{{.Status.digest}}")
		manifest := filepath.Join(n.root, "store", "blobs", "sha256", strings.TrimPrefix(digest, "sha256:"))
		good := read(t, manifest)
		ok(t, os.Remove(manifest))
		c := n.docker("create", "--network", "none", "--label", n.label, "-v", v+":/models", engine.Image, "cat", "/models/config.json")
		n.refused([]string{v, "not in the store"}, "start", "-a", c)
		if err := n.nothingMounted(); err != nil {
			t.Error(err)
		}
		if err := n.noUppers(); err != nil {
			t.Error(err)
		}
		if got := n.ps(); len(got) != 0 {
			t.Errorf("larder ps lists %v", got)
		}
		ok(t, os.WriteFile(manifest, []byte(good), 0o444))
		if got := n.docker("start", "-a", c); got != string(tiny(25)["config.json"]) {
			t.Errorf("once the store is whole again the container reads %q", got)
		}
	})
}

// A Mount that comes to its end after the engine has given it up is reaped.
func TestMountThatComesTooLateIsReaped(t *testing.T) {
	eachEngine(t, func(t *testing.T, e *engine.Engine) {
		n := newNode(t, e)
		n.importModel("tiny", tiny(26))
		n.startPlugin()
		v := n.volume("v", "model=tiny")
		ok(t, n.plugin.cmd.Process.Signal(syscall.SIGSTOP))
		conn, err := net.Dial("unix", n.socket)
		ok(t, err)
		body := fmt.Sprintf(`{"Name":%q,"ID":%q}`, v, strings.Repeat("ab", 32))
		fmt.Fprintf(conn, "POST /VolumeDriver.Mount HTTP/1.1\r\nHost: plugin\r\nContent-Length: %d\r\n\r\n%s", len(body), body)
		ok(t, conn.Close())
		ok(t, n.plugin.cmd.Process.Signal(syscall.SIGCONT))
		n.within(10*time.Second, "the request that nobody waits for is carried out", func() error {
			if n.nothingMounted() == nil {
				return errors.New("nothing is mounted yet")
			}
			return nil
		})
		if t.Failed() {
			return
		}
		n.age()
		n.eventually("the mount that nobody waits for is gone", n.nothingMounted)
		n.eventually("and has left nothing", n.noUppers)
		n.docker("volume", "rm", v)
	})
}

// After a connection that dropped, the engine tries again with an empty body.
// That, and names that would lead out of the state, is refused.
func TestEmptyAndHostileRequestsAreRefused(t *testing.T) {
	eachEngine(t, func(t *testing.T, e *engine.Engine) {
		n := newNode(t, e)
		n.importModel("tiny", tiny(27))
		n.startPlugin()
		v := n.volume("v", "model=tiny")
		before := tree(t, n.root)
		id := strings.Repeat("cd", 32)
		for _, method := range []string{"Create", "Remove", "Mount", "Unmount", "Path", "Get"} {
			for _, body := range []string{"", "{}", `{"Name":"","ID":""}`, `{"Name":"","ID":"` + id + `"}`, "[]", `{"Name":`, `{"Name":7}`} {
				if answer, err := n.post("VolumeDriver."+method, []byte(body)); !refused(err) {
					t.Errorf("%s with the body %q: %v, %v; want a refusal", method, body, answer, err)
				}
			}
		}
		for _, method := range []string{"Mount", "Unmount"} {
			if answer, err := n.call("VolumeDriver."+method, map[string]string{"Name": v}); !refused(err) {
				t.Errorf("%s without an ID: %v, %v; want a refusal", method, answer, err)
			}
			for _, id := range []string{"../../x", "a/b", ".", "..", "a\x00b", strings.Repeat("x", 5000)} {
				if answer, err := n.call("VolumeDriver."+method, map[string]string{"Name": v, "ID": id}); !refused(err) {
					t.Errorf("%s of ID %.20q: %v, %v; want a refusal", method, id, answer, err)
				}
			}
		}
		for _, name := range []string{"../../etc", "a/b", "/abs", ".", "..", "-x", "a\nb", "a\x00b", strings.Repeat("n", 300), "ä"} {
			if _, err := n.call("VolumeDriver.Create", map[string]any{"Name": name, "Opts": map[string]string{"model": "tiny"}}); !refused(err) {
				t.Errorf("a volume named %.20q: %v, want a refusal", name, err)
			}
			if _, err := n.call("VolumeDriver.Mount", map[string]string{"Name": name, "ID": id}); !refused(err) {
				t.Errorf("Mount of a volume named %.20q: %v, want a refusal", name, err)
			}
		}
		if after := tree(t, n.root); after != before {
			t.Errorf("refused requests have changed the disk from\n%s\nto\n%s", before, after)
		}
		if got := n.run("-v", v+":/models", engine.Image, "ls", "/models/tokenizer"); got != "vocab.txt" {
			t.Errorf("after that a container sees %q", got)
		}
	})
}

// While the engine boots it asks Get for each volume. An error would make it
// forget the volume's options and references, and let it be removed under a
// running container.
func TestGetNeverFailsForAKnownVolume(t *testing.T) {
	ownEngine(t, engine.Options{LiveRestore: true}, func(t *testing.T, e *engine.Engine) {
		for name, damage := range map[string]string{"emptied": "", "cut-short": `{"name": "`, "not-json": "\x00\x00\x00\x00"} {
			t.Run(name, func(t *testing.T) {
				n := newNode(t, e)
				n.importModel("tiny", tiny(28))
				n.startPlugin()
				v, other := n.volume("v", "model=tiny"), n.volume("other", "model=tiny")
				c := n.start("-v", v+":/models")
				n.sh(c, "echo mine > /models/mine")
				ok(t, e.Kill())
				n.killPlugin()
				record := n.record(v)
				ok(t, os.Truncate(record, 0))
				ok(t, os.WriteFile(record, []byte(damage), 0o644))
				n.startPlugin()
				if _, err := n.call("VolumeDriver.Get", map[string]string{"Name": v}); err != nil {
					t.Errorf("Get of a volume with a damaged record: %v", err)
				}
				ok(t, e.Start(t.Context()))
				if got := n.inspect(v, "{{.Driver}} {{.Options.model}}"); got != n.driver+" tiny" {
					t.Errorf("the engine has forgotten the volume's options: %q", got)
				}
				if got := n.sh(c, "cat /models/mine"); got != "mine" {
					t.Errorf("the container sees %q", got)
				}
				n.refused([]string{"in use"}, "volume", "rm", v)
				if _, err := n.call("VolumeDriver.Remove", map[string]string{"Name": v}); !refused(err) {
					t.Errorf("Remove of a mounted volume: %v, want a refusal", err)
				}
				names := n.docker("volume", "ls", "-q", "--filter", "driver="+n.driver)
				if !strings.Contains(names, v) || !strings.Contains(names, other) {
					t.Errorf("docker volume ls has %q, want both volumes", names)
				}
				// Loud, not silent: a new run is refused and says why.
				n.refused([]string{v}, "run", "--rm", "--network", "none", "--label", n.label, "-v", v+":/models", engine.Image, "true")
				n.docker("rm", "-f", c)
				n.eventually("nothing is mounted", n.nothingMounted)
				n.docker("volume", "rm", v)
			})
		}
	})
}

// The engine boots while the socket is not there. The container's start then
// fails, and works as soon as the plugin is there.
func TestSocketMissingWhenTheEngineBoots(t *testing.T) {
	ownEngine(t, engine.Options{}, func(t *testing.T, e *engine.Engine) {
		n := newNode(t, e)
		n.importModel("tiny", tiny(29))
		n.startPlugin()
		v := n.volume("v", "model=tiny", "scope=volume")
		c := n.start("-v", v+":/models")
		n.sh(c, "echo mine > /models/mine")
		n.docker("stop", c)
		ok(t, e.Stop())
		n.plugin.end(syscall.SIGTERM)
		_ = os.Remove(n.socket)
		ok(t, e.Start(t.Context()))
		n.startPlugin()
		n.docker("start", c)
		if got := n.sh(c, "cat /models/mine"); got != "mine" {
			t.Errorf("the container sees %q", got)
		}
		if got := n.inspect(v, "{{.Options.model}}"); got != "tiny" {
			t.Errorf("the engine has forgotten the volume's options: %q", got)
		}
	})
}

// With socket activation the socket is there before the plugin and survives
// it: an engine that boots waits in the queue and for nothing else.
func TestSocketActivation(t *testing.T) {
	ownEngine(t, engine.Options{LiveRestore: true}, func(t *testing.T, e *engine.Engine) {
		n := newNode(t, e)
		n.importModel("tiny", tiny(30))
		ok(t, os.MkdirAll(filepath.Dir(n.socket), 0o755))
		listener, err := net.ListenUnix("unix", &net.UnixAddr{Name: n.socket, Net: "unix"})
		ok(t, err)
		defer listener.Close()
		listener.SetUnlinkOnClose(false)
		fd, err := listener.File()
		ok(t, err)
		defer fd.Close()
		activated := make(chan struct{}, 1)
		// What systemd does: on the first connection, start the service and
		// hand it the socket as descriptor 3.
		activate := func() {
			poll := []unix.PollFd{{Fd: int32(fd.Fd()), Events: unix.POLLIN}}
			for {
				if _, err := unix.Poll(poll, 30_000); !errors.Is(err, unix.EINTR) {
					break
				}
			}
			n.plugin = n.spawn("sh", []*os.File{fd}, []string{"LISTEN_FDS=1", "LISTEN_FDNAMES=larder"},
				"-c", `LISTEN_PID=$$ exec "$@"`, "sh", filepath.Join(programs, "larder-plugin"), "--root", n.root)
			activated <- struct{}{}
		}
		go activate()
		v := n.volume("v", "model=tiny")
		<-activated
		c := n.start("-v", v+":/models")
		n.sh(c, "echo mine > /models/mine")
		// Waiting for the plugin would take a quarter of a minute each time.
		quick(t, 12*time.Second, "to boot the engine, which waits for no plugin,", func() time.Duration {
			ok(t, e.Kill())
			n.killPlugin()
			if _, err := os.Stat(n.socket); err != nil {
				t.Fatalf("the plugin took the socket with it: %v", err)
			}
			go activate()
			begin := time.Now()
			ok(t, e.Start(t.Context()))
			took := time.Since(begin)
			<-activated
			return took
		})
		if got := n.inspect(v, "{{.Options.model}}"); got != "tiny" {
			t.Errorf("the engine has forgotten the volume's options: %q", got)
		}
		if got := n.sh(c, "cat /models/mine"); got != "mine" {
			t.Errorf("the container sees %q", got)
		}
		n.docker("rm", "-f", c)
		n.eventually("nothing is mounted", n.nothingMounted)
		// A clean end leaves the socket to whom it belongs.
		n.plugin.end(syscall.SIGTERM)
		if _, err := os.Stat(n.socket); err != nil {
			t.Errorf("the plugin removed a socket that it was handed: %v", err)
		}
	})
}

// The engine keeps what it knows only when List fails; an empty List it takes
// for the truth.
func TestListIsWholeOrAnError(t *testing.T) {
	eachEngine(t, func(t *testing.T, e *engine.Engine) {
		n := newNode(t, e)
		n.importModel("tiny", tiny(31))
		n.startPlugin()
		const count = 200
		for i := range count {
			if _, err := n.call("VolumeDriver.Create", map[string]any{"Name": n.unique(fmt.Sprintf("v%03d", i)), "Opts": map[string]string{"model": "tiny"}}); err != nil {
				t.Fatal(err)
			}
		}
		listed := func() (int, error) {
			answer, err := n.call("VolumeDriver.List", map[string]any{})
			list, _ := answer["Volumes"].([]any)
			return len(list), err
		}
		if got, err := listed(); err != nil || got != count {
			t.Errorf("List: %d volumes, %v; want %d", got, err, count)
		}
		// From the first moment at which it listens.
		n.killPlugin()
		ok(t, os.WriteFile(n.record(n.unique("v007")), nil, 0o644))
		n.plugin = n.spawn(filepath.Join(programs, "larder-plugin"), nil, nil, "--root", n.root, "--socket", n.socket)
		first := errors.New("never asked")
		for deadline := time.Now().Add(20 * time.Second); time.Now().Before(deadline); time.Sleep(time.Millisecond) {
			got, err := listed()
			if err != nil && !refused(err) {
				first = err
				continue // it does not listen yet
			}
			if err == nil && got != count {
				t.Errorf("the first List after a start has %d volumes, want %d or an error", got, count)
			}
			first = nil
			break
		}
		ok(t, first)
		n.within(5*time.Second, "List has every volume, the damaged one too", func() error {
			if got, err := listed(); err != nil || got != count {
				return fmt.Errorf("%d of %d volumes, %v", got, count, err)
			}
			return nil
		})
		if got := strings.Count(n.docker("volume", "ls", "-q", "--filter", "driver="+n.driver), "\n") + 1; got != count {
			t.Errorf("docker volume ls has %d volumes, want %d", got, count)
		}
		// Records that cannot be read are no empty list.
		volumes := filepath.Join(n.root, "node", "volumes")
		ok(t, os.Rename(volumes, volumes+".away"))
		write(t, volumes, "not a folder")
		if got, err := listed(); err == nil && got != count {
			t.Errorf("with its records out of reach, List answers %d volumes and no error", got)
		}
		ok(t, os.Remove(volumes))
		ok(t, os.Rename(volumes+".away", volumes))
		n.killPlugin()
		n.startPlugin()
		for i := range count {
			if _, err := n.call("VolumeDriver.Remove", map[string]string{"Name": n.unique(fmt.Sprintf("v%03d", i))}); err != nil {
				t.Fatal(err)
			}
		}
	})
}

// An upper is mounted once: containers on one volume that keeps its writes
// share that mount, also when the plugin has been killed in between.
func TestNoUpperIsMountedTwice(t *testing.T) {
	eachEngine(t, func(t *testing.T, e *engine.Engine) {
		n := newNode(t, e)
		n.importModel("tiny", tiny(32))
		n.startPlugin()
		v := n.volume("v", "model=tiny", "scope=volume")
		var containers []string
		for i := range 4 {
			if i == 2 {
				n.killPlugin()
				n.startPlugin()
			}
			containers = append(containers, n.start("-v", v+":/models"))
		}
		uppers := map[string]map[string]bool{} // upper to device numbers
		for _, m := range n.views() {
			dir := upperOf(m)
			if uppers[dir] == nil {
				uppers[dir] = map[string]bool{}
			}
			uppers[dir][fmt.Sprintf("%d:%d", m.Major, m.Minor)] = true
		}
		if len(uppers) != 1 {
			t.Errorf("the volume has %d uppers, want 1: %v", len(uppers), uppers)
		}
		for dir, devices := range uppers {
			if len(devices) != 1 {
				t.Errorf("the upper %s is mounted %d times", dir, len(devices))
			}
		}
		n.sh(containers[0], "echo shared > /models/shared")
		if got := n.sh(containers[3], "cat /models/shared"); got != "shared" {
			t.Errorf("the last container sees %q", got)
		}
		n.docker("rm", "-f", containers[0], containers[1], containers[2])
		if got := n.sh(containers[3], "cat /models/shared; ls /models/tokenizer"); got != "shared\nvocab.txt" {
			t.Errorf("after the others ended the last container sees %q", got)
		}
		n.docker("rm", "-f", containers[3])
		n.eventually("nothing is mounted", n.nothingMounted)
	})
}

// A paused container makes no call and uses its mount all the same.
func TestPausedContainerIsInUse(t *testing.T) {
	eachEngine(t, func(t *testing.T, e *engine.Engine) {
		n := newNode(t, e)
		n.importModel("tiny:1.0.0", tiny(33))
		n.startPlugin()
		v := n.volume("v", "model=tiny:1.0.0")
		c := n.start("-v", v+":/models")
		n.sh(c, "echo mine > /models/mine")
		n.docker("pause", c)
		n.killPlugin() // what it remembers must be on the disk
		n.startPlugin()
		if got := n.ps(); len(got) != 1 {
			t.Errorf("larder ps lists %v, want the paused container's mount", got)
		}
		if _, err := n.larderErr("rm", "tiny:1.0.0"); exitCode(err) != 4 {
			t.Errorf("larder rm: %v, want exit code 4", err)
		}
		if _, err := n.call("VolumeDriver.Remove", map[string]string{"Name": v}); !refused(err) {
			t.Errorf("Remove: %v, want a refusal", err)
		}
		n.docker("unpause", c)
		if got := n.sh(c, "cat /models/mine; ls /models/tokenizer"); got != "mine\nvocab.txt" {
			t.Errorf("unpaused, the container sees %q", got)
		}
	})
}

// The host reboots: the state says mounted, and nothing is.
func TestHostReboot(t *testing.T) {
	ownEngine(t, engine.Options{}, func(t *testing.T, e *engine.Engine) {
		n := newNode(t, e)
		var err error
		n.bin, err = withFaults()
		ok(t, err)
		n.importModel("tiny", tiny(34))
		n.startPlugin()
		run, kept := n.volume("run", "model=tiny"), n.volume("kept", "model=tiny", "scope=volume")
		c := n.start("-v", run+":/models", "-v", kept+":/kept")
		other := n.start("-v", run+":/models")
		n.sh(c, "echo old > /models/old; echo kept > /kept/mine")

		ok(t, e.Kill())
		n.killPlugin()
		e.KillContainers()
		ok(t, engine.UnmountBelow(e.Dir))
		ok(t, engine.UnmountBelow(n.root))
		_ = os.Remove(n.socket)
		n.env = append(n.env, "LARDER_BOOT_ID=6ba7b810-9dad-11d1-80b4-00c04fd430c8")

		n.startPlugin()
		if got := n.ps(); len(got) != 0 {
			t.Errorf("after the reboot larder ps lists %v", got)
		}
		ok(t, e.Start(t.Context()))
		n.docker("start", c)
		if got := n.sh(c, "cat /kept/mine; ls /models"); got != "kept\nconfig.json\nmodel.safetensors\ntokenizer" {
			t.Errorf("after the reboot the container sees %q: want what its volume keeps, and nothing of the old run", got)
		}
		if got := n.ps(); len(got) != 2 {
			t.Errorf("larder ps lists %v, want the two mounts of this boot", got)
		}
		n.docker("rm", "-f", c, other)
		n.eventually("nothing is mounted", n.nothingMounted)
		n.docker("volume", "rm", run, kept)
		n.eventually("no writes are left", n.noUppers)
	})
}

// The plugin is killed while containers read and write: they notice nothing,
// and the next plugin knows every mount again.
func TestPluginKilledUnderTwentyContainers(t *testing.T) {
	eachEngine(t, func(t *testing.T, e *engine.Engine) {
		n := newNode(t, e)
		m := tiny(35)
		n.importModel("tiny", m)
		n.startPlugin()
		run, kept := n.volume("run", "model=tiny"), n.volume("kept", "model=tiny", "scope=volume")
		script := `trap exit TERM
i=0
while :; do
	i=$((i+1))
	set -- $(sha256sum /models/model.safetensors) || echo "FAIL read $i"
	[ "$1" = ` + sha256hex(m["model.safetensors"]) + ` ] || echo "FAIL bytes $i $1"
	echo $i > /models/$HOSTNAME || echo "FAIL write $i"
	[ "$(cat /models/$HOSTNAME)" = $i ] || echo "FAIL read back $i"
	ls /models/tokenizer/vocab.txt > /dev/null || echo "FAIL list $i"
	echo "tick $i"
	sleep 0.3
done`
		var containers []string
		for i := range 20 {
			v := run
			switch {
			case i%4 == 3:
				v = kept
			}
			mount := []string{"-v", v + ":/models"}
			if i%4 == 2 {
				mount = []string{"--mount", "type=volume,volume-driver=" + n.driver + ",volume-opt=model=tiny,dst=/models"}
			}
			args := append([]string{"run", "-d", "--network", "none", "--label", n.label, "--user", fmt.Sprint(1000 + i)}, mount...)
			containers = append(containers, n.docker(append(args, engine.Image, "sh", "-c", script)...))
		}
		ticks := func(c string) int { return strings.Count(n.docker("logs", c), "tick") }
		for range 3 {
			n.killPlugin()
			before := make([]int, len(containers))
			for i, c := range containers {
				before[i] = ticks(c)
			}
			for i, c := range containers {
				n.within(30*time.Second, "the container goes on without the plugin", func() error {
					if got := ticks(c); got <= before[i]+1 {
						return fmt.Errorf("container %d stands at tick %d", i, got)
					}
					return nil
				})
			}
			n.startPlugin()
		}
		if got := len(n.ps()); got != len(containers) {
			t.Errorf("after its restart larder ps lists %d mounts, want one for each of %d containers", got, len(containers))
		}
		// 10 of run and 5 anonymous ones; 5 containers share the mount of kept.
		if got := len(n.views()); got != 16 {
			t.Errorf("%d views are mounted, want 16", got)
		}
		n.docker(append([]string{"stop"}, containers...)...)
		for i, c := range containers {
			if log := n.docker("logs", c); strings.Contains(log, "FAIL") {
				t.Errorf("container %d saw failures:\n%s", i, grep(log, "FAIL"))
			}
		}
		n.eventually("every mount is gone", n.nothingMounted)
		n.docker(append([]string{"rm", "-v"}, containers...)...)
		n.docker("volume", "rm", run, kept)
		n.eventually("no writes are left", n.noUppers)
		if got := n.ps(); len(got) != 0 {
			t.Errorf("larder ps lists %v", got)
		}
		n.larder("verify")
	})
}

// Containers stop and start while there is no plugin: stops work, starts say
// what is missing, and the plugin puts all of it in order when it is back.
func TestContainersStopWithoutThePlugin(t *testing.T) {
	eachEngine(t, func(t *testing.T, e *engine.Engine) {
		n := newNode(t, e)
		n.importModel("tiny", tiny(36))
		n.startPlugin()
		v := n.volume("v", "model=tiny")
		stops, stays := n.start("-v", v+":/models"), n.start("-v", v+":/models")
		n.killPlugin()
		n.docker("kill", stops)
		n.docker("wait", stops)
		n.sh(stays, "sha256sum /models/model.safetensors; echo x > /models/x")
		n.startPlugin()
		n.docker("start", stops)
		n.sh(stops, "ls /models/tokenizer/vocab.txt")
		n.docker("rm", "-f", stops)
		if got := n.sh(stays, "cat /models/x"); got != "x" {
			t.Errorf("the container that stayed sees %q", got)
		}
		n.docker("rm", "-f", stays)
		n.eventually("nothing is mounted", n.nothingMounted)
		n.eventually("nothing is left of what they wrote", n.noUppers)
	})
}

// A plugin in a container that was not given the host's processes sees no user
// of its mounts. It takes none away that the engine has not unmounted, and
// deletes nothing under a container.
func TestPluginThatSeesNoContainer(t *testing.T) {
	eachEngine(t, func(t *testing.T, e *engine.Engine) {
		n := newNode(t, e)
		n.importModel("tiny", tiny(37))
		start := func() {
			n.plugin = n.spawn("unshare", nil, []string{"LARDER_USAGE_PID_NAMESPACE=host"}, "--pid", "--fork", "--kill-child=SIGKILL", "--mount", "--propagation", "unchanged", "--mount-proc",
				filepath.Join(programs, "larder-plugin"), "--root", n.root, "--socket", n.socket)
			n.waitPlugin()
		}
		start()
		kept, run := n.volume("kept", "model=tiny", "scope=volume"), n.volume("run", "model=tiny")
		c := n.start("-v", kept+":/kept", "-v", run+":/run-scope")
		n.sh(c, "echo mine > /kept/mine; echo mine > /run-scope/mine")
		n.age()
		n.killPlugin()
		start() // and looks for forgotten mounts at once
		n.within(10*time.Second, "the plugin says what it cannot do", func() error {
			if !strings.Contains(n.plugin.output(), "PID namespace") {
				return errors.New("not yet")
			}
			return nil
		})
		if got := len(n.views()); got != 2 {
			t.Errorf("%d views are mounted, want 2", got)
		}
		if _, err := n.call("VolumeDriver.Remove", map[string]string{"Name": kept}); !refused(err) {
			t.Errorf("Remove: %v, want a refusal", err)
		}
		// Another container on the same volume shares its mount.
		other := n.start("-v", kept+":/kept")
		if got := n.sh(other, "cat /kept/mine"); got != "mine" {
			t.Errorf("the other container sees %q", got)
		}
		if got := n.sh(c, "cat /kept/mine /run-scope/mine"); got != "mine\nmine" {
			t.Errorf("the container sees %q", got)
		}
		n.docker("rm", "-f", c, other)
		n.eventually("nothing is mounted", n.nothingMounted)
		n.docker("volume", "rm", kept, run)
		n.eventually("no writes are left", n.noUppers)
	})
}

// Two plugins on one state: the second refuses, and says which process is
// there.
func TestSecondPluginRefuses(t *testing.T) {
	eachEngine(t, func(t *testing.T, e *engine.Engine) {
		n := newNode(t, e)
		n.startPlugin()
		second := n.spawn(filepath.Join(programs, "larder-plugin"), nil, nil, "--root", n.root, "--socket", n.socket+"2")
		defer os.Remove(n.socket + "2")
		select {
		case <-second.done:
		case <-time.After(10 * time.Second):
			second.end(syscall.SIGKILL)
			t.Fatal("the second plugin runs")
		}
		if code := second.cmd.ProcessState.ExitCode(); code == 0 {
			t.Error("the second plugin exits with 0")
		}
		if !strings.Contains(second.output(), fmt.Sprint(n.plugin.cmd.Process.Pid)) {
			t.Errorf("it does not name the first (pid %d): %s", n.plugin.cmd.Process.Pid, second.output())
		}
		n.waitPlugin()
		n.killPlugin()
		n.startPlugin() // the dead one's lock is in nobody's way
	})
}

// record is the file of a volume's record.
func (n *node) record(volume string) string {
	n.t.Helper()
	path := filepath.Join(n.root, "node", "volumes", volume+".json")
	if _, err := os.Stat(path); err != nil {
		n.t.Fatal(err)
	}
	return path
}

// refused tells whether the plugin answered, and said no.
func refused(err error) bool {
	var r refusal
	return errors.As(err, &r)
}

// tree lists every file below dir with its size.
func tree(t *testing.T, dir string) string {
	t.Helper()
	var out bytes.Buffer
	ok(t, filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		size := info.Size()
		if d.IsDir() {
			size = 0
		}
		fmt.Fprintln(&out, strings.TrimPrefix(path, dir), size)
		return nil
	}))
	return out.String()
}

func grep(text, word string) string {
	var found []string
	for _, line := range strings.Split(text, "\n") {
		if strings.Contains(line, word) {
			found = append(found, line)
		}
	}
	return strings.Join(found[:min(len(found), 10)], "\n")
}

func read(t *testing.T, path string) string {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(data)
}

func ok(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
