package volume

import (
	"context"
	"errors"
	"fmt"
	"hash/fnv"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/gofrs/flock"
	"github.com/opencontainers/go-digest"

	"github.com/larder-project/larder/internal/atomicfile"
	"github.com/larder-project/larder/internal/disk"
	"github.com/larder-project/larder/internal/modelpack"
	"github.com/larder-project/larder/internal/overlay"
	"github.com/larder-project/larder/internal/reference"
	"github.com/larder-project/larder/internal/store"
	"github.com/larder-project/larder/internal/view"
)

// Puller fetches a model into the store. It is called when a volume is
// created, never when one is mounted.
type Puller interface {
	// Pull waits until the model is there, the context ends, or fetching
	// fails. When the context ends first, fetching goes on, and the error says
	// how far it is.
	Pull(ctx context.Context, ref reference.Reference) error
}

// Config of a Manager.
type Config struct {
	Store  *store.Store
	State  string // folder of this node's state
	Mounts string // folder below which volumes are mounted; empty: STATE/mnt
	Node   string // name of this node in the store
	BootID string // for tests; empty: the kernel's
	Puller Puller // nil: the option pull is refused
	Log    *slog.Logger
	// OwnPIDNamespace: all containers that can show a mount run in this
	// process's PID namespace, though it is not the host's.
	OwnPIDNamespace bool
	// LoopOnly: what may be written to the disk is bounded by loop images alone.
	LoopOnly bool
}

// Manager works on the volumes of one node. Its methods are safe for
// concurrent use, by several processes too.
type Manager struct {
	store    *store.Store
	state    string
	mnt      string
	node     string
	boot     string
	id       string // of the state
	puller   Puller
	loopOnly bool
	log      *slog.Logger

	blind      bool // see seesAll
	engineSeen atomic.Bool

	ended chan struct{} // see Ended

	mu       sync.Mutex
	method   view.Method
	plans    map[string]string // of a spec: the key of its view
	mntPlace string            // of mnt; see placeOf
}

// Open opens STATE, and makes it where it is missing.
func Open(ctx context.Context, c Config) (*Manager, error) {
	state, err := filepath.Abs(c.State)
	if err != nil {
		return nil, fmt.Errorf("open state: %w", err)
	}
	// Mount tables show paths without symbolic links.
	if err := disk.MkdirAll(state, 0o711); err != nil {
		return nil, fmt.Errorf("open state: %w", err)
	}
	if state, err = filepath.EvalSymlinks(state); err != nil {
		return nil, fmt.Errorf("open state: %w", err)
	}
	if err := store.CheckNode(c.Node); err != nil {
		return nil, fmt.Errorf("open state: %w", err)
	}
	m := &Manager{store: c.Store, state: state, node: c.Node, boot: c.BootID, puller: c.Puller, loopOnly: c.LoopOnly, log: c.Log, plans: map[string]string{}, ended: make(chan struct{}, 1)}
	m.mnt = c.Mounts
	if m.mnt == "" {
		m.mnt = filepath.Join(state, mntDir)
	}
	if m.log == nil {
		m.log = slog.New(slog.DiscardHandler)
	}
	if m.boot == "" {
		if m.boot, err = bootID(); err != nil {
			return nil, fmt.Errorf("open state: %w", err)
		}
	}
	if err := CheckID(m.boot); err != nil {
		return nil, fmt.Errorf("open state: boot id: %w", err)
	}
	for _, dir := range []string{"volumes", "mounts", "mounts/" + m.boot, viewsDir, uppersDir, "uppers/run", "uppers/volume", "uppers/" + droppedDir, "locks", mntDir} {
		if err := makePrivate(filepath.Join(state, dir)); err != nil {
			return nil, fmt.Errorf("open state: %w", err)
		}
	}
	if err := disk.MkdirAll(m.mnt, 0o711); err != nil {
		return nil, fmt.Errorf("open state: %w", err)
	}
	if m.mnt, err = filepath.EvalSymlinks(m.mnt); err != nil {
		return nil, fmt.Errorf("open state: %w", err)
	}
	if !c.OwnPIDNamespace {
		if m.blind, err = inOwnPIDNamespace(); err != nil {
			return nil, fmt.Errorf("open state: %w", err)
		}
	}
	// Volumes have names, so this lock is nobody else's.
	unlock, err := m.lock(ctx, "")
	if err != nil {
		return nil, fmt.Errorf("open state: %w", err)
	}
	defer unlock()
	if err := m.own(); err != nil {
		return nil, fmt.Errorf("open state: %w", err)
	}
	if err := disk.MkdirAll(filepath.Join(state, viewsDir, m.viewsName()), 0o711); err != nil {
		return nil, fmt.Errorf("open state: %w", err)
	}
	return m, nil
}

