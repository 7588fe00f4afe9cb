package pull

import (
	"bytes"
	"context"
	"crypto/sha1"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/opencontainers/go-digest"

	"github.com/larder-project/larder/internal/reference"
	"github.com/larder-project/larder/internal/source"
	"github.com/larder-project/larder/internal/store"
	"github.com/larder-project/larder/internal/testenv"
)

// TestMain makes files of some 100 KiB count as large ones, so that tests
// reach the ranges, the resuming and the saving of progress.
func TestMain(m *testing.M) {
	largeFile, pieceSize, saveEvery = 256<<10, 64<<10, 128<<10
	if code, ok := helper(); ok {
		os.Exit(code)
	}
	os.Exit(testenv.PrivateMounts(func() int {
		defer func() { _ = os.RemoveAll(faultyDir) }()
		return m.Run()
	}))
}

// noise is n bytes that are always the same for a seed.
func noise(seed uint64, n int) []byte {
	rng := rand.New(rand.NewPCG(seed, 7))
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(rng.Uint32())
	}
	return b
}

func gitOID(b []byte) string {
	h := sha1.New()
	fmt.Fprintf(h, "blob %d\x00", len(b))
	h.Write(b)
	return hex.EncodeToString(h.Sum(nil))
}

func ref(t testing.TB, s string) reference.Reference {
	t.Helper()
	r, err := reference.Parse(s)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// sampleFiles is a model as a hub has it: large files known by SHA-256, small
// ones by git id, two of the same content.
func sampleFiles() map[string][]byte {
	return map[string][]byte{
		"model-1.safetensors": noise(1, 1<<20+4097),
		"model-2.safetensors": noise(2, 300<<10),
		"tokenizer.model":     noise(3, 90<<10),
		"config.json":         []byte(`{"model_type": "test"}`),
		"sub/config.json":     []byte(`{"model_type": "test"}`),
		".gitattributes":      []byte("*.safetensors filter=lfs\n"),
		"empty":               {},
	}
}

func isLFS(name string) bool {
	return strings.HasSuffix(name, ".safetensors") || strings.HasSuffix(name, ".model")
}

// fake is a hub in memory, with a hook on each request.
type fake struct {
	files map[string][]byte
	snap  source.Snapshot

	mu    sync.Mutex
	calls map[string]int
	bytes int64 // handed out
	hook  func(call int, f source.File, offset, length int64, body []byte) (io.Reader, error)
}

func newFake(t testing.TB, files map[string][]byte, name string) *fake {
	f := &fake{files: files, calls: map[string]int{}}
	r := ref(t, name)
	f.snap = source.Snapshot{Source: r.Source(), Revision: strings.Repeat("c", 40), References: []reference.Reference{r}}
	for _, p := range slices.Sorted(maps.Keys(files)) {
		sf := source.File{Path: p, Size: int64(len(files[p]))}
		if isLFS(p) {
			sf.SHA256 = digest.FromBytes(files[p])
		} else {
			sf.GitOID = gitOID(files[p])
		}
		f.snap.Files = append(f.snap.Files, sf)
	}
	return f
}

func (f *fake) Snapshot(context.Context) (source.Snapshot, error) { return f.snap, nil }

func (f *fake) Open(_ context.Context, sf source.File, offset, length int64) (io.ReadCloser, error) {
	f.mu.Lock()
	f.calls[sf.Path]++
	call := f.calls[sf.Path]
	f.mu.Unlock()
	body := f.files[sf.Path][offset : offset+length]
	var r io.Reader = bytes.NewReader(body)
	if f.hook != nil {
		var err error
		if r, err = f.hook(call, sf, offset, length, body); err != nil {
			return nil, err
		}
	}
	return io.NopCloser(&counting{f, r}), nil
}

type counting struct {
	f *fake
	r io.Reader
}

func (c *counting) Read(p []byte) (int, error) {
	n, err := c.r.Read(p)
	c.f.mu.Lock()
	c.f.bytes += int64(n)
	c.f.mu.Unlock()
	return n, err
}

func openStore(t testing.TB, dir string) *store.Store {
	t.Helper()
	st, err := store.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	return st
}

func total(files map[string][]byte) (n int64) {
	seen := map[string]bool{}
	for _, b := range files {
		if !seen[string(b)] {
			seen[string(b)] = true
			n += int64(len(b))
		}
	}
	return n
}

// checkVersion reads a published version and compares every byte of it.
func checkVersion(t testing.TB, st *store.Store, name string, files map[string][]byte) {
	t.Helper()
	v, err := st.Resolve(ref(t, name))
	if err != nil {
		t.Fatalf("resolve %s: %v", name, err)
	}
	m, err := st.Model(v.Digest)
	if err != nil {
		t.Fatal(err)
	}
	got := map[string]string{}
	for _, f := range m.Files {
		b, err := os.ReadFile(st.BlobPath(f.Digest))
		if err != nil {
			t.Fatal(err)
		}
		if digest.FromBytes(b) != f.Digest {
			t.Errorf("%s: blob %s has other bytes", f.Path, f.Digest)
		}
		got[f.Path] = string(b)
	}
	for p, b := range files {
		if got[p] != string(b) {
			t.Errorf("%s: %d bytes that are not the file's", p, len(got[p]))
		}
		delete(got, p)
	}
	if len(got) > 0 {
		t.Errorf("files that the source does not have: %v", slices.Sorted(maps.Keys(got)))
	}
}

// leftovers lists what is in the store's ingest folder.
func leftovers(t testing.TB, st *store.Store) []string {
	t.Helper()
	entries, err := os.ReadDir(filepath.Join(st.Dir(), "ingest"))
	if err != nil {
		t.Fatal(err)
	}
	var out []string
	for _, e := range entries {
		out = append(out, e.Name())
	}
	return out
}

// recorder checks what a Progress is told.
type recorder struct {
	mu    sync.Mutex
	plan  *Plan
	bytes map[string]int64
	had   map[string]int64 // of bytes
	done  map[string]How
	waits map[string]int
	wrong []string
}

func newRecorder() *recorder {
	return &recorder{bytes: map[string]int64{}, had: map[string]int64{}, done: map[string]How{}, waits: map[string]int{}}
}

func (p *recorder) Start(plan Plan) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.plan != nil {
		p.wrong = append(p.wrong, "Start came twice")
	}
	p.plan = &plan
}

