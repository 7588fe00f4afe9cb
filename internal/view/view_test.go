package view

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"path"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/opencontainers/go-digest"
	"pgregory.net/rapid"

	"github.com/larder-project/larder/internal/modelpack"
)

const (
	commitA = "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa"
	commitB = "bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb"
)

// file is a file whose bytes are its content.
func file(path, content string) modelpack.File {
	return modelpack.File{Path: path, Digest: digest.FromString(content), Size: int64(len(content))}
}

func gitFile(path, content, oid string) modelpack.File {
	f := file(path, content)
	f.GitOID = oid
	return f
}

func model(repo string, files ...modelpack.File) Model {
	var names string
	for _, f := range files {
		names += f.Path + string(f.Digest)
	}
	return Model{Repo: repo, Digest: digest.FromString(repo + names), Pack: modelpack.Model{Files: files}}
}

// lines shows a tree as one line an entry: kind, mode, owner, path and what is
// in it.
func lines(t Tree) []string {
	out := make([]string, 0, len(t.Entries))
	for _, e := range t.Entries {
		s := fmt.Sprintf("%c %04o %d:%d %s", e.Kind, e.Mode, e.UID, e.GID, e.Path)
		switch e.Kind {
		case Blob:
			s += fmt.Sprintf(" = %.8s+%d", e.Digest.Encoded(), e.Size)
		case Symlink:
			s += " -> " + e.Target
		case Inline:
			s += fmt.Sprintf(" %q", e.Data)
		}
		out = append(out, s)
	}
	return out
}

func plan(t *testing.T, s Spec) Tree {
	t.Helper()
	tree, err := Plan(s)
	if err != nil {
		t.Fatal(err)
	}
	return tree
}

func p[T any](v T) *T { return &v }

func TestFilesLayout(t *testing.T) {
	t.Parallel()
	a, b := file("config.json", "{}"), file("sub/w.bin", "weights")
	for _, c := range []struct {
		name string
		spec Spec
		want []string
	}{
		{"one model is at the root", Spec{Models: []Model{model("org/name", b, a)}}, []string{
			"d 0777 0:0 .",
			"b 0666 0:0 config.json = 44136fa3+2",
			"d 0777 0:0 sub",
			"b 0666 0:0 sub/w.bin = 9a129038+7",
		}},
		{"read-only", Spec{ReadOnly: true, Models: []Model{model("x", a)}}, []string{
			"d 0555 0:0 .",
			"b 0444 0:0 config.json = 44136fa3+2",
		}},
		{"owner and mode", Spec{UID: p(uint32(7)), GID: p(uint32(8)), Mode: p(fs.FileMode(0o640)), Models: []Model{model("x", b)}}, []string{
			"d 0750 7:8 .",
			"d 0750 7:8 sub",
			"b 0640 7:8 sub/w.bin = 9a129038+7",
		}},
		{"mode of a read-only view", Spec{ReadOnly: true, Mode: p(fs.FileMode(0o604)), Models: []Model{model("x", a)}}, []string{
			"d 0705 0:0 .",
			"b 0604 0:0 config.json = 44136fa3+2",
		}},
		{"several models", Spec{Models: []Model{model("qwen", a), model("org/b", a), model("org/a", b)}}, []string{
			"d 0777 0:0 .",
			"d 0777 0:0 org",
			"d 0777 0:0 org/a",
			"d 0777 0:0 org/a/sub",
			"b 0666 0:0 org/a/sub/w.bin = 9a129038+7",
			"d 0777 0:0 org/b",
			"b 0666 0:0 org/b/config.json = 44136fa3+2",
			"d 0777 0:0 qwen",
			"b 0666 0:0 qwen/config.json = 44136fa3+2",
		}},
		{"names that sort before a dot", Spec{Models: []Model{model("x", file("!a", "1"), file("-b", "2"))}}, []string{
			"d 0777 0:0 .",
			"b 0666 0:0 !a = 6b86b273+1",
			"b 0666 0:0 -b = d4735e3a+1",
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			c.spec.Layout = Files
			if d := cmp.Diff(c.want, lines(plan(t, c.spec))); d != "" {
				t.Errorf("tree (-want +got):\n%s", d)
			}
		})
	}
}

