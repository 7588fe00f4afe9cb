package testenv

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// FS is a file system of a test's own.
type FS struct {
	Dir   string // where it is mounted
	Image string // the file that holds it; empty for tmpfs

	t       testing.TB
	fstype  string
	options string
}

// LoopFS makes a file system of size bytes in a sparse file, mounts it on a
// loop device with the options given, and takes both away when the test ends.
// fstype is ext4, xfs, btrfs or tmpfs (which has no image). With the option
// prjquota the file system is made with project quotas.
//
// mkfs.xfs wants 300 MiB at least, mkfs.btrfs 110 MiB.
func LoopFS(t testing.TB, fstype string, size int64, options ...string) *FS {
	t.Helper()
	NeedRoot(t)
	temp := t.TempDir()
	// Tests look at the file system as other users too.
	for _, dir := range []string{temp, filepath.Dir(temp)} {
		if err := os.Chmod(dir, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	fs := &FS{Dir: filepath.Join(temp, fstype), t: t, fstype: fstype, options: strings.Join(options, ",")}
	if err := os.Mkdir(fs.Dir, 0o755); err != nil {
		t.Fatal(err)
	}
	if fstype != "tmpfs" {
		NeedPrograms(t, "mkfs."+fstype, "losetup", "mount", "umount")
		fs.Image = filepath.Join(t.TempDir(), fstype+".img")
		fs.make(size)
	}
	// A file system that stays mounted would make the removal of the test's
	// folder delete what is in it, so the test fails loudly instead.
	t.Cleanup(func() { fs.Unmount() })
	fs.Mount()
	return fs
}

func (fs *FS) make(size int64) {
	fs.t.Helper()
	f, err := os.Create(fs.Image)
	if err != nil {
		fs.t.Fatal(err)
	}
	if err := f.Truncate(size); err != nil {
		fs.t.Fatal(err)
	}
	if err := f.Close(); err != nil {
		fs.t.Fatal(err)
	}
	args := map[string][]string{
		"ext4":  {"-q", "-F", "-E", "lazy_itable_init=1,lazy_journal_init=1,nodiscard"},
		"xfs":   {"-q", "-f", "-K"},
		"btrfs": {"-q", "-f", "-K"},
	}[fs.fstype]
	if fs.fstype == "ext4" && strings.Contains(fs.options, "prjquota") {
		args = append(args, "-O", "project,quota", "-E", "quotatype=prjquota,lazy_itable_init=1,lazy_journal_init=1,nodiscard")
	}
	run(fs.t, "mkfs."+fs.fstype, append(args, fs.Image)...)
}

// Mount mounts the file system again, after Unmount.
func (fs *FS) Mount() {
	fs.t.Helper()
	if fs.fstype == "tmpfs" {
		run(fs.t, "mount", "-t", "tmpfs", "-o", "size=1g,"+fs.options, "tmpfs", fs.Dir)
		return
	}
	options := "loop"
	if fs.options != "" {
		options += "," + fs.options
	}
	cmd := exec.Command("mount", "-t", fs.fstype, "-o", options, fs.Image, fs.Dir)
	out, err := cmd.CombinedOutput()
	if err == nil {
		return
	}
	if strings.Contains(fs.options, "prjquota") && !fs.quotas() {
		// No test can bring such a kernel to have quotas, so this is not a gap
		// that CI could close here; it runs these tests on another kernel.
		fs.t.Skipf("this kernel has %s without project quotas", fs.fstype)
	}
	fs.t.Fatalf("%v: %v\n%s", cmd.Args, err, out)
}

// quotas tells whether the kernel knows project quotas on this kind of file
// system at all, after a mount with them failed.
func (fs *FS) quotas() bool {
	switch fs.fstype {
	case "xfs":
		_, err := os.Stat("/proc/fs/xfs/xqmstat") // is there with CONFIG_XFS_QUOTA
		return err == nil
	case "ext4":
		// Without CONFIG_QFMT_V2 an ext4 with the quota feature can be read,
		// but not written.
		return exec.Command("mount", "-t", "ext4", "-o", "loop,ro", fs.Image, fs.Dir).Run() != nil
	}
	return true
}

// Unmount unmounts the file system, as a shutdown in good order does, unless
// it is unmounted already.
func (fs *FS) Unmount() {
	fs.t.Helper()
	var out []byte
	for range 50 {
		if !fs.mounted() {
			return
		}
		var err error
		if out, err = exec.Command("umount", fs.Dir).CombinedOutput(); err == nil {
			continue
		}
		time.Sleep(100 * time.Millisecond)
	}
	fs.t.Fatalf("umount %s: %s", fs.Dir, out)
}

// mounted asks the kernel's table: after a power cut was played (shutdown) the
// mount point itself answers nothing but EIO.
func (fs *FS) mounted() bool {
	fs.t.Helper()
	table, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		fs.t.Fatal(err)
	}
	for line := range strings.Lines(string(table)) {
		if fields := strings.Fields(line); len(fields) > 4 && fields[4] == fs.Dir {
			return true
		}
	}
	return false
}

func run(t testing.TB, name string, args ...string) {
	t.Helper()
	if out, err := exec.Command(name, args...).CombinedOutput(); err != nil {
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
}
