package store

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/larder-project/larder/internal/atomicfile"
	"github.com/larder-project/larder/internal/disk"
	"github.com/larder-project/larder/internal/modelpack"
)

// Files in a node's folder of leases.
const (
	ownerName = "owner" // which STATE folder speaks for the node
	aliveName = "alive" // flocked, shared, by the node's processes that stay; its time is when one last began
)

// Claim makes the STATE folder with this id the one that speaks for a node, or
// finds that it is. Two that spoke for one node would drop each other's
// records of use.
func (s *Store) Claim(node, id string) error {
	if err := CheckNode(node); err != nil {
		return fmt.Errorf("claim node: %w", err)
	}
	if id == "" {
		return fmt.Errorf("claim node %s: %w: the state folder's id is empty", node, ErrDamaged)
	}
	dir := s.path("leases", node)
	path := filepath.Join(dir, ownerName)
	for {
		have, err := os.ReadFile(path)
		if err == nil {
			owner := strings.TrimSpace(string(have))
			if owner != id && strings.HasPrefix(id, owner) {
				return fmt.Errorf("claim node %s: %w: %s was emptied or cut short; remove it if this is the node's only state folder", node, ErrDamaged, path)
			}
			if owner != id {
				return fmt.Errorf("claim node %s: %w by another state folder; give this one a name of its own (--node), or, if the other is gone for good, run larder node forget %s", node, ErrInUse, node)
			}
			return nil
		}
		if !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("claim node %s: %w", node, err)
		}
		if err := disk.MkdirAll(dir, 0o755); err != nil {
			return fmt.Errorf("claim node %s: %w", node, err)
		}
		// Written aside and then given its name only if nobody has it: of two
		// that begin at the same time, one wins.
		aside := filepath.Join(dir, fmt.Sprintf("%s%d-%s", atomicfile.TempPrefix, os.Getpid(), randomID()))
		if err := atomicfile.Write(aside, []byte(id+"\n"), 0o644); err != nil {
			return fmt.Errorf("claim node %s: %w", node, err)
		}
		err = disk.RenameNoReplace(aside, path)
		if err != nil {
			err = errors.Join(ignoreExists(err), ignoreAbsent(disk.Remove(aside)))
		} else {
			err = disk.SyncDir(dir)
		}
		if err != nil {
			return fmt.Errorf("claim node %s: %w", node, err)
		}
	}
}

func ignoreExists(err error) error {
	if errors.Is(err, fs.ErrExist) {
		return nil
	}
	return err
}

// Attend shows other nodes that this one is alive, for as long as the process
// lives or until release is called. It is what keeps a node that works from
// being forgotten; nothing else rests on it.
func (s *Store) Attend(ctx context.Context, node string) (release func(), err error) {
	if err := CheckNode(node); err != nil {
		return nil, fmt.Errorf("attend node: %w", err)
	}
	var f *disk.File
	err = s.Shared(ctx, func() (err error) {
		dir := s.path("leases", node)
		if err := disk.MkdirAll(dir, 0o755); err != nil {
			return err
		}
		path := filepath.Join(dir, aliveName)
		if f, err = disk.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o644); err != nil {
			return err
		}
		if ok, err := f.Lock(false); err != nil || !ok {
			_ = f.Close()
			return errors.Join(err, errors.New("its file is locked"))
		}
		return disk.Touch(path, s.now())
	})
	if err != nil {
		return nil, fmt.Errorf("attend node %s: %w", node, err)
	}
	return func() { _ = f.Close() }, nil
}

// Node is a node that has used the store.
type Node struct {
	Name     string
	Alive    bool      // one of its processes runs
	Seen     time.Time // when one last began, or zero
	Versions []digest.Digest
}

// Nodes lists all nodes that have used the store, by name.
func (s *Store) Nodes() ([]Node, error) {
	entries, err := os.ReadDir(s.path("leases"))
	if err != nil {
		return nil, fmt.Errorf("read nodes: %w", err)
	}
	users, err := s.Users()
	if err != nil {
		return nil, err
	}
	var out []Node
	for _, e := range entries {
		n := Node{Name: e.Name()}
		// For writing: NFS gives an exclusive lock on no other file.
		f, err := disk.OpenFile(s.path("leases", e.Name(), aliveName), os.O_RDWR, 0)
		n.Alive = err != nil && !errors.Is(err, fs.ErrNotExist) // as far as can be told
		if err == nil {
			free, err := f.Lock(true)
			n.Alive = err != nil || !free
			if fi, err := f.Stat(); err == nil {
				n.Seen = fi.ModTime()
			}
			_ = f.Close()
		}
		for d, nodes := range users {
			if slices.Contains(nodes, e.Name()) {
				n.Versions = append(n.Versions, d)
			}
		}
		slices.Sort(n.Versions)
		out = append(out, n)
	}
	return out, nil
}

