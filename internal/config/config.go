// Package config knows the settings that every program of Larder shares, and
// where their values come from: a flag, else an environment variable, else the
// configuration file, else the default.
//
// One table (Keys) drives all four, so that a setting has the same name and
// the same rules everywhere. The file is read strictly: what is not known, not
// of the right type, or said twice is refused with its line.
package config

import (
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"github.com/spf13/pflag"
)

// DefaultFile is read where no other file is named. It need not be there.
const DefaultFile = "/etc/larder/config.yaml"

// ErrInvalid is wrapped by every refusal of a setting.
var ErrInvalid = errors.New("invalid setting")

// MaxJobs bounds how many files or ranges are fetched at the same time.
const MaxJobs = 64

// Config is every setting. Paths are absolute.
type Config struct {
	Root   string // folder of everything
	Store  string // ROOT/store unless set: blobs, manifests, references
	State  string // ROOT/node unless set: views, volumes, mounts, uppers of this node
	Socket string // the plugin's socket
	Node   string // name of this node in a store that several share
	Jobs   int    // how many files or ranges are fetched at the same time

	HubEndpoint  string // base URL of the Hugging Face hub
	HubCalls     int    // most calls to the hub in a minute; 0: no limit of ours
	HubTokenFile string // file with the hub's token; empty: where the hub's own client keeps it

	// Who knows what is in use. Records and mount tables are always asked.
	UsageDocker, UsageContainerd, UsageGPU, UsageCSI Mode
	// All containers that may use this node's models run in the PID namespace
	// of the program, though it is not the host's.
	OwnPIDNamespace bool

	DockerHost    string   // the engine's API
	DockerDrivers []string // names of Larder's volume driver; none: volumes of any driver count
	Containerd    []string // sockets
	GPUHelper     string   // path of larder-gpu; empty: beside the program, or on the PATH
	Kubelet       string   // folder of the kubelet

	LoopOnly bool // only loop images bound what may be written to the disk, never project quotas

	Policy string // file with the policy of clean-up; where it is not there, nothing is removed

	Listen      string // where the sidecar serves: HOST:PORT, or unix://PATH
	AllowRemote bool   // it may be reached from elsewhere, or by other users

	from map[string]string
}

// Mode says whether a source of use is asked.
type Mode string

// The modes.
const (
	Auto Mode = "auto" // where it is there, or ever was on this node
	On   Mode = "on"
	Off  Mode = "off"
)

// From tells where a key's value came from, in words: "flag --root",
// "LARDER_ROOT", "/etc/larder/config.yaml" or "default".
func (c Config) From(key string) string { return c.from[key] }

// A Key is one setting.
type Key struct {
	Name    string   // in the file; nested as in "hub.endpoint"
	Flag    string   // without dashes; empty: no flag
	Program string   // that alone has the flag; empty: all programs
	Env     []string // the first that is set counts
	Default string
	Usage   string
	kind    kind
	set     func(*Config, string) error
}

// kind is what a key's value is.
type kind int

const (
	text kind = iota
	number
	path // of a file or folder
	boolean
)

