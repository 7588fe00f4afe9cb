package e2e

import (
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/larder-project/larder/internal/source/huggingface/hubtest"
	"github.com/larder-project/larder/test/engine"
)

// onHub points the node at a hub of the test's own, to which this token is
// known.
func (n *node) onHub(token string) *hubtest.Server {
	n.t.Helper()
	hub := hubtest.Start(n.t, hubtest.Options{})
	hub.AddToken(token, "org/private")
	n.env = append(n.env, "HF_ENDPOINT="+hub.URL, "HF_TOKEN="+token, "NO_PROXY=*")
	return hub
}

func commit(t *testing.T, hub *hubtest.Server, repo string, m model) string {
	t.Helper()
	id, err := hub.Repo(repo).CommitMap("main", m)
	ok(t, err)
	return id
}

// pull=missing and pull=always fetch when the volume is made, with the endpoint
// and the token of the plugin's environment; a mount fetches nothing.
func TestPullWhenAVolumeIsMade(t *testing.T) {
	eachEngine(t, func(t *testing.T, e *engine.Engine) {
		n := newNode(t, e)
		hub := n.onHub("hf_of_the_test")
		hub.Repo("org/private").Private()
		commit(t, hub, "org/private", tiny(60))
		n.startPlugin()
		config := func(v string) string {
			t.Helper()
			return n.run("-v", v+":/models", engine.Image, "cat", "/models/config.json")
		}
		is := func(v string, seed byte) {
			t.Helper()
			if got, want := config(v), string(tiny(seed)["config.json"]); got != want {
				t.Errorf("a container on %s reads %q, want %q", v, got, want)
			}
		}

		first := n.volume("missing", "model=hf://org/private", "pull=missing")
		is(first, 60)
		asked := len(hub.Requests())
		n.volume("missing-again", "model=hf://org/private", "pull=missing")
		if got := len(hub.Requests()); got != asked {
			t.Errorf("for a model that is there the hub got %d requests", got-asked)
		}

		// The branch moves on: missing stays with what is there, always fetches.
		commit(t, hub, "org/private", tiny(61))
		n.volume("missing-once-more", "model=hf://org/private", "pull=missing")
		is(first, 60)
		always := n.volume("always", "model=hf://org/private", "pull=always")
		is(always, 61)
		is(first, 61) // main is one name for all
		commit(t, hub, "org/private", tiny(62))
		is(always, 61) // and no mount asks the hub

		n.refused([]string{"hf://org/nothing", "not found"}, "volume", "create", "-d", n.driver, "-o", "model=hf://org/nothing", "-o", "pull=missing", n.unique("nothing"))
		n.refused([]string{"larder pull hf://org/other"}, "volume", "create", "-d", n.driver, "-o", "model=hf://org/other", n.unique("never"))
		if got := n.docker("volume", "ls", "-q", "--filter", "driver="+n.driver); strings.Contains(got, "nothing") || strings.Contains(got, "never") {
			t.Errorf("refused volumes are there: %q", got)
		}
	})
}

// A fetch that outlasts an engine's patience goes on: the error says how far it
// is, a second volume waits for the same fetch, and later both can be made.
func TestPullThatOutlastsTheEngine(t *testing.T) {
	eachEngine(t, func(t *testing.T, e *engine.Engine) {
		n := newNode(t, e)
		hub := n.onHub("hf_of_the_test")
		m := tiny(63)
		commit(t, hub, "org/slow", m)
		hub.Inject(hubtest.Fault{Path: "model.safetensors", StallAfter: hubtest.At(64 << 10)}) // of each answer
		n.startPlugin()
		create := func(name string) error {
			_, err := e.Docker(t.Context(), "volume", "create", "-d", n.driver, "-o", "model=hf://org/slow", "-o", "pull=missing", n.unique(name))
			return err
		}
		begin := time.Now()
		failed := make(chan error, 2)
		for i := range 2 {
			go func() { failed <- create(fmt.Sprint("slow-", i)) }()
		}
		for range 2 {
			err := <-failed
			if err == nil {
				t.Fatal("a volume was made of a model that is not there")
			}
			for _, word := range []string{"hf://org/slow", "still being fetched", " %", "in the background"} {
				if !strings.Contains(err.Error(), word) {
					t.Errorf("the refusal does not say %q: %v", word, err)
				}
			}
		}
		if took := time.Since(begin); took > 119*time.Second {
			t.Errorf("it was told after %s, the engine gives 2 min", took)
		}
		if got := hub.Asked(hubtest.KindRevision, ""); got != 1 {
			t.Errorf("the hub was asked %d times for the revision, want once for both volumes", got)
		}
		if got := n.docker("volume", "ls", "-q", "--filter", "driver="+n.driver); got != "" {
			t.Errorf("refused volumes are there: %q", got)
		}
		hub.ClearFaults()
		n.eventually("the fetch has come to its end behind the engine's back", func() error {
			if out, err := n.larderErr("show", "hf://org/slow"); err != nil {
				return fmt.Errorf("%s: %w", out, err)
			}
			return nil
		})
		ok(t, create("slow-0"))
		if got := n.run("-v", n.unique("slow-0")+":/models", engine.Image, "sha256sum", "/models/model.safetensors"); !strings.HasPrefix(got, sha256hex(m["model.safetensors"])) {
			t.Errorf("the container reads %q", got)
		}
	})
}

