// Package sourcetest checks an implementation of source.Source against the
// contract. Every source runs it.
package sourcetest

import (
	"bytes"
	"context"
	"crypto/sha1"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/larder-project/larder/internal/modelpack"
	"github.com/larder-project/larder/internal/source"
)

// A Factory makes a source that has exactly the given files: content by path.
// Two calls with the same files make equal sources.
type Factory func(t *testing.T, files map[string][]byte) source.Source

// Files is a tree with what trips implementations up: empty files, names that
// need quoting in a URL or look like patterns, folders in folders, and one
// file of some megabytes.
func Files() map[string][]byte {
	big := make([]byte, 3<<20+17)
	_, _ = rand.NewChaCha8([32]byte{1}).Read(big)
	return map[string][]byte{
		"config.json":                 []byte(`{"model_type": "test"}` + "\n"),
		".gitattributes":              []byte("*.safetensors filter=lfs diff=lfs merge=lfs -text\n"),
		"empty":                       {},
		"model.safetensors":           big,
		"sub/deep/er/vocab.txt":       []byte("a\nb\n"),
		"sub/config.json":             []byte("{}\n"),
		"odd/sp ace + plus%20 #?&=;~": []byte("odd\n"),
		"odd/[a-z]*{b}":               []byte("pattern\n"),
		"odd/ünï/日本語.txt":             []byte("utf-8\n"),
		"odd/...":                     []byte("three dots are a name\n"),
		"odd/'quotes\"":               []byte("quotes\n"),
	}
}

