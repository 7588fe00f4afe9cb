package directory

import (
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/larder-project/larder/internal/source"
)

const (
	commitA = "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa"
	commitB = "bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb"
	oidOne  = "1111111111111111111111111111111111111111"
	oidTwo  = "2222222222222222222222222222222222222222"
)

var (
	shaWeights = fmt.Sprintf("%x", sha256.Sum256([]byte("weights")))
	shaShared  = fmt.Sprintf("%x", sha256.Sum256([]byte("shared weights")))
)

// hubCache is a cache as clients leave it: a model with two revisions that
// share their weights, one of them partial and one without a list of files,
// a model whose weights lie in the shared blobs, and what is no model.
func hubCache(t *testing.T) string {
	t.Helper()
	dir := folder(t, map[string]string{
		"CACHEDIR.TAG":                   "Signature: 8a477f597d28d172789f06886806bc55",
		".locks/models--org--one/x.lock": "",
		"datasets--org--data/refs/main":  commitA,

		"models--org--one/blobs/" + shaWeights:                           "weights",
		"models--org--one/blobs/" + oidOne:                               "{}",
		"models--org--one/blobs/" + oidTwo:                               "[]",
		"models--org--one/blobs/" + shaWeights + ".0a1b2c3d.incomplete":  "wei",
		"models--org--one/refs/main":                                     commitA,
		"models--org--one/refs/refs/pr/1":                                commitA + "\n",
		"models--org--one/.no_exist/" + commitA + "/adapter_config.json": "",
		"models--org--one/trees/" + commitA + ".json":                    treeJSON(t, map[string]string{"model.safetensors": shaWeights, "config.json": oidOne, "sub/more.json": oidTwo}),
		"models--gpt2/blobs/" + oidOne:                                   "{}",
		"models--gpt2/refs/main":                                         commitB,
		"models--gpt2/trees/" + commitB + ".json":                        treeJSON(t, map[string]string{"config.json": oidOne, "model.safetensors": shaShared, "README.md": oidTwo}),
		"blobs/.huggingface-shared-blobs":                                "1\n",
		"blobs/ab/" + strings.Repeat("ab", 32):                           "shared weights",
		"blobs/ab/" + strings.Repeat("ab", 32) + ".refs":                 "models--gpt2/blobs/" + shaShared + "\n",
	})
	one := filepath.Join(dir, "models--org--one/snapshots")
	link(t, "../../blobs/"+shaWeights, one+"/"+commitA+"/model.safetensors")
	link(t, "../../blobs/"+oidOne, one+"/"+commitA+"/config.json")
	link(t, "../../../blobs/"+oidTwo, one+"/"+commitA+"/sub/more.json")
	link(t, "../../blobs/"+shaWeights, one+"/"+commitB+"/model.safetensors")
	two := filepath.Join(dir, "models--gpt2")
	link(t, "../../blobs/ab/"+strings.Repeat("ab", 32), two+"/blobs/"+shaShared)
	link(t, "../../blobs/"+oidOne, two+"/snapshots/"+commitB+"/config.json")
	link(t, "../../blobs/"+shaShared, two+"/snapshots/"+commitB+"/model.safetensors")
	return dir
}

