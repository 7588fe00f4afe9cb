package main

import (
	"context"
	"crypto/aes"
	"crypto/cipher"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// host is the run's folder and what was made on the machine for the run, to be
// undone in reverse.
type host struct {
	dir  string
	undo []func() error
}

func newHost(parent string) (*host, error) {
	dir, err := os.MkdirTemp(parent, "larder-bench.")
	if err != nil {
		return nil, fmt.Errorf("make the run's folder: %w", err)
	}
	h := &host{dir: dir}
	h.later(func() error { return os.RemoveAll(dir) })
	return h, os.Chmod(dir, 0o755)
}

func (h *host) later(f func() error) { h.undo = append(h.undo, f) }

// mark is a point to go back to by backTo.
func (h *host) mark() int { return len(h.undo) }

func (h *host) backTo(mark int) error {
	var failed []error
	for len(h.undo) > mark {
		last := len(h.undo) - 1
		failed = append(failed, h.undo[last]())
		h.undo = h.undo[:last]
	}
	return errors.Join(failed...)
}

func (h *host) close() error { return h.backTo(0) }

// command runs a program and gives what it printed.
func command(ctx context.Context, name string, args ...string) (string, error) {
	out, err := exec.CommandContext(ctx, name, args...).CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("%s %s: %w: %s", name, strings.Join(args, " "), err, strings.TrimSpace(string(out)))
	}
	return strings.TrimSpace(string(out)), nil
}

// fileSystem makes a file system of its own on a loop device and mounts it.
// The loop device goes past the page cache of the file below it, so that what
// is cached is cached once, and what is synced is on the disk.
func (h *host) fileSystem(ctx context.Context, kind string, bytes int64) (string, error) {
	mkfs := map[string][]string{
		"xfs":  {"mkfs.xfs", "-q", "-m", "reflink=1"},
		"ext4": {"mkfs.ext4", "-q", "-F", "-E", "lazy_itable_init=0,lazy_journal_init=0"},
	}[kind]
	image, err := os.CreateTemp(h.dir, kind+".*.img")
	if err != nil {
		return "", err
	}
	defer image.Close()
	h.later(func() error { return os.Remove(image.Name()) })
	if err := image.Truncate(bytes); err != nil {
		return "", err
	}
	if _, err := command(ctx, mkfs[0], append(mkfs[1:], image.Name())...); err != nil {
		return "", err
	}
	device, err := command(ctx, "losetup", "--direct-io=on", "--find", "--show", image.Name())
	if err != nil {
		return "", err
	}
	h.later(func() error {
		_, err := command(context.WithoutCancel(ctx), "losetup", "--detach", device)
		return err
	})
	target := strings.TrimSuffix(image.Name(), ".img")
	if err := os.Mkdir(target, 0o755); err != nil {
		return "", err
	}
	if err := unix.Mount(device, target, kind, 0, ""); err != nil {
		return "", fmt.Errorf("mount %s on %s: %w", device, target, err)
	}
	h.later(func() error { return unmountAll(target) })
	return target, nil
}

// unmountAll unmounts what is mounted at dir and below it, the last first.
func unmountAll(dir string) error {
	var failed []error
	for _, m := range slices.Backward(mountsBelow(dir)) {
		err := unix.Unmount(m, unix.UMOUNT_NOFOLLOW)
		for wait := 0; errors.Is(err, unix.EBUSY) && wait < 50; wait++ {
			time.Sleep(100 * time.Millisecond)
			err = unix.Unmount(m, unix.UMOUNT_NOFOLLOW)
		}
		if err != nil {
			failed = append(failed, fmt.Errorf("unmount %s: %w", m, err))
			_ = unix.Unmount(m, unix.MNT_DETACH)
		}
	}
	return errors.Join(failed...)
}

func mountsBelow(dir string) []string {
	data, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return nil
	}
	var found []string
	for _, l := range strings.Split(string(data), "\n") {
		fields := strings.Fields(l)
		if len(fields) < 6 {
			continue
		}
		target := unescape(fields[4])
		if target == dir || strings.HasPrefix(target, dir+"/") {
			found = append(found, target)
		}
	}
	return found
}

