// Package testenv says what a test may expect of the machine it runs on.
//
// On a laptop a test that needs root, an engine or a file system is skipped.
// Where CI or LARDER_TEST_ALL is set it fails instead: there, a skipped test
// would hide a whole area.
package testenv

import (
	"os"
	"os/exec"
	"testing"
)

// Need skips the test, or fails it where everything must run, unless ok.
func Need(t testing.TB, ok bool, what string) {
	t.Helper()
	if ok {
		return
	}
	if os.Getenv("CI") != "" || os.Getenv("LARDER_TEST_ALL") != "" {
		t.Fatalf("this test needs %s, and here every test must run", what)
	}
	t.Skipf("this test needs %s", what)
}

// NeedRoot asks for user id 0.
func NeedRoot(t testing.TB) {
	t.Helper()
	Need(t, os.Geteuid() == 0, "root")
}

// NeedPrograms asks for commands on the PATH.
func NeedPrograms(t testing.TB, names ...string) {
	t.Helper()
	for _, name := range names {
		_, err := exec.LookPath(name)
		Need(t, err == nil, "the program "+name)
	}
}
