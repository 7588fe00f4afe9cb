package overlay

import (
	"path/filepath"
	"strconv"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/larder-project/larder/internal/testenv"
	"github.com/larder-project/larder/internal/view"
)

// What a volume's mount costs here, beside the bare system calls.
func BenchmarkMount(b *testing.B) {
	h := newHost(b, testenv.LoopFS(b, "ext4", 200<<20).Dir)
	files := map[string][]byte{}
	for i := range 100 {
		files["f"+strconv.Itoa(i)] = []byte(strconv.Itoa(i))
	}
	method := methods(b)[0]
	dir := h.view(view.Spec{Models: []view.Model{h.model(files)}}, method)
	b.Run("upper and mount", func(b *testing.B) {
		h.t = b
		for i := 0; b.Loop(); i++ {
			u, err := NewUpper(b.Context(), filepath.Join(h.state, "b"+strconv.Itoa(i)), dir, h.state, Limit{})
			if err != nil {
				b.Fatal(err)
			}
			m := Mount{Target: h.target(), View: dir, Blobs: h.blobs, Upper: u.Upper, Work: u.Work, Method: method}
			if err := m.Do(); err != nil {
				b.Fatal(err)
			}
			b.StopTimer()
			if err := Unmount(m.Target); err != nil {
				b.Fatal(err)
			}
			if err := RemoveUpper(u.Dir); err != nil {
				b.Fatal(err)
			}
			b.StartTimer()
		}
	})
	b.Run("two mkdir and mount(2)", func(b *testing.B) {
		h.t = b
		for i := 0; b.Loop(); i++ {
			base := filepath.Join(h.state, "c"+strconv.Itoa(i))
			m := Mount{Target: h.target(), View: dir, Blobs: h.blobs, Upper: base + "u", Work: base + "w", Method: method}
			opts, err := m.Options()
			if err != nil {
				b.Fatal(err)
			}
			_ = unix.Mkdir(m.Upper, 0o777)
			_ = unix.Mkdir(m.Work, 0o700)
			if err := unix.Mount("x", m.Target, "overlay", 0, opts); err != nil {
				b.Fatal(err)
			}
			b.StopTimer()
			if err := Unmount(m.Target); err != nil {
				b.Fatal(err)
			}
			b.StartTimer()
		}
	})
}
