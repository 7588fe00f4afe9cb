// Package reference knows what a user may call a model.
//
//	hf://ORG/NAME[@REVISION]   a repository of a Hugging Face hub; the revision
//	                           is a branch, a tag or a commit, "main" by default
//	NAME[:TAG]                 a short name on this node, such as qwen:1.9.3;
//	                           without a tag it is the newest version
//	NAME:CONSTRAINT            the newest version in a range: qwen:~1.9
//	NAME@sha256:HEX            that version of a short name
//	sha256:HEX                 any version in the store, by its manifest digest
//
// The package is pure: it parses and compares, and looks nothing up.
package reference

import (
	"errors"
	"fmt"
	"regexp"
	"strings"

	"github.com/Masterminds/semver/v3"
	"github.com/opencontainers/go-digest"
)

// ErrInvalid is wrapped by every refusal of Parse.
var ErrInvalid = errors.New("invalid model reference")

// Kind tells the forms of a reference apart.
type Kind int

// The kinds of a reference.
const (
	Hub    Kind = iota // hf://ORG/NAME@REVISION
	Short              // NAME, NAME:TAG, NAME:CONSTRAINT, NAME@DIGEST
	Digest             // sha256:HEX
)

// DefaultRevision is the branch meant by hf://ORG/NAME alone.
const DefaultRevision = "main"

const hubScheme = "hf://"

// Reference is what a user called a model. Only the fields of its Kind are
// set; Tag, Constraint and Digest exclude each other.
type Reference struct {
	Kind       Kind
	Repo       string // Hub: ORG/NAME or NAME; Short: the name
	Revision   string // Hub
	Tag        string // Short; empty: the newest
	Constraint string // Short
	Digest     digest.Digest
}

var (
	shortName = regexp.MustCompile(`^[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*(?:/[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*)*$`)
	tagName   = regexp.MustCompile(`^[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}$`)
	// A hub's name: as huggingface_hub's validate_repo_id has it, with "--"
	// and ".." refused because the cache folder's name is made of it.
	hubPart  = regexp.MustCompile(`^[A-Za-z0-9_](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9_])?$`)
	revision = regexp.MustCompile(`^[A-Za-z0-9_][A-Za-z0-9_.+-]*(?:/[A-Za-z0-9_.+-]+)*$`)
	xRange   = regexp.MustCompile(`^v?[0-9]+(?:\.[0-9]+)?\.[xX*]$`)
	commit   = regexp.MustCompile(`^[0-9a-f]{40}$`)
)

const maxLength = 512

// Parse reads a reference. The error says what is wrong and what is allowed.
func Parse(s string) (Reference, error) {
	bad := func(format string, args ...any) (Reference, error) {
		return Reference{}, fmt.Errorf("%w %.200q: %s", ErrInvalid, s, fmt.Sprintf(format, args...))
	}
	switch {
	case s == "":
		return bad("it is empty; write a short name (qwen, qwen:1.9.3) or hf://ORG/NAME")
	case len(s) > maxLength:
		return bad("it is longer than %d bytes", maxLength)
	case strings.HasPrefix(s, hubScheme):
		return parseHub(s, bad)
	case strings.Contains(s, "://"):
		return bad("of schemes, only hf:// is known")
	case strings.HasPrefix(s, "sha256:"):
		d, err := parseDigest(s)
		if err != nil {
			return bad("%v", err)
		}
		return Reference{Kind: Digest, Digest: d}, nil
	}
	return parseShort(s, bad)
}

func parseHub(s string, bad func(string, ...any) (Reference, error)) (Reference, error) {
	repo, rev, hasRev := strings.Cut(strings.TrimPrefix(s, hubScheme), "@")
	if !hasRev {
		rev = DefaultRevision
	}
	if err := CheckHubRepo(repo); err != nil {
		return bad("%v", err)
	}
	if !revision.MatchString(rev) || len(rev) > 255 || strings.Contains(rev, "..") || strings.HasSuffix(rev, ".lock") {
		return bad("%q is not a revision (branch, tag or 40-digit commit)", rev)
	}
	return Reference{Kind: Hub, Repo: repo, Revision: rev}, nil
}

