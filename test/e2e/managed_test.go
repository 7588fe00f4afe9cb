package e2e

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/larder-project/larder/test/engine"
)

// The plugin as the engine's own: config.json and a static binary. What the
// engine does to such a plugin (kills, disables, upgrades, removes it) must
// neither disturb containers nor lose volumes.

// managed is a node whose plugin the engine runs.
type managed struct {
	*node
	name string // of the plugin, tag included: it is the driver's name
}

// pluginFolder makes what docker plugin create wants: config.json and rootfs/.
func pluginFolder(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	config := read(t, filepath.Join(checkout, "config.json"))
	write(t, filepath.Join(dir, "config.json"), config)
	var c struct {
		Entrypoint      []string
		PropagatedMount string
		Mounts          []struct{ Destination string }
	}
	ok(t, json.Unmarshal([]byte(config), &c))
	rootfs := filepath.Join(dir, "rootfs")
	for _, folder := range []string{"etc/ssl/certs", "tmp", "run/docker/plugins", "proc", "sys", "dev"} {
		ok(t, os.MkdirAll(filepath.Join(rootfs, folder), 0o755))
	}
	for _, m := range c.Mounts {
		ok(t, os.MkdirAll(filepath.Join(rootfs, m.Destination), 0o755))
	}
	if c.PropagatedMount != "" {
		ok(t, os.MkdirAll(filepath.Join(rootfs, c.PropagatedMount), 0o755))
	}
	program := filepath.Join(rootfs, c.Entrypoint[0])
	ok(t, os.MkdirAll(filepath.Dir(program), 0o755))
	data, err := os.ReadFile(filepath.Join(programs, "larder-plugin-static"))
	ok(t, err)
	ok(t, os.WriteFile(program, data, 0o755))
	return dir
}

func newManaged(t *testing.T, e *engine.Engine) *managed {
	t.Helper()
	n := newNode(t, e)
	m := &managed{node: n, name: n.driver + ":1"}
	n.driver = m.name
	n.docker("plugin", "create", m.name, pluginFolder(t))
	m.docker("plugin", "set", m.name, "root.source="+n.root)
	m.docker("plugin", "enable", "--timeout", "120", m.name)
	return m
}

// pid is the plugin's process.
func (m *managed) pid() int {
	m.t.Helper()
	id := m.docker("plugin", "inspect", "--format", "{{.ID}}", m.name)
	found := 0
	m.within(30*time.Second, "the plugin has a process", func() error {
		entries, err := os.ReadDir("/proc")
		if err != nil {
			return err
		}
		for _, entry := range entries {
			pid, err := strconv.Atoi(entry.Name())
			if err != nil {
				continue
			}
			cgroup, err := os.ReadFile(filepath.Join("/proc", entry.Name(), "cgroup"))
			if err != nil || !strings.Contains(string(cgroup), id) {
				continue
			}
			if status, err := os.ReadFile(filepath.Join("/proc", entry.Name(), "status")); err != nil || strings.Contains(string(status), "State:\tZ") {
				continue
			}
			found = pid
			return nil
		}
		return errors.New("there is none")
	})
	return found
}

func TestManagedPluginDoesTheJob(t *testing.T) {
	ownEngine(t, engine.Options{}, func(t *testing.T, e *engine.Engine) {
		m := newManaged(t, e)
		m.importModel("tiny:1.0.0", tiny(40))
		v := m.volume("v", "model=tiny")
		a, b := m.start("--user", "1000", "-v", v+":/models"), m.start("--user", "2000", "-v", v+":/models")
		m.sh(a, "echo a > /models/mine")
		if got := m.sh(b, "ls /models; sha256sum < /models/model.safetensors"); got != "config.json\nmodel.safetensors\ntokenizer\n"+sha256hex(weights(40))+"  -" {
			t.Errorf("the other container sees %q", got)
		}
		if got := m.inspect(v, "{{.Status.version}}"); !strings.Contains(got, "1.0.0") {
			t.Errorf("docker volume inspect shows version %q", got)
		}
		if got := len(m.ps()); got != 2 {
			t.Errorf("larder ps on the host lists %d mounts, want 2", got)
		}
		if _, err := m.larderErr("rm", "tiny:1.0.0"); exitCode(err) != 4 {
			t.Errorf("larder rm on the host: %v, want exit code 4", err)
		}
		m.docker("rm", "-f", a, b)
		m.eventually("no writes are left", m.noUppers)
		m.docker("volume", "rm", v)
	})
}

