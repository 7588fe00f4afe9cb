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
	size int64 // of the file, which ends with a whole line
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
		n, err := l.file.Write([]byte(text.String()))
		if err != nil && n > 0 {
			// Half a line would be read as damage, and stop every removal.
			err = errors.Join(err, l.file.Truncate(l.size))
		}
		if err == nil {
			l.size += int64(n)
		}
		if err == nil && l.s.network {
			err = l.file.Sync() // NFS sends it at the latest then
		}
		return full(err)
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

// LiveLease is a lease whose owner lives.
type LiveLease struct {
	Node    string
	Purpose string    // "pull", "import"
	Since   time.Time // when it last came to hold more
	Digests int       // so many it holds
}

// Leases lists the leases whose owners live.
func (x *Exclusive) Leases() ([]LiveLease, error) {
	var out []LiveLease
	err := x.s.eachLease(func(node, name string, since time.Time, digests []digest.Digest) {
		purpose, _, _ := strings.Cut(name, "-")
		out = append(out, LiveLease{Node: node, Purpose: purpose, Since: since, Digests: len(digests)})
	})
	return out, err
}

// leased gathers the digests of all leases whose owner lives, with the lease's
// name. The caller holds the lock exclusively. A lease that cannot be read is
// an error: then nothing may be removed.
func (s *Store) leased() (map[digest.Digest]string, error) {
	out := map[digest.Digest]string{}
	err := s.eachLease(func(node, name string, _ time.Time, digests []digest.Digest) {
		for _, d := range digests {
			out[d] = node + "/" + name
		}
	})
	return out, err
}

// eachLease reads the leases whose owner lives, and drops those of dead owners.
func (s *Store) eachLease(f func(node, name string, since time.Time, digests []digest.Digest)) error {
	nodes, err := os.ReadDir(s.path("leases"))
	if err != nil {
		return fmt.Errorf("read leases: %w", err)
	}
	for _, node := range nodes {
		entries, err := os.ReadDir(s.path("leases", node.Name()))
		if err != nil {
			return fmt.Errorf("read leases: %w", err)
		}
		for _, e := range entries {
			if !strings.HasSuffix(e.Name(), leaseSuffix) {
				continue
			}
			digests, since, live, err := readLease(s.path("leases", node.Name(), e.Name()))
			if err != nil {
				return fmt.Errorf("read lease %s/%s: %w", node.Name(), e.Name(), err)
			}
			if live {
				f(node.Name(), e.Name(), since, digests)
			}
		}
	}
	return nil
}

// readLease reads what a lease holds; live is false where it is nobody's any
// more.
func readLease(path string) (digests []digest.Digest, since time.Time, live bool, err error) {
	f, err := disk.OpenFile(path, os.O_RDONLY, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, since, false, nil // released just now
	}
	if err != nil {
		return nil, since, false, err
	}
	defer f.Close()
	dead, err := f.Lock(false)
	if err != nil {
		return nil, since, false, err
	}
	if dead {
		return nil, since, false, ignoreAbsent(disk.Remove(path))
	}
	fi, err := f.Stat()
	if err != nil {
		return nil, since, false, err
	}
	lines := bufio.NewScanner(f)
	for lines.Scan() {
		d := digest.Digest(lines.Text())
		if err := modelpack.CheckDigest(d); err != nil {
			return nil, since, false, fmt.Errorf("%w: %w", ErrDamaged, err)
		}
		digests = append(digests, d)
	}
	return digests, fi.ModTime(), true, lines.Err()
}
