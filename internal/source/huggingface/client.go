package huggingface

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/url"
	"strings"
	"sync"
	"time"

	"golang.org/x/time/rate"

	"github.com/larder-project/larder/internal/source"
)

const (
	defaultRetries = 5
	defaultBackoff = 500 * time.Millisecond
	defaultMaxWait = 6 * time.Minute
	defaultIdle    = 30 * time.Second

	longestBackoff = 30 * time.Second
	maxRedirects   = 10
	maxHeaderBytes = 256 << 10
	maxErrorBytes  = 4 << 10
)

// client sends requests to one hub: it knows the token and who may see it,
// follows redirects, waits and tries again.
type client struct {
	transport http.RoundTripper
	endpoint  *url.URL
	token     string
	agent     string
	retries   int
	backoff   time.Duration
	maxWait   time.Duration
	idle      time.Duration
	pace      *rate.Limiter
	onWait    func(string, time.Duration, error)

	mu   sync.Mutex
	hold time.Time // the hub asked for no request before this
}

// PerMinute is a pace for Options: so many calls a minute, of which a tenth may
// come at once. 0 gives none.
func PerMinute(calls int) *rate.Limiter {
	if calls <= 0 {
		return nil
	}
	return rate.NewLimiter(rate.Limit(float64(calls)/60), max(1, calls/10))
}

func newClient(o Options) (*client, error) {
	if o.Endpoint == "" {
		o.Endpoint = DefaultEndpoint
	}
	u, err := url.Parse(strings.TrimRight(o.Endpoint, "/"))
	switch {
	case err != nil || u.Host == "" || u.Scheme != "http" && u.Scheme != "https":
		return nil, fmt.Errorf("the hub's address must be a URL such as %s, and HF_ENDPOINT is not", DefaultEndpoint)
	case u.User != nil || u.RawQuery != "" || u.Fragment != "":
		return nil, errors.New("the hub's address (HF_ENDPOINT) must be a plain URL, without user, '?' or '#'; a token goes into HF_TOKEN")
	}
	if err := checkToken(o.Token); err != nil {
		return nil, err
	}
	c := &client{
		transport: o.Transport,
		endpoint:  u,
		token:     o.Token,
		agent:     o.UserAgent,
		retries:   o.Retries,
		backoff:   o.Backoff,
		maxWait:   o.MaxWait,
		idle:      o.Idle,
		pace:      o.Pace,
		onWait:    o.OnWait,
	}
	if c.transport == nil {
		c.transport = newTransport()
	}
	if c.agent == "" {
		c.agent = "larder"
	}
	if c.retries == 0 {
		c.retries = defaultRetries
	}
	if c.backoff <= 0 {
		c.backoff = defaultBackoff
	}
	if c.maxWait <= 0 {
		c.maxWait = defaultMaxWait
	}
	if c.idle <= 0 {
		c.idle = defaultIdle
	}
	if c.onWait == nil {
		c.onWait = func(string, time.Duration, error) {}
	}
	return c, nil
}

// newTransport is for large files in parallel: HTTP/1.1, one connection for
// each, because over HTTP/2 all of them would share one TCP connection and its
// flow control.
func newTransport() http.RoundTripper {
	t := &http.Transport{
		Proxy:                  http.ProxyFromEnvironment,
		DialContext:            (&net.Dialer{Timeout: 15 * time.Second, KeepAlive: 15 * time.Second}).DialContext,
		TLSHandshakeTimeout:    15 * time.Second,
		MaxIdleConnsPerHost:    32,
		IdleConnTimeout:        60 * time.Second,
		MaxResponseHeaderBytes: maxHeaderBytes,
		Protocols:              new(http.Protocols),
	}
	t.Protocols.SetHTTP1(true)
	return t
}

// url is an address at the hub. path is quoted already.
func (c *client) url(path string, query url.Values) *url.URL {
	u := *c.endpoint
	u.RawPath = c.endpoint.EscapedPath() + path
	u.Path, _ = url.PathUnescape(u.RawPath) // of our own quoting: cannot fail
	u.RawQuery = query.Encode()
	return &u
}

