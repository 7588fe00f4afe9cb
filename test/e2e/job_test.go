package e2e

import (
	"bytes"
	"crypto/sha1"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/larder-project/larder/internal/testenv"
	"github.com/larder-project/larder/test/engine"
)

// Two containers of different users share one model: both read it, both write
// into it, neither sees what the other wrote, and the disk has it once.
func TestContainersShareAModelAndKeepTheirWritesApart(t *testing.T) {
	eachEngine(t, func(t *testing.T, e *engine.Engine) {
		n := newNode(t, e)
		m := tiny(1)
		n.importModel("tiny:1.0.0", m)
		n.startPlugin()
		v := n.volume("v", "model=tiny")
		before := used(t, n.root)

		a := n.start("--user", "1000:1000", "-v", v+":/models")
		b := n.start("--user", "2000:3000", "-v", v+":/models")
		for _, c := range []string{a, b} {
			for file, want := range m {
				got := n.docker("exec", c, "sh", "-c", "sha256sum < /models/"+file)
				if hash := sha256hex(want); !strings.HasPrefix(got, hash) {
					t.Errorf("container reads %s as %s, want %s", file, got, hash)
				}
			}
			if got := n.sh(c, "find /models -type f | wc -l"); got != "3" {
				t.Errorf("the container sees %s files, want 3", got)
			}
		}
		n.sh(a, "echo by-a > /models/new; echo by-a > /models/config.json; rm /models/tokenizer/vocab.txt; mkdir /models/tokenizer/sub; chmod 600 /models/model.safetensors; mv /models/model.safetensors /models/moved")
		if got := n.sh(a, "cat /models/new /models/config.json; ls /models /models/tokenizer"); got != "by-a\nby-a\n/models:\nconfig.json\nmoved\nnew\ntokenizer\n\n/models/tokenizer:\nsub" {
			t.Errorf("the container does not see its own writes: %q", got)
		}
		if got := n.sh(b, "cat /models/config.json; ls /models /models/tokenizer"); got != string(m["config.json"])+"/models:\nconfig.json\nmodel.safetensors\ntokenizer\n\n/models/tokenizer:\nvocab.txt" {
			t.Errorf("the other container sees them too: %q", got)
		}
		n.sh(b, "echo more >> /models/config.json; truncate -s 10 /models/tokenizer/vocab.txt")

		// A rename of the weights may copy metadata, never the weights.
		if grown := used(t, n.root) - before; grown > 512<<10 {
			t.Errorf("two containers took %d bytes, the model has %d: it is there twice", grown, m.size())
		}
		var large int
		blobs := filepath.Join(n.root, "store", "blobs", "sha256")
		entries, err := os.ReadDir(blobs)
		if err != nil {
			t.Fatal(err)
		}
		for _, entry := range entries {
			if info, err := entry.Info(); err == nil && info.Size() == 1<<20 {
				large++
			}
		}
		if large != 1 {
			t.Errorf("the store has the weights %d times, want once", large)
		}
		n.larder("verify") // and no container changed a blob

		n.docker("stop", a, b)
		n.eventually("nothing is mounted when no container runs", n.nothingMounted)
		if got := n.run("-v", v+":/models", engine.Image, "sh", "-c", "ls /models; cat /models/config.json"); got != "config.json\nmodel.safetensors\ntokenizer\n"+string(m["config.json"]) {
			t.Errorf("the next run finds the writes of the runs before: %q", got)
		}
	})
}

