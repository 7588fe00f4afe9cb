package overlay

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/larder-project/larder/internal/testenv"
)

// The tests of this package run a second time under another kernel: Debian's
// user-mode Linux 6.1 (package user-mode-linux), which needs no hardware
// support. It is older than data-only layers, and has project quotas on ext4
// and XFS, which the kernel of a test machine may lack.
//
// The kernel is started with the tests' binary as its first process, on the
// machine's own files, of which only a memory disk is written to.

// underKernel is set in the environment of that first process; its value is
// the file for the output.
const underKernel = "LARDER_TEST_INIT"

func TestMain(m *testing.M) {
	if out := os.Getenv(underKernel); out != "" && os.Getpid() == 1 {
		firstProcess(out)
	}
	os.Exit(testenv.PrivateMounts(m.Run))
}

func TestUnderAnOlderKernel(t *testing.T) {
	if os.Getenv(underKernel) != "" {
		t.Skip("this is the older kernel")
	}
	if testing.Short() {
		t.Skip("-short")
	}
	testenv.NeedRoot(t)
	testenv.NeedPrograms(t, "linux.uml", "go")
	// Built anew without the race detector, whose memory does not fit in there.
	self := filepath.Join(t.TempDir(), "overlay.test")
	build := exec.CommandContext(t.Context(), "go", "test", "-c", "-tags=faults", "-o", self, ".")
	build.Env = append(os.Environ(), "CGO_ENABLED=0", "GOFLAGS=")
	if text, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v: %v\n%s", build.Args, err, text)
	}
	out := filepath.Join(t.TempDir(), "out")
	// Its memory is a file in the folder for temporary ones.
	cmd := exec.CommandContext(t.Context(), "linux.uml", "mem=4G", "rootfstype=hostfs", "rw", "quiet", "con=null", "con0=null,fd:1",
		"init="+self, underKernel+"="+out, "uml_dir="+t.TempDir())
	cmd.WaitDelay = 10 * time.Second
	console, err := cmd.CombinedOutput()
	got, readErr := os.ReadFile(out)
	if readErr != nil {
		t.Fatalf("the kernel gave no result: %v, %v\n%s", err, readErr, console)
	}
	var summary []string
	for line := range strings.Lines(string(got)) {
		if strings.HasPrefix(strings.TrimSpace(line), "--- ") {
			summary = append(summary, line)
		}
	}
	if !bytes.HasSuffix(got, []byte("\nall tests passed\n")) {
		t.Fatalf("under the older kernel:\n%s", got)
	}
	t.Logf("under the older kernel:\n%s", strings.Join(summary, ""))
	// What the kernel was wanted for has run.
	for _, name := range []string{"TestLimitIsKept/ext4_[prjquota]_auto", "TestLimitIsKept/xfs_[prjquota]_auto", "TestProjectIdsAreUnique",
		"TestUpperUnderAQuotaIsRefusedWithoutIt/xfs", "TestRemovalWhateverProjectsAContainerSet/xfs", "TestALoopImageHoldsAgainstAnOwnerWhoLeavesHisProject/xfs",
		"TestViewHasTheModelsBytesAndOnlyItsNames/ext4/lower/ro=true"} {
		if !bytes.Contains(got, []byte("--- PASS: "+name+" ")) {
			t.Errorf("under the older kernel %s did not run", name)
		}
	}
}

// firstProcess sets up what tests need, runs them, and stops the machine.
func firstProcess(out string) {
	err := func() error {
		f, err := os.Create(out)
		if err != nil {
			return err
		}
		defer f.Close()
		if err := prepareMachine(); err != nil {
			fmt.Fprintln(f, err)
			return err
		}
		self, err := os.Executable()
		if err != nil {
			return err
		}
		cmd := exec.Command(self, "-test.v", "-test.short", "-test.timeout=8m")
		cmd.Dir = "/"
		cmd.Env = append(os.Environ(), "PATH=/usr/sbin:/usr/bin:/sbin:/bin", "TMPDIR=/dev/memory", "LARDER_TEST_ALL=1", "HOME=/")
		cmd.Stdout, cmd.Stderr = f, f
		if err := cmd.Run(); err != nil {
			fmt.Fprintln(f, err)
			return err
		}
		_, err = fmt.Fprint(f, "\nall tests passed\n")
		return err
	}()
	if err != nil {
		fmt.Println(err)
	}
	unix.Sync()
	_ = unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF)
	select {}
}

func prepareMachine() error {
	for _, m := range []struct{ fstype, target, data string }{
		{"proc", "/proc", ""}, {"sysfs", "/sys", ""}, {"devtmpfs", "/dev", ""}, {"tmpfs", "/dev/memory", "size=3g"},
	} {
		if m.target == "/dev/memory" {
			if err := os.MkdirAll(m.target, 0o755); err != nil {
				return err
			}
		}
		if err := unix.Mount(m.fstype, m.target, m.fstype, 0, m.data); err != nil && !errors.Is(err, unix.EBUSY) {
			return fmt.Errorf("mount %s: %w", m.target, err)
		}
	}
	var uts unix.Utsname
	if err := unix.Uname(&uts); err != nil {
		return err
	}
	for _, name := range []string{"drivers/block/loop", "fs/overlayfs/overlay", "fs/quota/quota_tree", "fs/quota/quota_v2"} {
		path := filepath.Join("/usr/lib/uml/modules", unix.ByteSliceToString(uts.Release[:]), "kernel", name+".ko")
		f, err := os.Open(path)
		if err != nil {
			return err
		}
		err = unix.FinitModule(int(f.Fd()), "", 0)
		_ = f.Close()
		if err != nil {
			return fmt.Errorf("load %s: %w", path, err)
		}
	}
	return nil
}
