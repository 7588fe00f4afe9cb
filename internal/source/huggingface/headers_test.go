package huggingface

import (
	"bytes"
	"encoding/json"
	"net/http"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/larder-project/larder/internal/modelpack"
	"github.com/larder-project/larder/internal/source"
)

func TestAskedWait(t *testing.T) {
	for _, c := range []struct {
		limit, after string
		want         time.Duration
	}{
		{},
		{limit: `"api";r=0;t=55`, want: 56 * time.Second},
		{limit: `"api";r=0;t=55`, after: "10", want: 56 * time.Second},
		{limit: `"api";r=3;t=55`, after: "10", want: 10 * time.Second},
		{limit: `"api";r=10;t=200, "resolvers";r=0;t=7`, want: 8 * time.Second},
		{limit: `"api"; r=0; t=20`, want: 21 * time.Second},
		{limit: `"api";t=20`, after: "3", want: 3 * time.Second},
		{limit: `"api";r=0;t=-5`, after: "3", want: 3 * time.Second},
		{limit: `"api";r=0;t=99999999999999999999`},
		{limit: `;;;,,,=`, after: "4", want: 4 * time.Second},
		{after: " 60 ", want: time.Minute},
		{after: "Wed, 21 Oct 2026 07:28:00 GMT"},
		{after: "-1"},
		{after: "1e3"},
	} {
		h := http.Header{}
		if c.limit != "" {
			h.Set("ratelimit", c.limit)
		}
		if c.after != "" {
			h.Set("Retry-After", c.after)
		}
		if got := askedWait(h); got != c.want {
			t.Errorf("ratelimit %q, Retry-After %q: %s, want %s", c.limit, c.after, got, c.want)
		}
	}
}

func TestContentRange(t *testing.T) {
	none := contentRange{-1, -1, -1}
	for h, want := range map[string]contentRange{
		"bytes 0-0/1":                    {0, 0, 1},
		"bytes 5-9/10":                   {5, 9, 10},
		"Bytes 5-9/*":                    {5, 9, -1},
		"bytes */10":                     {-1, -1, 10},
		"bytes 5-9/9":                    none,
		"bytes 9-5/10":                   none,
		"bytes */*":                      none,
		"bytes -5-9/10":                  none,
		"bytes 5-/10":                    none,
		"bytes 5-9":                      none,
		"bytes=5-9/10":                   none,
		"items 5-9/10":                   none,
		"bytes 0x5-9/10":                 none,
		"bytes +5-9/10":                  none,
		"bytes 5-9/99999999999999999999": none,
		"":                               none,
	} {
		got, ok := parseContentRange(h)
		if got != want || ok != (want != none) {
			t.Errorf("%q: %+v %t, want %+v", h, got, ok, want)
		}
	}
}

func TestNextPage(t *testing.T) {
	cursor := url.Values{"cursor": {"x=="}, "limit": {"5"}}
	for _, c := range []struct {
		headers []string
		want    url.Values
		bad     bool
	}{
		{},
		{headers: []string{`<https://hub/api/models/a/b/tree/c?cursor=x%3D%3D&limit=5>; rel="next"`}, want: cursor},
		{headers: []string{`</tree/c?cursor=x%3D%3D&limit=5>;rel=next`}, want: cursor},
		{headers: []string{`<http://h/?cursor=1>; rel="prev", <http://h/?cursor=x%3D%3D&limit=5>; title="a, b"; rel="last NEXT"`}, want: cursor},
		{headers: []string{`<http://h/?cursor=1>; rel="prev"`, `<http://h/?cursor=x%3D%3D&limit=5>; rel="next"`}, want: cursor},
		{headers: []string{`<http://h/?cursor=1>; title="rel=next"`}},
		{headers: []string{`<http://h/?cursor=1`, `x`, `<>`, `<`}},
		{headers: []string{`<http://h/?cursor=%zz>; rel="next"`}, bad: true},
		{headers: []string{`<http://[h/?cursor=1>; rel="next"`}, bad: true},
		{headers: []string{`<http://h/?cursor=` + strings.Repeat("x", maxLinkBytes) + `>; rel="next"`}, bad: true},
	} {
		got, err := nextPage(c.headers)
		if diff := cmp.Diff(c.want, got); diff != "" || (err != nil) != c.bad {
			t.Errorf("%.100q: error %v (-want +got):\n%s", c.headers, err, diff)
		}
	}
}