// Nothing of a model can be reached that could change it for others: not as
// root in the container, not through device nodes, not by set-user-id.
func TestAContainerCannotChangeTheStore(t *testing.T) {
	eachEngine(t, func(t *testing.T, e *engine.Engine) {
		n := newNode(t, e)
		n.importModel("tiny", tiny(2))
		n.startPlugin()
		v := n.volume("v", "model=tiny")
		c := n.start("-v", v+":/models")
		options := n.sh(c, "grep ' /models ' /proc/mounts")
		for _, option := range []string{"nosuid", "nodev"} {
			if !strings.Contains(options, option) {
				t.Errorf("/models is mounted %q, want %s", options, option)
			}
		}
		n.sh(c, "dd if=/dev/zero of=/models/model.safetensors bs=4096 count=4 conv=notrunc 2>/dev/null; chown 7:7 /models/model.safetensors; chmod 4755 /models/config.json")
		n.larder("verify")
		if got := n.run("-v", v+":/models", engine.Image, "stat", "-c", "%u %a", "/models/config.json"); got != "0 666" {
			t.Errorf("another container sees owner and mode %q, want %q", got, "0 666")
		}
	})
}

func TestInspectShowsWhatIsMounted(t *testing.T) {
	eachEngine(t, func(t *testing.T, e *engine.Engine) {
		n := newNode(t, e)
		m := tiny(3)
		n.importModel("tiny:1.2.3", m)
		n.startPlugin()
		v := n.volume("v", "model=tiny")
		n.start("-v", v+":/models")
		n.start("-v", v+":/models:ro")
		var status map[string]any
		if err := json.Unmarshal([]byte(n.inspect(v, "{{json .Status}}")), &status); err != nil {
			t.Fatal(err)
		}
		text := fmt.Sprint(status["model"], " ", status["version"])
		if !strings.Contains(text, "tiny") || !strings.Contains(text, "1.2.3") {
			t.Errorf("model and version are %q", text)
		}
		if d := fmt.Sprint(status["digest"]); !strings.HasPrefix(d, "sha256:") || !strings.Contains(n.larder("ls", "--json"), d) {
			t.Errorf("digest is %q, which larder ls does not know", d)
		}
		if got := fmt.Sprint(status["bytes"]); got != fmt.Sprint(float64(m.size())) {
			t.Errorf("bytes is %s, want %d", got, m.size())
		}
		if got := countMounts(status["mounts"]); got != 2 {
			t.Errorf("mounts is %v, want 2 of them", status["mounts"])
		}
		if got := n.inspect(v, "{{.Driver}} {{.Scope}} {{.Options.model}}"); got != n.driver+" local tiny" {
			t.Errorf("driver, scope and options are %q", got)
		}
		if got := n.inspect(v, "{{.CreatedAt}}"); got == "" {
			t.Error("CreatedAt is empty")
		}
	})
}

// countMounts reads a Status "mounts": a number, or a list.
func countMounts(v any) int {
	switch v := v.(type) {
	case float64:
		return int(v)
	case []any:
		return len(v)
	}
	return -1
}

// An anonymous volume takes its options from the command line, belongs to one
// container, keeps its writes while that lives, and goes with it.
func TestAnonymousVolume(t *testing.T) {
	eachEngine(t, func(t *testing.T, e *engine.Engine) {
		n := newNode(t, e)
		n.importModel("tiny", tiny(4))
		n.startPlugin()
		c := n.start("--mount", "type=volume,volume-driver="+n.driver+",volume-opt=model=tiny,dst=/models")
		n.sh(c, "echo mine > /models/mine")
		n.docker("restart", c)
		if got := n.sh(c, "cat /models/mine; ls /models/tokenizer"); got != "mine\nvocab.txt" {
			t.Errorf("after a restart the container finds %q", got)
		}
		n.docker("rm", "-f", "-v", c)
		if got := n.docker("volume", "ls", "-q", "--filter", "driver="+n.driver); got != "" {
			t.Errorf("rm -v left the volumes %q", got)
		}
		n.eventually("its mount is gone", n.nothingMounted)
		n.eventually("its writes are gone", n.noUppers)
	})
}