func treeJSON(t *testing.T, files map[string]string) string {
	t.Helper()
	type entry struct {
		Size      int64  `json:"size"`
		BlobID    string `json:"blob_id"`
		LFSSHA256 string `json:"lfs_sha256,omitempty"`
	}
	out := map[string]entry{}
	for name, id := range files {
		e := entry{BlobID: id}
		if len(id) == 64 {
			e = entry{BlobID: oidTwo, LFSSHA256: id}
		}
		out[name] = e
	}
	b, err := json.Marshal(map[string]any{"format_version": 1, "files": out})
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// describe is a cache's sources and what was skipped, in words.
func describe(t *testing.T, c Cache, dir string) (sources, skipped []string) {
	t.Helper()
	for _, s := range c.Sources {
		snap, err := s.Snapshot(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		var refs []string
		for _, r := range snap.References {
			refs = append(refs, r.String())
		}
		slices.Sort(refs)
		text := fmt.Sprintf("%s %s %v partial=%v", snap.Source, snap.Revision[:1], refs, snap.Partial)
		for _, f := range snap.Files {
			text += fmt.Sprintf(" %s=%s%.6s:%s", f.Path, strings.TrimPrefix(string(f.SHA256), "sha256:")[:min(6, max(0, len(f.SHA256)-7))], f.GitOID, content(t, s, f))
		}
		sources = append(sources, text)
	}
	for _, s := range c.Skipped {
		skipped = append(skipped, strings.TrimPrefix(s.Path, dir+"/")+": "+s.Why)
	}
	return sources, skipped
}

func TestHubCache(t *testing.T) {
	dir := hubCache(t)
	for _, tt := range []struct {
		path    string
		is      bool
		sources int
	}{{"", true, 3}, {"models--org--one", true, 2}, {"models--gpt2", true, 1}, {"blobs", false, 0}, {"models--org--one/blobs", false, 0}} {
		name := filepath.Join(dir, tt.path)
		if IsHubCache(name) != tt.is {
			t.Errorf("IsHubCache(%q) = %v", tt.path, !tt.is)
		}
		if !tt.is {
			continue
		}
		c, err := HubCache(name)
		if err != nil {
			t.Fatal(err)
		}
		if len(c.Sources) != tt.sources {
			t.Errorf("%q has %d sources, want %d", tt.path, len(c.Sources), tt.sources)
		}
	}
	c, err := HubCache(dir)
	if err != nil {
		t.Fatal(err)
	}
	sources, skipped := describe(t, c, dir)
	want := []string{
		fmt.Sprintf("hf://gpt2 b [hf://gpt2@main] partial=true config.json=111111:{} model.safetensors=%.6s:shared weights", shaShared),
		fmt.Sprintf("hf://org/one a [hf://org/one@main hf://org/one@refs/pr/1] partial=false config.json=111111:{} model.safetensors=%.6s:weights sub/more.json=222222:[]", shaWeights),
		fmt.Sprintf("hf://org/one b [hf://org/one@%s] partial=true model.safetensors=%.6s:weights", commitB, shaWeights),
	}
	if diff := cmp.Diff(want, sources); diff != "" {
		t.Errorf("sources (-want +got):\n%s", diff)
	}
	wantSkipped := []string{
		"datasets--org--data: not a model",
		"models--org--one/blobs/" + shaWeights + ".0a1b2c3d.incomplete: a download that did not end",
	}
	if diff := cmp.Diff(wantSkipped, skipped); diff != "" {
		t.Errorf("skipped (-want +got):\n%s", diff)
	}
}

// A revision that cannot be trusted is skipped by name, and the rest of the
// cache is given all the same.
func TestBrokenHubCache(t *testing.T) {
	const one = "models--org--one"
	tests := []struct {
		name   string
		damage func(t *testing.T, dir string)
		left   int
		says   string
	}{
		{"dangling link", func(t *testing.T, dir string) { link(t, "../../blobs/nothing", dir+"/"+one+"/snapshots/"+commitB+"/x") }, 2, "missing"},
		{"link out of the cache", func(t *testing.T, dir string) {
			link(t, "../../../../../../../../../../etc/passwd", dir+"/"+one+"/snapshots/"+commitB+"/x")
		}, 2, "out of the cache"},
		{"absolute link", func(t *testing.T, dir string) { link(t, "/etc/passwd", dir+"/"+one+"/snapshots/"+commitB+"/x") }, 2, "out of the cache"},
		{"link to another repository", func(t *testing.T, dir string) {
			link(t, "../../../models--gpt2/blobs/"+oidOne, dir+"/"+one+"/snapshots/"+commitB+"/x")
		}, 2, "not a blob of this repository"},
		{"blob that leads out", func(t *testing.T, dir string) {
			link(t, "/etc/passwd", dir+"/"+one+"/blobs/"+strings.Repeat("3", 40))
			link(t, "../../blobs/"+strings.Repeat("3", 40), dir+"/"+one+"/snapshots/"+commitB+"/x")
		}, 2, "out of the cache"},
		{"blob that leads to a repository", func(t *testing.T, dir string) {
			link(t, "../../models--gpt2/blobs/"+oidOne, dir+"/"+one+"/blobs/"+strings.Repeat("3", 40))
			link(t, "../../blobs/"+strings.Repeat("3", 40), dir+"/"+one+"/snapshots/"+commitB+"/x")
		}, 2, "not a blob of this cache"},
		{"folder of blobs that leads out", func(t *testing.T, dir string) {
			if err := os.Rename(dir+"/"+one+"/blobs", dir+"/moved"); err != nil {
				t.Fatal(err)
			}
			link(t, t.TempDir(), dir+"/"+one+"/blobs")
		}, 1, "escapes"},
		{"link to a folder", func(t *testing.T, dir string) {
			link(t, "../../blobs", dir+"/"+one+"/snapshots/"+commitB+"/x")
		}, 2, "not a blob"},
		{"list that names other content", func(t *testing.T, dir string) {
			write(t, dir+"/"+one+"/trees/"+commitB+".json", treeJSON(t, map[string]string{"model.safetensors": shaShared}))
		}, 2, "not the content"},
		{"list that cannot be read", func(t *testing.T, dir string) { write(t, dir+"/"+one+"/trees/"+commitB+".json", "{") }, 3, "counts as partial"},
		{"snapshot without files", func(t *testing.T, dir string) {
			if err := os.Mkdir(dir+"/"+one+"/snapshots/"+strings.Repeat("c", 40), 0o755); err != nil {
				t.Fatal(err)
			}
		}, 3, "no files"},
		{"snapshot that is no commit", func(t *testing.T, dir string) { write(t, dir+"/"+one+"/snapshots/main/x", "x") }, 3, "not a commit"},
		{"ref to nothing", func(t *testing.T, dir string) { write(t, dir+"/"+one+"/refs/gone", strings.Repeat("c", 40)) }, 3, "not in the cache"},
		{"ref of zero bytes", func(t *testing.T, dir string) { write(t, dir+"/"+one+"/refs/gone", "") }, 3, "names no commit"},
		{"name of a repository", func(t *testing.T, dir string) { write(t, dir+"/models--a--b--c/refs/main", commitA) }, 3, "models--a--b--c"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			dir := hubCache(t)
			tt.damage(t, dir)
			c, err := HubCache(dir)
			if err != nil {
				t.Fatal(err)
			}
			sources, skipped := describe(t, c, dir)
			if len(sources) != tt.left {
				t.Errorf("%d sources, want %d:\n%s", len(sources), tt.left, strings.Join(sources, "\n"))
			}
			if !strings.Contains(strings.Join(skipped, "\n"), tt.says) {
				t.Errorf("nothing that was skipped says %q:\n%s", tt.says, strings.Join(skipped, "\n"))
			}
		})
	}
}

// Caches without links hold regular files; a list of files says what they are.
func TestHubCacheWithoutLinks(t *testing.T) {
	dir := folder(t, map[string]string{
		"models--org--one/refs/main":                             commitA,
		"models--org--one/snapshots/" + commitA + "/config.json": "{}",
		"models--org--one/snapshots/" + commitA + "/m.bin":       "weights",
		"models--org--one/trees/" + commitA + ".json":            treeJSON(t, map[string]string{"m.bin": shaWeights, "config.json": oidOne}),
	})
	c, err := HubCache(dir)
	if err != nil {
		t.Fatal(err)
	}
	sources, skipped := describe(t, c, dir)
	want := []string{fmt.Sprintf("hf://org/one a [hf://org/one@main] partial=false config.json=111111:{} m.bin=%.6s:weights", shaWeights)}
	if diff := cmp.Diff(want, sources); diff != "" || len(skipped) > 0 {
		t.Errorf("sources (-want +got):\n%s\nskipped %v", diff, skipped)
	}
}

// Taking one revision out leaves the others whole, and a cache that clients
// can read; the last one takes its blobs with it.
func TestHubCacheRemove(t *testing.T) {
	dir := hubCache(t)
	c, err := HubCache(dir)
	if err != nil {
		t.Fatal(err)
	}
	take := func(src source.Source) {
		t.Helper()
		s := src.(*Source)
		snap, err := s.Snapshot(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		for _, f := range snap.Files {
			if err := s.Remove(f); err != nil {
				t.Fatal(err)
			}
		}
		if err := s.Finish(); err != nil {
			t.Fatal(err)
		}
	}
	there := func(name string, want bool) {
		t.Helper()
		if _, err := os.Lstat(filepath.Join(dir, name)); (err == nil) != want {
			t.Errorf("%s: there %v, want %v", name, err == nil, want)
		}
	}
	take(c.Sources[1])
	there("models--org--one/snapshots/"+commitA, false)
	there("models--org--one/refs/main", false)
	there("models--org--one/trees/"+commitA+".json", false)
	there("models--org--one/blobs/"+oidTwo, false)
	there("models--org--one/blobs/"+shaWeights, true) // revision b has it
	again, err := HubCache(dir)
	if err != nil {
		t.Fatal(err)
	}
	if len(again.Sources) != 2 {
		t.Errorf("%d revisions are left, want 2", len(again.Sources))
	}
	take(c.Sources[2])
	there("models--org--one/blobs/"+shaWeights, false)
	take(c.Sources[0])
	there("models--gpt2/snapshots/"+commitB, false)
	there("blobs/ab/"+strings.Repeat("ab", 32), true) // shared with other repositories
}

func TestHubCachePlace(t *testing.T) {
	c, err := HubCache(hubCache(t))
	if err != nil {
		t.Fatal(err)
	}
	got := map[string]bool{}
	for _, src := range c.Sources {
		s := src.(*Source)
		snap, err := s.Snapshot(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		for _, f := range snap.Files {
			_, sole, err := s.Place(f)
			if err != nil {
				t.Fatal(err)
			}
			got[snap.Source+" "+snap.Revision[:1]+" "+f.Path] = sole
		}
	}
	want := map[string]bool{
		"hf://gpt2 b config.json": true, "hf://gpt2 b model.safetensors": false,
		"hf://org/one a config.json": true, "hf://org/one a model.safetensors": false, "hf://org/one a sub/more.json": true,
		"hf://org/one b model.safetensors": false,
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("files that may be taken over (-want +got):\n%s", diff)
	}
}
