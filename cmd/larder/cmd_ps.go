package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/opencontainers/go-digest"
	"github.com/spf13/cobra"

	"github.com/larder-project/larder/internal/config"
	"github.com/larder-project/larder/internal/modelpack"
	"github.com/larder-project/larder/internal/progress"
	"github.com/larder-project/larder/internal/usage"
	"github.com/larder-project/larder/internal/usage/docker"
	"github.com/larder-project/larder/internal/volume"
)

// liveMount is one mount, as --json prints it. With --all there are also those
// who use a version without one; then the fields of the mount are empty.
type liveMount struct {
	Volume  string       `json:"volume"`
	ID      string       `json:"id"` // of the run, as the engine calls it
	Models  []mountModel `json:"models"`
	Since   time.Time    `json:"since,omitzero"`
	Target  string       `json:"target"`
	Manual  bool         `json:"manual"`  // made by larder mount
	Leaving bool         `json:"leaving"` // unmounted, but somebody holds it still
	Users   []mountUser  `json:"users"`
}

type mountModel struct {
	Reference  string `json:"reference,omitempty"` // empty: it has none any more
	Digest     string `json:"digest"`
	Layers     int    `json:"layers"`     // distinct files
	Size       int64  `json:"size"`       // of those, in bytes
	Containers int    `json:"containers"` // running ones that use the version
}

// mountUser is a mount namespace that shows the mount: a container, as a rule.
type mountUser struct {
	PID        int      `json:"pid"` // one process in it; 0: none is known
	Mountpoint string   `json:"mountpoint"`
	Container  string   `json:"container,omitempty"` // ID
	Name       string   `json:"name,omitempty"`      // as the engine calls it
	Image      string   `json:"image,omitempty"`
	Engine     string   `json:"engine,omitempty"`    // docker, containerd
	Namespace  string   `json:"namespace,omitempty"` // of containerd
	State      string   `json:"state,omitempty"`     // as the engine says
	GPUs       []string `json:"gpus,omitempty"`      // index and model
}

// usedLayer is one file that versions in use have, as ps --layers prints it.
type usedLayer struct {
	Digest   string   `json:"digest"`
	Size     int64    `json:"size"`
	Path     string   `json:"path"`     // in one of the versions
	Versions []string `json:"versions"` // in use, that have it
	Running  int      `json:"running"`  // containers that use it
	Stopped  int      `json:"stopped"`
}

func (a *app) cmdPs() *cobra.Command {
	var all, layers bool
	cmd := &cobra.Command{
		Use:     "ps",
		GroupID: views,
		Short:   "List the live mounts: which container shows which version",
		Long: `List the live mounts with volume, version and its layers, since when, and who
shows them. A container has its name where Docker or containerd knows it, else its
ID; what is no container has its process number. GPUs are those on which a process
works with the version.`,
		Args:              takes(0, 0, "no arguments"),
		ValidArgsFunction: cobra.NoFileCompletions,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if all && layers {
				return &usageError{err: errors.New("takes --all or --layers, not both"), hint: "see larder ps --help"}
			}
			u, err := a.lookAtUse(cmd.Context())
			switch {
			case err != nil:
				return err
			case layers:
				return a.printLayers(u)
			}
			return a.ps(cmd.Context(), u, all)
		},
	}
	cmd.Flags().BoolVarP(&all, "all", "a", false, "also who uses a version without a live mount, as stopped containers do")
	cmd.Flags().BoolVar(&layers, "layers", false, "list the layers in use instead, and how many containers use each")
	return cmd
}

// inUse is what is in use, by whom, and what it consists of.
type inUse struct {
	users  []usage.User
	counts usage.Counts[digest.Digest]
	names  map[digest.Digest]string          // of versions
	packs  map[digest.Digest]modelpack.Model // of versions in use; one that cannot be read is not there
}

