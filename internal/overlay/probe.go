package overlay

import (
	"context"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"unsafe"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"

	"github.com/larder-project/larder/internal/atomicfile"
	"github.com/larder-project/larder/internal/disk"
	"github.com/larder-project/larder/internal/modelpack"
	"github.com/larder-project/larder/internal/view"
)

// Capability is one thing that a host can do, or not.
type Capability struct {
	OK     bool   `json:"ok"`
	Reason string `json:"reason,omitempty"` // how it was found, or why it does not work
	Advice string `json:"advice,omitempty"` // what a person may do about it
}

// Capabilities is what Probe found about a store and a state folder.
type Capabilities struct {
	Kernel string `json:"kernel"` // release, as uname gives it
	// Method is the best one that works. It is empty when none does; then
	// nothing can be mounted, and the reasons of all three say why.
	Method view.Method `json:"method"`

	DataOnly Capability `json:"data_only"`
	Lower    Capability `json:"lower"`
	HardLink Capability `json:"hard_link"`
	// Reflink: a write into a large file copies no data.
	Reflink Capability `json:"reflink"`
	// Quota, Tmpfs and Loop can bound what is written (Limit).
	Quota Capability `json:"quota"`
	Tmpfs Capability `json:"tmpfs"`
	Loop  Capability `json:"loop"`
}

// Names of what Probe makes, and removes again. A probe that was killed is
// cleaned up by the next one.
const (
	probeName = atomicfile.TempPrefix + "probe"
	probeLock = "probe.lock"
	probeLink = "store" // link to the folder beside the store's blobs
)

// Probe finds out what the host can do with a store whose blobs are in
// blobsDir and a state folder, by doing it: it builds small views of a file of
// its own beside blobsDir, mounts them below stateDir, reads, writes, and
// takes all away again. It takes up to a second, nearly all of it for a loop
// image; ProbeMethods is for those who want no more than a method.
//
// What does not work is in the result, not an error. An error means that the
// probe itself could not be made (a folder that cannot be written, a lock not
// had before ctx ended) or not be cleaned up.
func Probe(ctx context.Context, blobsDir, stateDir string) (Capabilities, error) {
	return probe(ctx, blobsDir, stateDir, true)
}

// ProbeMethods is Probe without Quota, Tmpfs and Loop, in some milliseconds.
func ProbeMethods(ctx context.Context, blobsDir, stateDir string) (Capabilities, error) {
	return probe(ctx, blobsDir, stateDir, false)
}

func probe(ctx context.Context, blobsDir, stateDir string, limits bool) (c Capabilities, err error) {
	unlock, err := lockFile(ctx, filepath.Join(stateDir, probeLock))
	if err != nil {
		return c, fmt.Errorf("probe the host: %w", err)
	}
	defer unlock()
	p := prober{dir: filepath.Join(stateDir, probeName), state: stateDir}
	if err := p.sweep(); err != nil {
		return c, fmt.Errorf("probe the host: clean up after an earlier probe: %w", err)
	}
	defer func() {
		if e := p.sweep(); e != nil {
			err = errors.Join(err, fmt.Errorf("probe the host: clean up: %w", e))
		}
	}()
	if err := p.prepare(blobsDir); err != nil {
		return c, fmt.Errorf("probe the host: %w", err)
	}
	var uts unix.Utsname
	if err := unix.Uname(&uts); err != nil {
		return c, fmt.Errorf("probe the host: %w", err)
	}
	c.Kernel = unix.ByteSliceToString(uts.Release[:])
	for _, m := range []struct {
		method view.Method
		into   *Capability
	}{{view.DataOnly, &c.DataOnly}, {view.Lower, &c.Lower}, {view.HardLink, &c.HardLink}} {
		*m.into = p.method(ctx, m.method, c.Kernel)
		if m.into.OK && c.Method == "" {
			c.Method = m.method
		}
	}
	if c.Method == "" {
		none := Capability{Reason: "no view can be mounted"}
		c.Reflink, c.Quota, c.Tmpfs, c.Loop = none, none, none, none
		return c, nil
	}
	c.Reflink = p.reflink(ctx, c.Method)
	if !limits {
		return c, ctx.Err()
	}
	c.Quota = p.limit(ctx, c.Method, Quota, MinBytes)
	c.Tmpfs = p.limit(ctx, c.Method, Tmpfs, MinBytes)
	c.Loop = p.limit(ctx, c.Method, Loop, MinLoopBytes)
	return c, ctx.Err()
}

type prober struct {
	dir   string // below the state folder
	state string
	blobs string // beside the store's own
	model view.Model
	data  []byte
}

// probeSize is large enough for no file system to keep it inside an inode.
const probeSize = 128 << 10

