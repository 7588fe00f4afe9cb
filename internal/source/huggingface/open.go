package huggingface

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"

	"github.com/larder-project/larder/internal/reference"
	"github.com/larder-project/larder/internal/source"
)

const (
	// linkLife is how long a link to a file's data is used again. The hub
	// signs them for an hour; one that ends sooner is noticed and renewed.
	linkLife = 20 * time.Minute
	// freshStart is how much of a body must arrive before its earlier
	// failures are forgotten: a hub that gives a byte and hangs up does not
	// keep a reader for ever.
	freshStart = 1 << 20
)

// Open reads a range of a file. A connection that breaks is taken up again
// where it broke, within the limit of retries.
func (s *Source) Open(ctx context.Context, f source.File, offset, length int64) (io.ReadCloser, error) {
	const op = "read"
	snap, err := s.snapshot(ctx)
	if err != nil {
		return nil, err
	}
	s.mu.Lock()
	known, ok := s.files[f.Path]
	s.mu.Unlock()
	switch {
	case !ok:
		return nil, &source.Error{Op: op, What: s.ref.String(), Err: fmt.Errorf("%w: %.200q is not in its list of files", source.ErrNotFound, f.Path)}
	case known != f:
		return nil, &source.Error{Op: op, What: s.name(f.Path), Err: fmt.Errorf("%w: it is asked for with another size or digest", source.ErrChanged)}
	case offset < 0 || length < 0 || offset > f.Size || length > f.Size-offset:
		return nil, &source.Error{Op: op, What: s.name(f.Path), Err: fmt.Errorf("%d bytes from %d on are not within its %d bytes", length, offset, f.Size)}
	}
	r := &reader{
		s: s, ctx: ctx, file: f, commit: snap.Revision,
		whole: offset == 0 && length == f.Size,
		off:   offset, end: offset + length,
		tries: retrier{c: s.client, what: s.name(f.Path)},
	}
	if length == 0 {
		return r, nil // the hub need not be asked for nothing
	}
	if f := r.connect(); f != nil {
		return nil, s.explain(ctx, op, r.file.Path, f)
	}
	return r, nil
}

// reader gives [off, end) of a file.
type reader struct {
	s      *Source
	ctx    context.Context
	file   source.File
	commit string
	whole  bool

	off, end int64
	body     *answer // nil: to be connected
	tries    retrier
	since    int64 // bytes since the last failure
	err      error // of the last Read, for all further ones

	// Of the last answer, to resume from the same object.
	tag    string
	tagURL *url.URL
}

func (r *reader) Read(p []byte) (int, error) {
	for {
		switch {
		case r.err != nil:
			return 0, r.err
		case r.ctx.Err() != nil:
			return 0, r.fail(&failure{err: r.ctx.Err()})
		case len(p) == 0:
			return 0, nil
		case r.off == r.end:
			return 0, r.finish()
		}
		if r.body == nil {
			if f := r.connect(); f != nil {
				return 0, r.fail(f)
			}
		}
		n, err := r.body.Read(p[:min(int64(len(p)), r.end-r.off)])
		if n > 0 {
			r.off += int64(n)
			if r.since += int64(n); r.since >= freshStart {
				r.tries.failed = 0
			}
			return n, nil // if there was an error too, it comes again
		}
		if err == nil {
			continue
		}
		if r.since == 0 {
			r.s.forget(r.file.Path, r.body.url) // perhaps another link does better
		}
		if f := r.again(broken(r.ctx, err, r.body.url)); f != nil {
			return 0, r.fail(f)
		}
	}
}

// broken is the failure of a body that ended too early.
func broken(ctx context.Context, err error, at *url.URL) *failure {
	if outer := ctx.Err(); outer != nil {
		return &failure{err: outer}
	}
	if errors.Is(err, io.EOF) {
		err = io.ErrUnexpectedEOF
	}
	return &failure{err: fmt.Errorf("%w: the connection broke off: %w", source.ErrUnavailable, err), retry: true, at: at}
}

