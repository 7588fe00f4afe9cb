package store

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
	"regexp"
	"strings"
	"sync"
	"time"

	"github.com/gofrs/flock"
	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/larder-project/larder/internal/atomicfile"
	"github.com/larder-project/larder/internal/disk"
	"github.com/larder-project/larder/internal/modelpack"
)

// What can be wrong. Errors of this package wrap one of these where a caller
// may want to tell them apart.
var (
	ErrNotFound = errors.New("not in the store")
	ErrInUse    = errors.New("in use")
	ErrDamaged  = errors.New("damaged")
	ErrFull     = errors.New("no space left in the store")
	ErrNotStore = errors.New("not a Larder store")
)

// Store is an open store. It holds no lock and no state but caches; any number
// of processes may have the same folder open. Its methods are safe for
// concurrent use.
type Store struct {
	dir     string
	now     func() time.Time
	network bool // other nodes may have its file system mounted

	mu     sync.Mutex
	index  cachedIndex
	models map[digest.Digest]modelpack.Model
}

// Option is an option of Open.
type Option func(*Store)

// WithClock sets the clock by which the store notes when versions came and were
// used. Nothing but these notes follows it.
func WithClock(now func() time.Time) Option { return func(s *Store) { s.now = now } }

// The folder of blobs below Dir, and of SHA-256 blobs below that.
const (
	blobsName  = "blobs"
	sha256Name = "sha256"
)

// Open opens the store in dir, and makes it where dir is missing or empty. A
// folder with other content is refused with ErrNotStore.
func Open(dir string, options ...Option) (*Store, error) {
	dir, err := filepath.Abs(dir)
	if err != nil {
		return nil, fmt.Errorf("open store: %w", err)
	}
	s := &Store{dir: dir, now: time.Now, models: map[digest.Digest]modelpack.Model{}}
	for _, o := range options {
		o(s)
	}
	data, err := os.ReadFile(s.path(v1.ImageLayoutFile))
	switch {
	case errors.Is(err, fs.ErrNotExist):
		if err := s.create(); err != nil {
			return nil, fmt.Errorf("create store %s: %w", dir, err)
		}
	case err != nil:
		return nil, fmt.Errorf("open store: %w", err)
	default:
		var layout v1.ImageLayout
		if err := json.Unmarshal(data, &layout); err != nil || layout.Version != v1.ImageLayoutVersion {
			return nil, fmt.Errorf("open store: %w: %s says %.100q, expected version %s", ErrDamaged, s.path(v1.ImageLayoutFile), data, v1.ImageLayoutVersion)
		}
	}
	if err := s.checkNetwork(); err != nil {
		return nil, fmt.Errorf("open store: %w", err)
	}
	return s, nil
}

