// Command report runs "go test" and refuses what a plain exit status lets
// through: a skipped test, and a run in which no test ran.
//
// One reason for a skip is let through, and named at the end: what this kernel
// was built without (project quotas, say) cannot be installed. Such a test says
// so in a message that begins with "this kernel has".
//
// It prints the lines that go test prints (a line for each package, and all
// output of the tests that failed), so that people and programs read it as
// usual.
//
//	go run ./test/report -- go test -race ./...
package main

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"os/exec"
	"regexp"
	"slices"
	"strings"
)

// event is one line of "go test -json" (see "go doc test2json").
type event struct {
	Action  string
	Package string
	Test    string
	Output  string
}

// report gathers the events of one run.
type report struct {
	out     io.Writer
	output  map[string][]string // of tests under way, by package and test
	passed  int
	failed  []string
	skipped []string
	lacking map[string]int // what the kernel has not, and how many tests that cost
}

// lack is how a test says that the kernel, and nothing else, stands in its way.
var lack = regexp.MustCompile(`^\s+\S+\.go:\d+: (this kernel has .*)\n$`)

func newReport(out io.Writer) *report {
	return &report{out: out, output: make(map[string][]string), lacking: make(map[string]int)}
}

// read takes the whole stream. A line that is no event is printed as it is.
func (r *report) read(in io.Reader) error {
	sc := bufio.NewScanner(in)
	sc.Buffer(nil, 64<<20)
	for sc.Scan() {
		var e event
		if err := json.Unmarshal(sc.Bytes(), &e); err != nil {
			fmt.Fprintln(r.out, sc.Text())
			continue
		}
		r.add(e)
	}
	if err := sc.Err(); err != nil {
		return fmt.Errorf("read the events of go test: %w", err)
	}
	return nil
}

func (r *report) add(e event) {
	name := e.Package + " " + e.Test
	switch e.Action {
	case "output", "build-output":
		switch {
		case e.Test != "":
			r.output[name] = append(r.output[name], e.Output)
		case e.Output != "PASS\n":
			fmt.Fprint(r.out, e.Output)
		}
	case "pass":
		if e.Test != "" {
			r.passed++
			delete(r.output, name)
		}
	case "skip":
		// A package without test files is skipped as a package: that is no
		// hidden test.
		if e.Test == "" {
			return
		}
		if what := lacked(r.output[name]); what != "" {
			r.lacking[what]++
			delete(r.output, name)
			return
		}
		r.skipped = append(r.skipped, name)
		r.flush(name)
	case "fail":
		r.failed = append(r.failed, strings.TrimSpace(name))
		r.flush(name)
	}
}

func lacked(output []string) string {
	for _, l := range output {
		if m := lack.FindStringSubmatch(l); m != nil {
			return m[1]
		}
	}
	return ""
}

// flush prints what a test said. Of one that said nothing but that it began
// and waits its turn, there is nothing to print.
func (r *report) flush(name string) {
	said := slices.ContainsFunc(r.output[name], func(l string) bool { return !strings.HasPrefix(l, "=== ") })
	if said {
		for _, line := range r.output[name] {
			fmt.Fprint(r.out, line)
		}
	}
	delete(r.output, name)
}

// verdict closes the run. A package that died (a panic, a time-out) leaves
// output of tests that never ended: it is printed, for it says why.
func (r *report) verdict() error {
	if len(r.failed) > 0 {
		for name := range r.output {
			r.flush(name)
		}
	}
	for _, what := range slices.Sorted(maps.Keys(r.lacking)) {
		fmt.Fprintf(r.out, "%d tests could not run: %s\n", r.lacking[what], what)
	}
	switch {
	case len(r.failed) > 0:
		return fmt.Errorf("%d failed:\n\t%s", len(r.failed), strings.Join(r.failed, "\n\t"))
	case len(r.skipped) > 0:
		return fmt.Errorf("%d skipped, and here every test must run:\n\t%s", len(r.skipped), strings.Join(r.skipped, "\n\t"))
	case r.passed == 0:
		return errors.New("no test ran")
	}
	return nil
}

// withJSON puts -json behind the words "go test".
func withJSON(args []string) ([]string, error) {
	for i, a := range args {
		if a == "test" && i > 0 {
			out := append([]string{}, args[:i+1]...)
			return append(append(out, "-json"), args[i+1:]...), nil
		}
	}
	return nil, errors.New("usage: report -- go test [flags] [packages]")
}

func run(args []string) error {
	if len(args) > 0 && args[0] == "--" {
		args = args[1:]
	}
	args, err := withJSON(args)
	if err != nil {
		return err
	}
	cmd := exec.Command(args[0], args[1:]...)
	cmd.Stderr = os.Stderr
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		return err
	}
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("start %s: %w", args[0], err)
	}
	r := newReport(os.Stdout)
	readErr := r.read(stdout)
	waitErr := cmd.Wait()
	return errors.Join(r.verdict(), readErr, waitErr)
}

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintf(os.Stderr, "report: %v\n", err)
		os.Exit(1)
	}
}
