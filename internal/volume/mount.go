package volume

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/larder-project/larder/internal/atomicfile"
	"github.com/larder-project/larder/internal/disk"
	"github.com/larder-project/larder/internal/overlay"
	"github.com/larder-project/larder/internal/store"
	"github.com/larder-project/larder/internal/view"
)

// sharedTarget is the mountpoint's name for volumes whose runs share one
// mount, because they share one upper.
const sharedTarget = "volume"

// target is where a mount goes.
func (m *Manager) target(name, id string, o Options) string {
	if o.Scope == ScopeVolume && !o.ReadOnly {
		id = sharedTarget
	}
	return filepath.Join(m.Path(name), id)
}

// Mount mounts a volume for one run and returns the folder that shows it. A
// repeat with the same ID gives the same folder and is counted. Nothing is
// fetched: a model that is missing is an error that says what to do.
func (m *Manager) Mount(ctx context.Context, name, id string) (_ string, err error) {
	if err := errors.Join(CheckName(name), CheckID(id)); err != nil {
		return "", err
	}
	unlock, err := m.lock(ctx, name)
	if err != nil {
		return "", err
	}
	defer func() {
		unlock()
		if err != nil {
			m.finishDrops(ctx, name)
		}
	}()
	r, err := m.readRecord(name)
	if err != nil {
		return "", err
	}
	o, err := ParseOptions(name, r.Options)
	if err != nil {
		return "", fmt.Errorf("mount volume %s: %w", name, err)
	}
	target := m.target(name, id, o)
	mr, err := m.begin(ctx, r, o, mountRecord{Volume: name, ID: id, Target: target, Place: m.placeOf(target)})
	if err == nil {
		err = m.attach(ctx, o, mr)
	}
	if err != nil {
		return "", fmt.Errorf("mount volume %s: %w", name, err)
	}
	return target, nil
}

// begin writes the record of a mount before anything is mounted, and inside
// the store's lock: from here on its versions are in use.
func (m *Manager) begin(ctx context.Context, r record, o Options, mr mountRecord) (mountRecord, error) {
	old, again, err := m.readMount(r.Name, mr.ID)
	if err != nil {
		return mountRecord{}, err
	}
	now := bootSeconds()
	if again {
		live, err := isMounted(old)
		if err != nil {
			return old, err
		}
		if live {
			old.Refs++
			old.Called, old.Leaving = now, false
			return old, m.writeMount(old)
		}
	}
	if o.Scope == ScopeVolume && len(r.Pinned) == 0 {
		// Durable, and before the first byte can be written over it.
		if err := m.pin(ctx, &r, o); err != nil {
			return mountRecord{}, err
		}
	}
	mr.Refs, mr.Time, mr.Called, mr.Absorb = 1, time.Now().UTC(), now, o.Absorb
	if again {
		// The host's mount has gone (a reboot of the plugin's own container,
		// or somebody unmounted it by hand); earlier calls still count, and a
		// run's writes are still its own.
		mr.Refs, mr.Time, mr.Upper = old.Refs+1, old.Time, old.Upper
	}
	err = m.store.Shared(ctx, func() error {
		versions, err := m.versionsOf(r, o)
		if err != nil {
			return err
		}
		if again && o.Scope == ScopeRun {
			if versions, err = m.exactly(old.Versions); err != nil {
				return err
			}
		}
		mr.Versions = digestsOf(versions)
		if err := m.use(versions); err != nil {
			return err
		}
		mr.Upper = m.runUpper(r.Name, mr.ID)
		if o.Scope == ScopeVolume && !o.ReadOnly {
			mr.Upper = m.volumeUpper(r.Name)
		}
		return m.writeMount(mr)
	})
	return mr, err
}

// exactly finds versions by digest.
func (m *Manager) exactly(digests []digest.Digest) ([]store.Version, error) {
	return m.versionsOf(record{Pinned: digests}, Options{})
}

func (m *Manager) pin(ctx context.Context, r *record, o Options) error {
	return m.store.Shared(ctx, func() error {
		versions, err := m.resolve(o)
		if err != nil {
			return err
		}
		if err := m.use(versions); err != nil {
			return err
		}
		r.Pinned = digestsOf(versions)
		return m.writeRecord(*r)
	})
}

