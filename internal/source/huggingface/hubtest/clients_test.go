package hubtest

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// load is what a user's program does, online and then offline. It fails where
// the client warns or finds a file that is not as the hub lists it.
const load = `
import os, sys, hashlib
import huggingface_hub as hub
from huggingface_hub import HfApi, hf_hub_download, snapshot_download

repo, branch, tag, weights = sys.argv[1:5]
api = HfApi()
info = api.model_info(repo)
assert info.sha == branch, info.sha
assert {s.rfilename for s in info.siblings} >= {"config.json", "model.safetensors", "sub/vocab.txt"}
refs = api.list_repo_refs(repo)
assert [(r.name, r.target_commit) for r in refs.branches] == [("main", branch)], refs
assert [(r.name, r.target_commit) for r in refs.tags] == [("v1", tag)], refs
tree = {f.path: f for f in api.list_repo_tree(repo, recursive=True)}
assert tree["model.safetensors"].lfs.sha256 == weights, tree["model.safetensors"]
assert [f.path for f in api.list_repo_tree(repo, path_in_repo="sub")] == ["sub/vocab.txt"]
paths = api.get_paths_info(repo, ["config.json", "sub", "absent"])
assert sorted(p.path for p in paths) == ["config.json", "sub"], paths

folder = snapshot_download(repo)
assert folder.endswith("/snapshots/" + branch), folder
with open(os.path.join(folder, "model.safetensors"), "rb") as f:
    assert hashlib.sha256(f.read()).hexdigest() == weights
assert hf_hub_download(repo, "config.json", revision="v1").endswith("/snapshots/" + tag + "/config.json")
assert open(hf_hub_download(repo, "sub/vocab.txt")).read() == "a\nb\n"
some = snapshot_download(repo, revision="v1", allow_patterns=["*.json"], local_dir="local")
assert os.path.exists("local/config.json") and not os.path.exists("local/model.safetensors")

from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError
def fails(kind, *args, **kw):
    try:
        hf_hub_download(*args, **kw)
    except kind:
        return
    raise AssertionError(f"{args} {kw}: no {kind}")
fails(EntryNotFoundError, repo, "absent.bin")
fails(RevisionNotFoundError, repo, "config.json", revision="absent")
fails(RepositoryNotFoundError, "acme/absent", "config.json")
fails(RepositoryNotFoundError, "acme/private", "config.json", token=False)
fails(GatedRepoError, "acme/gated", "config.json", token=False)
hf_hub_download("acme/private", "model.safetensors")
hf_hub_download("acme/gated", "model.safetensors")
cache = os.path.join(os.environ["HF_HOME"], "hub", "models--acme--tiny")
assert os.path.exists(os.path.join(cache, ".no_exist", branch, "absent.bin"))
assert open(os.path.join(cache, "refs", "main")).read() == branch
assert os.path.exists(os.path.join(cache, "blobs", weights))
print("client", hub.__version__, "is content")
`

// Real clients read from this hub as they do from the real one.
func TestRealClients(t *testing.T) {
	for _, version := range Clients {
		t.Run(version, func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			python := filepath.Join(Client(t, version), "python")
			run := func(env []string, want, script string, args ...string) {
				t.Helper()
				cmd := exec.CommandContext(t.Context(), python, append([]string{"-c", script}, args...)...)
				cmd.Dir = dir
				cmd.Env = append(os.Environ(), env...)
				out, err := cmd.CombinedOutput()
				switch {
				case err != nil:
					t.Fatalf("%v\n%s", err, out)
				case !strings.Contains(string(out), want):
					t.Errorf("the client does not say %q:\n%s", want, out)
				case strings.Contains(strings.ToLower(string(out)), "warning"):
					t.Errorf("the client warns:\n%s", out)
				}
			}

			for name, o := range map[string]Options{"as the real hub": {PageSize: 2, ResolveCache: true}, "one host": {Direct: true}} {
				hub := Start(t, o)
				weights := Pattern(1, 5<<20+3)
				sum, _, err := sums(weights)
				if err != nil {
					t.Fatal(err)
				}
				files := []File{
					{Path: "config.json", Content: Text("{}\n")},
					{Path: "model.safetensors", Content: weights},
					{Path: "sub/vocab.txt", Content: Text("a\nb\n")},
				}
				commit := func(repo, branch string, files ...File) string {
					id, err := hub.Repo(repo).Commit(branch, files...)
					if err != nil {
						t.Fatal(err)
					}
					return id
				}
				tag := commit("acme/tiny", "main", files...)
				hub.Repo("acme/tiny").Tag("v1", tag)
				files[0].Content = Text(`{"v": 2}`)
				branch := commit("acme/tiny", "main", files...)
				commit("acme/private", "main", files...)
				commit("acme/gated", "main", files...)
				hub.Repo("acme/private").Private()
				hub.Repo("acme/gated").Gated()
				hub.AddToken("hf_granted", "acme/private", "acme/gated")

				home := filepath.Join(dir, strings.ReplaceAll(name, " ", "-"))
				env := []string{
					"HF_ENDPOINT=" + hub.URL, "HF_HOME=" + home, "HF_TOKEN=hf_granted", "HF_HUB_DISABLE_TELEMETRY=1",
					"HF_HUB_DISABLE_PROGRESS_BARS=1", "NO_PROXY=*", "no_proxy=*",
				}
				run(env, "client "+version+" is content", load, "acme/tiny", branch, tag, sum)
				if n := hub.Asked(KindData, "model.safetensors"); (n == 0) != o.Direct {
					t.Errorf("%s: %d requests at the second host", name, n)
				}

				// Everything is there: offline, nothing is asked for.
				before := len(hub.Requests())
				run(append(env, "HF_HUB_OFFLINE=1"), "/snapshots/"+branch, "import huggingface_hub; print(huggingface_hub.snapshot_download('acme/tiny'))")
				if n := len(hub.Requests()) - before; n != 0 {
					t.Errorf("%s: %d requests while offline", name, n)
				}
			}
		})
	}
}