func (p *recorder) Wait(path string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.waits[path]++
}

func (p *recorder) Bytes(path string, n int64) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.plan == nil {
		p.wrong = append(p.wrong, "Bytes came before Start")
	}
	p.bytes[path] += n
	if p.bytes[path] < 0 {
		p.wrong = append(p.wrong, fmt.Sprintf("%s has %d bytes", path, p.bytes[path]))
	}
	if n < 0 {
		p.had[path] = 0 // all of the file is taken back
	}
}

func (p *recorder) Have(path string, n int64) {
	p.Bytes(path, n)
	p.mu.Lock()
	defer p.mu.Unlock()
	p.had[path] += n
}

func (p *recorder) Done(path string, how How) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.done[path] = how
}

func (p *recorder) finished() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return len(p.done)
}

// check compares the sums with the plan and the result of a pull that
// succeeded.
func (p *recorder) check(t testing.TB, res Result) {
	t.Helper()
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, w := range p.wrong {
		t.Errorf("progress: %s", w)
	}
	for _, f := range p.plan.Files {
		_, done := p.done[f.Path]
		switch {
		case f.Have && (done || p.bytes[f.Path] != 0):
			t.Errorf("progress: %s was there, and yet is reported", f.Path)
		case !f.Have && !done:
			t.Errorf("progress: %s is not reported as done", f.Path)
		case !f.Have && p.bytes[f.Path] != f.Size:
			t.Errorf("progress: %s has %d bytes, %d were reported", f.Path, f.Size, p.bytes[f.Path])
		}
	}
	var resumed int64
	for path, n := range p.had {
		if p.done[path] != Reused {
			resumed += n
		}
	}
	if resumed != res.Resumed {
		t.Errorf("progress: %d bytes are said to be of an earlier attempt, it left %d", resumed, res.Resumed)
	}
}

