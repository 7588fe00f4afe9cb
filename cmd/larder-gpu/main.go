//go:build nvml && cgo

// Command larder-gpu lists the processes on this node's NVIDIA GPUs for the
// other programs of Larder: one JSON object a line, see package gpu for their
// fields and for the exit codes.
//
// It is a program of its own because NVIDIA's library (NVML) is not: a call
// that the installed driver does not know ends the process, and linking needs
// cgo. Build it with "make gpu".
package main

import (
	"bufio"
	"errors"
	"fmt"
	"os"

	"github.com/NVIDIA/go-nvml/pkg/nvml"

	"github.com/larder-project/larder/internal/usage/gpu"
)

func main() {
	out := bufio.NewWriter(os.Stdout)
	err := list(nvml.New(), out)
	if err == nil {
		err = out.Flush()
	}
	if err == nil {
		return
	}
	fmt.Fprintln(os.Stderr, "larder-gpu:", err)
	if errors.Is(err, errAbsent) {
		os.Exit(gpu.ExitAbsent)
	}
	os.Exit(gpu.ExitFailed)
}
