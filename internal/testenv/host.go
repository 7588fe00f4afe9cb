package testenv

import (
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/larder-project/larder/internal/disk"
)

// Port gives an address of this host that nobody listens at, for a program
// that is started with it, ended and started again. The kernel gives ports of
// that range to nobody who asks for any port (ip_local_port_range), so that it
// stays free.
func Port(t testing.TB) string {
	t.Helper()
	for range 100 {
		address := fmt.Sprintf("127.0.0.1:%d", 20_000+rand.IntN(12_000))
		l, err := net.Listen("tcp", address)
		if err != nil {
			continue
		}
		if err := l.Close(); err != nil {
			t.Fatal(err)
		}
		return address
	}
	t.Fatal("a hundred ports are in use")
	return ""
}

// UsedDisk sees to it that the file system of the tests' folders is not as
// good as empty, as a new disk or a tmpfs is: 2 % of it are used until the test
// ends, whatever other tests take away meanwhile.
func UsedDisk(t testing.TB) {
	t.Helper()
	dir := t.TempDir()
	free, capacity, err := disk.Free(dir)
	if err != nil {
		t.Fatal(err)
	}
	if free < capacity*9/10 {
		return
	}
	f, err := os.Create(filepath.Join(dir, "ballast"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := unix.Fallocate(int(f.Fd()), 0, 0, capacity*2/100); err != nil {
		t.Fatal(err)
	}
}

// Fetch runs a command that depends on the network, up to four times within a
// minute and the time that it takes, and gives the output of the last.
func Fetch(command func() *exec.Cmd) (out []byte, err error) {
	for _, pause := range []time.Duration{2 * time.Second, 10 * time.Second, 50 * time.Second} {
		if out, err = command().CombinedOutput(); err == nil {
			return out, nil
		}
		time.Sleep(pause)
	}
	return command().CombinedOutput()
}

// WriteProgram makes a program, or puts another in its place, that is to be run
// at once. A process that another test forks while it is written would hold it
// open for writing until it becomes another program, and the kernel would not
// run it (ETXTBSY).
func WriteProgram(path, content string) error {
	syscall.ForkLock.RLock()
	defer syscall.ForkLock.RUnlock()
	if err := os.WriteFile(path+".new", []byte(content), 0o755); err != nil {
		return err
	}
	return os.Rename(path+".new", path)
}