// Keys is the table of all settings, in the order they are documented.
func Keys() []Key {
	return []Key{
		{Name: "root", Flag: "root", Env: []string{"LARDER_ROOT"}, Default: "/var/lib/larder", kind: path,
			Usage: "folder of the store and of this node's state",
			set:   setPath(func(c *Config, v string) { c.Root = v })},
		{Name: "store", Flag: "store", Env: []string{"LARDER_STORE"}, kind: path,
			Usage: "folder of the store (default ROOT/store)",
			set:   setPath(func(c *Config, v string) { c.Store = v })},
		{Name: "state", Flag: "state", Env: []string{"LARDER_STATE"}, kind: path,
			Usage: "folder of this node's state (default ROOT/node)",
			set:   setPath(func(c *Config, v string) { c.State = v })},
		{Name: "socket", Flag: "socket", Env: []string{"LARDER_SOCKET"}, Default: "/run/docker/plugins/larder.sock", kind: path,
			Usage: "socket of the volume plugin",
			set:   setPath(func(c *Config, v string) { c.Socket = v })},
		{Name: "node", Flag: "node", Env: []string{"LARDER_NODE"},
			Usage: "name of this node in a shared store (default the host name)",
			set:   setNode},
		{Name: "jobs", Env: []string{"LARDER_JOBS"}, Default: "8", kind: number,
			Usage: "files or ranges fetched at the same time",
			set:   setJobs},
		{Name: "hub.endpoint", Env: []string{"LARDER_HUB_ENDPOINT", "HF_ENDPOINT"}, Default: "https://huggingface.co",
			Usage: "base URL of the Hugging Face hub",
			set:   setEndpoint},
		{Name: "hub.token-file", Env: []string{"LARDER_HUB_TOKEN_FILE"}, kind: path,
			Usage: "file with the hub's token (default: HF_TOKEN, else where the hub's own client keeps it)",
			set:   setPath(func(c *Config, v string) { c.HubTokenFile = v })},
		{Name: "hub.calls-per-minute", Env: []string{"LARDER_HUB_CALLS_PER_MINUTE"}, Default: "0", kind: number,
			Usage: "how often the hub is asked at most by one process; 0: as often as it allows",
			set:   setHubCalls},
		{Name: "docker.host", Env: []string{"LARDER_DOCKER_HOST", "DOCKER_HOST"}, Default: "unix:///var/run/docker.sock",
			Usage: "the engine's API, asked for containers",
			set:   setDockerHost},
		{Name: "docker.drivers", Env: []string{"LARDER_DOCKER_DRIVERS"},
			Usage: "names of Larder's volume driver, as larder,larder:latest (default any)",
			set:   setDrivers},
		{Name: "containerd.address", Env: []string{"LARDER_CONTAINERD_ADDRESS"}, Default: "/run/docker/containerd/containerd.sock,/run/containerd/containerd.sock",
			Usage: "sockets of containerd, asked for containers",
			set:   setContainerd},
		{Name: "gpu.helper", Env: []string{"LARDER_GPU_HELPER"}, kind: path,
			Usage: "the program that lists processes on GPUs (default larder-gpu beside this one, or on the PATH)",
			set:   setPath(func(c *Config, v string) { c.GPUHelper = v })},
		{Name: "csi.kubelet", Env: []string{"LARDER_CSI_KUBELET"}, Default: "/var/lib/kubelet", kind: path,
			Usage: "folder of the kubelet, read for published volumes",
			set:   setPath(func(c *Config, v string) { c.Kubelet = v })},
		usageKey("docker", func(c *Config, m Mode) { c.UsageDocker = m }),
		usageKey("containerd", func(c *Config, m Mode) { c.UsageContainerd = m }),
		usageKey("gpu", func(c *Config, m Mode) { c.UsageGPU = m }),
		usageKey("csi", func(c *Config, m Mode) { c.UsageCSI = m }),
		{Name: "usage.pid-namespace", Env: []string{"LARDER_USAGE_PID_NAMESPACE"}, Default: "host",
			Usage: "where all containers run that may use models: in the host's PID namespace, or in the program's own: host or own",
			set:   setPIDNamespace},
		{Name: "volumes.limit", Env: []string{"LARDER_VOLUMES_LIMIT"}, Default: "auto",
			Usage: "what keeps the option size on disk: auto (a project quota where there is one), or loop (always a loop image, which containers cannot leave)",
			set:   setLimit},
		{Name: "policy", Flag: "policy", Env: []string{"LARDER_POLICY"}, Default: "/etc/larder/policy.yaml", kind: path,
			Usage: "file with the policy of clean-up; without it nothing is removed",
			set:   setPath(func(c *Config, v string) { c.Policy = v })},
		{Name: "sidecar.listen", Flag: "listen", Program: "larder-sidecar", Env: []string{"LARDER_SIDECAR_LISTEN"}, Default: "127.0.0.1:9777",
			Usage: "where the sidecar serves its page and metrics: HOST:PORT, or unix://PATH",
			set:   setListen},
		{Name: "sidecar.allow-remote", Flag: "allow-remote", Program: "larder-sidecar", Env: []string{"LARDER_SIDECAR_ALLOW_REMOTE"}, Default: "false", kind: boolean,
			Usage: "let the sidecar listen where other hosts or users can reach it",
			set:   setAllowRemote},
	}
}

