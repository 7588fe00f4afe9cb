package config

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/spf13/pflag"
)

// load runs Load on a file's text ("" for none), variables and arguments.
func load(t *testing.T, file string, env map[string]string, args ...string) (Config, error) {
	t.Helper()
	set := pflag.NewFlagSet("test", pflag.ContinueOnError)
	f := Register(set, "larder-sidecar")
	if file != "" {
		name := filepath.Join(t.TempDir(), "config.yaml")
		if err := os.WriteFile(name, []byte(file), 0o600); err != nil {
			t.Fatal(err)
		}
		args = append([]string{"--config", name}, args...)
	}
	if err := set.Parse(args); err != nil {
		t.Fatal(err)
	}
	return f.Load(func(name string) (string, bool) { v, ok := env[name]; return v, ok })
}

func TestFlagsBeatEnvironmentBeatsFileBeatsDefaults(t *testing.T) {
	t.Parallel()
	const file = "root: /file\nstate: /file/state\nnode: in-file\njobs: 3\nhub:\n  endpoint: http://file/\nusage:\n  docker: off\nsidecar:\n  listen: unix:///run/l.sock\n  allow-remote: false\n"
	env := map[string]string{"LARDER_ROOT": "/env", "LARDER_STATE": "/env/state", "LARDER_SOCKET": "", "HF_ENDPOINT": "http://env", "LARDER_USAGE_CONTAINERD": "on", "LARDER_VOLUMES_LIMIT": "loop", "LARDER_SIDECAR_ALLOW_REMOTE": "1", "LARDER_USAGE_PID_NAMESPACE": "own"}
	c, err := load(t, file, env, "--root", "/flag")
	if err != nil {
		t.Fatal(err)
	}
	got := map[string]string{}
	for _, k := range Keys() {
		got[k.Name] = c.From(k.Name)
	}
	in := func(line string) string { // only the line, the folder is a temporary one
		for _, v := range got {
			if strings.HasSuffix(v, "config.yaml:"+line) {
				return v
			}
		}
		return "no value from line " + line
	}
	want := map[string]string{
		"root": "flag --root", "store": "default", "state": "LARDER_STATE", "socket": "default",
		"node": in("3"), "jobs": in("4"), "hub.calls-per-minute": "default", "hub.endpoint": "HF_ENDPOINT", "hub.token-file": "default", "docker.host": "default",
		"docker.drivers": "default", "containerd.address": "default", "gpu.helper": "default", "csi.kubelet": "default",
		"usage.docker": in("8"), "usage.containerd": "LARDER_USAGE_CONTAINERD", "usage.gpu": "default", "usage.csi": "default", "usage.pid-namespace": "LARDER_USAGE_PID_NAMESPACE",
		"volumes.limit": "LARDER_VOLUMES_LIMIT", "policy": "default", "sidecar.listen": in("10"), "sidecar.allow-remote": "LARDER_SIDECAR_ALLOW_REMOTE",
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("where values come from (-want +got):\n%s", diff)
	}
	c.from = nil
	if diff := cmp.Diff(Config{
		Root: "/flag", Store: "/flag/store", State: "/env/state", Socket: "/run/docker/plugins/larder.sock",
		Node: "in-file", Jobs: 3, HubEndpoint: "http://env", DockerHost: "unix:///var/run/docker.sock",
		UsageDocker: Off, UsageContainerd: On, UsageGPU: Auto, UsageCSI: Auto, OwnPIDNamespace: true,
		Containerd: []string{"/run/docker/containerd/containerd.sock", "/run/containerd/containerd.sock"}, Kubelet: "/var/lib/kubelet",
		LoopOnly: true, Policy: "/etc/larder/policy.yaml", Listen: "unix:///run/l.sock", AllowRemote: true,
	}, c, cmp.AllowUnexported(Config{})); diff != "" {
		t.Errorf("settings (-want +got):\n%s", diff)
	}
}

func TestPathsTypedByAPersonAreRelativeToTheirFolder(t *testing.T) {
	t.Parallel()
	here, err := os.Getwd()
	if err != nil {
		t.Fatal(err)
	}
	c, err := load(t, "", map[string]string{"LARDER_STATE": "s"}, "--root", "r/../q")
	if err != nil {
		t.Fatal(err)
	}
	if c.Root != filepath.Join(here, "q") || c.State != filepath.Join(here, "s") {
		t.Errorf("root %s and state %s, want both under %s", c.Root, c.State, here)
	}
}