// docker run --volume-driver NAME -v MODEL:/models: the volume's name is the
// model's.
func TestDriverWithANameAlone(t *testing.T) {
	eachEngine(t, func(t *testing.T, e *engine.Engine) {
		n := newNode(t, e)
		name := n.unique("qwen")
		n.importModel(name+":1.0.0", tiny(5))
		n.importModel(name+":1.1.0", tiny(6))
		n.startPlugin()
		if got := n.run("--volume-driver", n.driver, "-v", name+":/models", engine.Image, "cat", "/models/config.json"); got != string(tiny(6)["config.json"]) {
			t.Errorf("the container reads %q, want the newest version", got)
		}
		n.refused([]string{"nothing-of-that-name"}, "run", "--rm", "--network", "none", "--volume-driver", n.driver, "-v", n.unique("nothing-of-that-name")+":/models", engine.Image, "true")
	})
}

// Its own engine: Compose asks for a volume without its driver, and an engine
// then asks every driver it has ever met, seconds for each that is gone.
func TestCompose(t *testing.T) {
	ownEngine(t, engine.Options{}, func(t *testing.T, e *engine.Engine) {
		testenv.NeedPrograms(t, "docker-compose")
		n := newNode(t, e)
		n.importModel("tiny:1.0.0", tiny(7))
		n.startPlugin()
		file := filepath.Join(t.TempDir(), "docker-compose.yml")
		write(t, file, fmt.Sprintf(`version: "2.4"
services:
  one:
    image: %[1]s
    user: "1000:1000"
    network_mode: none
    labels: {node: %[2]s}
    command: [sh, -c, "trap exit TERM; echo one > /models/mine; sleep 100000 & wait"]
    volumes: ["models:/models"]
  two:
    image: %[1]s
    user: "2000:2000"
    network_mode: none
    labels: {node: %[2]s}
    command: [sh, -c, "trap exit TERM; echo two > /models/mine; sleep 100000 & wait"]
    volumes: ["models:/models"]
volumes:
  models:
    driver: %[2]s
    driver_opts: {model: "tiny:~1.0", size: 64MiB}
`, engine.Image, n.driver))
		project := "p" + strings.TrimPrefix(n.driver, "larder-")
		compose := func(args ...string) string {
			t.Helper()
			return runProgram(t, append(e.ClientEnv(), "COMPOSE_HTTP_TIMEOUT=180"), "docker-compose", append([]string{"-f", file, "-p", project}, args...)...)
		}
		compose("up", "-d")
		for _, service := range []string{"one", "two"} {
			c := strings.TrimSpace(compose("ps", "-q", service))
			n.eventually("service "+service+" sees its own write", func() error {
				if got, err := e.Docker(t.Context(), "exec", c, "cat", "/models/mine"); err != nil || got != service+"\n" {
					return fmt.Errorf("it reads %q (%v)", got, err)
				}
				return nil
			})
		}
		compose("down", "-v")
		n.eventually("nothing is mounted after down -v", n.nothingMounted)
		if got := n.docker("volume", "ls", "-q", "--filter", "driver="+n.driver); got != "" {
			t.Errorf("down -v left the volumes %q", got)
		}
	})
}

// What a container writes beyond its size fails there, with the error that a
// full disk gives, and takes nothing from others.
func TestSizeLimit(t *testing.T) {
	eachEngine(t, func(t *testing.T, e *engine.Engine) {
		n := newNode(t, e)
		n.importModel("tiny", tiny(8))
		n.startPlugin()
		for _, options := range [][]string{{"size=16MiB"}, {"size=16MiB", "upper=tmpfs"}, {"size=16MiB", "scope=volume"}} {
			t.Run(strings.Join(options, ","), func(t *testing.T) {
				n := n.in(t)
				v := n.volume("v-"+strings.NewReplacer("=", "-", ",", "-").Replace(strings.Join(options, "-")), append([]string{"model=tiny"}, options...)...)
				c := n.start("--user", "1000", "-v", v+":/models")
				n.sh(c, "dd if=/dev/zero of=/models/fits bs=1M count=4 2>/dev/null && sync")
				out := n.shFails(c, "dd if=/dev/zero of=/models/toobig bs=1M count=24 && sync")
				if !strings.Contains(out, "No space left") && !strings.Contains(out, "quota exceeded") && !strings.Contains(out, "Quota exceeded") {
					t.Errorf("writing beyond the limit printed %q, want that space or quota ran out", out)
				}
				if mib, err := strconv.Atoi(n.sh(c, "du -sm /models/toobig | cut -f1")); err != nil || mib > 12 {
					t.Errorf("%d MiB (%v) were written beyond the 4 that were there, of 16", mib, err)
				}
				n.sh(c, "rm /models/toobig; echo again > /models/small; sha256sum /models/model.safetensors")
				n.docker("rm", "-f", c)
			})
		}
	})
}

