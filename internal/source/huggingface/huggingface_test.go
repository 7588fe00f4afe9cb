package huggingface

import (
	"bytes"
	"context"
	"crypto/sha1"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/larder-project/larder/internal/modelpack"
	"github.com/larder-project/larder/internal/reference"
	"github.com/larder-project/larder/internal/source"
	"github.com/larder-project/larder/internal/source/huggingface/hubtest"
	"github.com/larder-project/larder/internal/source/sourcetest"
	"github.com/opencontainers/go-digest"
	"go.uber.org/goleak"
)

const (
	repo    = "acme/tiny"
	weights = "model.safetensors"
	config  = "config.json"
)

// content is n bytes that no other n has.
func content(n int) []byte {
	b := make([]byte, n)
	_, _ = rand.NewChaCha8([32]byte{byte(n), byte(n >> 8), byte(n >> 16)}).Read(b)
	return b
}

func sha256Hex(b []byte) string {
	h := sha256.Sum256(b)
	return hex.EncodeToString(h[:])
}

func gitOID(b []byte) string {
	h := sha1.New()
	fmt.Fprintf(h, "blob %d\x00", len(b))
	h.Write(b)
	return hex.EncodeToString(h.Sum(nil))
}

// tiny has one small file and weights of four MiB.
func tiny() map[string][]byte {
	return map[string][]byte{config: []byte("{}\n"), weights: content(4<<20 + 5)}
}

// serve starts a hub with the repository acme/tiny.
func serve(t *testing.T, o hubtest.Options) *hubtest.Server {
	t.Helper()
	hub := hubtest.Start(t, o)
	if _, err := hub.Repo(repo).CommitMap("main", tiny()); err != nil {
		t.Fatal(err)
	}
	return hub
}

// connect makes a source with short waits. change may be nil.
func connect(t *testing.T, hub *hubtest.Server, change func(*Options)) *Source {
	t.Helper()
	o := Options{Endpoint: hub.URL, Repo: repo, Backoff: time.Millisecond, Idle: 10 * time.Second}
	if change != nil {
		change(&o)
	}
	s, err := New(o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if c, ok := s.client.transport.(*http.Transport); ok {
			c.CloseIdleConnections()
		}
	})
	return s
}

func mustSnapshot(t *testing.T, s *Source) source.Snapshot {
	t.Helper()
	snap, err := s.Snapshot(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return snap
}

func file(t *testing.T, s *Source, path string) source.File {
	t.Helper()
	snap := mustSnapshot(t, s)
	i := slices.IndexFunc(snap.Files, func(f source.File) bool { return f.Path == path })
	if i < 0 {
		t.Fatalf("no file %s", path)
	}
	return snap.Files[i]
}

func readRange(ctx context.Context, s *Source, f source.File, off, n int64) ([]byte, error) {
	rc, err := s.Open(ctx, f, off, n)
	if err != nil {
		return nil, err
	}
	defer rc.Close()
	return io.ReadAll(rc)
}

func readAll(t *testing.T, s *Source, path string) ([]byte, error) {
	t.Helper()
	f := file(t, s, path)
	return readRange(t.Context(), s, f, 0, f.Size)
}

func TestConformance(t *testing.T) {
	for name, o := range map[string]hubtest.Options{
		"as the real hub":                {},
		"everything in LFS":              {LFSThreshold: 1},
		"nothing in LFS":                 {LFSThreshold: -1},
		"no second host":                 {Direct: true},
		"pages of two":                   {PageSize: 2},
		"links for one request":          {LinkUses: 1, LFSThreshold: 1},
		"small files behind a redirect":  {ResolveCache: true},
		"Xet":                            {Xet: true},
		"a mirror that rewrites nothing": {PageSize: 3, LinkBase: "https://hub.invalid"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			open := func(t *testing.T, files map[string][]byte) source.Source {
				hub := hubtest.Start(t, o)
				if _, err := hub.Repo(repo).CommitMap("main", files); err != nil {
					t.Fatal(err)
				}
				return connect(t, hub, nil)
			}
			sourcetest.Run(t, open)
			sourcetest.RunHostile(t, open)
		})
	}
}

func TestSnapshotKeepsToOneCommit(t *testing.T) {
	hub := serve(t, hubtest.Options{})
	first := mustSnapshot(t, connect(t, hub, nil)).Revision
	src := connect(t, hub, nil)
	mustSnapshot(t, src)

	second, err := hub.Repo(repo).CommitMap("main", map[string][]byte{weights: content(99), config: []byte("{}\n")})
	if err != nil {
		t.Fatal(err)
	}
	got, err := readAll(t, src, weights)
	if err != nil || !bytes.Equal(got, tiny()[weights]) {
		t.Errorf("after the branch moved: %d bytes, error %v; want those of the commit that was listed", len(got), err)
	}
	hub.Repo(repo).Tag("v1.0", first).Branch("refs/pr/1", second)
	for rev, want := range map[string]string{"main": second, "": second, "v1.0": first, "refs/pr/1": second, first: first, second: second} {
		src := connect(t, hub, func(o *Options) { o.Revision = rev })
		snap := mustSnapshot(t, src)
		if snap.Revision != want {
			t.Errorf("revision %q: commit %s, want %s", rev, snap.Revision, want)
		}
		if rev == "" {
			rev = "main"
		}
		ref, err := reference.Parse("hf://" + repo + "@" + rev)
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff([]reference.Reference{ref}, snap.References); diff != "" {
			t.Errorf("revision %q: references (-want +got):\n%s", rev, diff)
		}
		if snap.Source != "hf://"+repo {
			t.Errorf("source %q", snap.Source)
		}
	}
}