// unescape undoes the octal escapes of mountinfo.
func unescape(s string) string {
	for _, c := range []struct{ from, to string }{{`\040`, " "}, {`\011`, "\t"}, {`\012`, "\n"}, {`\134`, `\`}} {
		s = strings.ReplaceAll(s, c.from, c.to)
	}
	return s
}

// used is what a file system has given out, in bytes, all written.
func used(dir string) (int64, error) {
	d, err := os.Open(dir)
	if err != nil {
		return 0, err
	}
	defer d.Close()
	if err := unix.Syncfs(int(d.Fd())); err != nil {
		return 0, fmt.Errorf("sync %s: %w", dir, err)
	}
	var st unix.Statfs_t
	if err := unix.Fstatfs(int(d.Fd()), &st); err != nil {
		return 0, fmt.Errorf("ask for the space of %s: %w", dir, err)
	}
	return int64(st.Blocks-st.Bfree) * st.Bsize, nil
}

// dropCaches writes what is dirty and empties the page cache.
func dropCaches() error {
	unix.Sync()
	return os.WriteFile("/proc/sys/vm/drop_caches", []byte("3\n"), 0)
}

// resident is how much of a file the page cache holds, in bytes (mincore).
func resident(path string) (int64, error) {
	f, err := os.Open(path)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	fi, err := f.Stat()
	if err != nil {
		return 0, err
	}
	mem, err := unix.Mmap(int(f.Fd()), 0, int(fi.Size()), unix.PROT_READ, unix.MAP_SHARED)
	if err != nil {
		return 0, fmt.Errorf("map %s: %w", path, err)
	}
	defer unix.Munmap(mem)
	page := os.Getpagesize()
	pages := make([]byte, (len(mem)+page-1)/page)
	if err := mincore(mem, pages); err != nil {
		return 0, fmt.Errorf("ask what is cached of %s: %w", path, err)
	}
	var n int64
	for _, p := range pages {
		n += int64(p & 1)
	}
	return n * int64(page), nil
}

// writeRandom makes a file of bytes that nothing compresses or shares. The same
// seed gives the same bytes.
func writeRandom(path string, bytes int64, seed uint64) error {
	key := make([]byte, 16)
	binary.LittleEndian.PutUint64(key, seed)
	block, err := aes.NewCipher(key)
	if err != nil {
		return err
	}
	stream := cipher.NewCTR(block, make([]byte, aes.BlockSize))
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	defer f.Close()
	buf := make([]byte, mib)
	for left := bytes; left > 0; {
		p := buf[:min(left, int64(len(buf)))]
		clear(p)
		stream.XORKeyStream(p, p)
		n, err := f.Write(p)
		if err != nil {
			return err
		}
		left -= int64(n)
	}
	return f.Close()
}

// modelFolder makes a folder as a model's repository has it: one file of
// weights and small files up to count in all.
func modelFolder(dir string, weights int64, count int, seed uint64) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	if err := writeRandom(filepath.Join(dir, "model.safetensors"), weights, seed); err != nil {
		return err
	}
	for i := 1; i < count; i++ {
		name := "config.json"
		if i > 1 {
			name = fmt.Sprintf("part-%04d.json", i)
		}
		text := fmt.Sprintf("{\"model\": %d, \"file\": %d}\n", seed, i)
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644); err != nil {
			return err
		}
	}
	return nil
}

// outcome is how a program ran.
type outcome struct {
	took time.Duration
	peak int64 // of its memory, bytes
	out  string
}

// timed runs a program to its end. The peak is the kernel's ru_maxrss. It
// begins at this process's own peak, as the memory of the parent counts until
// exec: so this program keeps its own small.
func timed(cmd *exec.Cmd) (outcome, error) {
	var out strings.Builder
	cmd.Stdout, cmd.Stderr = &out, &out
	began := time.Now()
	err := cmd.Run()
	o := outcome{took: time.Since(began), out: out.String()}
	if err != nil {
		return o, fmt.Errorf("%s: %w: %s", strings.Join(cmd.Args, " "), err, strings.TrimSpace(o.out))
	}
	if ru, ok := cmd.ProcessState.SysUsage().(*syscall.Rusage); ok {
		o.peak = ru.Maxrss * kib
	}
	return o, nil
}

func thisMachine() machine {
	var name unix.Utsname
	kernel := "unknown"
	if unix.Uname(&name) == nil {
		kernel = unix.ByteSliceToString(name.Release[:])
	}
	var info unix.Sysinfo_t
	var memory int64
	if unix.Sysinfo(&info) == nil {
		memory = int64(info.Totalram) * int64(info.Unit)
	}
	return machine{Processor: line("/proc/cpuinfo", "model name"), Cores: runtime.NumCPU(), Memory: memory, Kernel: kernel}
}