// Run checks everything that holds for all sources.
func Run(t *testing.T, open Factory) {
	t.Run("snapshot lists every file with its size", func(t *testing.T) {
		files := Files()
		snap := snapshot(t, open(t, files))
		var got []string
		for _, f := range snap.Files {
			got = append(got, f.Path)
			want := files[f.Path]
			if f.Size != int64(len(want)) {
				t.Errorf("%s: size %d, the file has %d", f.Path, f.Size, len(want))
			}
			if f.SHA256 != "" && string(f.SHA256) != fmt.Sprintf("sha256:%x", sha256.Sum256(want)) {
				t.Errorf("%s: SHA256 %s is not that of the content", f.Path, f.SHA256)
			}
			if f.GitOID != "" && f.GitOID != gitOID(want) {
				t.Errorf("%s: GitOID %s is not that of the content", f.Path, f.GitOID)
			}
		}
		if diff := cmp.Diff(slices.Sorted(maps.Keys(files)), got); diff != "" {
			t.Errorf("paths (-want +got):\n%s", diff)
		}
		if snap.Partial {
			t.Error("snapshot says that files are left out; none is")
		}
		for _, r := range snap.References {
			if !r.Fixed() {
				t.Errorf("reference %s cannot be published", r)
			}
		}
	})

	t.Run("snapshot is stable", func(t *testing.T) {
		src := open(t, Files())
		first := snapshot(t, src)
		if diff := cmp.Diff(first, snapshot(t, src)); diff != "" {
			t.Errorf("second call differs (-first +second):\n%s", diff)
		}
		// Whoever changes what they were given changes nothing for others.
		slices.Reverse(first.Files)
		clear(first.References)
		third := snapshot(t, src)
		if !slices.IsSortedFunc(third.Files, func(a, b source.File) int { return strings.Compare(a.Path, b.Path) }) {
			t.Error("files are not sorted by path, or a caller's change shows")
		}
	})

	t.Run("whole files", func(t *testing.T) {
		files := Files()
		src := open(t, files)
		for _, f := range snapshot(t, src).Files {
			if got := read(t, src, f, 0, f.Size); !bytes.Equal(got, files[f.Path]) {
				t.Errorf("%s: %d bytes that are not the file's", f.Path, len(got))
			}
		}
	})

	t.Run("ranges are exact", func(t *testing.T) {
		files := Files()
		src := open(t, files)
		f := find(t, src, "model.safetensors")
		for _, r := range [][2]int64{
			{0, 1}, {0, 4096}, {1, 1}, {4095, 2}, {f.Size - 1, 1}, {f.Size / 2, f.Size - f.Size/2},
			{1 << 20, 1 << 20}, {17, 0}, {f.Size, 0}, {0, f.Size - 1}, {1, f.Size - 1},
		} {
			want := files[f.Path][r[0] : r[0]+r[1]]
			if got := read(t, src, f, r[0], r[1]); !bytes.Equal(got, want) {
				t.Errorf("[%d, +%d): %d bytes that are not the file's", r[0], r[1], len(got))
			}
		}
	})

	t.Run("a range outside of the file is an error", func(t *testing.T) {
		src := open(t, Files())
		for _, name := range []string{"model.safetensors", "empty", "config.json"} {
			f := find(t, src, name)
			for _, r := range [][2]int64{
				{0, f.Size + 1}, {f.Size, 1}, {f.Size + 1, 0}, {-1, 1}, {0, -1}, {1, f.Size}, {1 << 62, 1 << 62},
			} {
				if rc, err := src.Open(t.Context(), f, r[0], r[1]); err == nil {
					rc.Close()
					t.Errorf("%s: [%d, +%d) was opened, the file has %d bytes", name, r[0], r[1], f.Size)
				}
			}
		}
	})

	t.Run("a file that is not in the snapshot is an error", func(t *testing.T) {
		src := open(t, Files())
		known := find(t, src, "config.json")
		for _, name := range []string{"absent", "sub", "../config.json", "/etc/passwd", "sub/../config.json", ""} {
			f := known
			f.Path = name
			if rc, err := src.Open(t.Context(), f, 0, 1); err == nil {
				rc.Close()
				t.Errorf("%q was opened", name)
			}
			if local, ok := src.(source.Local); ok {
				if file, err := local.OpenFile(f); err == nil {
					file.Close()
					t.Errorf("%q was opened as a local file", name)
				}
			}
		}
	})

	t.Run("many readers at once", func(t *testing.T) {
		files := Files()
		src := open(t, files)
		f := find(t, src, "model.safetensors")
		const parts = 16
		got := make([][]byte, parts)
		var wg sync.WaitGroup
		step := f.Size/parts + 1
		for i := range parts {
			wg.Go(func() {
				from := int64(i) * step
				got[i] = read(t, src, f, from, min(step, f.Size-from))
			})
		}
		wg.Wait()
		if !bytes.Equal(bytes.Join(got, nil), files[f.Path]) {
			t.Error("parts read at once do not make up the file")
		}
	})

	t.Run("a reader that is closed early", func(t *testing.T) {
		src := open(t, Files())
		f := find(t, src, "model.safetensors")
		rc, err := src.Open(t.Context(), f, 0, f.Size)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadFull(rc, make([]byte, 100)); err != nil {
			t.Fatal(err)
		}
		if err := rc.Close(); err != nil {
			t.Errorf("close in the middle: %v", err)
		}
		if n, err := rc.Read(make([]byte, 10)); n != 0 || err == nil || err == io.EOF {
			t.Errorf("read after close: %d bytes, error %v", n, err)
		}
	})

	t.Run("a cancelled context stops", func(t *testing.T) {
		src := open(t, Files())
		f := find(t, src, "model.safetensors")

		ctx, cancel := context.WithCancel(t.Context())
		rc, err := src.Open(ctx, f, 0, f.Size)
		if err != nil {
			t.Fatal(err)
		}
		defer rc.Close()
		if _, err := io.ReadFull(rc, make([]byte, 100)); err != nil {
			t.Fatal(err)
		}
		cancel()
		if _, err := io.Copy(io.Discard, rc); !errors.Is(err, context.Canceled) {
			t.Errorf("read after cancel: error %v, want context.Canceled", err)
		}
		if rc, err := src.Open(ctx, f, 0, f.Size); err == nil {
			_, err = io.Copy(io.Discard, rc)
			rc.Close()
			if !errors.Is(err, context.Canceled) {
				t.Errorf("open and read after cancel: error %v, want context.Canceled", err)
			}
		} else if !errors.Is(err, context.Canceled) {
			t.Errorf("open after cancel: error %v, want context.Canceled", err)
		}
		if _, err := open(t, Files()).Snapshot(ctx); !errors.Is(err, context.Canceled) {
			t.Errorf("snapshot after cancel: error %v, want context.Canceled", err)
		}
	})

	t.Run("a snapshot that was cancelled can be asked for again", func(t *testing.T) {
		src := open(t, Files())
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		if _, err := src.Snapshot(ctx); !errors.Is(err, context.Canceled) {
			t.Errorf("error %v, want context.Canceled", err)
		}
		if n := len(snapshot(t, src).Files); n != len(Files()) {
			t.Errorf("%d files afterwards, want %d", n, len(Files()))
		}
	})

	t.Run("local files are the files", func(t *testing.T) {
		files := Files()
		src := open(t, files)
		local, ok := src.(source.Local)
		if !ok {
			return // a remote source has none
		}
		for _, f := range snapshot(t, src).Files {
			file, err := local.OpenFile(f)
			if err != nil {
				t.Errorf("%s: %v", f.Path, err)
				continue
			}
			got, err := io.ReadAll(file)
			file.Close()
			if err != nil || !bytes.Equal(got, files[f.Path]) {
				t.Errorf("%s: %d bytes that are not the file's, error %v", f.Path, len(got), err)
			}
		}
	})
}