func usageKey(source string, put func(*Config, Mode)) Key {
	return Key{
		Name: "usage." + source, Env: []string{"LARDER_USAGE_" + strings.ToUpper(source)}, Default: string(Auto),
		Usage: "ask " + source + " what is in use: auto, on or off",
		set: func(c *Config, v string) error {
			switch m := Mode(v); m {
			case Auto, On, Off:
				put(c, m)
				return nil
			}
			return fmt.Errorf("%.100q is not auto, on or off", v)
		},
	}
}

// Flags are the settings' flags, registered on a program's flag set.
type Flags struct {
	set    *pflag.FlagSet
	file   string
	values map[string]*string // by key
}

// Register adds --config and the flags of Keys to the set of a program: those
// that all have, and its own.
func Register(set *pflag.FlagSet, program string) *Flags {
	f := &Flags{set: set, values: map[string]*string{}}
	set.StringVar(&f.file, "config", "", "configuration file (default "+DefaultFile+")")
	for _, k := range Keys() {
		if k.Flag == "" || k.Program != "" && k.Program != program {
			continue
		}
		usage := k.Usage
		if k.Default != "" {
			usage += " (default " + k.Default + ")"
		}
		f.values[k.Name] = set.String(k.Flag, "", usage)
		if k.kind == boolean {
			set.Lookup(k.Flag).NoOptDefVal = "true"
		}
	}
	return f
}

// Load puts the settings together. lookup is os.LookupEnv outside of tests. An
// environment variable that is empty counts as not set.
func (f *Flags) Load(lookup func(string) (string, bool)) (Config, error) {
	env := func(name string) string {
		v, _ := lookup(name)
		return v
	}
	file, named := f.file, f.set.Changed("config")
	if !named {
		if file = env("LARDER_CONFIG"); file != "" {
			named = true
		} else {
			file = DefaultFile
		}
	}
	inFile := map[string]value{}
	content, err := os.ReadFile(file)
	switch {
	case err == nil:
		if inFile, err = parse(file, content); err != nil {
			return Config{}, err
		}
	case !named && errors.Is(err, fs.ErrNotExist):
	default:
		return Config{}, fmt.Errorf("%w: read configuration: %w", ErrInvalid, err)
	}

	c := Config{from: map[string]string{}}
	for _, k := range Keys() {
		v, from, typed := k.Default, "default", false
		if fv, ok := inFile[k.Name]; ok {
			v, from = fv.text, fmt.Sprintf("%s:%d", file, fv.line)
		}
		for _, name := range k.Env {
			if s := env(name); s != "" {
				v, from, typed = s, name, true
				break
			}
		}
		if given := f.values[k.Name]; given != nil && f.set.Changed(k.Flag) {
			v, from, typed = *given, "flag --"+k.Flag, true
		}
		c.from[k.Name] = from
		if v == "" && from == "default" {
			continue
		}
		if typed && k.kind == path && v != "" {
			// A person typed it in some folder and means that folder. A file
			// is read from anywhere, so there a relative path is refused.
			abs, err := filepath.Abs(v)
			if err != nil {
				return Config{}, fmt.Errorf("%w %s (%s): %w", ErrInvalid, k.Name, from, err)
			}
			v = abs
		}
		if err := k.set(&c, v); err != nil {
			return Config{}, fmt.Errorf("%w %s (%s): %w", ErrInvalid, k.Name, from, err)
		}
	}
	if c.Store == "" {
		c.Store = filepath.Join(c.Root, "store")
	}
	if c.State == "" {
		c.State = filepath.Join(c.Root, "node")
	}
	if c.Node == "" {
		if err := hostName(&c); err != nil {
			return Config{}, err
		}
	}
	if c.Store == c.State {
		return Config{}, fmt.Errorf("%w: store and state are the same folder, %s", ErrInvalid, c.Store)
	}
	return c, nil
}

func setPath(put func(*Config, string)) func(*Config, string) error {
	return func(c *Config, v string) error {
		if !filepath.IsAbs(v) {
			return fmt.Errorf("%q is not an absolute path", v)
		}
		if strings.ContainsAny(v, "\x00\n") {
			return fmt.Errorf("%q is not a path", v)
		}
		put(c, filepath.Clean(v))
		return nil
	}
}

