//go:build nvml && cgo

package main

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"slices"

	"github.com/NVIDIA/go-nvml/pkg/nvml"

	"github.com/larder-project/larder/internal/usage/gpu"
)

// errAbsent: this host has no NVIDIA driver, so nothing runs on such a GPU.
var errAbsent = errors.New("no NVIDIA driver")

// list writes the processes on all GPUs, then that these are all.
func list(lib nvml.Interface, out io.Writer) (err error) {
	// No other call is allowed before this one has succeeded: it would end the
	// process.
	switch ret := lib.Init(); ret {
	case nvml.SUCCESS:
	case nvml.ERROR_LIBRARY_NOT_FOUND, nvml.ERROR_DRIVER_NOT_LOADED:
		return fmt.Errorf("%w: %s", errAbsent, word(ret))
	default:
		return fmt.Errorf("start NVML: %s", word(ret))
	}
	defer func() {
		if ret := lib.Shutdown(); ret != nvml.SUCCESS && err == nil {
			err = fmt.Errorf("end NVML: %s", word(ret))
		}
	}()
	n, ret := lib.DeviceGetCount()
	if ret != nvml.SUCCESS {
		return fmt.Errorf("count the GPUs: %s", word(ret))
	}
	mps := hasMPS(lib)
	lines := json.NewEncoder(out)
	end := gpu.End{End: true}
	for i := range n {
		processes, err := on(lib, i, mps)
		if err != nil {
			return fmt.Errorf("GPU %d: %w", i, err)
		}
		for _, p := range processes {
			end.Processes++
			if err := lines.Encode(p); err != nil {
				return err
			}
		}
	}
	return lines.Encode(end)
}

// word names a result without asking the library for it, which may be the one
// thing that failed to load.
func word(ret nvml.Return) string {
	switch ret {
	case nvml.ERROR_LIBRARY_NOT_FOUND:
		return "libnvidia-ml.so.1 is not installed"
	case nvml.ERROR_DRIVER_NOT_LOADED:
		return "the driver is not loaded"
	}
	return fmt.Sprintf("NVML error %d (%s)", int(ret), ret.Error())
}

// hasMPS tells whether the driver can list the clients of its Multi-Process
// Service, which are not among the other processes. Drivers before 470 cannot.
func hasMPS(lib nvml.Interface) bool {
	for _, version := range []string{"_v3", "_v2", ""} {
		if lib.Extensions().LookupSymbol("nvmlDeviceGetMPSComputeRunningProcesses"+version) == nil {
			return true
		}
	}
	return false
}

// on lists the processes on one GPU by their numbers, each once.
func on(lib nvml.Interface, index int, mps bool) ([]gpu.Process, error) {
	device, ret := lib.DeviceGetHandleByIndex(index)
	if ret != nvml.SUCCESS {
		return nil, fmt.Errorf("open: %s", word(ret))
	}
	uuid, ret := device.GetUUID()
	if ret != nvml.SUCCESS {
		return nil, fmt.Errorf("read its UUID: %s", word(ret))
	}
	name, ret := device.GetName()
	if ret != nvml.SUCCESS {
		return nil, fmt.Errorf("read its name: %s", word(ret))
	}
	kinds := []struct {
		name string
		ask  func() ([]nvml.ProcessInfo, nvml.Return)
	}{{"compute", device.GetComputeRunningProcesses}, {"graphics", device.GetGraphicsRunningProcesses}}
	if mps {
		kinds = append(kinds, struct {
			name string
			ask  func() ([]nvml.ProcessInfo, nvml.Return)
		}{"MPS", device.GetMPSComputeRunningProcesses})
	}
	found := map[uint32]gpu.Process{}
	for _, kind := range kinds {
		infos, ret := kind.ask()
		if ret == nvml.ERROR_NOT_SUPPORTED {
			continue // this GPU runs none of the kind
		}
		if ret != nvml.SUCCESS {
			return nil, fmt.Errorf("list its %s processes: %s", kind.name, word(ret))
		}
		for _, info := range infos {
			p := gpu.Process{GPU: index, UUID: uuid, Name: name, PID: int(info.Pid)}
			if info.UsedGpuMemory != math.MaxUint64 { // NVML_VALUE_NOT_AVAILABLE
				p.Memory = max(info.UsedGpuMemory, found[info.Pid].Memory)
			}
			found[info.Pid] = p
		}
	}
	out := make([]gpu.Process, 0, len(found))
	for _, p := range found {
		out = append(out, p)
	}
	slices.SortFunc(out, func(a, b gpu.Process) int { return cmp.Compare(a.PID, b.PID) })
	return out, nil
}