// prepare makes a blob where the store's are, but not among them.
func (p *prober) prepare(blobsDir string) error {
	if err := disk.Mkdir(p.dir, 0o700); err != nil {
		return err
	}
	store := filepath.Join(filepath.Dir(blobsDir), probeName+"-"+rand.Text())
	// The link comes first: by it the next probe finds the folder.
	if err := disk.Symlink(store, filepath.Join(p.dir, probeLink)); err != nil {
		return err
	}
	p.blobs = filepath.Join(store, "blobs")
	for _, dir := range []string{store, p.blobs, filepath.Join(p.blobs, "sha256")} {
		if err := disk.Mkdir(dir, 0o700); err != nil {
			return err
		}
	}
	p.data = make([]byte, probeSize)
	_, _ = rand.Read(p.data)
	d := digest.FromBytes(p.data)
	f, err := disk.Create(filepath.Join(p.blobs, "sha256", d.Encoded()), 0o444)
	if err != nil {
		return err
	}
	_, err = f.Write(p.data)
	if err := errors.Join(err, f.Close()); err != nil {
		return err
	}
	p.model = view.Model{Repo: "probe", Digest: d, Pack: modelpack.Model{Files: []modelpack.File{{Path: "f", Digest: d, Size: probeSize}}}}
	return nil
}

// sweep takes away all that a probe makes, whether it was this one or not.
func (p *prober) sweep() error {
	entries, err := os.ReadDir(p.dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	for _, e := range entries {
		if !e.IsDir() {
			continue
		}
		if err := unmountAll(filepath.Join(p.dir, e.Name(), "target")); err != nil {
			return err
		}
		if err := RemoveUpper(filepath.Join(p.dir, e.Name(), "upper")); err != nil {
			return err
		}
	}
	store, err := os.Readlink(filepath.Join(p.dir, probeLink))
	if err == nil && strings.HasPrefix(filepath.Base(store), probeName) {
		err = disk.RemoveTree(store)
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return disk.RemoveTree(p.dir)
}

// unmountAll takes away every mount at a place of the prober's own. One that
// cannot go at once is detached: nothing but a scanner of files can hold it.
func unmountAll(target string) error {
	for {
		mounted, err := IsMounted(target)
		if err != nil || !mounted {
			return err
		}
		if err := Unmount(target); errors.Is(err, ErrBusy) {
			err = disk.Unmount(target, true)
			if err != nil {
				return err
			}
		} else if err != nil && !errors.Is(err, ErrNotMounted) {
			return err
		}
	}
}

// try mounts a view of the blob and lets check look at it.
func (p *prober) try(ctx context.Context, name string, method view.Method, limit Limit, check func(m Mount) error) (err error) {
	dir := filepath.Join(p.dir, name)
	target := filepath.Join(dir, "target")
	for _, d := range []string{dir, target} {
		if err := disk.Mkdir(d, 0o700); err != nil {
			return err
		}
	}
	spec := view.Spec{Layout: view.Files, Models: []view.Model{p.model}}
	if method != view.HardLink {
		uid, mode := uint32(12345), fs.FileMode(0o640)
		spec.UID, spec.Mode = &uid, &mode
	}
	tree, err := view.Plan(spec)
	if err != nil {
		return err
	}
	viewDir := filepath.Join(dir, "view")
	if err := view.Build(ctx, viewDir, tree, method, p.blobs); err != nil {
		return err
	}
	u, err := NewUpper(ctx, filepath.Join(dir, "upper"), viewDir, p.state, limit)
	if err != nil {
		return err
	}
	defer func() {
		err = errors.Join(err, unmountAll(target), RemoveUpper(u.Dir))
	}()
	m := Mount{Target: target, View: viewDir, Blobs: p.blobs, Upper: u.Upper, Work: u.Work, Method: method}
	if err := m.Do(); err != nil {
		return err
	}
	return check(m)
}

func (p *prober) method(ctx context.Context, method view.Method, kernel string) Capability {
	err := p.try(ctx, string(method), method, Limit{}, func(m Mount) error {
		name := filepath.Join(m.Target, "f")
		got, err := os.ReadFile(name)
		if err != nil {
			return err
		}
		if !slices.Equal(got, p.data) {
			return errors.New("a file reads as other bytes than those of its blob")
		}
		entries, err := os.ReadDir(m.Target)
		if err != nil {
			return err
		}
		if len(entries) != 1 {
			return errors.New("the blobs' folder is to be seen in the view")
		}
		if method == view.HardLink {
			return nil
		}
		fi, err := os.Lstat(name)
		if err != nil {
			return err
		}
		if fi.Mode().Perm() != 0o640 {
			return fmt.Errorf("a file shows the mode %#o instead of the view's", fi.Mode().Perm())
		}
		if err := disk.Chmod(name, 0o600); err != nil {
			return err
		}
		fi, err = os.Lstat(filepath.Join(m.Upper, "f"))
		if err != nil {
			return err
		}
		if allocated(fi) >= probeSize {
			return errors.New("a change of mode copies the file's data")
		}
		return nil
	})
	if err == nil {
		return Capability{OK: true, Reason: "a view was mounted, read and changed"}
	}
	return Capability{Reason: err.Error(), Advice: methodAdvice(method, kernel, err)}
}

func methodAdvice(method view.Method, kernel string, err error) string {
	switch {
	case errors.Is(err, unix.EPERM) || errors.Is(err, unix.EACCES):
		return "run as root with CAP_SYS_ADMIN; in a container, as a privileged one"
	case errors.Is(err, disk.ErrNotSupported):
		return "put the state folder on a file system with extended attributes (ext4, XFS, btrfs)"
	case errors.Is(err, unix.EXDEV):
		return "put store and state on one file system, under one mount"
	case errors.Is(err, unix.ENODEV):
		return "load the kernel module: modprobe overlay"
	case method == view.DataOnly && !atLeast(kernel, 6, 5):
		return "Linux 6.5 or newer has it; on this kernel the method " + string(view.Lower) + " does the same"
	case method == view.Lower && !atLeast(kernel, 4, 19):
		return "Linux 4.19 or newer has it"
	case errors.Is(err, unix.EINVAL):
		return "the kernel log says why (dmesg | grep overlayfs); a state folder on an overlay itself, such as a container's own file system, cannot hold what is written: put it on a volume"
	}
	return "the kernel log may say more: dmesg | grep overlayfs"
}

// atLeast compares the first two numbers of a kernel's release. One that
// cannot be read counts as new.
func atLeast(release string, major, minor int) bool {
	var a, b int
	if n, _ := fmt.Sscanf(release, "%d.%d", &a, &b); n != 2 {
		return true
	}
	return a > major || a == major && b >= minor
}

func (p *prober) reflink(ctx context.Context, method view.Method) Capability {
	var shared bool
	err := p.try(ctx, "reflink", method, Limit{}, func(m Mount) error {
		f, err := disk.OpenFile(filepath.Join(m.Target, "f"), os.O_WRONLY, 0)
		if err != nil {
			return err
		}
		_, err = f.WriteAt([]byte{0}, probeSize/2)
		if err := errors.Join(err, f.Close()); err != nil {
			return err
		}
		shared, err = sharesBlocks(filepath.Join(m.Upper, "f"))
		return err
	})
	const advice = "put store and state on one XFS or btrfs: the first write into a large file then takes no time and no space"
	switch {
	case err != nil:
		return Capability{Reason: err.Error(), Advice: advice}
	case !shared:
		return Capability{Reason: "the first write into a file copies it whole", Advice: advice}
	}
	return Capability{OK: true, Reason: "the first write into a file shares its blocks with the store"}
}

// sharesBlocks asks the file system whether any extent of a file belongs to
// another one too (linux/fiemap.h).
func sharesBlocks(path string) (bool, error) {
	f, err := os.Open(path)
	if err != nil {
		return false, err
	}
	defer f.Close()
	const (
		fsIocFiemap  = 0xc020660b
		flagSync     = 1
		extentShared = 0x2000
		extents      = 32
		header       = 32
		extent       = 56
	)
	var buf [header + extents*extent]byte
	binary.NativeEndian.PutUint64(buf[8:], ^uint64(0)) // length: to the end
	binary.NativeEndian.PutUint32(buf[16:], flagSync)
	binary.NativeEndian.PutUint32(buf[24:], extents)
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), fsIocFiemap, uintptr(unsafe.Pointer(&buf[0]))); errno != 0 {
		if errno == unix.EOPNOTSUPP || errno == unix.ENOTTY {
			return false, nil // such as tmpfs, which shares nothing
		}
		return false, &fs.PathError{Op: "fiemap", Path: path, Err: errno}
	}
	mapped := min(binary.NativeEndian.Uint32(buf[20:]), extents)
	for i := range int(mapped) {
		if binary.NativeEndian.Uint32(buf[header+i*extent+40:])&extentShared != 0 {
			return true, nil
		}
	}
	return false, nil
}