func TestSnapshotAsksForNoFileAndOnce(t *testing.T) {
	hub := serve(t, hubtest.Options{})
	src := connect(t, hub, nil)
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			if _, err := src.Snapshot(t.Context()); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if got := hub.Requests(); len(got) != 2 {
		t.Errorf("%d requests, want one for the revision and one for the tree: %+v", len(got), got)
	}
}

func TestPatterns(t *testing.T) {
	hub := hubtest.Start(t, hubtest.Options{PageSize: 2})
	if _, err := hub.Repo(repo).CommitMap("main", map[string][]byte{
		"a.safetensors": content(1), "sub/b.safetensors": content(2), "onnx/model.onnx": content(3), "config.json": content(4),
	}); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		include, exclude, want []string
		partial                bool
	}{
		{want: []string{"a.safetensors", "config.json", "onnx/model.onnx", "sub/b.safetensors"}},
		{include: []string{"*.safetensors"}, want: []string{"a.safetensors", "sub/b.safetensors"}, partial: true},
		{exclude: []string{"onnx/"}, want: []string{"a.safetensors", "config.json", "sub/b.safetensors"}, partial: true},
		{include: []string{"*.safetensors", "*.json"}, exclude: []string{"sub/*"}, want: []string{"a.safetensors", "config.json"}, partial: true},
		{exclude: []string{"*.gguf"}, want: []string{"a.safetensors", "config.json", "onnx/model.onnx", "sub/b.safetensors"}},
	} {
		snap := mustSnapshot(t, connect(t, hub, func(o *Options) { o.Include, o.Exclude = c.include, c.exclude }))
		var got []string
		for _, f := range snap.Files {
			got = append(got, f.Path)
		}
		if diff := cmp.Diff(c.want, got); diff != "" || snap.Partial != c.partial {
			t.Errorf("include %q exclude %q: partial %t (-want +got):\n%s", c.include, c.exclude, snap.Partial, diff)
		}
	}
	_, err := connect(t, hub, func(o *Options) { o.Include = []string{"*.gguf"} }).Snapshot(t.Context())
	wantError(t, err, source.ErrNotFound, "config.json")
	if _, err := New(Options{Repo: repo, Include: []string{""}}); err == nil {
		t.Error("an empty pattern was taken")
	}
}

func wantError(t *testing.T, err, kind error, parts ...string) {
	t.Helper()
	if !errors.Is(err, kind) {
		t.Errorf("error %v, want one that is %q", err, kind)
		return
	}
	for _, p := range parts {
		if !strings.Contains(err.Error(), p) {
			t.Errorf("error %q does not say %q", err, p)
		}
	}
	var e *source.Error
	if !errors.As(err, &e) {
		t.Errorf("error %v is no *source.Error", err)
	}
}

