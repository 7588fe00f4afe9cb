package disk

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// AttachLoop makes a block device of an image file. The device frees itself
// when its last user (the returned file, or a mount) goes; so does one that a
// crash leaves behind. The caller closes the file after mounting its name.
func AttachLoop(image *File) (*os.File, error) {
	control, err := loopControl()
	if err != nil {
		return nil, err
	}
	defer control.Close()
	if err := step("losetup", image.Name()); err != nil {
		return nil, err
	}
	// Between the question for a free number and its use somebody else may
	// take it.
	for range 100 {
		n, err := unix.IoctlRetInt(int(control.Fd()), unix.LOOP_CTL_GET_FREE)
		if err != nil {
			return nil, &fs.PathError{Op: "get free loop device", Path: image.Name(), Err: err}
		}
		name := fmt.Sprintf("/dev/loop%d", n)
		if err := deviceNode(name, unix.S_IFBLK, unix.Mkdev(loopMajor, uint32(n))); err != nil {
			return nil, err
		}
		dev, err := os.OpenFile(name, os.O_RDWR, 0)
		if err != nil {
			return nil, err
		}
		err = configureLoop(int(dev.Fd()), int(image.Fd()))
		if err == nil {
			return dev, nil
		}
		_ = dev.Close()
		if !errors.Is(err, unix.EBUSY) {
			return nil, &fs.PathError{Op: "attach loop device", Path: image.Name(), Err: err}
		}
	}
	return nil, &fs.PathError{Op: "attach loop device", Path: image.Name(), Err: unix.EBUSY}
}

// Numbers of devices (Documentation/admin-guide/devices.txt of Linux).
const (
	loopMajor        = 7
	miscMajor        = 10
	loopControlMinor = 237
)

func loopControl() (*os.File, error) {
	const name = "/dev/loop-control"
	if err := deviceNode(name, unix.S_IFCHR, unix.Mkdev(miscMajor, loopControlMinor)); err != nil {
		return nil, fmt.Errorf("attach loop device: %w", err)
	}
	control, err := os.OpenFile(name, os.O_RDWR, 0)
	if errors.Is(err, unix.ENODEV) || errors.Is(err, unix.ENXIO) {
		return nil, fmt.Errorf("attach loop device: %w: load the kernel module loop (%w)", ErrNotSupported, err)
	}
	return control, err
}

// CheckLoop tells why no loop device can be had.
func CheckLoop() error {
	control, err := loopControl()
	if err != nil {
		return err
	}
	return control.Close()
}

// deviceNode makes the file of a device where it is missing: in the /dev of a
// managed plugin there are but a few.
func deviceNode(name string, kind uint32, device uint64) error {
	if _, err := os.Lstat(name); !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err := step("mknod", name); err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
		return err
	}
	if err := unix.Mknod(name, kind|0o600, int(device)); err != nil && !errors.Is(err, unix.EEXIST) {
		return &fs.PathError{Op: "mknod", Path: name, Err: err}
	}
	return nil
}

func configureLoop(dev, image int) error {
	info := unix.LoopInfo64{Flags: unix.LO_FLAGS_AUTOCLEAR}
	err := unix.IoctlLoopConfigure(dev, &unix.LoopConfig{Fd: uint32(image), Info: info})
	if !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOTTY) {
		return err
	}
	// Before Linux 5.8 it takes two calls.
	if err := unix.IoctlSetInt(dev, unix.LOOP_SET_FD, image); err != nil {
		return err
	}
	if err := unix.IoctlLoopSetStatus64(dev, &info); err != nil {
		_ = unix.IoctlSetInt(dev, unix.LOOP_CLR_FD, 0)
		return err
	}
	return nil
}
