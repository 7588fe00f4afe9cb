package main

import (
	"bytes"
	"context"
	"errors"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

func TestSystemdIsToldThatItIsReadyAndLives(t *testing.T) {
	b := newBench(t, keepAll)
	path := filepath.Join(t.TempDir(), "notify.sock")
	conn, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	t.Setenv("NOTIFY_SOCKET", path)
	t.Setenv("WATCHDOG_USEC", "300000")
	t.Setenv("WATCHDOG_PID", "")
	if err := os.Unsetenv("WATCHDOG_PID"); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() {
		defer close(done)
		notify(ctx, b.node)
	}()
	told := func(want string) {
		t.Helper()
		text := make([]byte, 100)
		if err := conn.SetReadDeadline(time.Now().Add(10 * time.Second)); err != nil {
			t.Fatal(err)
		}
		if n, err := conn.Read(text); err != nil || string(text[:n]) != want {
			t.Errorf("systemd is told %q (%v), want %q", text[:n], err, want)
		}
	}
	told("READY=1")
	told("WATCHDOG=1")
	told("WATCHDOG=1")
	cancel()
	<-done
	for range 10 { // what was on its way, and then the end
		text := make([]byte, 100)
		n, err := conn.Read(text)
		if err != nil {
			t.Fatal(err)
		}
		if string(text[:n]) == "STOPPING=1" {
			return
		}
	}
	t.Error("systemd is not told that it stops")
}

func TestWrongUseIsSaidSo(t *testing.T) {
	t.Parallel()
	for name, args := range map[string][]string{
		"an argument":                     {"run"},
		"an unknown flag":                 {"--lisen", "x"},
		"a way to log that is not known":  {"--log-format", "xml"},
		"an address that others reach":    {"--listen", "0.0.0.0:9777"},
		"an address that is none":         {"--listen", "here"},
		"a socket that is relative":       {"--listen", "unix://here"},
		"a flag of another program alone": {"--json"},
	} {
		var out bytes.Buffer
		err := run(t.Context(), append(args, "--root", t.TempDir()), &out)
		var usage *usageError
		if !errors.As(err, &usage) || !strings.Contains(err.Error(), "--help") {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestADamagedClockStopsItWithAHint(t *testing.T) {
	t.Parallel()
	root := t.TempDir()
	if err := os.MkdirAll(filepath.Join(root, "node"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(root, "node", "clock.json"), []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	err := run(t.Context(), []string{"--root", root, "--listen", "unix://" + filepath.Join(root, "s.sock")}, &bytes.Buffer{})
	var h interface{ Hint() string }
	if err == nil || !errors.As(err, &h) || !strings.Contains(err.Error(), "clock.json is damaged") {
		t.Errorf("%v", err)
	}
}