// The plugin and the command line on the host have one state under two paths,
// and mounts that are made in the plugin's mount namespace alone: what one of
// them mounts, the other must not delete.
func TestManagedPluginAndHostHaveOneState(t *testing.T) {
	ownEngine(t, engine.Options{}, func(t *testing.T, e *engine.Engine) {
		m := newManaged(t, e)
		m.importModel("tiny:1.0.0", tiny(46))
		if plugin, host := link(t, fmt.Sprintf("/proc/%d/ns/pid", m.pid())), link(t, "/proc/self/ns/pid"); plugin != host {
			t.Errorf("the plugin has the PID namespace %s, the host %s: pidhost is not honoured", plugin, host)
		}
		var volumes []string
		for _, options := range [][]string{{"scope=volume"}, {"scope=run"}, {"access=ro"}} {
			v := m.volume(strings.ReplaceAll(options[0], "=", "-"), append(options, "model=tiny")...)
			c := m.start("-v", v+":/models")
			if options[0] != "access=ro" {
				m.sh(c, "echo mine > /models/mine")
			}
			mounts := m.ps()
			if len(mounts) != 1 {
				t.Fatalf("larder ps on the host lists %v, want one mount", mounts)
			}
			if users, _ := mounts[0]["users"].([]any); len(users) != 1 || !strings.Contains(fmt.Sprint(users), c[:12]) {
				t.Errorf("%s: larder ps says it is used by %v, want the container %s", v, users, c)
			}
			if out, err := m.larderErr("volume", "rm", v); exitCode(err) != 4 {
				t.Errorf("larder volume rm of what a container shows: %v, want exit code 4: %s", err, out)
			}
			if options[0] != "access=ro" {
				if got := m.sh(c, "cat /models/mine && echo more > /models/more && ls /models/tokenizer"); got != "mine\nvocab.txt" {
					t.Errorf("%s: after that the container sees %q", v, got)
				}
			}
			m.docker("rm", "-f", c)
			volumes = append(volumes, v)
		}
		// No container shows them, but the plugin has them mounted: containers
		// may be about to start. When they have had the time, the plugin itself
		// ends that.
		m.bySocket()
		for _, v := range volumes {
			_, err := m.call("VolumeDriver.Mount", map[string]string{"Name": v, "ID": strings.Repeat("ab", 32)})
			ok(t, err)
		}
		if got := m.ps(); len(got) != len(volumes) {
			t.Errorf("larder ps lists %v, want %d mounts", got, len(volumes))
		}
		remove := append([]string{"volume", "rm"}, volumes...)
		if out, err := m.larderErr(remove...); exitCode(err) != 4 {
			t.Errorf("larder volume rm of what the engine has just mounted: %v, want exit code 4: %s", err, out)
		}
		m.age()
		m.larder(remove...)
		m.eventually("the plugin takes its mounts away", func() error {
			if left := m.ps(); len(left) > 0 {
				return fmt.Errorf("larder ps lists %v", left)
			}
			return nil
		})
		m.eventually("no writes are left", m.noUppers)
	})
}

// bySocket lets call reach the plugin as it runs now.
func (m *managed) bySocket() {
	m.t.Helper()
	m.socket = filepath.Join(fmt.Sprintf("/proc/%d/root", m.pid()), "run/docker/plugins/larder.sock")
}

func link(t *testing.T, path string) string {
	t.Helper()
	to, err := os.Readlink(path)
	ok(t, err)
	return to
}

