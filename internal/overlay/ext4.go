package overlay

import (
	"bytes"
	"fmt"
	"os"

	"github.com/diskfs/go-diskfs/backend"
	"github.com/diskfs/go-diskfs/filesystem/ext4"

	"github.com/larder-project/larder/internal/disk"
)

// Images of different sizes differ as mke2fs.conf has it: small ones have small
// blocks; large ones have fewer inodes, for tables are most of what there is to
// write, and what is large holds weights.
const (
	smallImage      = 512 << 20
	largeImage      = 16 << 30
	largeInodeRatio = 64 << 10 // bytes for each inode
)

// formatExt4 makes an ext4 in a file of size bytes that is all zeros, with no
// program of the host: the managed plugin has none but itself. It takes about
// 10 s for a TiB, which mkfs.ext4 does not.
func formatExt4(f *disk.File, size int64) error {
	const sector = 512
	block := int64(4096)
	if size < smallImage {
		block = 1024
	}
	params := &ext4.Params{VolumeName: source, SectorsPerBlock: uint8(block / sector), Features: []ext4.FeatureOpt{
		ext4.WithFeatureDirectoryIndices(true), ext4.WithFeatureLargeSubdirectoryCount(true), ext4.WithFeatureLargeInodes(true),
	}}
	if size >= largeImage {
		params.InodeRatio = largeInodeRatio
	}
	// A group is as many blocks as a block has bits. A last one that is too
	// small for its own tables is left out, as mke2fs does.
	if rest := size % (8 * block * block); rest < block*block {
		size -= rest
	}
	size -= size % block
	if _, err := ext4.Create(zeroed{f}, size, 0, sector, params); err != nil {
		return fmt.Errorf("make ext4 in %s: %w", f.Name(), err)
	}
	return nil
}

// zeroed is a file that need not be told of zeros, and stays sparse.
type zeroed struct{ *disk.File }

// WriteAt implements io.WriterAt.
func (z zeroed) WriteAt(p []byte, off int64) (int, error) {
	if len(bytes.TrimLeft(p, "\x00")) == 0 {
		return len(p), nil
	}
	return z.File.WriteAt(p, off)
}

// Writable implements backend.Storage.
func (z zeroed) Writable() (backend.WritableFile, error) { return z, nil }

// Sys implements backend.Storage: there is no device below.
func (z zeroed) Sys() (*os.File, error) { return nil, backend.ErrNotSuitable }

// Path implements backend.Storage.
func (z zeroed) Path() string { return z.Name() }
