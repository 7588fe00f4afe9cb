package engine

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path"
	"strings"
)

// LoadImage gives the engine Image: a root of one static busybox. Where the
// image has /models, copy-up of its files would be a Mount and an Unmount of
// their own, so it has none; /stale has one for tests of just that.
func (e *Engine) LoadImage(ctx context.Context) error {
	root, err := busyboxRoot()
	if err != nil {
		return fmt.Errorf("make the test image: %w", err)
	}
	if _, err := e.DockerInput(ctx, root, "import", "-", Image); err != nil {
		return fmt.Errorf("load the test image: %w", err)
	}
	return nil
}

// busyboxRoot is a tar archive of a root file system.
func busyboxRoot() ([]byte, error) {
	program, err := exec.LookPath("busybox")
	if err != nil {
		return nil, fmt.Errorf("%w (run test/setup.sh)", err)
	}
	binary, err := os.ReadFile(program)
	if err != nil {
		return nil, err
	}
	applets, err := exec.Command(program, "--list").Output()
	if err != nil {
		return nil, fmt.Errorf("ask busybox for its applets: %w", err)
	}
	var out bytes.Buffer
	w := tar.NewWriter(&out)
	add := func(h tar.Header, content []byte) {
		h.Size = int64(len(content))
		err = errors.Join(err, w.WriteHeader(&h))
		_, e := w.Write(content)
		err = errors.Join(err, e)
	}
	// Modes are written down: containers of other users need / and /tmp.
	for _, dir := range []struct {
		name string
		mode int64
	}{{"./", 0o755}, {"bin/", 0o755}, {"etc/", 0o755}, {"dev/", 0o755}, {"proc/", 0o755}, {"sys/", 0o755}, {"stale/", 0o755}, {"tmp/", 0o1777}} {
		add(tar.Header{Typeflag: tar.TypeDir, Name: dir.name, Mode: dir.mode}, nil)
	}
	add(tar.Header{Typeflag: tar.TypeReg, Name: "bin/busybox", Mode: 0o755}, binary)
	for _, applet := range strings.Fields(string(applets)) {
		if applet != "busybox" {
			add(tar.Header{Typeflag: tar.TypeSymlink, Name: path.Join("bin", applet), Linkname: "busybox", Mode: 0o777}, nil)
		}
	}
	add(tar.Header{Typeflag: tar.TypeReg, Name: "etc/passwd", Mode: 0o644}, []byte("root:x:0:0:root:/:/bin/sh\n"))
	add(tar.Header{Typeflag: tar.TypeReg, Name: "stale/of-the-image", Mode: 0o644}, []byte("of the image\n"))
	if e := w.Close(); e != nil {
		err = errors.Join(err, e)
	}
	return out.Bytes(), err
}
