package overlay

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/larder-project/larder/internal/atomicfile"
	"github.com/larder-project/larder/internal/disk"
)

// mountImage mounts the image of dir at dir/fs, unless it is mounted. A
// missing image is made under a temporary name, so that one with its name has
// a file system.
func mountImage(ctx context.Context, dir string, bytes int64) (string, error) {
	inside, mounted, err := inner(dir)
	if err != nil || mounted {
		return inside, err
	}
	image := filepath.Join(dir, imageName)
	if _, err := os.Lstat(image); errors.Is(err, fs.ErrNotExist) {
		if err := makeImage(ctx, image, bytes); err != nil {
			return "", err
		}
	} else if err != nil {
		return "", err
	}
	f, err := disk.OpenFile(image, os.O_RDWR, 0)
	if err != nil {
		return "", err
	}
	defer f.Close()
	dev, err := disk.AttachLoop(f)
	if err != nil {
		return "", err
	}
	defer dev.Close()
	// discard: what a container deletes becomes a hole in the image.
	if err := disk.Mount(dev.Name(), inside, "ext4", unix.MS_NOSUID|unix.MS_NODEV, "discard"); err != nil {
		return "", err
	}
	return inside, nil
}

// Reattach mounts the inside of an upper that a reboot has unmounted, as far as
// it outlives one: a loop image.
func Reattach(ctx context.Context, dir string) error {
	if _, err := os.Lstat(filepath.Join(dir, imageName)); errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if _, err := mountImage(ctx, dir, 0); err != nil {
		return fmt.Errorf("mount upper %s: %w", dir, err)
	}
	return nil
}

// makeImage makes a sparse file with an empty ext4 in it. The image is made
// durable before it gets its name: a torn one could not be told from one that
// a container's files are in.
func makeImage(ctx context.Context, image string, size int64) error {
	temp := filepath.Join(filepath.Dir(image), atomicfile.TempPrefix+imageName)
	if err := disk.Remove(temp); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	f, err := disk.Create(temp, 0o600)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := f.Truncate(size); err != nil {
		return err
	}
	if mkfs := findMkfs(); mkfs != "" {
		err = runMkfs(ctx, mkfs, temp)
	} else {
		err = formatExt4(f, size)
	}
	if err != nil {
		return err
	}
	if err := f.Sync(); err != nil {
		return err
	}
	if err := disk.Rename(temp, image); err != nil {
		return err
	}
	return disk.SyncDir(filepath.Dir(image))
}

func runMkfs(ctx context.Context, mkfs, image string) error {
	// No blocks are kept for root: overlay writes as root for every container.
	// root_owner and lost+found do not matter, as upper and work lie below.
	cmd := exec.CommandContext(ctx, mkfs, "-q", "-F", "-m", "0", "-E", "lazy_itable_init=1,lazy_journal_init=1,nodiscard", image)
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("%s of %s: %w: %s", mkfs, image, err, bytes.TrimSpace(out.Bytes()))
	}
	return nil
}

// checkLoop tells why this host cannot keep a limit by a loop image.
func checkLoop(limit Limit) error {
	if err := disk.CheckLoop(); err != nil {
		return fmt.Errorf("%w: %s, and a loop image cannot be had: %w", ErrLimit, whyLoop(limit), err)
	}
	return nil
}

// mkfsNames also says where the program is: services often run with a PATH that
// lacks the sbin folders.
var mkfsNames = []string{"mkfs.ext4", "/usr/sbin/mkfs.ext4", "/sbin/mkfs.ext4"}

// findMkfs gives the host's mkfs.ext4, or nothing where it has none.
func findMkfs() string {
	for _, name := range mkfsNames {
		if path, err := exec.LookPath(name); err == nil {
			return path
		}
	}
	return ""
}
