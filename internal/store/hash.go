package store

import (
	"encoding/hex"

	"github.com/opencontainers/go-digest"
)

// Hash is the SHA-256 in the name of a blob. A million of them fit where as
// many digests, which are texts, would not.
type Hash [32]byte

// HashOf reads a digest. ok is false for what is no SHA-256.
func HashOf(d digest.Digest) (h Hash, ok bool) {
	if len(d) != len("sha256:")+64 || d[:7] != "sha256:" {
		return h, false
	}
	return parseHash(string(d[7:]))
}

func parseHash(name string) (h Hash, ok bool) {
	if len(name) != 64 || !isBlobName(name) {
		return h, false
	}
	_, err := hex.Decode(h[:], []byte(name))
	return h, err == nil
}

// Digest is the hash as OCI writes it.
func (h Hash) Digest() digest.Digest {
	return digest.Digest("sha256:" + hex.EncodeToString(h[:]))
}
