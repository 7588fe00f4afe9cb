package store

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/time/rate"

	"github.com/larder-project/larder/internal/atomicfile"
	"github.com/larder-project/larder/internal/disk"
)

// Blob is a blob with its size in bytes.
type Blob struct {
	Digest digest.Digest `json:"digest"`
	Size   int64         `json:"size"`
}

// Removal is the record of one removal, kept beside what it removed. It is
// what undo works from.
type Removal struct {
	ID     string    `json:"id"`
	Time   time.Time `json:"time"`
	Node   string    `json:"node,omitempty"` // that removed
	By     string    `json:"by,omitempty"`   // rm, prune, unfinished
	Reason string    `json:"reason"`         // of the whole, for a person
	// Versions tells for each version that went why it did.
	Versions   []RemovedVersion `json:"versions,omitempty"`
	References []v1.Descriptor  `json:"references"` // entries taken from index.json
	Blobs      []Blob           `json:"blobs"`      // taken from blobs/, manifests first
}

// RemovedVersion is a version that went with its last reference.
type RemovedVersion struct {
	Digest     digest.Digest `json:"digest"`
	Model      string        `json:"model,omitempty"`
	References []string      `json:"references"`
	Reason     string        `json:"reason,omitempty"` // a word: unused, superseded, pressure
	Rule       string        `json:"rule,omitempty"`   // of the policy
	Why        string        `json:"why,omitempty"`    // for a person
	Bytes      int64         `json:"bytes"`            // that went with it
}

// Size is the sum of the blobs' sizes, in bytes.
func (r Removal) Size() int64 {
	var n int64
	for _, b := range r.Blobs {
		n += b.Size
	}
	return n
}

// The record of a removal is the file trash/ID/NAME. Its name says how far the
// removal is.
const (
	pendingName = "pending.json" // being carried out
	removalName = "removal.json" // everything it lists is in its folder; can be undone
	goneName    = "gone.json"    // being deleted for good; cannot be undone
)

const trashName = "trash"

func (s *Store) trashDir(id string) string { return s.path(trashName, id) }

// Trash lists the removals that can be undone, oldest first.
func (s *Store) Trash() ([]Removal, error) { return s.removals(removalName) }

func (s *Store) removals(record string) ([]Removal, error) {
	folders, err := s.trashFolders()
	if err != nil {
		return nil, err
	}
	var out []Removal
	for _, id := range folders {
		path := filepath.Join(s.trashDir(id), record)
		data, err := os.ReadFile(path)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("read trash: %w", err)
		}
		var r Removal
		if err := json.Unmarshal(data, &r); err != nil || r.ID != id {
			return nil, fmt.Errorf("read %s: %w: it is not the record of a removal; move its folder away to go on without it", path, ErrDamaged)
		}
		out = append(out, r)
	}
	slices.SortStableFunc(out, func(a, b Removal) int { return a.Time.Compare(b.Time) })
	return out, nil
}

// trashFolders lists the folders of removals.
func (s *Store) trashFolders() ([]string, error) {
	entries, err := os.ReadDir(s.path(trashName))
	if err != nil {
		return nil, fmt.Errorf("read trash: %w", err)
	}
	var out []string
	for _, e := range entries {
		if e.IsDir() {
			out = append(out, e.Name())
		}
	}
	return out, nil
}

func (s *Store) writeRemoval(r Removal, record string) error {
	data, err := json.Marshal(r)
	if err != nil {
		return fmt.Errorf("write the record of removal %s: %w", r.ID, err)
	}
	if err := atomicfile.Write(filepath.Join(s.trashDir(r.ID), record), data, 0o644); err != nil {
		return fmt.Errorf("write the record of removal %s: %w", r.ID, full(err))
	}
	return nil
}

