package view

import (
	"crypto/sha1" // git's object ids
	"encoding/hex"
	"encoding/json"
	"fmt"
	"maps"
	"path"
	"slices"
	"strings"

	"github.com/larder-project/larder/internal/modelpack"
	"github.com/larder-project/larder/internal/reference"
)

// The layout of a Hugging Face cache folder, as huggingface_hub writes it
// (file_download.py, _tree_cache.py and constants.py of version 1.28; checked
// against 2.4):
//
//	CACHEDIR.TAG
//	.locks/models--ORG--NAME/              an empty folder: clients before 1.25
//	                                       fail without it on a read-only cache
//	models--ORG--NAME/blobs/ETAG           the data
//	models--ORG--NAME/snapshots/COMMIT/…   links into blobs
//	models--ORG--NAME/refs/REVISION        the commit, without a newline
//	models--ORG--NAME/trees/COMMIT.json    the list of files
//
// Files in blobs are real ones, never links: a client that deletes a snapshot
// unlinks what the links resolve to.
const cacheTag = "Signature: 8a477f597d28d172789f06886806bc55\n" +
	"# This folder is a view of models that Larder keeps. Backup programs may skip it.\n"

type hubRepo struct {
	folder  string
	refs    map[string]string // revision: commit
	unnamed []string          // commits that no revision names
	trees   map[string]*hubTree
}

type hubTree struct {
	files    map[string]hubFile
	complete bool
}

// hubFile is one value of trees/COMMIT.json. The client's xet_hash is left out
// on purpose: with it the client would ask the hub's chunk store instead of
// taking the file that is there.
type hubFile struct {
	Size      int64  `json:"size"`
	BlobID    string `json:"blob_id"`
	LFSSHA256 string `json:"lfs_sha256,omitempty"`
	LFSSize   *int64 `json:"lfs_size,omitempty"`
}

func (p *planner) hub(models []Model) error {
	if err := p.add(Entry{Path: "CACHEDIR.TAG", Kind: Inline, Data: []byte(cacheTag)}); err != nil {
		return err
	}
	repos := make(map[string]*hubRepo)
	names := make(map[string]string) // folder: repository
	for _, m := range models {
		if err := checkRepo(m.Repo); err != nil {
			return err
		}
		folder := "models--" + strings.ReplaceAll(m.Repo, "/", "--")
		if other, ok := names[folder]; ok && other != m.Repo {
			return fmt.Errorf("%w: %q and %q would share the folder %s", ErrInvalid, other, m.Repo, folder)
		}
		names[folder] = m.Repo
		r := repos[folder]
		if r == nil {
			r = &hubRepo{folder: folder, refs: map[string]string{}, trees: map[string]*hubTree{}}
			repos[folder] = r
		}
		if err := p.hubModel(r, m); err != nil {
			return err
		}
	}
	for _, folder := range slices.Sorted(maps.Keys(repos)) {
		if err := p.hubRepo(repos[folder]); err != nil {
			return err
		}
	}
	return nil
}

// hubModel adds blobs and snapshot of one version.
func (p *planner) hubModel(r *hubRepo, m Model) error {
	commit, err := m.commit()
	if err != nil {
		return err
	}
	named := false
	for _, rev := range m.Revisions {
		if reference.IsCommit(rev) {
			continue
		}
		if other, ok := r.refs[rev]; ok && other != commit {
			return fmt.Errorf("%w: two versions of %q (commits %.12s and %.12s) would both be its revision %q", ErrInvalid, m.Repo, other, commit, rev)
		}
		r.refs[rev] = commit
		named = true
	}
	if !named {
		r.unnamed = append(r.unnamed, commit)
	}
	t := r.trees[commit]
	if t == nil {
		t = &hubTree{files: make(map[string]hubFile, len(m.Pack.Files))}
		r.trees[commit] = t
	}
	t.complete = t.complete || !m.Pack.Partial
	for _, f := range m.Pack.Files {
		if err := modelpack.CheckPath(f.Path); err != nil {
			return fmt.Errorf("%w: %w", ErrInvalid, err)
		}
		etag, entry := hubIdentity(f)
		if err := p.add(blob(r.folder+"/blobs/"+etag, f)); err != nil {
			return err
		}
		link := r.folder + "/snapshots/" + commit + "/" + f.Path
		up := strings.Repeat("../", strings.Count(f.Path, "/")+2)
		if err := p.add(Entry{Path: link, Kind: Symlink, Target: up + "blobs/" + etag}); err != nil {
			return err
		}
		t.files[f.Path] = entry
	}
	return nil
}

// hubRepo adds what belongs to a repository as a whole.
func (p *planner) hubRepo(r *hubRepo) error {
	// A commit without a ref is what `hf cache prune` deletes.
	for _, commit := range r.unnamed {
		if slices.Contains(slices.Collect(maps.Values(r.refs)), commit) {
			continue
		}
		name := reference.DefaultRevision
		if _, taken := r.refs[name]; taken || p.catalog {
			name = "larder-" + commit[:12]
		}
		r.refs[name] = commit
	}
	for rev, commit := range r.refs {
		if err := p.add(Entry{Path: path.Join(r.folder, "refs") + "/" + rev, Kind: Inline, Data: []byte(commit)}); err != nil {
			return err
		}
	}
	for commit, t := range r.trees {
		// Where files were left out, a list of those that are here would be
		// taken for the whole repository.
		if !t.complete {
			continue
		}
		data, err := json.MarshalIndent(struct {
			FormatVersion int                `json:"format_version"`
			Files         map[string]hubFile `json:"files"`
		}{1, t.files}, "", " ")
		if err != nil {
			return fmt.Errorf("encode file list of %s: %w", r.folder, err)
		}
		e := Entry{Path: r.folder + "/trees/" + commit + ".json", Kind: Inline, Data: data}
		if p.file == 0o666 {
			e.Mode = 0o644
		}
		if err := p.add(e); err != nil {
			return err
		}
	}
	return p.add(Entry{Path: ".locks/" + r.folder, Kind: Dir})
}

// hubIdentity gives the name of a file in blobs and its line in the tree list.
// A file of which no git id is known is one that hubs keep in LFS: its name is
// its SHA-256, and what git holds is a pointer of three lines
// (https://github.com/git-lfs/git-lfs/blob/main/docs/spec.md).
func hubIdentity(f modelpack.File) (etag string, entry hubFile) {
	if f.GitOID != "" {
		return f.GitOID, hubFile{Size: f.Size, BlobID: f.GitOID}
	}
	sum := f.Digest.Encoded()
	pointer := fmt.Sprintf("version https://git-lfs.github.com/spec/v1\noid sha256:%s\nsize %d\n", sum, f.Size)
	oid := sha1.Sum(fmt.Appendf(nil, "blob %d\x00%s", len(pointer), pointer))
	size := f.Size
	return sum, hubFile{Size: f.Size, BlobID: hex.EncodeToString(oid[:]), LFSSHA256: sum, LFSSize: &size}
}
