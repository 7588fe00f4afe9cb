package main

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/coreos/go-systemd/v22/activation"
	"golang.org/x/sys/unix"

	"github.com/larder-project/larder/internal/disk"
)

// claim makes this process the only plugin on a STATE folder. The lock goes
// with the process, however it ends.
func claim(state string) (release func(), err error) {
	if err := disk.MkdirAll(state, 0o711); err != nil {
		return nil, fmt.Errorf("claim state: %w", err)
	}
	path := filepath.Join(state, "plugin.lock")
	f, err := disk.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, fmt.Errorf("claim state: %w", err)
	}
	ok, err := f.Lock(true)
	if err == nil && !ok {
		who, _ := io.ReadAll(io.LimitReader(f, 64))
		err = fmt.Errorf("another larder-plugin (process %s) serves %s already; stop it, or give this one a folder of its own (--root)", strings.TrimSpace(string(who)), state)
	}
	if err == nil {
		err = f.Truncate(0)
	}
	if err == nil {
		_, err = f.WriteAt([]byte(strconv.Itoa(os.Getpid())+"\n"), 0)
	}
	if err != nil {
		_ = f.Close()
		return nil, err
	}
	return func() { _ = f.Close() }, nil
}

// listen takes the socket that systemd hands over, else makes its own.
func listen(path string) (net.Listener, error) {
	handed, err := activation.Listeners()
	if err != nil {
		return nil, fmt.Errorf("take the socket from systemd: %w", err)
	}
	for _, l := range handed {
		if l != nil {
			return l, nil
		}
	}
	if err := disk.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return nil, fmt.Errorf("listen: %w", err)
	}
	if err := removeStale(path); err != nil {
		return nil, fmt.Errorf("listen on %s: %w", path, err)
	}
	// Nobody but root may speak to the driver: who can mount any model with
	// any owner is root on the volumes of all containers.
	old := unix.Umask(0o177)
	l, err := net.Listen("unix", path)
	unix.Umask(old)
	if err != nil {
		return nil, fmt.Errorf("listen on %s: %w", path, err)
	}
	return l, nil
}

// removeStale removes a socket whose owner has died. One that answers belongs
// to somebody.
func removeStale(path string) error {
	fi, err := os.Lstat(path)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	if fi.Mode()&os.ModeSocket == 0 {
		return errors.New("it exists and is not a socket; move it away or choose another --socket")
	}
	if c, err := net.Dial("unix", path); err == nil {
		_ = c.Close()
		return errors.New("another process answers there; stop it or choose another --socket")
	}
	return disk.Remove(path)
}

// witness is a listener that tells when an engine calls the driver whose
// process this one can see: the kernel gives the number of the process at the
// other end, or 0 for one outside this PID namespace and those below it. The
// containers of an engine are where it is, or below.
type witness struct {
	net.Listener
	seen func()
}

// Accept implements net.Listener.
func (w *witness) Accept() (net.Conn, error) {
	conn, err := w.Listener.Accept()
	if err != nil {
		return nil, err
	}
	if peer(conn) == 0 {
		return conn, nil
	}
	return &watched{Conn: conn, seen: w.seen}, nil
}

// peer is the process at the other end, or 0.
func peer(conn net.Conn) int32 {
	unixConn, ok := conn.(*net.UnixConn)
	if !ok {
		return 0
	}
	raw, err := unixConn.SyscallConn()
	if err != nil {
		return 0
	}
	var pid int32
	_ = raw.Control(func(fd uintptr) {
		if cred, err := unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED); err == nil {
			pid = cred.Pid
		}
	})
	return pid
}

// watched waits for a call of the driver. Anybody may ask who is there, as
// larder doctor does.
type watched struct {
	net.Conn
	seen func()
}

// Read implements net.Conn.
func (w *watched) Read(p []byte) (int, error) {
	n, err := w.Conn.Read(p)
	if w.seen != nil && bytes.HasPrefix(p[:n], []byte("POST /VolumeDriver.")) {
		w.seen()
		w.seen = nil
	}
	return n, err
}
