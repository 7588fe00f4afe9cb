// Package pattern matches names by the patterns that users of the Hugging Face
// hub know: those of Python's fnmatch. It is pure.
package pattern

import "slices"

// Pattern is a compiled fnmatch pattern with the meaning of Python's
// fnmatch.fnmatchcase: '*' and '?' also match '/', nothing is escaped by a
// backslash, and a bracket that is not closed stands for itself. It differs
// from path.Match in all three.
type Pattern []element

// element matches one rune, or with star any number of any runes.
type element struct {
	star   bool
	negate bool // of ranges
	ranges [][2]rune
}

func (e element) matches(r rune) bool {
	in := slices.ContainsFunc(e.ranges, func(b [2]rune) bool { return b[0] <= r && r <= b[1] })
	return in != e.negate
}

var anyRune = element{negate: true}

// Compile reads a pattern. Every text is one.
func Compile(s string) Pattern {
	var out Pattern
	runes := []rune(s)
	for i := 0; i < len(runes); {
		r := runes[i]
		i++
		switch r {
		case '*':
			if len(out) == 0 || !out[len(out)-1].star {
				out = append(out, element{star: true})
			}
		case '?':
			out = append(out, anyRune)
		case '[':
			end := closing(runes, i)
			if end < 0 {
				out = append(out, literal(r))
				continue
			}
			out = append(out, compileSet(runes[i:end]))
			i = end + 1
		default:
			out = append(out, literal(r))
		}
	}
	return out
}

func literal(r rune) element { return element{ranges: [][2]rune{{r, r}}} }

// closing finds the ']' of the set whose content starts at i. A ']' right at
// the start, or right after '!', belongs to the content.
func closing(runes []rune, i int) int {
	if i < len(runes) && runes[i] == '!' {
		i++
	}
	if i < len(runes) && runes[i] == ']' {
		i++
	}
	for ; i < len(runes); i++ {
		if runes[i] == ']' {
			return i
		}
	}
	return -1
}

// compileSet reads what is between brackets, step by step as
// fnmatch.translate does, because its treatment of backward ranges ("[z-a]"
// is dropped, and what is left may begin with '!') is part of the meaning.
func compileSet(set []rune) element {
	// Hyphens that make ranges lie between chunks: the last rune of one chunk
	// and the first of the next are the ends of a range.
	var chunks [][]rune
	start, k := 0, 1
	if set[0] == '!' {
		k = 2
	}
	for {
		hyphen := -1
		if k < len(set) {
			if n := slices.Index(set[k:], '-'); n >= 0 {
				hyphen = k + n
			}
		}
		if hyphen < 0 {
			break
		}
		chunks = append(chunks, slices.Clone(set[start:hyphen]))
		start, k = hyphen+1, hyphen+3
	}
	if rest := set[start:]; len(rest) > 0 {
		chunks = append(chunks, slices.Clone(rest))
	} else {
		last := len(chunks) - 1
		chunks[last] = append(chunks[last], '-')
	}
	for i := len(chunks) - 1; i > 0; i-- {
		before, after := chunks[i-1], chunks[i]
		if before[len(before)-1] > after[0] {
			chunks[i-1] = append(before[:len(before)-1], after[1:]...)
			chunks = slices.Delete(chunks, i, i+1)
		}
	}

	var e element
	if len(chunks[0]) > 0 && chunks[0][0] == '!' {
		e.negate = true
		chunks[0] = chunks[0][1:]
	}
	for i, chunk := range chunks {
		// A hyphen with nothing before it (what is left of "[b-a!-z]") is one.
		if i > 0 {
			if prev := chunks[i-1]; len(prev) > 0 {
				e.ranges = append(e.ranges, [2]rune{prev[len(prev)-1], chunk[0]})
			} else {
				e.ranges = append(e.ranges, [2]rune{'-', '-'})
			}
		}
		for _, r := range chunk {
			e.ranges = append(e.ranges, [2]rune{r, r})
		}
	}
	return e
}

// Match tells whether the pattern fits the whole of text. It needs time in
// proportion to pattern times text, whatever the pattern: on a mismatch only
// the last star takes one rune more.
func (p Pattern) Match(text string) bool {
	name := []rune(text)
	i, j := 0, 0
	star, from := -1, 0
	for j < len(name) {
		switch {
		case i < len(p) && p[i].star:
			star, from = i, j
			i++
		case i < len(p) && p[i].matches(name[j]):
			i++
			j++
		case star >= 0:
			from++
			i, j = star+1, from
		default:
			return false
		}
	}
	for i < len(p) && p[i].star {
		i++
	}
	return i == len(p)
}