// finish ends a reader that has given everything. Where the file was asked for
// as a whole and its length was not announced, it sees whether there is more.
func (r *reader) finish() error {
	if r.whole && r.body != nil && r.body.StatusCode == http.StatusOK && r.body.ContentLength < 0 {
		if n, _ := io.ReadFull(r.body, make([]byte, 1)); n > 0 {
			return r.fail(changed("the hub sends more than the %d bytes that it listed", r.file.Size))
		}
	}
	r.drop()
	r.err = io.EOF
	return r.err
}

func (r *reader) fail(f *failure) error {
	r.drop()
	r.err = r.s.explain(r.ctx, "read", r.file.Path, f)
	return r.err
}

func (r *reader) drop() {
	if r.body != nil {
		_ = r.body.Close()
		r.body = nil
	}
}

// Close may be called at any time, but not during a Read.
func (r *reader) Close() error {
	r.drop()
	if r.err == nil || errors.Is(r.err, io.EOF) {
		r.err = fmt.Errorf("read %s: %w", r.s.name(r.file.Path), errClosed)
	}
	return nil
}

var errClosed = errors.New("the reader is closed")

func (r *reader) again(f *failure) *failure {
	r.drop()
	r.since = 0
	return r.tries.next(r.ctx, f)
}

// connect asks for [off, end) until there is a body that starts at off.
func (r *reader) connect() *failure {
	for {
		f := r.connectOnce()
		if f == nil {
			return nil
		}
		if f := r.again(f); f != nil {
			return f
		}
	}
}

func (r *reader) connectOnce() *failure {
	c := r.s.client
	header := http.Header{"Accept-Encoding": {"identity"}, "Accept": {"*/*"}}
	ranged := r.off > 0 || r.end < r.file.Size
	if ranged {
		header.Set("Range", "bytes="+strconv.FormatInt(r.off, 10)+"-"+strconv.FormatInt(r.end-1, 10))
	}
	direct := c.url("/"+r.s.ref.Repo+"/resolve/"+r.commit+"/"+quotePath(r.file.Path), nil)
	at, known := r.s.link(r.file.Path)
	if !known {
		at = direct
	}
	// With If-Range, a server that has another object now sends all of it
	// with status 200 instead of a range that does not fit to ours.
	conditional := ranged && known && r.tag != "" && sameObject(at, r.tagURL)
	if conditional {
		header.Set("If-Range", r.tag)
	}
	a, f := c.once(r.ctx, at, header, func(resp *http.Response) *failure { return checkLinked(resp, r.file) })
	if f != nil {
		if known {
			r.s.forget(r.file.Path, at) // its host may be gone
		}
		return f
	}
	if f := r.accept(a, ranged, conditional); f != nil {
		_ = a.Close()
		if !c.isHub(a.url) {
			// Whatever is wrong at the other host: the next attempt asks the
			// hub for the way again, at once if the way was an old one.
			r.s.forget(r.file.Path, at)
			f.now = known && f.retry
		}
		return f
	}
	r.body = a
	if c.isHub(a.url) {
		return nil
	}
	if !known {
		r.s.remember(r.file.Path, a.url)
	}
	r.tag, r.tagURL = strong(a.Header.Get("Etag")), a.url
	return nil
}

