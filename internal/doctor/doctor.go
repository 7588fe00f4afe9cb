// Package doctor examines a host: what it can do for Larder, what stands in
// the way, and what a person can do about it. It changes nothing that stays:
// the store and the state folder are made where they are missing, because what
// a file system can do is found by doing it there.
package doctor

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"os"
	"strings"
	"time"

	"github.com/larder-project/larder/internal/config"
	"github.com/larder-project/larder/internal/overlay"
	"github.com/larder-project/larder/internal/progress"
	"github.com/larder-project/larder/internal/space"
	"github.com/larder-project/larder/internal/store"
	"github.com/larder-project/larder/internal/usage/docker"
	"github.com/larder-project/larder/internal/usage/sources"
	"github.com/larder-project/larder/internal/view"
	"github.com/larder-project/larder/internal/volume"
)

// Verdict is how good a finding is.
type Verdict string

// The verdicts.
const (
	Good   Verdict = "ok"   // works
	Better Verdict = "warn" // works, and could be better; or does not work and is not needed
	Bad    Verdict = "bad"  // must be put right
)

// Finding is one thing that was examined.
type Finding struct {
	// Name is stable: user, pid, kernel, store, state, mounts, views, reflink,
	// quota, tmpfs, loop, space, plugin, engine, and usage.NAME for each source of use.
	Name    string  `json:"name"`
	Verdict Verdict `json:"verdict"`
	Found   string  `json:"found"`
	Advice  string  `json:"advice,omitempty"`
}

// patience bounds each question that somebody else has to answer.
const patience = 3 * time.Second

// Examine looks at the host as the settings have it. It goes on after what is
// bad, as far as that makes sense.
func Examine(ctx context.Context, c config.Config) []Finding {
	d := &doctor{c: c}
	d.user()
	var volumes *volume.Manager
	if st := d.store(); st != nil {
		volumes = d.state(ctx, st)
		d.space(st)
	}
	d.plugin(ctx)
	d.engine(ctx)
	if volumes != nil {
		d.usage(ctx, volumes)
	}
	return d.out
}

type doctor struct {
	c   config.Config
	out []Finding
}

func (d *doctor) find(name string, v Verdict, advice, format string, args ...any) {
	d.out = append(d.out, Finding{Name: name, Verdict: v, Found: fmt.Sprintf(format, args...), Advice: advice})
}

func (d *doctor) user() {
	if os.Geteuid() == 0 {
		d.find("user", Good, "", "root")
		return
	}
	d.find("user", Bad, "run it as root: mounts and the store's permissions need that", "user id %d", os.Geteuid())
}

// from tells where a folder's setting came from, where that is of interest.
func (d *doctor) from(key string) string {
	if f := d.c.From(key); f != "default" {
		return " (from " + f + ")"
	}
	if f := d.c.From("root"); f != "default" {
		return " (root from " + f + ")"
	}
	return ""
}

//nolint:contextcheck // making a store is short and not to be cut off
func (d *doctor) store() *store.Store {
	st, err := store.Open(d.c.Store)
	if err != nil {
		advice := "name another folder with --store, or put this one right"
		if errors.Is(err, fs.ErrPermission) {
			advice = "run it as root, or name a folder of your own with --root"
		}
		d.find("store", Bad, advice, "%v", err)
		return nil
	}
	versions, err := st.Versions()
	if err != nil {
		d.find("store", Bad, "larder verify tells more", "%v", err)
		return st
	}
	for _, v := range versions {
		if _, err := st.Model(v.Digest); err != nil {
			d.find("store", Bad, "larder verify names what is damaged and how to repair it", "%s: %v", d.c.Store, err)
			return st
		}
	}
	pending, err := st.Pending()
	switch {
	case err != nil:
		d.find("store", Bad, "larder verify tells more", "%v", err)
	case pending:
		d.find("store", Better, "the next larder rm finishes it", "%s%s: versions: %d; a removal was cut short", d.c.Store, d.from("store"), len(versions))
	default:
		d.find("store", Good, "", "%s%s: versions: %d", d.c.Store, d.from("store"), len(versions))
	}
	return st
}