// RunHostile checks that unsafe paths do not come out: either the snapshot is
// refused or the path is left out. The factory gives nil where its source
// cannot have such a path at all.
func RunHostile(t *testing.T, open Factory) {
	for _, name := range []string{
		"../out", "a/../../out", "/abs", "a//b", "./a", "a/.", "..", ".", "a/", "", `a\b`, `..\out`, "a\x00b", "a\nb", "a\x7f",
		"\xff\xfe", strings.Repeat("x", 256), strings.Repeat("d/", 600) + "f",
	} {
		t.Run(fmt.Sprintf("%.40q", name), func(t *testing.T) {
			src := open(t, map[string][]byte{"config.json": []byte("{}"), name: []byte("x")})
			if src == nil {
				return
			}
			snap, err := src.Snapshot(t.Context())
			if err != nil {
				return
			}
			for _, f := range snap.Files {
				if err := modelpack.CheckPath(f.Path); err != nil {
					t.Error(err)
				}
			}
		})
	}
}

func snapshot(t *testing.T, src source.Source) source.Snapshot {
	t.Helper()
	snap, err := src.Snapshot(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return snap
}

func find(t *testing.T, src source.Source, name string) source.File {
	t.Helper()
	snap := snapshot(t, src)
	i := slices.IndexFunc(snap.Files, func(f source.File) bool { return f.Path == name })
	if i < 0 {
		t.Fatalf("no %s in the snapshot", name)
	}
	return snap.Files[i]
}

// read runs in other goroutines too, so it must not end the test.
func read(t *testing.T, src source.Source, f source.File, offset, length int64) []byte {
	t.Helper()
	rc, err := src.Open(t.Context(), f, offset, length)
	if err != nil {
		t.Errorf("open %s [%d, +%d): %v", f.Path, offset, length, err)
		return nil
	}
	defer rc.Close()
	got, err := io.ReadAll(rc)
	if err != nil {
		t.Errorf("read %s [%d, +%d): %v", f.Path, offset, length, err)
	}
	return got
}

func gitOID(content []byte) string {
	h := sha1.New()
	fmt.Fprintf(h, "blob %d\x00", len(content))
	h.Write(content)
	return hex.EncodeToString(h.Sum(nil))
}