func TestHubLayout(t *testing.T) {
	t.Parallel()
	oid := strings.Repeat("1", 40)
	main := model("org/name", gitFile("config.json", "{}", oid), file("sub/deep/w.bin", "weights"))
	main.Revisions, main.Commit = []string{"main", commitA, "refs/pr/1"}, commitA
	old := model("org/name", gitFile("config.json", "{}", oid))
	old.Revisions, old.Pack.Revision, old.Pack.Partial = []string{"v1"}, commitB, true
	short := model("qwen/tiny", file("w.bin", "weights"))
	own := short.Digest.Encoded()[:40]

	tree := plan(t, Spec{Layout: HF, Models: []Model{main, old, short}})
	sum := file("", "weights").Digest.Encoded()
	// The id that git has for the pointer of an LFS file: computed by
	// printf 'version …\noid sha256:…\nsize 7\n' | git hash-object --stdin
	const pointer = "c6a67be4f3ef29ed4a07b4f2446625126a25cfda"
	treeJSON := func(s string) string { return fmt.Sprintf("%q", s) }
	want := []string{
		"d 0777 0:0 .",
		"d 0777 0:0 .locks",
		"d 0777 0:0 .locks/models--org--name",
		"d 0777 0:0 .locks/models--qwen--tiny",
		fmt.Sprintf("f 0666 0:0 CACHEDIR.TAG %q", cacheTag),
		"d 0777 0:0 models--org--name",
		"d 0777 0:0 models--org--name/blobs",
		"b 0666 0:0 models--org--name/blobs/" + oid + " = 44136fa3+2",
		"b 0666 0:0 models--org--name/blobs/" + sum + " = 9a129038+7",
		"d 0777 0:0 models--org--name/refs",
		`f 0666 0:0 models--org--name/refs/main "` + commitA + `"`,
		"d 0777 0:0 models--org--name/refs/refs",
		"d 0777 0:0 models--org--name/refs/refs/pr",
		`f 0666 0:0 models--org--name/refs/refs/pr/1 "` + commitA + `"`,
		`f 0666 0:0 models--org--name/refs/v1 "` + commitB + `"`,
		"d 0777 0:0 models--org--name/snapshots",
		"d 0777 0:0 models--org--name/snapshots/" + commitA,
		"l 0777 0:0 models--org--name/snapshots/" + commitA + "/config.json -> ../../blobs/" + oid,
		"d 0777 0:0 models--org--name/snapshots/" + commitA + "/sub",
		"d 0777 0:0 models--org--name/snapshots/" + commitA + "/sub/deep",
		"l 0777 0:0 models--org--name/snapshots/" + commitA + "/sub/deep/w.bin -> ../../../../blobs/" + sum,
		"d 0777 0:0 models--org--name/snapshots/" + commitB,
		"l 0777 0:0 models--org--name/snapshots/" + commitB + "/config.json -> ../../blobs/" + oid,
		"d 0777 0:0 models--org--name/trees",
		"f 0644 0:0 models--org--name/trees/" + commitA + ".json " + treeJSON(`{
 "format_version": 1,
 "files": {
  "config.json": {
   "size": 2,
   "blob_id": "`+oid+`"
  },
  "sub/deep/w.bin": {
   "size": 7,
   "blob_id": "`+pointer+`",
   "lfs_sha256": "`+sum+`",
   "lfs_size": 7
  }
 }
}`),
		"d 0777 0:0 models--qwen--tiny",
		"d 0777 0:0 models--qwen--tiny/blobs",
		"b 0666 0:0 models--qwen--tiny/blobs/" + sum + " = 9a129038+7",
		"d 0777 0:0 models--qwen--tiny/refs",
		`f 0666 0:0 models--qwen--tiny/refs/main "` + own + `"`,
		"d 0777 0:0 models--qwen--tiny/snapshots",
		"d 0777 0:0 models--qwen--tiny/snapshots/" + own,
		"l 0777 0:0 models--qwen--tiny/snapshots/" + own + "/w.bin -> ../../blobs/" + sum,
		"d 0777 0:0 models--qwen--tiny/trees",
		"f 0644 0:0 models--qwen--tiny/trees/" + own + ".json " + treeJSON(`{
 "format_version": 1,
 "files": {
  "w.bin": {
   "size": 7,
   "blob_id": "`+pointer+`",
   "lfs_sha256": "`+sum+`",
   "lfs_size": 7
  }
 }
}`),
	}
	if d := cmp.Diff(want, lines(tree)); d != "" {
		t.Errorf("tree (-want +got):\n%s", d)
	}
}

