package hubtest

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"slices"
	"strconv"
	"strings"
)

// resolve is GET and HEAD of /ORG/NAME/resolve/REVISION/PATH. cached is the
// address on the same host that it redirects to for small files.
func (x *exchange) resolve(segments []string, cached bool) {
	var repo string
	var rest []string
	if cached {
		// ORG/NAME/COMMIT/PATH; such repositories have an organisation here.
		if len(segments) >= 4 {
			repo, rest = segments[0]+"/"+segments[1], segments[2:]
		}
	} else {
		var what string
		if repo, what, rest = verb(segments, "resolve"); what == "" {
			rest = nil
		}
	}
	if len(rest) < 2 {
		if x.h.begin(x) {
			x.refuse(http.StatusNotFound, "", "Not Found")
		}
		return
	}
	x.log.Kind, x.log.Repo, x.log.Revision, x.log.Path = KindResolve, repo, rest[0], strings.Join(rest[1:], "/")
	if !x.h.begin(x) {
		return
	}
	if x.r.Method != http.MethodGet && x.r.Method != http.MethodHead {
		x.refuse(http.StatusMethodNotAllowed, "", "Method Not Allowed")
		return
	}
	r := x.repo(repo)
	if r == nil {
		return
	}
	if !x.granted(r) {
		return
	}
	c := x.revision(r, x.log.Revision)
	if c == nil {
		return
	}
	i, ok := c.byPath[x.log.Path]
	if !ok {
		x.entryNotFound(c, x.log.Path)
		return
	}
	e := c.files[i]
	head := x.w.Header()
	head.Set("X-Repo-Commit", c.id)
	head.Set("Accept-Ranges", "bytes")
	head.Set("Access-Control-Expose-Headers", "X-Repo-Commit,X-Linked-Size,X-Linked-ETag,Link,ETag")
	if !e.lfs {
		if x.h.options.ResolveCache && !cached && strings.Contains(r.id, "/") {
			x.linked(e)
			head.Set("Location", "/api/resolve-cache/models/"+r.id+"/"+c.id+"/"+url.PathEscape(e.Path))
			x.body(http.StatusTemporaryRedirect, "text/plain", []byte("Temporary Redirect. Redirecting to the cache\n"))
			return
		}
		x.serveContent(e, `"`+e.oid+`"`)
		return
	}
	x.linked(e)
	if x.h.options.Xet {
		head.Set("X-Xet-Hash", xetHash(e))
		head.Set("Link", fmt.Sprintf(`<http://%s/api/models/%s/xet-read-token/%s>; rel="xet-auth"`, x.r.Host, r.id, c.id))
	}
	link := x.h.sign(r.id, c.id, e)
	if link == "" {
		x.serveContent(e, `"`+e.sha256+`"`)
		return
	}
	head.Set("Location", link)
	x.body(http.StatusFound, "text/plain", []byte("Found. Redirecting to "+link+"\n"))
}

func (x *exchange) linked(e entry) {
	x.w.Header().Set("X-Linked-Size", strconv.FormatInt(e.size, 10))
	x.w.Header().Set("X-Linked-Etag", `"`+e.etag()+`"`)
}

func (x *exchange) granted(r *Repo) bool {
	x.h.mu.Lock()
	gated := r.gated && !slices.Contains(x.h.tokens[x.token()], r.id)
	x.h.mu.Unlock()
	switch {
	case !gated:
		return true
	case !x.log.Token:
		x.refuse(http.StatusUnauthorized, "GatedRepo", "Access to model "+r.id+" is restricted. You must have access to it and be authenticated to access it. Please log in.")
	default:
		x.refuse(http.StatusForbidden, "GatedRepo", "Access to model "+r.id+" is restricted and you are not in the authorized list. Visit the page of the model to ask for access.")
	}
	return false
}

func (x *exchange) json(status int, v any) {
	b, err := json.Marshal(v)
	if err != nil {
		panic(err) // of our own types: cannot be
	}
	x.body(status, "application/json; charset=utf-8", b)
}

func (x *exchange) body(status int, contentType string, b []byte) {
	x.w.Header().Set("Content-Type", contentType)
	x.send(status, nopCloser{bytes.NewReader(b)}, 0, int64(len(b)))
}