// What a container of another user downloads is moved into the store, which
// takes CAP_LEASE, and not copied.
func TestManagedPluginTakesDownloadsOver(t *testing.T) {
	ownEngine(t, engine.Options{}, func(t *testing.T, e *engine.Engine) {
		m := newManaged(t, e)
		v := m.volume("hub", "model=*", "absorb=on")
		commit := strings.Repeat("a", 40)
		script, content := downloadScript("org/new", commit, "weights", 1<<18)
		c := m.start("--user", "1000", "-v", v+":/hub")
		m.sh(c, script)
		written := m.sh(c, "stat -c %i /hub/models--org--new/blobs/"+sha256hex([]byte(content)))
		m.docker("rm", "-f", c)
		blob := filepath.Join(m.root, "store/blobs/sha256", sha256hex([]byte(content)))
		m.eventually("the download is in the store", func() error {
			_, err := m.larderErr("show", "hf://org/new@"+commit)
			return err
		})
		info, err := os.Stat(blob)
		ok(t, err)
		if stat := info.Sys().(*syscall.Stat_t); fmt.Sprint(stat.Ino) != written || stat.Uid != 0 || info.Mode().Perm() != 0o444 {
			t.Errorf("the blob is inode %d of user %d, mode %v; want the file that was downloaded, %s, as root's and 0444", stat.Ino, stat.Uid, info.Mode(), written)
		}
		m.eventually("nothing else is left", m.noUppers)
		if got := m.run("-v", v+":/hub", engine.Image, "sh", "-c", "sha256sum < /hub/models--org--new/snapshots/"+commit+"/model.safetensors"); !strings.HasPrefix(got, sha256hex([]byte(content))) {
			t.Errorf("the next container reads %q", got)
		}
	})
}

// The plugin's file system has its program and nothing else, and limits are
// kept all the same.
func TestManagedPluginKeepsLimits(t *testing.T) {
	ownEngine(t, engine.Options{}, func(t *testing.T, e *engine.Engine) {
		m := newManaged(t, e)
		m.importModel("tiny", tiny(47))
		for _, options := range [][]string{{"size=16MiB"}, {"size=16MiB", "upper=tmpfs"}, {"size=600MiB", "scope=volume"}} {
			name := strings.NewReplacer("=", "-", ",", "-").Replace(strings.Join(options, "-"))
			v := m.volume(name, append(options, "model=tiny")...)
			c := m.start("--user", "1000", "-v", v+":/models")
			m.sh(c, "dd if=/dev/zero of=/models/fits bs=1M count=4 2>/dev/null && sync")
			out := m.shFails(c, "dd if=/dev/zero of=/models/toobig bs=1M count=700 && sync")
			if !strings.Contains(out, "No space left") && !strings.Contains(out, "uota exceeded") {
				t.Errorf("%s: writing beyond the limit printed %q, want that space or quota ran out", v, out)
			}
			m.sh(c, "rm /models/toobig; echo again > /models/small")
			if options[len(options)-1] == "scope=volume" {
				m.docker("restart", c)
				if got := m.sh(c, "cat /models/small"); got != "again" {
					t.Errorf("after a restart the volume keeps %q", got)
				}
			}
			m.docker("rm", "-f", c)
			m.docker("volume", "rm", v)
		}
		m.eventually("no writes are left", m.noUppers)
		if loops := runProgram(t, os.Environ(), "losetup", "--list", "--noheadings", "--output", "BACK-FILE"); strings.Contains(loops, m.root) {
			t.Errorf("loop devices are left:\n%s", loops)
		}
		m.refused([]string{"16 MiB"}, "volume", "create", "-d", m.driver, "-o", "model=tiny", "-o", "size=2MiB", m.unique("small"))
		m.docker("plugin", "disable", m.name)
		m.docker("plugin", "set", m.name, "LARDER_VOLUMES_LIMIT=loop")
		m.docker("plugin", "enable", "--timeout", "120", m.name)
		m.refused([]string{"volumes.limit"}, "volume", "create", "-d", m.driver, "-o", "model=tiny", "-o", "size=2MiB", m.unique("small"))
	})
}

