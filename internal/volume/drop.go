package volume

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/gofrs/flock"
	"github.com/hashicorp/go-multierror"

	"github.com/larder-project/larder/internal/disk"
	"github.com/larder-project/larder/internal/overlay"
)

// drop gives an upper, if it is there, to deleteDropped. A container decides
// how long the deletion takes, and other volumes wait for the lock that the
// caller holds. Nobody shows the upper any more.
func (m *Manager) drop(volume, upper string) error {
	if !exists(upper) {
		return nil
	}
	if err := disk.Rename(upper, filepath.Join(m.state, uppersDir, droppedDir, volume+droppedSep+newID())); err != nil {
		return fmt.Errorf("drop what a container wrote: %w", err)
	}
	return nil
}

// droppedSep ends the volume's name, in which it cannot be.
const droppedSep = "@"

// finishDrops deletes what a call has dropped, when it has let go of the lock.
// The call itself has done what it was asked to, whatever comes of this.
func (m *Manager) finishDrops(ctx context.Context, volume string) {
	if err := m.deleteDropped(ctx, volume); err != nil {
		m.log.Warn("what a container wrote is not deleted yet", "volume", volume, "reason", err)
	}
}

// deleteDropped deletes what was dropped of one volume, or of all where the
// name is empty, but for what another call or process is deleting. When the
// context ends it waits no longer, and the deletion goes on. What is left when
// the process dies is found by the next Reap.
func (m *Manager) deleteDropped(ctx context.Context, volume string) error {
	dir := filepath.Join(m.state, uppersDir, droppedDir)
	entries, err := os.ReadDir(dir)
	if err != nil {
		return fmt.Errorf("delete what containers wrote: %w", err)
	}
	done := make(chan error, 1)
	go func() {
		var failed *multierror.Error
		for _, e := range entries {
			if of, _, _ := strings.Cut(e.Name(), droppedSep); volume == "" || of == volume {
				failed = multierror.Append(failed, deleteUpper(filepath.Join(dir, e.Name())))
			}
		}
		done <- failed.ErrorOrNil()
	}()
	select {
	case err := <-done:
		return err
	case <-ctx.Done():
		return nil
	}
}

// deleteUpper holds a lock on the folder itself meanwhile.
func deleteUpper(dir string) error {
	l := flock.New(dir, flock.SetFlag(os.O_RDONLY))
	if ok, err := l.TryLock(); !ok {
		return ignoreAbsent(err)
	}
	defer l.Close()
	return overlay.RemoveUpper(dir)
}
