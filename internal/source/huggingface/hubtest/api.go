package hubtest

import (
	"encoding/base64"
	"encoding/json"
	"fmt"
	"net/http"
	"net/url"
	"path"
	"slices"
	"strconv"
	"strings"
)

// ServeHTTP is the hub itself.
func (h *Hub) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if h.options.Control && h.control(w, r) {
		return
	}
	x := &exchange{h: h, w: w, r: r, log: &Request{Kind: KindOther}}
	segments, ok := split(r.URL.EscapedPath())
	if !ok {
		x.log.Kind = KindOther
		if h.begin(x) {
			x.refuse(http.StatusBadRequest, "", "the path is not quoted as it should be")
		}
		return
	}
	switch {
	case len(segments) > 4 && segments[0] == "api" && segments[1] == "resolve-cache" && segments[2] == "models":
		x.resolve(segments[3:], true)
	case len(segments) > 2 && segments[0] == "api" && segments[1] == "models":
		x.api(segments[2:])
	case segments[0] == "api":
		if !h.begin(x) {
			return
		}
		if segments[len(segments)-1] == "whoami-v2" {
			x.whoami()
			return
		}
		x.refuse(http.StatusNotFound, "", "Not Found")
	default:
		x.resolve(segments, false)
	}
}

// split cuts a path at its slashes; a quoted slash stays in its segment.
func split(escaped string) ([]string, bool) {
	parts := strings.Split(strings.TrimPrefix(escaped, "/"), "/")
	for i, p := range parts {
		s, err := url.PathUnescape(p)
		if err != nil {
			return nil, false
		}
		parts[i] = s
	}
	return parts, true
}

// verb cuts segments at the first of the verbs: ORG/NAME or NAME, verb, rest.
func verb(segments []string, verbs ...string) (repo, found string, rest []string) {
	for i := 1; i <= 2 && i < len(segments); i++ {
		if slices.Contains(verbs, segments[i]) {
			return strings.Join(segments[:i], "/"), segments[i], segments[i+1:]
		}
	}
	return strings.Join(segments, "/"), "", nil
}

func (x *exchange) api(segments []string) {
	repo, what, rest := verb(segments, "revision", "tree", "refs", "paths-info")
	x.log.Repo, x.log.Kind = repo, what
	if what == "" {
		x.log.Kind = KindRevision
		rest = []string{"main"}
	}
	if x.log.Kind != KindRefs && len(rest) > 0 {
		x.log.Revision = rest[0]
	}
	if x.log.Kind == KindTree && len(rest) > 1 {
		x.log.Path = strings.Join(rest[1:], "/")
	}
	if !x.h.begin(x) {
		return
	}
	r := x.repo(repo)
	if r == nil {
		return
	}
	if what == KindRefs {
		x.refs(r)
		return
	}
	c := x.revision(r, x.log.Revision)
	if c == nil {
		return
	}
	switch what {
	case KindTree:
		x.tree(r, c, x.log.Path)
	case KindPathsInfo:
		x.pathsInfo(c)
	default:
		x.info(r, c)
	}
}

// repo finds a repository that the caller may know of, or refuses as the hub
// does: to strangers it does not tell private from absent.
func (x *exchange) repo(id string) *Repo {
	x.h.mu.Lock()
	r := x.h.repos[id]
	grants, known := x.h.tokens[x.token()]
	hidden := r == nil || r.private && !slices.Contains(grants, id)
	x.h.mu.Unlock()
	switch {
	case x.log.Token && !known:
		x.refuse(http.StatusUnauthorized, "", "Invalid credentials in Authorization header")
		return nil
	case hidden && !x.log.Token:
		x.refuse(http.StatusUnauthorized, "RepoNotFound", "Invalid username or password.")
		return nil
	case hidden:
		x.refuse(http.StatusNotFound, "RepoNotFound", "Repository not found")
		return nil
	}
	return r
}

func (x *exchange) revision(r *Repo, revision string) *commit {
	x.h.mu.Lock()
	c := r.resolve(revision)
	x.h.mu.Unlock()
	if c == nil {
		x.refuse(http.StatusNotFound, "RevisionNotFound", "Invalid rev id: "+revision)
	}
	return c
}

