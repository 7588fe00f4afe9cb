// Package hubtest is a Hugging Face hub for tests: the HTTP API that clients
// read models by, over content that tests make up.
//
// It answers as the real hub does, so far as the huggingface_hub client can
// tell: revisions, paged trees, resolve with its headers, HEAD, ranges, data of
// LFS files on a second host behind signed links, private and gated
// repositories, X-Error-Code. A test in this package runs real clients on it.
// Beyond that it can be told to fail (Fault, File) and it writes down what it
// was asked (Requests).
//
// Start serves it for the time of a test, Serve and ServeDir for a process.
package hubtest

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strings"
	"sync"
	"time"
)

// Options of a hub. The zero value is close to the real one.
type Options struct {
	// LFSThreshold is the size in bytes from which on a file is in LFS. 0: as
	// at the real hub, by name (.safetensors, .bin, ...) or from 10 MiB on.
	// Negative: none is.
	LFSThreshold int64
	PageSize     int  // entries of a page of a tree; 1000
	Xet          bool // say that LFS files are in Xet storage too
	ResolveCache bool // small files by a redirect on the same host
	Direct       bool // LFS files without a second host

	LinkLife time.Duration // of links to the second host; an hour
	LinkUses int           // requests that one link is good for; 0: any number

	// LinkBase stands in front of the link to the next page, in place of the
	// hub's own address, as behind a mirror that rewrites nothing.
	LinkBase string

	// Control lets other processes ask and tell the hub what tests in this
	// one do: GET /_test/requests (the log), POST /_test/fault (a Fault as
	// JSON), DELETE /_test/fault (none any more).
	Control bool
}

// Hub is the state of a hub. It is an http.Handler for the hub itself; CDN
// gives that of the second host.
type Hub struct {
	options Options

	mu       sync.Mutex
	repos    map[string]*Repo
	tokens   map[string][]string // repositories that a token may read
	faults   []*armed
	requests []*Request
	links    map[string]*signed
	cdnURL   string
	leaks    []string
	known    map[Content][2]string // sums of content that is costly to read

	closed    chan struct{}
	closeOnce sync.Once
}

// signed is a link that was given out.
type signed struct {
	repo, path, commit string
	file               entry
	ends               time.Time
	uses               int
}

// NewHub makes an empty hub that nobody serves yet.
func NewHub(o Options) *Hub {
	if o.PageSize <= 0 {
		o.PageSize = 1000
	}
	if o.LinkLife <= 0 {
		o.LinkLife = time.Hour
	}
	return &Hub{
		options: o,
		repos:   map[string]*Repo{},
		tokens:  map[string][]string{},
		links:   map[string]*signed{},
		known:   map[Content][2]string{},
		closed:  make(chan struct{}),
	}
}

// Repo gives a repository by its id, ORG/NAME, and makes it if needed.
func (h *Hub) Repo(id string) *Repo {
	h.mu.Lock()
	defer h.mu.Unlock()
	if r := h.repos[id]; r != nil {
		return r
	}
	r := &Repo{hub: h, id: id, commits: map[string]*commit{}}
	h.repos[id] = r
	return r
}

// AddToken makes a token known and lets it read these private and gated
// repositories.
func (h *Hub) AddToken(token string, repos ...string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.tokens[token] = append(h.tokens[token], repos...)
}

// SetCDN tells under which URL the second host is reached. Without one, data
// of LFS files comes from the hub itself.
func (h *Hub) SetCDN(url string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.cdnURL = url
}

// ExpireLinks ends all links to the second host that were given out so far.
func (h *Hub) ExpireLinks() {
	h.mu.Lock()
	defer h.mu.Unlock()
	clear(h.links)
}

// Leaks lists the requests that brought a token to the second host.
func (h *Hub) Leaks() []string {
	h.mu.Lock()
	defer h.mu.Unlock()
	return slices.Clone(h.leaks)
}

// Close ends requests that a fault stalls.
func (h *Hub) Close() { h.closeOnce.Do(func() { close(h.closed) }) }

func (h *Hub) sums(c Content) (string, string, error) {
	switch c.(type) {
	case pattern, onDisk: // that may be large
	default:
		return sums(c)
	}
	h.mu.Lock()
	s, ok := h.known[c]
	h.mu.Unlock()
	if ok {
		return s[0], s[1], nil
	}
	sha, oid, err := sums(c)
	if err == nil {
		h.mu.Lock()
		h.known[c] = [2]string{sha, oid}
		h.mu.Unlock()
	}
	return sha, oid, err
}

// Kinds of requests, for Request and Fault.
const (
	KindRevision  = "revision"   // the commit of a branch or tag
	KindTree      = "tree"       // the list of files
	KindPathsInfo = "paths-info" // parts of that list
	KindRefs      = "refs"       // branches and tags
	KindResolve   = "resolve"    // a file at the hub: its data, or a redirect
	KindData      = "data"       // an LFS file at the second host
	KindOther     = "other"
)

