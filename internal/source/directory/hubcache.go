package directory

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"

	"github.com/opencontainers/go-digest"

	"github.com/larder-project/larder/internal/disk"
	"github.com/larder-project/larder/internal/modelpack"
	"github.com/larder-project/larder/internal/reference"
	"github.com/larder-project/larder/internal/source"
)

// The folders of a Hugging Face hub cache, as huggingface_hub 0.x to 2.x and
// llama.cpp write them:
//
//	models--ORG--NAME/refs/REV                 the 40 digits of a commit
//	models--ORG--NAME/snapshots/COMMIT/PATH    link to ../../blobs/ETAG
//	models--ORG--NAME/blobs/ETAG               the file, or since 1.32 a link to
//	blobs/XX/HASH                              the file, shared by repositories
//	models--ORG--NAME/trees/COMMIT.json        every file that the commit has
//
// ETAG is the SHA-256 of the content for files in LFS, else its git object id.
const (
	modelPrefix  = "models--"
	snapshotsDir = "snapshots"
	blobsDir     = "blobs"
	refsDir      = "refs"
	treesDir     = "trees"
	absentDir    = ".no_exist"
	partSuffix   = ".incomplete"

	maxTreeBytes = 64 << 20
)

// Cache is what a hub cache folder holds.
type Cache struct {
	Sources []source.Source // one for each revision of each model, sorted
	Skipped []Skipped       // what was found and is not in Sources
	Unread  error           // what of that the system could not read, such as EIO: it may be sound

	root *os.Root
}

// Close lets go of the cache's folder; its sources cannot be read afterwards.
func (c Cache) Close() error { return c.root.Close() }

// Skipped is a part of a cache that cannot be had, and why.
type Skipped struct {
	Path string
	Why  string
}

// IsHubCache tells whether a folder is a hub cache, or one model's folder of
// such a cache.
func IsHubCache(name string) bool {
	if isModelFolder(name) {
		return true
	}
	entries, err := os.ReadDir(name)
	if err != nil {
		return false
	}
	for _, e := range entries {
		if strings.HasPrefix(e.Name(), modelPrefix) && isModelFolder(filepath.Join(name, e.Name())) {
			return true
		}
	}
	return false
}

func isModelFolder(name string) bool {
	abs, err := filepath.Abs(name)
	if err != nil || !strings.HasPrefix(filepath.Base(abs), modelPrefix) {
		return false
	}
	fi, err := os.Stat(filepath.Join(abs, snapshotsDir))
	return err == nil && fi.IsDir()
}

// HubCache opens a hub cache, or one model's folder in it. A revision whose
// links lead elsewhere or nowhere, or that differs from its list of files, is
// skipped and the others are given. Each revision is published as hf://NAME@REF
// for every ref that names it, or by its commit where none does. Nothing is
// followed out of the cache's folder.
//
// A revision that lacks files of its commit is Partial. Clients before 1.22
// wrote no list of files; a revision without one counts as partial, because
// nothing tells that it is whole.
func HubCache(name string) (Cache, error) {
	base, err := filepath.Abs(name)
	if err == nil {
		base, err = filepath.EvalSymlinks(base)
	}
	if err != nil {
		return Cache{}, openError(name, err)
	}
	var only string
	if isModelFolder(base) {
		base, only = filepath.Dir(base), filepath.Base(base)
	}
	root, err := os.OpenRoot(base)
	if err != nil {
		return Cache{}, openError(name, err)
	}
	c := &cacheReader{root: root, base: base, out: Cache{root: root}}
	names := []string{only}
	if only == "" {
		if names, err = c.names("."); err != nil {
			return Cache{}, errors.Join(err, root.Close())
		}
	}
	for _, n := range names {
		switch {
		case strings.HasPrefix(n, modelPrefix):
			c.repository(n)
		case strings.HasPrefix(n, "datasets--"), strings.HasPrefix(n, "spaces--"), strings.HasPrefix(n, "kernels--"):
			c.skip(n, "not a model")
		}
	}
	return c.out, nil
}

type cacheReader struct {
	root *os.Root
	base string
	out  Cache
}

// skipError skips what could not be read or is not as it should be.
func (c *cacheReader) skipError(name string, err error) {
	c.skip(name, "%v", err)
	if unread(err) {
		c.out.Unread = errors.Join(c.out.Unread, err)
	}
}

