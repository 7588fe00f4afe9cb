package main

import (
	"net"
	"path/filepath"
	"sync/atomic"
	"testing"
)

// An engine is one who calls the driver; whoever only asks who is there, as
// larder doctor does, is none.
func TestWitnessSeesAnEngineByItsCalls(t *testing.T) {
	l, err := net.Listen("unix", filepath.Join(t.TempDir(), "s"))
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	var seen atomic.Int32
	w := &witness{Listener: l, seen: func() { seen.Add(1) }}
	client, err := net.Dial("unix", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	server, err := w.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer server.Close()
	for i, c := range []struct {
		request string
		want    int32
	}{
		{"POST /Plugin.Activate HTTP/1.1\r\n\r\n", 0},
		{"POST /VolumeDriver.Get HTTP/1.1\r\n\r\n", 1},
		{"POST /VolumeDriver.Mount HTTP/1.1\r\n\r\n", 1}, // told once
	} {
		if _, err := client.Write([]byte(c.request)); err != nil {
			t.Fatal(err)
		}
		buf := make([]byte, 256)
		if n, err := server.Read(buf); err != nil || string(buf[:n]) != c.request {
			t.Errorf("read %q, %v", buf[:n], err)
		}
		if seen.Load() != c.want {
			t.Errorf("after request %d an engine was seen %d times, want %d", i, seen.Load(), c.want)
		}
	}
}
