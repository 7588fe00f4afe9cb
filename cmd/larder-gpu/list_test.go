//go:build nvml && cgo

package main

import (
	"bytes"
	"errors"
	"io"
	"math"
	"strings"
	"testing"

	"github.com/NVIDIA/go-nvml/pkg/nvml"
	"github.com/NVIDIA/go-nvml/pkg/nvml/mock"
	"github.com/NVIDIA/go-nvml/pkg/nvml/mock/dgxa100"
)

// machine is a DGX A100 with these processes on its GPU 3, whose driver knows
// these symbols.
func machine(symbols string, compute, graphics, mps []nvml.ProcessInfo) *dgxa100.Server {
	m := dgxa100.New()
	m.ExtensionsFunc = func() nvml.ExtendedInterface {
		return &mock.ExtendedInterface{LookupSymbolFunc: func(name string) error {
			if symbols != "" && strings.HasPrefix(name, symbols) {
				return nil
			}
			return errors.New("undefined symbol: " + name)
		}}
	}
	for i, d := range m.Devices {
		d := d.(*dgxa100.Device)
		is := func(infos []nvml.ProcessInfo) func() ([]nvml.ProcessInfo, nvml.Return) {
			if i != 3 {
				infos = nil
			}
			return func() ([]nvml.ProcessInfo, nvml.Return) { return infos, nvml.SUCCESS }
		}
		d.GetComputeRunningProcessesFunc = is(compute)
		d.GetGraphicsRunningProcessesFunc = is(graphics)
		// Without the symbol a call ends the process; the mock panics.
		if symbols != "" {
			d.GetMPSComputeRunningProcessesFunc = is(mps)
		}
	}
	return m
}

func TestProcessesAreListedOnceWithTheirGPU(t *testing.T) {
	t.Parallel()
	compute := []nvml.ProcessInfo{{Pid: 12, UsedGpuMemory: 1 << 30}, {Pid: 7, UsedGpuMemory: math.MaxUint64}}
	graphics := []nvml.ProcessInfo{{Pid: 12, UsedGpuMemory: 1 << 20}}
	clients := []nvml.ProcessInfo{{Pid: 20, UsedGpuMemory: 5}}
	for symbols, want := range map[string]string{
		"nvmlDeviceGetMPSComputeRunningProcesses": `,"pid":7}
,"pid":12,"memory":1073741824}
,"pid":20,"memory":5}
{"end":true,"processes":3}
`,
		"": `,"pid":7}
,"pid":12,"memory":1073741824}
{"end":true,"processes":2}
`,
	} {
		m := machine(symbols, compute, graphics, clients)
		uuid, _ := m.Devices[3].GetUUID()
		name, _ := m.Devices[3].GetName()
		var out bytes.Buffer
		if err := list(m, &out); err != nil {
			t.Fatal(err)
		}
		got := strings.ReplaceAll(out.String(), `{"gpu":3,"uuid":"`+uuid+`","name":"`+name+`"`, "")
		if got != want {
			t.Errorf("with the symbol %q:\n%s\nwant\n%s", symbols, got, want)
		}
	}
}

func TestAHostWithoutADriverIsToldFromOneThatFails(t *testing.T) {
	t.Parallel()
	for ret, absent := range map[nvml.Return]bool{
		nvml.ERROR_LIBRARY_NOT_FOUND: true, nvml.ERROR_DRIVER_NOT_LOADED: true,
		nvml.ERROR_UNKNOWN: false, nvml.ERROR_LIB_RM_VERSION_MISMATCH: false, nvml.ERROR_NO_PERMISSION: false,
	} {
		m := dgxa100.New()
		m.InitFunc = func() nvml.Return { return ret }
		fail := func() { t.Errorf("after Init gave %d, the library is called", int(ret)) }
		m.DeviceGetCountFunc = func() (int, nvml.Return) { fail(); return 0, ret }
		m.ExtensionsFunc = func() nvml.ExtendedInterface { fail(); return nil }
		m.ShutdownFunc = func() nvml.Return { fail(); return ret }
		if err := list(m, io.Discard); err == nil || errors.Is(err, errAbsent) != absent {
			t.Errorf("Init gives %d: %v, want absent %v", int(ret), err, absent)
		}
	}
}

func TestWhatCannotBeAskedIsAnErrorAndTheListHasNoEnd(t *testing.T) {
	t.Parallel()
	none := func() ([]nvml.ProcessInfo, nvml.Return) { return nil, nvml.ERROR_GPU_IS_LOST }
	for name, spoil := range map[string]func(*dgxa100.Server, *dgxa100.Device){
		"count": func(m *dgxa100.Server, _ *dgxa100.Device) {
			m.DeviceGetCountFunc = func() (int, nvml.Return) { return 0, nvml.ERROR_UNKNOWN }
		},
		"handle": func(m *dgxa100.Server, _ *dgxa100.Device) {
			m.DeviceGetHandleByIndexFunc = func(int) (nvml.Device, nvml.Return) { return nil, nvml.ERROR_GPU_IS_LOST }
		},
		"uuid": func(_ *dgxa100.Server, d *dgxa100.Device) {
			d.GetUUIDFunc = func() (string, nvml.Return) { return "", nvml.ERROR_UNKNOWN }
		},
		"name": func(_ *dgxa100.Server, d *dgxa100.Device) {
			d.GetNameFunc = func() (string, nvml.Return) { return "", nvml.ERROR_UNKNOWN }
		},
		"compute":  func(_ *dgxa100.Server, d *dgxa100.Device) { d.GetComputeRunningProcessesFunc = none },
		"graphics": func(_ *dgxa100.Server, d *dgxa100.Device) { d.GetGraphicsRunningProcessesFunc = none },
		"MPS":      func(_ *dgxa100.Server, d *dgxa100.Device) { d.GetMPSComputeRunningProcessesFunc = none },
		"the end": func(m *dgxa100.Server, _ *dgxa100.Device) {
			m.ShutdownFunc = func() nvml.Return { return nvml.ERROR_UNKNOWN }
		},
	} {
		m := machine("nvml", nil, nil, nil)
		spoil(m, m.Devices[5].(*dgxa100.Device))
		var out bytes.Buffer
		if err := list(m, &out); err == nil {
			t.Errorf("%s: no error, printed %s", name, &out)
		}
		if name != "the end" && strings.Contains(out.String(), "end") {
			t.Errorf("%s: the list has an end: %s", name, &out)
		}
	}
}

func TestAGPUThatRunsNoGraphicsIsListed(t *testing.T) {
	t.Parallel()
	m := machine("nvml", []nvml.ProcessInfo{{Pid: 1}}, nil, nil)
	for _, d := range m.Devices {
		d.(*dgxa100.Device).GetGraphicsRunningProcessesFunc = func() ([]nvml.ProcessInfo, nvml.Return) { return nil, nvml.ERROR_NOT_SUPPORTED }
	}
	var out bytes.Buffer
	if err := list(m, &out); err != nil || !strings.Contains(out.String(), `"pid":1`) {
		t.Errorf("%v, printed %s", err, &out)
	}
}
