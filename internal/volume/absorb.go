package volume

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"

	"github.com/gofrs/flock"
	"github.com/hashicorp/go-multierror"
	"github.com/opencontainers/go-digest"

	"github.com/larder-project/larder/internal/atomicfile"
	"github.com/larder-project/larder/internal/disk"
	"github.com/larder-project/larder/internal/modelpack"
	"github.com/larder-project/larder/internal/overlay"
	"github.com/larder-project/larder/internal/pull"
	"github.com/larder-project/larder/internal/reference"
	"github.com/larder-project/larder/internal/source"
	"github.com/larder-project/larder/internal/source/directory"
	"github.com/larder-project/larder/internal/store"
	"github.com/larder-project/larder/internal/usage"
	"github.com/larder-project/larder/internal/view"
)

// asideRecord is STATE/uppers/absorb/NAME/KEY.json, beside the folder KEY: an
// upper that a run with the option absorb has left.
type asideRecord struct {
	Format   int               `json:"format"`
	Volume   string            `json:"volume"`
	ID       string            `json:"id"` // of the run
	Options  map[string]string `json:"options"`
	Versions []digest.Digest   `json:"versions"` // what the run was shown
}

const (
	absorbDir    = "absorb"
	mergedSuffix = ".merged" // where an upper is shown over its view
)

func (m *Manager) asideDir(name string) string {
	return filepath.Join(m.state, uppersDir, absorbDir, name)
}

// setAside gives what a run wrote a name of its own, by which Absorb finds it:
// the run's ID may be mounted again at once, and looking at a download takes
// long. The caller holds the volume's lock, and nobody shows the upper any
// more. After a crash in between the upper has its first name still, or the
// second; a record without its folder is dropped by Absorb.
func (m *Manager) setAside(mr mountRecord) error {
	if !exists(mr.Upper) {
		return nil
	}
	r := asideRecord{Format: recordFormat, Volume: mr.Volume, ID: mr.ID, Versions: mr.Versions}
	if volume, err := m.readRecord(mr.Volume); err == nil {
		r.Options = volume.Options
	}
	data, err := json.Marshal(r)
	if err != nil {
		return fmt.Errorf("set aside what a run wrote: %w", err)
	}
	dir := filepath.Join(m.asideDir(mr.Volume), newID())
	if err := disk.MkdirAll(filepath.Dir(dir), 0o700); err != nil {
		return fmt.Errorf("set aside what a run wrote: %w", err)
	}
	if err := atomicfile.Write(dir+recordSuffix, data, 0o600); err != nil {
		return fmt.Errorf("set aside what a run wrote: %w", err)
	}
	if err := disk.Rename(mr.Upper, dir); err != nil {
		return fmt.Errorf("set aside what a run wrote: %w", err)
	}
	m.kick()
	return nil
}

// aside is one upper that was set aside.
type aside struct {
	asideRecord
	dir string
}

// asides lists what was set aside. With an error about records that cannot be
// read, it gives the others.
func (m *Manager) asides() ([]aside, error) {
	volumes, err := os.ReadDir(filepath.Join(m.state, uppersDir, absorbDir))
	if err != nil {
		return nil, ignoreAbsent(err)
	}
	var out []aside
	var failed error
	for _, v := range volumes {
		entries, err := os.ReadDir(m.asideDir(v.Name()))
		if err != nil {
			failed = errors.Join(failed, ignoreAbsent(err))
			continue
		}
		for _, e := range entries {
			key, isRecord := strings.CutSuffix(e.Name(), recordSuffix)
			if !isRecord || atomicfile.IsTemp(key) {
				continue
			}
			a := aside{dir: filepath.Join(m.asideDir(v.Name()), key)}
			data, err := os.ReadFile(a.dir + recordSuffix)
			if errors.Is(err, fs.ErrNotExist) {
				continue // absorbed just now
			}
			if err == nil {
				err = decodeStrict(data, &a.asideRecord)
			}
			if err != nil {
				failed = errors.Join(failed, &damagedError{
					text: fmt.Sprintf("what a run of volume %s downloaded: its record %s cannot be read", v.Name(), a.dir+recordSuffix), err: err,
					hint: fmt.Sprintf("remove it together with the folder %s: the download is lost then, and can be had again", a.dir),
				})
				continue
			}
			out = append(out, a)
		}
	}
	return out, failed
}

