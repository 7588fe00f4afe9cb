package main

import (
	"bytes"
	"strings"
	"testing"
)

func TestVerdict(t *testing.T) {
	t.Parallel()
	const (
		passA = `{"Action":"pass","Package":"p","Test":"TestA"}`
		outA  = `{"Action":"output","Package":"p","Test":"TestA","Output":"    a.go:1: why\n"}`
		endP  = `{"Action":"output","Package":"p","Output":"ok  \tp\t0.1s\n"}` + "\n" + `{"Action":"pass","Package":"p"}`
	)
	for name, tc := range map[string]struct {
		in      []string
		err     string // part of the verdict; "" for a good run
		printed string
		hidden  string
	}{
		"a passing run prints the package alone": {
			in:      []string{outA, passA, `{"Action":"output","Package":"p","Output":"PASS\n"}`, endP},
			printed: "ok  \tp\t0.1s\n", hidden: "why",
		},
		"a failure is shown with its output": {
			in:  []string{outA, `{"Action":"fail","Package":"p","Test":"TestA"}`, `{"Action":"fail","Package":"p"}`},
			err: "2 failed", printed: "a.go:1: why",
		},
		"a skip is refused": {
			in:  []string{passA, outA, `{"Action":"skip","Package":"p","Test":"TestA"}`, endP},
			err: "p TestA", printed: "why",
		},
		"a skip for want of a kernel's feature is let through, and named": {
			in: []string{
				passA,
				`{"Action":"output","Package":"p","Test":"TestB","Output":"    a.go:7: this kernel has no quotas\n"}`,
				`{"Action":"skip","Package":"p","Test":"TestB"}`, endP,
			},
			printed: "1 tests could not run: this kernel has no quotas",
		},
		"a skip that only mentions the kernel is refused": {
			in: []string{
				passA,
				`{"Action":"output","Package":"p","Test":"TestB","Output":"    a.go:7: no root, and this kernel has no quotas\n"}`,
				`{"Action":"skip","Package":"p","Test":"TestB"}`, endP,
			},
			err: "p TestB",
		},
		"a package without tests is no skip": {
			in: []string{passA, `{"Action":"skip","Package":"q"}`, endP},
		},
		"a run without tests is refused": {
			in: []string{`{"Action":"skip","Package":"q"}`}, err: "no test ran",
		},
		"a package that does not build fails, and the compiler is heard": {
			in:  []string{passA, `{"ImportPath":"p","Action":"build-output","Output":"x.go:3: undefined\n"}`, `{"Action":"fail","Package":"p"}`},
			err: "1 failed", printed: "x.go:3: undefined",
		},
		"a test that never ended is shown": {
			in:  []string{outA, `{"Action":"fail","Package":"p"}`},
			err: "1 failed", printed: "why",
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			var out bytes.Buffer
			r := newReport(&out)
			if err := r.read(strings.NewReader(strings.Join(tc.in, "\n"))); err != nil {
				t.Fatal(err)
			}
			err := r.verdict()
			switch {
			case tc.err == "" && err != nil:
				t.Errorf("refused: %v", err)
			case tc.err != "" && (err == nil || !strings.Contains(err.Error(), tc.err)):
				t.Errorf("verdict %v, want %q", err, tc.err)
			}
			if !strings.Contains(out.String(), tc.printed) {
				t.Errorf("printed %q, want %q in it", out.String(), tc.printed)
			}
			if tc.hidden != "" && strings.Contains(out.String(), tc.hidden) {
				t.Errorf("printed %q, want no %q in it", out.String(), tc.hidden)
			}
		})
	}
}
