package testenv

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"syscall"
	"testing"

	"github.com/larder-project/larder/internal/disk"
)

// childDir is set in a process that Rerun started.
const childDir = "LARDER_TEST_CHILD"

// Child gives the folder that Rerun named, in the process that it started, and
// the empty string in the test proper.
func Child() string { return os.Getenv(childDir) }

// Rerun runs the test t, or the one that t is part of, alone in a process of
// its own, with LARDER_FAULT set to fault (see package disk) and Child giving
// dir. It reports whether the process was killed by the fault; a process that
// fails in any other way fails the test.
func Rerun(t *testing.T, dir, fault string) (killed bool) {
	t.Helper()
	return rerun(t, dir, fault, 0)
}

// Disturb is Rerun for faults that are errors, too: a process that ends with
// the exit code failed counts as stopped by the fault.
func Disturb(t *testing.T, dir, fault string, failed int) (stopped bool) {
	t.Helper()
	return rerun(t, dir, fault, failed)
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

func rerun(t *testing.T, dir, fault string, failed int, env ...string) (stopped bool) {
	t.Helper()
	program, err := faulty()
	if err != nil {
		t.Fatal(err)
	}
	only := "^" + strings.ReplaceAll(regexp.QuoteMeta(t.Name()), "/", "$/^") + "$"
	cmd := exec.Command(fmt.Sprintf("/proc/self/fd/%d", program.Fd()), "-test.run="+only, "-test.count=1", "-test.timeout=60s")
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

// faulty is the test program of this package built with the tag "faults", and
// without the race detector, which takes longer to start than most of what is
// killed. It has no name: nobody need remove it.
var faulty = sync.OnceValues(func() (*os.File, error) {
	if disk.FaultsEnabled && !raceDetector {
		return os.Open("/proc/self/exe")
	}
	dir, err := os.MkdirTemp("", "larder-faults-")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(dir)
	path := filepath.Join(dir, "test")
	// Tests run in their package's folder.
	if out, err := exec.Command("go", "test", "-c", "-tags", "faults", "-o", path, ".").CombinedOutput(); err != nil {
		return nil, fmt.Errorf("build the tests with faults: %w\n%s", err, bytes.TrimSpace(out))
	}
	return os.Open(path)
})