func TestReadOnlyHubViewHasNothingToWrite(t *testing.T) {
	t.Parallel()
	for _, e := range plan(t, Spec{Layout: HF, ReadOnly: true, Models: []Model{model("a/b", file("f", "1"))}}).Entries {
		if want := map[Kind]fs.FileMode{Dir: 0o555, Blob: 0o444, Inline: 0o444, Symlink: 0o777}[e.Kind]; e.Mode != want {
			t.Errorf("%s has mode %04o, want %04o", e.Path, e.Mode, want)
		}
	}
}

// A commit without a ref is what a client's clean-up removes.
func TestEveryCommitHasARef(t *testing.T) {
	t.Parallel()
	a := model("o/n", file("f", "1"))
	a.Commit = commitA
	b := model("o/n", file("f", "2"))
	b.Commit = commitB
	refs := func(models ...Model) map[string]string {
		t.Helper()
		out := map[string]string{}
		for _, e := range plan(t, Spec{Layout: HF, Models: models}).Entries {
			if name, ok := strings.CutPrefix(e.Path, "models--o--n/refs/"); ok {
				out[name] = string(e.Data)
			}
		}
		return out
	}
	named := b
	named.Revisions = []string{"main"}
	tag := a
	tag.Revisions = []string{"v1"}
	for _, c := range []struct {
		name   string
		models []Model
		want   map[string]string
	}{
		{"one", []Model{a}, map[string]string{"main": commitA}},
		{"main is another's", []Model{a, named}, map[string]string{"main": commitB, "larder-aaaaaaaaaaaa": commitA}},
		{"named elsewhere", []Model{a, tag}, map[string]string{"v1": commitA}},
		{"two without", []Model{a, b}, map[string]string{"main": commitA, "larder-bbbbbbbbbbbb": commitB}},
	} {
		if d := cmp.Diff(c.want, refs(c.models...)); d != "" {
			t.Errorf("%s (-want +got):\n%s", c.name, d)
		}
	}
}

// Two parts of one commit are one snapshot; with one of them whole the list of
// files is true.
func TestPartsOfOneCommitAreMerged(t *testing.T) {
	t.Parallel()
	part := model("o/n", file("a", "1"))
	part.Commit, part.Pack.Partial = commitA, true
	whole := model("o/n", file("a", "1"), file("b", "2"))
	whole.Commit = commitA
	for _, c := range []struct {
		models []Model
		list   bool
		links  int
	}{{[]Model{part}, false, 1}, {[]Model{part, whole}, true, 2}} {
		list, links := false, 0
		for _, e := range plan(t, Spec{Layout: HF, Models: c.models}).Entries {
			list = list || path.Dir(e.Path) == "models--o--n/trees"
			if e.Kind == Symlink {
				links++
			}
		}
		if list != c.list || links != c.links {
			t.Errorf("%d models: list of files %t, %d links; want %t and %d", len(c.models), list, links, c.list, c.links)
		}
	}
}

