package disk

import (
	"errors"
	"fmt"
	"io/fs"
	"os"

	"golang.org/x/sys/unix"
)

// AttachLoop makes a block device of an image file. The device frees itself
// when its last user (the returned file, or a mount) goes; so does one that a
// crash leaves behind. The caller closes the file after mounting its name.
func AttachLoop(image *File) (*os.File, error) {
	control, err := os.OpenFile("/dev/loop-control", os.O_RDWR, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("attach loop device: %w: load the kernel module loop (%w)", ErrNotSupported, err)
	}
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
		dev, err := os.OpenFile(fmt.Sprintf("/dev/loop%d", n), os.O_RDWR, 0)
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