func TestReadOnly(t *testing.T) {
	eachEngine(t, func(t *testing.T, e *engine.Engine) {
		n := newNode(t, e)
		n.importModel("tiny", tiny(9))
		n.startPlugin()
		v := n.volume("v", "model=tiny", "access=ro")
		c := n.start("--user", "1000", "-v", v+":/models")
		if out := n.shFails(c, "echo x > /models/new"); !strings.Contains(out, "Read-only file system") {
			t.Errorf("writing says %q", out)
		}
		if got := n.sh(c, "stat -c %a /models /models/tokenizer /models/config.json; cat /models/tokenizer/vocab.txt"); got != "555\n555\n444\na\nb\nc" {
			t.Errorf("modes and content are %q", got)
		}
		written, err := filepath.Glob(filepath.Join(n.root, "node/uppers/run/*/*/upper/*"))
		if err != nil || len(written) > 0 {
			t.Errorf("written all the same: %v, %v", written, err)
		}
		n.docker("rm", "-f", c)
		n.eventually("nothing is left of the run", n.noUppers)
	})
}

func TestOwnerAndModeBelongToTheView(t *testing.T) {
	eachEngine(t, func(t *testing.T, e *engine.Engine) {
		n := newNode(t, e)
		n.importModel("tiny", tiny(10))
		n.startPlugin()
		a := n.volume("a", "model=tiny", "uid=1000", "gid=1001", "mode=0600")
		b := n.volume("b", "model=tiny", "uid=2000")
		if got := n.run("--user", "1000:1001", "-v", a+":/models", engine.Image, "sh", "-c", "stat -c '%u %g' /models /models/config.json; echo x > /models/new && cat /models/tokenizer/vocab.txt"); got != "1000 1001\n1000 1001\na\nb\nc" {
			t.Errorf("the owner sees %q", got)
		}
		if out, err := e.Docker(t.Context(), "run", "--rm", "--network", "none", "--user", "3000:3000", "-v", a+":/models", engine.Image, "cat", "/models/config.json"); err == nil {
			t.Errorf("mode 0600 lets another user read %q", out)
		}
		if got := n.run("-v", b+":/models", engine.Image, "stat", "-c", "%u", "/models/config.json"); got != "2000" {
			t.Errorf("the view of another volume has the owner %q, want 2000", got)
		}
	})
}

// scope=run: each run has its own writes and they end with it. scope=volume:
// containers share them and they stay with the volume.
func TestScope(t *testing.T) {
	eachEngine(t, func(t *testing.T, e *engine.Engine) {
		n := newNode(t, e)
		n.importModel("tiny", tiny(11))
		n.startPlugin()
		run, volume := n.volume("run", "model=tiny", "scope=run"), n.volume("volume", "model=tiny", "scope=volume")
		a := n.start("-v", run+":/run-scope", "-v", volume+":/volume-scope")
		b := n.start("-v", run+":/run-scope", "-v", volume+":/volume-scope")
		n.sh(a, "echo a > /run-scope/a; echo a > /volume-scope/a")
		if got := n.sh(b, "ls /run-scope/a 2>&1 || true; cat /volume-scope/a"); !strings.Contains(got, "No such file") || !strings.HasSuffix(got, "\na") {
			t.Errorf("the other container sees %q", got)
		}
		n.docker("restart", a)
		if got := n.sh(a, "ls /run-scope/a 2>&1 || true; cat /volume-scope/a"); !strings.Contains(got, "No such file") || !strings.HasSuffix(got, "\na") {
			t.Errorf("after its restart the container sees %q", got)
		}
		n.docker("rm", "-f", a, b)
		n.eventually("nothing is mounted", n.nothingMounted)
		if got := n.run("-v", volume+":/models", engine.Image, "cat", "/models/a"); got != "a" {
			t.Errorf("the volume kept %q", got)
		}
		n.docker("volume", "rm", run, volume)
		n.eventually("no writes are left without the volumes", n.noUppers)
	})
}