// Condemn makes the chosen removals ones that cannot be undone; Shred then
// deletes their files. Blobs that another removal needs to be undone are
// handed over to it first. It goes one by one, so that after a crash whatever
// is still a removal can be undone. It also sweeps folders that have no record,
// which a crash left empty.
func (x *Exclusive) Condemn(choose func(Removal) bool) ([]Removal, error) {
	left, err := x.s.Trash()
	if err != nil {
		return nil, err
	}
	var gone []Removal
	for _, r := range slices.Clone(left) {
		if !choose(r) {
			continue
		}
		left = slices.DeleteFunc(left, func(o Removal) bool { return o.ID == r.ID })
		if err := x.handOver(r, left); err != nil {
			return gone, fmt.Errorf("empty trash: %w", err)
		}
		dir := x.s.trashDir(r.ID)
		if err := disk.Rename(filepath.Join(dir, removalName), filepath.Join(dir, goneName)); err != nil {
			return gone, fmt.Errorf("empty trash: %w", err)
		}
		gone = append(gone, r)
		if err := disk.SyncDir(dir); err != nil {
			return gone, fmt.Errorf("empty trash: %w", err)
		}
		x.s.note(Event{Event: Deleted, Removal: r.ID, Time: x.s.now(), Bytes: r.Size(), Versions: r.Versions, Reason: r.Reason, By: r.By})
	}
	return gone, x.s.sweepTrash()
}

// handOver moves blobs of a removal to the heirs that need them: two versions
// may share a blob, and then it lies with the one that was removed last. What
// lies in the folder counts, not what the record lists: an earlier hand-over
// may have been cut short.
func (x *Exclusive) handOver(r Removal, heirs []Removal) error {
	if len(heirs) == 0 {
		return nil
	}
	dir := x.s.trashDir(r.ID)
	entries, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	for i := range heirs {
		heir := &heirs[i]
		needed, err := x.s.neededBy(*heir)
		if err != nil {
			return err
		}
		taken := false
		for _, e := range entries {
			d := digest.NewDigestFromEncoded(digest.SHA256, e.Name())
			if !isBlobName(e.Name()) || !needed[d] {
				continue
			}
			if _, there, err := x.s.Stat(d); err != nil {
				return err
			} else if there {
				continue // undo finds it in the store
			}
			fi, err := os.Lstat(filepath.Join(dir, e.Name()))
			if errors.Is(err, fs.ErrNotExist) {
				continue // an heir before this one has it
			}
			if err != nil {
				return err
			}
			if err := disk.Rename(filepath.Join(dir, e.Name()), filepath.Join(x.s.trashDir(heir.ID), e.Name())); err != nil {
				return err
			}
			heir.Blobs = append(heir.Blobs, Blob{d, fi.Size()})
			taken = true
		}
		if !taken {
			continue
		}
		if err := disk.SyncDir(x.s.trashDir(heir.ID)); err != nil {
			return err
		}
		write := func() error { return x.s.writeRemoval(*heir, removalName) }
		if err := x.withReserve(write, ""); err != nil && !errors.Is(err, ErrFull) {
			return err // on a full disk the files count, which are there
		}
	}
	return nil
}

// Undoable gives every digest that is needed to undo what is in the trash.
func (s *Store) Undoable() (map[digest.Digest]bool, error) {
	removals, err := s.Trash()
	if err != nil {
		return nil, err
	}
	out := map[digest.Digest]bool{}
	for _, r := range removals {
		needed, err := s.neededBy(r)
		if err != nil {
			return nil, err
		}
		maps.Copy(out, needed)
	}
	return out, nil
}

// neededBy gives every digest that is needed to undo a removal. A version of
// which the manifest is gone or damaged needs nothing: it cannot be brought
// back, whatever else is kept. One that cannot be read is an error, which may
// pass.
func (s *Store) neededBy(r Removal) (map[digest.Digest]bool, error) {
	out := map[digest.Digest]bool{}
	for _, d := range r.References {
		needed, err := s.needs([]v1.Descriptor{d})
		if errors.Is(err, ErrNotFound) || errors.Is(err, ErrDamaged) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("find what removal %s needs to be undone: %w", r.ID, err)
		}
		maps.Copy(out, needed)
	}
	return out, nil
}

// needs gives every digest that entries of removals reach, through manifests
// in the store and in the trash.
func (s *Store) needs(entries []v1.Descriptor) (map[digest.Digest]bool, error) {
	out := map[digest.Digest]bool{}
	todo := slices.Clone(entries)
	for len(todo) > 0 {
		d := todo[len(todo)-1]
		todo = todo[:len(todo)-1]
		if out[d.Digest] {
			continue
		}
		out[d.Digest] = true
		if !isManifest(d) {
			continue
		}
		path, err := s.find(d.Digest)
		if err != nil {
			return nil, err
		}
		links, err := linksOf(d, path)
		if err != nil {
			return nil, err
		}
		todo = append(todo, links...)
	}
	return out, nil
}