// serveContent gives a file, or the one range of it that is asked for.
func (x *exchange) serveContent(e entry, tag string) {
	head := x.w.Header()
	head.Set("Etag", tag)
	head.Set("Accept-Ranges", "bytes")
	head.Set("Content-Type", "application/octet-stream")
	head.Set("Content-Disposition", `inline; filename="file"`)
	body, err := e.Content.Open()
	if err != nil {
		x.refuse(http.StatusInternalServerError, "", err.Error())
		return
	}
	defer body.Close()

	spec := x.r.Header.Get("Range")
	if cond := x.r.Header.Get("If-Range"); cond != "" && cond != tag || x.fault.IgnoreRange {
		spec = ""
	}
	if spec == "" {
		x.send(http.StatusOK, body, 0, e.size)
		return
	}
	first, last, err := parseRange(spec, e.size)
	switch {
	case errors.Is(err, errUnsatisfiable):
		head.Set("Content-Range", "bytes */"+strconv.FormatInt(e.size, 10))
		x.refuse(http.StatusRequestedRangeNotSatisfiable, "", "Range Not Satisfiable")
		return
	case err != nil: // several ranges, or none that can be read: RFC 9110 lets these be ignored
		x.send(http.StatusOK, body, 0, e.size)
		return
	}
	last = max(first, last-x.fault.Shorten)
	head.Set("Content-Range", fmt.Sprintf("bytes %d-%d/%d", first, last, e.size))
	if x.fault.ContentRange != "" {
		head.Set("Content-Range", x.fault.ContentRange)
	}
	x.send(http.StatusPartialContent, body, first, last-first+1)
}

var (
	errUnsatisfiable = errors.New("not within the file")
	errRange         = errors.New("not one range")
)

func parseRange(spec string, size int64) (first, last int64, err error) {
	spec, ok := strings.CutPrefix(spec, "bytes=")
	from, to, dash := strings.Cut(spec, "-")
	if !ok || !dash || strings.Contains(spec, ",") {
		return 0, 0, errRange
	}
	if from == "" { // the last bytes
		n, err := strconv.ParseInt(to, 10, 64)
		switch {
		case err != nil || n < 0:
			return 0, 0, errRange
		case n == 0 || size == 0:
			return 0, 0, errUnsatisfiable
		}
		return max(0, size-n), size - 1, nil
	}
	if first, err = strconv.ParseInt(from, 10, 64); err != nil || first < 0 {
		return 0, 0, errRange
	}
	last = size - 1
	if to != "" {
		if last, err = strconv.ParseInt(to, 10, 64); err != nil || last < first {
			return 0, 0, errRange
		}
		last = min(last, size-1)
	}
	if first >= size {
		return 0, 0, errUnsatisfiable
	}
	return first, last, nil
}

// send gives n bytes of body from offset on, with the faults of a body.
func (x *exchange) send(status int, body io.ReaderAt, offset, n int64) {
	f := x.fault
	if !f.Chunked {
		x.w.Header().Set("Content-Length", strconv.FormatInt(n, 10))
	}
	x.header()
	x.status(status)
	if x.r.Method == http.MethodHead {
		return
	}
	if f.Chunked {
		_ = http.NewResponseController(x.w).Flush()
	}
	until := n
	if f.CutAfter != nil {
		until = min(until, *f.CutAfter)
	}
	if f.StallAfter != nil {
		until = min(until, *f.StallAfter)
	}
	if f.Flip != nil {
		body = flipped{body, *f.Flip}
	}
	x.sent(until) // before the client can have it, and ask
	sent, err := x.copy(body, offset, until)
	x.sent(sent - until)
	switch {
	case err != nil:
		x.abort()
	case f.CutAfter != nil:
		x.abort()
	case f.StallAfter != nil:
		x.stall()
	case f.Extra > 0:
		_, _ = x.w.Write(make([]byte, f.Extra))
	}
}

func (x *exchange) copy(body io.ReaderAt, offset, n int64) (int64, error) {
	// A file goes out by sendfile.
	if file, ok := body.(*os.File); ok {
		if _, err := file.Seek(offset, io.SeekStart); err != nil {
			return 0, err
		}
		return io.CopyN(x.w, file, n)
	}
	buf := make([]byte, min(n, patternBlock)+1)
	return io.CopyBuffer(struct{ io.Writer }{x.w}, struct{ io.Reader }{io.NewSectionReader(body, offset, n)}, buf)
}

// flipped is content with one byte that is wrong.
type flipped struct {
	io.ReaderAt
	at int64
}

func (f flipped) ReadAt(p []byte, off int64) (int, error) {
	n, err := f.ReaderAt.ReadAt(p, off)
	if i := f.at - off; i >= 0 && i < int64(n) {
		p[i] ^= 0xff
	}
	return n, err
}
