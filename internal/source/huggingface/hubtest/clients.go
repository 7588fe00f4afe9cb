package hubtest

import (
	"fmt"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/larder-project/larder/internal/testenv"
)

// Clients are versions of the huggingface_hub package: of each of the two lines
// that are in use, the last.
var Clients = []string{"2.4.0", "0.36.2"}

// Client installs a version of the hub's own client, from PyPI, and gives the
// folder that has its programs: python, hf.
func Client(t testing.TB, version string) string {
	t.Helper()
	testenv.NeedPrograms(t, "python3", "pip")
	dir := filepath.Join(t.TempDir(), "venv")
	if out, err := exec.CommandContext(t.Context(), "python3", "-m", "venv", dir).CombinedOutput(); err != nil {
		t.Fatalf("make a virtual environment: %v\n%s", err, out)
	}
	bin := filepath.Join(dir, "bin")
	out, err := testenv.Fetch(func() *exec.Cmd {
		return exec.CommandContext(t.Context(), filepath.Join(bin, "python"), "-m", "pip", "install", "-q", "--disable-pip-version-check", "huggingface_hub=="+version)
	})
	testenv.Need(t, err == nil, fmt.Sprintf("the package huggingface_hub %s (pip: %v %s)", version, err, out))
	return bin
}
