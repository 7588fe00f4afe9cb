// Package huggingface reads models from a Hugging Face hub, or from anything
// that speaks its HTTP API (a mirror, a pull-through cache).
//
// A branch or tag is resolved to a commit once, and everything after that is
// asked for at this commit. The hub is not trusted: what it answers is bounded
// in size and number, paths are checked, and a file that is seen to differ
// from what was listed is an error. Content is not verified here; whoever
// reads it has the size and the SHA-256 or the git id to do so.
//
// The API is the one that the huggingface_hub client uses
// (https://huggingface.co/docs/hub/api). Files in Xet storage are read over
// plain HTTP, which the hub offers for each of them.
package huggingface

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/time/rate"

	"github.com/larder-project/larder/internal/modelpack"
	"github.com/larder-project/larder/internal/reference"
	"github.com/larder-project/larder/internal/source"
)

// DefaultEndpoint is the hub where nothing else is said.
const DefaultEndpoint = "https://huggingface.co"

// Options say what to read and how patiently. Only Repo is needed.
type Options struct {
	Endpoint string   // base URL of the hub; DefaultEndpoint
	Token    string   // sent to the endpoint, and to no other host; may be empty
	Repo     string   // ORG/NAME
	Revision string   // branch, tag or commit; reference.DefaultRevision
	Include  []string // patterns of what to list; empty: everything
	Exclude  []string // patterns of what to leave out of that

	UserAgent string        // "larder"
	Retries   int           // of a request that failed for the moment; 5, negative for none
	Backoff   time.Duration // before the first retry, doubled for each further one; 500 ms
	MaxWait   time.Duration // longest wait that a hub may ask for; 6 minutes, one window of its rate limit
	Idle      time.Duration // longest time without a byte; 30 s

	// Pace bounds how often the hub itself is asked, beside what it says of
	// its own limits. Sources that share one are bounded together; nil: none.
	Pace *rate.Limiter

	// OnWait, if set, is told before each wait: what waits, how long and why.
	// It is called from several goroutines.
	OnWait func(what string, wait time.Duration, cause error)

	// Transport carries the requests; by default one of its own.
	Transport http.RoundTripper
}

// Source is one revision of one repository of a hub.
type Source struct {
	client *client
	ref    reference.Reference
	filter filter

	resolving chan struct{} // holds one token while somebody resolves
	mu        sync.Mutex
	snap      *source.Snapshot
	files     map[string]source.File // of snap, by path
	links     map[string]link        // where the hub sent us for a file's data
}

// link is where a file's data was found, outside of the hub itself. Such a URL
// is signed and holds for an hour or so.
type link struct {
	url *url.URL
	got time.Time
}

var (
	_ source.Source = (*Source)(nil)
	// errStalled is the cause of a request that got no byte for Options.Idle.
	errStalled = errors.New("no answer for too long")
)

// New checks the options. It asks nobody.
func New(o Options) (*Source, error) {
	if o.Revision == "" {
		o.Revision = reference.DefaultRevision
	}
	ref, err := reference.Parse("hf://" + o.Repo + "@" + o.Revision)
	if err != nil {
		return nil, err
	}
	filter, err := newFilter(o.Include, o.Exclude)
	if err != nil {
		return nil, err
	}
	client, err := newClient(o)
	if err != nil {
		return nil, err
	}
	return &Source{
		client:    client,
		ref:       ref,
		filter:    filter,
		resolving: make(chan struct{}, 1),
		links:     map[string]link{},
	}, nil
}

// Snapshot resolves the revision and lists its files, with two requests or,
// for large repositories, one more for each thousand files.
func (s *Source) Snapshot(ctx context.Context) (source.Snapshot, error) {
	snap, err := s.snapshot(ctx)
	if err != nil {
		return source.Snapshot{}, err
	}
	out := *snap
	out.Files = slices.Clone(snap.Files)
	out.References = slices.Clone(snap.References)
	return out, nil
}

func (s *Source) snapshot(ctx context.Context) (*source.Snapshot, error) {
	select {
	case s.resolving <- struct{}{}:
		defer func() { <-s.resolving }()
	case <-ctx.Done():
		return nil, &source.Error{Op: "list files of", What: s.ref.String(), Err: ctx.Err()}
	}
	s.mu.Lock()
	snap := s.snap
	s.mu.Unlock()
	if snap != nil {
		return snap, nil
	}

	commit, err := s.resolve(ctx)
	if err != nil {
		return nil, err
	}
	files, partial, err := s.list(ctx, commit)
	if err != nil {
		return nil, err
	}
	byPath := make(map[string]source.File, len(files))
	for _, f := range files {
		byPath[f.Path] = f
	}
	snap = &source.Snapshot{
		Source:     s.ref.Source(),
		Revision:   commit,
		Partial:    partial,
		Files:      files,
		References: []reference.Reference{s.ref},
	}
	s.mu.Lock()
	s.snap, s.files = snap, byPath
	s.mu.Unlock()
	return snap, nil
}

