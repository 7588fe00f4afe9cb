package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// probe is what runs inside containers, and on the host for comparison, so
// that starting a container is not part of what is timed. It prints the
// nanoseconds that the work took.
//
//	read FILE TIMES    reads the whole file, and prints the median
//	poke FILE          opens the file for writing and changes one byte of it
//	own FILE BYTES     writes a new file
func probe(args []string) int {
	took, err := probeRun(args)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	fmt.Println(took.Nanoseconds())
	return 0
}

func probeRun(args []string) (time.Duration, error) {
	switch {
	case len(args) == 3 && args[0] == "read":
		n, err := strconv.Atoi(args[2])
		if err != nil || n < 1 {
			return 0, errors.New("TIMES is a number from 1 on")
		}
		var times []time.Duration
		for range n {
			d, err := readAll(args[1])
			if err != nil {
				return 0, err
			}
			times = append(times, d)
		}
		return median(times), nil
	case len(args) == 2 && args[0] == "poke":
		return poke(args[1])
	case len(args) == 3 && args[0] == "own":
		n, err := strconv.ParseInt(args[2], 10, 64)
		if err != nil {
			return 0, err
		}
		began := time.Now()
		err = writeRandom(args[1], n, uint64(os.Getpid())<<32|uint64(began.Nanosecond()))
		return time.Since(began), err
	}
	return 0, errors.New("usage: read FILE TIMES | poke FILE | own FILE BYTES")
}

func readAll(path string) (time.Duration, error) {
	buf := make([]byte, mib)
	began := time.Now()
	f, err := os.Open(path)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	for {
		_, err := f.Read(buf)
		if errors.Is(err, io.EOF) {
			return time.Since(began), nil
		}
		if err != nil {
			return 0, err
		}
	}
}

func poke(path string) (time.Duration, error) {
	began := time.Now()
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return 0, err
	}
	_, err = f.WriteAt([]byte{42}, 4096)
	err = errors.Join(err, f.Close())
	return time.Since(began), err
}

// mincore fills pages with what the kernel holds of a mapping.
func mincore(mem, pages []byte) error {
	_, _, errno := unix.Syscall(unix.SYS_MINCORE,
		uintptr(unsafe.Pointer(&mem[0])), uintptr(len(mem)), uintptr(unsafe.Pointer(&pages[0])))
	if errno != 0 {
		return errno
	}
	return nil
}
