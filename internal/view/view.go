// Package view turns versions of models into the tree that a container sees.
//
// Plan is pure: it takes manifests and options and gives the sorted list of
// folders, files and links of the view, with mode and owner of each. Equal
// options give an equal tree and so an equal Tree.Key, by which containers
// share one view. Build writes a tree as a small folder of metadata: sparse
// files whose extended attributes point at blobs (see Method), next to real
// small files and links. The data itself stays in the store, and so do the
// blobs' own mode and owner.
//
// Mounting a view is the business of package overlay.
package view

import (
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"io"
	"io/fs"
	"path"
	"slices"
	"strings"

	"github.com/opencontainers/go-digest"

	"github.com/larder-project/larder/internal/modelpack"
	"github.com/larder-project/larder/internal/reference"
)

// Layout names a way of laying out models in a view.
type Layout string

// The layouts of a view.
const (
	// Files is the repository's own tree; with several models, one folder for
	// each, named by its repository.
	Files Layout = "files"
	// HF is the cache folder of a Hugging Face client: mount it at
	// HF_HUB_CACHE.
	HF Layout = "hf"
)

// Method names the way in which a view's files get their data.
type Method string

// The methods, best first.
const (
	// DataOnly: files with overlay's metacopy and redirect attributes over a
	// data-only lower layer (lowerdir=view::blobs). Linux 6.5.
	DataOnly Method = "data-only"
	// Lower: the same files over an ordinary lower layer
	// (lowerdir=view:blobs); an entry of the view hides the blobs' own folder.
	// Linux 4.19.
	Lower Method = "lower"
	// HardLink: files are hard links to blobs. It works wherever overlay does,
	// but mode, owner and time of a file are those of the blob (0444, root).
	HardLink Method = "hard-link"
)

// ErrInvalid is wrapped by every refusal of Plan and Build that lies in what
// was asked for: options that no view can satisfy, models that do not fit
// together.
var ErrInvalid = errors.New("invalid view")

// Spec says what a view shows, and to whom.
type Spec struct {
	Layout   Layout
	ReadOnly bool // the default modes are 0555 and 0444 instead of 0777 and 0666

	UID, GID *uint32      // owner of everything; nil: 0
	Mode     *fs.FileMode // permission bits of files; folders get x where files get r; nil: by ReadOnly

	Models []Model

	// Catalog: the models are all that there are, and nobody chose them. So
	// there may be none; and in the hf layout a version that no revision names
	// gets a name of Larder's own, never that of the default branch: which
	// version of a model is the one to take, a view must not say by itself.
	Catalog bool
}

// Model is one version of a model in a view.
type Model struct {
	// Repo is the name that the model's folder is made of: ORG/NAME of a hub's
	// repository, or the short name.
	Repo string
	// Revisions are the names under which the version is served in the hf
	// layout, each a file below refs: main, v1, refs/pr/1. Full commits are
	// passed over: a commit is found without a ref. When none is left the
	// version gets "main", or a name of Larder's own where another version of
	// the same repository has that, or with Spec.Catalog.
	Revisions []string
	// Commit is the hub's commit, 40 hex digits. When empty, it is the
	// revision in Pack if that is a commit, else made of Digest.
	Commit string
	// Digest is that of the version's manifest.
	Digest digest.Digest
	Pack   modelpack.Model
}

// Kind tells entries of a tree apart.
type Kind byte

// The kinds of entries.
const (
	Dir     Kind = 'd'
	Blob    Kind = 'b' // a file whose bytes are a blob of the store
	Inline  Kind = 'f' // a file whose bytes are in the entry
	Symlink Kind = 'l'
)

// Entry is one folder, file or link of a tree.
type Entry struct {
	Path     string // slash-separated; "." is the root
	Kind     Kind
	Mode     fs.FileMode // permission bits; 0777 for links
	UID, GID uint32
	Size     int64         // Blob: bytes
	Digest   digest.Digest // Blob
	Data     []byte        // Inline
	Target   string        // Symlink
}

// Tree is what a view holds.
type Tree struct {
	Entries []Entry // a folder stands before what is in it

	// OwnFiles tells that mode or owner of files were asked for by name, which
	// hard links cannot give.
	OwnFiles bool
}

