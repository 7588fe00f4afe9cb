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
	if len(name) != 64 {
		return h, false
	}
	for i := range h {
		hi, lo := nibble(name[2*i]), nibble(name[2*i+1])
		if hi > 15 || lo > 15 {
			return h, false
		}
		h[i] = hi<<4 | lo
	}
	return h, true
}

// Digest is the hash as OCI writes it.
func (h Hash) Digest() digest.Digest {
	return digest.Digest("sha256:" + hex.EncodeToString(h[:]))
}

// nibble is the value of a hex digit as names of blobs have them; more than 15
// for what is none.
func nibble(c byte) byte {
	switch {
	case c >= '0' && c <= '9':
		return c - '0'
	case c >= 'a' && c <= 'f':
		return c - 'a' + 10
	}
	return 0xff
}