// What the hub refuses comes out as the right kind with advice.
func TestRefusals(t *testing.T) {
	const secret, other = "hf_granted", "hf_other"
	for _, c := range []struct {
		name  string
		setup func(*hubtest.Server)
		opts  func(*Options)
		kind  error
		says  []string
		tries int // requests of the kind that is refused, at most
	}{
		{name: "private, no token", setup: func(h *hubtest.Server) { h.Repo(repo).Private() }, kind: source.ErrNotFound, says: []string{"HF_TOKEN", "hf://acme/tiny@main"}},
		{name: "private, another's token", setup: func(h *hubtest.Server) { h.Repo(repo).Private() }, opts: func(o *Options) { o.Token = other }, kind: source.ErrNotFound, says: []string{"token's account"}},
		{name: "unknown token", opts: func(o *Options) { o.Token = "hf_expired" }, kind: source.ErrUnauthorized, says: []string{"HF_TOKEN", "refused"}},
		{name: "absent repository", opts: func(o *Options) { o.Repo = "acme/absent" }, kind: source.ErrNotFound, says: []string{"/acme/absent"}},
		{name: "absent repository, with token", opts: func(o *Options) { o.Repo, o.Token = "acme/absent", secret }, kind: source.ErrNotFound, says: []string{"/acme/absent"}},
		{name: "absent revision", setup: func(h *hubtest.Server) { h.Repo(repo).Branch("fp16", "x") }, opts: func(o *Options) { o.Revision = "v9" }, kind: source.ErrNotFound, says: []string{"there are main, fp16"}},
		{name: "absent commit", opts: func(o *Options) { o.Revision = strings.Repeat("0", 40) }, kind: source.ErrNotFound, says: []string{"there are main"}},
		{name: "gated, no token", setup: func(h *hubtest.Server) { h.Repo(repo).Gated() }, kind: source.ErrGated, says: []string{"accept its conditions at http://127.0.0.1", "/acme/tiny", "HF_TOKEN"}},
		{name: "gated, not granted", setup: func(h *hubtest.Server) { h.Repo(repo).Gated() }, opts: func(o *Options) { o.Token = other }, kind: source.ErrGated, says: []string{"accept the conditions at", "/acme/tiny"}},
		{name: "gated list", setup: func(h *hubtest.Server) {
			h.Inject(hubtest.Fault{Kind: hubtest.KindTree, Status: 403, Code: "GatedRepo", Text: "restricted"})
		}, kind: source.ErrGated},
		{name: "bare 401", setup: func(h *hubtest.Server) { h.Inject(hubtest.Fault{Status: 401}) }, kind: source.ErrUnauthorized, says: []string{"set HF_TOKEN"}},
		{name: "bare 403", setup: func(h *hubtest.Server) {
			h.Inject(hubtest.Fault{Status: 403, Text: "Access to this resource is disabled."})
		}, kind: source.ErrUnauthorized, says: []string{"disabled"}},
		{name: "bare 404", setup: func(h *hubtest.Server) { h.Inject(hubtest.Fault{Status: 404}) }, kind: source.ErrNotFound},
		{name: "listed file is absent", setup: func(h *hubtest.Server) {
			h.Inject(hubtest.Fault{Kind: hubtest.KindResolve, Status: 404, Code: "EntryNotFound"})
		}, kind: source.ErrNotFound, says: []string{weights, "list of files"}},
		{name: "418", setup: func(h *hubtest.Server) { h.Inject(hubtest.Fault{Status: 418}) }, kind: source.ErrInvalid, says: []string{"418", "HF_ENDPOINT"}},
		{name: "500 for ever", setup: func(h *hubtest.Server) { h.Inject(hubtest.Fault{Kind: hubtest.KindTree, Status: 500}) }, kind: source.ErrUnavailable, says: []string{"500", "6 attempts", "HF_ENDPOINT"}, tries: 6},
		{name: "503 for ever from the data host", setup: func(h *hubtest.Server) { h.Inject(hubtest.Fault{Kind: hubtest.KindData, Status: 503}) }, kind: source.ErrUnavailable, says: []string{"503", "6 attempts", weights}, tries: 6},
		{name: "403 for ever from the data host", setup: func(h *hubtest.Server) { h.Inject(hubtest.Fault{Kind: hubtest.KindData, Status: 403}) }, kind: source.ErrUnavailable, says: []string{"403", weights}, tries: 6},
		{name: "resets for ever", setup: func(h *hubtest.Server) { h.Inject(hubtest.Fault{Kind: hubtest.KindResolve, Reset: true}) }, kind: source.ErrUnavailable, tries: 12},
		{name: "429 for ever", setup: func(h *hubtest.Server) { h.Inject(hubtest.Fault{Kind: hubtest.KindResolve, Status: 429}) }, kind: source.ErrRateLimited, says: []string{"HF_TOKEN the hub allows more"}, tries: 6},
		{name: "429 for an hour", setup: func(h *hubtest.Server) {
			h.Inject(hubtest.Fault{Kind: hubtest.KindResolve, Status: 429, Header: map[string]string{"Retry-After": "3600"}})
		}, kind: source.ErrRateLimited, says: []string{"try again in 1h0m0s"}, tries: 1},
		{name: "429 for an hour by policy", setup: func(h *hubtest.Server) {
			h.Inject(hubtest.Fault{Kind: hubtest.KindTree, Status: 429, Header: map[string]string{"Retry-After": "1", "Ratelimit": `"api";r=0;t=3599`}})
		}, kind: source.ErrRateLimited, says: []string{"try again in 1h0m0s"}, tries: 1},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			hub := serve(t, hubtest.Options{})
			hub.AddToken(secret, repo)
			hub.AddToken(other)
			if c.setup != nil {
				c.setup(hub)
			}
			src := connect(t, hub, c.opts)
			_, err := src.Snapshot(t.Context())
			if err == nil {
				_, err = readAll(t, src, weights)
			}
			wantError(t, err, c.kind, c.says...)
			last := hub.Requests()
			kind := last[len(last)-1].Kind
			if n := hub.Asked(kind, ""); c.tries > 0 && n > c.tries {
				t.Errorf("%d requests of kind %s, want at most %d", n, kind, c.tries)
			}
			for _, s := range []string{secret, other, "hf_expired"} {
				if strings.Contains(err.Error(), s) {
					t.Errorf("error %q shows the token", err)
				}
			}
		})
	}
}

func TestPrivateAndGatedWithToken(t *testing.T) {
	hub := serve(t, hubtest.Options{})
	hub.Repo(repo).Private().Gated()
	hub.AddToken("hf_secret", repo)
	src := connect(t, hub, func(o *Options) { o.Token = "hf_secret" })
	if got, err := readAll(t, src, weights); err != nil || !bytes.Equal(got, tiny()[weights]) {
		t.Errorf("%d bytes, error %v", len(got), err)
	}
	for _, r := range hub.Requests() {
		if r.Token != (r.Kind != hubtest.KindData) {
			t.Errorf("token %t in %s %s", r.Token, r.Kind, r.URL)
		}
	}
}

// A hub that sends the token back, in whatever it says, does not get it shown.
func TestTokenIsNotInErrors(t *testing.T) {
	const secret = "hf_verysecret"
	for _, f := range []hubtest.Fault{
		{Status: 403, Text: "token hf_verysecret may not"},
		{Status: 404, Code: "RepoNotFound", Text: "hf_verysecret"},
		{Redirect: "http://127.0.0.1:1/?t=hf_verysecret"},
		{Redirect: "http://hf_verysecret.invalid/"},
		{Redirect: "ftp://hf_verysecret/"},
	} {
		hub := serve(t, hubtest.Options{})
		hub.AddToken(secret, repo)
		hub.Inject(f)
		_, err := connect(t, hub, func(o *Options) { o.Token, o.Retries = secret, 1 }).Snapshot(t.Context())
		if err == nil || strings.Contains(err.Error(), secret) {
			t.Errorf("%+v: error %v", f, err)
		}
	}
	_, err := New(Options{Repo: repo, Token: "hf_very secret"})
	if err == nil || strings.Contains(err.Error(), "very") {
		t.Errorf("token with a space: error %v", err)
	}
}

