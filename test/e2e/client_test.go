package e2e

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/larder-project/larder/internal/source/huggingface/hubtest"
	"github.com/larder-project/larder/internal/testenv"
	"github.com/larder-project/larder/test/engine"
)

// find is what from_pretrained does to find a model, and what a person does who
// looks for it. It prints the folder that has the files.
const find = `
import hashlib, os, sys
from huggingface_hub import hf_hub_download, scan_cache_dir, snapshot_download, try_to_load_from_cache
cache, weights = os.environ["HF_HUB_CACHE"], sys.argv[1]
folder = snapshot_download("acme/tiny")
assert folder.startswith(cache + "/"), folder
assert hf_hub_download("acme/tiny", "config.json") == folder + "/config.json"
assert try_to_load_from_cache("acme/tiny", "tokenizer/vocab.txt") == folder + "/tokenizer/vocab.txt"
assert hashlib.sha256(open(folder + "/model.safetensors", "rb").read()).hexdigest() == weights
found = scan_cache_dir()
warnings = [w for w in found.warnings if "CACHEDIR.TAG" not in str(w)] # clients before 1.0 know no such file
assert not warnings, warnings
assert [r.repo_id for r in found.repos] == ["acme/tiny"], found.repos
print(folder)
`

// The hub's own client takes a view with layout=hf for its cache: offline it
// finds the model, online it asks for no byte of a file, whether the model came
// from the hub or from a cache that the client itself has filled.
func TestTheHubsClientFindsAModelInAView(t *testing.T) {
	testenv.NeedRoot(t)
	t.Parallel()
	for _, version := range hubtest.Clients {
		t.Run(version, func(t *testing.T) {
			t.Parallel()
			client := hubtest.Client(t, version)
			hub := hubtest.Start(t, hubtest.Options{})
			files := tiny(1)
			first, err := hub.Repo("acme/tiny").CommitMap("main", files)
			ok(t, err)
			weights := sha256hex(files["model.safetensors"])
			env := slices.DeleteFunc(os.Environ(), func(s string) bool {
				return strings.HasPrefix(s, "LARDER_") || strings.HasPrefix(s, "HF_")
			})
			env = append(env, "HF_ENDPOINT="+hub.URL, "HF_HOME="+t.TempDir(), "HF_HUB_DISABLE_TELEMETRY=1", "HF_HUB_DISABLE_PROGRESS_BARS=1", "NO_PROXY=*", "no_proxy=*")
			larder := func(root string, args ...string) {
				t.Helper()
				runProgram(t, env, filepath.Join(programs, "larder"), append([]string{"--root", root}, args...)...)
			}
			// run gives the snapshot that the client finds, and fails it where a
			// file's bytes were asked for.
			run := func(cache string, more ...string) string {
				t.Helper()
				hub.ResetRequests()
				out := runProgram(t, append(append(slices.Clone(env), "HF_HUB_CACHE="+cache), more...), filepath.Join(client, "python"), "-c", find, weights)
				if sent := hub.Sent(""); sent != 0 {
					t.Errorf("the client was sent %d bytes of files: %+v", sent, hub.Requests())
				}
				return filepath.Base(strings.TrimSpace(out))
			}

			pulled, imported := newRoot(t), newRoot(t)
			larder(pulled, "pull", "-q", "hf://acme/tiny")
			own := t.TempDir()
			runProgram(t, append(slices.Clone(env), "HF_HUB_CACHE="+own), filepath.Join(client, "python"), "-c", find, weights)
			larder(imported, "import", "-q", own)

			for name, view := range map[string]struct {
				root string
				args []string
			}{
				"pulled":     {pulled, []string{"hf://acme/tiny", "--option", "layout=hf"}},
				"read-only":  {pulled, []string{"hf://acme/tiny", "--option", "layout=hf", "--option", "access=ro"}},
				"catalog":    {pulled, []string{"*"}},
				"from cache": {imported, []string{"hf://acme/tiny", "--option", "layout=hf", "--option", "access=ro"}},
			} {
				at := filepath.Join(view.root, strings.ReplaceAll(name, " ", "-"))
				larder(view.root, append([]string{"mount", view.args[0], at}, view.args[1:]...)...)
				if got := run(at, "HF_HUB_OFFLINE=1"); got != first {
					t.Errorf("%s: offline the client finds commit %s, want %s", name, got, first)
				}
				if n := len(hub.Requests()); n != 0 {
					t.Errorf("%s: offline the hub was asked %d times", name, n)
				}
				if got := run(at); got != first {
					t.Errorf("%s: online the client finds commit %s, want %s", name, got, first)
				}
				if hub.Asked("", "") == 0 {
					t.Errorf("%s: online the client did not ask the hub what is new: this tests nothing", name)
				}
				list := []string{"cache", "ls"}
				if strings.HasPrefix(version, "0.") {
					list[1] = "scan"
				}
				if out := runProgram(t, append(slices.Clone(env), "HF_HUB_CACHE="+at), filepath.Join(client, "hf"), list...); !strings.Contains(out, "acme/tiny") {
					t.Errorf("%s: hf %s says %q", name, strings.Join(list, " "), out)
				}
			}

			// The hub has a newer commit: in a view that may be written into, the
			// client fetches what changed and nothing else.
			changed := model{"config.json": []byte(`{"v": 2}`), "model.safetensors": files["model.safetensors"], "tokenizer/vocab.txt": files["tokenizer/vocab.txt"]}
			second, err := hub.Repo("acme/tiny").CommitMap("main", changed)
			ok(t, err)
			hub.ResetRequests()
			out := runProgram(t, append(slices.Clone(env), "HF_HUB_CACHE="+filepath.Join(pulled, "pulled")), filepath.Join(client, "python"), "-c", find, weights)
			if got := filepath.Base(strings.TrimSpace(out)); got != second {
				t.Errorf("online the client finds commit %s, want the new one, %s", got, second)
			}
			if sent := hub.Sent(""); sent != int64(len(changed["config.json"])) {
				t.Errorf("the client was sent %d bytes, one file of %d has changed", sent, len(changed["config.json"]))
			}
		})
	}
}

// newRoot is a folder for --root. What is mounted in it goes with the test.
func newRoot(t *testing.T) string {
	t.Helper()
	root, err := os.MkdirTemp("", "larder-e2e-root-")
	ok(t, err)
	t.Cleanup(func() {
		if err := engine.UnmountBelow(root); err != nil {
			t.Error(err)
			return
		}
		ok(t, os.RemoveAll(root))
	})
	return root
}
