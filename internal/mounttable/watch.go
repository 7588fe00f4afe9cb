package mounttable

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// Watch calls changed when something was mounted or unmounted in the mount
// namespace of a process, until the context ends. The kernel tells it; nothing
// is read again and again.
func Watch(ctx context.Context, pid string, changed func()) error {
	// Not by package os, whose own poller would take the kernel's word away.
	table, err := unix.Open(filepath.Join(Proc, pid, "mountinfo"), unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("watch mounts of process %s: %w", pid, err)
	}
	defer unix.Close(table)
	wake, err := unix.Eventfd(0, unix.EFD_CLOEXEC)
	if err != nil {
		return fmt.Errorf("watch mounts: %w", err)
	}
	defer unix.Close(wake)
	stop := context.AfterFunc(ctx, func() { _, _ = unix.Write(wake, []byte{1, 0, 0, 0, 0, 0, 0, 0}) })
	defer stop()
	fds := []unix.PollFd{{Fd: int32(table), Events: unix.POLLPRI}, {Fd: int32(wake), Events: unix.POLLIN}}
	for ctx.Err() == nil {
		if _, err := unix.Poll(fds, -1); err != nil && !errors.Is(err, unix.EINTR) {
			return fmt.Errorf("watch mounts: %w", err)
		}
		if fds[0].Revents == 0 {
			continue
		}
		if _, err := unix.Pread(table, make([]byte, 1), 0); err != nil {
			return fmt.Errorf("watch mounts of process %s, which has ended: %w", pid, err)
		}
		changed()
	}
	return nil
}
