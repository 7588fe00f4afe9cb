package testenv

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"syscall"
	"testing"
)

const isolated = "LARDER_TEST_ISOLATED"

// Isolate runs the tests of a package in a mount namespace of their own, so
// that what other packages' tests and containers do meanwhile does not copy
// their mounts into other namespaces. It is for TestMain; without root the
// tests run where they are.
func Isolate(m *testing.M) {
	if os.Getenv(isolated) != "" || os.Geteuid() != 0 {
		os.Exit(m.Run())
	}
	runtime.LockOSThread() // the death signal below is tied to the thread
	cmd := exec.Command(os.Args[0], os.Args[1:]...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.Env = append(os.Environ(), isolated+"=1")
	cmd.SysProcAttr = &syscall.SysProcAttr{Unshareflags: syscall.CLONE_NEWNS, Pdeathsig: syscall.SIGKILL}
	err := cmd.Run()
	var exit *exec.ExitError
	switch {
	case err == nil:
		os.Exit(0)
	case errors.As(err, &exit):
		os.Exit(max(1, exit.ExitCode()))
	}
	fmt.Fprintln(os.Stderr, "run the tests in a mount namespace:", err)
	os.Exit(1)
}
