package modelpack

import (
	"encoding/json"
	"errors"
	"fmt"
	"runtime"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/opencontainers/go-digest"
)

func file(path, content string) File {
	return File{Path: path, Digest: digest.FromString(content), Size: int64(len(content))}
}

func TestBuildThenParseGivesTheSameModel(t *testing.T) {
	t.Parallel()
	in := Model{
		Source: "hf://org/name", Revision: strings.Repeat("a", 40), Partial: true,
		Files: []File{file("b/weights.safetensors", "1"), {Path: "a.json", Digest: digest.FromString("2"), Size: 1, GitOID: strings.Repeat("0", 40)}},
	}
	manifest, config, err := Build(in)
	if err != nil {
		t.Fatal(err)
	}
	again, _, err := Build(Model{Source: in.Source, Revision: in.Revision, Partial: true, Files: []File{in.Files[1], in.Files[0]}})
	if err != nil {
		t.Fatal(err)
	}
	if string(manifest) != string(again) {
		t.Error("the order in which files are given changes the manifest")
	}
	out, desc, err := Parse(manifest)
	if err != nil {
		t.Fatal(err)
	}
	want := in
	want.Files = []File{in.Files[1], in.Files[0]}
	if diff := cmp.Diff(want, out); diff != "" {
		t.Errorf("model (-want +got):\n%s", diff)
	}
	if desc.Digest != digest.FromBytes(config) || desc.Size != int64(len(config)) {
		t.Errorf("config descriptor %v does not describe the config", desc)
	}
	var c map[string]any
	if err := json.Unmarshal(config, &c); err != nil {
		t.Fatal(err)
	}
	for _, key := range []string{"descriptor", "config", "modelfs"} {
		if _, ok := c[key]; !ok {
			t.Errorf("config lacks %q, which the format requires", key)
		}
	}
}

func TestHostilePathsAreRefused(t *testing.T) {
	t.Parallel()
	for _, p := range []string{
		"", "/etc/passwd", "../x", "a/../../x", "a/..", ".", "./a", "a//b", "a/", "a/./b", "a\x00b", "a\nb", "\x7f",
		`a\b`, `..\x`, "a\xffb", strings.Repeat("a", 256), strings.Repeat("a/", 600) + "b",
	} {
		if err := CheckPath(p); !errors.Is(err, ErrInvalid) {
			t.Errorf("path %q: got %v, want ErrInvalid", p, err)
		}
	}
	for _, p := range []string{"a", "a/b.c", ".gitattributes", "...", "a..b", "sp ace", "ünï", "sha256/x", strings.Repeat("a", 255)} {
		if err := CheckPath(p); err != nil {
			t.Errorf("path %q: %v", p, err)
		}
	}
}

func TestManifestsThatNoModelHasAreRefused(t *testing.T) {
	t.Parallel()
	good, _, err := Build(Model{Files: []File{file("a", "1"), file("b", "2")}})
	if err != nil {
		t.Fatal(err)
	}
	edit := func(f func(m map[string]any)) string {
		var m map[string]any
		if err := json.Unmarshal(good, &m); err != nil {
			t.Fatal(err)
		}
		f(m)
		out, err := json.Marshal(m)
		if err != nil {
			t.Fatal(err)
		}
		return string(out)
	}
	layer := func(m map[string]any, i int) map[string]any { return m["layers"].([]any)[i].(map[string]any) }
	name := func(m map[string]any, i int, path string) {
		layer(m, i)["annotations"] = map[string]any{AnnotationFilepath: path}
	}
	for what, text := range map[string]string{
		"empty":                 "",
		"not JSON":              "{",
		"cut short":             string(good[:len(good)-5]),
		"text behind":           string(good) + "{}",
		"another artifact type": edit(func(m map[string]any) { m["artifactType"] = "application/x" }),
		"another config type":   edit(func(m map[string]any) { m["config"].(map[string]any)["mediaType"] = "application/x" }),
		"schema version 1":      edit(func(m map[string]any) { m["schemaVersion"] = 1 }),
		"no layers":             edit(func(m map[string]any) { m["layers"] = []any{} }),
		"a tar layer":           edit(func(m map[string]any) { layer(m, 0)["mediaType"] = "application/vnd.cncf.model.weight.v1.tar" }),
		"a digest of 3 digits":  edit(func(m map[string]any) { layer(m, 0)["digest"] = "sha256:abc" }),
		"a digest with a path":  edit(func(m map[string]any) { layer(m, 0)["digest"] = "sha256:../../" + strings.Repeat("a", 58) }),
		"sha512":                edit(func(m map[string]any) { layer(m, 0)["digest"] = "sha512:" + strings.Repeat("a", 128) }),
		"a negative size":       edit(func(m map[string]any) { layer(m, 0)["size"] = -1 }),
		"sizes that overflow": edit(func(m map[string]any) {
			layer(m, 0)["size"] = int64(1) << 62
			layer(m, 1)["size"] = int64(1) << 62
			m["layers"] = append(m["layers"].([]any), map[string]any{"mediaType": MediaType("c"), "digest": digest.FromString("3"), "size": int64(1) << 62, "annotations": map[string]any{AnnotationFilepath: "c"}})
		}),
		"one digest, two sizes": edit(func(m map[string]any) { layer(m, 1)["digest"] = layer(m, 0)["digest"]; layer(m, 1)["size"] = 7 }),
		"a path that leaves":    edit(func(m map[string]any) { name(m, 0, "../x") }),
		"an absolute path":      edit(func(m map[string]any) { name(m, 0, "/x") }),
		"a path twice":          edit(func(m map[string]any) { name(m, 0, "b") }),
		"file and folder":       edit(func(m map[string]any) { name(m, 0, "b/c") }),
		"no path":               edit(func(m map[string]any) { layer(m, 0)["annotations"] = nil }),
		"a git id of letters":   edit(func(m map[string]any) { layer(m, 0)["annotations"].(map[string]any)[AnnotationGitOID] = "zz" }),
	} {
		if _, _, err := Parse([]byte(text)); !errors.Is(err, ErrInvalid) {
			t.Errorf("%s: got %v, want ErrInvalid", what, err)
		}
	}
}

