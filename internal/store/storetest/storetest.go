// Package storetest makes large stores quickly, for tests of cost. What it
// makes is what the store itself would have made, but for the bytes of files:
// they are holes of the right size.
package storetest

import (
	"crypto/sha256"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/larder-project/larder/internal/modelpack"
	"github.com/larder-project/larder/internal/store"
)

// Shape of a store.
type Shape struct {
	Models   int // short names m0, m1, ...
	Versions int // in all, dealt out to the models in turn; 1.0.0, 1.0.1, ... 1.1.0
	Layers   int // files of a version
	Fresh    int // of these, files that the version before it in its model has not
	Size     int64
	Created  func(version int) time.Time
}

// Fill makes a store of a shape in dir, which must be missing or empty.
func Fill(dir string, sh Shape) (*store.Store, error) {
	s, err := store.Open(dir)
	if err != nil {
		return nil, err
	}
	blobs := filepath.Join(s.BlobsDir(), "sha256")
	put := func(data []byte) (digest.Digest, error) {
		d := digest.FromBytes(data)
		return d, os.WriteFile(filepath.Join(blobs, d.Encoded()), data, 0o444)
	}
	index := v1.Index{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: v1.MediaTypeImageIndex, Manifests: []v1.Descriptor{}}
	last := make([][]modelpack.File, sh.Models)
	serial := uint64(0)
	for n := range sh.Versions {
		m, nth := n%sh.Models, n/sh.Models
		files := append([]modelpack.File{}, last[m]...)
		for k := range sh.Layers {
			if nth > 0 && (k+nth)%sh.Layers >= sh.Fresh {
				continue // as in the version before
			}
			serial++
			var seed [8]byte
			binary.LittleEndian.PutUint64(seed[:], serial)
			h := sha256.Sum256(seed[:])
			f := modelpack.File{Path: fmt.Sprintf("model-%05d-of-%05d.safetensors", k+1, sh.Layers), Digest: store.Hash(h).Digest(), Size: sh.Size}
			if k < len(files) {
				files[k] = f
			} else {
				files = append(files, f)
			}
			if err := hole(filepath.Join(blobs, f.Digest.Encoded()), sh.Size); err != nil {
				return nil, err
			}
		}
		last[m] = files
		manifest, config, err := modelpack.Build(modelpack.Model{Revision: fmt.Sprint(n), Files: files})
		if err != nil {
			return nil, err
		}
		if _, err := put(config); err != nil {
			return nil, err
		}
		d, err := put(manifest)
		if err != nil {
			return nil, err
		}
		index.Manifests = append(index.Manifests, v1.Descriptor{
			MediaType: v1.MediaTypeImageManifest, ArtifactType: modelpack.ArtifactType, Digest: d, Size: int64(len(manifest)),
			Annotations: map[string]string{
				v1.AnnotationRefName: fmt.Sprintf("m%d:1.%d.%d", m, nth/10, nth%10),
				v1.AnnotationCreated: sh.Created(n).UTC().Format(time.RFC3339Nano),
			},
		})
	}
	data, err := json.Marshal(index)
	if err != nil {
		return nil, err
	}
	return s, os.WriteFile(filepath.Join(dir, v1.ImageIndexFile), data, 0o644)
}

func hole(path string, size int64) error {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_WRONLY|os.O_EXCL, 0o444)
	if err != nil {
		return err
	}
	if err := f.Truncate(size); err != nil {
		_ = f.Close()
		return err
	}
	return f.Close()
}