// ForgetNode drops all that a node has said it uses: for one that is gone for
// good, whose word would keep versions for ever. A node of which a process
// runs, and one whose pull is under way, is refused with ErrInUse.
func (s *Store) ForgetNode(ctx context.Context, node string) error {
	if err := CheckNode(node); err != nil {
		return fmt.Errorf("forget node: %w", err)
	}
	return s.Exclusive(ctx, func(*Exclusive) error {
		nodes, err := s.Nodes()
		if err != nil {
			return err
		}
		at := slices.IndexFunc(nodes, func(n Node) bool { return n.Name == node })
		if at < 0 {
			return fmt.Errorf("forget node %s: %w; larder node ls lists those that are", node, ErrNotFound)
		}
		if nodes[at].Alive {
			return fmt.Errorf("forget node %s: %w: a process of it runs; stop larder-plugin and larder-sidecar there first", node, ErrInUse)
		}
		leased, err := s.leased() // drops those of dead owners
		if err != nil {
			return err
		}
		for _, name := range leased {
			if strings.HasPrefix(name, node+"/") {
				return fmt.Errorf("forget node %s: %w: it holds the lease %s", node, ErrInUse, name)
			}
		}
		if err := disk.RemoveAll(s.path("leases", node)); err != nil {
			return fmt.Errorf("forget node %s: %w", node, err)
		}
		if err := disk.RemoveAll(s.path("usage", node)); err != nil {
			return fmt.Errorf("forget node %s: %w", node, err)
		}
		return disk.SyncDir(s.path("leases"))
	})
}

// Use records durably that this node's volumes use a version. It is cheap when
// the record is there already. The caller is inside Shared.
func (s *Store) Use(node string, version digest.Digest) error {
	if err := errors.Join(CheckNode(node), modelpack.CheckDigest(version)); err != nil {
		return fmt.Errorf("record use: %w", err)
	}
	path := s.path("leases", node, version.Encoded())
	if fi, err := os.Lstat(path); err == nil && fi.Size() > 0 {
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
	defer f.Close()
	if err := errors.Join(disk.SyncDir(dir), disk.SyncDir(filepath.Dir(dir))); err != nil {
		return fmt.Errorf("record use of %s: %w", version, err)
	}
	// A byte in it says that its name is durable: the next call, perhaps of
	// another process, need not make sure.
	if _, err := f.WriteAt([]byte("\n"), 0); err != nil {
		return fmt.Errorf("record use of %s: %w", version, full(err))
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

// TouchUsage notes that a version is being used on a node, by the time of
// change of a file. It is statistics: a failure loses nothing, and a clock that
// was set back takes nothing back.
func (s *Store) TouchUsage(node string, version digest.Digest) { s.touch(node, version.Encoded()) }

// TouchPulled notes likewise that somebody has asked for a version to be in the
// store that was there already: by pulling, importing or naming it again.
func (s *Store) TouchPulled(node string, version digest.Digest) {
	if CheckNode(node) == nil {
		s.touch(node, version.Encoded()+pulledSuffix)
	}
}

const pulledSuffix = ".pulled"

func (s *Store) touch(node, name string) {
	path := s.path("usage", node, name)
	now := s.now()
	fi, err := os.Lstat(path)
	if err == nil && fi.ModTime().After(now) {
		return
	}
	if errors.Is(err, fs.ErrNotExist) {
		if err := disk.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			return
		}
		f, err := disk.OpenFile(path, os.O_WRONLY|os.O_CREATE, 0o644)
		if err != nil {
			return
		}
		_ = f.Close()
	}
	_ = disk.Touch(path, now)
}

// LastSeen is when each version was last mounted, unmounted or seen in use, and
// when it was last asked for again (see TouchPulled), on any node. A version
// that is not in a map never was.
func (s *Store) LastSeen() (used, pulled map[digest.Digest]time.Time, err error) {
	used, pulled = map[digest.Digest]time.Time{}, map[digest.Digest]time.Time{}
	nodes, err := os.ReadDir(s.path("usage"))
	if err != nil {
		return nil, nil, fmt.Errorf("read usage: %w", err)
	}
	for _, node := range nodes {
		entries, err := os.ReadDir(s.path("usage", node.Name()))
		if err != nil {
			return nil, nil, fmt.Errorf("read usage: %w", err)
		}
		for _, e := range entries {
			out := used
			name, ok := strings.CutSuffix(e.Name(), pulledSuffix)
			if ok {
				out = pulled
			}
			if !isBlobName(name) {
				continue
			}
			fi, err := e.Info()
			if errors.Is(err, fs.ErrNotExist) {
				continue
			}
			if err != nil {
				return nil, nil, fmt.Errorf("read usage: %w", err)
			}
			d := digest.NewDigestFromEncoded(digest.SHA256, name)
			if fi.ModTime().After(out[d]) {
				out[d] = fi.ModTime()
			}
		}
	}
	return used, pulled, nil
}

// ForgetUsage drops what is noted of versions that are neither in the store nor
// in the trash: statistics that nobody asks for any more.
func (x *Exclusive) ForgetUsage() error {
	known := map[string]bool{}
	for _, d := range x.index.Manifests {
		known[d.Digest.Encoded()] = true
	}
	removals, err := x.s.Trash()
	if err != nil {
		return err
	}
	for _, r := range removals {
		for _, d := range r.References {
			known[d.Digest.Encoded()] = true
		}
	}
	nodes, err := os.ReadDir(x.s.path("usage"))
	if err != nil {
		return fmt.Errorf("read usage: %w", err)
	}
	for _, node := range nodes {
		entries, err := os.ReadDir(x.s.path("usage", node.Name()))
		if err != nil {
			return fmt.Errorf("read usage: %w", err)
		}
		for _, e := range entries {
			if !known[strings.TrimSuffix(e.Name(), pulledSuffix)] {
				if err := ignoreAbsent(disk.Remove(x.s.path("usage", node.Name(), e.Name()))); err != nil {
					return fmt.Errorf("forget usage: %w", err)
				}
			}
		}
	}
	return nil
}
