package overlay

import (
	"syscall"
	"unsafe"

	"github.com/larder-project/larder/internal/view"
	"github.com/opencontainers/go-digest"
)

func mincore(mem, vec []byte) error {
	if _, _, errno := syscall.Syscall(syscall.SYS_MINCORE, uintptr(unsafe.Pointer(&mem[0])), uintptr(len(mem)), uintptr(unsafe.Pointer(&vec[0]))); errno != 0 {
		return errno
	}
	return nil
}

func fileNamed(m view.Model, name string) digest.Digest {
	for _, f := range m.Pack.Files {
		if f.Path == name {
			return f.Digest
		}
	}
	panic("no file " + name)
}
