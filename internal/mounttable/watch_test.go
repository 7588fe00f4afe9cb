package mounttable

import (
	"context"
	"strconv"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/larder-project/larder/internal/testenv"
)

func TestWatchTellsOfMountsAndOfNothingElse(t *testing.T) {
	testenv.NeedRoot(t)
	ctx, cancel := context.WithCancel(t.Context())
	changes := make(chan struct{}, 100)
	ended := make(chan error, 1)
	go func() { ended <- Watch(ctx, "self", func() { changes <- struct{}{} }) }()
	dir := t.TempDir()
	mount := func() {
		t.Helper()
		if err := unix.Mount("tmpfs", dir, "tmpfs", 0, ""); err != nil {
			t.Fatal(err)
		}
	}
	unmount := func() {
		t.Helper()
		if err := unix.Unmount(dir, 0); err != nil {
			t.Fatal(err)
		}
	}
	// Nothing tells when it has begun to watch.
	for len(changes) == 0 && len(ended) == 0 {
		mount()
		unmount()
		time.Sleep(10 * time.Millisecond)
	}
	settle := func() {
		time.Sleep(100 * time.Millisecond)
		for len(changes) > 0 {
			<-changes
		}
	}
	settle()
	await := func(what string) {
		t.Helper()
		select {
		case <-changes:
		case <-time.After(10 * time.Second):
			t.Fatalf("not told of %s", what)
		}
	}
	mount()
	await("a mount")
	unmount()
	await("an unmount")
	settle()
	time.Sleep(300 * time.Millisecond)
	if n := len(changes); n > 0 {
		t.Errorf("told %d times of nothing", n)
	}
	cancel()
	select {
	case err := <-ended:
		if err != nil {
			t.Error(err)
		}
	case <-time.After(10 * time.Second):
		t.Fatal("it goes on when its context has ended")
	}
}

func TestAProcessThatHasEndedIsNotWatched(t *testing.T) {
	t.Parallel()
	if err := Watch(t.Context(), strconv.Itoa(1<<30), func() {}); err == nil {
		t.Error("no error")
	}
}