// What passes is retried, and the reader does not notice.
func TestFaultsThatPass(t *testing.T) {
	all := map[string]hubtest.Fault{
		"500":              {Status: 500, Times: 2},
		"502":              {Status: 502, Times: 2},
		"503":              {Status: 503, Times: 4},
		"408":              {Status: 408, Times: 2},
		"429":              {Status: 429, Times: 2},
		"429, Retry-After": {Status: 429, Times: 1, Header: map[string]string{"Retry-After": "0"}},
		"reset":            {Reset: true, Times: 3},
		"cut at once":      {CutAfter: hubtest.At(0), Times: 3},
		"cut":              {CutAfter: hubtest.At(1), Times: 3},
		"stall":            {StallAfter: hubtest.At(1), Times: 1},
		"stall at once":    {StallAfter: hubtest.At(0), Times: 1},
		"slow header":      {Delay: 500 * time.Millisecond, Times: 1},
	}
	data := map[string]hubtest.Fault{
		"cut far in":           {CutAfter: hubtest.At(3<<20 + 7), Times: 1},
		"cut again and again":  {CutAfter: hubtest.At(1 << 20)}, // each time with progress
		"cut, without length":  {CutAfter: hubtest.At(77), Chunked: true, Times: 2},
		"range shortened":      {Shorten: 1000, Times: 3},
		"range ignored":        {IgnoreRange: true},
		"no length":            {Chunked: true},
		"unknown total":        {ContentRange: "bytes 1-4194308/*", Times: 0},
		"identity is no coder": {Header: map[string]string{"Content-Encoding": "identity"}},
	}
	run := func(name, kind string, f hubtest.Fault) {
		f.Kind = kind
		t.Run(kind+" "+name, func(t *testing.T) {
			t.Parallel()
			hub := serve(t, hubtest.Options{})
			hub.Inject(f)
			src := connect(t, hub, func(o *Options) { o.Idle = 200 * time.Millisecond })
			w := file(t, src, weights)
			got, err := readRange(t.Context(), src, w, 1, w.Size-1)
			if err != nil || !bytes.Equal(got, tiny()[weights][1:]) {
				t.Errorf("%d bytes, error %v", len(got), err)
			}
		})
	}
	for name, f := range all {
		for _, kind := range []string{hubtest.KindRevision, hubtest.KindTree, hubtest.KindResolve, hubtest.KindData} {
			run(name, kind, f)
		}
	}
	for name, f := range data {
		run(name, hubtest.KindData, f)
	}
}

// A body that breaks is taken up where it broke, not from its start.
func TestResumeAsksForTheRest(t *testing.T) {
	hub := serve(t, hubtest.Options{})
	hub.Inject(hubtest.Fault{Kind: hubtest.KindData, CutAfter: hubtest.At(3 << 20), Times: 1})
	src := connect(t, hub, nil)
	got, err := readAll(t, src, weights)
	if err != nil || !bytes.Equal(got, tiny()[weights]) {
		t.Fatalf("%d bytes, error %v", len(got), err)
	}
	var ranges, conditions []string
	for _, r := range hub.Requests() {
		if r.Kind == hubtest.KindData {
			ranges = append(ranges, r.Range)
			conditions = append(conditions, r.IfRange)
		}
	}
	if diff := cmp.Diff([]string{"", fmt.Sprintf("bytes=%d-%d", 3<<20, 4<<20+4)}, ranges); diff != "" {
		t.Errorf("ranges (-want +got):\n%s", diff)
	}
	if conditions[1] == "" {
		t.Error("no If-Range when the same object is asked for again")
	}
	if n := hub.Asked(hubtest.KindResolve, weights); n != 1 {
		t.Errorf("the hub was asked %d times for the way, want once", n)
	}
}

// What differs from the list is ErrChanged, and a broken answer ErrInvalid:
// neither is retried for ever, and never do other bytes come out as the file's.
func TestLies(t *testing.T) {
	const size = 4<<20 + 5
	resolve, data, tree, revision := hubtest.KindResolve, hubtest.KindData, hubtest.KindTree, hubtest.KindRevision
	header := func(name, value string) map[string]string { return map[string]string{name: value} }
	for _, c := range []struct {
		name  string
		fault hubtest.Fault
		off   int64
		kind  error
	}{
		{"other linked size", hubtest.Fault{Kind: resolve, Header: header("X-Linked-Size", "17")}, 0, source.ErrChanged},
		{"other linked etag", hubtest.Fault{Kind: resolve, Header: header("X-Linked-Etag", `"`+strings.Repeat("a", 64)+`"`)}, 0, source.ErrChanged},
		{"longer, no length", hubtest.Fault{Kind: data, Chunked: true, Extra: 1}, 0, source.ErrChanged},
		{"other total", hubtest.Fault{Kind: data, ContentRange: fmt.Sprintf("bytes 100-%d/%d", size-1, size+1)}, 100, source.ErrChanged},
		{"416 with another size", hubtest.Fault{Kind: data, Status: 416, Header: header("Content-Range", "bytes */17")}, 100, source.ErrChanged},
		{"416", hubtest.Fault{Kind: data, Status: 416}, 100, source.ErrInvalid},
		{"other range", hubtest.Fault{Kind: data, ContentRange: fmt.Sprintf("bytes 0-%d/%d", size-101, size)}, 100, source.ErrInvalid},
		{"no Content-Range", hubtest.Fault{Kind: data, Header: header("Content-Range", "")}, 100, source.ErrInvalid},
		{"broken Content-Range", hubtest.Fault{Kind: data, ContentRange: "bytes x"}, 100, source.ErrInvalid},
		{"gzip", hubtest.Fault{Kind: data, Header: header("Content-Encoding", "gzip")}, 0, source.ErrInvalid},
		{"redirect to nowhere", hubtest.Fault{Kind: resolve, Status: 302}, 0, source.ErrInvalid},
		{"redirect in a circle", hubtest.Fault{Kind: resolve, Redirect: "/acme/tiny/resolve/main/x"}, 0, source.ErrInvalid},
		{"redirect to a file", hubtest.Fault{Kind: resolve, Redirect: "file:///etc/passwd"}, 0, source.ErrInvalid},
		{"204", hubtest.Fault{Kind: data, Status: 204}, 0, source.ErrInvalid},
		{"list that is no list", hubtest.Fault{Kind: tree, Redirect: "/api/models/acme/tiny"}, 0, source.ErrInvalid},
		{"revision that is no object", hubtest.Fault{Kind: revision, Redirect: "/api/models/acme/tiny/tree/main"}, 0, source.ErrInvalid},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			hub := serve(t, hubtest.Options{})
			hub.Inject(c.fault)
			src := connect(t, hub, nil)
			_, err := src.Snapshot(t.Context())
			if err == nil {
				w := file(t, src, weights)
				_, err = readRange(t.Context(), src, w, c.off, w.Size-c.off)
			}
			wantError(t, err, c.kind)
			if n := len(hub.Requests()); n > 2+2+maxRedirects {
				t.Errorf("%d requests for something that does not get better", n)
			}
		})
	}
}