// Fits tells whether a view can show the tree by this method.
func (t Tree) Fits(method Method) error {
	switch method {
	case DataOnly, Lower:
		return nil
	case HardLink:
		if t.OwnFiles {
			return fmt.Errorf("%w: uid, gid and mode of files cannot be set on this host, for its views are made of hard links; leave these options out, or see `larder doctor` for what is missing", ErrInvalid)
		}
		return nil
	}
	return fmt.Errorf("%w: method %.50q is not known", ErrInvalid, method)
}

// keyFormat changes whenever Build writes a tree in another way, so that views
// of an older Larder are not taken for new ones.
const keyFormat = "larder view 1"

// Key names the view that Build makes of the tree: 64 hex digits, equal for
// equal trees and methods.
func (t Tree) Key(method Method) string {
	h := sha256.New()
	put(h, keyFormat, string(method))
	for _, e := range t.Entries {
		put(h, string(e.Kind), e.Path)
		var b [28]byte
		binary.BigEndian.PutUint32(b[0:], uint32(e.Mode))
		binary.BigEndian.PutUint32(b[4:], e.UID)
		binary.BigEndian.PutUint32(b[8:], e.GID)
		binary.BigEndian.PutUint64(b[12:], uint64(e.Size))
		h.Write(b[:])
		put(h, string(e.Digest), string(e.Data), e.Target)
	}
	return hex.EncodeToString(h.Sum(nil))
}

// put writes strings with their lengths, so that no two lists of strings have
// the same encoding.
func put(h hash.Hash, list ...string) {
	var n [8]byte
	for _, s := range list {
		binary.BigEndian.PutUint64(n[:], uint64(len(s)))
		h.Write(n[:])
		_, _ = io.WriteString(h, s)
	}
}

// Plan lays out the models of a spec. It refuses, with ErrInvalid, an unknown
// layout, a mode beyond permission bits, and models whose folders, files or
// revisions would collide.
func Plan(spec Spec) (Tree, error) {
	p, err := newPlanner(spec)
	if err != nil {
		return Tree{}, err
	}
	switch spec.Layout {
	case Files:
		err = p.files(spec.Models)
	case HF:
		err = p.hub(spec.Models)
	default:
		err = fmt.Errorf("%w: layout %.50q; known are %q and %q", ErrInvalid, spec.Layout, Files, HF)
	}
	if err != nil {
		return Tree{}, err
	}
	return p.tree()
}

// planner collects entries. Folders come to be with what is in them.
type planner struct {
	catalog  bool
	entries  map[string]Entry
	uid, gid uint32
	file     fs.FileMode
	dir      fs.FileMode
	own      bool
}

func newPlanner(spec Spec) (*planner, error) {
	if len(spec.Models) == 0 && !spec.Catalog {
		return nil, fmt.Errorf("%w: it has no model", ErrInvalid)
	}
	p := &planner{catalog: spec.Catalog, entries: make(map[string]Entry), file: 0o666, dir: 0o777}
	if spec.ReadOnly {
		p.file, p.dir = 0o444, 0o555
	}
	if spec.UID != nil {
		p.uid, p.own = *spec.UID, true
	}
	if spec.GID != nil {
		p.gid, p.own = *spec.GID, true
	}
	// (uid_t)-1 is "leave as it is" in the kernel's calls.
	if p.uid == ^uint32(0) || p.gid == ^uint32(0) {
		return nil, fmt.Errorf("%w: %d is no user or group id", ErrInvalid, ^uint32(0))
	}
	if spec.Mode != nil {
		m := *spec.Mode
		if m&^fs.ModePerm != 0 {
			return nil, fmt.Errorf("%w: mode %#o; only permission bits (0777) can be given", ErrInvalid, uint32(m))
		}
		p.file, p.dir, p.own = m, m|(m&0o444)>>2, true
	}
	p.entries["."] = Entry{Path: ".", Kind: Dir}
	for _, m := range spec.Models {
		if len(m.Pack.Files) == 0 {
			return nil, fmt.Errorf("%w: model %.200q has no files", ErrInvalid, m.Repo)
		}
		if err := modelpack.CheckDigest(m.Digest); err != nil {
			return nil, fmt.Errorf("%w: model %.200q: %w", ErrInvalid, m.Repo, err)
		}
	}
	return p, nil
}

