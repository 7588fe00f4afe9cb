package modelpack

import (
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"
)

func digestsOf(doc []byte) []string {
	var out []string
	EachDigest(doc, func(hex []byte, _ int64) { out = append(out, "sha256:"+string(hex)) })
	return out
}

func TestEachDigestFindsConfigAndLayers(t *testing.T) {
	t.Parallel()
	m := Model{Source: "hf://o/n", Files: []File{file("a", "1"), file("b", "2"), file("c", "1")}}
	manifest, config, err := Build(m)
	if err != nil {
		t.Fatal(err)
	}
	want := []string{digest.FromBytes(config).String(), digest.FromString("1").String(), digest.FromString("2").String(), digest.FromString("1").String()}
	if got := digestsOf(manifest); !slices.Equal(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
	sizes := map[string]int64{}
	EachDigest(manifest, func(hex []byte, size int64) { sizes[string(hex)] = size })
	if got := sizes[digest.FromBytes(config).Encoded()]; got != int64(len(config)) {
		t.Errorf("the config's size is %d, want %d", got, len(config))
	}
	for _, f := range m.Files {
		if got := sizes[f.Digest.Encoded()]; got != f.Size {
			t.Errorf("size of %s is %d, want %d", f.Path, got, f.Size)
		}
	}
	escaped := strings.Replace(string(manifest), `"sha256:`, `"sha\u0032\u0035\u0036:`, 2)
	if got := digestsOf([]byte(escaped)); !slices.Equal(got, want) {
		t.Errorf("with escapes: got %v, want %v", got, want)
	}
}

func TestEachDigestPassesOverWhatIsNone(t *testing.T) {
	t.Parallel()
	d := digest.FromString("x").Encoded()
	for _, doc := range []string{
		`["sha256:` + d[:63] + `"]`, `["sha256:` + d + `0"]`, `["sha256:` + strings.ToUpper(d) + `"]`, `["xsha256:` + d + `"]`, `["sha256:` + d, `"sha256:`, ``,
	} {
		if got := digestsOf([]byte(doc)); len(got) > 0 {
			t.Errorf("%q: %v", doc, got)
		}
	}
}

func TestSizeThatCannotBeReadIsNone(t *testing.T) {
	t.Parallel()
	d := `"sha256:` + digest.FromString("x").Encoded() + `"`
	for after, want := range map[string]int64{`,"size":7}`: 7, `,"size":0,"x":1}`: 0, `,"size":-7}`: -1, `,"size":7.5}`: -1, `,"size":}`: -1, `,"size":12345678901234567890}`: -1, `, "size":7}`: -1, `}`: -1, `,"size":7`: -1} {
		EachDigest([]byte(`{"digest":`+d+after), func(_ []byte, size int64) {
			if size != want {
				t.Errorf("%s: %d, want %d", after, size, want)
			}
		})
	}
}

// Whatever Parse finds in a manifest, EachDigest finds too: what it misses
// would be taken for unused.
func FuzzEachDigestMissesNothing(f *testing.F) {
	good, _, err := Build(Model{Files: []File{file("a/b", "1"), file("c", "2")}})
	if err != nil {
		f.Fatal(err)
	}
	f.Add(good)
	f.Add([]byte(strings.Replace(string(good), `"sha256:`, `"sha256\u003a`, 1)))
	f.Add([]byte(strings.Replace(string(good), `{`, `{"annotations":{"x":"\\"},`, 1)))
	f.Fuzz(func(t *testing.T, data []byte) {
		m, config, err := Parse(data)
		if err != nil {
			return
		}
		got := digestsOf(data)
		for _, d := range append([]digest.Digest{config.Digest}, filesDigests(m)...) {
			if !slices.Contains(got, d.String()) {
				t.Errorf("%s is not found in %s", d, data)
			}
		}
	})
}

func filesDigests(m Model) []digest.Digest {
	var out []digest.Digest
	for _, f := range m.Files {
		out = append(out, f.Digest)
	}
	return out
}

func BenchmarkEachDigest(b *testing.B) {
	var m Model
	for i := range 100 {
		m.Files = append(m.Files, file(fmt.Sprintf("model-%05d-of-00100.safetensors", i), fmt.Sprint(i)))
	}
	manifest, _, err := Build(m)
	if err != nil {
		b.Fatal(err)
	}
	b.SetBytes(int64(len(manifest)))
	for b.Loop() {
		EachDigest(manifest, func([]byte, int64) {})
	}
}
