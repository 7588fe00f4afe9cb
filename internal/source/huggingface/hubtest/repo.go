package hubtest

import (
	"crypto/sha1"
	"encoding/hex"
	"fmt"
	"io/fs"
	"maps"
	"path"
	"path/filepath"
	"slices"
	"strings"
)

// File is one file of a revision. A path may be as hostile as a test needs.
type File struct {
	Path    string
	Content Content

	// Lies of the list of files, where they are set. The data stays as it is.
	ClaimSize   *int64
	ClaimSHA256 string // the oid of the LFS object
	ClaimOID    string // the git id
	ClaimType   string // in place of "file"
}

// Repo is one model repository. Its methods may be called while it is served.
type Repo struct {
	hub *Hub
	id  string

	// Guarded by hub.mu.
	private, gated bool
	commits        map[string]*commit
	branches, tags []ref
}

type ref struct{ name, commit string }

// commit is a list of entries, of which some may be made as they are asked for.
type commit struct {
	id     string
	files  []entry // sorted by path
	byPath map[string]int
	dirs   []string // all folders of files, sorted

	lazy     int // further files, that exist in the list alone
	lazyFile func(i int) File
}

// entry is a file with what the hub knows of it.
type entry struct {
	File
	size        int64 // of the content
	sha256, oid string
	lfs         bool
}

// etag names the content as the hub does.
func (e entry) etag() string {
	if e.lfs {
		return e.sha256
	}
	return e.oid
}

// treeOID is the oid of the list: for an LFS file, of its pointer.
func (e entry) treeOID() string {
	switch {
	case e.ClaimOID != "":
		return e.ClaimOID
	case e.lfs:
		return gitOIDOf(pointer(e.sha256, e.size))
	}
	return e.oid
}

// Private hides the repository from everyone without a token for it.
func (r *Repo) Private() *Repo { return r.set(func() { r.private = true }) }

// Gated shows the repository to everyone, but gives its files only to tokens
// that were granted access.
func (r *Repo) Gated() *Repo { return r.set(func() { r.gated = true }) }

func (r *Repo) set(f func()) *Repo {
	r.hub.mu.Lock()
	defer r.hub.mu.Unlock()
	f()
	return r
}

// Commit makes a revision of exactly these files, moves branch to it and gives
// its id. The same files on the same branch give the same id.
func (r *Repo) Commit(branch string, files ...File) (string, error) {
	return r.commit(branch, files, 0, nil)
}

// CommitLazy makes a revision of files and of n more that exist only in its
// list and have no content: make gives the i-th when it is asked for, so there
// may be millions. Those of make need ClaimSize and ClaimOID or ClaimSHA256.
func (r *Repo) CommitLazy(branch string, n int, make func(i int) File, files ...File) (string, error) {
	return r.commit(branch, files, n, make)
}

// CommitMap is Commit of files in memory.
func (r *Repo) CommitMap(branch string, files map[string][]byte) (string, error) {
	var list []File
	for name, b := range files {
		list = append(list, File{Path: name, Content: Bytes(b)})
	}
	return r.Commit(branch, list...)
}

// CommitDir is Commit of all regular files below dir, without .git.
func (r *Repo) CommitDir(branch, dir string) (string, error) {
	var list []File
	err := filepath.WalkDir(dir, func(p string, d fs.DirEntry, err error) error {
		if err != nil || p == dir {
			return err
		}
		if d.IsDir() && d.Name() == ".git" {
			return filepath.SkipDir
		}
		// A model in a cache or a view may consist of symbolic links.
		if d.IsDir() || !d.Type().IsRegular() && d.Type()&fs.ModeSymlink == 0 {
			return nil
		}
		c, err := Disk(p)
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(dir, p)
		list = append(list, File{Path: filepath.ToSlash(rel), Content: c})
		return err
	})
	if err != nil {
		return "", fmt.Errorf("serve %s: %w", dir, err)
	}
	return r.Commit(branch, list...)
}

func (r *Repo) commit(branch string, files []File, lazy int, lazyFile func(int) File) (string, error) {
	files = slices.Clone(files)
	slices.SortFunc(files, func(a, b File) int { return strings.Compare(a.Path, b.Path) })
	c := &commit{byPath: map[string]int{}, lazy: lazy, lazyFile: lazyFile}
	id := sha1.New()
	fmt.Fprintf(id, "%s %s %d\n", r.id, branch, lazy)
	for _, f := range files {
		sha, oid, err := r.hub.sums(f.Content)
		if err != nil {
			return "", fmt.Errorf("hash %s: %w", f.Path, err)
		}
		e := entry{File: f, size: f.Content.Size(), sha256: sha, oid: oid}
		e.lfs = r.hub.isLFS(f.Path, e.size)
		fmt.Fprintf(id, "%q %s %d\n", f.Path, sha, e.size)
		c.byPath[f.Path] = len(c.files)
		c.files = append(c.files, e)
	}
	c.id = hex.EncodeToString(id.Sum(nil))
	c.dirs = folders(c.files)

	r.hub.mu.Lock()
	defer r.hub.mu.Unlock()
	r.commits[c.id] = c
	r.branches = put(r.branches, ref{branch, c.id})
	return c.id, nil
}

// Tag names a commit.
func (r *Repo) Tag(name, commit string) *Repo {
	return r.set(func() { r.tags = put(r.tags, ref{name, commit}) })
}

// Branch points a branch to a commit.
func (r *Repo) Branch(name, commit string) *Repo {
	return r.set(func() { r.branches = put(r.branches, ref{name, commit}) })
}

func put(refs []ref, r ref) []ref {
	refs = slices.DeleteFunc(slices.Clone(refs), func(x ref) bool { return x.name == r.name })
	return append(refs, r)
}

// resolve finds a commit by branch, tag or id. It needs hub.mu.
func (r *Repo) resolve(revision string) *commit {
	for _, refs := range [][]ref{r.branches, r.tags} {
		for _, x := range refs {
			if x.name == revision {
				return r.commits[x.commit]
			}
		}
	}
	return r.commits[revision]
}

// at is the i-th entry.
func (c *commit) at(i int) entry {
	if i < len(c.files) {
		return c.files[i]
	}
	f := c.lazyFile(i - len(c.files))
	e := entry{File: f, sha256: f.ClaimSHA256, oid: f.ClaimOID, lfs: f.ClaimSHA256 != ""}
	if f.ClaimSize != nil {
		e.size = *f.ClaimSize
	}
	return e
}

// folders are the paths of all folders that the files lie in.
func folders(files []entry) []string {
	seen := map[string]bool{}
	for _, f := range files {
		for dir := path.Dir(f.Path); dir != "." && dir != "/" && !seen[dir]; dir = path.Dir(dir) {
			seen[dir] = true
		}
	}
	return slices.Sorted(maps.Keys(seen))
}

// lfsNames are the patterns that a new repository's .gitattributes gives to
// LFS, as far as they are of models.
var lfsNames = []string{
	".7z", ".arrow", ".bin", ".bz2", ".ckpt", ".gguf", ".gz", ".h5", ".joblib", ".model", ".msgpack", ".npy", ".npz",
	".onnx", ".ot", ".parquet", ".pb", ".pickle", ".pkl", ".pt", ".pth", ".safetensors", ".tar", ".tflite", ".wasm", ".xz", ".zip",
}

func (h *Hub) isLFS(name string, size int64) bool {
	switch t := h.options.LFSThreshold; {
	case t < 0:
		return false
	case t > 0:
		return size >= t
	}
	return size >= 10<<20 || slices.Contains(lfsNames, path.Ext(name))
}
