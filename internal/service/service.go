// Package service has what Larder's programs that stay have in common: that
// there is one of each on a node, and how they listen on a socket of the file
// system.
package service

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/larder-project/larder/internal/disk"
)

// Claim makes this process the only one of its program on a STATE folder, by
// the lock on STATE/NAME.lock. The lock goes with the process, however it ends.
// A second process is refused, and told which the first is.
func Claim(state, name string) (release func(), err error) {
	if err := disk.MkdirAll(state, 0o711); err != nil {
		return nil, fmt.Errorf("claim state: %w", err)
	}
	f, err := disk.OpenFile(filepath.Join(state, name+".lock"), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, fmt.Errorf("claim state: %w", err)
	}
	ok, err := f.Lock(true)
	if err == nil && !ok {
		who, _ := io.ReadAll(io.LimitReader(f, 64))
		err = fmt.Errorf("another larder-%s (process %s) serves %s already; stop it, or give this one a folder of its own (--root)", name, strings.TrimSpace(string(who)), state)
	}
	if err != nil {
		_ = f.Close()
		return nil, err
	}
	// For the message above alone: on a full disk the program runs without it.
	if n, err := f.WriteAt([]byte(strconv.Itoa(os.Getpid())+"\n"), 0); err == nil {
		_ = f.Truncate(int64(n))
	}
	return func() { _ = f.Close() }, nil
}

// umask is held while the process has another umask than its own.
var umask sync.Mutex

// ListenUnix makes a socket at path, which may be reached by those that mode
// says. A socket that a dead process left is replaced. option is what the
// path was given by, for messages.
func ListenUnix(path string, mode fs.FileMode, option string) (net.Listener, error) {
	if err := disk.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return nil, fmt.Errorf("listen: %w", err)
	}
	if err := removeStale(path, option); err != nil {
		return nil, fmt.Errorf("listen on %s: %w", path, err)
	}
	umask.Lock() // the process has one
	old := unix.Umask(int(^mode & fs.ModePerm))
	l, err := net.Listen("unix", path)
	unix.Umask(old)
	umask.Unlock()
	if err != nil {
		return nil, fmt.Errorf("listen on %s: %w", path, err)
	}
	return l, nil
}

// removeStale removes a socket whose owner has died. One that answers belongs
// to somebody.
func removeStale(path, option string) error {
	fi, err := os.Lstat(path)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	if fi.Mode()&os.ModeSocket == 0 {
		return fmt.Errorf("it exists and is not a socket; move it away or choose another %s", option)
	}
	if c, err := net.Dial("unix", path); err == nil {
		_ = c.Close()
		return fmt.Errorf("another process answers there; stop it or choose another %s", option)
	}
	return disk.Remove(path)
}