func TestManagedPluginKilled(t *testing.T) {
	ownEngine(t, engine.Options{}, func(t *testing.T, e *engine.Engine) {
		m := newManaged(t, e)
		m.importModel("tiny", tiny(41))
		v := m.volume("v", "model=tiny")
		c := m.start("-v", v+":/models")
		m.sh(c, "echo mine > /models/mine")
		old := m.pid()
		ok(t, syscall.Kill(old, syscall.SIGKILL))
		m.eventually("the engine starts it again", func() error {
			if pid := m.pid(); pid == old {
				return errors.New("it is the old one")
			}
			_, err := e.Docker(t.Context(), "run", "--rm", "--network", "none", "-v", v+":/models", engine.Image, "ls", "/models/config.json")
			return err
		})
		if got := m.sh(c, "cat /models/mine; ls /models/tokenizer"); got != "mine\nvocab.txt" {
			t.Errorf("the container sees %q", got)
		}
		if got := len(m.ps()); got != 1 {
			t.Errorf("larder ps lists %d mounts, want the one that lives", got)
		}
		m.docker("cp", c+":/models/mine", filepath.Join(t.TempDir(), "out"))
		m.docker("restart", c)
		m.sh(c, "ls /models/tokenizer/vocab.txt")
		m.docker("rm", "-f", c)
		m.eventually("no writes are left", m.noUppers)
		m.docker("volume", "rm", v)
	})
}

// disable -f takes the plugin's mounts from the host; the container keeps its
// own, and its next start mounts the same ID again.
func TestManagedPluginDisabled(t *testing.T) {
	ownEngine(t, engine.Options{}, func(t *testing.T, e *engine.Engine) {
		m := newManaged(t, e)
		m.importModel("tiny", tiny(42))
		run, kept := m.volume("run", "model=tiny"), m.volume("kept", "model=tiny", "scope=volume")
		c := m.start("-v", run+":/models", "-v", kept+":/kept")
		m.sh(c, "echo mine > /kept/mine; echo mine > /models/mine")
		m.docker("plugin", "disable", "-f", m.name)
		if got := m.sh(c, "cat /models/mine /kept/mine; sha256sum < /models/model.safetensors"); got != "mine\nmine\n"+sha256hex(weights(42))+"  -" {
			t.Errorf("without the plugin the container sees %q", got)
		}
		m.docker("plugin", "enable", "--timeout", "120", m.name)
		m.docker("restart", c)
		if got := m.sh(c, "cat /kept/mine; ls /models/tokenizer"); got != "mine\nvocab.txt" {
			t.Errorf("started again the container sees %q", got)
		}
		m.docker("stop", c)
		m.docker("plugin", "disable", "-f", m.name)
		m.docker("plugin", "enable", "--timeout", "120", m.name)
		m.docker("start", c)
		if got := m.sh(c, "cat /kept/mine; ls /models/tokenizer"); got != "mine\nvocab.txt" {
			t.Errorf("after stop, disable, enable and start the container sees %q", got)
		}
		m.docker("rm", "-f", c)
		m.docker("volume", "rm", run, kept)
		m.eventually("no writes are left", m.noUppers)
	})
}

// rm and upgrade replace the plugin's files; models, volumes and what they
// keep lie in the host's folder.
func TestManagedPluginRemovedAndMadeAnew(t *testing.T) {
	ownEngine(t, engine.Options{}, func(t *testing.T, e *engine.Engine) {
		m := newManaged(t, e)
		m.importModel("tiny", tiny(43))
		v := m.volume("kept", "model=tiny", "scope=volume")
		m.run("-v", v+":/models", engine.Image, "sh", "-c", "echo mine > /models/mine")
		m.docker("plugin", "disable", "-f", m.name)
		m.docker("plugin", "rm", "-f", m.name)
		m.larder("verify")
		m.docker("plugin", "create", m.name, pluginFolder(t))
		m.docker("plugin", "set", m.name, "root.source="+m.root)
		m.docker("plugin", "enable", "--timeout", "120", m.name)
		if got := m.run("-v", v+":/models", engine.Image, "cat", "/models/mine"); got != "mine" {
			t.Errorf("after rm and create the volume keeps %q", got)
		}
		m.docker("volume", "rm", v)
	})
}