// find tells where a blob is: in the store, else with a removal that can be
// undone.
func (s *Store) find(d digest.Digest) (string, error) {
	if _, there, err := s.Stat(d); err != nil || there {
		return s.BlobPath(d), err
	}
	folders, err := s.trashFolders()
	if err != nil {
		return "", err
	}
	for _, id := range folders {
		dir := s.trashDir(id)
		for _, name := range []string{removalName, d.Encoded()} {
			if _, err = os.Lstat(filepath.Join(dir, name)); err != nil {
				break
			}
		}
		if err == nil {
			return filepath.Join(dir, d.Encoded()), nil
		}
		if !errors.Is(err, fs.ErrNotExist) {
			return "", fmt.Errorf("look up blob %s: %w", d, err)
		}
	}
	return "", fmt.Errorf("blob %s: %w", d, ErrNotFound)
}

// sweepTrash removes folders without a record: a removal that a crash stopped
// before its first step. The caller holds the lock, so none is being made.
func (s *Store) sweepTrash() error {
	folders, err := s.trashFolders()
	if err != nil {
		return err
	}
	for _, id := range folders {
		entries, err := os.ReadDir(s.trashDir(id))
		if errors.Is(err, fs.ErrNotExist) {
			continue // Shred has finished it meanwhile
		}
		if err != nil {
			return fmt.Errorf("empty trash: %w", err)
		}
		known := slices.ContainsFunc(entries, func(e fs.DirEntry) bool {
			return e.Name() == removalName || e.Name() == pendingName || e.Name() == goneName || isBlobName(e.Name())
		})
		if known {
			continue
		}
		if err := disk.RemoveAll(s.trashDir(id)); err != nil {
			return fmt.Errorf("empty trash: %w", err)
		}
	}
	return nil
}

// Limit bounds how fast files are deleted. Zero is no bound.
type Limit struct {
	BytesPerSecond int64
	FilesPerSecond int64
}

// maxShredStep is how much of a large file is given back at once: unlinking it
// whole would make one discard of hundreds of gigabytes, behind which every
// read of the disk waits.
const maxShredStep = 64 << 20

// Shred deletes the files of condemned removals, at most as fast as limit says,
// and holds no lock of the store meanwhile. It gives the bytes that it freed.
// Where another process shreds already, it leaves the work to that one, unless
// there is no limit: then it cannot wait for one that has.
func (s *Store) Shred(ctx context.Context, limit Limit) (freed int64, err error) {
	lock, err := disk.OpenFile(s.path(trashName, ".shredding"), os.O_RDWR|os.O_CREATE, 0o644)
	if err != nil {
		return 0, fmt.Errorf("empty trash: %w", err)
	}
	defer lock.Close()
	if mine, err := lock.Lock(true); err != nil || !mine && limit != (Limit{}) {
		return 0, err
	}
	sh := shredder{ctx: ctx}
	if limit.BytesPerSecond > 0 {
		sh.step = min(max(limit.BytesPerSecond/4, 1<<20), maxShredStep)
		sh.bytes = rate.NewLimiter(rate.Limit(limit.BytesPerSecond), int(sh.step))
	}
	if limit.FilesPerSecond > 0 {
		sh.files = rate.NewLimiter(rate.Limit(limit.FilesPerSecond), 1)
	}
	folders, err := s.trashFolders()
	if err != nil {
		return 0, err
	}
	for _, id := range folders {
		dir := s.trashDir(id)
		if _, err := os.Lstat(filepath.Join(dir, goneName)); errors.Is(err, fs.ErrNotExist) {
			continue
		} else if err != nil {
			return sh.freed, fmt.Errorf("empty trash: %w", err)
		}
		if err := sh.folder(dir); err != nil {
			return sh.freed, fmt.Errorf("empty trash: %w", err)
		}
	}
	return sh.freed, s.keepReserve()
}

// shredder deletes files at a limited rate.
type shredder struct {
	ctx   context.Context
	bytes *rate.Limiter // nil: no limit
	step  int64         // bytes given back at once, where there is a limit
	files *rate.Limiter
	freed int64
}