// Each run of a volume with a constraint gets the newest version that is
// there; a volume that keeps its writes stays on the one it began with.
func TestConstraint(t *testing.T) {
	eachEngine(t, func(t *testing.T, e *engine.Engine) {
		n := newNode(t, e)
		n.importModel("bert:1.9.1", tiny(1))
		n.importModel("bert:1.9.2", tiny(2))
		n.importModel("bert:2.0.0", tiny(3))
		n.startPlugin()
		seen := func(v string) string {
			t.Helper()
			return n.run("-v", v+":/models", engine.Image, "cat", "/models/config.json")
		}
		config := func(seed byte) string { return string(tiny(seed)["config.json"]) }
		run, kept := n.volume("run", "model=bert:~1.9"), n.volume("kept", "model=bert:~1.9", "scope=volume")
		if a, b := seen(run), seen(kept); a != config(2) || b != config(2) {
			t.Errorf("bert:~1.9 is %q and %q, want 1.9.2", a, b)
		}
		n.importModel("bert:1.9.3", tiny(4))
		if got := seen(run); got != config(4) {
			t.Errorf("after 1.9.3 came in, a run sees %q, want 1.9.3", got)
		}
		if got := seen(kept); got != config(2) {
			t.Errorf("a volume that keeps its writes sees %q, want to stay on 1.9.2", got)
		}
	})
}

// layout=hf is a cache folder of the Hugging Face hub.
func TestHubCacheLayout(t *testing.T) {
	eachEngine(t, func(t *testing.T, e *engine.Engine) {
		n := newNode(t, e)
		m := tiny(12)
		cache := t.TempDir()
		commit := "0123456789abcdef0123456789abcdef01234567"
		repo := filepath.Join(cache, "models--org--Tiny")
		for file, data := range m {
			// The hub's names: of large files the SHA-256, of small ones git's.
			etag := sha256hex(data)
			if len(data) < 1<<20 {
				etag = fmt.Sprintf("%x", sha1.Sum(fmt.Appendf(nil, "blob %d\x00%s", len(data), data)))
			}
			write(t, filepath.Join(repo, "blobs", etag), string(data))
			link := filepath.Join(repo, "snapshots", commit, file)
			if err := os.MkdirAll(filepath.Dir(link), 0o755); err != nil {
				t.Fatal(err)
			}
			up := strings.Repeat("../", 2+strings.Count(file, "/"))
			if err := os.Symlink(up+"blobs/"+etag, link); err != nil {
				t.Fatal(err)
			}
		}
		write(t, filepath.Join(repo, "refs", "main"), commit)
		n.larder("import", cache)
		n.startPlugin()
		v := n.volume("v", "model=hf://org/Tiny", "layout=hf")
		c := n.start("--user", "1000", "-v", v+":/cache")
		if got := n.sh(c, "cat /cache/models--org--Tiny/refs/main"); strings.TrimSpace(got) != commit {
			t.Errorf("refs/main is %q, want %s", got, commit)
		}
		if got := n.sh(c, "cd /cache/models--org--Tiny/snapshots/"+commit+" && cat tokenizer/vocab.txt && sha256sum < model.safetensors"); got != "a\nb\nc\n"+sha256hex(m["model.safetensors"])+"  -" {
			t.Errorf("the snapshot reads %q", got)
		}
		n.sh(c, "mkdir -p /cache/models--org--Other/refs && echo x > /cache/models--org--Other/refs/main")
	})
}

