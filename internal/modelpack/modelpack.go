// Package modelpack knows how one version of a model is written down: a CNCF
// ModelPack manifest (an OCI image manifest with an artifact type of its own)
// whose layers are raw, one layer a file, so that the digest of a layer is the
// SHA-256 of the file.
//
// Build is deterministic: the same files under the same source give the same
// bytes and so the same digest. Parse trusts nothing: manifests come from
// registries and hubs. Format: https://github.com/modelpack/model-spec and
// https://github.com/opencontainers/image-spec.
package modelpack

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"path"
	"slices"
	"strings"

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
)

// Media types and annotations of the ModelPack format, and Larder's own.
const (
	ArtifactType    = "application/vnd.cncf.model.manifest.v1+json"
	MediaTypeConfig = "application/vnd.cncf.model.config.v1+json"

	mediaTypePrefix = "application/vnd.cncf.model."

	// AnnotationFilepath and AnnotationTitle carry the path of a layer's file,
	// with the same value, so that modctl, oras and CRI-O find the same tree.
	AnnotationFilepath = "org.cncf.model.filepath"
	AnnotationTitle    = v1.AnnotationTitle

	// AnnotationGitOID is the object id (git SHA-1 of a blob, 40 hex digits)
	// of a file that its hub does not keep in LFS. A hub cache names the file
	// by it.
	AnnotationGitOID = "dev.larder.git.oid"
	// AnnotationSource is the repository a model came from, such as
	// hf://Qwen/Qwen2.5-0.5B.
	AnnotationSource = "dev.larder.source"
	// AnnotationRevision is the fixed revision of the source: for a hub, the
	// 40 hex digits of a commit.
	AnnotationRevision = v1.AnnotationRevision
	// AnnotationPartial is "true" where the source has files that this version
	// leaves out (--include, --exclude).
	AnnotationPartial = "dev.larder.partial"
)

// Limits on what a manifest may claim. They bound memory, not models: the
// largest public models have a few thousand files.
const (
	MaxFiles         = 100_000
	MaxManifestBytes = 64 << 20
	maxPathBytes     = 1024
	maxNameBytes     = 255
)

// ErrInvalid is wrapped by every refusal of Parse, Build and CheckPath.
var ErrInvalid = errors.New("invalid model manifest")

// File is one file of a model.
type File struct {
	Path   string        // slash-separated, relative, checked by CheckPath
	Digest digest.Digest // SHA-256 of the bytes: the blob's name
	Size   int64         // bytes
	GitOID string        // git SHA-1 in hex, or empty
}

// Model is one version of a model.
type Model struct {
	Source   string // for instance hf://org/name; empty when unknown
	Revision string // commit of the source; empty when unknown
	Partial  bool   // files of the source are left out
	Files    []File // sorted by Path
}

// Size is the sum of the sizes of all files, in bytes; a file that appears
// under several names counts each time.
func (m Model) Size() int64 {
	var n int64
	for _, f := range m.Files {
		n += f.Size
	}
	return n
}

// Build gives the manifest and the config of a model as the bytes to store.
func Build(m Model) (manifest, config []byte, err error) {
	files := slices.Clone(m.Files)
	slices.SortFunc(files, func(a, b File) int { return strings.Compare(a.Path, b.Path) })
	if err := check(files); err != nil {
		return nil, nil, err
	}
	diffIDs := make([]digest.Digest, len(files))
	layers := make([]v1.Descriptor, len(files))
	for i, f := range files {
		diffIDs[i] = f.Digest
		layers[i] = v1.Descriptor{
			MediaType:   MediaType(f.Path),
			Digest:      f.Digest,
			Size:        f.Size,
			Annotations: map[string]string{AnnotationFilepath: f.Path, AnnotationTitle: f.Path},
		}
		if f.GitOID != "" {
			layers[i].Annotations[AnnotationGitOID] = f.GitOID
		}
	}
	config, err = json.Marshal(configJSON{
		Descriptor: configDescriptor{SourceURL: m.Source, Revision: m.Revision},
		ModelFS:    configModelFS{Type: "layers", DiffIDs: diffIDs},
	})
	if err != nil {
		return nil, nil, fmt.Errorf("encode model config: %w", err)
	}
	out := v1.Manifest{
		Versioned:    specs.Versioned{SchemaVersion: 2},
		MediaType:    v1.MediaTypeImageManifest,
		ArtifactType: ArtifactType,
		Config:       v1.Descriptor{MediaType: MediaTypeConfig, Digest: digest.FromBytes(config), Size: int64(len(config))},
		Layers:       layers,
		Annotations:  map[string]string{},
	}
	if m.Source != "" {
		out.Annotations[AnnotationSource] = m.Source
	}
	if m.Revision != "" {
		out.Annotations[AnnotationRevision] = m.Revision
	}
	if m.Partial {
		out.Annotations[AnnotationPartial] = "true"
	}
	manifest, err = json.Marshal(out)
	if err != nil {
		return nil, nil, fmt.Errorf("encode model manifest: %w", err)
	}
	// What is written must also be read again.
	if len(manifest) > MaxManifestBytes {
		return nil, nil, tooLong(len(files), len(manifest))
	}
	return manifest, config, nil
}