// The file behind a link is replaced while it is read.
func TestObjectChangesBetweenRanges(t *testing.T) {
	tag := `"one"`
	b := content(1 << 20)
	cut := true
	cdn := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Etag", tag)
		if cut {
			cut, tag = false, `"two"`
			w.Header().Set("Content-Length", fmt.Sprint(len(b)))
			w.Write(b[:1000])
			w.(http.Flusher).Flush()
			panic(http.ErrAbortHandler)
		}
		http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(b))
	}))
	defer cdn.Close()
	hub := hubtest.Start(t, hubtest.Options{})
	if _, err := hub.Repo(repo).CommitMap("main", map[string][]byte{weights: b}); err != nil {
		t.Fatal(err)
	}
	hub.Inject(hubtest.Fault{Kind: hubtest.KindResolve, Redirect: cdn.URL + "/x"})
	_, err := readAll(t, connect(t, hub, nil), weights)
	wantError(t, err, source.ErrChanged, "ETag")
}

func TestListLies(t *testing.T) {
	big := strings.Repeat("f", 64)
	good := hubtest.File{Path: weights, Content: hubtest.Bytes(content(10))}
	for _, c := range []struct {
		name  string
		files []hubtest.File
		says  string
	}{
		{"negative size", []hubtest.File{{Path: config, Content: hubtest.Text("x"), ClaimSize: hubtest.At(-1)}}, "size -1"},
		{"hash that is none", []hubtest.File{{Path: weights, Content: hubtest.Text("x"), ClaimSHA256: "../../etc/passwd"}}, "digest"},
		{"hash in capitals", []hubtest.File{{Path: weights, Content: hubtest.Text("x"), ClaimSHA256: strings.Repeat("A", 64)}}, "digest"},
		{"git id that is none", []hubtest.File{{Path: config, Content: hubtest.Text("x"), ClaimOID: "abc"}}, "git id"},
		{"the same path twice", []hubtest.File{good, good}, "twice"},
		{"file and folder", []hubtest.File{good, {Path: weights + "/x", Content: hubtest.Text("x")}}, "folder"},
		{"too large in sum", []hubtest.File{
			{Path: "a.bin", Content: hubtest.Text("x"), ClaimSize: hubtest.At(1<<63 - 1), ClaimSHA256: big},
			{Path: "b.bin", Content: hubtest.Text("y"), ClaimSize: hubtest.At(1), ClaimSHA256: big},
		}, "2^63"},
		{"empty", nil, "no files"},
	} {
		t.Run(c.name, func(t *testing.T) {
			hub := hubtest.Start(t, hubtest.Options{})
			if _, err := hub.Repo(repo).Commit("main", c.files...); err != nil {
				t.Fatal(err)
			}
			_, err := connect(t, hub, nil).Snapshot(t.Context())
			kind := source.ErrInvalid
			if c.files == nil {
				kind = source.ErrNotFound
			}
			wantError(t, err, kind, c.says)
		})
	}
	t.Run("a bad path that is excluded", func(t *testing.T) {
		hub := hubtest.Start(t, hubtest.Options{})
		if _, err := hub.Repo(repo).Commit("main", good, hubtest.File{Path: `a\b`, Content: hubtest.Text("x")}); err != nil {
			t.Fatal(err)
		}
		_, err := connect(t, hub, nil).Snapshot(t.Context())
		wantError(t, err, source.ErrInvalid, "--exclude")
		snap := mustSnapshot(t, connect(t, hub, func(o *Options) { o.Exclude = []string{`*\*`} }))
		if len(snap.Files) != 1 || !snap.Partial {
			t.Errorf("%+v", snap)
		}
	})
}

