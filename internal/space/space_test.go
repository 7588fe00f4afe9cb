package space

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// A container nests folders deeper than a path can say. Its file at the end is
// counted, and so is what others wrote.
func TestUppersAreCountedHoweverDeepTheyAre(t *testing.T) {
	t.Parallel()
	state := t.TempDir()
	top := filepath.Join(state, "uppers", "run", "v", "id", "upper")
	if err := os.MkdirAll(top, 0o755); err != nil {
		t.Fatal(err)
	}
	before, err := Uppers(t.Context(), state)
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{strings.Repeat("d", 250), "x"} {
		const size = 1 << 20
		depth := 5_000 / (len(name) + 1)
		nest(t, top, name, depth, make([]byte, size))
		after, err := Uppers(t.Context(), state)
		if err != nil {
			t.Fatal(err)
		}
		if after < before+size || after > before+size+int64(depth+1)*8192 {
			t.Errorf("with %d folders named %.3s…: %d bytes, before %d, and %d were written", depth, name, after, before, size)
		}
		before = after
	}
}

// nest makes folders one in another, and a file in the last.
func nest(t *testing.T, dir, name string, depth int, content []byte) {
	t.Helper()
	fd, err := unix.Open(dir, unix.O_RDONLY|unix.O_DIRECTORY, 0)
	if err != nil {
		t.Fatal(err)
	}
	for range depth {
		if err := unix.Mkdirat(fd, name, 0o755); err != nil {
			t.Fatal(err)
		}
		next, err := unix.Openat(fd, name, unix.O_RDONLY|unix.O_DIRECTORY, 0)
		if err != nil {
			t.Fatal(err)
		}
		_ = unix.Close(fd)
		fd = next
	}
	defer unix.Close(fd)
	file, err := unix.Openat(fd, "file", unix.O_WRONLY|unix.O_CREAT, 0o644)
	if err != nil {
		t.Fatal(err)
	}
	f := os.NewFile(uintptr(file), "file")
	_, err = f.Write(content)
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	if err != nil {
		t.Fatal(err)
	}
}
