package main

import (
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/larder-project/larder/internal/testenv"
)

// TestEveryPartRuns runs all parts at small sizes. Figures of space and memory
// must meet their bars there too; times are not judged at these sizes.
func TestEveryPartRuns(t *testing.T) {
	testenv.NeedRoot(t)
	testenv.NeedPrograms(t, "mkfs.xfs", "mkfs.ext4", "losetup", "curl", "docker", "busybox")

	bin := t.TempDir()
	for name, pkg := range map[string]string{"larder": "./cmd/larder", "larder-plugin": "./plugin", "bench": "./test/bench"} {
		build := exec.CommandContext(t.Context(), "go", "build", "-o", filepath.Join(bin, name), pkg)
		build.Dir = "../.."
		build.Env = append(os.Environ(), "CGO_ENABLED=0")
		if out, err := build.CombinedOutput(); err != nil {
			t.Fatalf("build %s: %v\n%s", name, err, out)
		}
	}
	var report struct {
		Figures []figure
		Machine machine
	}
	cmd := exec.CommandContext(t.Context(), filepath.Join(bin, "bench"), "-quick", "-json", "-bin", bin)
	cmd.Stderr = testLog{t}
	out, err := cmd.Output()
	if err != nil {
		t.Errorf("bench: %v", err)
	}
	if err := json.Unmarshal(out, &report); err != nil {
		t.Fatalf("the report is no JSON: %v\n%s", err, out)
	}
	parts := make(map[int]int)
	for _, f := range report.Figures {
		parts[f.Part]++
		if f.Value <= 0 {
			t.Errorf("%s: the figure is %v", f.What, f.Value)
		}
	}
	for part, least := range map[int]int{2: 2, 3: 2, 4: 2*len(quick.Live) + 4, 5: 7, 6: 3} {
		if parts[part] < least {
			t.Errorf("part %d gave %d figures, want %d", part, parts[part], least)
		}
	}
	if report.Machine.Kernel == "" || report.Machine.Memory == 0 {
		t.Errorf("the machine is not named: %+v", report.Machine)
	}
}

// testLog passes what the program says to the test's log.
type testLog struct{ t *testing.T }

func (l testLog) Write(p []byte) (int, error) {
	l.t.Logf("%s", p)
	return len(p), nil
}