// asideUses are the versions that runs were shown whose downloads are still to
// be looked at: a download may share files with them.
func (m *Manager) asideUses() ([]usage.Use, error) {
	all, err := m.asides()
	if err != nil {
		return nil, err
	}
	var out []usage.Use
	for _, a := range all {
		for _, d := range a.Versions {
			out = append(out, usage.Use{Version: d, By: fmt.Sprintf("volume %s, of which a download is being taken over", a.Volume)})
		}
	}
	return out, nil
}

// Absorb takes over what the runs that have ended left in their caches, and
// then deletes their uppers. It may take long, and holds no lock that anybody
// else waits for. What is interrupted is begun again by the next call. Volumes
// with the option absorb need somebody who calls it.
func (m *Manager) Absorb(ctx context.Context) error {
	l := flock.New(filepath.Join(m.state, "locks", "absorb"), flock.SetPermissions(0o600))
	ok, err := l.TryLock()
	if err != nil {
		return fmt.Errorf("lock %s: %w", l.Path(), err)
	}
	defer l.Close()
	if !ok {
		return nil // another process is at it
	}
	all, damaged := m.asides()
	failed := multierror.Append(nil, damaged)
	for _, a := range all {
		if err := ctx.Err(); err != nil {
			return err
		}
		if err := m.absorb(ctx, a); err != nil {
			failed = multierror.Append(failed, fmt.Errorf("take over what a run of volume %s downloaded: %w", a.Volume, err))
		}
	}
	return failed.ErrorOrNil()
}

// absorb looks at one upper, and drops it unless it must be looked at again.
func (m *Manager) absorb(ctx context.Context, a aside) error {
	looked := exists(a.dir) // else it was dropped, or is being set aside at this moment
	if looked {
		if err := m.takeOver(ctx, a); err != nil {
			if ctx.Err() != nil || !verdict(err) {
				return fmt.Errorf("%w; it stays in %s until it can be, or until that folder is removed", err, a.dir)
			}
			m.log.Warn("take over what a container downloaded", "volume", a.Volume, "id", a.ID, "error", err)
		}
	}
	return m.dropAside(ctx, a, looked)
}

// verdict tells whether an error says of a download itself that it cannot be
// taken over, now or later. Every other one (a disk that is full or fails, a
// store that cannot be read) may pass.
func verdict(err error) bool {
	var many *multierror.Error
	if errors.As(err, &many) {
		return !slices.ContainsFunc(many.Errors, func(err error) bool { return !verdict(err) })
	}
	var errno syscall.Errno
	if errors.As(err, &errno) {
		return false
	}
	var mismatch *pull.MismatchError
	return errors.As(err, &mismatch) || errors.Is(err, source.ErrInvalid) || errors.Is(err, reference.ErrInvalid) ||
		errors.Is(err, modelpack.ErrInvalid) || errors.Is(err, view.ErrInvalid) || errors.Is(err, ErrInvalid)
}

// dropAside drops an upper that was looked at, and the record of one that is
// gone. The upper goes first, at once: half of one would be looked at again.
func (m *Manager) dropAside(ctx context.Context, a aside, looked bool) error {
	name := filepath.Base(filepath.Dir(a.dir))
	unlock, err := m.lock(ctx, name)
	if err != nil {
		return err
	}
	defer m.finishDrops(ctx, name)
	defer unlock()
	if looked {
		if err := m.drop(name, a.dir); err != nil {
			return err
		}
	}
	if exists(a.dir) {
		return nil
	}
	if err := ignoreAbsent(disk.Remove(a.dir + recordSuffix)); err != nil {
		return err
	}
	return removeEmpty(filepath.Dir(a.dir))
}

// takeOver takes over whole revisions whose files have the digests they are
// named by.
//
// What a revision shares with the view that the run was shown (a new commit of
// a model that the store has) is not in the upper. So what is not whole there
// is looked at over that view, and copied; then what lies whole in the upper is
// moved.
func (m *Manager) takeOver(ctx context.Context, a aside) error {
	if err := errors.Join(m.endMerged(a), overlay.Reattach(ctx, a.dir)); err != nil { // of one that was killed
		return err
	}
	upper := upperOf(a.dir)
	if !exists(upper) {
		return nil // Mount died before anything could be written
	}
	whole, err := directory.HubCache(upper)
	if err != nil {
		return err
	}
	partial := len(whole.Skipped) > 0
	if err := errors.Join(whole.Unread, whole.Close()); err != nil {
		return err
	}
	var failed *multierror.Error
	if partial && len(a.Versions) > 0 {
		failed = multierror.Append(failed, m.absorbMerged(ctx, a, upper))
	}
	failed = multierror.Append(failed, m.absorbCache(ctx, upper, true))
	return failed.ErrorOrNil()
}

