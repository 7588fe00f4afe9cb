package store

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/larder-project/larder/internal/atomicfile"
	"github.com/larder-project/larder/internal/disk"
	"github.com/larder-project/larder/internal/modelpack"
)

const leaseSuffix = ".lease"

// Lease keeps digests from being collected for as long as this process lives
// and has not released it.
type Lease struct {
	s    *Store
	path string

	mu   sync.Mutex
	file *disk.File
	held map[digest.Digest]bool
}

// NewLease makes an empty lease. node is the name of this node, purpose a word
// that tells a person what holds it, such as "pull".
func (s *Store) NewLease(ctx context.Context, node, purpose string) (*Lease, error) {
	if err := errors.Join(CheckNode(node), CheckNode(purpose)); err != nil {
		return nil, fmt.Errorf("make lease: %w", err)
	}
	l := &Lease{s: s, held: map[digest.Digest]bool{}}
	// Under the lock, so that no collector meets the file before its flock.
	err := s.Shared(ctx, func() error {
		dir := s.path("leases", node)
		if err := disk.MkdirAll(dir, 0o755); err != nil {
			return err
		}
		l.path = filepath.Join(dir, fmt.Sprintf("%s-%d-%s%s", purpose, os.Getpid(), randomID(), leaseSuffix))
		f, err := disk.Create(l.path, 0o644)
		if err != nil {
			return err
		}
		if ok, err := f.Lock(true); err != nil || !ok {
			_ = f.Close()
			return fmt.Errorf("lock %s: taken by another process (%w)", l.path, err)
		}
		l.file = f
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("make lease: %w", err)
	}
	return l, nil
}

// Hold adds digests to the lease. Only after it has returned may the caller
// look whether their blobs are there.
func (l *Lease) Hold(ctx context.Context, digests ...digest.Digest) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.file == nil {
		return errors.New("hold digest: the lease is released")
	}
	var text strings.Builder
	fresh := make([]digest.Digest, 0, len(digests))
	for _, d := range digests {
		if err := modelpack.CheckDigest(d); err != nil {
			return fmt.Errorf("hold digest: %w", err)
		}
		if !l.held[d] {
			fresh = append(fresh, d)
			text.WriteString(string(d))
			text.WriteByte('\n')
		}
	}
	if len(fresh) == 0 {
		return nil
	}
	err := l.s.Shared(ctx, func() error {
		_, err := l.file.Write([]byte(text.String()))
		return err
	})
	if err != nil {
		return fmt.Errorf("hold digest: %w", err)
	}
	for _, d := range fresh {
		l.held[d] = true
	}
	return nil
}

// Release ends the lease.
func (l *Lease) Release() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.file == nil {
		return nil
	}
	err := ignoreAbsent(disk.Remove(l.path))
	err = errors.Join(err, l.file.Close())
	l.file = nil
	return err
}

// leased gathers the digests of all leases whose owner lives, with the lease's
// name, and drops those of dead owners. The caller holds the lock exclusively.
// A lease that cannot be read is an error: then nothing may be removed.
func (s *Store) leased() (map[digest.Digest]string, error) {
	out := map[digest.Digest]string{}
	nodes, err := os.ReadDir(s.path("leases"))
	if err != nil {
		return nil, fmt.Errorf("read leases: %w", err)
	}
	for _, node := range nodes {
		entries, err := os.ReadDir(s.path("leases", node.Name()))
		if err != nil {
			return nil, fmt.Errorf("read leases: %w", err)
		}
		for _, e := range entries {
			if !strings.HasSuffix(e.Name(), leaseSuffix) {
				continue
			}
			if err := readLease(s.path("leases", node.Name(), e.Name()), node.Name()+"/"+e.Name(), out); err != nil {
				return nil, fmt.Errorf("read lease %s/%s: %w", node.Name(), e.Name(), err)
			}
		}
	}
	return out, nil
}

func readLease(path, name string, out map[digest.Digest]string) error {
	f, err := disk.OpenFile(path, os.O_RDONLY, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return nil // released just now
	}
	if err != nil {
		return err
	}
	defer f.Close()
	dead, err := f.Lock(false)
	if err != nil {
		return err
	}
	if dead {
		return ignoreAbsent(disk.Remove(path))
	}
	lines := bufio.NewScanner(f)
	for lines.Scan() {
		d := digest.Digest(lines.Text())
		if err := modelpack.CheckDigest(d); err != nil {
			return fmt.Errorf("%w: %w", ErrDamaged, err)
		}
		out[d] = name
	}
	return lines.Err()
}

