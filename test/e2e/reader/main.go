// Command reader reads a file again and again, past the page cache, and writes
// down how far it is. Tests run it in containers: what it reads is what a model
// server would read, and a read that fails or gives other bytes ends it.
//
//	reader FILE LOG
//
// Each mebibyte of FILE begins with its number, as text. LOG gets a line
// "NANOSECONDS BYTES" each twentieth of a second (since 1970, read so far), or
// "failed: …" at the end.
package main

import (
	"fmt"
	"os"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

const piece = 1 << 20

func main() {
	log, err := os.OpenFile(os.Args[2], os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err == nil {
		err = read(os.Args[1], log)
	}
	fmt.Fprintln(log, "failed:", err)
	os.Exit(1)
}

func read(path string, log *os.File) error {
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_DIRECT, 0)
	if err != nil {
		return err
	}
	fi, err := f.Stat()
	if err != nil {
		return err
	}
	// Aligned, as O_DIRECT wants it.
	buffer, err := unix.Mmap(-1, 0, piece, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE)
	if err != nil {
		return err
	}
	var total int64
	told := time.Now()
	for {
		for i := range fi.Size() / piece {
			n, err := f.ReadAt(buffer, i*piece)
			if err != nil || n != piece {
				return fmt.Errorf("read mebibyte %d: %d bytes, %w", i, n, err)
			}
			if want := fmt.Sprintf("%08d", i); !strings.HasPrefix(string(buffer[:8]), want) {
				return fmt.Errorf("mebibyte %d begins with %q", i, buffer[:8])
			}
			total += piece
			if now := time.Now(); now.Sub(told) > 50*time.Millisecond {
				told = now
				fmt.Fprintln(log, now.UnixNano(), total)
			}
		}
	}
}
