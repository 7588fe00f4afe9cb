package testenv

import (
	"bytes"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
)

// childDir is set in a process that Rerun started.
const childDir = "LARDER_TEST_CHILD"

// Child gives the folder that Rerun named, in the process that it started, and
// the empty string in the test proper.
func Child() string { return os.Getenv(childDir) }

// Rerun runs the test t alone in a process of its own, with LARDER_FAULT set
// to fault (see package disk) and Child giving dir. It reports whether the
// process was killed by the fault; a process that fails in any other way fails
// the test. The binary must be built with the tag "faults".
func Rerun(t *testing.T, dir, fault string) (killed bool) {
	t.Helper()
	return Disturb(t, dir, fault, 0)
}

// Steps counts the steps that the test t takes in a process of its own.
func Steps(t *testing.T, dir string) int {
	t.Helper()
	log := filepath.Join(t.TempDir(), "steps")
	rerun(t, dir, "count", 0, "LARDER_FAULT_LOG="+log)
	text, err := os.ReadFile(log)
	if err != nil {
		t.Fatal(err)
	}
	return bytes.Count(text, []byte("\n"))
}

// Disturb is Rerun for faults that are errors, too: a process that ends with
// the exit code failed (if that is not 0) counts as stopped by the fault.
func Disturb(t *testing.T, dir, fault string, failed int) (stopped bool) {
	t.Helper()
	return rerun(t, dir, fault, failed)
}

func rerun(t *testing.T, dir, fault string, failed int, env ...string) (stopped bool) {
	t.Helper()
	cmd := exec.Command(os.Args[0], "-test.run=^"+strings.ReplaceAll(t.Name(), "/", "$/^")+"$", "-test.count=1", "-test.timeout=60s")
	cmd.Env = append(append(os.Environ(), env...), childDir+"="+dir, "LARDER_FAULT="+fault)
	out, err := cmd.CombinedOutput()
	var exit *exec.ExitError
	switch {
	case err == nil:
		return false
	case errors.As(err, &exit) && exit.Sys().(syscall.WaitStatus).Signal() == syscall.SIGKILL:
		return true
	case errors.As(err, &exit) && failed != 0 && exit.ExitCode() == failed:
		return true
	}
	t.Fatalf("with %s: %v\n%s", fault, err, out)
	return false
}