// A list without end is refused while it is read.
func TestHugeLists(t *testing.T) {
	lazy := func(i int) hubtest.File {
		return hubtest.File{Path: fmt.Sprintf("f%07d", i), ClaimSize: hubtest.At(1), ClaimOID: strings.Repeat("1", 40)}
	}
	t.Run("a million files", func(t *testing.T) {
		t.Parallel()
		hub := hubtest.Start(t, hubtest.Options{})
		if _, err := hub.Repo(repo).CommitLazy("main", 1_000_000, lazy); err != nil {
			t.Fatal(err)
		}
		_, err := connect(t, hub, nil).Snapshot(t.Context())
		wantError(t, err, source.ErrInvalid, fmt.Sprint(modelpack.MaxFiles))
		if n := hub.Asked(hubtest.KindTree, ""); n > modelpack.MaxFiles/1000+1 {
			t.Errorf("%d pages were read", n)
		}
	})
	t.Run("a million files of which one is wanted", func(t *testing.T) {
		t.Parallel()
		hub := hubtest.Start(t, hubtest.Options{})
		if _, err := hub.Repo(repo).CommitLazy("main", 1_000_000, lazy); err != nil {
			t.Fatal(err)
		}
		_, err := connect(t, hub, func(o *Options) { o.Include = []string{"f0000001"} }).Snapshot(t.Context())
		wantError(t, err, source.ErrInvalid, fmt.Sprint(maxEntries))
	})
	t.Run("as many as are allowed", func(t *testing.T) {
		t.Parallel()
		hub := hubtest.Start(t, hubtest.Options{})
		if _, err := hub.Repo(repo).CommitLazy("main", modelpack.MaxFiles, lazy); err != nil {
			t.Fatal(err)
		}
		if n := len(mustSnapshot(t, connect(t, hub, nil)).Files); n != modelpack.MaxFiles {
			t.Errorf("%d files", n)
		}
	})
	pages := func(t *testing.T, tree http.HandlerFunc) error {
		t.Helper()
		hub := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if strings.Contains(r.URL.Path, "/revision/") {
				fmt.Fprintf(w, `{"sha":"%040d"}`, 1)
				return
			}
			tree(w, r)
		}))
		defer hub.Close()
		s, err := New(Options{Endpoint: hub.URL, Repo: repo, Retries: -1})
		if err != nil {
			t.Fatal(err)
		}
		_, err = s.Snapshot(t.Context())
		return err
	}
	t.Run("empty pages for ever", func(t *testing.T) {
		n := 0
		err := pages(t, func(w http.ResponseWriter, r *http.Request) {
			n++
			w.Header().Set("Link", fmt.Sprintf(`<http://x/?cursor=%d>; rel="next"`, n))
			io.WriteString(w, "[]")
		})
		wantError(t, err, source.ErrInvalid, "empty")
		if n > 2*maxEmptyPages {
			t.Errorf("%d pages", n)
		}
	})
	t.Run("a page that is its own next", func(t *testing.T) {
		err := pages(t, func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Link", `<http://x/?cursor=1>; rel="next"`)
			io.WriteString(w, `[{"type":"directory","path":"a"}]`)
		})
		wantError(t, err, source.ErrInvalid, "itself")
	})
	t.Run("a page without end", func(t *testing.T) {
		err := pages(t, func(w http.ResponseWriter, r *http.Request) {
			io.WriteString(w, `[{"type":"file","path":"`)
			x := bytes.Repeat([]byte("x"), 1<<20)
			for range 100 {
				if _, err := w.Write(x); err != nil {
					return
				}
			}
		})
		wantError(t, err, source.ErrInvalid, "longer than")
	})
	t.Run("text after the list", func(t *testing.T) {
		err := pages(t, func(w http.ResponseWriter, r *http.Request) { io.WriteString(w, `[] []`) })
		wantError(t, err, source.ErrInvalid, "after")
	})
	t.Run("a web page", func(t *testing.T) {
		err := pages(t, func(w http.ResponseWriter, r *http.Request) { io.WriteString(w, `<!doctype html>`) })
		wantError(t, err, source.ErrInvalid, "HF_ENDPOINT")
	})
}

func TestRevisionLies(t *testing.T) {
	for _, body := range []string{`{}`, `{"sha":"main"}`, `{"sha":"` + strings.Repeat("A", 40) + `"}`, `{"sha":"../x"}`, `[]`, ``, `{"sha":1}`} {
		hub := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { io.WriteString(w, body) }))
		s, err := New(Options{Endpoint: hub.URL, Repo: repo, Retries: -1})
		if err != nil {
			t.Fatal(err)
		}
		_, err = s.Snapshot(t.Context())
		wantError(t, err, source.ErrInvalid)
		hub.Close()
	}
	hub := serve(t, hubtest.Options{})
	hub.Inject(hubtest.Fault{Kind: hubtest.KindRevision, Redirect: "/api/models/acme/tiny/revision/main", Times: 1})
	_, err := connect(t, hub, func(o *Options) { o.Revision = strings.Repeat("1", 40) }).Snapshot(t.Context())
	wantError(t, err, source.ErrInvalid, "answers with commit")
}

// Many ranges of a file cost one request of the hub; ended links are renewed.
func TestLinks(t *testing.T) {
	want := tiny()[weights]
	read := func(t *testing.T, src *Source, off, n int64) {
		t.Helper()
		got, err := readRange(t.Context(), src, file(t, src, weights), off, n)
		if err != nil || !bytes.Equal(got, want[off:off+n]) {
			t.Errorf("[%d, +%d): %d bytes, error %v", off, n, len(got), err)
		}
	}
	t.Run("are used again", func(t *testing.T) {
		hub := serve(t, hubtest.Options{})
		src := connect(t, hub, nil)
		for i := range int64(10) {
			read(t, src, i*1000, 1000)
		}
		if n := hub.Asked(hubtest.KindResolve, weights); n != 1 {
			t.Errorf("the hub was asked %d times, want once", n)
		}
	})
	t.Run("are renewed when they end", func(t *testing.T) {
		hub := serve(t, hubtest.Options{})
		waits := 0
		src := connect(t, hub, func(o *Options) {
			o.OnWait = func(string, time.Duration, error) { waits++ }
		})
		read(t, src, 0, 1000)
		hub.ExpireLinks()
		read(t, src, 1000, 1000)
		if n := hub.Asked(hubtest.KindResolve, weights); n != 2 {
			t.Errorf("the hub was asked %d times, want twice", n)
		}
		if waits != 0 {
			t.Errorf("%d waits, want none: nothing is overloaded", waits)
		}
	})
	t.Run("end in the middle of a body", func(t *testing.T) {
		hub := serve(t, hubtest.Options{LinkUses: 1})
		hub.Inject(hubtest.Fault{Kind: hubtest.KindData, CutAfter: hubtest.At(100_000), Times: 3})
		read(t, connect(t, hub, nil), 5, 1<<20)
	})
	t.Run("lead to a host that is gone", func(t *testing.T) {
		hub := serve(t, hubtest.Options{})
		src := connect(t, hub, nil)
		read(t, src, 0, 1000)
		gone, err := url.Parse("http://127.0.0.1:1/gone")
		if err != nil {
			t.Fatal(err)
		}
		src.remember(weights, gone)
		read(t, src, 1000, 1000)
	})
	t.Run("lead to a host that gives nothing", func(t *testing.T) {
		hub := serve(t, hubtest.Options{})
		src := connect(t, hub, nil)
		read(t, src, 0, 1000)
		hub.Inject(hubtest.Fault{Kind: hubtest.KindData, CutAfter: hubtest.At(0), Times: 1})
		read(t, src, 1000, 1000)
		if n := hub.Asked(hubtest.KindResolve, weights); n != 2 {
			t.Errorf("the hub was asked %d times, want twice", n)
		}
	})
	t.Run("end at once", func(t *testing.T) {
		hub := serve(t, hubtest.Options{LinkLife: time.Nanosecond})
		src := connect(t, hub, nil)
		_, err := readAll(t, src, weights)
		wantError(t, err, source.ErrUnavailable, "403")
	})
}