// A volume that can not work is refused when it is made, with what is allowed
// or near.
func TestRefusedVolumes(t *testing.T) {
	eachEngine(t, func(t *testing.T, e *engine.Engine) {
		n := newNode(t, e)
		n.importModel("qwen:1.9.3", tiny(13))
		n.startPlugin()
		for name, c := range map[string]struct {
			options, words []string
		}{
			"unknown option":      {[]string{"modell=qwen"}, []string{"modell", "model"}},
			"unknown layout":      {[]string{"model=qwen", "layout=tree"}, []string{"layout", "tree", "files", "hf"}},
			"unknown access":      {[]string{"model=qwen", "access=rw"}, []string{"access", "rw", "overlay", "ro"}},
			"unknown scope":       {[]string{"model=qwen", "scope=node"}, []string{"scope", "node", "run", "volume"}},
			"unknown upper":       {[]string{"model=qwen", "upper=memory"}, []string{"upper", "memory", "disk", "tmpfs"}},
			"unknown pull":        {[]string{"model=qwen", "pull=yes"}, []string{"pull", "yes", "never", "missing", "always"}},
			"size of no unit":     {[]string{"model=qwen", "size=plenty"}, []string{"size", "plenty"}},
			"negative size":       {[]string{"model=qwen", "size=-1GiB"}, []string{"size"}},
			"user by name":        {[]string{"model=qwen", "uid=alice"}, []string{"uid", "alice"}},
			"user too large":      {[]string{"model=qwen", "uid=4294967296"}, []string{"uid"}},
			"mode not octal":      {[]string{"model=qwen", "mode=0999"}, []string{"mode", "0999"}},
			"set-user-id mode":    {[]string{"model=qwen", "mode=4755"}, []string{"mode"}},
			"size with ro":        {[]string{"model=qwen", "access=ro", "size=1GiB"}, []string{"size", "ro"}},
			"unknown model":       {[]string{"model=qwem"}, []string{"qwem", "qwen"}},
			"unknown version":     {[]string{"model=qwen:1.9.4"}, []string{"1.9.4", "1.9.3"}},
			"unknown range":       {[]string{"model=qwen:~2.0"}, []string{"~2.0", "1.9.3"}},
			"model not pulled":    {[]string{"model=hf://Qwen/Qwen2.5-0.5B"}, []string{"larder pull hf://Qwen/Qwen2.5-0.5B"}},
			"climbing model":      {[]string{"model=../../etc"}, []string{"model", "../../etc"}},
			"empty model":         {[]string{"model="}, []string{"model"}},
			"a model of no name":  {nil, []string{"model"}},
			"scheme of no source": {[]string{"model=ftp://host/model"}, []string{"hf://"}},
		} {
			t.Run(name, func(t *testing.T) {
				n := n.in(t)
				args := []string{"volume", "create", "-d", n.driver}
				for _, o := range c.options {
					args = append(args, "-o", o)
				}
				n.refused(c.words, append(args, n.unique("refused"))...)
			})
		}
		if got := n.docker("volume", "ls", "-q", "--filter", "driver="+n.driver); got != "" {
			t.Errorf("refused volumes are there: %q", got)
		}
	})
}