func TestPlanRefuses(t *testing.T) {
	t.Parallel()
	ok := model("o/n", file("f", "1"))
	with := func(m Model, change func(*Model)) Model {
		change(&m)
		return m
	}
	other := model("o/n", file("f", "2"))
	oid := strings.Repeat("1", 40)
	for _, c := range []struct {
		name string
		spec Spec
		want string // part of the message
	}{
		{"no model", Spec{Layout: Files}, "no model"},
		{"no layout", Spec{Models: []Model{ok}}, "layout"},
		{"unknown layout", Spec{Layout: "tar", Models: []Model{ok}}, `known are "files" and "hf"`},
		{"no files", Spec{Layout: Files, Models: []Model{{Repo: "x", Digest: ok.Digest}}}, "has no files"},
		{"no digest", Spec{Layout: Files, Models: []Model{with(ok, func(m *Model) { m.Digest = "" })}}, "digest"},
		{"setuid", Spec{Layout: Files, Models: []Model{ok}, Mode: p(fs.FileMode(0o755) | fs.ModeSetuid)}, "permission bits"},
		{"mode beyond", Spec{Layout: Files, Models: []Model{ok}, Mode: p(fs.FileMode(0o4755))}, "permission bits"},
		{"user -1", Spec{Layout: Files, Models: []Model{ok}, UID: p(^uint32(0))}, "user or group id"},
		{"one repository twice", Spec{Layout: Files, Models: []Model{ok, other}}, "share the folder"},
		{"repository in another", Spec{Layout: Files, Models: []Model{ok, model("o", file("x", "1"))}}, "in that of model"},
		{"repository that climbs", Spec{Layout: Files, Models: []Model{ok, model("../x", file("x", "1"))}}, `".."`},
		{"hub repository that climbs", Spec{Layout: HF, Models: []Model{model("..", file("x", "1"))}}, `".."`},
		{"file that climbs", Spec{Layout: Files, Models: []Model{model("x", file("../../etc/passwd", "1"))}}, `".."`},
		{"hub file that climbs", Spec{Layout: HF, Models: []Model{model("x", file("../../../refs/main", "1"))}}, `".."`},
		{"absolute file", Spec{Layout: HF, Models: []Model{model("x", file("/etc/passwd", "1"))}}, "absolute"},
		{"file and folder", Spec{Layout: Files, Models: []Model{model("x", file("a", "1"), file("a/b", "1"))}}, "both a file and a folder"},
		{"folder and file", Spec{Layout: HF, Models: []Model{model("x", file("a/b", "1"), file("a", "1"))}}, "two different entries"},
		{"path twice", Spec{Layout: Files, Models: []Model{model("x", file("a", "1"), file("a", "2"))}}, "two different entries"},
		{"revision that climbs", Spec{Layout: HF, Models: []Model{with(ok, func(m *Model) { m.Revisions = []string{"../../x"} })}}, `".."`},
		{"commit", Spec{Layout: HF, Models: []Model{with(ok, func(m *Model) { m.Commit = "main" })}}, "40 hex digits"},
		{"revision of two versions", Spec{Layout: HF, Models: []Model{
			with(ok, func(m *Model) { m.Revisions = []string{"main"} }), with(other, func(m *Model) { m.Revisions = []string{"main"} }),
		}}, `both be its revision "main"`},
		{"one commit, two contents", Spec{Layout: HF, Models: []Model{
			with(ok, func(m *Model) { m.Commit = commitA }), with(other, func(m *Model) { m.Commit = commitA }),
		}}, "two different entries"},
		{"one folder, two names", Spec{Layout: HF, Models: []Model{ok, model("o--n", file("f", "1"))}}, "share the folder"},
		{"one git id, two contents", Spec{Layout: HF, Models: []Model{model("x", gitFile("a", "1", oid), gitFile("b", "2", oid))}}, "two different entries"},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			_, err := Plan(c.spec)
			if !errors.Is(err, ErrInvalid) || !strings.Contains(err.Error(), c.want) {
				t.Errorf("error %v, want one with %q", err, c.want)
			}
		})
	}
}

func TestKeyTellsTreesApart(t *testing.T) {
	t.Parallel()
	base := func() Spec {
		return Spec{Layout: Files, Models: []Model{model("o/n", file("a", "1"), file("b/c", "2"))}}
	}
	key := func(s Spec, m Method) string { return plan(t, s).Key(m) }
	want := key(base(), DataOnly)
	if len(want) != 64 {
		t.Errorf("key %q", want)
	}
	same := base()
	slices.Reverse(same.Models[0].Pack.Files)
	same.Models[0].Repo = "other/name" // does not show in a view of one model
	if got := key(same, DataOnly); got != want {
		t.Error("equal trees have different keys")
	}
	seen := map[string]string{want: "base"}
	for name, change := range map[string]func(*Spec){
		"uid":       func(s *Spec) { s.UID = p(uint32(1)) },
		"gid":       func(s *Spec) { s.GID = p(uint32(1)) },
		"mode":      func(s *Spec) { s.Mode = p(fs.FileMode(0o600)) },
		"read-only": func(s *Spec) { s.ReadOnly = true },
		"layout":    func(s *Spec) { s.Layout = HF },
		"content":   func(s *Spec) { s.Models[0].Pack.Files[0] = file("a", "3") },
		"name":      func(s *Spec) { s.Models[0].Pack.Files[0] = file("aa", "1") },
		"more":      func(s *Spec) { s.Models = append(s.Models, model("x", file("y", "1"))) },
	} {
		s := base()
		change(&s)
		k := key(s, DataOnly)
		if other, ok := seen[k]; ok {
			t.Errorf("%s has the key of %s", name, other)
		}
		seen[k] = name
	}
	for _, m := range []Method{Lower, HardLink} {
		if other, ok := seen[key(base(), m)]; ok {
			t.Errorf("method %s has the key of %s", m, other)
		}
	}
}

