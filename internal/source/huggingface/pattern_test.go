package huggingface

import (
	"bufio"
	"encoding/json"
	"os"
	"strings"
	"testing"
	"time"
)

// testdata/patterns.json is what Python says; testdata/patterns.py writes it.
func TestPatternMatchesAsPython(t *testing.T) {
	file, err := os.Open("testdata/patterns.json")
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	compared := 0
	lines := bufio.NewScanner(file)
	for lines.Scan() {
		var row struct {
			pattern string
			yes, no []string
		}
		if err := json.Unmarshal(lines.Bytes(), &[]any{&row.pattern, &row.yes, &row.no}); err != nil {
			t.Fatal(err)
		}
		p := compilePattern(row.pattern)
		for _, want := range []bool{true, false} {
			names := row.no
			if want {
				names = row.yes
			}
			for _, name := range names {
				compared++
				if got := p.match([]rune(name)); got != want {
					t.Errorf("%q matches %q: %t, Python says %t", row.pattern, name, got, want)
				}
			}
		}
	}
	if err := lines.Err(); err != nil {
		t.Fatal(err)
	}
	if compared < 5000 {
		t.Errorf("only %d comparisons", compared)
	}
}

func TestPatternOfAFolder(t *testing.T) {
	f, err := newFilter([]string{"sub/"}, nil)
	if err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]bool{"sub/x": true, "sub/a/b": true, "sub": false, "sub2/x": false, "a/sub/x": false} {
		if got := f.keeps(name); got != want {
			t.Errorf("sub/ keeps %q: %t, want %t", name, got, want)
		}
	}
}

// A pattern of many stars on a long name that almost matches.
func TestPatternNeedsLittleTime(t *testing.T) {
	p := compilePattern(strings.Repeat("*a", 200) + "b")
	name := []rune(strings.Repeat("a", 1000))
	begin := time.Now()
	if p.match(name) {
		t.Error("it matches")
	}
	if d := time.Since(begin); d > time.Second {
		t.Errorf("it took %s", d)
	}
}

func FuzzPattern(f *testing.F) {
	f.Add("[!a-]*?", "sub/model.bin")
	f.Add("[b-a!-c]", "-")
	f.Add("[[]", "\xff")
	f.Fuzz(func(t *testing.T, pattern, name string) {
		compilePattern(pattern).match([]rune(name)) // must not panic
		if !strings.ContainsAny(pattern, "*?[") && strings.ToValidUTF8(pattern, "") == pattern {
			if !compilePattern(pattern).match([]rune(pattern)) {
				t.Errorf("%q does not match itself", pattern)
			}
		}
		if !compilePattern("*"+pattern+"*").match([]rune(name)) && compilePattern(pattern).match([]rune(name)) {
			t.Errorf("%q matches %q, but with stars around it does not", pattern, name)
		}
	})
}
