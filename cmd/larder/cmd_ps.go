package main

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/larder-project/larder/internal/usage"
	"github.com/larder-project/larder/internal/usage/docker"
	"github.com/larder-project/larder/internal/volume"
)

// liveMount is one mount, as --json prints it.
type liveMount struct {
	Volume  string       `json:"volume"`
	ID      string       `json:"id"` // of the run, as the engine calls it
	Models  []mountModel `json:"models"`
	Since   time.Time    `json:"since"`
	Target  string       `json:"target"`
	Manual  bool         `json:"manual"`  // made by larder mount
	Leaving bool         `json:"leaving"` // unmounted, but somebody holds it still
	Users   []mountUser  `json:"users"`
}

type mountModel struct {
	Reference string `json:"reference,omitempty"` // empty: it has none any more
	Digest    string `json:"digest"`
}

// mountUser is a mount namespace that shows the mount: a container, as a rule.
type mountUser struct {
	PID        int    `json:"pid"` // one process in it
	Mountpoint string `json:"mountpoint"`
	Container  string `json:"container,omitempty"` // ID
	Name       string `json:"name,omitempty"`      // as the engine calls it
	Image      string `json:"image,omitempty"`
}

func (a *app) cmdPs() *cobra.Command {
	return &cobra.Command{
		Use:     "ps",
		GroupID: views,
		Short:   "List the live mounts: which container shows which version",
		Long: `List the live mounts with volume, version, since when, and who shows them. A
container has its name where the engine at DOCKER_HOST answers, else its ID; what
is no container has its process number.`,
		Args:              takes(0, 0, "no arguments"),
		ValidArgsFunction: cobra.NoFileCompletions,
		RunE:              func(cmd *cobra.Command, _ []string) error { return a.ps(cmd.Context()) },
	}
}

func (a *app) ps(ctx context.Context) error {
	vols, err := a.volumes(ctx)
	if err != nil {
		return err
	}
	mounts, damaged := vols.Mounts(ctx)
	if damaged != nil && len(mounts) == 0 {
		return damaged
	}
	versions, err := a.st.Versions()
	if err != nil {
		return err
	}
	names := map[string]string{}
	for _, v := range versions {
		if len(v.References) > 0 {
			names[v.Digest.String()] = v.References[0]
		}
	}
	containers := a.containers(ctx, mounts)
	t := newTable("VOLUME", "MODEL", "VERSION", "SINCE", "USED BY", "MOUNTED AT")
	for _, m := range mounts {
		out := liveMount{Volume: m.Volume, ID: m.ID, Models: []mountModel{}, Since: m.Since, Target: m.Target, Manual: m.Manual, Leaving: m.Leaving, Users: []mountUser{}}
		for _, d := range m.Versions {
			out.Models = append(out.Models, mountModel{names[d.String()], d.String()})
		}
		for _, h := range m.Holders {
			u := mountUser{PID: h.PID, Mountpoint: h.Mountpoint, Container: usage.ContainerID(h.PID)}
			if c, ok := containers[u.Container]; ok {
				u.Name, u.Image = c.Name, c.Image
			}
			out.Users = append(out.Users, u)
		}
		if a.json {
			if err := printJSON(a.out, out); err != nil {
				return err
			}
			continue
		}
		model, version := modelColumns(out.Models)
		name := out.Volume
		if isAnonymous(name) {
			name = name[:12]
		}
		t.add(name, model, version, age(time.Now(), out.Since), userColumn(out), out.Target)
	}
	if a.json {
		return damaged
	}
	return errors.Join(t.print(a.out), damaged)
}

// engineTimeout bounds what ps waits for an engine: names are a kindness.
const engineTimeout = 2 * time.Second

// containers asks the engine for its running containers. An engine that does
// not answer costs names, not the list.
func (a *app) containers(ctx context.Context, mounts []volume.Mounted) map[string]usage.Container {
	shown := false
	for _, m := range mounts {
		shown = shown || len(m.Holders) > 0
	}
	if !shown {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, engineTimeout)
	defer cancel()
	containers, err := docker.Containers(ctx, a.cfg.DockerHost)
	if err != nil {
		return nil
	}
	return containers
}

func modelColumns(models []mountModel) (model, version string) {
	if len(models) == 0 {
		return "-", "-"
	}
	model, version = models[0].Reference, short(models[0].Digest)
	if model == "" {
		model = "-"
	}
	if more := len(models) - 1; more > 0 {
		model += fmt.Sprintf(" (+%d)", more)
	}
	return model, version
}

func userColumn(m liveMount) string {
	var who []string
	for _, u := range m.Users {
		switch {
		case u.Name != "":
			who = append(who, u.Name)
		case u.Container != "":
			who = append(who, "container "+u.Container[:12])
		default:
			who = append(who, fmt.Sprintf("process %d", u.PID))
		}
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

// isAnonymous tells whether an engine made a volume's name up.
func isAnonymous(name string) bool { return len(name) == 64 && isDigits(name) }