// A mirror below a path, and names that need quoting.
func TestEndpointWithPath(t *testing.T) {
	hub := hubtest.NewHub(hubtest.Options{PageSize: 2})
	files := sourcetest.Files()
	if _, err := hub.Repo(repo).CommitMap("main", files); err != nil {
		t.Fatal(err)
	}
	mirror := httptest.NewServer(http.StripPrefix("/mirror/hf", hub))
	defer mirror.Close()
	s, err := New(Options{Endpoint: mirror.URL + "/mirror/hf/", Repo: repo})
	if err != nil {
		t.Fatal(err)
	}
	for name, want := range files {
		got, err := readAll(t, s, name)
		if err != nil || !bytes.Equal(got, want) {
			t.Errorf("%s: %d bytes, error %v", name, len(got), err)
		}
	}
}

func TestNewRefuses(t *testing.T) {
	for name, o := range map[string]Options{
		"no repository":         {},
		"repository":            {Repo: "../etc"},
		"revision":              {Repo: repo, Revision: "../main"},
		"endpoint's scheme":     {Repo: repo, Endpoint: "ftp://hub"},
		"endpoint without host": {Repo: repo, Endpoint: "huggingface.co"},
		"endpoint with user":    {Repo: repo, Endpoint: "https://user:pw@hub"},
		"endpoint with query":   {Repo: repo, Endpoint: "https://hub?x"},
		"token":                 {Repo: repo, Token: "a\nb"},
	} {
		if _, err := New(o); err == nil {
			t.Errorf("%s: taken", name)
		} else if strings.Contains(err.Error(), "pw@") {
			t.Errorf("%s: the error shows a password: %v", name, err)
		}
	}
}

func TestRateLimitHoldsAllReaders(t *testing.T) {
	hub := serve(t, hubtest.Options{Direct: true})
	told := make(chan struct{})
	tell := sync.OnceFunc(func() { close(told) })
	src := connect(t, hub, func(o *Options) { o.OnWait = func(string, time.Duration, error) { tell() } })
	w := file(t, src, weights)
	hub.Inject(hubtest.Fault{Kind: hubtest.KindResolve, Status: 429, Times: 1, Header: map[string]string{"Retry-After": "1"}})
	begin := time.Now()
	first := make(chan error, 1)
	go func() {
		_, err := readRange(t.Context(), src, w, 0, 10)
		first <- err
	}()
	<-told
	if _, err := readRange(t.Context(), src, w, 10, 10); err != nil {
		t.Error(err)
	}
	if d := time.Since(begin); d < time.Second {
		t.Errorf("a second reader asked again after %s, the hub had said one second", d)
	}
	if err := <-first; err != nil {
		t.Error(err)
	}
}

func TestCancelWhileWaiting(t *testing.T) {
	for name, f := range map[string]hubtest.Fault{
		"for the hub's limit": {Status: 429, Header: map[string]string{"Retry-After": "300"}},
		"for a header":        {Delay: time.Hour},
		"for a body":          {StallAfter: hubtest.At(1)},
	} {
		for _, kind := range []string{hubtest.KindTree, hubtest.KindData} {
			t.Run(name+" of "+kind, func(t *testing.T) {
				t.Parallel()
				fault := f
				fault.Kind = kind
				hub := serve(t, hubtest.Options{})
				hub.Inject(fault)
				src := connect(t, hub, func(o *Options) { o.Idle = time.Hour })
				ctx, cancel := context.WithCancel(t.Context())
				time.AfterFunc(100*time.Millisecond, cancel)
				begin := time.Now()
				snap, err := src.Snapshot(ctx)
				if err == nil {
					_, err = readRange(ctx, src, snap.Files[1], 0, snap.Files[1].Size)
				}
				if !errors.Is(err, context.Canceled) || time.Since(begin) > 5*time.Second {
					t.Errorf("error %v after %s", err, time.Since(begin))
				}
			})
		}
	}
}

func TestStalledHubIsGivenUp(t *testing.T) {
	hub := serve(t, hubtest.Options{})
	hub.Inject(hubtest.Fault{Kind: hubtest.KindData, StallAfter: hubtest.At(10)})
	src := connect(t, hub, func(o *Options) { o.Idle, o.Retries = 50*time.Millisecond, 2 })
	_, err := readAll(t, src, weights)
	wantError(t, err, source.ErrUnavailable, "no answer for too long", "3 attempts")
}

// A slow reader is not a stalled hub.
func TestSlowReader(t *testing.T) {
	hub := serve(t, hubtest.Options{})
	src := connect(t, hub, func(o *Options) { o.Idle = time.Second })
	w := file(t, src, weights)
	rc, err := src.Open(t.Context(), w, 0, w.Size)
	if err != nil {
		t.Fatal(err)
	}
	defer rc.Close()
	time.Sleep(1500 * time.Millisecond)
	got, err := io.ReadAll(rc)
	if err != nil || !bytes.Equal(got, tiny()[weights]) {
		t.Errorf("%d bytes, error %v", len(got), err)
	}
	if n := hub.Asked(hubtest.KindData, ""); n != 1 {
		t.Errorf("%d requests for data, want one", n)
	}
}

