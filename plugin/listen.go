package main

import (
	"bytes"
	"fmt"
	"net"

	"github.com/coreos/go-systemd/v22/activation"
	"golang.org/x/sys/unix"

	"github.com/larder-project/larder/internal/service"
)

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
	// Nobody but root may speak to the driver: who can mount any model with
	// any owner is root on the volumes of all containers.
	return service.ListenUnix(path, 0o600, "--socket")
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