// Use records durably that this node's volumes use a version. It is cheap when
// the record is there already. The caller is inside Shared.
func (s *Store) Use(node string, version digest.Digest) error {
	if err := errors.Join(CheckNode(node), modelpack.CheckDigest(version)); err != nil {
		return fmt.Errorf("record use: %w", err)
	}
	path := s.path("leases", node, version.Encoded())
	if _, err := os.Lstat(path); err == nil {
		return nil
	}
	dir := filepath.Dir(path)
	if err := disk.MkdirAll(dir, 0o755); err != nil {
		return fmt.Errorf("record use of %s: %w", version, err)
	}
	f, err := disk.OpenFile(path, os.O_WRONLY|os.O_CREATE, 0o644)
	if err != nil {
		return fmt.Errorf("record use of %s: %w", version, err)
	}
	if err := f.Close(); err != nil {
		return fmt.Errorf("record use of %s: %w", version, err)
	}
	if err := errors.Join(disk.SyncDir(dir), disk.SyncDir(filepath.Dir(dir))); err != nil {
		return fmt.Errorf("record use of %s: %w", version, err)
	}
	return nil
}

// Users maps each version in use on some node to the names of those nodes.
func (s *Store) Users() (map[digest.Digest][]string, error) {
	out := map[digest.Digest][]string{}
	nodes, err := os.ReadDir(s.path("leases"))
	if err != nil {
		return nil, fmt.Errorf("read node leases: %w", err)
	}
	for _, node := range nodes {
		entries, err := os.ReadDir(s.path("leases", node.Name()))
		if err != nil {
			return nil, fmt.Errorf("read node leases: %w", err)
		}
		for _, e := range entries {
			if isBlobName(e.Name()) {
				d := digest.NewDigestFromEncoded(digest.SHA256, e.Name())
				out[d] = append(out[d], node.Name())
			}
		}
	}
	return out, nil
}

// ownerName is the file in a node's folder of leases that says which STATE
// folder speaks for the node.
const ownerName = "owner"

// Claim makes the STATE folder with this id the one that speaks for a node, or
// finds that it is. Two that spoke for one node would drop each other's
// records of use.
func (s *Store) Claim(node, id string) error {
	if err := CheckNode(node); err != nil {
		return fmt.Errorf("claim node: %w", err)
	}
	path := s.path("leases", node, ownerName)
	have, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		if err := disk.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			return fmt.Errorf("claim node %s: %w", node, err)
		}
		if err := atomicfile.Write(path, []byte(id+"\n"), 0o644); err != nil {
			return fmt.Errorf("claim node %s: %w", node, err)
		}
		return nil
	}
	if err != nil {
		return fmt.Errorf("claim node %s: %w", node, err)
	}
	if strings.TrimSpace(string(have)) != id {
		return fmt.Errorf("claim node %s: %w by another state folder; give this one a name of its own (--node), or, if the other is gone for good, remove %s", node, ErrInUse, path)
	}
	return nil
}

// TouchUsage notes that a version is being used on a node, by the time of
// change of a file. It is statistics: a failure loses nothing.
func (s *Store) TouchUsage(node string, version digest.Digest) {
	path := s.path("usage", node, version.Encoded())
	now := time.Now()
	if err := disk.Touch(path, now); !errors.Is(err, fs.ErrNotExist) {
		return
	}
	if err := disk.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return
	}
	if f, err := disk.OpenFile(path, os.O_WRONLY|os.O_CREATE, 0o644); err == nil {
		_ = f.Close()
	}
}

// LastUsed is when a version was last mounted or unmounted on any node, or the
// zero time.
func (s *Store) LastUsed(version digest.Digest) (time.Time, error) {
	nodes, err := os.ReadDir(s.path("usage"))
	if err != nil {
		return time.Time{}, fmt.Errorf("read usage: %w", err)
	}
	var last time.Time
	for _, node := range nodes {
		fi, err := os.Lstat(s.path("usage", node.Name(), version.Encoded()))
		if err == nil && fi.ModTime().After(last) {
			last = fi.ModTime()
		}
	}
	return last, nil
}