func tooLong(files, bytes int) error {
	return fmt.Errorf("%w: %d files with names so long that the manifest has %d bytes, at most %d are kept", ErrInvalid, files, bytes, MaxManifestBytes)
}

// CheckNames refuses what Build would, as far as paths alone tell: before
// anything is fetched.
func CheckNames(paths []string) error {
	if len(paths) > MaxFiles {
		return fmt.Errorf("%w: %d files, at most %d are kept", ErrInvalid, len(paths), MaxFiles)
	}
	const layer = 400 // bytes of a layer in a manifest, without its path
	length := 0
	for _, p := range paths {
		if err := CheckPath(p); err != nil {
			return err
		}
		name, err := json.Marshal(p)
		if err != nil {
			return fmt.Errorf("%w: path %.200q: %w", ErrInvalid, p, err)
		}
		length += layer + 2*len(name)
	}
	if length > MaxManifestBytes {
		return tooLong(len(paths), length)
	}
	return nil
}

// The config's schema is strict: no field beyond it, all three objects there.
type configJSON struct {
	Descriptor configDescriptor `json:"descriptor"`
	Config     struct{}         `json:"config"`
	ModelFS    configModelFS    `json:"modelfs"`
}

type configDescriptor struct {
	SourceURL string `json:"sourceURL,omitempty"`
	Revision  string `json:"revision,omitempty"`
}

type configModelFS struct {
	Type    string          `json:"type"`
	DiffIDs []digest.Digest `json:"diffIds"`
}

// Parse reads a manifest and returns the model it describes, with the
// descriptor of its config. Layers that are not raw are refused: Larder keeps
// one blob a file.
func Parse(manifest []byte) (Model, v1.Descriptor, error) {
	none := v1.Descriptor{}
	if len(manifest) > MaxManifestBytes {
		return Model{}, none, fmt.Errorf("%w: %d bytes, at most %d are read", ErrInvalid, len(manifest), MaxManifestBytes)
	}
	// Each layer has two objects. A short text can hold so many that they fill
	// the memory before they are counted.
	if n := bytes.Count(manifest, []byte("{")); n > 4*MaxFiles {
		return Model{}, none, fmt.Errorf("%w: %d objects, at most %d layers are read", ErrInvalid, n, MaxFiles)
	}
	var in v1.Manifest
	dec := json.NewDecoder(bytes.NewReader(manifest))
	if err := dec.Decode(&in); err != nil {
		return Model{}, none, fmt.Errorf("%w: %w", ErrInvalid, err)
	}
	if dec.More() {
		return Model{}, none, fmt.Errorf("%w: text after the JSON object", ErrInvalid)
	}
	switch {
	case in.SchemaVersion != 2:
		return Model{}, none, fmt.Errorf("%w: schemaVersion %d, 2 is known", ErrInvalid, in.SchemaVersion)
	case in.ArtifactType != ArtifactType:
		return Model{}, none, fmt.Errorf("%w: artifactType %.100q, a model has %q", ErrInvalid, in.ArtifactType, ArtifactType)
	case in.Config.MediaType != MediaTypeConfig:
		return Model{}, none, fmt.Errorf("%w: config media type %.100q, a model has %q", ErrInvalid, in.Config.MediaType, MediaTypeConfig)
	}
	if err := CheckDigest(in.Config.Digest); err != nil {
		return Model{}, none, fmt.Errorf("config: %w", err)
	}
	if len(in.Layers) > MaxFiles {
		return Model{}, none, fmt.Errorf("%w: %d layers, at most %d are read", ErrInvalid, len(in.Layers), MaxFiles)
	}
	m := Model{
		Source:   in.Annotations[AnnotationSource],
		Revision: in.Annotations[AnnotationRevision],
		Partial:  in.Annotations[AnnotationPartial] == "true",
		Files:    make([]File, 0, len(in.Layers)),
	}
	for i, l := range in.Layers {
		if !strings.HasPrefix(l.MediaType, mediaTypePrefix) || !strings.HasSuffix(l.MediaType, ".raw") {
			return Model{}, none, fmt.Errorf("%w: layer %d has media type %.100q, only raw layers are kept", ErrInvalid, i, l.MediaType)
		}
		name := l.Annotations[AnnotationFilepath]
		if name == "" {
			name = l.Annotations[AnnotationTitle]
		}
		m.Files = append(m.Files, File{Path: name, Digest: l.Digest, Size: l.Size, GitOID: l.Annotations[AnnotationGitOID]})
	}
	slices.SortFunc(m.Files, func(a, b File) int { return strings.Compare(a.Path, b.Path) })
	if err := check(m.Files); err != nil {
		return Model{}, none, err
	}
	return m, in.Config, nil
}