// makePrivate makes a folder, or takes over one of an earlier Larder, that no
// other user of the host can enter: views and what containers write may be
// anybody's to write, and mount tables name the folders. An engine does not
// need to be let in, for it opens the source of a bind mount as root, for
// containers in a user namespace too (runc since 1.1). For what does need it, a
// group that has been given the right to enter keeps it.
func makePrivate(dir string) error {
	if err := disk.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	fi, err := os.Stat(dir)
	if err != nil {
		return err
	}
	if private := fi.Mode().Perm() &^ 0o007; private != fi.Mode().Perm() {
		return disk.Chmod(dir, private)
	}
	return nil
}

var stateID = regexp.MustCompile(`^[0-9a-f]{32}$`)

// own makes sure that no other STATE speaks for this node in a shared store:
// each would drop the other's records of what is in use.
func (m *Manager) own() error {
	path := filepath.Join(m.state, "id")
	data, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		data = []byte(newID() + "\n")
		err = atomicfile.Write(path, data, 0o600)
	}
	if err != nil {
		return fmt.Errorf("read the state's id: %w", err)
	}
	m.id = strings.TrimSpace(string(data))
	if !stateID.MatchString(m.id) {
		return &damagedError{
			text: "the state's id " + path + " is damaged", err: fmt.Errorf("it has %d bytes that are not 32 hex digits", len(data)),
			hint: fmt.Sprintf("if %s is the only state folder of node %s, the id is in the store: cp %s %s", m.state, m.node, filepath.Join(m.store.Dir(), "leases", m.node, "owner"), path),
		}
	}
	return m.store.Claim(m.node, m.id)
}

// method is found once: by the first that mounts.
func (m *Manager) viewMethod(ctx context.Context) (view.Method, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.method != "" {
		return m.method, nil
	}
	caps, err := overlay.ProbeMethods(ctx, m.store.BlobsDir(), m.state)
	if err != nil {
		return "", fmt.Errorf("find out how this host can mount: %w", err)
	}
	if caps.Method == "" {
		return "", errors.New("this host cannot mount views; larder doctor says why, and what to do")
	}
	m.method = caps.Method
	return m.method, nil
}

// Ended receives when a run has ended whose cache Absorb is to look at.
func (m *Manager) Ended() <-chan struct{} { return m.ended }

func (m *Manager) kick() {
	select {
	case m.ended <- struct{}{}:
	default:
	}
}

const lockRetry = 2 * time.Millisecond

// lock takes the lock of a volume and returns what releases it. Lock files are
// shared by hash and never deleted: a lock on a file that has lost its name
// would guard nothing.
func (m *Manager) lock(ctx context.Context, name string) (func(), error) {
	l := flock.New(filepath.Join(m.state, "locks", lockName(name)), flock.SetPermissions(0o600))
	if _, err := l.TryLockContext(ctx, lockRetry); err != nil {
		return nil, &lockError{name, err}
	}
	return func() { _ = l.Close() }, nil
}

func lockName(volume string) string {
	h := fnv.New32a()
	_, _ = h.Write([]byte(volume))
	return fmt.Sprintf("%02x", h.Sum32()&0xff)
}

