package modelpack

import (
	"bytes"
	"encoding/json"
)

// EachDigest calls f with the hex digits of every SHA-256 digest that stands
// as a text of its own in a JSON document: at least those of config and layers
// of a manifest, in their order, repeated where they are repeated. size is what
// follows as the size of the same descriptor, as Build writes it, or -1. It is
// for marking what must stay, where one too many does no harm; it reads a
// gigabyte a second and makes nothing. The document must be JSON: the caller
// has checked its digest, and whoever wrote it has parsed it.
func EachDigest(doc []byte, f func(hex []byte, size int64)) {
	// A digest can be written with escapes. Nobody does, so that is left to
	// the slow way.
	if bytes.Contains(doc, []byte(`\u`)) {
		eachDigestSlowly(doc, f)
		return
	}
	const start = `"sha256:`
	for {
		i := bytes.Index(doc, []byte(start))
		if i < 0 {
			return
		}
		doc = doc[i+len(start):]
		if len(doc) > 64 && doc[64] == '"' && isHexBytes(doc[:64]) {
			f(doc[:64], sizeAfter(doc[65:]))
		}
	}
}

// sizeAfter reads ,"size":N right after a digest.
func sizeAfter(doc []byte) int64 {
	const key = `,"size":`
	if !bytes.HasPrefix(doc, []byte(key)) {
		return -1
	}
	var n int64
	for i, c := range doc[len(key):] {
		switch {
		case c >= '0' && c <= '9' && i < 18:
			n = n*10 + int64(c-'0')
		case (c == ',' || c == '}') && i > 0:
			return n
		default:
			return -1
		}
	}
	return -1
}

func eachDigestSlowly(doc []byte, f func(hex []byte, size int64)) {
	dec := json.NewDecoder(bytes.NewReader(doc))
	for {
		token, err := dec.Token()
		if err != nil {
			return
		}
		if text, ok := token.(string); ok {
			if hex, ok := bytes.CutPrefix([]byte(text), []byte("sha256:")); ok && len(hex) == 64 && isHexBytes(hex) {
				f(hex, -1)
			}
		}
	}
}

func isHexBytes(b []byte) bool {
	for _, c := range b {
		if (c < '0' || c > '9') && (c < 'a' || c > 'f') {
			return false
		}
	}
	return true
}