// check holds what is true of every model: at least one file, safe paths, no
// name twice, no name that is both file and folder, one size a digest.
func check(files []File) error {
	if len(files) == 0 {
		return fmt.Errorf("%w: it has no files", ErrInvalid)
	}
	if len(files) > MaxFiles {
		return fmt.Errorf("%w: %d files, at most %d are kept", ErrInvalid, len(files), MaxFiles)
	}
	names := make(map[string]bool, len(files))
	sizes := make(map[digest.Digest]int64, len(files))
	var total int64
	for _, f := range files {
		if err := CheckPath(f.Path); err != nil {
			return err
		}
		if err := CheckDigest(f.Digest); err != nil {
			return fmt.Errorf("file %q: %w", f.Path, err)
		}
		if f.Size < 0 || total+f.Size < total {
			return fmt.Errorf("%w: file %q has size %d", ErrInvalid, f.Path, f.Size)
		}
		total += f.Size
		if f.GitOID != "" && !isHex(f.GitOID, 40) {
			return fmt.Errorf("%w: file %q has git object id %.100q", ErrInvalid, f.Path, f.GitOID)
		}
		if names[f.Path] {
			return fmt.Errorf("%w: path %q appears twice", ErrInvalid, f.Path)
		}
		names[f.Path] = true
		if size, ok := sizes[f.Digest]; ok && size != f.Size {
			return fmt.Errorf("%w: digest %s is given both as %d and as %d bytes", ErrInvalid, f.Digest, size, f.Size)
		}
		sizes[f.Digest] = f.Size
	}
	for _, f := range files {
		for dir := path.Dir(f.Path); dir != "."; dir = path.Dir(dir) {
			if names[dir] {
				return fmt.Errorf("%w: %q is both a file and a folder (of %q)", ErrInvalid, dir, f.Path)
			}
		}
	}
	return nil
}

// CheckPath refuses every path that could lead out of a folder, or that some
// program would take for another path. It wraps ErrInvalid.
func CheckPath(p string) error {
	bad := func(why string) error { return fmt.Errorf("%w: path %.200q %s", ErrInvalid, p, why) }
	switch {
	case p == "":
		return bad("is empty")
	case len(p) > maxPathBytes:
		return bad(fmt.Sprintf("is longer than %d bytes", maxPathBytes))
	case p[0] == '/':
		return bad("is absolute")
	case strings.ContainsRune(p, '\\'):
		return bad(`contains a backslash`)
	}
	for _, r := range p {
		if r < 0x20 || r == 0x7f {
			return bad("contains a control character")
		}
		if r == '\uFFFD' {
			return bad("is not valid UTF-8")
		}
	}
	for seg := range strings.SplitSeq(p, "/") {
		switch {
		case seg == "":
			return bad("has an empty element")
		case seg == "." || seg == "..":
			return bad(fmt.Sprintf("has an element %q", seg))
		case len(seg) > maxNameBytes:
			return bad(fmt.Sprintf("has an element longer than %d bytes", maxNameBytes))
		}
	}
	return nil
}

// CheckDigest accepts SHA-256 only: a blob's name is the SHA-256 of its bytes.
func CheckDigest(d digest.Digest) error {
	hex, ok := strings.CutPrefix(string(d), "sha256:")
	if !ok || !isHex(hex, 64) {
		return fmt.Errorf("%w: digest %.100q is not sha256 with 64 hex digits", ErrInvalid, string(d))
	}
	return nil
}

func isHex(s string, n int) bool {
	return len(s) == n && strings.Trim(s, "0123456789abcdef") == ""
}

// MediaType guesses the kind of a file from its name: weights, their
// configuration, code, documents. Readers treat all kinds alike.
func MediaType(name string) string {
	kind := "weight.config"
	base := strings.ToLower(path.Base(name))
	switch path.Ext(base) {
	case ".safetensors", ".gguf", ".ggml", ".bin", ".pt", ".pth", ".ckpt", ".onnx", ".onnx_data", ".h5", ".msgpack", ".npz", ".npy", ".ot", ".tflite", ".mlmodel", ".pdparams":
		kind = "weight"
	case ".py", ".sh", ".ipynb", ".c", ".cc", ".cpp", ".cu", ".h", ".go", ".rs", ".js", ".ts":
		kind = "code"
	case ".md", ".rst", ".pdf", ".png", ".jpg", ".jpeg", ".svg", ".gif":
		kind = "doc"
	}
	if strings.HasPrefix(base, "license") || strings.HasPrefix(base, "readme") || strings.HasPrefix(base, "notice") {
		kind = "doc"
	}
	return mediaTypePrefix + kind + ".v1.raw"
}