// Whatever the models, a tree is sorted, complete and safe to build.
func TestPlanProperties(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		segment := rapid.SampledFrom([]string{"a", "b", "sha256", "!", "ü", "-", "x.json", ".git"})
		var models []Model
		for range rapid.IntRange(1, 4).Draw(t, "models") {
			files := map[string]modelpack.File{}
			for range rapid.IntRange(1, 6).Draw(t, "files") {
				name := strings.Join(rapid.SliceOfN(segment, 1, 4).Draw(t, "path"), "/")
				files[name] = file(name, rapid.StringOf(rapid.RuneFrom([]rune("xyz"))).Draw(t, "content"))
			}
			m := model(rapid.SampledFrom([]string{"a", "o/n", "o/m", "p"}).Draw(t, "repo"), slices.Collect(maps.Values(files))...)
			m.Revisions = rapid.SliceOfN(rapid.SampledFrom([]string{"main", "v1", "refs/pr/1", commitA}), 0, 2).Draw(t, "revisions")
			models = append(models, m)
		}
		spec := Spec{Layout: rapid.SampledFrom([]Layout{Files, HF}).Draw(t, "layout"), Models: models}
		tree, err := Plan(spec)
		if errors.Is(err, ErrInvalid) {
			return
		}
		if err != nil {
			t.Fatal(err)
		}
		again, err := Plan(spec)
		if err != nil || again.Key(Lower) != tree.Key(Lower) {
			t.Fatalf("planned twice, the keys differ (%v)", err)
		}
		kinds := map[string]Kind{}
		for i, e := range tree.Entries {
			if _, ok := kinds[e.Path]; ok {
				t.Fatalf("%s is there twice", e.Path)
			}
			kinds[e.Path] = e.Kind
			if i == 0 {
				if e.Path != "." {
					t.Fatalf("the first entry is %s", e.Path)
				}
				continue
			}
			if err := modelpack.CheckPath(e.Path); err != nil {
				t.Fatal(err)
			}
			if kinds[path.Dir(e.Path)] != Dir {
				t.Fatalf("%s comes before its folder, or that is none", e.Path)
			}
			if e.Kind == Symlink {
				to := path.Join(path.Dir(e.Path), e.Target)
				if kinds[to] != Blob {
					t.Fatalf("%s leads to %s, which is no file", e.Path, to)
				}
			}
			if strings.HasSuffix(e.Path, ".json") && e.Kind == Inline && !json.Valid(e.Data) {
				t.Fatalf("%s is not JSON", e.Path)
			}
		}
	})
}

// Nobody chose the models of a catalog: one that no revision names gets no name
// that clients ask for by themselves.
func TestACatalogSaysNotWhatMainIs(t *testing.T) {
	t.Parallel()
	unnamed, named := model("org/a", file("f", "one")), model("org/b", file("f", "two"))
	commit := strings.Repeat("1", 40)
	unnamed.Commit, unnamed.Revisions, named.Revisions = commit, []string{commit}, []string{"main"}
	for catalog, want := range map[bool]string{false: "models--org--a/refs/main", true: "models--org--a/refs/larder-" + commit[:12]} {
		tree := plan(t, Spec{Layout: HF, Catalog: catalog, Models: []Model{unnamed, named}})
		var refs []string
		for _, e := range tree.Entries {
			if e.Kind == Inline && strings.Contains(e.Path, "/refs/") {
				refs = append(refs, e.Path)
			}
		}
		if got := []string{want, "models--org--b/refs/main"}; !slices.Equal(refs, got) {
			t.Errorf("catalog %v: refs %v, want %v", catalog, refs, got)
		}
	}
	if tree := plan(t, Spec{Layout: HF, Catalog: true}); len(tree.Entries) != 2 {
		t.Errorf("a catalog of nothing has %v", tree.Entries)
	}
	if _, err := Plan(Spec{Layout: HF}); !errors.Is(err, ErrInvalid) {
		t.Errorf("a view of nothing that is no catalog: %v", err)
	}
}