// quote leaves nothing in a path segment that a server could read another way.
func quote(segment string) string {
	return strings.ReplaceAll(url.QueryEscape(segment), "+", "%20")
}

func quotePath(path string) string {
	segments := strings.Split(path, "/")
	for i, s := range segments {
		segments[i] = quote(s)
	}
	return strings.Join(segments, "/")
}

// isHub tells whether a URL is of the hub itself, so that it may see the token.
func (c *client) isHub(u *url.URL) bool {
	return u.Scheme == c.endpoint.Scheme && strings.EqualFold(u.Host, c.endpoint.Host)
}

// failure is why one request did not do.
type failure struct {
	err     error         // wraps a sentinel of package source, or the context's error
	status  int           // of HTTP; 0: there was no answer
	code    string        // X-Error-Code
	token   bool          // a token was sent
	retry   bool          // it may do another time
	at      *url.URL      // of the last request; may be nil
	wait    time.Duration // that the hub asked for; 0: it did not
	limited bool          // the hub counts our requests: all must wait
	now     bool          // try again at once: another address is known
}

func invalid(format string, args ...any) *failure {
	return &failure{err: fmt.Errorf("%w: %s", source.ErrInvalid, fmt.Sprintf(format, args...))}
}

func changed(format string, args ...any) *failure {
	return &failure{err: fmt.Errorf("%w: %s", source.ErrChanged, fmt.Sprintf(format, args...))}
}

// answer is a response whose body gives up when nothing comes any more.
type answer struct {
	*http.Response
	url *url.URL // that answered, after redirects

	ctx    context.Context // of whoever asks
	inner  context.Context // of the request
	cancel context.CancelCauseFunc
	timer  *time.Timer
	idle   time.Duration
	body   io.ReadCloser
}

// Read is only timed while it runs: a slow reader is not a slow hub.
func (a *answer) Read(p []byte) (int, error) {
	if err := a.ctx.Err(); err != nil {
		return 0, err
	}
	a.timer.Reset(a.idle)
	n, err := a.body.Read(p)
	a.timer.Stop()
	if err != nil && !errors.Is(err, io.EOF) {
		err = a.cause(err)
	}
	return n, err
}

// cause finds out why a request was cancelled.
func (a *answer) cause(err error) error {
	if outer := a.ctx.Err(); outer != nil {
		return outer
	}
	if errors.Is(context.Cause(a.inner), errStalled) {
		return fmt.Errorf("%w (%s)", errStalled, a.idle)
	}
	return plain(err)
}

func (a *answer) Close() error {
	a.timer.Stop()
	a.cancel(nil)
	return a.body.Close()
}

// plain takes the URL out of an error: it may be signed, and whoever reads the
// message knows what was asked for.
func plain(err error) error {
	var u *url.Error
	if errors.As(err, &u) {
		return u.Err
	}
	return err
}

