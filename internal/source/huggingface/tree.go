package huggingface

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/url"
	"path"
	"strings"

	"github.com/larder-project/larder/internal/modelpack"
	"github.com/larder-project/larder/internal/source"
	"github.com/opencontainers/go-digest"
)

// Limits on what a hub may answer. They bound memory and time.
const (
	maxInfoBytes  = 16 << 20 // of a revision, which lists the names of its files too
	maxPageBytes  = 64 << 20 // of the tree: the largest allowed one on a single page
	maxEntries    = 2 * modelpack.MaxFiles
	maxEmptyPages = 10
)

// treeEntry is one element of GET /api/models/ID/tree/COMMIT.
type treeEntry struct {
	Type string `json:"type"` // file, directory
	Path string `json:"path"`
	Size int64  `json:"size"`
	OID  string `json:"oid"` // git: of the file, or of its pointer where it has lfs
	LFS  *struct {
		OID  string `json:"oid"` // SHA-256 of the content, hex
		Size *int64 `json:"size"`
	} `json:"lfs"`
}

// file checks an entry and gives what the contract asks for.
func (e treeEntry) file() (source.File, error) {
	if err := modelpack.CheckPath(e.Path); err != nil {
		return source.File{}, err
	}
	f := source.File{Path: e.Path, Size: e.Size}
	if e.LFS != nil {
		f.SHA256 = digest.Digest("sha256:" + strings.TrimPrefix(e.LFS.OID, "sha256:"))
		if err := modelpack.CheckDigest(f.SHA256); err != nil {
			return source.File{}, fmt.Errorf("file %q: %w", e.Path, err)
		}
		if e.LFS.Size != nil {
			f.Size = *e.LFS.Size
		}
	} else {
		if !isHex(e.OID, 40) {
			return source.File{}, fmt.Errorf("file %q has the git id %.100q, that is not 40 hex digits", e.Path, e.OID)
		}
		f.GitOID = e.OID
	}
	if f.Size < 0 {
		return source.File{}, fmt.Errorf("file %q has the size %d", e.Path, f.Size)
	}
	return f, nil
}

// readTree calls add for each entry of a page while it reads it.
func readTree(r io.Reader, add func(treeEntry) error) error {
	dec := json.NewDecoder(r)
	open, err := dec.Token()
	if err != nil {
		return err
	}
	if open != json.Delim('[') {
		return errors.New("the list of files is not a JSON array")
	}
	for dec.More() {
		var e treeEntry
		if err := dec.Decode(&e); err != nil {
			return err
		}
		if err := add(e); err != nil {
			return err
		}
	}
	if _, err := dec.Token(); err != nil {
		return err
	}
	return atEnd(dec)
}

// decodeInto reads one JSON object.
func decodeInto(v any) func(io.Reader) error {
	return func(r io.Reader) error {
		dec := json.NewDecoder(r)
		if err := dec.Decode(v); err != nil {
			return err
		}
		return atEnd(dec)
	}
}

// atEnd refuses more text, and notices a body that breaks off after the JSON.
func atEnd(dec *json.Decoder) error {
	switch _, err := dec.Token(); {
	case err == io.EOF:
		return nil
	case err != nil:
		return err
	}
	return errors.New("text after the JSON")
}

// checkTree takes files sorted by path.
func checkTree(files []source.File) error {
	names := make(map[string]bool, len(files))
	var total int64
	for _, f := range files {
		if names[f.Path] {
			return fmt.Errorf("the path %q is listed twice", f.Path)
		}
		names[f.Path] = true
		if total+f.Size < total {
			return errors.New("the sizes of its files make up more than 2^63 bytes")
		}
		total += f.Size
	}
	for _, f := range files {
		for dir := path.Dir(f.Path); dir != "."; dir = path.Dir(dir) {
			if names[dir] {
				return fmt.Errorf("%q is listed both as a file and as a folder (of %q)", dir, f.Path)
			}
		}
	}
	return nil
}

// nextPage finds rel="next" in Link headers (RFC 8288) and gives the query of
// its URL, or nil where there is none.
func nextPage(headers []string) (url.Values, error) {
	for _, h := range headers {
		for {
			_, rest, ok := strings.Cut(h, "<")
			if !ok {
				break
			}
			target, rest, ok := strings.Cut(rest, ">")
			if !ok {
				break
			}
			params, after := cutParams(rest)
			h = after
			if !isNext(params) {
				continue
			}
			if len(target) > maxLinkBytes {
				return nil, fmt.Errorf("the link to the next page is longer than %d bytes", maxLinkBytes)
			}
			u, err := url.Parse(target)
			if err != nil {
				return nil, errors.New("the link to the next page is not a URL")
			}
			q, err := url.ParseQuery(u.RawQuery)
			if err != nil {
				return nil, errors.New("the link to the next page has a query that cannot be read")
			}
			return q, nil
		}
	}
	return nil, nil
}

const maxLinkBytes = 8192

// cutParams cuts at the comma before the next link, not at one in quotes.
func cutParams(s string) (params, after string) {
	quoted := false
	for i := 0; i < len(s); i++ {
		switch s[i] {
		case '\\':
			if quoted {
				i++
			}
		case '"':
			quoted = !quoted
		case ',':
			if !quoted {
				return s[:i], s[i+1:]
			}
		}
	}
	return s, ""
}

func isNext(params string) bool {
	for p := range strings.SplitSeq(params, ";") {
		name, value, _ := strings.Cut(strings.TrimSpace(p), "=")
		if !strings.EqualFold(strings.TrimSpace(name), "rel") {
			continue
		}
		for rel := range strings.FieldsSeq(strings.Trim(strings.TrimSpace(value), `"`)) {
			if strings.EqualFold(rel, "next") {
				return true
			}
		}
	}
	return false
}

func isHex(s string, n int) bool {
	return len(s) == n && strings.Trim(s, "0123456789abcdef") == ""
}
