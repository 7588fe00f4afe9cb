package testenv

import (
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
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
	f, err := os.CreateTemp(t.TempDir(), "ballast")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	var st unix.Statfs_t
	if err := unix.Fstatfs(int(f.Fd()), &st); err != nil {
		t.Fatal(err)
	}
	if st.Bavail < st.Blocks*9/10 {
		return
	}
	if err := unix.Fallocate(int(f.Fd()), 0, 0, int64(st.Blocks)*st.Bsize*2/100); err != nil {
		t.Fatal(err)
	}
}

// Retry does what depends on the network up to four times, within some minutes.
func Retry(do func() error) error {
	for pause := 2 * time.Second; ; pause *= 5 {
		err := do()
		if err == nil || pause > time.Minute {
			return err
		}
		time.Sleep(pause)
	}
}

// WriteProgram writes a file that is to be run at once. A process that another
// test forks meanwhile would hold the file open for writing until it becomes
// another program, and the kernel would not run it (ETXTBSY).
func WriteProgram(path, content string) error {
	syscall.ForkLock.RLock()
	defer syscall.ForkLock.RUnlock()
	return os.WriteFile(path, []byte(content), 0o755)
}