func mustRun(t testing.TB, st *store.Store, src source.Source, o Options) Result {
	t.Helper()
	rec := newRecorder()
	o.Node, o.Progress = "test", rec
	res, err := Run(context.Background(), st, src, o)
	if err != nil {
		t.Fatal(err)
	}
	rec.check(t, res)
	if left := leftovers(t, st); len(left) > 0 {
		t.Errorf("a pull that succeeded leaves %v in ingest", left)
	}
	return res
}

const name = "hf://org/model@main"

func TestPull(t *testing.T) {
	for _, jobs := range []int{1, 8} {
		t.Run(fmt.Sprintf("%d connections", jobs), func(t *testing.T) {
			st := openStore(t, t.TempDir())
			files := sampleFiles()
			src := newFake(t, files, name)
			res := mustRun(t, st, src, Options{Jobs: jobs})
			checkVersion(t, st, name, files)
			if res.Fetched != total(files) || res.Reused != 0 || res.Unchanged || src.bytes != total(files) {
				t.Errorf("fetched %d (of the source %d), reused %d, unchanged %v; want %d, 0, false", res.Fetched, src.bytes, res.Reused, res.Unchanged, total(files))
			}
			if len(res.Files) != len(files) {
				t.Errorf("result lists %d files, the model has %d", len(res.Files), len(files))
			}
			for _, f := range res.Model.Files {
				want := gitOID(files[f.Path])
				if isLFS(f.Path) {
					want = ""
				}
				if f.GitOID != want {
					t.Errorf("%s: git id %q is recorded, want %q", f.Path, f.GitOID, want)
				}
			}

			again := mustRun(t, st, src, Options{Jobs: jobs})
			if !again.Unchanged || again.Fetched != 0 || again.Reused != total(files) || again.Version.Digest != res.Version.Digest {
				t.Errorf("a second pull: %+v", again)
			}
			if src.bytes != total(files) {
				t.Errorf("a second pull read %d bytes", src.bytes-total(files))
			}
		})
	}
}

func TestPullReusesOtherModels(t *testing.T) {
	st := openStore(t, t.TempDir())
	files := sampleFiles()
	mustRun(t, st, newFake(t, files, name), Options{})
	files["model-2.safetensors"] = noise(9, 310<<10)
	files["renamed.json"] = files["config.json"]
	delete(files, "sub/config.json")
	src := newFake(t, files, "hf://other/name@v2")
	res := mustRun(t, st, src, Options{})
	if want := int64(310 << 10); src.bytes != want || res.Fetched != want {
		t.Errorf("%d bytes were asked for, only one file of %d is new", src.bytes, want)
	}
	checkVersion(t, st, "hf://other/name@v2", files)
	checkVersion(t, st, name, sampleFiles())
}

// What of an earlier, unpublished pull is complete is found by its content,
// also where only the git id is known.
func TestPullFindsUnpublishedBlobs(t *testing.T) {
	st := openStore(t, t.TempDir())
	files := sampleFiles()
	src := newFake(t, files, name)
	rec := newRecorder()
	src.hook = func(_ int, f source.File, offset, length int64, body []byte) (io.Reader, error) {
		if f.Path == "model-1.safetensors" && offset+length == f.Size {
			// The end of the largest file fails when all others are done.
			for deadline := time.Now().Add(10 * time.Second); rec.finished() < 5 && time.Now().Before(deadline); {
				time.Sleep(time.Millisecond)
			}
			return nil, source.ErrUnavailable
		}
		return bytes.NewReader(body), nil
	}
	if _, err := Run(t.Context(), st, src, Options{Node: "test", Progress: rec}); !errors.Is(err, source.ErrUnavailable) {
		t.Fatalf("error %v, want source.ErrUnavailable", err)
	}
	if versions, err := st.Versions(); err != nil || len(versions) > 0 {
		t.Fatalf("after a failed pull: versions %v, %v", versions, err)
	}
	src = newFake(t, files, name)
	mustRun(t, st, src, Options{})
	if len(src.calls) != 1 || src.calls["model-1.safetensors"] == 0 {
		t.Errorf("files were asked for that had come: %v", src.calls)
	}
	checkVersion(t, st, name, files)
}