// accept checks that an answer has the bytes asked for, and takes it to off.
func (r *reader) accept(a *answer, ranged, conditional bool) *failure {
	size := r.file.Size
	if e := a.Header.Get("Content-Encoding"); a.StatusCode < 300 && e != "" && !strings.EqualFold(e, "identity") {
		return invalid("it comes with the encoding %.50q, which was not asked for", e)
	}
	switch a.StatusCode {
	case http.StatusPartialContent:
		if !ranged {
			return invalid("a part comes where the whole was asked for")
		}
		got, ok := parseContentRange(a.Header.Get("Content-Range"))
		switch {
		case !ok || got.first < 0:
			return invalid("the Content-Range %.100q cannot be read", a.Header.Get("Content-Range"))
		case got.total >= 0 && got.total != size:
			return changed("the hub listed %d bytes and now has %d", size, got.total)
		case got.first != r.off || got.last >= r.end:
			return invalid("bytes %d-%d were asked for, and %d-%d come", r.off, r.end-1, got.first, got.last)
		case a.ContentLength >= 0 && a.ContentLength != got.last-got.first+1:
			return invalid("bytes %d-%d come with the length %d", got.first, got.last, a.ContentLength)
		}
		return nil // a range that ends sooner is gone on with like a broken one

	case http.StatusOK:
		if a.ContentLength >= 0 && a.ContentLength != size {
			return changed("the hub listed %d bytes and now has %d", size, a.ContentLength)
		}
		if conditional && strong(a.Header.Get("Etag")) != r.tag {
			return changed("its ETag changed from %.100s to %.100s while it was read", r.tag, a.Header.Get("Etag"))
		}
		// A server that knows no ranges: what comes before ours is dropped.
		if n, err := io.CopyN(io.Discard, a, r.off); err != nil {
			if errors.Is(err, io.EOF) && a.ContentLength < 0 {
				return changed("the hub listed %d bytes and now has %d", size, n)
			}
			return broken(r.ctx, err, a.url)
		}
		return nil

	case http.StatusRequestedRangeNotSatisfiable:
		if got, ok := parseContentRange(a.Header.Get("Content-Range")); ok && got.total != size {
			return changed("the hub listed %d bytes and now has %d", size, got.total)
		}
		return invalid("bytes %d-%d of %d are refused (416)", r.off, r.end-1, size)
	}

	f := r.s.client.statusFailure(a)
	if !r.s.client.isHub(a.url) {
		switch a.StatusCode {
		case 400, 401, 403, 404, 410:
			// A link that has ended, or never held. The hub gives another.
			f.err = fmt.Errorf("%w: the link to its data is refused: %d from %s", source.ErrUnavailable, a.StatusCode, a.url.Host)
			f.retry, f.code = true, ""
		}
	}
	return f
}

// checkLinked compares what the hub says of a file, in the answer itself or
// in the redirect to where its data lies, with what it listed.
func checkLinked(resp *http.Response, f source.File) *failure {
	if resp.StatusCode >= 400 {
		return nil
	}
	if n, ok := parseOffset(resp.Header.Get("X-Linked-Size")); ok && n != f.Size {
		return changed("the hub listed %d bytes and now has %d", f.Size, n)
	}
	tag := resp.Header.Get("X-Linked-Etag")
	if tag == "" && resp.StatusCode < 300 {
		tag = resp.Header.Get("Etag")
	}
	// Tags of other kinds, such as a proxy's, say nothing.
	tag = etag(tag)
	if isHex(tag, 64) && f.SHA256 != "" && tag != f.SHA256.Encoded() || isHex(tag, 40) && f.GitOID != "" && tag != f.GitOID {
		return changed("its ETag is %s now", tag)
	}
	return nil
}

func sameObject(a, b *url.URL) bool {
	return a != nil && b != nil && a.Scheme == b.Scheme && a.Host == b.Host && a.EscapedPath() == b.EscapedPath()
}

// link, remember and forget keep the ways to files' data, so that a large file
// read in a hundred ranges costs one request of the hub's rate limit.
func (s *Source) link(path string) (*url.URL, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	l, ok := s.links[path]
	if !ok || time.Since(l.got) > linkLife {
		return nil, false
	}
	return l.url, true
}

func (s *Source) remember(path string, u *url.URL) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.links[path] = link{url: u, got: time.Now()}
}

// forget drops a link unless another reader has renewed it already.
func (s *Source) forget(path string, u *url.URL) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.links[path].url == u {
		delete(s.links, path)
	}
}