func TestAMillionEntriesAreRefused(t *testing.T) {
	t.Parallel()
	head := fmt.Sprintf(`{"schemaVersion":2,"artifactType":%q,"config":{"mediaType":%q,"digest":%q,"size":0},"layers":[`, ArtifactType, MediaTypeConfig, digest.FromString(""))
	// Short enough to be read, and far too many to be kept in memory.
	for what, layer := range map[string]string{"empty": "{}", "annotated": `{"annotations":{}}`} {
		text := head + strings.Repeat(layer+",", 1_000_000) + layer + "]}"
		if len(text) > MaxManifestBytes {
			t.Fatalf("%s: the manifest has %d bytes and is refused for its length", what, len(text))
		}
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		_, _, err := Parse([]byte(text))
		runtime.ReadMemStats(&after)
		if !errors.Is(err, ErrInvalid) {
			t.Errorf("%s: got %v, want ErrInvalid", what, err)
		}
		if n := after.TotalAlloc - before.TotalAlloc; n > 128<<20 {
			t.Errorf("%s: %d MiB were used to refuse it", what, n>>20)
		}
	}
	// So many that they are read, and then counted.
	text := head + strings.Repeat("{},", MaxFiles+1) + "{}]}"
	if _, _, err := Parse([]byte(text)); !errors.Is(err, ErrInvalid) || !strings.Contains(err.Error(), "layers") {
		t.Errorf("one too many: got %v", err)
	}
	files := make([]File, MaxFiles+1)
	for i := range files {
		files[i] = file(fmt.Sprintf("f%d", i), "")
	}
	if _, _, err := Build(Model{Files: files}); !errors.Is(err, ErrInvalid) {
		t.Errorf("build: got %v, want ErrInvalid", err)
	}
}

// A hub that gives long names must not make a version that cannot be read.
func TestWhatIsBuiltCanBeRead(t *testing.T) {
	t.Parallel()
	long := strings.Repeat(strings.Repeat("d", 199)+"/", 5)
	var files []File
	var names []string
	for i := range MaxFiles / 3 {
		name := fmt.Sprintf("%sf%05d", long, i)
		files = append(files, file(name, ""))
		names = append(names, name)
	}
	if _, _, err := Build(Model{Files: files}); !errors.Is(err, ErrInvalid) {
		t.Errorf("build: got %v, want ErrInvalid", err)
	}
	if err := CheckNames(names); !errors.Is(err, ErrInvalid) {
		t.Errorf("the names alone: got %v, want ErrInvalid", err)
	}
	if err := CheckNames(names[:1000]); err != nil {
		t.Errorf("a thousand of them: %v", err)
	}
}

func FuzzParse(f *testing.F) {
	good, _, err := Build(Model{Source: "hf://o/n", Files: []File{file("a/b", "1"), file("c", "2")}})
	if err != nil {
		f.Fatal(err)
	}
	f.Add(good)
	f.Add([]byte(`{"schemaVersion":2}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		m, _, err := Parse(data)
		if err != nil {
			return
		}
		// What is accepted can be written again, and read as the same.
		out, _, err := Build(m)
		if err != nil {
			t.Fatalf("parsed but not built: %v", err)
		}
		again, _, err := Parse(out)
		if err != nil {
			t.Fatalf("built but not parsed: %v", err)
		}
		if diff := cmp.Diff(m, again); diff != "" {
			t.Fatal(diff)
		}
	})
}
