package pull

import (
	"context"
	"errors"
	"io"

	"github.com/larder-project/larder/internal/disk"
)

const (
	// What is hashed at once stays in the processor's cache.
	hashBuffer = 256 << 10
	// What is copied at once, and how much may wait for the hasher.
	copyBuffer  = 1 << 20
	copyBuffers = 4
	// The disk is asked to begin writing after this much.
	writebackEvery = 16 << 20
)

// hashFile hashes size bytes of a file. each is called after each step with
// its number of bytes, and may stop the work.
func hashFile(ctx context.Context, f io.ReaderAt, size int64, s *sums, each func(int64) error) error {
	buf := make([]byte, min(hashBuffer, size))
	for off := int64(0); off < size; {
		if err := ctx.Err(); err != nil {
			return err
		}
		p := buf[:min(int64(len(buf)), size-off)]
		if n, err := f.ReadAt(p, off); n < len(p) {
			return shortRead(err)
		}
		_, _ = s.Write(p)
		off += int64(len(p))
		if each != nil {
			if err := each(int64(len(p))); err != nil {
				return err
			}
		}
	}
	return nil
}

func shortRead(err error) error {
	if err == nil || errors.Is(err, io.EOF) {
		return io.ErrUnexpectedEOF
	}
	return err
}

// copyFile copies size bytes while another goroutine hashes them: reading and
// writing keep one processor busy, hashing another. The disk begins to write
// early, so that the fsync at the end finds little left.
func copyFile(ctx context.Context, from io.ReaderAt, to *disk.File, size int64, s *sums, progress func(int64)) error {
	if size <= copyBuffer {
		return copySmall(from, to, size, s, progress)
	}
	free := make(chan []byte, copyBuffers)
	for range copyBuffers {
		free <- make([]byte, copyBuffer)
	}
	full := make(chan []byte, copyBuffers)
	hashed := make(chan struct{})
	go func() {
		defer close(hashed)
		for p := range full {
			_, _ = s.Write(p)
			free <- p[:copyBuffer]
		}
	}()
	err := func() error {
		var begun int64
		for off := int64(0); off < size; {
			if err := ctx.Err(); err != nil {
				return err
			}
			p := (<-free)[:min(copyBuffer, size-off)]
			if n, err := from.ReadAt(p, off); n < len(p) {
				return shortRead(err)
			}
			if _, err := to.WriteAt(p, off); err != nil {
				return err
			}
			full <- p
			off += int64(len(p))
			if off-begun >= writebackEvery {
				to.Writeback(begun, off-begun)
				begun = off
			}
			progress(int64(len(p)))
		}
		return nil
	}()
	close(full)
	<-hashed
	return err
}

func copySmall(from io.ReaderAt, to *disk.File, size int64, s *sums, progress func(int64)) error {
	buf := make([]byte, size)
	if n, err := from.ReadAt(buf, 0); n < len(buf) {
		return shortRead(err)
	}
	if size > 0 {
		if _, err := to.WriteAt(buf, 0); err != nil {
			return err
		}
	}
	_, _ = s.Write(buf)
	progress(size)
	return nil
}