// attach does what a mount's record promises, unless the kernel shows that it
// is done. When it fails, nothing of it is left.
func (m *Manager) attach(ctx context.Context, o Options, mr mountRecord) (err error) {
	if mr.View != "" {
		return nil // begin found it mounted
	}
	live, err := overlay.IsMounted(mr.Target)
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, m.rollBack(context.WithoutCancel(ctx), mr, live))
		}
	}()
	versions, err := m.exactly(mr.Versions)
	if err != nil {
		return err
	}
	viewDir, method, err := m.ensureView(ctx, versions, o)
	if err != nil {
		return err
	}
	mr.View = filepath.Base(viewDir)
	if live {
		return m.attached(mr) // another run of the volume has mounted it
	}
	if !mr.Manual && !m.mntIsOurs() { // which is private as a whole
		if err := makePrivate(m.Path(mr.Volume)); err != nil {
			return err
		}
	}
	if err := disk.MkdirAll(mr.Target, 0o711); err != nil {
		return err
	}
	mount := overlay.Mount{Target: mr.Target, View: viewDir, Blobs: m.store.BlobsDir(), ReadOnly: o.ReadOnly, Method: method}
	// A read-only mount has one too, which takes nothing: by its upper alone the
	// kernel tells whether a mount lives on that no mount table shows.
	upper, err := m.takeUpper(ctx, mr, o, viewDir)
	if err != nil {
		return err
	}
	mount.Upper, mount.Work = upper.Upper, upper.Work
	if err := mount.Do(); err != nil {
		return err
	}
	for _, v := range mr.Versions {
		m.store.TouchUsage(m.node, v)
	}
	return m.attached(mr)
}

// attached records that a mount is there.
func (m *Manager) attached(mr mountRecord) error {
	device, err := overlay.DeviceOf(mr.Target)
	if err != nil {
		return err
	}
	mr.Device = device.String()
	return m.writeMount(mr)
}

// isMounted tells whether a mount is at its target, in this mount namespace.
// What somebody else has mounted there is not ours.
func isMounted(mr mountRecord) (bool, error) {
	mounted, err := overlay.IsMounted(mr.Target)
	if err != nil || !mounted || mr.Device == "" {
		return mounted, err
	}
	device, err := overlay.DeviceOf(mr.Target)
	return err == nil && device.String() == mr.Device, err
}

// takeUpper makes the folder that takes what a run writes, or takes up the
// volume's.
func (m *Manager) takeUpper(ctx context.Context, mr mountRecord, o Options, viewDir string) (overlay.Upper, error) {
	if _, err := os.Lstat(mr.Upper); err == nil {
		// It is there: kept with the volume, or left by an earlier run with
		// the same ID. Two mounts on one upper would corrupt it.
		if err := m.awaitUpper(ctx, mr); err != nil {
			return overlay.Upper{}, err
		}
		if mr.Upper != m.volumeUpper(mr.Volume) {
			if err := m.dropUpper(mr); err != nil {
				return overlay.Upper{}, err
			}
		}
	}
	if err := disk.MkdirAll(filepath.Dir(mr.Upper), 0o711); err != nil {
		return overlay.Upper{}, err
	}
	return overlay.NewUpper(ctx, mr.Upper, viewDir, m.state, m.limit(o))
}

// dropUpper ends what a run wrote, which nobody shows any more: it is dropped,
// or kept aside until Absorb has looked at it.
func (m *Manager) dropUpper(mr mountRecord) error {
	if mr.Absorb {
		return m.setAside(mr)
	}
	return m.drop(mr.Volume, mr.Upper)
}

// rollBack leaves no trace of a mount that failed. Where another run has the
// same mount, only the record goes.
func (m *Manager) rollBack(ctx context.Context, mr mountRecord, live bool) error {
	if live {
		return m.dropMount(mr)
	}
	if err := m.detach(ctx, mr); err != nil {
		return fmt.Errorf("roll back: %w", err)
	}
	return nil
}

