package main

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/opencontainers/go-digest"
	"github.com/spf13/cobra"

	"github.com/larder-project/larder/internal/gc"
	"github.com/larder-project/larder/internal/progress"
	"github.com/larder-project/larder/internal/store"
)

// held is what larder why prints with --json: one object.
type held struct {
	Digest   string        `json:"digest"`
	Kind     string        `json:"kind"` // version, blob
	There    bool          `json:"there"`
	Size     int64         `json:"size"`
	Versions []heldVersion `json:"versions"` // the version, or those that need the blob
	Lease    string        `json:"lease,omitempty"`
	Other    string        `json:"other,omitempty"`
	Trash    []string      `json:"trash"`   // removals that need it to be undone
	Past     []past        `json:"past"`    // newest first
	Unknown  []string      `json:"unknown"` // sources that could not tell
	Held     bool          `json:"held"`    // something holds it; where not, it may go
}

type heldVersion struct {
	Digest     string     `json:"digest"`
	References []string   `json:"references"`
	Paths      []string   `json:"paths,omitempty"` // of the blob in it
	Created    time.Time  `json:"created"`
	LastUsed   *time.Time `json:"last_used,omitempty"`
	Pinned     string     `json:"pinned,omitempty"`
	Uses       []heldUse  `json:"uses"`
	Policy     string     `json:"policy,omitempty"` // what the policy in force says: keep or remove, and why
}

type heldUse struct {
	Source    string `json:"source"`
	By        string `json:"by"`
	Container string `json:"container,omitempty"`
	PID       int    `json:"pid,omitempty"`
	GPU       string `json:"gpu,omitempty"`
}

func (a *app) cmdWhy() *cobra.Command {
	return &cobra.Command{
		Use:     "why MODEL|DIGEST|FILE",
		GroupID: cleaning,
		Short:   "Tell what holds a version or a file, or since when nothing does",
		Long: `Tell each root that holds a version, a blob or a file: names, containers, volumes,
mounts, GPUs, other nodes, pins, running pulls, the trash; what the policy in
force says of it; and where nothing holds it, since when.

DIGEST is sha256:HEX or its first digits. FILE is a path: of a blob, or of any
file, which is read to find its digest.

  larder why qwen:1.9.3
  larder why /var/lib/larder/store/blobs/sha256/3f21...
  larder why ./model.safetensors`,
		Args:              takes(1, 1, "a model, a digest or a file"),
		ValidArgsFunction: a.completeOneReference,
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := a.collector(cmd.Context())
			if err != nil {
				return err
			}
			d, err := a.digestOf(cmd.Context(), c, args[0])
			if err != nil {
				return err
			}
			w, err := c.Why(cmd.Context(), d)
			if err != nil {
				if errors.Is(err, store.ErrNotFound) {
					return &hintError{err: fmt.Errorf("%s is %w, nor in its trash or its history", d, store.ErrNotFound), hint: "larder ls lists what is there"}
				}
				return err
			}
			return a.printWhy(w)
		},
	}
}

// digestOf finds what a person means: a name, digits, or a file.
func (a *app) digestOf(ctx context.Context, c *gc.Collector, arg string) (digest.Digest, error) {
	if strings.ContainsRune(arg, filepath.Separator) && !strings.Contains(arg, "://") {
		if fi, err := os.Stat(arg); err == nil && fi.Mode().IsRegular() {
			return a.digestOfFile(ctx, arg, fi.Size())
		}
		// Of a blob that is gone, the name is left.
		if name := filepath.Base(arg); len(name) == 64 && isDigits(name) {
			return digest.NewDigestFromEncoded(digest.SHA256, name), nil
		}
	}
	v, _, err := resolve(a.st, arg)
	if err == nil {
		return v.Digest, nil
	}
	if d, parseErr := digest.Parse(arg); parseErr == nil {
		return d, nil
	}
	if isDigits(arg) {
		found, findErr := c.Find(arg)
		switch {
		case findErr != nil:
			return "", findErr
		case len(found) == 1:
			return found[0], nil
		case len(found) > 1:
			return "", &usageError{err: fmt.Errorf("%s begins the names of %d blobs", arg, len(found)), hint: "give more digits"}
		case len(arg) == 64:
			return digest.NewDigestFromEncoded(digest.SHA256, arg), nil
		}
	}
	return "", err
}

// digestOfFile is the name of a blob, or the digest of any other file's bytes.
func (a *app) digestOfFile(ctx context.Context, path string, size int64) (digest.Digest, error) {
	real, err := filepath.EvalSymlinks(path)
	if err != nil {
		return "", err
	}
	if real, err = filepath.Abs(real); err != nil {
		return "", err
	}
	if name := filepath.Base(real); filepath.Dir(real) == filepath.Join(a.st.BlobsDir(), "sha256") && len(name) == 64 && isDigits(name) {
		return digest.NewDigestFromEncoded(digest.SHA256, name), nil
	}
	f, err := os.Open(real)
	if err != nil {
		return "", err
	}
	defer f.Close()
	m := a.meter(false)
	defer m.Close()
	if size > 256<<20 { // a second or less needs no progress
		m.Start(progress.Plan{What: "read " + path, Bytes: size})
	}
	h := sha256.New()
	buf := make([]byte, 1<<20)
	for {
		if err := ctx.Err(); err != nil {
			return "", err
		}
		n, err := f.Read(buf)
		h.Write(buf[:n])
		m.Add(path, int64(n))
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return "", err
		}
	}
	return digest.NewDigest(digest.SHA256, h), nil
}

