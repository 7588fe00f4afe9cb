package service

import (
	"bufio"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// A process that holds a claim until its input ends.
func TestMain(m *testing.M) {
	if dir := os.Getenv("LARDER_TEST_CLAIM"); dir != "" {
		_, err := Claim(dir, "sidecar")
		fmt.Println("claimed", err)
		_, _ = bufio.NewReader(os.Stdin).ReadString('\n')
		os.Exit(0)
	}
	os.Exit(m.Run())
}

func TestASecondProcessIsRefusedAndToldOfTheFirst(t *testing.T) {
	t.Parallel()
	dir := filepath.Join(t.TempDir(), "node")
	first := exec.Command(os.Args[0])
	first.Env = append(os.Environ(), "LARDER_TEST_CLAIM="+dir)
	out, err := first.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := first.StdinPipe(); err != nil {
		t.Fatal(err)
	}
	if err := first.Start(); err != nil {
		t.Fatal(err)
	}
	if line, _ := bufio.NewReader(out).ReadString('\n'); line != "claimed <nil>\n" {
		t.Fatalf("the first says %q", line)
	}
	_, err = Claim(dir, "sidecar")
	if err == nil || !strings.Contains(err.Error(), fmt.Sprintf("another larder-sidecar (process %d) serves %s", first.Process.Pid, dir)) {
		t.Errorf("the second is told %v", err)
	}
	release, err := Claim(dir, "plugin")
	if err != nil {
		t.Errorf("another program: %v", err)
	} else {
		release()
	}
	if err := first.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = first.Wait()
	release, err = Claim(dir, "sidecar")
	if err != nil {
		t.Fatalf("after the first was killed: %v", err)
	}
	release()
}

// Not in parallel: a process that another test starts has a copy of the socket
// for a moment, and by that it still answers.
func TestSocket(t *testing.T) {
	path := filepath.Join(t.TempDir(), "a", "s.sock")
	l, err := ListenUnix(path, 0o600, "--listen")
	if err != nil {
		t.Fatal(err)
	}
	if fi, err := os.Stat(path); err != nil || fi.Mode().Perm() != 0o600 {
		t.Errorf("mode %v, %v", fi.Mode(), err)
	}
	if _, err := ListenUnix(path, 0o600, "--listen"); err == nil || !strings.Contains(err.Error(), "another process answers there; stop it or choose another --listen") {
		t.Errorf("a socket in use: %v", err)
	}
	l.(*net.UnixListener).SetUnlinkOnClose(false)
	_ = l.Close()
	l, err = ListenUnix(path, 0o666, "--listen")
	if err != nil {
		t.Fatalf("a socket that was left: %v", err)
	}
	if fi, err := os.Stat(path); err != nil || fi.Mode().Perm() != 0o666 {
		t.Errorf("mode %v, %v", fi.Mode(), err)
	}
	_ = l.Close()
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := ListenUnix(path, 0o600, "--listen"); err == nil || !strings.Contains(err.Error(), "is not a socket") {
		t.Errorf("a file: %v", err)
	}
}