// absorbMerged looks at an upper over the view that its run was shown.
func (m *Manager) absorbMerged(ctx context.Context, a aside, upper string) (err error) {
	o, err := ParseOptions(a.Volume, a.Options)
	if err != nil {
		return err
	}
	versions, err := m.exactly(a.Versions)
	if err != nil {
		return err
	}
	viewDir, method, err := m.ensureView(ctx, versions, o)
	if err != nil {
		return err
	}
	at := a.dir + mergedSuffix
	if err := disk.MkdirAll(at, 0o700); err != nil {
		return err
	}
	defer func() {
		if end := m.endMerged(a); end != nil {
			err = multierror.Append(err, end)
		}
	}()
	if err := (overlay.Mount{Target: at, View: viewDir, Blobs: m.store.BlobsDir(), Upper: upper, ReadOnly: true, Method: method}).Do(); err != nil {
		return err
	}
	return m.absorbCache(ctx, at, false)
}

func (m *Manager) endMerged(a aside) error {
	if err := m.unmount(a.dir + mergedSuffix); err != nil {
		return err
	}
	return removeEmpty(a.dir + mergedSuffix)
}

// sweepAsides removes what a death while something was set aside has left.
func (m *Manager) sweepAsides(ctx context.Context) error {
	volumes, err := os.ReadDir(filepath.Join(m.state, uppersDir, absorbDir))
	if err != nil {
		return ignoreAbsent(err)
	}
	for _, v := range volumes {
		unlock, err := m.lock(ctx, v.Name())
		if err != nil {
			return err
		}
		err = errors.Join(atomicfile.SweepDead(m.asideDir(v.Name())), removeEmpty(m.asideDir(v.Name())))
		unlock()
		if err != nil {
			return fmt.Errorf("sweep what runs downloaded: %w", err)
		}
	}
	return nil
}

// upperOf is the folder that took a mount's writes; see overlay.Upper.
func upperOf(dir string) string {
	if inside := filepath.Join(dir, "fs", "upper"); exists(inside) {
		return inside
	}
	return filepath.Join(dir, "upper")
}

func exists(path string) bool {
	_, err := os.Lstat(path)
	return err == nil
}

func (m *Manager) absorbCache(ctx context.Context, dir string, move bool) error {
	cache, err := directory.HubCache(dir)
	if err != nil {
		return err
	}
	defer cache.Close()
	failed := multierror.Append(nil, cache.Unread)
	for _, src := range cache.Sources {
		local, ok := src.(*directory.Source)
		if !ok {
			continue
		}
		snap, err := claimed{local}.Snapshot(ctx)
		if err != nil {
			failed = multierror.Append(failed, fmt.Errorf("take over %s: %w", snap.Source, err))
			continue
		}
		if _, err := m.store.Resolve(snap.References[0]); err == nil {
			continue // the store has this commit
		}
		_, err = pull.Run(ctx, m.store, claimed{local}, pull.Options{Node: m.node, Move: move, New: true})
		switch {
		case errors.Is(err, store.ErrTaken): // it has come meanwhile
		case err != nil:
			failed = multierror.Append(failed, fmt.Errorf("take over %s: %w", snap.Source, err))
		default:
			m.log.Info("took over a model that a container downloaded", "model", snap.Source, "revision", snap.Revision)
		}
	}
	return failed.ErrorOrNil()
}

// claimed is a revision of which only a container says what it is. It can claim
// anything, so the revision is published by its commit alone, under which
// nobody finds it who does not ask for that commit, and never by a branch.
type claimed struct{ *directory.Source }

// Snapshot implements source.Source.
func (c claimed) Snapshot(ctx context.Context) (source.Snapshot, error) {
	snap, err := c.Source.Snapshot(ctx)
	if err != nil {
		return snap, err
	}
	name, err := reference.Parse(snap.Source + "@" + snap.Revision)
	if err != nil {
		return snap, fmt.Errorf("a cache without a commit: %w", err)
	}
	snap.References = []reference.Reference{name}
	return snap, nil
}
