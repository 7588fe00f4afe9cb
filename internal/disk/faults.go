//go:build faults

package disk

import (
	"fmt"
	"os"
	"strconv"
	"strings"
	"sync"

	"golang.org/x/sys/unix"
)

// FaultsEnabled tells a build that can be made to fail from one that cannot.
const FaultsEnabled = true

// The environment variable LARDER_FAULT says what happens at which step.
// Steps are numbered from 1 in the order in which they come.
//
//	kill:N           die by SIGKILL just before step N
//	cut:N:DIR        shut down the file system that holds DIR just before
//	                 step N, losing what was not made durable, then die
//	fail:N:ERRNO     step N, and it alone, returns this error number
//	full:N:ERRNO     step N and all after it return this error number
//	count            do nothing; with LARDER_FAULT_LOG count
//
// With LARDER_FAULT_LOG=FILE each step adds a line "N op path" to FILE, which
// must lie on another file system than the one being cut.
var fault struct {
	sync.Mutex
	n     int
	ready bool
	mode  string
	at    int
	arg   string
	log   *os.File
}

func prepare() {
	if fault.ready {
		return
	}
	fault.ready = true
	parts := strings.SplitN(os.Getenv("LARDER_FAULT"), ":", 3)
	fault.mode = parts[0]
	if len(parts) > 1 {
		n, err := strconv.Atoi(parts[1])
		if err != nil {
			panic("LARDER_FAULT: " + err.Error())
		}
		fault.at = n
	}
	if len(parts) > 2 {
		fault.arg = parts[2]
	}
	if name := os.Getenv("LARDER_FAULT_LOG"); name != "" {
		f, err := os.OpenFile(name, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
		if err != nil {
			panic("LARDER_FAULT_LOG: " + err.Error())
		}
		fault.log = f
	}
}

func step(op, path string) error {
	fault.Lock()
	defer fault.Unlock()
	prepare()
	if fault.mode == "" && fault.log == nil {
		return nil
	}
	fault.n++
	if fault.log != nil {
		fmt.Fprintf(fault.log, "%d %s %s\n", fault.n, op, path)
	}
	switch fault.mode {
	case "kill":
		if fault.n == fault.at {
			die()
		}
	case "cut":
		if fault.n == fault.at {
			cut(fault.arg)
			die()
		}
	case "fail", "full":
		if fault.n == fault.at || fault.mode == "full" && fault.n > fault.at {
			no, err := strconv.Atoi(fault.arg)
			if err != nil {
				panic("LARDER_FAULT: " + err.Error())
			}
			return &os.PathError{Op: op, Path: path, Err: unix.Errno(no)}
		}
	}
	return nil
}

// Inject does in this process what LARDER_FAULT=full:N:ERRNO does: it counts
// from here, and step n and all after it return the error number, as if the
// process had died there. It tells how many steps came since the last call;
// n 0 ends it. It is for tests that go on in the same process.
func Inject(n int, errno unix.Errno) (steps int) {
	fault.Lock()
	defer fault.Unlock()
	prepare()
	steps = fault.n
	fault.n, fault.at, fault.arg, fault.mode = 0, n, strconv.Itoa(int(errno)), "full"
	if n == 0 {
		fault.mode = "count"
	}
	return steps
}

func die() {
	_ = unix.Kill(unix.Getpid(), unix.SIGKILL)
	select {} // until the signal has ended this thread too
}

// cut is FS_IOC_GOINGDOWN with NOLOGFLUSH: ext4 and XFS drop all that is not
// yet in their log, as a power cut does.
func cut(dir string) {
	d, err := os.Open(dir)
	if err != nil {
		panic("LARDER_FAULT cut: " + err.Error())
	}
	const goingDown, noLogFlush = 0x8004587d, 2
	if err := unix.IoctlSetPointerInt(int(d.Fd()), goingDown, noLogFlush); err != nil {
		panic("LARDER_FAULT cut: " + err.Error())
	}
}