func (a *app) printWhy(w gc.Why) error {
	out := held{
		Digest: w.Digest.String(), Kind: "version", There: w.There, Size: w.Size, Versions: []heldVersion{},
		Lease: w.Lease, Other: w.Other, Trash: append([]string{}, w.Trash...), Past: []past{}, Unknown: []string{},
		Held: w.Lease != "" || w.Other != "" || len(w.Trash) > 0,
	}
	if w.Blob {
		out.Kind = "blob"
	}
	for _, f := range w.Failed {
		out.Unknown = append(out.Unknown, f.Error())
	}
	for _, e := range w.Events {
		for _, p := range pastOf(e) {
			if p.Digest == out.Digest {
				out.Past = append(out.Past, p)
			}
		}
	}
	says := a.policySays(w)
	for _, v := range w.Versions {
		one := a.heldVersion(v, w)
		one.Policy = says[v.Digest]
		out.Held = out.Held || len(one.References) > 0 || one.Pinned != "" || len(one.Uses) > 0
		out.Versions = append(out.Versions, one)
	}
	if a.json {
		return printJSON(a.out, out)
	}
	return a.printHeld(out)
}

func (a *app) heldVersion(v gc.VersionInfo, w gc.Why) heldVersion {
	out := heldVersion{Digest: v.Digest.String(), References: append([]string{}, v.References...), Created: v.Created, Uses: []heldUse{}}
	if !v.LastUsed.IsZero() {
		out.LastUsed = &v.LastUsed
	}
	if v.Pin != nil {
		out.Pinned = v.Pin.Text()
	}
	for _, u := range v.Uses {
		one := heldUse{Source: u.Source, By: u.By, PID: u.PID, GPU: u.GPU}
		if u.Container.ID != "" {
			one.Container = u.Container.Label()
		}
		out.Uses = append(out.Uses, one)
	}
	if !w.Blob {
		return out
	}
	if m, err := a.st.Model(v.Digest); err == nil {
		for _, f := range m.Files {
			if f.Digest == w.Digest {
				out.Paths = append(out.Paths, f.Path)
			}
		}
	}
	return out
}

// policySays asks the policy in force about a version.
func (a *app) policySays(w gc.Why) map[digest.Digest]string {
	out := map[digest.Digest]string{}
	p, err := a.policy()
	if err != nil || p == nil || w.Blob {
		return out
	}
	// By its rules: what pressure would take depends on the space, and passes.
	in := w.Inventory.Input()
	in.AnyTime, in.Free, in.Capacity = true, math.MaxInt64, math.MaxInt64
	for _, d := range p.Plan(in).Decisions {
		if !slices.ContainsFunc(w.Versions, func(v gc.VersionInfo) bool { return v.Digest == d.Digest }) {
			continue
		}
		word := "keep"
		if d.Remove {
			word = "remove"
		}
		out[d.Digest] = fmt.Sprintf("%s: %s", word, d.Why)
		if d.Rule != "" {
			out[d.Digest] += " (" + d.Rule + ")"
		}
	}
	return out
}

func (a *app) printHeld(h held) error {
	state := "in the store"
	if !h.There {
		state = "not in the store"
	}
	lines := []string{fmt.Sprintf("%s %s, %s, %s", h.Kind, h.Digest, progress.Bytes(h.Size), state)}
	for _, v := range h.Versions {
		indent := "  "
		if h.Kind == "blob" {
			lines = append(lines, fmt.Sprintf("  needed by %s (%s) as %s", firstOf(v.References), short(v.Digest), strings.Join(v.Paths, ", ")))
			if len(v.Paths) == 0 {
				lines[len(lines)-1] = fmt.Sprintf("  needed by %s (%s)", firstOf(v.References), short(v.Digest))
			}
			indent = "    "
		}
		for _, ref := range v.References {
			if h.Kind == "version" {
				lines = append(lines, indent+"named "+ref)
			}
		}
		for _, u := range v.Uses {
			text := indent + "used by " + u.By
			if u.GPU != "" {
				text += " on GPU " + u.GPU
			}
			lines = append(lines, text+" ["+u.Source+"]")
		}
		if v.Pinned != "" {
			lines = append(lines, indent+v.Pinned)
		}
		if len(v.Uses) == 0 {
			lines = append(lines, indent+unusedSince(v))
		}
		if v.Policy != "" {
			lines = append(lines, indent+"the policy says "+v.Policy)
		}
	}
	if h.Lease != "" {
		lines = append(lines, "  held by a running pull or import, lease "+h.Lease)
	}
	if h.Other != "" {
		lines = append(lines, "  held by "+h.Other)
	}
	for _, id := range h.Trash {
		lines = append(lines, "  in the trash: larder undo "+id+" brings it back")
	}
	for _, p := range h.Past {
		lines = append(lines, fmt.Sprintf("  %s on %s by %s: %s", p.Event, p.Time.Local().Format(time.DateTime), p.By, p.Why))
	}
	for _, u := range h.Unknown {
		lines = append(lines, "  not known: "+u)
	}
	if !h.Held && len(h.Unknown) == 0 && h.There {
		lines = append(lines, "  nothing holds it: larder prune drops it once it is older than unfinished.hold")
	}
	for _, l := range lines {
		if _, err := fmt.Fprintln(a.out, printable(l)); err != nil {
			return err
		}
	}
	return nil
}

func unusedSince(v heldVersion) string {
	if v.LastUsed == nil {
		return "nobody uses it, and nobody did since it came " + age(time.Now(), v.Created)
	}
	return fmt.Sprintf("nobody uses it since %s (%s)", v.LastUsed.Local().Format(time.DateTime), age(time.Now(), *v.LastUsed))
}