func TestSettingsAreRefusedWithWhatIsAllowed(t *testing.T) {
	t.Parallel()
	for name, tc := range map[string]struct {
		file string
		env  map[string]string
		args []string
		want string // part of the message
	}{
		"unknown key":                {file: "root: /a\nrooot: /b\n", want: `config.yaml:2: unknown key "rooot"; known keys: root, store`},
		"unknown key of a section":   {file: "hub:\n  token: x\n", want: `config.yaml:2: unknown key "hub.token"`},
		"dotted key":                 {file: "hub.endpoint: http://x\n", want: `unknown key "hub.endpoint"`},
		"key twice":                  {file: "jobs: 2\nroot: /a\njobs: 3\n", want: "config.yaml:3: jobs is set twice, first on line 1"},
		"section twice":              {file: "hub:\n  endpoint: http://x\nhub:\n  endpoint: http://y\n", want: "config.yaml:3: hub is set twice"},
		"number for text":            {file: "root: 5\n", want: "config.yaml:1: root takes text"},
		"text for a number":          {file: "jobs: many\n", want: "config.yaml:1: jobs takes a number"},
		"list for text":              {file: "root:\n  - /a\n", want: "config.yaml:2: root takes text"},
		"text for a section":         {file: "hub: http://x\n", want: "config.yaml:1: hub is not a section"},
		"nothing for a key":          {file: "root:\n", want: "config.yaml:1: root takes text"},
		"empty text":                 {file: `root: ""` + "\n", want: "config.yaml:1: root is empty"},
		"alias":                      {file: "root: &a /x\nstore: *a\n", want: "config.yaml:2: store takes text"},
		"merge key":                  {file: "<<: {root: /x}\n", want: "config.yaml:1: a key that is not a word"},
		"list":                       {file: "- root\n", want: "config.yaml:1: the file is not a list of KEY: VALUE"},
		"second document":            {file: "jobs: 2\n---\njobs: 3\n", want: "a second document"},
		"no YAML":                    {file: "root: [\n", want: "line 1"},
		"relative path in the file":  {file: "root: var\n", want: `config.yaml:1): "var" is not an absolute path`},
		"jobs out of range":          {env: map[string]string{"LARDER_JOBS": "65"}, want: `jobs (LARDER_JOBS): "65" is not a number from 1 to 64`},
		"jobs no number":             {env: map[string]string{"LARDER_JOBS": "2x"}, want: `"2x" is not a number`},
		"node":                       {args: []string{"--node", "../x"}, want: `node (flag --node): "../x" is not a node's name`},
		"empty flag":                 {args: []string{"--node", ""}, want: `"" is not a node's name`},
		"endpoint":                   {env: map[string]string{"HF_ENDPOINT": "huggingface.co"}, want: "is not an http:// or https:// URL"},
		"endpoint with a query":      {env: map[string]string{"HF_ENDPOINT": "http://x?a=b"}, want: "has a query"},
		"docker host":                {env: map[string]string{"DOCKER_HOST": "/run/docker.sock"}, want: "is not unix://PATH or tcp://HOST:PORT"},
		"mode of a source":           {file: "usage:\n  docker: maybe\n", want: `config.yaml:2): "maybe" is not auto, on or off`},
		"limit that is not known":    {file: "volumes:\n  limit: quota\n", want: `config.yaml:2): "quota" is not auto or loop`},
		"mode that is no word":       {file: "usage:\n  docker: true\n", want: "config.yaml:2: usage.docker takes text"},
		"containerd":                 {env: map[string]string{"LARDER_CONTAINERD_ADDRESS": "/a.sock,b.sock"}, want: "is not the absolute path of a socket"},
		"drivers":                    {env: map[string]string{"LARDER_DOCKER_DRIVERS": "larder,,x"}, want: "has an empty name"},
		"store and state in one":     {args: []string{"--store", "/x", "--state", "/x/"}, want: "store and state are the same folder, /x"},
		"listen":                     {args: []string{"--listen", "localhost"}, want: `"localhost" is neither HOST:PORT nor unix://PATH`},
		"listen on a relative path":  {args: []string{"--listen", "unix://a.sock"}, want: "is not unix:// and an absolute path"},
		"allow-remote":               {args: []string{"--allow-remote=maybe"}, want: `"maybe" is neither true nor false`},
		"text for yes or no":         {file: "sidecar:\n  allow-remote: sometimes\n", want: "sidecar.allow-remote takes true or false"},
		"named file that is missing": {env: map[string]string{"LARDER_CONFIG": "/nonexistent/config.yaml"}, want: "no such file"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			c, err := load(t, tc.file, tc.env, tc.args...)
			if err == nil {
				t.Fatalf("no error, settings %+v", c)
			}
			if !errors.Is(err, ErrInvalid) {
				t.Errorf("%v does not wrap ErrInvalid", err)
			}
			if !strings.Contains(err.Error(), tc.want) {
				t.Errorf("error %q does not say %q", err, tc.want)
			}
		})
	}
}

func TestAFileWithNothingSetIsFine(t *testing.T) {
	t.Parallel()
	for _, file := range []string{"# nothing\n", "---\n", "hub:\n"} {
		if c, err := load(t, file, nil); err != nil || c.Root != "/var/lib/larder" {
			t.Errorf("file %q: root %q, error %v", file, c.Root, err)
		}
	}
}

func FuzzFile(f *testing.F) {
	f.Add([]byte("root: /a\nhub:\n  endpoint: http://x\njobs: 0x10\n"))
	f.Add([]byte("a: &a [*a]\n"))
	f.Fuzz(func(t *testing.T, content []byte) {
		values, err := parse("f", content)
		if err != nil {
			return
		}
		known := names()
		for k, v := range values {
			if !strings.Contains(known, k) || v.text == "" || v.line < 1 {
				t.Errorf("accepted %q = %+v", k, v)
			}
		}
	})
}
