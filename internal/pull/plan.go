package pull

import (
	"fmt"
	"strings"

	"github.com/opencontainers/go-digest"

	"github.com/larder-project/larder/internal/modelpack"
	"github.com/larder-project/larder/internal/reference"
	"github.com/larder-project/larder/internal/source"
)

// item is one content to have: files of the snapshot that are known to be
// equal share it.
type item struct {
	want  source.File // the first of the files
	paths []string    // all of them

	digest  digest.Digest // once the blob is in the store
	gitOID  string        // of the content, where the version records it
	how     How
	sound   bool  // the blob was made, or read as a whole, by this run
	resumed int64 // bytes that were there from an earlier pull
}

func (it *item) have(d digest.Digest, how How) {
	it.digest, it.how = d, how
}

// A file of a plain folder gets its git object id worked out while it is
// hashed if it is no larger than this: the hub keeps larger ones in LFS and
// names them by SHA-256.
const gitLimit = 10 << 20

// wantsGit tells whether the git object id is part of what is computed.
func (it *item) wantsGit() bool {
	return it.want.GitOID != "" || it.want.SHA256 == "" && it.want.Size <= gitLimit
}

// key names the ingest of a content that is known beforehand.
func (it *item) key() string {
	switch {
	case it.want.SHA256 != "":
		return "sha256-" + it.want.SHA256.Encoded()
	case it.want.GitOID != "":
		return "git-" + it.want.GitOID
	}
	return ""
}

// plan checks a snapshot and groups files of equal content. Pure.
func plan(snap source.Snapshot) ([]*item, error) {
	invalid := func(f source.File, format string, args ...any) error {
		return fmt.Errorf("%w: file %.200q: %s", source.ErrInvalid, f.Path, fmt.Sprintf(format, args...))
	}
	if len(snap.Files) == 0 {
		return nil, fmt.Errorf("%w: it has no files", source.ErrInvalid)
	}
	paths := make([]string, len(snap.Files))
	for i, f := range snap.Files {
		paths[i] = f.Path
	}
	if err := modelpack.CheckNames(paths); err != nil {
		return nil, fmt.Errorf("%w: %w", source.ErrInvalid, err)
	}
	if len(snap.References) == 0 {
		return nil, fmt.Errorf("no name was given to publish it under")
	}
	byKey := map[string]*item{}
	names := make(map[string]bool, len(snap.Files))
	items := make([]*item, 0, len(snap.Files))
	var total int64
	for _, f := range snap.Files {
		if names[f.Path] {
			return nil, invalid(f, "it is listed twice")
		}
		names[f.Path] = true
		if f.Size < 0 || total+f.Size < total {
			return nil, invalid(f, "its size is given as %d bytes", f.Size)
		}
		total += f.Size
		if f.SHA256 != "" {
			if err := modelpack.CheckDigest(f.SHA256); err != nil {
				return nil, invalid(f, "%v", err)
			}
		}
		if f.GitOID != "" && !reference.IsCommit(f.GitOID) {
			return nil, invalid(f, "its git object id is given as %.100q", f.GitOID)
		}
		it := &item{want: f, gitOID: f.GitOID}
		key := it.key()
		if same := byKey[key]; key != "" && same != nil {
			if same.want.Size != f.Size {
				return nil, invalid(f, "its content is that of %.200q, but %d bytes long instead of %d", same.want.Path, f.Size, same.want.Size)
			}
			same.paths = append(same.paths, f.Path)
			continue
		}
		it.paths = []string{f.Path}
		byKey[key] = it
		items = append(items, it)
	}
	// A file that is also a folder is found now, not after the download.
	for name := range names {
		for i := range len(name) {
			if name[i] == '/' && names[name[:i]] {
				return nil, fmt.Errorf("%w: %.200q is both a file and a folder", source.ErrInvalid, name[:i])
			}
		}
	}
	return items, nil
}

func compare(a, b string) int { return strings.Compare(a, b) }