func TestPullResumesLargeFile(t *testing.T) {
	for _, boot := range []string{"this boot", "another boot", "another boot, lost bytes", "damaged record", "damaged bytes"} {
		t.Run(boot, func(t *testing.T) {
			st := openStore(t, t.TempDir())
			files := map[string][]byte{"model.safetensors": noise(4, 2<<20)}
			size := int64(2 << 20)
			src := newFake(t, files, name)
			ctx, cancel := context.WithCancel(t.Context())
			src.hook = func(call int, _ source.File, offset, _ int64, body []byte) (io.Reader, error) {
				if offset >= 1<<20 {
					cancel()
					return nil, errors.New("the process is stopped here")
				}
				return bytes.NewReader(body), nil
			}
			if _, err := Run(ctx, st, src, Options{Node: "test", Jobs: 2}); err == nil {
				t.Fatal("a cancelled pull succeeded")
			}
			partial := filepath.Join(st.Dir(), "ingest", "sha256-"+digest.FromBytes(files["model.safetensors"]).Encoded())
			record, err := os.ReadFile(partial + ".progress")
			if err != nil {
				t.Fatal(err)
			}
			fromZero := false
			edit := func(f func(b []byte)) {
				b, err := os.ReadFile(partial)
				if err != nil {
					t.Fatal(err)
				}
				f(b)
				if err := os.WriteFile(partial, b, 0o644); err != nil {
					t.Fatal(err)
				}
			}
			switch {
			case strings.HasPrefix(boot, "another boot"):
				record = bytes.Replace(record, []byte(bootID()), []byte("another"), 1)
				if strings.HasSuffix(boot, "lost bytes") {
					edit(func(b []byte) { clear(b[8192:16384]) })
				}
			case boot == "damaged record":
				record, fromZero = record[:len(record)/2], true
			case boot == "damaged bytes":
				edit(func(b []byte) { // in each piece: which of them came is not sure
					for i := 17; i < len(b); i += int(pieceSize) {
						b[i]++
					}
				})
				fromZero = true
			}
			if err := os.WriteFile(partial+".progress", record, 0o644); err != nil {
				t.Fatal(err)
			}
			src = newFake(t, files, name)
			res := mustRun(t, st, src, Options{})
			checkVersion(t, st, name, files)
			if res.Fetched+res.Resumed != size {
				t.Errorf("fetched %d and resumed %d of %d bytes", res.Fetched, res.Resumed, size)
			}
			switch {
			case fromZero && src.bytes < size:
				t.Errorf("only %d of %d bytes were asked for, and the partial file was damaged", src.bytes, size)
			case !fromZero && (res.Resumed < size/4 || src.bytes != res.Fetched):
				t.Errorf("resumed %d of %d bytes, asked for %d", res.Resumed, size, src.bytes)
			}
		})
	}
}

// short gives all but the last byte, long one more, cut fails in the middle.
func short(body []byte) io.Reader { return bytes.NewReader(body[:len(body)-1]) }
func long(body []byte) io.Reader  { return bytes.NewReader(append(bytes.Clone(body), 0)) }
func cutOff(body []byte) io.Reader {
	return io.MultiReader(bytes.NewReader(body[:len(body)/2]), errReader{errors.New("connection reset by peer")})
}

func flipped(body []byte) io.Reader {
	b := bytes.Clone(body)
	b[len(b)/2] ^= 1
	return bytes.NewReader(b)
}

type errReader struct{ err error }

func (e errReader) Read([]byte) (int, error) { return 0, e.err }

