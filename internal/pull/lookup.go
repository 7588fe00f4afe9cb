package pull

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/opencontainers/go-digest"

	"github.com/larder-project/larder/internal/modelpack"
	"github.com/larder-project/larder/internal/source"
	"github.com/larder-project/larder/internal/store"
)

// lookUp finds what the store has. Digests are held before they are looked
// for.
func (r *run) lookUp(ctx context.Context) error {
	guess := make([]digest.Digest, len(r.items))
	var hold []digest.Digest
	var byGit map[string]modelpack.File
	for i, it := range r.items {
		d := it.want.SHA256
		if d == "" && it.want.GitOID != "" {
			if byGit == nil {
				var err error
				if byGit, err = r.st.ByGitOID(); err != nil {
					return err
				}
			}
			if f, ok := byGit[it.want.GitOID]; ok && f.Size == it.want.Size {
				d = f.Digest
			}
		}
		if d != "" {
			guess[i] = d
			hold = append(hold, d)
		}
	}
	if err := r.lease.Hold(ctx, hold...); err != nil {
		return err
	}
	for i, it := range r.items {
		if guess[i] == "" {
			continue
		}
		if _, err := r.find(it, guess[i]); err != nil {
			return err
		}
	}
	return r.lookUpBySize(ctx)
}

// find takes an item's blob from the store if it is there. d is held.
func (r *run) find(it *item, d digest.Digest) (bool, error) {
	size, ok, err := r.st.Stat(d)
	if err != nil || !ok {
		return false, err
	}
	if size != it.want.Size {
		return false, fmt.Errorf("%w: file %q is said to have %d bytes, but its content %s is in the store with %d bytes (larder verify tells whether the store's copy is sound)",
			source.ErrChanged, it.want.Path, it.want.Size, d, size)
	}
	it.have(d, Reused)
	return true, nil
}

// How many blobs of one size are hashed to find a small file among them.
const maxAlike = 16

// lookUpBySize finds small files of which only the git object id is known
// among blobs that no version lists, which is what a pull that died before it
// published leaves. Blobs of the right size are hashed both ways, so what is
// found is also known to be sound.
func (r *run) lookUpBySize(ctx context.Context) error {
	missing := false
	for _, it := range r.items {
		missing = missing || it.digest == "" && it.want.SHA256 == "" && it.want.GitOID != ""
	}
	if !missing {
		return nil
	}
	sizes, err := r.sizes()
	if err != nil {
		return err
	}
	for _, it := range r.items {
		if it.digest != "" || it.want.SHA256 != "" || it.want.GitOID == "" || it.want.Size > gitLimit {
			continue
		}
		alike := sizes[it.want.Size]
		for _, d := range alike[:min(len(alike), maxAlike)] {
			if err := r.lease.Hold(ctx, d); err != nil {
				return err
			}
			s, err := r.hashBlob(ctx, d, it.want.Size)
			if err != nil {
				return err
			}
			if s != nil && s.digest() == d && s.gitOID() == it.want.GitOID {
				it.have(d, Reused)
				it.sound = true
				break
			}
		}
	}
	return nil
}

// hashBlob hashes a blob of the store; nil means that it is gone.
func (r *run) hashBlob(ctx context.Context, d digest.Digest, size int64) (*sums, error) {
	f, err := os.Open(r.st.BlobPath(d))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read blob %s: %w", d, err)
	}
	defer f.Close()
	s := newSums(size, true)
	if _, err := io.Copy(s, &ctxReader{ctx, f}); err != nil {
		return nil, fmt.Errorf("read blob %s: %w", d, err)
	}
	return s, nil
}

type ctxReader struct {
	ctx context.Context
	r   io.Reader
}

func (c *ctxReader) Read(p []byte) (int, error) {
	if err := c.ctx.Err(); err != nil {
		return 0, err
	}
	return c.r.Read(p)
}

// sizes lists the store's blobs by size. They are hints: hold the digest, then
// look.
func (r *run) sizes() (map[int64][]digest.Digest, error) {
	dir := filepath.Join(r.st.BlobsDir(), string(digest.SHA256))
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, fmt.Errorf("list blobs: %w", err)
	}
	wanted := map[int64]bool{}
	for _, it := range r.items {
		if it.digest == "" {
			wanted[it.want.Size] = true
		}
	}
	out := map[int64][]digest.Digest{}
	for _, e := range entries {
		d := digest.NewDigestFromEncoded(digest.SHA256, e.Name())
		if modelpack.CheckDigest(d) != nil {
			continue
		}
		fi, err := e.Info()
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("list blobs: %w", err)
		}
		if fi.Mode().IsRegular() && wanted[fi.Size()] {
			out[fi.Size()] = append(out[fi.Size()], d)
		}
	}
	return out, nil
}

// ingest opens the ingest of a key and tells the person when that means to
// wait for another process.
func (r *run) ingest(ctx context.Context, it *item, key string) (*store.Ingest, error) {
	if r.st.Locked(key) {
		r.o.Progress.Wait(it.want.Path)
	}
	return r.st.Ingest(ctx, key)
}
