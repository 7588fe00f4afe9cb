package e2e

import (
	"fmt"
	"io"
	"net/http"
	"strings"
	"sync"
)

// registry is as much of a container registry, held in memory, as docker
// plugin push and upgrade need.
type registry struct {
	mu        sync.Mutex
	blobs     map[string][]byte
	uploads   map[string][]byte
	manifests map[string]manifest // by tag and by digest
}

type manifest struct {
	kind string
	body []byte
}

func newRegistry() *registry {
	return &registry{blobs: map[string][]byte{}, uploads: map[string][]byte{}, manifests: map[string]manifest{}}
}

func (r *registry) ServeHTTP(w http.ResponseWriter, q *http.Request) {
	r.mu.Lock()
	defer r.mu.Unlock()
	body, err := io.ReadAll(q.Body)
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	path := q.URL.Path
	w.Header().Set("Docker-Distribution-Api-Version", "registry/2.0")
	send := func(kind, digest string, data []byte) {
		w.Header().Set("Content-Type", kind)
		w.Header().Set("Docker-Content-Digest", digest)
		w.Header().Set("Content-Length", fmt.Sprint(len(data)))
		if q.Method != http.MethodHead {
			_, _ = w.Write(data)
		}
	}
	switch last := path[strings.LastIndex(path, "/")+1:]; {
	case path == "/v2/":
		fmt.Fprint(w, "{}")
	case strings.Contains(path, "/blobs/uploads/") && q.Method == http.MethodPost:
		id := fmt.Sprintf("upload-%d", len(r.uploads))
		r.uploads[id] = nil
		w.Header().Set("Location", strings.TrimSuffix(path, "/")+"/"+id)
		w.Header().Set("Docker-Upload-UUID", id)
		w.WriteHeader(http.StatusAccepted)
	case strings.Contains(path, "/blobs/uploads/") && q.Method == http.MethodPatch:
		r.uploads[last] = append(r.uploads[last], body...)
		w.Header().Set("Location", path)
		w.Header().Set("Range", fmt.Sprintf("0-%d", len(r.uploads[last])-1))
		w.WriteHeader(http.StatusAccepted)
	case strings.Contains(path, "/blobs/uploads/") && q.Method == http.MethodPut:
		data := append(r.uploads[last], body...)
		digest := "sha256:" + sha256hex(data)
		if want := q.URL.Query().Get("digest"); want != digest {
			http.Error(w, "digest is "+digest, http.StatusBadRequest)
			return
		}
		r.blobs[digest] = data
		w.Header().Set("Docker-Content-Digest", digest)
		w.Header().Set("Location", path)
		w.WriteHeader(http.StatusCreated)
	case strings.Contains(path, "/blobs/"):
		if data, there := r.blobs[last]; there {
			send("application/octet-stream", last, data)
			return
		}
		http.Error(w, `{"errors":[{"code":"BLOB_UNKNOWN"}]}`, http.StatusNotFound)
	case strings.Contains(path, "/manifests/") && q.Method == http.MethodPut:
		digest := "sha256:" + sha256hex(body)
		m := manifest{kind: q.Header.Get("Content-Type"), body: body}
		r.manifests[last], r.manifests[digest] = m, m
		w.Header().Set("Docker-Content-Digest", digest)
		w.Header().Set("Location", path)
		w.WriteHeader(http.StatusCreated)
	case strings.Contains(path, "/manifests/"):
		if m, there := r.manifests[last]; there {
			send(m.kind, "sha256:"+sha256hex(m.body), m.body)
			return
		}
		http.Error(w, `{"errors":[{"code":"MANIFEST_UNKNOWN"}]}`, http.StatusNotFound)
	default:
		http.NotFound(w, q)
	}
}