func TestPullFaults(t *testing.T) {
	tests := []struct {
		name   string
		body   func([]byte) io.Reader
		open   error
		calls  int   // how many first calls are bad; 0: all
		err    error // nil: the pull succeeds
		says   string
		atMost int // calls for the file
	}{
		{name: "short once", body: short, calls: 1, atMost: 2},
		{name: "short always", body: short, err: source.ErrChanged, says: "ends at byte", atMost: 40},
		{name: "long once", body: long, calls: 1, atMost: 3},
		{name: "long always", body: long, err: source.ErrChanged, says: "more bytes came", atMost: 40},
		{name: "connection breaks once", body: cutOff, calls: 1, atMost: 2},
		{name: "wrong byte once", body: flipped, calls: 1, atMost: 2},
		{name: "wrong byte always", body: flipped, err: source.ErrChanged, says: "was promised", atMost: 2},
		{name: "gone", open: source.ErrNotFound, err: source.ErrNotFound, atMost: 1},
		{name: "gated", open: source.ErrGated, err: source.ErrGated, atMost: 1},
		{name: "not authorized", open: source.ErrUnauthorized, err: source.ErrUnauthorized, atMost: 1},
		{name: "not reachable", open: source.ErrUnavailable, err: source.ErrUnavailable, atMost: 1},
		{name: "commit changed", open: source.ErrChanged, err: source.ErrChanged, atMost: maxTries},
	}
	for _, target := range []string{"config.json", "tokenizer.model", "model-1.safetensors"} {
		for _, tt := range tests {
			t.Run(target+"/"+tt.name, func(t *testing.T) {
				t.Parallel()
				st := openStore(t, t.TempDir())
				files := sampleFiles()
				src := newFake(t, files, name)
				var mu sync.Mutex
				bad := 0
				src.hook = func(_ int, f source.File, _, length int64, body []byte) (io.Reader, error) {
					mu.Lock()
					defer mu.Unlock()
					if f.Path != target || tt.calls > 0 && bad >= tt.calls {
						return bytes.NewReader(body), nil
					}
					bad++
					if tt.open != nil {
						return nil, tt.open
					}
					return tt.body(body), nil
				}
				ranges := 1
				if int64(len(files[target])) > largeFile {
					ranges = int(int64(len(files[target]))/pieceSize) + 1
				}
				_, err := Run(t.Context(), st, src, Options{Node: "test"})
				if n := src.calls[target]; n > tt.atMost*ranges {
					t.Errorf("%d calls, at most %d a range are allowed", n, tt.atMost)
				}
				if tt.err == nil {
					if err != nil {
						t.Fatal(err)
					}
					checkVersion(t, st, name, files)
					return
				}
				if !errors.Is(err, tt.err) || !strings.Contains(err.Error(), tt.says) {
					t.Fatalf("error %v, want %v", err, tt.err)
				}
				if versions, err := st.Versions(); err != nil || len(versions) > 0 {
					t.Errorf("after a failed pull: versions %v, %v", versions, err)
				}
				if _, ok, err := st.Stat(digest.FromBytes(files[target])); ok || err != nil {
					t.Errorf("the file that failed is in the store (%v)", err)
				}
				src.hook = nil
				mustRun(t, st, src, Options{})
				checkVersion(t, st, name, files)
			})
		}
	}
}

func TestPullLyingSizes(t *testing.T) {
	files := sampleFiles()
	for _, target := range []string{"config.json", "model-1.safetensors"} {
		for _, by := range []int64{-1, 1, 1 << 50} {
			t.Run(fmt.Sprintf("%s %+d", target, by), func(t *testing.T) {
				st := openStore(t, t.TempDir())
				src := newFake(t, files, name)
				for i := range src.snap.Files {
					if f := &src.snap.Files[i]; f.Path == target || target == "config.json" && f.Path == "sub/config.json" {
						f.Size += by
					}
				}
				src.hook = func(_ int, f source.File, offset, length int64, _ []byte) (io.Reader, error) { return nil, nil }
				lying := &lyingFake{src}
				_, err := Run(t.Context(), st, lying, Options{Node: "test"})
				want := source.ErrChanged
				if by == 1<<50 {
					want = store.ErrFull // 1 PiB: found before anything is asked for
				}
				if !errors.Is(err, want) {
					t.Fatalf("error %v, want %v", err, want)
				}
				if want == store.ErrFull && len(src.calls) > 0 {
					t.Errorf("files were asked for: %v", src.calls)
				}
			})
		}
	}
}