// once sends one GET and follows redirects. seen is shown every answer of the
// hub itself, redirects too, and may refuse it. Whatever the status, an answer
// without a failure has to be closed.
func (c *client) once(ctx context.Context, u *url.URL, header http.Header, seen func(*http.Response) *failure) (*answer, *failure) {
	if err := ctx.Err(); err != nil {
		return nil, &failure{err: err}
	}
	inner, cancel := context.WithCancelCause(ctx)
	a := &answer{ctx: ctx, inner: inner, cancel: cancel, idle: c.idle}
	a.timer = time.AfterFunc(c.idle, func() { cancel(errStalled) })
	a.timer.Stop() // it runs only while something is awaited from the other side
	give := func(f *failure) (*answer, *failure) {
		a.timer.Stop()
		cancel(nil)
		return nil, f
	}
	for range maxRedirects + 1 {
		atHub := c.isHub(u)
		if atHub {
			if err := c.waitForHold(ctx); err != nil {
				return give(&failure{err: err})
			}
			if c.pace != nil {
				if err := c.pace.Wait(ctx); err != nil {
					return give(&failure{err: err})
				}
			}
		}
		req := (&http.Request{
			Method: http.MethodGet, URL: u, Host: u.Host,
			Proto: "HTTP/1.1", ProtoMajor: 1, ProtoMinor: 1,
			Header: header.Clone(),
		}).WithContext(inner)
		req.Header.Set("User-Agent", c.agent)
		if atHub && c.token != "" {
			req.Header.Set("Authorization", "Bearer "+c.token)
		}
		a.timer.Reset(c.idle)
		resp, err := c.transport.RoundTrip(req)
		a.timer.Stop()
		if err != nil {
			err = a.cause(err)
			if outer := ctx.Err(); outer != nil {
				return give(&failure{err: outer})
			}
			return give(&failure{err: fmt.Errorf("%w: %w", source.ErrUnavailable, c.redact(err)), retry: true, at: u})
		}
		a.Response, a.url, a.body = resp, u, resp.Body
		if atHub && seen != nil {
			if f := seen(resp); f != nil {
				resp.Body.Close()
				return give(f)
			}
		}
		switch resp.StatusCode {
		case 301, 302, 303, 307, 308:
		default:
			return a, nil
		}
		// Read to its end, the connection can be used again.
		_, _ = io.CopyN(io.Discard, a, maxErrorBytes)
		resp.Body.Close()
		next, f := redirect(u, resp.Header.Get("Location"))
		if f != nil {
			return give(f)
		}
		u = next
	}
	return give(invalid("it redirects more than %d times", maxRedirects))
}

// redirect resolves a Location. It may lead to any host, but not away from
// encryption.
func redirect(from *url.URL, location string) (*url.URL, *failure) {
	if location == "" {
		return nil, invalid("it redirects to nowhere")
	}
	to, err := from.Parse(location)
	switch {
	case err != nil || to.Host == "" || to.Scheme != "http" && to.Scheme != "https":
		return nil, invalid("it redirects to something that is no http address")
	case from.Scheme == "https" && to.Scheme != "https":
		return nil, invalid("it redirects from https to http, on %s", to.Host)
	}
	to.User, to.Fragment, to.RawFragment = nil, "", ""
	return to, nil
}

// statusFailure reads what an error answer says. It does not close it.
func (c *client) statusFailure(a *answer) *failure {
	f := &failure{
		status: a.StatusCode,
		code:   a.Header.Get("X-Error-Code"),
		token:  c.token != "" && c.isHub(a.url),
		at:     a.url,
	}
	kind := source.ErrInvalid
	switch s := a.StatusCode; {
	case f.code == "GatedRepo":
		kind = source.ErrGated
	case s == 401 && !f.token && f.code == "RepoNotFound":
		// To strangers, a hub says the same of private models and of none.
		kind = source.ErrNotFound
	case s == 401 || s == 403 || s == 451:
		kind = source.ErrUnauthorized
	case s == 404 || s == 410:
		kind = source.ErrNotFound
	case s == 429:
		kind, f.retry, f.limited = source.ErrRateLimited, true, true
	case s == 408 || s == 425 || s >= 500:
		kind, f.retry = source.ErrUnavailable, true
	}
	if f.retry {
		f.wait = askedWait(a.Header)
	}
	text := fmt.Sprintf("%d %s", a.StatusCode, http.StatusText(a.StatusCode))
	said := message(a) // read in any case: then the connection can be used again
	if !c.isHub(a.url) {
		text += " from " + a.url.Host
	} else if said != "" {
		text += ": " + said
	}
	f.err = c.redact(fmt.Errorf("%w: %s", kind, text))
	return f
}

// redact makes sure that no error shows the token, even where a hub sends it
// back in its message.
func (c *client) redact(err error) error {
	if c.token == "" || !strings.Contains(err.Error(), c.token) {
		return err
	}
	kept := source.ErrUnavailable
	for _, e := range []error{source.ErrUnauthorized, source.ErrGated, source.ErrNotFound, source.ErrRateLimited, source.ErrInvalid} {
		if errors.Is(err, e) {
			kept = e
		}
	}
	text := strings.ReplaceAll(err.Error(), c.token, "***")
	return fmt.Errorf("%w%s", kept, strings.TrimPrefix(text, kept.Error()))
}