type lockError struct {
	volume string
	err    error
}

func (e *lockError) Error() string { return fmt.Sprintf("lock volume %s: %v", e.volume, e.err) }
func (e *lockError) Unwrap() error { return e.err }

// Hint says what to do next.
func (e *lockError) Hint() string {
	if !errors.Is(e.err, context.DeadlineExceeded) {
		return ""
	}
	return "another call on this volume, or on one that shares its lock, takes long; try again, and see larder-plugin's log for what it waits for"
}

// Create records a volume. Its models must be in the store, or be fetched by
// its option pull. A volume that is there with the same options is left as it
// is; with others it is refused, and so is one that this host can never mount.
func (m *Manager) Create(ctx context.Context, name string, raw map[string]string) error {
	if err := CheckName(name); err != nil {
		return err
	}
	o, err := ParseOptions(name, raw)
	if err != nil {
		return err
	}
	if o.Pull != PullNever {
		if err := m.pull(ctx, o); err != nil {
			return fmt.Errorf("create volume %s: %w", name, err)
		}
	}
	unlock, err := m.lock(ctx, name)
	if err != nil {
		return err
	}
	defer unlock()
	if err := m.create(ctx, record{Name: name, Options: raw}, o); err != nil {
		return fmt.Errorf("create volume %s: %w", name, err)
	}
	return nil
}

// create writes the record of a volume. The caller holds the volume's lock.
func (m *Manager) create(ctx context.Context, r record, o Options) error {
	have, err := m.readRecord(r.Name)
	switch {
	case err == nil && sameOptions(have.Options, r.Options):
		return nil
	case err == nil:
		return fmt.Errorf("%w: it is there already with other options (%s); remove it first or choose another name", ErrInvalid, describe(have.Options))
	case !errors.Is(err, ErrNotFound):
		return err
	}
	if _, err := os.Lstat(m.volumeUpper(r.Name)); err == nil {
		return fmt.Errorf("%s holds what an earlier volume of this name wrote, and no record says over which version; move the folder away to begin anew", m.volumeUpper(r.Name))
	}
	r.Format, r.Created = recordFormat, time.Now().UTC().Truncate(time.Second)
	if r.Options == nil {
		r.Options = map[string]string{}
	}
	versions, err := m.resolve(o)
	if err != nil {
		return err
	}
	if err := m.checkMountable(ctx, versions, o); err != nil {
		return err
	}
	// Resolve and record in one breath, so that a removal sees either no
	// volume and no version, or both.
	return m.store.Shared(ctx, func() error {
		versions, err := m.resolve(o)
		if err != nil {
			return err
		}
		if !o.Catalog { // which keeps nothing
			if err := m.use(versions); err != nil {
				return err
			}
		}
		return m.writeRecord(r)
	})
}

// use tells other nodes of the store which versions this one needs. The caller
// is inside Shared.
func (m *Manager) use(versions []store.Version) error {
	for _, v := range versions {
		if err := m.store.Use(m.node, v.Digest); err != nil {
			return err
		}
	}
	return nil
}

// checkMountable refuses what no mount on this host could give. What a catalog
// shows is another thing each time.
func (m *Manager) checkMountable(ctx context.Context, versions []store.Version, o Options) error {
	if !o.ReadOnly {
		if err := overlay.CheckLimit(filepath.Join(m.state, uppersDir), m.limit(o)); err != nil {
			return fmt.Errorf("%w: %w", ErrInvalid, err)
		}
	}
	if o.Catalog {
		return nil
	}
	method, err := m.viewMethod(ctx)
	if err != nil {
		return err
	}
	tree, err := m.plan(versions, o)
	if err == nil {
		err = tree.Fits(method)
	}
	return err
}

func sameOptions(a, b map[string]string) bool {
	if len(a) != len(b) {
		return false
	}
	for k, v := range a {
		if w, ok := b[k]; !ok || v != w {
			return false
		}
	}
	return true
}