func TestManagedPluginUpgraded(t *testing.T) {
	ownEngine(t, engine.Options{}, func(t *testing.T, e *engine.Engine) {
		l, err := e.Listen()
		ok(t, err)
		registry := &http.Server{Handler: newRegistry()}
		go registry.Serve(l)
		defer registry.Close()
		m := newManaged(t, e)
		remote := l.Addr().String() + "/larder:2"
		m.docker("plugin", "create", remote, pluginFolder(t))
		m.docker("plugin", "push", remote)
		m.docker("plugin", "rm", remote)

		m.importModel("tiny", tiny(44))
		v := m.volume("kept", "model=tiny", "scope=volume")
		c := m.start("-v", v+":/models")
		m.sh(c, "echo mine > /models/mine")
		m.docker("stop", c)
		m.docker("plugin", "disable", "-f", m.name)
		m.docker("plugin", "upgrade", "--grant-all-permissions", "--skip-remote-check", m.name, remote)
		m.docker("plugin", "set", m.name, "root.source="+m.root)
		m.docker("plugin", "enable", "--timeout", "120", m.name)
		m.docker("start", c)
		if got := m.sh(c, "cat /models/mine; ls /models/tokenizer"); got != "mine\nvocab.txt" {
			t.Errorf("after the upgrade the container sees %q", got)
		}
		if got := m.inspect(v, "{{.Options.model}}"); got != "tiny" {
			t.Errorf("after the upgrade the volume's options are %q", got)
		}
		m.docker("rm", "-f", c)
		m.docker("volume", "rm", v)
	})
}

// A managed plugin that is slow to listen is disabled after four tries, the
// first after half a second. So the plugin listens at once, and does what takes
// long behind it, whatever there is to tidy up.
func TestManagedPluginListensAtOnce(t *testing.T) {
	ownEngine(t, engine.Options{}, func(t *testing.T, e *engine.Engine) {
		m := newManaged(t, e)
		m.importModel("tiny", tiny(45))
		const volumes, mounts = 400, 200
		m.bySocket()
		name := func(i int) string { return m.unique(fmt.Sprintf("v%03d", i)) }
		for i := range volumes {
			if _, err := m.call("VolumeDriver.Create", map[string]any{"Name": name(i), "Opts": map[string]string{"model": "tiny"}}); err != nil {
				t.Fatal(err)
			}
			if i >= mounts {
				continue
			}
			if _, err := m.call("VolumeDriver.Mount", map[string]string{"Name": name(i), "ID": fmt.Sprintf("%064x", i)}); err != nil {
				t.Fatal(err)
			}
		}
		// Killed, it has all its mounts still; disabled, none of them and all
		// the records.
		began := len(e.LogTail(1 << 20))
		old := m.pid()
		ok(t, syscall.Kill(old, syscall.SIGKILL))
		m.eventually("the engine has started it again, and it answers", func() error {
			if m.pid() == old {
				return errors.New("it is the old one")
			}
			m.bySocket()
			_, err := m.call("VolumeDriver.Get", map[string]string{"Name": name(0)})
			return err
		})
		// Another attempt of the engine would take three seconds each time.
		quick(t, 3*time.Second, fmt.Sprintf("docker plugin enable, with %d volumes and %d mounts", volumes, mounts), func() time.Duration {
			m.docker("plugin", "disable", "-f", m.name)
			begin := time.Now()
			m.docker("plugin", "enable", m.name)
			return time.Since(begin)
		})
		if got := m.docker("plugin", "inspect", "--format", "{{.Enabled}}", m.name); got != "true" {
			t.Errorf("the plugin is enabled: %s", got)
		}
		if log := grep(e.LogTail(1 << 20)[began:], "retrying"); log != "" {
			t.Errorf("the engine found nobody listening:\n%s", log)
		}
		if got := strings.Count(m.docker("volume", "ls", "-q", "--filter", "driver="+m.name), "\n") + 1; got != volumes {
			t.Errorf("docker volume ls has %d volumes, want %d", got, volumes)
		}
		m.bySocket()
		for i := range volumes {
			if i < mounts {
				if _, err := m.call("VolumeDriver.Unmount", map[string]string{"Name": name(i), "ID": fmt.Sprintf("%064x", i)}); err != nil {
					t.Fatal(err)
				}
			}
			if _, err := m.call("VolumeDriver.Remove", map[string]string{"Name": name(i)}); err != nil {
				t.Fatal(err)
			}
		}
		m.eventually("no writes are left", m.noUppers)
	})
}