// state opens this node's state, and gives its volumes where it can.
func (d *doctor) state(ctx context.Context, st *store.Store) *volume.Manager {
	volumes, err := volume.Open(ctx, volume.Config{Store: st, State: d.c.State, Node: d.c.Node, LoopOnly: d.c.LoopOnly, OwnPIDNamespace: d.c.OwnPIDNamespace})
	if err != nil {
		advice := "name another folder with --state, or put this one right"
		var hinted interface{ Hint() string }
		switch {
		case errors.As(err, &hinted):
			advice = hinted.Hint()
		case errors.Is(err, fs.ErrPermission):
			advice = "run it as root, or name a folder of your own with --root"
		}
		d.find("state", Bad, advice, "%v", err)
		return nil
	}
	if space.SameFileSystem(d.c.Store, d.c.State) {
		d.find("state", Good, "", "%s%s: on the store's file system", d.c.State, d.from("state"))
	} else {
		d.find("state", Better, "put both on one XFS or btrfs, so that the first write into a large file costs nothing",
			"%s%s: not on the store's file system", d.c.State, d.from("state"))
	}
	d.mounts(ctx, volumes)
	caps, err := overlay.Probe(ctx, st.BlobsDir(), d.c.State)
	if err != nil {
		d.find("views", Bad, "without test mounts nothing can be said about this host; run it as root", "%v", err)
		return volumes
	}
	d.capabilities(caps)
	return volumes
}

// mounts tells whether it is known what is mounted, and who uses it.
func (d *doctor) mounts(ctx context.Context, vols *volume.Manager) {
	if blind := vols.Blind(); blind != "" {
		d.find("pid", Better, volume.BlindHint, "%s; nothing is removed from the store, and a mount that no engine has unmounted is never taken away", blind)
	} else {
		d.find("pid", Good, "", "the processes of all containers are seen")
	}
	mounts, err := vols.Mounts(ctx)
	if err != nil {
		advice := "larder ps tells more"
		var hinted interface{ Hint() string }
		if errors.As(err, &hinted) {
			advice = hinted.Hint()
		}
		d.find("mounts", Bad, advice, "%v", err)
		return
	}
	d.find("mounts", Good, "", "live mounts: %d", len(mounts))
}

func (d *doctor) capabilities(caps overlay.Capabilities) {
	d.find("kernel", Good, "", "Linux %s", caps.Kernel)
	methods := []struct {
		name view.Method
		cap  overlay.Capability
		what string
	}{
		{view.DataOnly, caps.DataOnly, "metadata over a data-only layer"},
		{view.Lower, caps.Lower, "metadata over an ordinary layer"},
		{view.HardLink, caps.HardLink, "hard links: owner and mode are the same in every view"},
	}
	var why []string
	for _, m := range methods {
		if m.name == caps.Method {
			v, advice := Good, ""
			if caps.Method == view.HardLink {
				v, advice = Better, methods[0].cap.Advice
			}
			found := string(m.name) + ", " + m.what
			if len(why) > 0 {
				found += " (" + strings.Join(why, "; ") + ")"
			}
			d.find("views", v, advice, "%s", found)
			break
		}
		why = append(why, fmt.Sprintf("not %s: %s", m.name, m.cap.Reason))
	}
	if caps.Method == "" {
		d.find("views", Bad, methods[0].cap.Advice, "none works: %s", strings.Join(why, "; "))
	}
	for _, c := range []struct {
		name string
		cap  overlay.Capability
	}{{"reflink", caps.Reflink}, {"quota", caps.Quota}, {"tmpfs", caps.Tmpfs}, {"loop", caps.Loop}} {
		v, advice := Good, ""
		if !c.cap.OK {
			v, advice = Better, c.cap.Advice
		}
		found := c.cap.Reason
		if found == "" {
			found = "works"
		}
		switch quota := c.name == "quota"; {
		case quota && d.c.LoopOnly:
			v, advice, found = Good, "", "not used: volumes.limit is loop"+d.from("volumes.limit")
		case quota && c.cap.OK:
			found += "; a container can take files that are its own user's out of their project (FS_IOC_FSSETXATTR), and nothing bounds those"
			advice = "where containers are not trusted, set volumes.limit to loop"
		}
		d.find(c.name, v, advice, "%s", found)
	}
}