func describe(options map[string]string) string {
	var parts []string
	for k, v := range options {
		parts = append(parts, k+"="+v)
	}
	slices.Sort(parts)
	if len(parts) == 0 {
		return "none"
	}
	return strings.Join(parts, " ")
}

func (m *Manager) pull(ctx context.Context, o Options) error {
	if m.puller == nil {
		return errors.New("pull: this program cannot fetch models; run larder pull first")
	}
	for _, ref := range o.Models {
		if o.Pull == PullMissing {
			_, err := m.store.Resolve(ref)
			if err == nil {
				continue
			}
			if !errors.Is(err, store.ErrNotFound) {
				return err
			}
		}
		if err := m.puller.Pull(ctx, ref); err != nil {
			return err
		}
	}
	return nil
}

// resolve finds the versions that a volume's models mean now.
func (m *Manager) resolve(o Options) ([]store.Version, error) {
	if o.Catalog {
		return m.store.Versions()
	}
	out := make([]store.Version, 0, len(o.Models))
	for _, ref := range o.Models {
		v, err := m.store.Resolve(ref)
		if err != nil {
			return nil, err
		}
		out = append(out, v)
	}
	return out, nil
}

// Volume describes a volume.
type Volume struct {
	Name    string
	Options map[string]string
	Created time.Time
	Models  []ModelStatus // what a mount would show now; empty when Damaged
	Mounts  []Mounted
	Damaged string // why the record cannot be read; empty as a rule
	Missing string // why its models cannot be found; empty as a rule
}

// ModelStatus is one model of a volume.
type ModelStatus struct {
	Reference string
	Digest    digest.Digest
	Bytes     int64
	Files     int
}

// Mounted is one live mount.
type Mounted struct {
	Volume   string
	ID       string
	Target   string
	Versions []digest.Digest
	Since    time.Time
	Manual   bool
	Refs     int
	Leaving  bool
	Holders  []Holder // filled by Mounts only
}

// Get describes one volume. A volume that is known never gives an error for
// what is wrong with it: an engine that gets one while it starts forgets the
// volume's references.
func (m *Manager) Get(ctx context.Context, name string) (Volume, error) {
	if err := CheckName(name); err != nil {
		return Volume{}, err
	}
	r, err := m.readRecord(name)
	switch {
	case errors.Is(err, ErrNotFound):
		return Volume{}, err
	case err != nil:
		return Volume{Name: name, Damaged: err.Error()}, nil
	}
	v := Volume{Name: name, Options: r.Options, Created: r.Created}
	if v.Models, err = m.models(r); err != nil {
		v.Missing = err.Error()
	}
	mounts, err := m.readMounts(name)
	if err != nil {
		v.Damaged = err.Error()
	}
	for _, r := range mounts {
		v.Mounts = append(v.Mounts, mounted(r))
	}
	return v, ctx.Err()
}

func mounted(r mountRecord) Mounted {
	return Mounted{Volume: r.Volume, ID: r.ID, Target: r.Target, Versions: r.Versions, Since: r.Time, Manual: r.Manual, Refs: r.Refs, Leaving: r.Leaving}
}

func (m *Manager) models(r record) ([]ModelStatus, error) {
	o, err := ParseOptions(r.Name, r.Options)
	if err != nil {
		return nil, err
	}
	versions, err := m.versionsOf(r, o)
	if err != nil {
		return nil, err
	}
	out := make([]ModelStatus, 0, len(versions))
	for i, v := range versions {
		status := ModelStatus{Digest: v.Digest, Reference: nameOf(v, o, i)}
		if pack, err := m.store.Model(v.Digest); err == nil {
			status.Bytes, status.Files = pack.Size(), len(pack.Files)
		}
		out = append(out, status)
	}
	return out, nil
}