// resolve turns the revision into a commit.
func (s *Source) resolve(ctx context.Context) (string, error) {
	const op = "resolve"
	var info struct {
		SHA string `json:"sha"`
	}
	u := s.client.url("/api/models/"+s.ref.Repo+"/revision/"+quote(s.ref.Revision), nil)
	if _, f := s.client.getJSON(ctx, s.ref.String(), u, maxInfoBytes, decodeInto(&info)); f != nil {
		return "", s.explain(ctx, op, "", f)
	}
	switch {
	case !reference.IsCommit(info.SHA):
		return "", s.explain(ctx, op, "", invalid("the hub names %.100q as its commit, that is not 40 hex digits", info.SHA))
	case reference.IsCommit(s.ref.Revision) && info.SHA != s.ref.Revision:
		return "", s.explain(ctx, op, "", invalid("the hub answers with commit %s", info.SHA))
	}
	return info.SHA, nil
}

// list pages through the tree of a commit. It stops as soon as there is more
// than a model may have.
func (s *Source) list(ctx context.Context, commit string) (files []source.File, partial bool, err error) {
	const op = "list files of"
	base := s.client.url("/api/models/"+s.ref.Repo+"/tree/"+commit, nil)
	query := url.Values{"recursive": {"true"}, "expand": {"false"}}
	var seen, emptyPages int
	var examples []string // of what the patterns leave out
	for {
		u := *base
		u.RawQuery = query.Encode()
		before := seen
		var page []source.File
		header, f := s.client.getJSON(ctx, s.ref.String(), &u, maxPageBytes, func(r io.Reader) error {
			// A page that broke off is read again from its start.
			page, seen = nil, before
			return readTree(r, func(e treeEntry) error {
				seen++
				if seen > maxEntries {
					return fmt.Errorf("it lists more than %d files and folders", maxEntries)
				}
				if e.Type != "file" {
					return nil
				}
				if !s.filter.keeps(e.Path) {
					partial = true
					if len(examples) < 3 && !slices.Contains(examples, e.Path) {
						examples = append(examples, e.Path)
					}
					return nil
				}
				if len(files)+len(page) == modelpack.MaxFiles {
					return fmt.Errorf("it has more than %d files", modelpack.MaxFiles)
				}
				file, err := e.file()
				if err != nil {
					return fmt.Errorf("%w; --exclude can leave it out", err)
				}
				page = append(page, file)
				return nil
			})
		})
		if f != nil {
			return nil, false, s.explain(ctx, op, "", f)
		}
		files = append(files, page...)

		next, err := nextPage(header.Values("Link"))
		if err != nil {
			return nil, false, s.explain(ctx, op, "", invalid("%v", err))
		}
		if next == nil {
			break
		}
		// Pages without entries could go on for ever.
		if seen == before {
			if emptyPages++; emptyPages > maxEmptyPages {
				return nil, false, s.explain(ctx, op, "", invalid("page after page of the list is empty"))
			}
		}
		// Only the query is taken from the link: a mirror often leaves the
		// hub's own host in it, and the token must not go there.
		maps.Copy(next, url.Values{"recursive": {"true"}, "expand": {"false"}})
		if next.Encode() == query.Encode() {
			return nil, false, s.explain(ctx, op, "", invalid("a page of the list names itself as the next one"))
		}
		query = next
	}
	slices.SortFunc(files, func(a, b source.File) int { return strings.Compare(a.Path, b.Path) })
	if err := checkTree(files); err != nil {
		return nil, false, s.explain(ctx, op, "", invalid("%v", err))
	}
	if len(files) == 0 {
		e := &source.Error{Op: op, What: s.ref.String(), Err: fmt.Errorf("%w: there are no files at this revision", source.ErrNotFound)}
		if partial {
			e.Err = fmt.Errorf("%w: no file is left by --include and --exclude", source.ErrNotFound)
			e.Hint = fmt.Sprintf("there are %d, such as %q; '*' also matches '/'", seen, examples)
		}
		return nil, false, e
	}
	return files, partial, nil
}

// name is the repository with its revision and, if one is meant, the path of
// a file.
func (s *Source) name(path string) string {
	if path == "" {
		return s.ref.String()
	}
	return s.ref.String() + " " + path
}
