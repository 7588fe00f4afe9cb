package testenv

import (
	"errors"
	"os"
	"os/exec"
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
	cmd := exec.Command(os.Args[0], "-test.run=^"+t.Name()+"$", "-test.count=1", "-test.timeout=60s")
	cmd.Env = append(os.Environ(), childDir+"="+dir, "LARDER_FAULT="+fault)
	out, err := cmd.CombinedOutput()
	var exit *exec.ExitError
	switch {
	case err == nil:
		return false
	case errors.As(err, &exit) && exit.Sys().(syscall.WaitStatus).Signal() == syscall.SIGKILL:
		return true
	}
	t.Fatalf("with %s: %v\n%s", fault, err, out)
	return false
}