// unread tells whether the system could not read something. What a cache has or
// lacks is no such error, whatever lies in the place of a file.
func unread(err error) bool {
	var errno syscall.Errno
	if !errors.As(err, &errno) {
		return false
	}
	switch errno {
	case syscall.ENOENT, syscall.ENOTDIR, syscall.EISDIR, syscall.ELOOP, syscall.ENAMETOOLONG, syscall.ENXIO:
		return false
	}
	return true
}

func (c *cacheReader) skip(name, format string, args ...any) {
	c.out.Skipped = append(c.out.Skipped, Skipped{Path: filepath.Join(c.base, name), Why: fmt.Sprintf(format, args...)})
}

// names lists a folder, sorted; a folder that is missing is empty.
func (c *cacheReader) names(dir string) ([]string, error) {
	d, err := c.root.Open(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, openError(filepath.Join(c.base, dir), err)
	}
	defer d.Close()
	names, err := d.Readdirnames(-1)
	if err != nil {
		return nil, openError(filepath.Join(c.base, dir), err)
	}
	slices.Sort(names)
	return names, nil
}

// repository reads one models--… folder.
func (c *cacheReader) repository(dir string) {
	repo := strings.ReplaceAll(strings.TrimPrefix(dir, modelPrefix), "--", "/")
	if err := reference.CheckHubRepo(repo); err != nil {
		c.skip(dir, "%v", err)
		return
	}
	refs, err := c.refs(dir)
	if err != nil {
		c.skipError(dir, err)
		return
	}
	commits, err := c.names(path.Join(dir, snapshotsDir))
	if err != nil {
		c.skipError(dir, err)
		return
	}
	use := &blobUse{root: c.root, repo: dir, refs: refs, count: map[string]int{}}
	for _, commit := range commits {
		at := path.Join(dir, snapshotsDir, commit)
		if !reference.IsCommit(commit) {
			use.unknown = true
			c.skip(at, "its name is not a commit")
			continue
		}
		s := &Source{root: c.root, base: c.base, dir: at, owner: use, listed: true}
		if err := c.revision(s, dir, repo, commit, refs[commit]); err != nil {
			use.unknown = true
			c.skipError(at, err)
			continue
		}
		for _, e := range s.entries {
			use.count[e.name]++
		}
		c.out.Sources = append(c.out.Sources, s)
	}
	for _, commit := range slices.Sorted(maps.Keys(refs)) {
		if !slices.Contains(commits, commit) {
			for _, ref := range refs[commit] {
				c.skip(path.Join(dir, refsDir, ref), "commit %s is not in the cache", commit)
			}
		}
	}
	blobs, err := c.names(path.Join(dir, blobsDir))
	if err != nil {
		c.skipError(path.Join(dir, blobsDir), err)
		return
	}
	for _, b := range blobs {
		if strings.HasSuffix(b, partSuffix) || strings.HasSuffix(b, ".downloadInProgress") {
			c.skip(path.Join(dir, blobsDir, b), "a download that did not end")
		}
	}
}

// refs maps commits to the refs that name them.
func (c *cacheReader) refs(repo string) (map[string][]string, error) {
	out := map[string][]string{}
	top := path.Join(repo, refsDir)
	var walk func(dir string) error
	walk = func(dir string) error {
		names, err := c.names(dir)
		if err != nil {
			return err
		}
		for _, n := range names {
			at := path.Join(dir, n)
			fi, err := c.root.Lstat(at)
			if err != nil {
				return openError(filepath.Join(c.base, at), err)
			}
			if fi.IsDir() {
				if len(at) > len(repo)+1024 {
					return fmt.Errorf("the folders below %s are nested too deep", top)
				}
				if err := walk(at); err != nil {
					return err
				}
				continue
			}
			data, err := c.read(at, fi, 1<<10)
			if err != nil {
				return err
			}
			commit := strings.TrimSpace(string(data))
			if !reference.IsCommit(commit) {
				c.skip(at, "it names no commit")
				continue
			}
			ref := strings.TrimPrefix(at, top+"/")
			out[commit] = append(out[commit], ref)
		}
		return nil
	}
	return out, walk(top)
}

func (c *cacheReader) read(name string, fi fs.FileInfo, limit int64) ([]byte, error) {
	full := filepath.Join(c.base, name)
	if !fi.Mode().IsRegular() {
		return nil, fmt.Errorf("%s is a %s", full, kind(fi.Mode()))
	}
	if fi.Size() > limit {
		return nil, fmt.Errorf("%s has %d bytes, at most %d are read", full, fi.Size(), limit)
	}
	s := &Source{root: c.root, base: c.base}
	f, err := s.open(entry{name: name, was: identify(fi)})
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return io.ReadAll(io.LimitReader(f, limit))
}