// explain makes an error for people of a failure: what was tried, why it
// failed, what can be done.
func (s *Source) explain(ctx context.Context, op, path string, f *failure) error {
	e := &source.Error{Op: op, What: s.name(path), Err: f.err}
	if ctx.Err() != nil {
		return e
	}
	c := s.client
	page := c.endpoint.String() + "/" + s.ref.Repo
	tokens := c.endpoint.String() + "/settings/tokens"
	switch {
	case errors.Is(f.err, source.ErrGated) && c.token == "":
		e.Hint = fmt.Sprintf("accept its conditions at %s, make a token at %s and set HF_TOKEN", page, tokens)
	case errors.Is(f.err, source.ErrGated):
		e.Hint = fmt.Sprintf("the account of this token has no access yet: accept the conditions at %s, or wait for its owners; a fine-grained token also needs the right to read gated repositories", page)
	case errors.Is(f.err, source.ErrUnauthorized) && c.token == "":
		e.Hint = fmt.Sprintf("make a token at %s and set HF_TOKEN", tokens)
	case errors.Is(f.err, source.ErrUnauthorized):
		e.Hint = fmt.Sprintf("the token (HF_TOKEN, or the client's token file) was refused: it may have ended, or lack the right to read this; see %s", tokens)
	case errors.Is(f.err, source.ErrNotFound):
		e.Hint = s.notFoundHint(ctx, page, f)
	case errors.Is(f.err, source.ErrRateLimited):
		e.Hint = "try again later"
		if f.wait > 0 {
			e.Hint = fmt.Sprintf("try again in %s", f.wait)
		}
		if c.token == "" {
			e.Hint += "; with HF_TOKEN the hub allows more"
		}
	case errors.Is(f.err, source.ErrUnavailable) && (f.status == 0 || f.status >= 500):
		e.Hint = fmt.Sprintf("is %s the right hub (HF_ENDPOINT), and does this host reach it? The same command goes on where this one stopped", c.endpoint)
	case errors.Is(f.err, source.ErrInvalid):
		e.Hint = fmt.Sprintf("is %s a Hugging Face hub (HF_ENDPOINT)?", c.endpoint)
	case errors.Is(f.err, source.ErrChanged):
		e.Hint = "try again; if it stays so, the hub or a mirror before it is broken"
	}
	return e
}

func (s *Source) notFoundHint(ctx context.Context, page string, f *failure) string {
	c := s.client
	switch f.code {
	case "RevisionNotFound":
		if names := s.revisions(ctx); names != "" {
			return "there are " + names
		}
		return "see " + page + " for its branches and tags"
	case "EntryNotFound":
		return "it is in the list of files, and still the hub does not have it; see " + page
	}
	hint := "check the name at " + page
	if s.ref.Revision != reference.DefaultRevision {
		hint += " and the revision"
	}
	if c.token == "" {
		hint += "; a private model needs HF_TOKEN"
	} else {
		hint += "; a private model must be open to the token's account"
	}
	return hint
}

// revisions names some that exist. It is help for an error, so it asks once
// and failures are no matter.
func (s *Source) revisions(ctx context.Context) string {
	type named struct {
		Name string `json:"name"`
	}
	var refs struct{ Branches, Tags []named }
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	if _, f := s.client.getJSONOnce(ctx, s.client.url("/api/models/"+s.ref.Repo+"/refs", nil), 1<<20, decodeInto(&refs)); f != nil {
		return ""
	}
	var names []string
	const enough = 10
	for _, r := range append(refs.Branches, refs.Tags...) {
		if _, err := reference.Parse("hf://" + s.ref.Repo + "@" + r.Name); err != nil {
			continue
		}
		if len(names) == enough {
			names = append(names, "…")
			break
		}
		names = append(names, r.Name)
	}
	return strings.Join(names, ", ")
}
