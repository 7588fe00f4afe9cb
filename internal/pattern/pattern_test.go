package pattern

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
		p := Compile(row.pattern)
		for _, want := range []bool{true, false} {
			names := row.no
			if want {
				names = row.yes
			}
			for _, name := range names {
				compared++
				if got := p.Match(name); got != want {
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

// A pattern of many stars on a long name that almost matches.
func TestPatternNeedsLittleTime(t *testing.T) {
	p := Compile(strings.Repeat("*a", 200) + "b")
	name := strings.Repeat("a", 1000)
	begin := time.Now()
	if p.Match(name) {
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
		Compile(pattern).Match(name) // must not panic
		if !strings.ContainsAny(pattern, "*?[") && strings.ToValidUTF8(pattern, "") == pattern {
			if !Compile(pattern).Match(pattern) {
				t.Errorf("%q does not match itself", pattern)
			}
		}
		if !Compile("*"+pattern+"*").Match(name) && Compile(pattern).Match(name) {
			t.Errorf("%q matches %q, but with stars around it does not", pattern, name)
		}
	})
}