func TestConnectionsAreUsedAgain(t *testing.T) {
	hub := serve(t, hubtest.Options{})
	var mu sync.Mutex
	seen := map[string]bool{}
	base := newTransport().(*http.Transport)
	defer base.CloseIdleConnections()
	dial := base.DialContext
	base.DialContext = func(ctx context.Context, network, addr string) (c net.Conn, err error) {
		c, err = dial(ctx, network, addr)
		if err == nil {
			mu.Lock()
			seen[c.LocalAddr().String()] = true
			mu.Unlock()
		}
		return c, err
	}
	src := connect(t, hub, func(o *Options) { o.Transport = base })
	for range 5 {
		for _, name := range []string{weights, config} {
			if _, err := readAll(t, src, name); err != nil {
				t.Fatal(err)
			}
		}
		hub.ExpireLinks()
	}
	if len(seen) > 2 {
		t.Errorf("%d connections for one reader of two hosts", len(seen))
	}
}

func TestRedirects(t *testing.T) {
	for _, c := range []struct {
		from, location, want string
	}{
		{"https://hub/a/b", "/c?d=e", "https://hub/c?d=e"},
		{"https://hub/a/b", "c", "https://hub/a/c"},
		{"https://hub/a/b", "//cdn/c", "https://cdn/c"},
		{"https://hub/a/b", "https://user:pw@cdn/c#d", "https://cdn/c"},
		{"http://hub/a", "https://hub/a", "https://hub/a"},
		{"https://hub/a", "http://hub/a", ""},
		{"https://hub/a", "http://cdn/a", ""},
		{"https://hub/a", "file:///etc/passwd", ""},
		{"https://hub/a", "data:text/plain,x", ""},
		{"https://hub/a", "https:///x", ""},
		{"https://hub/a", "https://[x", ""},
		{"https://hub/a", "", ""},
	} {
		from, err := url.Parse(c.from)
		if err != nil {
			t.Fatal(err)
		}
		to, f := redirect(from, c.location)
		switch {
		case (f != nil) != (c.want == ""):
			t.Errorf("%s to %s: failure %+v", c.from, c.location, f)
		case f == nil && to.String() != c.want:
			t.Errorf("%s to %s: %s, want %s", c.from, c.location, to, c.want)
		}
	}
}

// On the hub itself a redirect keeps the token: a private model's small files
// lie behind one.
func TestTokenStaysOnTheHub(t *testing.T) {
	hub := serve(t, hubtest.Options{ResolveCache: true})
	hub.Repo(repo).Private()
	hub.AddToken("hf_secret", repo)
	src := connect(t, hub, func(o *Options) { o.Token = "hf_secret" })
	if got, err := readAll(t, src, config); err != nil || !bytes.Equal(got, tiny()[config]) {
		t.Errorf("%q, error %v", got, err)
	}
	if n := hub.Asked(hubtest.KindResolve, config); n != 2 {
		t.Errorf("%d requests, want the file's address and the one behind it", n)
	}
}

func TestOnWaitTellsWhatWaitsAndWhy(t *testing.T) {
	hub := serve(t, hubtest.Options{})
	hub.Inject(hubtest.Fault{Kind: hubtest.KindTree, Status: 429, Header: map[string]string{"Retry-After": "1"}, Times: 1})
	hub.Inject(hubtest.Fault{Kind: hubtest.KindData, Status: 503, Times: 1})
	type call struct {
		what string
		long bool
		kind error
	}
	var got []call
	src := connect(t, hub, func(o *Options) {
		o.OnWait = func(what string, wait time.Duration, cause error) {
			kind := source.ErrUnavailable
			if errors.Is(cause, source.ErrRateLimited) {
				kind = source.ErrRateLimited
			}
			got = append(got, call{what, wait >= time.Second, kind})
		}
	})
	if _, err := readAll(t, src, weights); err != nil {
		t.Fatal(err)
	}
	want := []call{{"hf://acme/tiny@main", true, source.ErrRateLimited}, {"hf://acme/tiny@main " + weights, false, source.ErrUnavailable}}
	if diff := cmp.Diff(want, got, cmp.AllowUnexported(call{}), cmp.Comparer(func(a, b error) bool { return a == b })); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestMetadata(t *testing.T) {
	hub := serve(t, hubtest.Options{})
	src := connect(t, hub, nil)
	files := tiny()
	want := []source.File{
		{Path: config, Size: int64(len(files[config])), GitOID: gitOID(files[config])},
		{Path: weights, Size: int64(len(files[weights])), SHA256: digest.NewDigestFromEncoded(digest.SHA256, sha256Hex(files[weights]))},
	}
	if diff := cmp.Diff(want, mustSnapshot(t, src).Files); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

// A pace is kept by all sources that share it, and it counts what is asked of
// the hub, not what redirects fetch elsewhere.
func TestPaceBoundsCallsToTheHub(t *testing.T) {
	hub := serve(t, hubtest.Options{Direct: true})
	pace := PerMinute(600) // ten a second, of which sixty may come at once
	begin := time.Now()
	if !pace.AllowN(begin, 60) {
		t.Fatal("the burst is smaller than a tenth")
	}
	src := connect(t, hub, func(o *Options) { o.Pace = pace })
	w := file(t, src, weights) // two calls: revision and tree
	for i := range 3 {
		if _, err := readRange(t.Context(), src, w, int64(i*10), 10); err != nil {
			t.Fatal(err)
		}
	}
	if d := time.Since(begin); d < 400*time.Millisecond {
		t.Errorf("five calls at ten a second took %s", d)
	}
	if PerMinute(0) != nil {
		t.Error("no limit is a limit")
	}
}