// The command line and the engine see the same volumes; a version that a
// volume's containers use is not removed.
func TestRemovalIsRefusedWhileInUse(t *testing.T) {
	eachEngine(t, func(t *testing.T, e *engine.Engine) {
		n := newNode(t, e)
		n.importModel("tiny:1.0.0", tiny(14))
		n.startPlugin()
		v := n.volume("v", "model=tiny:1.0.0")
		c := n.start("-v", v+":/models")
		if mounts := n.ps(); len(mounts) != 1 || !strings.Contains(fmt.Sprint(mounts[0]), v) {
			t.Errorf("larder ps shows %v, want one mount of %s", mounts, v)
		}
		if nodes := n.larder("node", "ls", "--json"); !strings.Contains(nodes, `"alive":true`) {
			t.Errorf("the node is not seen alive: %s", nodes)
		}
		out, err := n.larderErr("rm", "tiny:1.0.0")
		if code := exitCode(err); code != 4 {
			t.Errorf("larder rm of a version in use exits %d, want 4: %s", code, out)
		} else if !strings.Contains(err.Error(), v) {
			t.Errorf("the refusal does not say by whom: %v", err)
		}
		if _, err := n.larderErr("volume", "rm", v); exitCode(err) != 4 {
			t.Errorf("larder volume rm of a mounted volume: %v, want exit code 4", err)
		}
		if _, err := n.call("VolumeDriver.Remove", map[string]string{"Name": v}); err == nil {
			t.Error("the driver removed a mounted volume")
		}
		n.sh(c, "sha256sum /models/model.safetensors")
		n.docker("rm", "-f", c)
		n.eventually("the mount is gone", n.nothingMounted)
		n.docker("volume", "rm", v)
		// Engines take their time to forget a container.
		n.eventually("the version can go", func() error {
			_, err := n.larderErr("rm", "tiny:1.0.0")
			return err
		})
	})
}

// Copying what the image has at that path into the volume, as the engine does
// for a new one, must neither fail nor leave a mount.
func TestImageWithFilesAtTheMountPoint(t *testing.T) {
	eachEngine(t, func(t *testing.T, e *engine.Engine) {
		n := newNode(t, e)
		n.importModel("tiny", tiny(15))
		n.startPlugin()
		v := n.volume("v", "model=tiny")
		if got := n.run("-v", v+":/stale", engine.Image, "ls", "/stale"); !strings.Contains(got, "config.json") {
			t.Errorf("the container sees %q", got)
		}
		n.eventually("nothing is mounted", n.nothingMounted)
	})
}

// Many containers on one model, each with writes of its own.
func TestFiftyContainers(t *testing.T) {
	eachEngine(t, func(t *testing.T, e *engine.Engine) {
		n := newNode(t, e)
		m := tiny(16)
		m["model.safetensors"] = bytes.Repeat(weights(16), 16)
		n.importModel("tiny", m)
		n.startPlugin()
		v := n.volume("v", "model=tiny")
		before := used(t, n.root)
		const count = 50
		ids := make([]string, 0, count)
		for i := range count {
			ids = append(ids, n.docker("run", "-d", "--network", "none", "--label", n.label, "--user", fmt.Sprint(1000+i), "-v", v+":/models",
				engine.Image, "sh", "-c", fmt.Sprintf("trap exit TERM; sha256sum /models/model.safetensors; dd if=/dev/zero of=/models/own bs=64k count=1 2>/dev/null; echo %d > /models/number; sleep 100000 & wait", i)))
		}
		for i, id := range ids {
			n.eventually("container writes", func() error {
				if got, err := e.Docker(t.Context(), "exec", id, "cat", "/models/number"); err != nil || strings.TrimSpace(got) != fmt.Sprint(i) {
					return fmt.Errorf("container %d reads %q (%v)", i, got, err)
				}
				return nil
			})
			if got := n.docker("logs", id); !strings.HasPrefix(got, sha256hex(m["model.safetensors"])) {
				t.Errorf("container %d read %q", i, got)
			}
		}
		if got := len(n.views()); got != count {
			t.Errorf("%d views are mounted, want %d", got, count)
		}
		if got := len(n.ps()); got != count {
			t.Errorf("larder ps lists %d mounts, want %d", got, count)
		}
		if grown, limit := used(t, n.root)-before, int64(count*(64<<10+64<<10)); grown > limit {
			t.Errorf("%d containers took %d bytes, want at most %d: the model has %d", count, grown, limit, m.size())
		}
		n.docker(append([]string{"rm", "-f"}, ids...)...)
		n.eventually("nothing is mounted", n.nothingMounted)
		n.eventually("their writes are gone", n.noUppers)
	})
}