func (x *exchange) whoami() {
	x.h.mu.Lock()
	_, known := x.h.tokens[x.token()]
	x.h.mu.Unlock()
	if !known {
		x.refuse(http.StatusUnauthorized, "", "Invalid username or password.")
		return
	}
	x.json(http.StatusOK, map[string]any{"type": "user", "id": "1", "name": "tester", "orgs": []any{}})
}

func (x *exchange) refs(r *Repo) {
	type named struct {
		Name   string `json:"name"`
		Ref    string `json:"ref"`
		Commit string `json:"targetCommit"`
	}
	list := func(prefix string, refs []ref) []named {
		out := []named{}
		for _, y := range refs {
			out = append(out, named{y.name, prefix + y.name, y.commit})
		}
		return out
	}
	x.h.mu.Lock()
	body := map[string]any{
		"branches": list("refs/heads/", r.branches),
		"tags":     list("refs/tags/", r.tags),
		"converts": []named{},
	}
	x.h.mu.Unlock()
	x.json(http.StatusOK, body)
}

const date = "2024-01-01T00:00:00.000Z"

func (x *exchange) info(r *Repo, c *commit) {
	x.h.mu.Lock()
	private, gated := r.private, any(false)
	if r.gated {
		gated = "manual"
	}
	x.h.mu.Unlock()
	body := map[string]any{
		"_id": c.id[:24], "id": r.id, "modelId": r.id, "sha": c.id, "private": private, "gated": gated, "disabled": false,
		"author": path.Dir(r.id), "lastModified": date, "createdAt": date, "downloads": 0, "likes": 0, "tags": []string{}, "spaces": []string{},
	}
	// Of very large repositories the hub does not name all files here.
	if c.lazy == 0 {
		siblings := []map[string]any{}
		for _, e := range c.files {
			s := map[string]any{"rfilename": e.Path}
			if b := x.r.URL.Query().Get("blobs"); b == "true" || b == "True" {
				s["size"], s["blobId"] = e.size, e.treeOID()
				if e.lfs {
					s["lfs"] = map[string]any{"sha256": e.sha256, "size": e.size, "pointerSize": len(pointer(e.sha256, e.size))}
				}
			}
			siblings = append(siblings, s)
		}
		body["siblings"] = siblings
	}
	x.json(http.StatusOK, body)
}

type treeJSON struct {
	Type    string   `json:"type"`
	OID     string   `json:"oid"`
	Size    int64    `json:"size"`
	Path    string   `json:"path"`
	LFS     *lfsJSON `json:"lfs,omitempty"`
	XetHash string   `json:"xetHash,omitempty"`

	LastCommit *commitJSON `json:"lastCommit,omitempty"`
}

type lfsJSON struct {
	OID         string `json:"oid"`
	Size        int64  `json:"size"`
	PointerSize int    `json:"pointerSize"`
}

type commitJSON struct {
	ID    string `json:"id"`
	Title string `json:"title"`
	Date  string `json:"date"`
}

func (x *exchange) treeEntry(c *commit, e entry, expand bool) treeJSON {
	out := treeJSON{Type: "file", OID: e.treeOID(), Size: e.size, Path: e.Path}
	if e.ClaimSize != nil {
		out.Size = *e.ClaimSize
	}
	if e.ClaimType != "" {
		out.Type = e.ClaimType
	}
	if e.lfs {
		oid := e.sha256
		if e.ClaimSHA256 != "" {
			oid = e.ClaimSHA256
		}
		out.LFS = &lfsJSON{OID: oid, Size: out.Size, PointerSize: len(pointer(e.sha256, e.size))}
		if x.h.options.Xet {
			out.XetHash = xetHash(e)
		}
	}
	if expand {
		out.LastCommit = &commitJSON{ID: c.id, Title: "Upload", Date: date}
	}
	return out
}

// xetHash has the form of one; nothing can be read by it.
func xetHash(e entry) string { return e.sha256[32:] + e.sha256[:32] }

func isTrue(s string) bool { return s == "true" || s == "True" || s == "1" }