// One volume with several models, and one with all of them as a hub cache.
func TestSeveralModelsInOneVolume(t *testing.T) {
	eachEngine(t, func(t *testing.T, e *engine.Engine) {
		n := newNode(t, e)
		hub := n.onHub("hf_of_the_test")
		id := commit(t, hub, "org/hub", tiny(64))
		n.larder("pull", "hf://org/hub")
		n.importModel("one:1.0.0", tiny(65))
		n.importModel("two:2.0.0", tiny(66))
		n.startPlugin()
		v := n.volume("several", "model=one,two:2.0.0 hf://org/hub")
		if got := n.run("-v", v+":/models", engine.Image, "sh", "-c", "cd /models; ls; cat one/config.json two/config.json org/hub/config.json"); got !=
			"one\norg\ntwo\n"+string(tiny(65)["config.json"])+string(tiny(66)["config.json"])+string(tiny(64)["config.json"]) {
			t.Errorf("a container sees %q", got)
		}
		all := n.volume("all", "model=*", "access=ro")
		c := n.start("-v", all+":/hub")
		if got := n.sh(c, "cd /hub; ls -d models--*; cat models--org--hub/refs/main; cat models--org--hub/snapshots/"+id+"/tokenizer/vocab.txt"); got !=
			"models--one\nmodels--org--hub\nmodels--two\n"+id+"a\nb\nc" {
			t.Errorf("the catalog shows %q", got)
		}
		n.importModel("three", tiny(67))
		if got := n.run("-v", all+":/hub", engine.Image, "ls", "/hub"); !strings.Contains(got, "models--three") {
			t.Errorf("the next run's catalog has %q, want what came in since", got)
		}
		if got := n.sh(c, "ls /hub"); strings.Contains(got, "three") {
			t.Errorf("a catalog changed under a container: %q", got)
		}
		n.docker("rm", "-f", c)
	})
}

// downloadScript is what a hub's client leaves in its cache: a model of one
// file, a line many times over, with what the container says of it.
func downloadScript(repo, commit, line string, times int) (script, content string) {
	content = strings.Repeat(line+"\n", times)
	return fmt.Sprintf(`set -e; r=/hub/models--%[1]s; c=%[2]s
mkdir -p $r/blobs $r/refs $r/snapshots/$c
yes '%[3]s' | head -n %[5]d > $r/blobs/%[4]s
printf %%s $c > $r/refs/main
ln -s ../../blobs/%[4]s $r/snapshots/$c/model.safetensors`, strings.ReplaceAll(repo, "/", "--"), commit, line, sha256hex([]byte(content)), times), content
}

// What a container downloads is there for the next one, on the disk once, and
// what it claims about it moves nothing.
func TestDownloadsAreAbsorbed(t *testing.T) {
	eachEngine(t, func(t *testing.T, e *engine.Engine) {
		n := newNode(t, e)
		hub := n.onHub("hf_of_the_test")
		known := commit(t, hub, "org/known", tiny(68))
		n.larder("pull", "hf://org/known")
		n.startPlugin()
		v := n.volume("hub", "model=*", "absorb=on")
		fresh, forged := strings.Repeat("a", 40), strings.Repeat("b", 40)
		script, content := downloadScript("org/new", fresh, "wlines", 10)
		n.run("--user", "1000", "-v", v+":/hub", engine.Image, "sh", "-c", script)
		script, _ = downloadScript("org/known", forged, "forgery", 10)
		n.run("--user", "1000", "-v", v+":/hub", engine.Image, "sh", "-c", script)
		n.eventually("the downloads are in the store", func() error {
			for _, name := range []string{"hf://org/new@" + fresh, "hf://org/known@" + forged} {
				if _, err := n.larderErr("show", name); err != nil {
					return err
				}
			}
			return nil
		})
		if got := n.run("-v", v+":/hub", engine.Image, "cat", "/hub/models--org--new/snapshots/"+fresh+"/model.safetensors"); got+"\n" != content {
			t.Errorf("the next container reads %q", got)
		}
		if got := n.run("-v", v+":/hub", engine.Image, "cat", "/hub/models--org--known/refs/main"); got != known {
			t.Errorf("main of a model that was pulled is %q, want %q", got, known)
		}
		for _, name := range []string{"hf://org/new@main", "hf://org/new"} {
			if _, err := n.larderErr("show", name); exitCode(err) != 3 {
				t.Errorf("%s: %v, want that there is none: a container said so", name, err)
			}
		}
		n.larder("verify")
		n.eventually("nothing of the runs is left", func() error {
			return errors.Join(n.noUppers(), n.nothingMounted())
		})
	})
}
