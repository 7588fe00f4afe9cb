package hubtest

import (
	"bytes"
	"crypto/sha1"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"hash"
	"io"
	"math/rand/v2"
	"os"
	"sync"
)

// Content is the bytes of a file. They are opened anew for each request, so
// files of any size can be served without being held in memory.
type Content interface {
	Size() int64
	Open() (ReadAtCloser, error)
}

// ReadAtCloser is what Content gives to one request.
type ReadAtCloser interface {
	io.ReaderAt
	io.Closer
}

// Bytes is content in memory.
func Bytes(b []byte) Content { return memory(b) }

// Text is content in memory.
func Text(s string) Content { return memory(s) }

type memory []byte

func (m memory) Size() int64                 { return int64(len(m)) }
func (m memory) Open() (ReadAtCloser, error) { return nopCloser{bytes.NewReader(m)}, nil }

type nopCloser struct{ io.ReaderAt }

func (nopCloser) Close() error { return nil }

// Disk is the content of a regular file on disk, which must not change.
func Disk(path string) (Content, error) {
	info, err := os.Stat(path)
	if err != nil {
		return nil, err
	}
	if !info.Mode().IsRegular() {
		return nil, fmt.Errorf("%s is no regular file", path)
	}
	return onDisk{path: path, size: info.Size()}, nil
}

type onDisk struct {
	path string
	size int64
}

func (d onDisk) Size() int64                 { return d.size }
func (d onDisk) Open() (ReadAtCloser, error) { return os.Open(d.path) }

// Pattern is size bytes that are made as they are read: they do not compress,
// no two blocks of a pattern are equal, and a seed always gives the same.
func Pattern(seed uint64, size int64) Content { return pattern{seed: seed, size: size} }

const patternBlock = 1 << 20

type pattern struct {
	seed uint64
	size int64
}

func (p pattern) Size() int64                 { return p.size }
func (p pattern) Open() (ReadAtCloser, error) { return nopCloser{p}, nil }

// patternBlocks has the block that each seed's pattern repeats; only its first
// sixteen bytes differ from block to block.
var patternBlocks sync.Map // uint64 -> []byte

func (p pattern) block() []byte {
	if b, ok := patternBlocks.Load(p.seed); ok {
		return b.([]byte)
	}
	block := make([]byte, patternBlock)
	rng := rand.New(rand.NewPCG(p.seed, 0x6c6172646572))
	for i := 0; i < len(block); i += 8 {
		binary.LittleEndian.PutUint64(block[i:], rng.Uint64())
	}
	patternBlocks.Store(p.seed, block)
	return block
}

func (p pattern) ReadAt(b []byte, off int64) (int, error) {
	if off >= p.size {
		return 0, io.EOF
	}
	var err error
	if int64(len(b)) > p.size-off {
		b, err = b[:p.size-off], io.EOF
	}
	block := p.block()
	for n := 0; n < len(b); {
		at := off + int64(n)
		number, within := uint64(at/patternBlock), int(at%patternBlock)
		k := copy(b[n:], block[within:])
		if within < 16 {
			var head [16]byte
			binary.LittleEndian.PutUint64(head[:], number)
			binary.LittleEndian.PutUint64(head[8:], p.seed)
			copy(b[n:n+k], head[within:])
		}
		n += k
	}
	return len(b), err
}

// sums reads content once for the digests that a hub knows.
func sums(c Content) (sha256hex, gitOID string, err error) {
	r, err := c.Open()
	if err != nil {
		return "", "", err
	}
	defer r.Close()
	s256, s1 := sha256.New(), gitHash(c.Size())
	w := io.MultiWriter(s256, s1)
	if c.Size() > 64<<20 {
		w = s256 // nobody asks for the git id of such a file
	}
	if _, err := io.CopyBuffer(w, struct{ io.Reader }{io.NewSectionReader(r, 0, c.Size())}, make([]byte, patternBlock)); err != nil {
		return "", "", err
	}
	return hex.EncodeToString(s256.Sum(nil)), hex.EncodeToString(s1.Sum(nil)), nil
}

func gitHash(size int64) hash.Hash {
	h := sha1.New()
	fmt.Fprintf(h, "blob %d\x00", size)
	return h
}

// pointer is the text that git keeps in place of an LFS file
// (https://github.com/git-lfs/git-lfs/blob/main/docs/spec.md).
func pointer(sha256hex string, size int64) string {
	return fmt.Sprintf("version https://git-lfs.github.com/spec/v1\noid sha256:%s\nsize %d\n", sha256hex, size)
}

func gitOIDOf(s string) string {
	h := gitHash(int64(len(s)))
	io.WriteString(h, s)
	return hex.EncodeToString(h.Sum(nil))
}