func (s *Store) create() error {
	entries, err := os.ReadDir(s.dir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	for _, e := range entries {
		switch e.Name() {
		case "lock", blobsName, "ingest", "leases", "usage", trashName, pinsName, reserveName, "lost+found", v1.ImageIndexFile, copyName:
		case v1.ImageLayoutFile: // another process has just finished the same work
		default:
			if !atomicfile.IsTemp(e.Name()) {
				return fmt.Errorf("%w: it contains %s; choose an empty folder or an existing store", ErrNotStore, e.Name())
			}
		}
	}
	if err := disk.MkdirAll(s.dir, 0o755); err != nil {
		return err
	}
	unlock, err := s.lock(context.Background(), true)
	if err != nil {
		return err
	}
	defer unlock()
	for _, d := range []string{blobsName, blobsName + "/" + sha256Name, "ingest", "leases", "usage", trashName, pinsName} {
		if err := disk.MkdirAll(s.path(d), 0o755); err != nil {
			return err
		}
	}
	for _, d := range []string{blobsName, "."} {
		if err := disk.SyncDir(s.path(d)); err != nil {
			return err
		}
	}
	// Another process may have finished the same work while this one waited.
	if _, err := os.Stat(s.path(v1.ImageIndexFile)); errors.Is(err, fs.ErrNotExist) {
		// A store that has lost its files at the top is none to begin anew.
		blobs, readErr := os.ReadDir(s.path(blobsName, sha256Name))
		if readErr != nil {
			return readErr
		}
		if len(blobs) > 0 {
			return s.noIndex(err)
		}
		if err := s.writeIndex(emptyIndex()); err != nil {
			return err
		}
	}
	if _, err := os.Stat(s.path(v1.ImageLayoutFile)); err == nil {
		return nil
	}
	if err := s.keepReserve(); err != nil {
		return err
	}
	data, err := json.Marshal(v1.ImageLayout{Version: v1.ImageLayoutVersion})
	if err != nil {
		return err
	}
	// Last: only a store that is complete can be opened.
	return atomicfile.Write(s.path(v1.ImageLayoutFile), data, 0o644)
}

// Dir is the store's folder, absolute.
func (s *Store) Dir() string { return s.dir }

// BlobsDir is the folder that holds sha256/HEX, the lower layer of all views.
func (s *Store) BlobsDir() string { return s.path(blobsName) }

// BlobPath is where the blob of a digest is, or would be.
func (s *Store) BlobPath(d digest.Digest) string {
	return s.path(blobsName, sha256Name, d.Encoded())
}

func (s *Store) path(elem ...string) string {
	return filepath.Join(append([]string{s.dir}, elem...)...)
}

const lockRetry = 2 * time.Millisecond

// lock takes DIR/lock and returns what releases it.
func (s *Store) lock(ctx context.Context, exclusive bool) (func(), error) {
	l := flock.New(s.path("lock"), flock.SetPermissions(0o644))
	var err error
	if exclusive {
		_, err = l.TryLockContext(ctx, lockRetry)
	} else {
		_, err = l.TryRLockContext(ctx, lockRetry)
	}
	if err != nil {
		return nil, fmt.Errorf("lock store %s: %w", s.dir, err)
	}
	return func() { _ = l.Close() }, nil
}

// Shared runs f while nobody can remove anything from the store. f resolves
// what it needs and records that it is used; it must be short.
func (s *Store) Shared(ctx context.Context, f func() error) error {
	unlock, err := s.lock(ctx, false)
	if err != nil {
		return err
	}
	defer unlock()
	return f()
}

// Stat tells whether a blob is there and how many bytes it has.
func (s *Store) Stat(d digest.Digest) (size int64, ok bool, err error) {
	if err := modelpack.CheckDigest(d); err != nil {
		return 0, false, err
	}
	fi, err := os.Lstat(s.BlobPath(d))
	if errors.Is(err, fs.ErrNotExist) {
		return 0, false, nil
	}
	if err != nil {
		return 0, false, fmt.Errorf("look up blob %s: %w", d, err)
	}
	if !fi.Mode().IsRegular() {
		return 0, false, fmt.Errorf("look up blob %s: %w: %s is not a regular file", d, ErrDamaged, s.BlobPath(d))
	}
	return fi.Size(), true, nil
}

// readBlob reads a small blob and checks it against its digest.
func (s *Store) readBlob(d digest.Digest, limit int64) ([]byte, error) {
	if err := modelpack.CheckDigest(d); err != nil {
		return nil, err
	}
	return readChecked(s.BlobPath(d), d, limit)
}

// readChecked reads a file and checks it against a digest.
func readChecked(path string, d digest.Digest, limit int64) ([]byte, error) {
	fi, err := os.Lstat(path)
	if err == nil && fi.Size() > limit {
		return nil, fmt.Errorf("read blob %s: %w: it has %d bytes, at most %d are read", d, ErrDamaged, fi.Size(), limit)
	}
	data, err := os.ReadFile(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil, fmt.Errorf("read blob %s: %w", d, ErrNotFound)
	case err != nil:
		return nil, fmt.Errorf("read blob %s: %w", d, err)
	case digest.FromBytes(data) != d:
		return nil, fmt.Errorf("read blob %s: %w: its bytes have digest %s", d, ErrDamaged, digest.FromBytes(data))
	}
	return data, nil
}

// Model is the version with this manifest digest. The manifest is checked
// against the digest each time it comes from the disk.
func (s *Store) Model(d digest.Digest) (modelpack.Model, error) {
	s.mu.Lock()
	m, ok := s.models[d]
	s.mu.Unlock()
	if ok {
		// A cached manifest must not outlive its blob.
		if _, there, err := s.Stat(d); err != nil || there {
			return m, err
		}
	}
	data, err := s.readBlob(d, modelpack.MaxManifestBytes)
	if err != nil {
		return modelpack.Model{}, fmt.Errorf("manifest: %w", err)
	}
	m, _, err = modelpack.Parse(data)
	if err != nil {
		return modelpack.Model{}, fmt.Errorf("manifest %s: %w", d, err)
	}
	s.mu.Lock()
	if len(s.models) >= maxCachedModels {
		clear(s.models)
	}
	s.models[d] = m
	s.mu.Unlock()
	return m, nil
}

// Enough for the versions a node mounts; a large one has some thousand files.
const maxCachedModels = 256

// ByGitOID maps the git object id of every small file in the store to the
// file, so that a pull can find by it what the store already has. Entries are
// hints: lease the digest, then look.
func (s *Store) ByGitOID() (map[string]modelpack.File, error) {
	versions, err := s.Versions()
	if err != nil {
		return nil, err
	}
	out := map[string]modelpack.File{}
	for _, v := range versions {
		m, err := s.Model(v.Digest)
		if err != nil {
			continue // a hint less; verify names what is damaged
		}
		for _, f := range m.Files {
			if f.GitOID != "" {
				out[f.GitOID] = f
			}
		}
	}
	return out, nil
}

var nodeName = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$`)

// CheckNode refuses names that cannot be a folder of leases.
func CheckNode(node string) error {
	if !nodeName.MatchString(node) {
		return fmt.Errorf("node name %.100q: use letters, digits, '.', '_' and '-', at most 63", node)
	}
	return nil
}

func randomID() string {
	var b [8]byte
	_, _ = rand.Read(b[:]) // never fails: crypto/rand ends the process instead
	return hex.EncodeToString(b[:])
}

func ignoreAbsent(err error) error {
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}

func isBlobName(name string) bool {
	return len(name) == 64 && strings.Trim(name, "0123456789abcdef") == ""
}

// Manifest is the bytes of a manifest, checked against its digest. What they
// say is not looked at.
func (s *Store) Manifest(d digest.Digest) ([]byte, error) {
	return s.readBlob(d, modelpack.MaxManifestBytes)
}
