//go:build nvml && cgo

package main

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/larder-project/larder/internal/testenv"
	"github.com/larder-project/larder/internal/usage/gpu"
)

// oldDriver is NVML as a driver before 470 has it: no list of MPS clients, and
// processes in the first of the three forms (a number and bytes).
const oldDriver = `
typedef struct { unsigned pid; unsigned long long memory; } process;
int nvmlInit_v2(void) { return INIT; }
int nvmlShutdown(void) { return 0; }
const char *nvmlErrorString(int code) { return "as the test wants it"; }
int nvmlDeviceGetCount_v2(unsigned *n) { *n = 1; return 0; }
int nvmlDeviceGetHandleByIndex_v2(unsigned i, void **device) { *device = &nvmlInit_v2; return 0; }
int nvmlDeviceGetUUID(void *d, char *text, unsigned size) { text[0] = 'u'; text[1] = 0; return 0; }
int nvmlDeviceGetName(void *d, char *text, unsigned size) { text[0] = 'n'; text[1] = 0; return 0; }
int nvmlDeviceGetComputeRunningProcesses(void *d, unsigned *n, process *p) {
	if (*n < 2) { *n = 2; return 7; }
	*n = 2; p[0].pid = 12; p[0].memory = 4096; p[1].pid = 13; p[1].memory = 1;
	return 0;
}
int nvmlDeviceGetGraphicsRunningProcesses(void *d, unsigned *n, process *p) { *n = 0; return 0; }
`

// The program as it is built, with a library that has fewer symbols than it was
// built with: a call to one of those would end it.
func TestTheProgramWithTheLibraryOfAnOldDriver(t *testing.T) {
	testenv.NeedPrograms(t, "cc")
	dir := t.TempDir()
	program, library := filepath.Join(dir, gpu.Helper), filepath.Join(dir, "libnvidia-ml.so.1")
	do := func(name string, args ...string) {
		t.Helper()
		if out, err := exec.Command(name, args...).CombinedOutput(); err != nil {
			t.Fatalf("%s %v: %v\n%s", name, args, err, out)
		}
	}
	do("go", "build", "-tags", "nvml", "-ldflags", "-extldflags=-Wl,-z,lazy", "-o", program, ".")
	source := filepath.Join(dir, "nvml.c")
	if err := os.WriteFile(source, []byte(oldDriver), 0o600); err != nil {
		t.Fatal(err)
	}
	for init, want := range map[string]struct {
		exit int
		out  string
	}{
		"0": {gpu.ExitDone, `{"gpu":0,"uuid":"u","name":"n","pid":12,"memory":4096}
{"gpu":0,"uuid":"u","name":"n","pid":13,"memory":1}
{"end":true,"processes":2}
`},
		"9":  {gpu.ExitAbsent, ""}, // NVML_ERROR_DRIVER_NOT_LOADED
		"18": {gpu.ExitFailed, ""}, // NVML_ERROR_LIB_RM_VERSION_MISMATCH: an upgrade without a reboot
	} {
		do("cc", "-shared", "-fPIC", "-w", "-DINIT="+init, "-o", library, source)
		cmd := exec.Command(program)
		cmd.Env = append(os.Environ(), "LD_LIBRARY_PATH="+dir)
		out, err := cmd.Output()
		exit := 0
		if ended := (*exec.ExitError)(nil); errors.As(err, &ended) {
			exit = ended.ExitCode()
			t.Logf("nvmlInit gives %s: %s", init, ended.Stderr)
		} else if err != nil {
			t.Fatal(err)
		}
		if exit != want.exit || string(out) != want.out {
			t.Errorf("nvmlInit gives %s: exit %d, printed\n%s\nwant %d and\n%s", init, exit, out, want.exit, want.out)
		}
	}
}
