package main

import (
	"errors"
	"path"
	"strings"
	"time"

	"github.com/larder-project/larder/internal/modelpack"
	"github.com/larder-project/larder/internal/reference"
	"github.com/larder-project/larder/internal/store"
)

// versionInfo is a version of a model as --json prints it.
type versionInfo struct {
	Digest     string    `json:"digest"`
	References []string  `json:"references"`
	Source     string    `json:"source,omitempty"`
	Revision   string    `json:"revision,omitempty"`
	Partial    bool      `json:"partial,omitempty"`
	Files      int       `json:"files"`
	Size       int64     `json:"size"`
	Created    time.Time `json:"created"`
	Error      string    `json:"error,omitempty"`
}

func describe(v store.Version, m modelpack.Model) versionInfo {
	info := versionInfo{
		Digest:     v.Digest.String(),
		References: v.References,
		Source:     v.Source,
		Revision:   v.Revision,
		Partial:    m.Partial,
		Files:      len(m.Files),
		Size:       m.Size(),
		Created:    v.Created,
	}
	if info.References == nil {
		info.References = []string{}
	}
	return info
}

// resolve finds the version that a person named: by a reference, or by the
// first digits of a digest as ls prints them.
func resolve(st *store.Store, name string) (store.Version, reference.Reference, error) {
	ref, err := reference.Parse(name)
	if err == nil {
		v, notThere := st.Resolve(ref)
		if notThere == nil {
			return v, ref, nil
		}
		err = notThere
	}
	if isDigits(name) && (errors.Is(err, store.ErrNotFound) || errors.Is(err, reference.ErrInvalid)) {
		versions, listErr := st.Versions()
		if listErr != nil {
			return store.Version{}, ref, listErr
		}
		var found []store.Version
		for _, v := range versions {
			if strings.HasPrefix(v.Digest.Encoded(), name) {
				found = append(found, v)
			}
		}
		if len(found) == 1 {
			return found[0], reference.Reference{Kind: reference.Digest, Digest: found[0].Digest}, nil
		}
		if len(found) > 1 {
			return store.Version{}, ref, &usageError{
				err:  errors.New("the digits " + name + " begin the digests of " + plural(len(found), "version")),
				hint: "write more digits, as larder ls --json prints them",
			}
		}
	}
	return store.Version{}, ref, err
}

// isDigits tells whether a name may be the beginning of a digest.
func isDigits(s string) bool {
	return len(s) >= 6 && len(s) <= 64 && strings.Trim(s, "0123456789abcdef") == ""
}

// matches tells whether a pattern of the shell, or a name alone, means a
// reference.
func matches(pattern, ref string) bool {
	r, err := reference.Parse(ref)
	if err == nil && (pattern == r.Source() || pattern == ref) {
		return true
	}
	ok, err := path.Match(pattern, ref)
	return err == nil && ok
}