// CheckHubRepo tells whether repo is a name that a hub may give: ORG/NAME or,
// for old ones, NAME alone.
func CheckHubRepo(repo string) error {
	parts := strings.Split(repo, "/")
	if len(parts) > 2 {
		return fmt.Errorf("a hub repository is ORG/NAME, %.200q has more parts", repo)
	}
	for _, p := range parts {
		if !hubPart.MatchString(p) || strings.Contains(p, "--") || strings.Contains(p, "..") || strings.HasSuffix(p, ".git") {
			return fmt.Errorf("%.200q is not a hub repository (ORG/NAME of letters, digits, '.', '_' and '-')", repo)
		}
	}
	return nil
}

func parseShort(s string, bad func(string, ...any) (Reference, error)) (Reference, error) {
	r := Reference{Kind: Short}
	if name, d, ok := strings.Cut(s, "@"); ok {
		var err error
		if r.Digest, err = parseDigest(d); err != nil {
			return bad("%v", err)
		}
		r.Repo = name
	} else if name, tag, ok := strings.Cut(s, ":"); ok {
		r.Repo = name
		switch {
		case isConstraint(tag):
			if _, err := semver.NewConstraint(tag); err != nil {
				return bad("%q is not a version constraint: %v", tag, err)
			}
			r.Constraint = tag
		case tagName.MatchString(tag):
			r.Tag = tag
		default:
			return bad("%q is not a tag (letters, digits, '_', '.' and '-', at most 128)", tag)
		}
	} else {
		r.Repo = s
	}
	if len(r.Repo) > 200 || !shortName.MatchString(r.Repo) {
		if low := strings.ToLower(r.Repo); low != r.Repo && shortName.MatchString(low) {
			return bad("names are lower-case: %s", low)
		}
		return bad("%q is not a name (lower-case letters and digits, with '.', '_', '-' or '/' between)", r.Repo)
	}
	if first, _, ok := strings.Cut(r.Repo, "/"); ok && (strings.Contains(first, ".") || first == "localhost") {
		return bad("%q looks like a registry's host; models from registries are not supported yet, a short name has no dot before its first '/'", first)
	}
	return r, nil
}

func isConstraint(tag string) bool {
	if tag == "" {
		return false
	}
	return strings.ContainsAny(tag[:1], "~^<>=!*") || xRange.MatchString(tag)
}

func parseDigest(s string) (digest.Digest, error) {
	hex, ok := strings.CutPrefix(s, "sha256:")
	if !ok || len(hex) != 64 || strings.Trim(hex, "0123456789abcdef") != "" {
		return "", fmt.Errorf("%.100q is not a digest (sha256: and 64 hex digits)", s)
	}
	return digest.Digest(s), nil
}

// String is the canonical form: Parse(r.String()) gives r again.
func (r Reference) String() string {
	switch r.Kind {
	case Hub:
		return hubScheme + r.Repo + "@" + r.Revision
	case Digest:
		return string(r.Digest)
	}
	switch {
	case r.Digest != "":
		return r.Repo + "@" + string(r.Digest)
	case r.Constraint != "":
		return r.Repo + ":" + r.Constraint
	case r.Tag != "":
		return r.Repo + ":" + r.Tag
	}
	return r.Repo
}

// Source is the repository without revision, tag or digest: hf://ORG/NAME or a
// short name. It is empty for a bare digest.
func (r Reference) Source() string {
	switch r.Kind {
	case Hub:
		return hubScheme + r.Repo
	case Short:
		return r.Repo
	}
	return ""
}

// Fixed tells whether the reference can be written into a list of references:
// it names one entry, not a range or "the newest".
func (r Reference) Fixed() bool {
	return r.Kind == Hub || r.Kind == Short && (r.Tag != "" || r.Digest != "")
}

// IsCommit tells whether a revision is a full commit id.
func IsCommit(rev string) bool { return commit.MatchString(rev) }

// Version is the semantic version of a tag, with or without a leading v.
// Partial versions such as "1.9" count as 1.9.0; a tag such as "latest" is no
// version.
func Version(tag string) (*semver.Version, bool) {
	v, err := semver.NewVersion(tag)
	return v, err == nil
}
