package pull

import (
	"crypto/sha1" // what git names content by; SHA-256 is computed beside it
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"hash"
	"io"

	"github.com/opencontainers/go-digest"

	"github.com/larder-project/larder/internal/source"
)

// sums hashes one file while its bytes pass.
type sums struct {
	sha256 hash.Hash
	git    hash.Hash // nil where the git object id is of no interest
	n      int64
}

// newSums begins the hashes of a file of size bytes. A git object id is the
// SHA-1 of "blob SIZE" NUL content.
func newSums(size int64, git bool) *sums {
	s := &sums{sha256: sha256.New()}
	if git {
		s.git = sha1.New()
		fmt.Fprintf(s.git, "blob %d\x00", size)
	}
	return s
}

// Write never fails.
func (s *sums) Write(p []byte) (int, error) {
	s.sha256.Write(p)
	if s.git != nil {
		s.git.Write(p)
	}
	s.n += int64(len(p))
	return len(p), nil
}

var _ io.Writer = (*sums)(nil)

func (s *sums) digest() digest.Digest { return digest.NewDigest(digest.SHA256, s.sha256) }

func (s *sums) gitOID() string {
	if s.git == nil {
		return ""
	}
	return hex.EncodeToString(s.git.Sum(nil))
}

// MismatchError says that a file's content is not what its source promised. It
// is source.ErrChanged.
type MismatchError struct {
	Path            string
	Expected, Found string // "sha256:HEX" or "git:HEX"
}

// Error implements error.
func (e *MismatchError) Error() string {
	return fmt.Sprintf("file %q: its content has %s, but %s was promised; the source or the way to it is damaged", e.Path, e.Found, e.Expected)
}

// Unwrap makes it source.ErrChanged.
func (e *MismatchError) Unwrap() error { return source.ErrChanged }

// check compares what was hashed with what was promised.
func (s *sums) check(want source.File) error {
	if s.n != want.Size {
		return fmt.Errorf("%w: file %q: %d bytes came, %d were promised", source.ErrChanged, want.Path, s.n, want.Size)
	}
	if d := s.digest(); want.SHA256 != "" && d != want.SHA256 {
		return &MismatchError{Path: want.Path, Expected: string(want.SHA256), Found: string(d)}
	}
	if oid := s.gitOID(); want.GitOID != "" && oid != want.GitOID {
		return &MismatchError{Path: want.Path, Expected: "git:" + want.GitOID, Found: "git:" + oid}
	}
	return nil
}
