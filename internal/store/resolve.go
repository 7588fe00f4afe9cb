package store

import (
	"fmt"
	"slices"
	"strings"

	"github.com/Masterminds/semver/v3"

	"github.com/larder-project/larder/internal/reference"
)

// NotFoundError says that no version has a reference, and what is near it.
type NotFoundError struct {
	Reference reference.Reference
	Near      []string // references that are there, the nearest first
}

// Error implements error.
func (e *NotFoundError) Error() string {
	return fmt.Sprintf("model %s is not in the store", e.Reference)
}

// Is makes errors.Is(err, ErrNotFound) true.
func (e *NotFoundError) Is(target error) bool { return target == ErrNotFound }

// Hint says what to do next.
func (e *NotFoundError) Hint() string {
	var parts []string
	if len(e.Near) > 0 {
		parts = append(parts, "did you mean "+strings.Join(e.Near, ", ")+"?")
	}
	switch {
	case e.Reference.Kind == reference.Hub:
		parts = append(parts, "fetch it with: larder pull "+e.Reference.String())
	case len(e.Near) == 0:
		parts = append(parts, "larder ls shows what is there; larder pull and larder import bring models in")
	}
	return strings.Join(parts, "; ")
}

// Resolve finds the version that a reference means now. What is not there is a
// *NotFoundError.
func (s *Store) Resolve(r reference.Reference) (Version, error) {
	versions, err := s.Versions()
	if err != nil {
		return Version{}, err
	}
	return resolve(versions, r)
}

// resolve is Resolve on a given list. Pure.
func resolve(versions []Version, r reference.Reference) (Version, error) {
	if v, ok := find(versions, r); ok {
		return v, nil
	}
	return Version{}, &NotFoundError{Reference: r, Near: near(versions, r)}
}

func find(versions []Version, r reference.Reference) (Version, bool) {
	want := r.String()
	for _, v := range versions {
		if slices.Contains(v.References, want) || r.Kind == reference.Digest && v.Digest == r.Digest {
			return v, true
		}
	}
	switch r.Kind {
	case reference.Hub:
		for _, v := range versions {
			if v.Revision == r.Revision && v.Source == r.Source() && reference.IsCommit(r.Revision) {
				return v, true
			}
		}
	case reference.Short:
		return findShort(versions, r)
	}
	return Version{}, false
}

func findShort(versions []Version, r reference.Reference) (Version, bool) {
	if r.Digest != "" {
		for _, v := range versions {
			if v.Digest == r.Digest && len(tagsOf(v, r.Repo)) > 0 {
				return v, true
			}
		}
		return Version{}, false
	}
	if r.Tag != "" {
		return Version{}, false // an exact match would have been found
	}
	var within *semver.Constraints
	if r.Constraint != "" {
		c, err := semver.NewConstraint(r.Constraint)
		if err != nil {
			return Version{}, false
		}
		within = c
	}
	var best, bestPre, newest Version
	var bestVersion, bestPreVersion *semver.Version
	for _, v := range versions {
		for _, tag := range tagsOf(v, r.Repo) {
			if newest.Digest == "" && tag != "" {
				newest = v // versions come newest first
			}
			sv, ok := reference.Version(tag)
			switch {
			case !ok || within != nil && !within.Check(sv):
			case sv.Prerelease() != "" && within == nil:
				if bestPreVersion == nil || sv.GreaterThan(bestPreVersion) {
					bestPre, bestPreVersion = v, sv
				}
			case bestVersion == nil || sv.GreaterThan(bestVersion):
				best, bestVersion = v, sv
			}
		}
	}
	switch {
	case bestVersion != nil:
		return best, true
	case within != nil:
		return Version{}, false
	case bestPreVersion != nil:
		return bestPre, true
	}
	return newest, newest.Digest != ""
}

// tagsOf lists a version's tags under a short name; a reference by digest
// counts as the empty tag.
func tagsOf(v Version, name string) []string {
	var out []string
	for _, ref := range v.References {
		r, err := reference.Parse(ref)
		if err == nil && r.Kind == reference.Short && r.Repo == name {
			out = append(out, r.Tag)
		}
	}
	return out
}

const maxNear = 3

// near lists references that a person may have meant.
func near(versions []Version, r reference.Reference) []string {
	type candidate struct {
		text string
		cost int
	}
	want := strings.ToLower(r.String())
	short := strings.ToLower(r.Source())
	var found []candidate
	for _, v := range versions {
		for _, ref := range v.References {
			have, err := reference.Parse(ref)
			if err != nil || have.Kind == reference.Digest || have.Digest != "" {
				continue
			}
			source := strings.ToLower(have.Source())
			cost := min(distance(want, strings.ToLower(ref)), distance(short, source))
			if source != "" && short != "" && (strings.HasSuffix(source, "/"+short) || strings.HasPrefix(source, short)) {
				cost = min(cost, 1)
			}
			if cost <= 2+len(short)/5 {
				found = append(found, candidate{ref, cost})
			}
		}
	}
	slices.SortStableFunc(found, func(a, b candidate) int {
		if a.cost != b.cost {
			return a.cost - b.cost
		}
		return strings.Compare(a.text, b.text)
	})
	var out []string
	for _, c := range found {
		if !slices.Contains(out, c.text) && len(out) < maxNear {
			out = append(out, c.text)
		}
	}
	return out
}

// distance is the Levenshtein distance of two short texts, in bytes.
func distance(a, b string) int {
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		diagonal := row[0]
		row[0] = i + 1
		for j := range len(b) {
			cost := diagonal
			if a[i] != b[j] {
				cost++
			}
			diagonal = row[j+1]
			row[j+1] = min(cost, row[j]+1, row[j+1]+1)
		}
	}
	return row[len(b)]
}