// scarce is the share of free space below which a store is short of it.
const scarce = 10 // percent

func (d *doctor) space(st *store.Store) {
	u, err := st.Usage()
	if err != nil {
		d.find("space", Bad, "larder verify tells more", "%v", err)
		return
	}
	v, advice := Good, ""
	if u.Capacity > 0 && u.Free*100/u.Capacity < scarce {
		v, advice = Better, "larder df shows what takes it; larder rm frees some"
	}
	d.find("space", v, advice, "%s of %s free", progress.Bytes(u.Free), progress.Bytes(u.Capacity))
}

func (d *doctor) plugin(ctx context.Context) {
	const start = "start it: systemctl enable --now larder-plugin.socket"
	who, err := askPlugin(ctx, d.c.Socket)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		d.find("plugin", Better, start, "nothing at %s: containers get no volumes here", d.c.Socket)
	case errors.Is(err, fs.ErrPermission):
		d.find("plugin", Better, "run it as root", "%s: only root may ask it", d.c.Socket)
	case err != nil:
		d.find("plugin", Bad, start+"; journalctl -u larder-plugin says why it does not answer", "%s does not answer: %v", d.c.Socket, err)
	default:
		d.find("plugin", Good, "", "%s answers as %s", d.c.Socket, who)
	}
}

// askPlugin does what an engine does first.
func askPlugin(ctx context.Context, socket string) (string, error) {
	if _, err := os.Stat(socket); err != nil {
		return "", err
	}
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	client := http.Client{Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", socket)
		},
	}}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, "http://plugin/Plugin.Activate", bytes.NewReader(nil))
	if err != nil {
		return "", err
	}
	resp, err := client.Do(req)
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	var answer struct{ Implements []string }
	if err := json.NewDecoder(io.LimitReader(resp.Body, 1<<16)).Decode(&answer); err != nil {
		return "", fmt.Errorf("it is no plugin: %w", err)
	}
	if len(answer.Implements) == 0 {
		return "", errors.New("it is no plugin: it implements nothing")
	}
	return strings.Join(answer.Implements, ", "), nil
}

func (d *doctor) engine(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	e, err := docker.AskEngine(ctx, d.c.DockerHost)
	if err != nil {
		d.find("engine", Better, "without an engine, larder mount shows models; DOCKER_HOST names another one", "%v", err)
		return
	}
	d.find("engine", Good, "", "Docker %s (API %s) at %s", e.Version, e.APIVersion, d.c.DockerHost)
}

// usage tells of each source of use. While one fails, models are mounted and
// nothing is removed.
func (d *doctor) usage(ctx context.Context, volumes *volume.Manager) {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	for _, s := range sources.Of(d.c, volumes).Status(ctx) {
		key := "usage." + s.Source
		switch s.State {
		case sources.Off:
			d.find(key, Good, "", "off%s", d.from(key))
		case sources.Absent:
			d.find(key, Good, "", "absent; it is asked as soon as it is there")
		case sources.Answers:
			at := ""
			if len(s.At) > 0 {
				at = " at " + strings.Join(s.At, ", ")
			}
			d.find(key, Good, "", "on%s: uses: %d", at, s.Uses)
		case sources.Failing:
			advice := "larder volume ls and larder verify tell more"
			if hinted := interface{ Hint() string }(nil); errors.As(s.Err, &hinted) {
				advice = hinted.Hint()
			} else if d.c.From(key) != "" {
				advice = "put it right, or set " + key + " to off if it is not on this node"
			}
			d.find(key, Better, "nothing is removed until it answers: "+advice, "failing: %v", s.Err)
		}
	}
}

// Usable tells whether nothing is bad.
func Usable(findings []Finding) bool {
	for _, f := range findings {
		if f.Verdict == Bad {
			return false
		}
	}
	return true
}
