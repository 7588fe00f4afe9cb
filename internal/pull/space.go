package pull

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/larder-project/larder/internal/store"
)

// Room for manifests, folders and what the file system needs beside the files.
const spareBytes = 8 << 20

// checkSpace refuses what cannot fit, before the first byte is fetched.
func (r *run) checkSpace(missing []*item) error {
	var need int64
	for _, it := range missing {
		need += it.want.Size - r.partial(it)
	}
	var fs unix.Statfs_t
	if err := unix.Statfs(r.st.Dir(), &fs); err != nil {
		return fmt.Errorf("look up free space in %s: %w", r.st.Dir(), err)
	}
	free := int64(fs.Bavail) * fs.Bsize
	if need += spareBytes; need <= free {
		return nil
	}
	return fmt.Errorf("%w: %s more is needed in %s, %s is free; remove models with larder rm, or choose a larger place with --root",
		store.ErrFull, bytesText(need), r.st.Dir(), bytesText(free))
}

// partial is how many bytes of an item already have their blocks.
func (r *run) partial(it *item) int64 {
	fi, err := os.Lstat(filepath.Join(r.st.Dir(), "ingest", it.key()))
	if err != nil || !fi.Mode().IsRegular() || it.want.Size <= largeFile {
		return 0
	}
	st, ok := fi.Sys().(*syscall.Stat_t)
	if !ok {
		return 0
	}
	return min(it.want.Size, st.Blocks*512)
}

func bytesText(n int64) string {
	const unit = 1024
	if n < unit {
		return fmt.Sprintf("%d B", n)
	}
	v, i := float64(n)/unit, 0
	for ; v >= unit && i < 4; i++ {
		v /= unit
	}
	return fmt.Sprintf("%.1f %ciB", v, "KMGTP"[i])
}

// full adds store.ErrFull to the kernel's ways of saying that there is no room.
func full(err error) error {
	if errors.Is(err, store.ErrFull) || !errors.Is(err, unix.ENOSPC) && !errors.Is(err, unix.EDQUOT) {
		return err
	}
	return fmt.Errorf("%w: %w", store.ErrFull, err)
}