func (p *prober) limit(ctx context.Context, method view.Method, backend Backend, bytes int64) Capability {
	err := p.try(ctx, string(backend), method, Limit{Bytes: bytes, Backend: backend}, func(m Mount) error {
		f, err := disk.Create(filepath.Join(m.Target, "fill"), 0o600)
		if err != nil {
			return err
		}
		chunk := make([]byte, 1<<20)
		for range bytes/int64(len(chunk)) + 1 {
			if _, err = f.Write(chunk); err != nil {
				break
			}
		}
		_ = f.Close()
		switch {
		case errors.Is(err, unix.ENOSPC), errors.Is(err, unix.EDQUOT):
			return nil
		case err == nil:
			return errors.New("more could be written than the limit allows")
		}
		return err
	})
	if err == nil {
		return Capability{OK: true, Reason: "a write beyond the limit was refused"}
	}
	c := Capability{Reason: err.Error()}
	switch backend {
	case Quota:
		if errors.Is(err, ErrLimit) {
			c.Reason = "the file system of the state folder has no project quotas, or they are switched off"
		}
		c.Advice = quotaAdvice
	case Loop:
		c.Advice = "install e2fsprogs, load the kernel module loop, and let Larder see /dev/loop-control"
	case Tmpfs:
		c.Advice = "run as root with CAP_SYS_ADMIN"
	}
	return c
}
