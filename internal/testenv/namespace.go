package testenv

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// namespaceVariable is "new" for the process that finds itself in a namespace
// of the tests' own, and "set up" for those that it starts there.
const namespaceVariable = "LARDER_TEST_MOUNTS"

// PrivateMounts runs a package's tests in a mount namespace of their own, and
// gives the exit code: TestMain calls os.Exit(testenv.PrivateMounts(m.Run)).
//
// Without it, whoever makes a namespace meanwhile (a container of another
// package's test) gets a copy of every mount, and a file system that was shut
// down lives on there: mounted again, it gives nothing but EIO. Mounts also go
// when the process is killed. Without root, and where the kernel refuses, the
// tests run as they are.
func PrivateMounts(tests func() int) int {
	if os.Geteuid() != 0 {
		return tests()
	}
	switch os.Getenv(namespaceVariable) {
	case "set up":
		return tests()
	case "new":
		if err := errors.Join(keepApart(), os.Setenv(namespaceVariable, "set up")); err != nil {
			fmt.Fprintln(os.Stderr, "mounts of the tests' own:", err)
			return 1
		}
		return tests()
	}
	self, err := os.Executable()
	if err != nil {
		return tests()
	}
	runtime.LockOSThread() // the child is to die with this thread
	cmd := exec.Command(self, os.Args[1:]...)
	cmd.Env = append(os.Environ(), namespaceVariable+"=new")
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNS, Pdeathsig: syscall.SIGKILL}
	if err := cmd.Start(); err != nil {
		return tests()
	}
	var exit *exec.ExitError
	switch err := cmd.Wait(); {
	case err == nil:
		return 0
	case errors.As(err, &exit) && exit.ExitCode() > 0:
		return exit.ExitCode()
	default:
		fmt.Fprintln(os.Stderr, "tests in a mount namespace:", err)
		return 1
	}
}

// keepApart ends the way of mounts out of this namespace and into it, and lets
// go of the copies of other tests' mounts that came with it, for whom they
// would be the same nuisance. Until it has, what they unmount goes here too.
func keepApart() error {
	if err := unix.Mount("", "/", "", unix.MS_SLAVE|unix.MS_REC, ""); err != nil {
		return err
	}
	table, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return err
	}
	for line := range strings.Lines(string(table)) {
		f := strings.Fields(line)
		if len(f) > 4 && (strings.HasPrefix(f[4], os.TempDir()+"/") || strings.Contains(line, " /dev/loop")) {
			_ = unix.Unmount(f[4], unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW) // it may have gone with one above it
		}
	}
	return unix.Mount("", "/", "", unix.MS_PRIVATE|unix.MS_REC, "")
}