// lyingFake serves what there is of a range that is larger than the file.
type lyingFake struct{ *fake }

func (l *lyingFake) Open(_ context.Context, f source.File, offset, length int64) (io.ReadCloser, error) {
	l.mu.Lock()
	l.calls[f.Path]++
	l.mu.Unlock()
	b := l.files[f.Path]
	return io.NopCloser(bytes.NewReader(b[min(offset, int64(len(b))):])), nil
}

func TestPlanRefuses(t *testing.T) {
	sum := digest.FromString("x")
	tests := []struct {
		name  string
		files []source.File
	}{
		{"nothing", nil},
		{"a path out of the model", []source.File{{Path: "../x", SHA256: sum}}},
		{"a path twice", []source.File{{Path: "x", SHA256: sum}, {Path: "x", SHA256: sum}}},
		{"a file that is a folder", []source.File{{Path: "x", SHA256: sum}, {Path: "x/y", SHA256: sum}}},
		{"a negative size", []source.File{{Path: "x", SHA256: sum, Size: -1}}},
		{"sizes that overflow", []source.File{{Path: "x", SHA256: sum, Size: 1 << 62}, {Path: "y", GitOID: gitOID(nil), Size: 1 << 62}, {Path: "z", Size: 1 << 62}}},
		{"one content of two sizes", []source.File{{Path: "x", SHA256: sum, Size: 1}, {Path: "y", SHA256: sum, Size: 2}}},
		{"a digest of another kind", []source.File{{Path: "x", SHA256: "sha512:00"}}},
		{"a digest with a path in it", []source.File{{Path: "x", SHA256: "sha256:../../../etc/passwd"}}},
		{"a git id with a path in it", []source.File{{Path: "x", GitOID: "../../x"}}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			_, err := plan(source.Snapshot{Files: tt.files, References: []reference.Reference{ref(t, name)}})
			if !errors.Is(err, source.ErrInvalid) {
				t.Errorf("error %v, want source.ErrInvalid", err)
			}
		})
	}
}

func TestPlanGroupsEqualFiles(t *testing.T) {
	sum := digest.FromString("x")
	items, err := plan(source.Snapshot{
		Files: []source.File{
			{Path: "a", SHA256: sum, Size: 1}, {Path: "b", SHA256: sum, Size: 1},
			{Path: "c", GitOID: gitOID(nil)}, {Path: "d", GitOID: gitOID(nil)},
			{Path: "e", Size: 1}, {Path: "f", Size: 1},
		},
		References: []reference.Reference{ref(t, name)},
	})
	if err != nil {
		t.Fatal(err)
	}
	var got [][]string
	for _, it := range items {
		got = append(got, it.paths)
	}
	if diff := cmp.Diff([][]string{{"a", "b"}, {"c", "d"}, {"e"}, {"f"}}, got); diff != "" {
		t.Errorf("groups (-want +got):\n%s", diff)
	}
}

// Two pulls of one model in one store: each file is fetched once, and both
// succeed.
func TestPullTwice(t *testing.T) {
	dir := t.TempDir()
	files := sampleFiles()
	src := newFake(t, files, name)
	src.hook = func(_ int, _ source.File, _, _ int64, body []byte) (io.Reader, error) {
		time.Sleep(20 * time.Millisecond)
		return bytes.NewReader(body), nil
	}
	openStore(t, dir)
	var wg sync.WaitGroup
	for range 3 {
		st := openStore(t, dir)
		wg.Go(func() {
			if _, err := Run(t.Context(), st, src, Options{Node: "test"}); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	checkVersion(t, openStore(t, dir), name, files)
	var lfs int64
	for p, b := range files {
		if isLFS(p) {
			lfs += int64(len(b))
		}
	}
	if src.bytes > total(files)+3*(total(files)-lfs) {
		t.Errorf("%d bytes were asked for; files known by digest (%d bytes) are to come once", src.bytes, lfs)
	}
}