var nodeName = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$`)

func setNode(c *Config, v string) error {
	if !nodeName.MatchString(v) {
		return fmt.Errorf("%.100q is not a node's name (letters, digits, '.', '_' and '-', at most 63)", v)
	}
	c.Node = v
	return nil
}

func hostName(c *Config) error {
	name, err := os.Hostname()
	if err != nil {
		return fmt.Errorf("%w node: read the host's name: %w; set --node", ErrInvalid, err)
	}
	if err := setNode(c, name); err != nil {
		return fmt.Errorf("%w node (the host's name): %w; set --node", ErrInvalid, err)
	}
	return nil
}

func setJobs(c *Config, v string) error {
	n, err := strconv.Atoi(v)
	if err != nil || n < 1 || n > MaxJobs {
		return fmt.Errorf("%.100q is not a number from 1 to %d", v, MaxJobs)
	}
	c.Jobs = n
	return nil
}

func setHubCalls(c *Config, v string) error {
	n, err := strconv.Atoi(v)
	if err != nil || n < 0 {
		return fmt.Errorf("%.100q is not a number of calls", v)
	}
	c.HubCalls = n
	return nil
}

func setLimit(c *Config, v string) error {
	if v != "auto" && v != "loop" {
		return fmt.Errorf("%.100q is not auto or loop", v)
	}
	c.LoopOnly = v == "loop"
	return nil
}

func setListen(c *Config, v string) error {
	if path, ok := strings.CutPrefix(v, "unix://"); ok {
		if !filepath.IsAbs(path) {
			return fmt.Errorf("%.200q is not unix:// and an absolute path", v)
		}
		c.Listen = v
		return nil
	}
	if _, port, err := net.SplitHostPort(v); err != nil || port == "" {
		return fmt.Errorf("%.200q is neither HOST:PORT nor unix://PATH", v)
	}
	c.Listen = v
	return nil
}

func setAllowRemote(c *Config, v string) (err error) {
	if c.AllowRemote, err = strconv.ParseBool(v); err != nil {
		return fmt.Errorf("%.100q is neither true nor false", v)
	}
	return nil
}

func setPIDNamespace(c *Config, v string) error {
	if v != "host" && v != "own" {
		return fmt.Errorf("%.100q is neither host nor own", v)
	}
	c.OwnPIDNamespace = v == "own"
	return nil
}

func setEndpoint(c *Config, v string) error {
	u, err := url.Parse(v)
	if err != nil || u.Host == "" || (u.Scheme != "http" && u.Scheme != "https") {
		return fmt.Errorf("%.200q is not an http:// or https:// URL", v)
	}
	if u.RawQuery != "" || u.Fragment != "" {
		return fmt.Errorf("%.200q has a query or a fragment, a base URL has none", v)
	}
	c.HubEndpoint = strings.TrimRight(v, "/")
	return nil
}

// setDockerHost takes whatever the engine's own client may be told: a host that
// cannot be asked from here is an error when it is asked.
func setDockerHost(c *Config, v string) error {
	if scheme, rest, ok := strings.Cut(v, "://"); !ok || scheme == "" || rest == "" {
		return fmt.Errorf("%.200q is not unix://PATH or tcp://HOST:PORT", v)
	}
	c.DockerHost = v
	return nil
}

func setDrivers(c *Config, v string) error {
	c.DockerDrivers = nil
	for name := range strings.SplitSeq(v, ",") {
		if name = strings.TrimSpace(name); name == "" {
			return fmt.Errorf("%.200q has an empty name in it", v)
		}
		c.DockerDrivers = append(c.DockerDrivers, name)
	}
	return nil
}

func setContainerd(c *Config, v string) error {
	c.Containerd = nil
	for address := range strings.SplitSeq(v, ",") {
		address = strings.TrimPrefix(strings.TrimSpace(address), "unix://")
		if !filepath.IsAbs(address) || strings.ContainsAny(address, "\x00\n") {
			return fmt.Errorf("%.200q is not the absolute path of a socket, or several with commas", v)
		}
		c.Containerd = append(c.Containerd, filepath.Clean(address))
	}
	return nil
}

// names lists the keys for messages.
func names() string {
	var all []string
	for _, k := range Keys() {
		all = append(all, k.Name)
	}
	return strings.Join(all, ", ")
}

// sections are the keys' parents: "hub", "docker".
func sections() []string {
	seen := map[string]bool{}
	for _, k := range Keys() {
		if parent, _, ok := strings.Cut(k.Name, "."); ok {
			seen[parent] = true
		}
	}
	return slices.Sorted(maps.Keys(seen))
}