func (a *app) lookAtUse(ctx context.Context) (*inUse, error) {
	uses, err := a.uses(ctx)
	if err != nil {
		return nil, err
	}
	versions, err := a.st.Versions()
	if err != nil {
		return nil, err
	}
	u := &inUse{users: usage.Users(uses), names: map[digest.Digest]string{}, packs: map[digest.Digest]modelpack.Model{}}
	for _, v := range versions {
		if len(v.References) > 0 {
			u.names[v.Digest] = v.References[0]
		}
	}
	for _, use := range uses {
		if _, ok := u.packs[use.Version]; ok {
			continue
		}
		if m, err := a.st.Model(use.Version); err == nil {
			u.packs[use.Version] = m
		}
	}
	u.counts = usage.Count(u.users, func(v digest.Digest) []digest.Digest {
		var layers []digest.Digest
		for _, f := range u.packs[v].Files {
			layers = append(layers, f.Digest)
		}
		return layers
	})
	return u, nil
}

func (u *inUse) models(versions []digest.Digest) []mountModel {
	out := make([]mountModel, 0, len(versions))
	for _, d := range versions {
		m := mountModel{Reference: u.names[d], Digest: d.String(), Containers: u.counts.Versions[d].Running}
		seen := map[digest.Digest]bool{}
		for _, f := range u.packs[d].Files {
			if !seen[f.Digest] {
				seen[f.Digest] = true
				m.Layers++
				m.Size += f.Size
			}
		}
		out = append(out, m)
	}
	return out
}

func (a *app) ps(ctx context.Context, u *inUse, all bool) error {
	// One damaged record costs its own line, and the exit code.
	mounts, damaged := a.vols.Mounts(ctx)
	if damaged != nil && len(mounts) == 0 {
		return damaged
	}
	names := a.containers(ctx, mounts)
	shown := map[string]bool{} // users that have a mount
	var list []liveMount
	for _, m := range mounts {
		out := liveMount{
			Volume: m.Volume, ID: m.ID, Models: u.models(m.Versions), Since: m.Since, Target: m.Target,
			Manual: m.Manual, Leaving: m.Leaving, Users: []mountUser{},
		}
		for _, h := range m.Holders {
			who := u.holder(h, names)
			shown[keyOf(who)] = true
			out.Users = append(out.Users, describeUser(who, h))
		}
		list = append(list, out)
	}
	for _, who := range u.users {
		if all && !shown[keyOf(who)] {
			h := volume.Holder{}
			if len(who.PIDs) > 0 {
				h.PID = who.PIDs[0]
			}
			list = append(list, liveMount{Models: u.models(who.Versions), Users: []mountUser{describeUser(who, h)}})
		}
	}
	return errors.Join(a.printMounts(list), damaged)
}

func keyOf(u usage.User) string {
	if u.ID == "" {
		return u.Label()
	}
	return u.Namespace + "/" + u.ID
}

// holder tells who shows a mount, by what all sources know.
func (u *inUse) holder(h volume.Holder, names map[string]usage.Container) usage.User {
	id := usage.ContainerID(h.PID)
	for _, who := range u.users {
		if id != "" && who.ID == id || slices.Contains(who.PIDs, h.PID) {
			return who
		}
	}
	return usage.User{Container: cmp.Or(names[id], usage.Container{ID: id}), PIDs: []int{h.PID}}
}

// containers asks Docker for the names of all its containers: some show a mount
// by a folder around it, of which no source knows. An engine that does not
// answer costs names, not the list.
func (a *app) containers(ctx context.Context, mounts []volume.Mounted) map[string]usage.Container {
	held := slices.ContainsFunc(mounts, func(m volume.Mounted) bool { return len(m.Holders) > 0 })
	if !held || a.cfg.UsageDocker == config.Off {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, engineTimeout)
	defer cancel()
	names, err := docker.Containers(ctx, a.cfg.DockerHost)
	if err != nil {
		return nil
	}
	return names
}

func describeUser(who usage.User, h volume.Holder) mountUser {
	return mountUser{
		PID: h.PID, Mountpoint: h.Mountpoint, Container: who.ID, Name: who.Name, Image: who.Image,
		Engine: who.Engine, Namespace: who.Namespace, State: who.State, GPUs: who.GPUs,
	}
}

