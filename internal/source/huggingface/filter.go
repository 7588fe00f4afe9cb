package huggingface

import (
	"errors"
	"slices"
	"strings"

	"github.com/larder-project/larder/internal/pattern"
)

// filter selects files as huggingface_hub does with allow_patterns and
// ignore_patterns: a file is kept if there are no includes or any matches, and
// no exclude matches.
type filter struct {
	include, exclude []pattern.Pattern
}

func newFilter(include, exclude []string) (filter, error) {
	compile := func(flag string, patterns []string) ([]pattern.Pattern, error) {
		var out []pattern.Pattern
		for _, p := range patterns {
			if p == "" {
				return nil, errors.New(flag + ": the pattern is empty")
			}
			if strings.HasSuffix(p, "/") {
				p += "*" // a folder means all that is in it
			}
			out = append(out, pattern.Compile(p))
		}
		return out, nil
	}
	in, err := compile("--include", include)
	if err != nil {
		return filter{}, err
	}
	ex, err := compile("--exclude", exclude)
	return filter{include: in, exclude: ex}, err
}

func (f filter) keeps(path string) bool {
	matches := func(p pattern.Pattern) bool { return p.Match(path) }
	if len(f.include) > 0 && !slices.ContainsFunc(f.include, matches) {
		return false
	}
	return !slices.ContainsFunc(f.exclude, matches)
}