// Request is one line of the hub's log.
type Request struct {
	Kind     string `json:"kind"`
	Method   string `json:"method"`
	URL      string `json:"url"` // path and query
	Repo     string `json:"repo,omitempty"`
	Revision string `json:"revision,omitempty"`
	Path     string `json:"path,omitempty"` // of the file
	Range    string `json:"range,omitempty"`
	IfRange  string `json:"if_range,omitempty"`
	Token    bool   `json:"token"`  // one was sent
	Status   int    `json:"status"` // of the answer; 0: none was given
	Bytes    int64  `json:"bytes"`  // of the body that were sent
}

// Requests is the log so far, in the order of arrival.
func (h *Hub) Requests() []Request {
	h.mu.Lock()
	defer h.mu.Unlock()
	out := make([]Request, len(h.requests))
	for i, r := range h.requests {
		out[i] = *r
	}
	return out
}

// ResetRequests empties the log.
func (h *Hub) ResetRequests() {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.requests = nil
}

// Asked counts requests of a kind for a file; an empty kind or path means any.
func (h *Hub) Asked(kind, path string) int {
	n := 0
	for _, r := range h.Requests() {
		if (kind == "" || r.Kind == kind) && (path == "" || r.Path == path) {
			n++
		}
	}
	return n
}

// Sent sums up the bytes of files that went out, from both hosts.
func (h *Hub) Sent(path string) int64 {
	var n int64
	for _, r := range h.Requests() {
		if (r.Kind == KindData || r.Kind == KindResolve && r.Status < 300) && (path == "" || r.Path == path) {
			n += r.Bytes
		}
	}
	return n
}

// exchange is one request on its way.
type exchange struct {
	h     *Hub
	w     http.ResponseWriter
	r     *http.Request
	log   *Request
	fault Fault
}

// begin writes the request down and finds out whether a fault strikes it. It
// tells whether the exchange goes on.
func (h *Hub) begin(x *exchange) bool {
	x.log.Method = x.r.Method
	x.log.URL = x.r.URL.RequestURI()
	x.log.Range = x.r.Header.Get("Range")
	x.log.IfRange = x.r.Header.Get("If-Range")
	x.log.Token = x.r.Header.Get("Authorization") != ""
	h.mu.Lock()
	h.requests = append(h.requests, x.log)
	x.fault = h.strike(*x.log)
	h.mu.Unlock()
	return x.applyFault()
}

// status is written down before it is sent, so that whoever has the answer
// finds it in the log.
func (x *exchange) status(code int) {
	x.h.mu.Lock()
	x.log.Status = code
	x.h.mu.Unlock()
	x.w.WriteHeader(code)
}

func (x *exchange) sent(n int64) {
	x.h.mu.Lock()
	x.log.Bytes += n
	x.h.mu.Unlock()
}

// refuse answers as the hub does to what it will not give.
func (x *exchange) refuse(status int, code, text string) {
	if code != "" {
		x.w.Header().Set("X-Error-Code", code)
	}
	x.w.Header().Set("X-Error-Message", text)
	x.json(status, map[string]string{"error": text})
}

func (x *exchange) token() string {
	t, _ := strings.CutPrefix(x.r.Header.Get("Authorization"), "Bearer ")
	return t
}

// sign gives a link to the second host, or nothing where there is none.
func (h *Hub) sign(repo, commit string, e entry) string {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.cdnURL == "" || h.options.Direct {
		return ""
	}
	sum := sha256.Sum256(fmt.Appendf(nil, "%d %s %s %s", len(h.requests), repo, commit, e.Path))
	signature := hex.EncodeToString(sum[:])
	ends := time.Now().Add(h.options.LinkLife)
	h.links[signature] = &signed{repo: repo, path: e.Path, commit: commit, file: e, ends: ends}
	return fmt.Sprintf("%s/repos/%s/%s?Expires=%d&Signature=%s", h.cdnURL, e.sha256[:2], e.sha256, ends.Unix(), signature)
}

// CDN is the second host: it gives data to whoever has a link.
func (h *Hub) CDN() http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		x := &exchange{h: h, w: w, r: r, log: &Request{Kind: KindData}}
		h.mu.Lock()
		if r.Header.Get("Authorization") != "" || r.Header.Get("Cookie") != "" {
			h.leaks = append(h.leaks, r.Method+" "+r.URL.RequestURI())
		}
		l := h.links[r.URL.Query().Get("Signature")]
		good := false
		if l != nil {
			l.uses++
			good = time.Now().Before(l.ends) && (h.options.LinkUses == 0 || l.uses <= h.options.LinkUses)
			x.log.Repo, x.log.Revision, x.log.Path = l.repo, l.commit, l.path
		}
		h.mu.Unlock()
		if !h.begin(x) {
			return
		}
		if !good || !strings.HasSuffix(r.URL.Path, "/"+l.file.sha256) {
			w.Header().Set("Content-Type", "application/xml")
			x.status(http.StatusForbidden)
			n, _ := io.WriteString(w, "<Error><Code>AccessDenied</Code><Message>Request has expired</Message></Error>")
			x.sent(int64(n))
			return
		}
		// Such a store has tags of its own.
		x.serveContent(l.file, `"`+l.file.sha256[:32]+`"`)
	})
}