// ensureView gives the folder of the view of versions, built if need be.
func (m *Manager) ensureView(ctx context.Context, versions []store.Version, o Options) (string, view.Method, error) {
	method, err := m.viewMethod(ctx)
	if err != nil {
		return "", "", err
	}
	dir := filepath.Join(m.state, viewsDir, m.viewsName())
	name := planName(versions, o, method)
	m.mu.Lock()
	key, ok := m.plans[name]
	m.mu.Unlock()
	if ok {
		if _, err := os.Lstat(filepath.Join(dir, key)); err == nil {
			return filepath.Join(dir, key), method, nil
		}
	}
	tree, err := m.plan(versions, o)
	if err != nil {
		return "", "", err
	}
	key = tree.Key(method)
	data, err := json.Marshal(viewRecord{Versions: digestsOf(versions)})
	if err != nil {
		return "", "", fmt.Errorf("record view: %w", err)
	}
	// The record first: a view whose versions are not known could not be told
	// from one in use.
	if err := atomicfile.WriteVolatile(filepath.Join(dir, key+recordSuffix), data, 0o600); err != nil {
		return "", "", fmt.Errorf("record view: %w", err)
	}
	if err := view.Build(ctx, filepath.Join(dir, key), tree, method, m.store.BlobsDir()); err != nil {
		return "", "", err
	}
	m.mu.Lock()
	if len(m.plans) > 1024 {
		clear(m.plans)
	}
	m.plans[name] = key
	m.mu.Unlock()
	return filepath.Join(dir, key), method, nil
}

// planName is everything that the plan of a view depends on.
func planName(versions []store.Version, o Options, method view.Method) string {
	var b strings.Builder
	fmt.Fprintf(&b, "%s %s %t %t", method, o.Layout, o.ReadOnly, o.Catalog)
	for _, id := range []*uint32{o.UID, o.GID} {
		if id != nil {
			fmt.Fprintf(&b, " %d", *id)
		} else {
			b.WriteString(" -")
		}
	}
	if o.Mode != nil {
		fmt.Fprintf(&b, " %o", *o.Mode)
	}
	for _, r := range o.Models {
		b.WriteString(" " + r.String())
	}
	for _, v := range versions {
		b.WriteString("\n" + string(v.Digest) + " " + strings.Join(v.References, " "))
	}
	return b.String()
}

func digestsOf(versions []store.Version) []digest.Digest {
	out := make([]digest.Digest, len(versions))
	for i, v := range versions {
		out[i] = v.Digest
	}
	return out
}

// Unmount ends one call of Mount. It succeeds for what is not mounted, and
// leaves to Reap what somebody still holds: an engine that gets an error asks
// no second time.
func (m *Manager) Unmount(ctx context.Context, name, id string) error {
	if err := errors.Join(CheckName(name), CheckID(id)); err != nil {
		return err
	}
	unlock, err := m.lock(ctx, name)
	if err != nil {
		return err
	}
	defer m.finishDrops(ctx, name)
	defer unlock()
	mr, ok, err := m.readMount(name, id)
	if err != nil || !ok {
		return err
	}
	mr.Refs--
	if mr.Refs > 0 {
		use, err := m.scanKernel(ctx)
		if err != nil {
			return err
		}
		if !m.seesAll() || len(use.users(m, mr)) > 0 {
			return m.writeMount(mr)
		}
		// Calls of this ID come one after another, and no container shows the
		// mount: the engine was killed between two calls, and this is the last.
	}
	mr.Refs, mr.Leaving = 0, true
	if err := m.writeMount(mr); err != nil {
		return err
	}
	err = m.leave(ctx, mr)
	if errors.Is(err, errHeld) {
		m.log.Warn("unmount waits for what still holds the mount", "volume", name, "id", id, "reason", err)
		return nil
	}
	return err
}

// errHeld tells that a mount could not be taken away yet.
var errHeld = errors.New("the mount is still held")

// elsewhereError tells that a mount cannot be taken away from here: something
// else is mounted over it, or it is in the mount namespace of another process,
// that of the plugin where the engine runs it.
type elsewhereError struct{ by Holder }

func (e *elsewhereError) Error() string {
	if e.by.own {
		return fmt.Sprintf("something else is mounted over it at %s; umount that first", e.by.Mountpoint)
	}
	return fmt.Sprintf("it was mounted in the mount namespace of process %d, at %s", e.by.PID, e.by.Mountpoint)
}

func (e *elsewhereError) Is(target error) bool { return target == errHeld }