// tree is trees/COMMIT.json. It lists all files of a commit, also those that
// were not downloaded.
type tree struct {
	Files map[string]struct {
		BlobID    string `json:"blob_id"`
		LFSSHA256 string `json:"lfs_sha256"`
	} `json:"files"`
}

func (c *cacheReader) tree(repo, commit string) (tree, bool) {
	name := path.Join(repo, treesDir, commit+".json")
	var t tree
	fi, err := c.root.Lstat(name)
	if errors.Is(err, fs.ErrNotExist) {
		return t, false
	}
	var data []byte
	if err == nil {
		data, err = c.read(name, fi, maxTreeBytes)
	}
	if err == nil {
		err = json.Unmarshal(data, &t)
	}
	if err != nil || t.Files == nil {
		c.skipError(name, fmt.Errorf("the list of files cannot be read, so the revision counts as partial (%w)", err))
		return tree{}, false
	}
	return t, true
}

// revision lists one snapshot into s.
func (c *cacheReader) revision(s *Source, repo, name, commit string, refs []string) error {
	t, listed := c.tree(repo, commit)
	if err := c.snapshot(s, repo, s.dir, "", t); err != nil {
		return err
	}
	moving, err := s.Moving()
	if err != nil {
		return err
	}
	if len(s.snap.Files) == 0 && moving == "" {
		return errors.New("it has no files")
	}
	s.sort()
	s.snap.Source = "hf://" + name
	s.snap.Revision = commit
	s.snap.Partial = !listed
	for p := range t.Files {
		if _, ok := s.entries[p]; !ok {
			s.snap.Partial = true
		}
	}
	for _, ref := range refs {
		r, err := reference.Parse("hf://" + name + "@" + ref)
		if err != nil {
			c.skip(path.Join(repo, refsDir, ref), "%v", err)
			continue
		}
		s.snap.References = append(s.snap.References, r)
	}
	if len(s.snap.References) == 0 {
		s.snap.References = []reference.Reference{{Kind: reference.Hub, Repo: name, Revision: commit}}
	}
	return nil
}

func (c *cacheReader) snapshot(s *Source, repo, dir, prefix string, t tree) error {
	names, err := c.names(dir)
	if err != nil {
		return err
	}
	for _, n := range names {
		at, p := path.Join(dir, n), path.Join(prefix, n)
		if err := modelpack.CheckPath(p); err != nil {
			return err
		}
		fi, err := c.root.Lstat(at)
		if err != nil {
			return openError(filepath.Join(c.base, at), err)
		}
		if fi.IsDir() {
			if err := c.snapshot(s, repo, at, p, t); err != nil {
				return err
			}
			continue
		}
		e, f, err := c.file(repo, at, fi)
		if err != nil {
			return err
		}
		// The commit's own list, where there is one, says what the content is.
		if want, ok := t.Files[p]; ok {
			lfs, git := digest.Digest("sha256:"+want.LFSSHA256), want.BlobID
			switch {
			case want.LFSSHA256 != "" && modelpack.CheckDigest(lfs) == nil && f.GitOID == "" && (f.SHA256 == "" || f.SHA256 == lfs):
				f.SHA256 = lfs
			case want.LFSSHA256 == "" && reference.IsCommit(git) && f.SHA256 == "" && (f.GitOID == "" || f.GitOID == git):
				f.GitOID = git
			default:
				return fmt.Errorf("%s is not the content that the commit's list of files names", p)
			}
		}
		if len(s.snap.Files) >= modelpack.MaxFiles {
			return fmt.Errorf("it has more than %d files", modelpack.MaxFiles)
		}
		s.add(p, e)
		last := &s.snap.Files[len(s.snap.Files)-1]
		last.SHA256, last.GitOID = f.SHA256, f.GitOID
	}
	return nil
}

