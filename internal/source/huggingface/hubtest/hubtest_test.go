package hubtest

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestPatternIsTheSameHoweverItIsRead(t *testing.T) {
	const size = 3*patternBlock + 1234
	read := func(c Content, step int) []byte {
		t.Helper()
		r, err := c.Open()
		if err != nil {
			t.Fatal(err)
		}
		defer r.Close()
		var out []byte
		for off := int64(0); off < size; off += int64(step) {
			buf := make([]byte, step)
			n, err := r.ReadAt(buf, off)
			if err != nil && err != io.EOF {
				t.Fatal(err)
			}
			out = append(out, buf[:n]...)
		}
		return out
	}
	whole := read(Pattern(1, size), size)
	if len(whole) != size {
		t.Fatalf("%d bytes, want %d", len(whole), size)
	}
	for _, step := range []int{7, 4096, patternBlock - 1, patternBlock + 5} {
		if !bytes.Equal(read(Pattern(1, size), step), whole) {
			t.Errorf("in steps of %d it is another", step)
		}
	}
	if bytes.Equal(whole[:patternBlock], whole[patternBlock:2*patternBlock]) {
		t.Error("two blocks are equal")
	}
	if bytes.Equal(read(Pattern(2, size), size), whole) {
		t.Error("two seeds give the same")
	}
}

func TestParseRange(t *testing.T) {
	for _, c := range []struct {
		spec        string
		size        int64
		first, last int64
		err         error
	}{
		{"bytes=0-0", 10, 0, 0, nil},
		{"bytes=3-", 10, 3, 9, nil},
		{"bytes=3-100", 10, 3, 9, nil},
		{"bytes=-3", 10, 7, 9, nil},
		{"bytes=-30", 10, 0, 9, nil},
		{"bytes=10-", 10, 0, 0, errUnsatisfiable},
		{"bytes=0-", 0, 0, 0, errUnsatisfiable},
		{"bytes=-0", 10, 0, 0, errUnsatisfiable},
		{"bytes=5-3", 10, 0, 0, errRange},
		{"bytes=0-1,3-4", 10, 0, 0, errRange},
		{"bytes=x-", 10, 0, 0, errRange},
		{"items=0-1", 10, 0, 0, errRange},
	} {
		first, last, err := parseRange(c.spec, c.size)
		if !errors.Is(err, c.err) || err == nil && (first != c.first || last != c.last) {
			t.Errorf("%s of %d: %d-%d, error %v", c.spec, c.size, first, last, err)
		}
	}
}

func TestSecondHostNoticesTokens(t *testing.T) {
	hub := NewHub(Options{})
	r, err := http.NewRequestWithContext(t.Context(), "GET", "http://localhost/repos/x", nil)
	if err != nil {
		t.Fatal(err)
	}
	hub.CDN().ServeHTTP(discard{}, r)
	if l := hub.Leaks(); len(l) != 0 {
		t.Errorf("leaks %q, there was no token", l)
	}
	r.Header.Set("Authorization", "Bearer x")
	hub.CDN().ServeHTTP(discard{}, r)
	if l := hub.Leaks(); len(l) != 1 {
		t.Errorf("leaks %q, want the one", l)
	}
}

type discard struct{}

func (discard) Header() http.Header         { return http.Header{} }
func (discard) Write(p []byte) (int, error) { return len(p), nil }
func (discard) WriteHeader(int)             {}