// folder deletes a condemned removal. Its record goes last, so that whoever
// finds the folder after a crash knows that it may be deleted.
func (sh *shredder) folder(dir string) error {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return ignoreAbsent(err)
	}
	for _, e := range entries {
		if e.Name() == goneName {
			continue
		}
		if err := sh.file(filepath.Join(dir, e.Name())); err != nil {
			return err
		}
	}
	if err := ignoreAbsent(disk.Remove(filepath.Join(dir, goneName))); err != nil {
		return err
	}
	return ignoreAbsent(disk.Remove(dir))
}

func (sh *shredder) file(path string) error {
	if sh.files != nil {
		if err := sh.files.Wait(sh.ctx); err != nil {
			return err
		}
	}
	if err := sh.ctx.Err(); err != nil {
		return err
	}
	fi, err := os.Lstat(path)
	if err != nil {
		return ignoreAbsent(err)
	}
	size := disk.Allocated(fi)
	if sh.bytes != nil && fi.Mode().IsRegular() {
		if size, err = sh.shrink(path, fi.Size(), size); err != nil {
			return err
		}
		// What cannot be given back in steps waits for its share all the same.
		for left := size; left > 0; left -= sh.step {
			if err := sh.bytes.WaitN(sh.ctx, int(min(left, sh.step))); err != nil {
				return err
			}
		}
	}
	if err := ignoreAbsent(disk.Remove(path)); err != nil {
		return err
	}
	sh.freed += size
	return nil
}

// shrink gives back all but the last step of a large file, bit by bit, and
// tells how many allocated bytes it still has. A file that has another name (a
// view of hard links) or that somebody has open is left as it is: its bytes are
// still somebody's.
func (sh *shredder) shrink(path string, length, allocated int64) (int64, error) {
	if length <= sh.step {
		return allocated, nil
	}
	f, err := disk.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return allocated, ignoreAbsent(err)
	}
	defer f.Close()
	alone, err := f.Alone()
	if err != nil || !alone {
		return allocated, err
	}
	for length > sh.step {
		if err := sh.bytes.WaitN(sh.ctx, int(sh.step)); err != nil {
			return allocated, err
		}
		length -= sh.step
		if err := f.Truncate(length); err != nil {
			return allocated, err
		}
		sh.freed += sh.step
		allocated = max(0, allocated-sh.step)
	}
	return allocated, nil
}

// Shredding tells how many bytes of condemned removals are still there.
func (s *Store) Shredding() (int64, error) {
	folders, err := s.trashFolders()
	if err != nil {
		return 0, err
	}
	var n int64
	for _, id := range folders {
		dir := s.trashDir(id)
		if _, err := os.Lstat(filepath.Join(dir, goneName)); err != nil {
			continue
		}
		entries, err := os.ReadDir(dir)
		if err != nil {
			continue
		}
		for _, e := range entries {
			if fi, err := e.Info(); err == nil {
				n += disk.Allocated(fi)
			}
		}
	}
	return n, nil
}

// The reserve is space kept aside so that something can be removed from a file
// system that is full to the last byte: a removal writes its record and a new
// index.json before it frees anything. It is as large as those two may be.
const (
	reserveName  = "reserve"
	leastReserve = 512 << 10
)

// keepReserve makes the reserve where it is missing or has become too small,
// and there is room. Without it everything works but the last resort.
func (s *Store) keepReserve() error {
	fi, err := os.Stat(s.path(v1.ImageIndexFile))
	if err != nil {
		return ignoreAbsent(err)
	}
	want := max(leastReserve, 3*fi.Size())
	path := s.path(reserveName)
	if fi, err := os.Lstat(path); err == nil && disk.Allocated(fi) >= want*3/4 {
		return nil
	}
	free, _, err := disk.Free(s.dir)
	if err != nil || free < 16*want {
		return nil //nolint:nilerr // there will be another time
	}
	f, err := disk.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return fmt.Errorf("keep a reserve of space: %w", err)
	}
	defer f.Close()
	if err := f.Allocate(want * 3 / 2); err != nil && !errors.Is(full(err), ErrFull) {
		return fmt.Errorf("keep a reserve of space: %w", err)
	}
	return nil
}

// spendReserve gives the reserve back to the file system. It tells whether
// there was one.
func (s *Store) spendReserve() bool { return disk.Remove(s.path(reserveName)) == nil }