// file follows a snapshot's entry to the content: not at all where the client
// had to copy, else one link into the repository's blobs, and perhaps one more
// into the blobs that repositories share. Every other link is refused.
func (c *cacheReader) file(repo, at string, fi fs.FileInfo) (entry, source.File, error) {
	if fi.Mode().IsRegular() {
		return entry{name: at, was: identify(fi)}, source.File{}, nil
	}
	bad := func(name, format string, args ...any) (entry, source.File, error) {
		return entry{}, source.File{}, fmt.Errorf("%s %s", name, fmt.Sprintf(format, args...))
	}
	blob, fi, err := c.follow(at, fi)
	if err != nil {
		return entry{}, source.File{}, err
	}
	etag, ok := strings.CutPrefix(blob, path.Join(repo, blobsDir)+"/")
	if !ok || strings.Contains(etag, "/") {
		return bad(at, "leads to %s, which is not a blob of this repository", blob)
	}
	e := entry{name: blob, link: at}
	if fi.Mode()&fs.ModeSymlink != 0 {
		if e.name, fi, err = c.follow(blob, fi); err != nil {
			return entry{}, source.File{}, err
		}
		if shared, ok := strings.CutPrefix(e.name, blobsDir+"/"); !ok || strings.Count(shared, "/") != 1 {
			return bad(blob, "leads to %s, which is not a blob of this cache", e.name)
		}
	}
	if !fi.Mode().IsRegular() {
		return bad(e.name, "is a %s", kind(fi.Mode()))
	}
	e.was = identify(fi)
	var f source.File
	if d := digest.Digest("sha256:" + etag); modelpack.CheckDigest(d) == nil {
		f.SHA256 = d
	} else if reference.IsCommit(etag) {
		f.GitOID = etag
	}
	return e, f, nil
}

// follow reads one link. The target is worked out by name alone; os.Root keeps
// it inside, whatever the folders on the way are.
func (c *cacheReader) follow(name string, fi fs.FileInfo) (string, fs.FileInfo, error) {
	if fi.Mode()&fs.ModeSymlink == 0 {
		return "", nil, fmt.Errorf("%s is a %s", name, kind(fi.Mode()))
	}
	target, err := c.root.Readlink(name)
	if err != nil {
		return "", nil, openError(filepath.Join(c.base, name), err)
	}
	to := path.Join(path.Dir(name), target)
	if path.IsAbs(target) || !filepath.IsLocal(to) {
		return "", nil, fmt.Errorf("%s leads to %s, out of the cache", name, target)
	}
	fi, err = c.root.Lstat(to)
	if errors.Is(err, fs.ErrNotExist) {
		return "", nil, fmt.Errorf("%s leads to %s, which is missing", name, target)
	}
	if err != nil {
		return "", nil, openError(filepath.Join(c.base, to), err)
	}
	return to, fi, nil
}

// blobUse counts, for one repository of a cache, the links to each blob, so
// that taking over one revision leaves the others whole.
type blobUse struct {
	root    *os.Root
	repo    string
	refs    map[string][]string
	unknown bool // something in the repository could not be read: blobs stay

	mu    sync.Mutex
	count map[string]int
}

func (u *blobUse) ours(e entry) bool {
	return !u.unknown && (e.link == "" || strings.HasPrefix(e.name, u.repo+"/"))
}

// sole is also false for blobs that repositories share: other repositories'
// links to them are not counted here.
func (u *blobUse) sole(e entry) bool {
	u.mu.Lock()
	defer u.mu.Unlock()
	return u.ours(e) && u.count[e.name] == 1
}

func (u *blobUse) remove(e entry) error {
	u.mu.Lock()
	defer u.mu.Unlock()
	names := []string{e.name}
	if e.link != "" {
		names = []string{e.link}
		if u.ours(e) && u.count[e.name] == 1 {
			names = append(names, e.name)
		}
	}
	for _, name := range names {
		if err := disk.RemoveIn(u.root, name); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return &source.Error{Op: "remove", What: name, Err: err}
		}
	}
	u.count[e.name]--
	return nil
}

func (u *blobUse) mark(s *Source) string {
	return path.Join(u.repo, moveNote+"-"+path.Base(s.dir))
}

// finish removes what names the revision, so that the client sees a cache
// without it rather than a damaged one: refs first.
func (u *blobUse) finish(s *Source, all []entry) error {
	commit := path.Base(s.dir)
	var names []string
	for _, ref := range u.refs[commit] {
		names = append(names, path.Join(u.repo, refsDir, ref))
	}
	names = append(names, path.Join(u.repo, treesDir, commit+".json"))
	folders := map[string]bool{}
	for _, e := range all {
		at := e.link
		if at == "" {
			at = e.name
		}
		for dir := path.Dir(at); dir != s.dir && dir != "."; dir = path.Dir(dir) {
			folders[dir] = true
		}
	}
	// Deeper names sort after their parents: from the last on, each folder is
	// empty when its turn comes.
	deep := slices.Sorted(maps.Keys(folders))
	slices.Reverse(deep)
	names = append(append(names, deep...), s.dir)
	for _, name := range names {
		if err := disk.RemoveIn(u.root, name); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return &source.Error{Op: "remove", What: filepath.Join(s.base, name), Err: err}
		}
	}
	return nil
}