func (a *app) printMounts(list []liveMount) error {
	t := newTable("VOLUME", "MODEL", "VERSION", ">LAYERS", ">SIZE", "SINCE", "USED BY", "GPU", "MOUNTED AT")
	for _, m := range list {
		if a.json {
			if err := printJSON(a.out, m); err != nil {
				return err
			}
			continue
		}
		name := cmp.Or(m.Volume, "-")
		if isAnonymous(name) {
			name = name[:12]
		}
		model, version := modelColumns(m.Models)
		layers, size := layerColumns(m.Models)
		t.add(name, model, version, layers, size, age(time.Now(), m.Since), userColumn(m), gpuColumn(m), cmp.Or(m.Target, "-"))
	}
	if a.json {
		return nil
	}
	return t.print(a.out)
}

func modelColumns(models []mountModel) (model, version string) {
	if len(models) == 0 {
		return "-", "-"
	}
	model, version = cmp.Or(models[0].Reference, "-"), short(models[0].Digest)
	if more := len(models) - 1; more > 0 {
		model += fmt.Sprintf(" (+%d)", more)
	}
	return model, version
}

func layerColumns(models []mountModel) (layers, size string) {
	var files int
	var bytes int64
	for _, m := range models {
		files += m.Layers
		bytes += m.Size
	}
	return fmt.Sprint(files), progress.Bytes(bytes)
}

func userColumn(m liveMount) string {
	var who []string
	for _, u := range m.Users {
		c := usage.Container{Namespace: u.Namespace, ID: u.Container, Name: u.Name}
		var text string
		switch {
		case u.Name != "", u.Container != "" && u.Engine == "containerd":
			text = c.Label()
		case u.Container != "":
			text = "container " + c.Label()
		default:
			text = fmt.Sprintf("process %d", u.PID)
		}
		if u.State != "" && u.State != "running" {
			text += " (" + u.State + ")"
		}
		who = append(who, text)
	}
	switch {
	case len(who) > 0:
		return strings.Join(who, ", ")
	case m.Manual:
		return "this host"
	case m.Leaving:
		return "nobody, it is going"
	}
	return "-"
}

func gpuColumn(m liveMount) string {
	var gpus []string
	for _, u := range m.Users {
		for _, g := range u.GPUs {
			index, _, _ := strings.Cut(g, " ")
			if !slices.Contains(gpus, index) {
				gpus = append(gpus, index)
			}
		}
	}
	return cmp.Or(strings.Join(gpus, ","), "-")
}

// isAnonymous tells whether an engine made a volume's name up.
func isAnonymous(name string) bool { return len(name) == 64 && isDigits(name) }

// layers lists the files of the versions in use, those first that most
// containers use.
func (u *inUse) layers() []usedLayer {
	at := map[digest.Digest]int{}
	var out []usedLayer
	for version, pack := range u.packs {
		for _, f := range pack.Files {
			i, ok := at[f.Digest]
			if !ok {
				i = len(out)
				at[f.Digest] = i
				t := u.counts.Layers[f.Digest]
				out = append(out, usedLayer{Digest: f.Digest.String(), Size: f.Size, Path: f.Path, Running: t.Running, Stopped: t.Stopped})
			}
			out[i].Path = min(out[i].Path, f.Path)
			if !slices.Contains(out[i].Versions, version.String()) {
				out[i].Versions = append(out[i].Versions, version.String())
			}
		}
	}
	for i := range out {
		slices.Sort(out[i].Versions)
	}
	slices.SortFunc(out, func(a, b usedLayer) int {
		return cmp.Or(cmp.Compare(b.Running, a.Running), cmp.Compare(b.Stopped, a.Stopped), cmp.Compare(b.Size, a.Size), cmp.Compare(a.Digest, b.Digest))
	})
	return out
}

func (a *app) printLayers(u *inUse) error {
	t := newTable("LAYER", ">SIZE", ">VERSIONS", ">RUNNING", ">STOPPED", "FILE")
	for _, l := range u.layers() {
		if a.json {
			if err := printJSON(a.out, l); err != nil {
				return err
			}
			continue
		}
		t.add(short(l.Digest), progress.Bytes(l.Size), fmt.Sprint(len(l.Versions)), fmt.Sprint(l.Running), fmt.Sprint(l.Stopped), l.Path)
	}
	if a.json {
		return nil
	}
	return t.print(a.out)
}