func FuzzRateLimit(f *testing.F) {
	f.Add(`"api";r=0;t=55`)
	f.Add(`"api";r=1;t=2, "resolvers";r=0;t=3`)
	f.Fuzz(func(t *testing.T, h string) {
		d, ok := rateLimitReset([]string{h})
		if d < 0 || d > (1<<31)*time.Second || d != 0 && !ok {
			t.Errorf("%q: %s %t", h, d, ok)
		}
	})
}

func FuzzContentRange(f *testing.F) {
	f.Add("bytes 5-9/10")
	f.Add("bytes */10")
	f.Add("bytes 5-9/*")
	f.Fuzz(func(t *testing.T, h string) {
		r, ok := parseContentRange(h)
		if !ok {
			return
		}
		if r.first < -1 || r.last < r.first || r.total >= 0 && r.last >= r.total || r.first == -1 && r.total < 0 {
			t.Errorf("%q: %+v", h, r)
		}
	})
}

func FuzzLink(f *testing.F) {
	f.Add(`<https://hub/tree?cursor=x>; rel="next"`)
	f.Add(`<a>; rel=prev, <b?c=d>; title="\",<>"; rel="next"`)
	f.Fuzz(func(t *testing.T, h string) {
		q, err := nextPage([]string{h})
		if err != nil {
			return
		}
		if q != nil && !strings.Contains(strings.ToLower(h), "next") {
			t.Errorf("%q: a next page %q", h, q)
		}
		if back, err := url.ParseQuery(q.Encode()); err != nil || len(back) != len(q) {
			t.Errorf("%q: query %q cannot be sent: %v", h, q, err)
		}
	})
}

func FuzzTree(f *testing.F) {
	f.Add([]byte(`[{"type":"directory","oid":"x","size":0,"path":"a"},{"type":"file","oid":"` + strings.Repeat("a", 40) + `","size":3,"path":"a/b"}]`))
	f.Add([]byte(`[{"type":"file","oid":"x","size":3,"path":"m.bin","lfs":{"oid":"` + strings.Repeat("a", 64) + `","size":3,"pointerSize":9},"xetHash":"y"}]`))
	f.Add([]byte(`[{"type":"file","path":"../x"}] [`))
	f.Fuzz(func(t *testing.T, body []byte) {
		var files []source.File
		err := readTree(bytes.NewReader(body), func(e treeEntry) error {
			file, err := e.file()
			if err == nil {
				files = append(files, file)
			}
			return err
		})
		if err != nil || checkTree(files) != nil {
			return
		}
		if !json.Valid(body) {
			t.Errorf("%q is no JSON and was taken", body)
		}
		// What comes out can be written down as a model once its files are
		// hashed.
		m := modelpack.Model{}
		for _, f := range files {
			if f.SHA256 == "" == (f.GitOID == "") {
				t.Errorf("%q: %+v has both digests or none", body, f)
			}
			if f.SHA256 == "" {
				continue
			}
			m.Files = append(m.Files, modelpack.File{Path: f.Path, Digest: f.SHA256, Size: f.Size})
		}
		sizes := map[string]int64{}
		for _, f := range m.Files {
			if n, ok := sizes[string(f.Digest)]; ok && n != f.Size {
				return // found when one of the two is read
			}
			sizes[string(f.Digest)] = f.Size
		}
		if len(m.Files) > 0 {
			if _, _, err := modelpack.Build(m); err != nil {
				t.Errorf("%q: %v", body, err)
			}
		}
	})
}