// retrier counts the attempts of one piece of work.
type retrier struct {
	c      *client
	what   string
	failed int
}

// next waits until the work may be tried again, or says why it may not.
func (r *retrier) next(ctx context.Context, f *failure) *failure {
	if !f.retry || r.c.retries < 0 {
		return f
	}
	if r.failed++; r.failed > r.c.retries {
		if f.status == 0 || f.status >= 500 {
			f.err = fmt.Errorf("%w, after %d attempts", f.err, r.failed)
		}
		return f
	}
	if f.now {
		return nil
	}
	wait := r.c.pause(r.failed)
	if f.wait > 0 {
		if f.wait > r.c.maxWait {
			return f
		}
		wait = f.wait + rand.N(r.c.backoff)
	}
	if f.limited && r.c.isHub(f.at) {
		r.c.setHold(time.Now().Add(wait))
	}
	r.c.onWait(r.what, wait, f.err)
	if err := sleep(ctx, wait); err != nil {
		return &failure{err: err}
	}
	return nil
}

// pause doubles with each failure. Half of it is by chance, so that a node's
// many readers do not come back at once.
func (c *client) pause(failed int) time.Duration {
	d := min(c.backoff<<min(failed-1, 20), longestBackoff)
	return d/2 + rand.N(d/2+1)
}

func (c *client) setHold(until time.Time) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if until.After(c.hold) {
		c.hold = until
	}
}

func (c *client) waitForHold(ctx context.Context) error {
	c.mu.Lock()
	d := time.Until(c.hold)
	c.mu.Unlock()
	if d <= 0 {
		return nil
	}
	return sleep(ctx, d)
}

func sleep(ctx context.Context, d time.Duration) error {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return ctx.Err()
	case <-ctx.Done():
		return ctx.Err()
	}
}

// getJSON gets one document of the API, at most limit bytes, and has decode
// read it. decode is called again if the body breaks off. The header is that
// of the answer.
func (c *client) getJSON(ctx context.Context, what string, u *url.URL, limit int64, decode func(io.Reader) error) (http.Header, *failure) {
	tries := retrier{c: c, what: what}
	for {
		h, f := c.getJSONOnce(ctx, u, limit, decode)
		if f == nil {
			return h, nil
		}
		if f := tries.next(ctx, f); f != nil {
			return nil, f
		}
	}
}

func (c *client) getJSONOnce(ctx context.Context, u *url.URL, limit int64, decode func(io.Reader) error) (http.Header, *failure) {
	a, f := c.once(ctx, u, http.Header{"Accept": {"application/json"}}, nil)
	if f != nil {
		return nil, f
	}
	defer a.Close()
	if a.StatusCode != http.StatusOK {
		return nil, c.statusFailure(a)
	}
	body := &limited{r: a, left: limit}
	if err := decode(body); err != nil {
		switch {
		case ctx.Err() != nil:
			return nil, &failure{err: ctx.Err()}
		case body.left < 0:
			return nil, invalid("it is longer than %d bytes", limit)
		case body.err != nil:
			return nil, &failure{err: fmt.Errorf("%w: %w", source.ErrUnavailable, body.err), retry: true, at: a.url}
		}
		return nil, invalid("%v", err)
	}
	return a.Header, nil
}

// limited remembers why reading ended, so that a broken connection is told
// from broken JSON.
type limited struct {
	r    io.Reader
	left int64 // negative: there was more
	err  error // other than io.EOF
}

func (l *limited) Read(p []byte) (int, error) {
	if l.left < 0 {
		return 0, io.ErrUnexpectedEOF
	}
	if int64(len(p)) > l.left+1 {
		p = p[:l.left+1]
	}
	n, err := l.r.Read(p)
	if l.left -= int64(n); l.left < 0 {
		return 0, io.ErrUnexpectedEOF
	}
	if err != nil && err != io.EOF {
		l.err = err
	}
	return n, err
}