func TestControl(t *testing.T) {
	hub := Start(t, Options{Control: true})
	if _, err := hub.Repo("acme/tiny").Commit("main", File{Path: "a", Content: Text("a")}); err != nil {
		t.Fatal(err)
	}
	do := func(method, path, body string) (int, string) {
		t.Helper()
		r, err := http.NewRequestWithContext(t.Context(), method, hub.URL+path, strings.NewReader(body))
		if err != nil {
			t.Fatal(err)
		}
		resp, err := http.DefaultClient.Do(r)
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		b, err := io.ReadAll(resp.Body)
		if err != nil {
			t.Fatal(err)
		}
		return resp.StatusCode, string(b)
	}
	if status, _ := do("POST", "/_test/fault", `{"Kind": "resolve", "Status": 503}`); status != 200 {
		t.Errorf("a fault: status %d", status)
	}
	if status, _ := do("POST", "/_test/fault", `{"Knid": "resolve"}`); status != 400 {
		t.Errorf("a fault with a typing error: status %d", status)
	}
	if status, _ := do("GET", "/acme/tiny/resolve/main/a", ""); status != 503 {
		t.Errorf("status %d, want that of the fault", status)
	}
	do("DELETE", "/_test/fault", "")
	if status, body := do("GET", "/acme/tiny/resolve/main/a", ""); status != 200 || body != "a" {
		t.Errorf("status %d %q after the fault was taken back", status, body)
	}
	var log []Request
	_, body := do("GET", "/_test/requests", "")
	if err := json.Unmarshal([]byte(body), &log); err != nil || len(log) != 2 || log[0].Status != 503 || log[1].Path != "a" {
		t.Errorf("log %s, error %v", body, err)
	}
}

func TestLiesAboutContent(t *testing.T) {
	want := bytes.Repeat([]byte("0123456789"), 100)
	hub := Start(t, Options{LFSThreshold: 1})
	if _, err := hub.Repo("acme/tiny").Commit("main", File{Path: "a", Content: Bytes(want), ClaimSize: At(7), ClaimSHA256: "cafe"}); err != nil {
		t.Fatal(err)
	}
	get := func(path string) string {
		t.Helper()
		resp, err := http.Get(hub.URL + path)
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		b, _ := io.ReadAll(resp.Body) // cut short where the test wants it
		return string(b)
	}
	if tree := get("/api/models/acme/tiny/tree/main"); !strings.Contains(tree, `"lfs":{"oid":"cafe","size":7,`) {
		t.Errorf("the list does not lie: %s", tree)
	}
	hub.Inject(Fault{Kind: KindData, Flip: At(500), Times: 1})
	got := []byte(get("/acme/tiny/resolve/main/a"))
	var differ []int
	for i := range got {
		if got[i] != want[i] {
			differ = append(differ, i)
		}
	}
	if len(got) != len(want) || len(differ) != 1 || differ[0] != 500 {
		t.Errorf("%d bytes, different at %v, want one at 500", len(got), differ)
	}
	hub.Inject(Fault{Kind: KindData, CutAfter: At(300), Times: 1})
	if got := get("/acme/tiny/resolve/main/a"); got != string(want[:300]) {
		t.Errorf("%d bytes came before the cut, want 300", len(got))
	}
	if got := get("/acme/tiny/resolve/main/a"); got != string(want) {
		t.Errorf("after the faults, %d bytes", len(got))
	}
}

func TestServeDir(t *testing.T) {
	dir := t.TempDir()
	model := filepath.Join(dir, "acme", "tiny", "sub")
	if err := os.MkdirAll(model, 0o755); err != nil {
		t.Fatal(err)
	}
	want := bytes.Repeat([]byte("0123456789"), 100_000)
	if err := os.WriteFile(filepath.Join(model, "m.bin"), want, 0o644); err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(t.Context())
	ready := make(chan *Server, 1)
	done := make(chan error, 1)
	go func() { done <- ServeDir(ctx, "127.0.0.1:0", dir, Options{}, func(s *Server) { ready <- s }) }()
	var s *Server
	select {
	case s = <-ready:
	case err := <-done:
		t.Fatal(err)
	}
	resp, err := http.Get(s.URL + "/acme/tiny/resolve/main/sub/m.bin")
	if err != nil {
		t.Fatal(err)
	}
	got, err := io.ReadAll(resp.Body)
	resp.Body.Close()
	if err != nil || resp.StatusCode != 200 || !bytes.Equal(got, want) {
		t.Errorf("status %d, %d bytes, error %v", resp.StatusCode, len(got), err)
	}
	if n := s.Sent("sub/m.bin"); n != int64(len(want)) {
		t.Errorf("the log says that %d bytes were sent, want %d", n, len(want))
	}
	http.DefaultClient.CloseIdleConnections()
	stop()
	if err := <-done; err != nil {
		t.Errorf("serve: %v", err)
	}
	if err := ServeDir(t.Context(), "127.0.0.1:0", filepath.Join(dir, "absent"), Options{}, func(*Server) {}); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("error %v, want that the folder is absent", err)
	}
}