func (x *exchange) tree(r *Repo, c *commit, dir string) {
	q := x.r.URL.Query()
	expand, recursive := isTrue(q.Get("expand")), isTrue(q.Get("recursive"))

	// The list is folders, files, and those that are made up as they are read.
	folders, files := slices.Clone(c.dirs), c.files
	lazy := c.lazy
	if dir != "" || !recursive {
		inside := func(p string) bool {
			rest := p
			if dir != "" {
				var ok bool
				if rest, ok = strings.CutPrefix(p, dir+"/"); !ok {
					return false
				}
			}
			return recursive || !strings.Contains(rest, "/")
		}
		if dir != "" && !slices.Contains(folders, dir) {
			x.entryNotFound(c, dir)
			return
		}
		folders = slices.DeleteFunc(folders, func(p string) bool { return !inside(p) })
		files = slices.DeleteFunc(slices.Clone(files), func(e entry) bool { return !inside(e.Path) })
		lazy = 0
	}
	limit := x.h.options.PageSize
	if n, err := strconv.Atoi(q.Get("limit")); err == nil && n > 0 {
		limit = min(n, limit)
	}
	from := 0
	if cursor := q.Get("cursor"); cursor != "" {
		b, err := base64.URLEncoding.DecodeString(cursor)
		if err == nil {
			from, err = strconv.Atoi(string(b))
		}
		if err != nil || from < 0 {
			x.refuse(http.StatusBadRequest, "", "Invalid cursor")
			return
		}
	}
	total := len(folders) + len(files) + lazy
	until := min(total, from+limit)
	page := make([]treeJSON, 0, max(0, until-from))
	for i := from; i < until; i++ {
		switch j := i - len(folders); {
		case j < 0:
			page = append(page, treeJSON{Type: "directory", OID: gitOIDOf(folders[i]), Path: folders[i]})
		case j < len(files):
			page = append(page, x.treeEntry(c, files[j], expand))
		default:
			page = append(page, x.treeEntry(c, c.at(len(c.files)+j-len(files)), expand))
		}
	}
	if until < total {
		q.Set("cursor", base64.URLEncoding.EncodeToString([]byte(strconv.Itoa(until))))
		base := x.h.options.LinkBase
		if base == "" {
			base = "http://" + x.r.Host
		}
		x.w.Header().Set("Link", fmt.Sprintf("<%s%s?%s>; rel=\"next\"", base, x.r.URL.EscapedPath(), q.Encode()))
	}
	x.json(http.StatusOK, page)
}

func (x *exchange) pathsInfo(c *commit) {
	if x.r.Method != http.MethodPost {
		x.refuse(http.StatusMethodNotAllowed, "", "Method Not Allowed")
		return
	}
	x.r.Body = http.MaxBytesReader(x.w, x.r.Body, 1<<20)
	var paths []string
	var expand bool
	if strings.HasPrefix(x.r.Header.Get("Content-Type"), "application/json") {
		var in struct {
			Paths  []string `json:"paths"`
			Expand bool     `json:"expand"`
		}
		if err := json.NewDecoder(x.r.Body).Decode(&in); err != nil {
			x.refuse(http.StatusBadRequest, "", "Bad Request")
			return
		}
		paths, expand = in.Paths, in.Expand
	} else {
		if err := x.r.ParseForm(); err != nil {
			x.refuse(http.StatusBadRequest, "", "Bad Request")
			return
		}
		paths, expand = x.r.PostForm["paths"], isTrue(x.r.PostForm.Get("expand"))
	}
	out := []treeJSON{}
	for _, p := range paths {
		if i, ok := c.byPath[p]; ok {
			out = append(out, x.treeEntry(c, c.files[i], expand))
		} else if slices.Contains(c.dirs, p) {
			out = append(out, treeJSON{Type: "directory", OID: gitOIDOf(p), Path: p})
		}
	}
	x.json(http.StatusOK, out)
}

func (x *exchange) entryNotFound(c *commit, name string) {
	x.w.Header().Set("X-Repo-Commit", c.id)
	x.refuse(http.StatusNotFound, "EntryNotFound", "Entry not found: "+strings.ToValidUTF8(strings.Map(printable, name), "?"))
}

func printable(r rune) rune {
	if r < ' ' || r == 0x7f {
		return '?'
	}
	return r
}