// leave takes away a mount that its last user has left, unless another run of
// the volume shares it.
func (m *Manager) leave(ctx context.Context, mr mountRecord) error {
	others, err := m.readMounts(mr.Volume)
	// A record that cannot be read may be of a run that shares the mount.
	if err != nil && filepath.Base(mr.Target) == sharedTarget {
		return err
	}
	for _, o := range others {
		if o.ID != mr.ID && o.Target == mr.Target && !o.Leaving {
			return m.dropMount(mr)
		}
	}
	return m.detach(ctx, mr)
}

// detach unmounts, ends what the run wrote, and drops the record, in this
// order; it can be repeated after a crash at any step. It returns errHeld
// where somebody still holds the mount, and then has deleted nothing.
func (m *Manager) detach(ctx context.Context, mr mountRecord) error {
	here, err := isMounted(mr)
	if err != nil {
		return err
	}
	if here {
		if err := m.unmount(mr.Target); err != nil {
			return err
		}
	}
	ofRun := mr.Upper != "" && mr.Upper == m.runUpper(mr.Volume, mr.ID)
	if ofRun || !here {
		if err := m.checkFree(ctx, mr, here, ofRun); err != nil {
			return err
		}
	}
	if ofRun {
		if err := m.dropUpper(mr); err != nil {
			return err
		}
	}
	for _, v := range mr.Versions {
		m.store.TouchUsage(m.node, v)
	}
	if !mr.Manual { // a person's own folder stays
		if err := removeEmpty(mr.Target); err != nil {
			return err
		}
	}
	if err := m.dropMount(mr); err != nil {
		return err
	}
	if err := atomicfile.SweepDead(m.mountsDir(mr.Volume)); err != nil {
		return err
	}
	// Folders of the volume go with its last mount; others may still use them.
	for _, dir := range []string{m.Path(mr.Volume), m.mountsDir(mr.Volume), filepath.Dir(m.runUpper(mr.Volume, mr.ID))} {
		if err := removeEmpty(dir); err != nil {
			return err
		}
	}
	return nil
}

// checkFree returns errHeld where a mount is still shown that was here and is
// unmounted now, or that is not here: then it may lie under another mount, or be
// in another namespace, whose process must unmount it. An upper must not go
// while anybody shows it.
func (m *Manager) checkFree(ctx context.Context, mr mountRecord, here, upper bool) error {
	use, err := m.scanKernel(ctx)
	if err != nil {
		return err
	}
	for _, s := range use.of(m, mr) {
		switch {
		case !here && s.isCopy(mr):
			return &elsewhereError{s.Holder}
		case upper:
			return fmt.Errorf("%w: process %d shows it at %s", errHeld, s.PID, s.Mountpoint)
		}
	}
	if !upper {
		return nil
	}
	used, err := overlay.UpperInUse(mr.Upper)
	if used {
		return fmt.Errorf("%w by what no mount table here shows", errHeld)
	}
	return err
}

// unmount takes away what is mounted at target, if anything. A mount that is in
// use is errHeld. One may be in use for a moment: by who looks at all mounts, or
// by a process that is being started and has its parent's files until then.
func (m *Manager) unmount(target string) error {
	for tries := 0; ; {
		mounted, err := overlay.IsMounted(target)
		if err != nil || !mounted {
			return err
		}
		if err := overlay.Unmount(target); errors.Is(err, overlay.ErrBusy) {
			if tries++; tries == unmountTries {
				return fmt.Errorf("%w: %w", errHeld, err)
			}
			time.Sleep(unmountRetry)
		} else if err != nil && !errors.Is(err, overlay.ErrNotMounted) {
			return err
		}
	}
}

const (
	unmountTries = 10
	unmountRetry = 10 * time.Millisecond
)

// removeEmpty removes a folder unless it is gone or has something in it.
func removeEmpty(dir string) error {
	err := disk.Remove(dir)
	if err == nil || errors.Is(err, fs.ErrNotExist) || isNotEmpty(err) {
		return nil
	}
	return err
}

func newID() string {
	var b [16]byte
	_, _ = rand.Read(b[:]) // never fails: crypto/rand ends the process instead
	return hex.EncodeToString(b[:])
}