// add puts an entry and its missing parents in the tree. An equal entry may be
// there already.
func (p *planner) add(e Entry) error {
	if err := modelpack.CheckPath(e.Path); err != nil {
		return fmt.Errorf("%w: %w", ErrInvalid, err)
	}
	if old, ok := p.entries[e.Path]; ok {
		if same(old, e) {
			return nil
		}
		return fmt.Errorf("%w: two different entries would be at %q", ErrInvalid, e.Path)
	}
	p.entries[e.Path] = e
	for d := path.Dir(e.Path); ; d = path.Dir(d) {
		old, ok := p.entries[d]
		if ok && old.Kind != Dir {
			return fmt.Errorf("%w: %q would be both a file and a folder (of %q)", ErrInvalid, d, e.Path)
		}
		if ok {
			return nil
		}
		p.entries[d] = Entry{Path: d, Kind: Dir}
	}
}

func same(a, b Entry) bool {
	return a.Kind == b.Kind && a.Size == b.Size && a.Digest == b.Digest && a.Target == b.Target &&
		slices.Equal(a.Data, b.Data)
}

func (p *planner) tree() (Tree, error) {
	t := Tree{OwnFiles: p.own, Entries: make([]Entry, 0, len(p.entries))}
	for _, e := range p.entries {
		e.UID, e.GID = p.uid, p.gid
		switch {
		case e.Kind == Dir:
			e.Mode = p.dir
		case e.Kind == Symlink:
			e.Mode = 0o777
		case e.Mode == 0:
			e.Mode = p.file
		}
		t.Entries = append(t.Entries, e)
	}
	// "." sorts before every name that CheckPath lets through but those that
	// begin with a byte below '.', so it is put first by hand. A folder's path
	// is a prefix of what is in it and so comes first.
	slices.SortFunc(t.Entries, func(a, b Entry) int {
		switch {
		case a.Path == b.Path:
			return 0
		case a.Path == ".":
			return -1
		case b.Path == ".":
			return 1
		}
		return strings.Compare(a.Path, b.Path)
	})
	return t, nil
}

// files lays out the models' own trees.
func (p *planner) files(models []Model) error {
	if len(models) == 1 {
		return p.pack("", models[0])
	}
	folders := make(map[string]bool, len(models))
	for _, m := range models {
		if err := checkRepo(m.Repo); err != nil {
			return err
		}
		if folders[m.Repo] {
			return fmt.Errorf("%w: two versions of %q would share the folder %q; give each view one version, or use layout %q", ErrInvalid, m.Repo, m.Repo, HF)
		}
		folders[m.Repo] = true
	}
	for _, m := range models {
		for d := path.Dir(m.Repo); d != "."; d = path.Dir(d) {
			if folders[d] {
				return fmt.Errorf("%w: the folder of model %q would lie in that of model %q", ErrInvalid, m.Repo, d)
			}
		}
	}
	for _, m := range models {
		if err := p.pack(m.Repo+"/", m); err != nil {
			return err
		}
	}
	return nil
}

func (p *planner) pack(prefix string, m Model) error {
	for _, f := range m.Pack.Files {
		if err := modelpack.CheckPath(f.Path); err != nil {
			return fmt.Errorf("%w: %w", ErrInvalid, err)
		}
		if err := p.add(blob(prefix+f.Path, f)); err != nil {
			return err
		}
	}
	return nil
}

func blob(name string, f modelpack.File) Entry {
	return Entry{Path: name, Kind: Blob, Size: f.Size, Digest: f.Digest}
}

// checkRepo holds for both forms of a name: folders are made of it.
func checkRepo(repo string) error {
	if err := modelpack.CheckPath(repo); err != nil {
		return fmt.Errorf("%w: name of a model: %w", ErrInvalid, err)
	}
	return nil
}

// commit is the 40 hex digits under which a version stands in the hf layout.
func (m Model) commit() (string, error) {
	switch {
	case m.Commit != "":
		if !reference.IsCommit(m.Commit) {
			return "", fmt.Errorf("%w: %.100q is not a commit (40 hex digits)", ErrInvalid, m.Commit)
		}
		return m.Commit, nil
	case reference.IsCommit(m.Pack.Revision):
		return m.Pack.Revision, nil
	}
	return m.Digest.Encoded()[:40], nil
}