// nameOf is how a person knows the i-th version of a volume.
func nameOf(v store.Version, o Options, i int) string {
	if !o.Catalog && i < len(o.Models) {
		want := o.Models[i]
		if want.Fixed() {
			return want.String()
		}
		for _, ref := range v.References {
			if r, err := reference.Parse(ref); err == nil && r.Source() == want.Source() && r.Digest == "" {
				return ref
			}
		}
		return want.String()
	}
	if len(v.References) > 0 {
		return v.References[0]
	}
	return string(v.Digest)
}

// versionsOf gives the versions of a volume: those it is bound to, else those
// its models mean now.
func (m *Manager) versionsOf(r record, o Options) ([]store.Version, error) {
	if len(r.Pinned) == 0 {
		return m.resolve(o)
	}
	all, err := m.store.Versions()
	if err != nil {
		return nil, err
	}
	out := make([]store.Version, 0, len(r.Pinned))
	for _, d := range r.Pinned {
		at := slices.IndexFunc(all, func(v store.Version) bool { return v.Digest == d })
		if at < 0 {
			return nil, fmt.Errorf("version %s, to which the volume's writes belong: %w", d, store.ErrNotFound)
		}
		out = append(out, all[at])
	}
	return out, nil
}

// List gives the names of all volumes, sorted.
func (m *Manager) List(context.Context) ([]string, error) {
	return m.names(recordSuffix)
}

// Path is where a volume is mounted: the mount that its runs share, or the
// folder that has one mount for each run.
func (m *Manager) Path(name string) string { return filepath.Join(m.mnt, name) }

// State is the folder of this node's state.
func (m *Manager) State() string { return m.state }

// Node is this node's name in the store.
func (m *Manager) Node() string { return m.node }

func (m *Manager) volumeUpper(name string) string {
	return filepath.Join(m.state, uppersDir, "volume", name)
}

func (m *Manager) runUpper(name, id string) string {
	return filepath.Join(m.state, uppersDir, "run", name, id)
}

// plan lays out the view of versions.
func (m *Manager) plan(versions []store.Version, o Options) (view.Tree, error) {
	models, err := m.viewModels(versions, o)
	if err != nil {
		return view.Tree{}, err
	}
	return view.Plan(view.Spec{Layout: o.Layout, ReadOnly: o.ReadOnly, UID: o.UID, GID: o.GID, Mode: o.Mode, Catalog: o.Catalog, Models: models})
}

// viewModels gives what package view needs to know of versions.
func (m *Manager) viewModels(versions []store.Version, o Options) ([]view.Model, error) {
	out := make([]view.Model, 0, len(versions))
	for i, v := range versions {
		pack, err := m.store.Model(v.Digest)
		if err != nil {
			return nil, err
		}
		vm := view.Model{Digest: v.Digest, Pack: pack}
		vm.Repo, vm.Revisions = repoOf(v, o, i, pack)
		out = append(out, vm)
	}
	return out, nil
}

// repoOf gives the repository that a version belongs to, and the revisions by
// which it is known there.
func repoOf(v store.Version, o Options, i int, pack modelpack.Model) (repo string, revisions []string) {
	// The name that the user went by comes first, then the hub's, then any.
	if !o.Catalog && i < len(o.Models) && o.Models[i].Kind != reference.Digest {
		repo = o.Models[i].Repo
	}
	if source, err := reference.Parse(pack.Source); err == nil && source.Kind == reference.Hub && (repo == "" || o.Layout == view.HF) {
		repo = source.Repo
	}
	for _, ref := range v.References {
		r, err := reference.Parse(ref)
		if err != nil || r.Kind == reference.Digest {
			continue
		}
		if repo == "" {
			repo = r.Repo
		}
		if r.Repo != repo {
			continue
		}
		switch {
		case r.Kind == reference.Hub:
			revisions = append(revisions, r.Revision)
		case r.Tag != "":
			revisions = append(revisions, r.Tag)
		}
	}
	if repo == "" {
		repo = "model-" + v.Digest.Encoded()[:12]
	}
	return repo, revisions
}
