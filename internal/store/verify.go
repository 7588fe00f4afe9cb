package store

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"runtime"
	"slices"
	"strings"
	"sync"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sync/errgroup"

	"github.com/larder-project/larder/internal/disk"
	"github.com/larder-project/larder/internal/modelpack"
)

// Problem is something that Verify found damaged.
type Problem struct {
	Digest digest.Digest
	What   string   // missing, size, content, manifest, or unreadable
	Detail string   // for a person
	Files  []string // REFERENCE:PATH of each file that the blob is

	file fs.FileInfo // the blob that was read, or nil
}

// VerifyProgress is told the number of bytes read as they are read. It may be
// nil.
type VerifyProgress func(bytes int64)

// Verify reads every blob of the given versions again, or of the whole store
// (blobs that no reference reaches included) when none is given, and compares
// size and SHA-256. It changes nothing. The error is not nil only when the
// check could not be carried out.
func (s *Store) Verify(ctx context.Context, versions []Version, progress VerifyProgress) ([]Problem, error) {
	all := versions == nil
	if all {
		var err error
		if versions, err = s.Versions(); err != nil {
			return nil, err
		}
	}
	expect := map[digest.Digest]int64{} // -1: not known
	files := map[digest.Digest][]string{}
	var problems []Problem
	for _, v := range versions {
		name := string(v.Digest)
		if len(v.References) > 0 {
			name = v.References[0]
		}
		expect[v.Digest] = v.Size
		files[v.Digest] = append(files[v.Digest], name+" (manifest)")
		data, err := s.readBlob(v.Digest, modelpack.MaxManifestBytes)
		if err != nil {
			continue // reported below, by the read of the blob itself
		}
		m, config, err := modelpack.Parse(data)
		if err != nil {
			problems = append(problems, Problem{Digest: v.Digest, What: "manifest", Detail: err.Error(), Files: []string{name}})
			continue
		}
		expect[config.Digest] = config.Size
		files[config.Digest] = append(files[config.Digest], name+" (config)")
		for _, f := range m.Files {
			expect[f.Digest] = f.Size
			files[f.Digest] = append(files[f.Digest], name+":"+f.Path)
		}
	}
	if all {
		entries, err := os.ReadDir(s.path(blobsName, sha256Name))
		if err != nil {
			return nil, fmt.Errorf("verify: %w", err)
		}
		for _, e := range entries {
			d := digest.NewDigestFromEncoded(digest.SHA256, e.Name())
			if !isBlobName(e.Name()) {
				problems = append(problems, Problem{Digest: "", What: "unknown", Detail: s.path(blobsName, sha256Name, e.Name()) + " is not a blob's name"})
			} else if _, ok := expect[d]; !ok {
				expect[d] = -1
			}
		}
	}
	var mu sync.Mutex
	group, ctx := errgroup.WithContext(ctx)
	group.SetLimit(max(2, runtime.NumCPU()))
	for d, size := range expect {
		group.Go(func() error {
			file, what, detail, err := s.checkBlob(ctx, d, size, progress)
			if err != nil || what == "" {
				return err
			}
			mu.Lock()
			defer mu.Unlock()
			problems = append(problems, Problem{Digest: d, What: what, Detail: detail, Files: files[d], file: file})
			return nil
		})
	}
	if err := group.Wait(); err != nil {
		return problems, fmt.Errorf("verify: %w", err)
	}
	slices.SortFunc(problems, func(a, b Problem) int {
		return strings.Compare(a.What+string(a.Digest), b.What+string(b.Digest))
	})
	return problems, nil
}

const readSize = 1 << 20

func (s *Store) checkBlob(ctx context.Context, d digest.Digest, size int64, progress VerifyProgress) (file fs.FileInfo, what, detail string, err error) {
	f, err := os.Open(s.BlobPath(d))
	if errors.Is(err, fs.ErrNotExist) {
		if size < 0 {
			return file, "", "", nil // collected meanwhile
		}
		return file, "missing", "the blob is not there", nil
	}
	if err != nil {
		return file, "unreadable", err.Error(), nil
	}
	defer f.Close()
	if file, err = f.Stat(); err != nil {
		return nil, "unreadable", err.Error(), nil
	}
	hash := digest.SHA256.Digester()
	var n int64
	for buf := make([]byte, readSize); ; {
		if err := ctx.Err(); err != nil {
			return file, "", "", err
		}
		k, err := f.Read(buf)
		_, _ = hash.Hash().Write(buf[:k])
		n += int64(k)
		if progress != nil {
			progress(int64(k))
		}
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return file, "unreadable", err.Error(), nil
		}
	}
	switch {
	case size >= 0 && n != size:
		return file, "size", fmt.Sprintf("it has %d bytes, not %d", n, size), nil
	case hash.Digest() != d:
		return file, "content", fmt.Sprintf("its bytes have SHA-256 %s", hash.Digest().Encoded()), nil
	}
	return file, "", "", nil
}

// Quarantine takes a damaged blob out of the store, so that the next pull or
// import brings it in anew. The bytes stay in ingest/ under a name that tells
// what they are, until clean-up finds them old. Containers that have the file
// open keep it; others get an error instead of wrong bytes. A blob that has
// been replaced since it was found damaged stays: moved is then false.
func (s *Store) Quarantine(ctx context.Context, p Problem) (moved bool, err error) {
	if err := modelpack.CheckDigest(p.Digest); err != nil {
		return false, fmt.Errorf("quarantine: %w", err)
	}
	unlock, err := s.lock(ctx, true)
	if err != nil {
		return false, err
	}
	defer unlock()
	now, err := os.Lstat(s.BlobPath(p.Digest))
	if errors.Is(err, fs.ErrNotExist) || err == nil && p.file != nil && !os.SameFile(now, p.file) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("quarantine: %w", err)
	}
	to := s.path("ingest", damagedPrefix+p.Digest.Encoded()+"-"+randomID())
	if err := disk.Rename(s.BlobPath(p.Digest), to); err != nil {
		return false, fmt.Errorf("quarantine: %w", err)
	}
	return true, disk.SyncDir(s.path(blobsName, sha256Name))
}

// damagedPrefix begins the names of blobs that were found damaged, in ingest/.
const damagedPrefix = "damaged-"
