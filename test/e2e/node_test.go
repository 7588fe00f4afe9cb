package e2e

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/moby/sys/mountinfo"

	"github.com/larder-project/larder/test/engine"
)

// patience is how long something may take that Larder does on its own time:
// reaping what the engine forgot.
const patience = 75 * time.Second

// node is one installation of Larder: a root folder, a plugin process, and the
// driver name by which the engine knows it.
type node struct {
	t      *testing.T
	e      *engine.Engine
	root   string
	driver string
	socket string
	label  string // on every container
	bin    string // folder of the programs
	env    []string

	plugin *process
}

func newNode(t *testing.T, e *engine.Engine) *node {
	t.Helper()
	root, err := os.MkdirTemp("", "larder-e2e-")
	if err != nil {
		t.Fatal(err)
	}
	id := make([]byte, 4)
	rand.Read(id)
	driver := "larder-" + hex.EncodeToString(id)
	n := &node{
		t: t, e: e, root: root, driver: driver, label: "node=" + driver, bin: programs,
		socket: "/run/docker/plugins/" + driver + ".sock",
	}
	t.Cleanup(n.close)
	return n
}

// close removes what the test made, and fails the test where Larder has left
// something mounted.
func (n *node) close() {
	t := n.t
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	if t.Failed() {
		n.logState()
	}
	if n.e.Running() {
		if ids, err := n.e.Docker(ctx, "ps", "-aq", "--filter", "label="+n.label); err == nil && strings.TrimSpace(ids) != "" {
			if _, err := n.e.Docker(ctx, append([]string{"rm", "-f", "-v"}, strings.Fields(ids)...)...); err != nil {
				t.Errorf("remove the test's containers: %v", err)
			}
		}
		if !t.Failed() && n.plugin != nil && n.plugin.alive() {
			n.eventually("every mount is gone when no container is left", func() error { return n.nothingMounted() })
		}
		// That wait may have used up the minute. Where a driver beside this test
		// has just been killed, the engine waits for it half a minute.
		ctx, cancel := context.WithTimeout(context.Background(), 3*time.Minute)
		defer cancel()
		if names, err := n.e.Docker(ctx, "volume", "ls", "-q", "--filter", "driver="+n.driver); err == nil && strings.TrimSpace(names) != "" {
			if _, err := n.e.Docker(ctx, append([]string{"volume", "rm", "-f"}, strings.Fields(names)...)...); err != nil && n.plugin != nil && n.plugin.alive() {
				t.Errorf("remove the test's volumes: %v", err)
			}
		}
	}
	if n.plugin != nil {
		n.plugin.end(syscall.SIGTERM)
		if strings.Contains(n.plugin.output(), "DATA RACE") {
			t.Errorf("the plugin has a data race:\n%s", n.plugin.output())
		}
	}
	if err := bury(n.socket); err != nil {
		t.Error(err)
	}
	if err := engine.UnmountBelow(n.root); err != nil {
		t.Error(err)
	}
	if err := os.RemoveAll(n.root); err != nil {
		t.Error(err)
	}
}

// bury answers for a driver that has ended, as one that has no volumes. An
// engine asks every driver that it has ever met for a volume that it does not
// know, one after the other, and tries half a minute to reach each that is
// gone: on a shared engine those of all the tests before.
func bury(socket string) error {
	_ = os.Remove(socket)
	if err := os.MkdirAll(filepath.Dir(socket), 0o755); err != nil {
		return err
	}
	l, err := net.Listen("unix", socket)
	if err != nil {
		return err
	}
	answer := func(body string) http.HandlerFunc {
		return func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, body) }
	}
	mux := http.NewServeMux()
	mux.Handle("/Plugin.Activate", answer(`{"Implements":["VolumeDriver"]}`))
	mux.Handle("/VolumeDriver.Capabilities", answer(`{"Capabilities":{"Scope":"local"}}`))
	mux.Handle("/VolumeDriver.List", answer(`{"Volumes":[]}`))
	mux.Handle("/", answer(`{"Err":"no such volume"}`))
	graves.Lock()
	defer graves.Unlock()
	graves.listeners = append(graves.listeners, l)
	go func() { _ = http.Serve(l, mux) }()
	return nil
}

// graves are the listeners of drivers that have ended; closing one removes its
// socket.
var graves struct {
	sync.Mutex
	listeners []net.Listener
}

// exhume removes the sockets that a run left which was killed: nobody answers.
func exhume() {
	sockets, _ := filepath.Glob("/run/docker/plugins/larder-????????.sock")
	for _, socket := range sockets {
		c, err := net.Dial("unix", socket)
		if errors.Is(err, syscall.ECONNREFUSED) {
			_ = os.Remove(socket)
		} else if err == nil {
			_ = c.Close()
		}
	}
}

func (n *node) logState() {
	if n.plugin != nil {
		out := n.plugin.output()
		n.t.Logf("the plugin's last words:\n%s", out[max(0, len(out)-6000):])
	}
	for i, m := range n.mounts() {
		if i == 5 {
			break
		}
		n.t.Logf("mounted: %s (%s) %s", m.Mountpoint, m.FSType, m.VFSOptions)
	}
	// Who else shows our mounts, one process of each mount namespace.
	seen := map[string]bool{}
	tables, _ := filepath.Glob("/proc/[0-9]*/mountinfo")
	for _, table := range tables {
		dir := filepath.Dir(table)
		ns, _ := os.Readlink(filepath.Join(dir, "ns", "mnt"))
		data, err := os.ReadFile(table)
		if err != nil || seen[ns] || !bytes.Contains(data, []byte(n.root)) {
			continue
		}
		seen[ns] = true
		cmdline, _ := os.ReadFile(filepath.Join(dir, "cmdline"))
		n.t.Logf("shown in %s by process %s: %q", ns, filepath.Base(dir), cmdline)
	}
}

// process is a program that the test started.
type process struct {
	cmd  *exec.Cmd
	log  *logBuffer
	done chan struct{}
}

type logBuffer struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (l *logBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.Write(p)
}

func (l *logBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.String()
}

func (p *process) output() string { return p.log.String() }

func (p *process) alive() bool {
	select {
	case <-p.done:
		return false
	default:
		return true
	}
}

// end signals the process and waits for its end.
func (p *process) end(s syscall.Signal) {
	_ = p.cmd.Process.Signal(s)
	select {
	case <-p.done:
	case <-time.After(20 * time.Second):
		_ = p.cmd.Process.Kill()
		<-p.done
	}
}

// spawn starts a program in the environment of the node.
func (n *node) spawn(program string, files []*os.File, env []string, args ...string) *process {
	n.t.Helper()
	p := &process{cmd: exec.Command(program, args...), log: &logBuffer{}, done: make(chan struct{})}
	p.cmd.Env = append(append(n.environ(), n.env...), env...)
	p.cmd.Stdout, p.cmd.Stderr = p.log, p.log
	p.cmd.ExtraFiles = files
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	p.cmd.WaitDelay = 5 * time.Second
	if err := p.cmd.Start(); err != nil {
		n.t.Fatal(err)
	}
	go func() {
		_ = p.cmd.Wait()
		close(p.done)
	}()
	return p
}

// environ is without what is set on this machine, which may be a container
// itself: the node's engine runs in the PID namespace of the tests.
func (n *node) environ() []string {
	env := slices.DeleteFunc(os.Environ(), func(s string) bool { return strings.HasPrefix(s, "LARDER_") })
	return append(env, "DOCKER_HOST="+n.e.Host(), "LARDER_CONTAINERD_ADDRESS="+n.e.ContainerdSocket(), "LARDER_CSI_KUBELET="+n.kubelet(), "LARDER_USAGE_PID_NAMESPACE=own")
}

// kubelet is the folder of a kubelet on this node; there is none.
func (n *node) kubelet() string { return filepath.Join(n.root, "kubelet") }

// startPlugin starts the plugin and returns when its socket answers.
func (n *node) startPlugin() {
	n.t.Helper()
	n.plugin = n.spawn(filepath.Join(n.bin, "larder-plugin"), nil, nil, "--root", n.root, "--socket", n.socket)
	n.waitPlugin()
}

func (n *node) waitPlugin() {
	n.t.Helper()
	for deadline := time.Now().Add(20 * time.Second); ; {
		_, err := n.call("Plugin.Activate", nil)
		if err == nil {
			return
		}
		if n.plugin != nil && !n.plugin.alive() {
			n.t.Fatalf("the plugin ended:\n%s", n.plugin.output())
		}
		if time.Now().After(deadline) {
			n.t.Fatalf("the plugin does not answer: %v\n%s", err, n.plugin.output())
		}
		time.Sleep(20 * time.Millisecond)
	}
}

// killPlugin ends the plugin by SIGKILL.
func (n *node) killPlugin() {
	n.t.Helper()
	n.plugin.end(syscall.SIGKILL)
	if strings.Contains(n.plugin.output(), "DATA RACE") {
		n.t.Errorf("the plugin has a data race:\n%s", n.plugin.output())
	}
}

// call sends one request to the plugin, as the engine does. The error is the
// plugin's own Err, or that it did not answer.
func (n *node) call(method string, request any) (map[string]any, error) {
	body := []byte{}
	if request != nil {
		var err error
		if body, err = json.Marshal(request); err != nil {
			return nil, err
		}
	}
	return n.post(method, body)
}

// refusal is an error that the plugin answered.
type refusal string

func (r refusal) Error() string { return string(r) }

func (n *node) post(method string, body []byte) (map[string]any, error) {
	client := http.Client{
		Timeout: 30 * time.Second,
		Transport: &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			var d net.Dialer
			return d.DialContext(ctx, "unix", n.socket)
		}},
	}
	response, err := client.Post("http://plugin/"+method, "application/vnd.docker.plugins.v1.2+json", bytes.NewReader(body))
	if err != nil {
		return nil, err
	}
	defer response.Body.Close()
	data, err := io.ReadAll(response.Body)
	if err != nil {
		return nil, err
	}
	answer := map[string]any{}
	if err := json.Unmarshal(data, &answer); err != nil {
		if response.StatusCode >= http.StatusBadRequest {
			return nil, refusal(data)
		}
		return nil, fmt.Errorf("%s answered %d with no JSON: %q", method, response.StatusCode, data)
	}
	if text, _ := answer["Err"].(string); text != "" || response.StatusCode != http.StatusOK {
		return answer, refusal(text)
	}
	return answer, nil
}

// larder runs the command line on this node.
func (n *node) larder(args ...string) string {
	n.t.Helper()
	out, err := n.larderErr(args...)
	if err != nil {
		n.t.Fatal(err)
	}
	return out
}

func (n *node) larderErr(args ...string) (string, error) {
	cmd := exec.CommandContext(n.t.Context(), filepath.Join(n.bin, "larder"), append([]string{"--root", n.root}, args...)...)
	cmd.Env = append(n.environ(), n.env...)
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil {
		return stdout.String(), fmt.Errorf("larder %s: %w\n%s%s", strings.Join(args, " "), err, stdout.Bytes(), stderr.Bytes())
	}
	return stdout.String(), nil
}

// ps is "larder ps --json": one object a mount.
func (n *node) ps() []map[string]any {
	n.t.Helper()
	out := n.larder("ps", "--json")
	var mounts []map[string]any
	for d := json.NewDecoder(strings.NewReader(out)); ; {
		var m map[string]any
		err := d.Decode(&m)
		if errors.Is(err, io.EOF) {
			return mounts
		}
		if err != nil {
			n.t.Fatalf("larder ps --json printed %q: %v", out, err)
		}
		mounts = append(mounts, m)
	}
}

// docker runs the docker client on the node's engine.
func (n *node) docker(args ...string) string {
	n.t.Helper()
	out, err := n.e.Docker(n.t.Context(), args...)
	if err != nil {
		n.t.Fatal(err)
	}
	return strings.TrimRight(out, "\n")
}

// refused runs a docker command that must fail with every one of the words in
// what it prints.
func (n *node) refused(words []string, args ...string) {
	n.t.Helper()
	out, err := n.e.Docker(n.t.Context(), args...)
	if err == nil {
		n.t.Errorf("docker %s: done (%q), want a refusal with %q", strings.Join(args, " "), out, words)
		return
	}
	for _, word := range words {
		if !strings.Contains(err.Error(), word) {
			n.t.Errorf("the refusal does not say %q: %v", word, err)
		}
	}
}

// volume makes a volume with options such as "model=tiny", and returns its
// name: the engine is shared, so it is not quite the one asked for.
func (n *node) volume(name string, options ...string) string {
	n.t.Helper()
	args := []string{"volume", "create", "-d", n.driver}
	for _, o := range options {
		args = append(args, "-o", o)
	}
	return n.docker(append(args, n.unique(name))...)
}

// unique makes a name that no other test on the shared engine has.
func (n *node) unique(name string) string {
	return name + "-" + strings.TrimPrefix(n.label, "node=larder-")
}

// run runs a container to its end and returns what it printed.
func (n *node) run(args ...string) string {
	n.t.Helper()
	return n.docker(append([]string{"run", "--rm", "--network", "none", "--label", n.label}, args...)...)
}

// forever is a command that does nothing and ends at once when told to.
var forever = []string{"sh", "-c", "trap exit TERM; sleep 100000 & wait"}

// start starts a container that idles, and returns its id.
func (n *node) start(args ...string) string {
	n.t.Helper()
	args = append([]string{"run", "-d", "--network", "none", "--label", n.label}, args...)
	return n.docker(append(append(args, engine.Image), forever...)...)
}

// sh runs a script in a container.
func (n *node) sh(container, script string) string {
	n.t.Helper()
	return n.docker("exec", container, "sh", "-c", script)
}

// shFails runs a script that must fail, and returns what it printed.
func (n *node) shFails(container, script string) string {
	n.t.Helper()
	out, err := n.e.Docker(n.t.Context(), "exec", container, "sh", "-c", "exec 2>&1; "+script)
	if err == nil {
		n.t.Errorf("in the container %q succeeded (%q), want a failure", script, out)
	}
	return out
}

// mounts lists what is mounted below the node's root, in this mount namespace.
func (n *node) mounts() []*mountinfo.Info {
	all, err := mountinfo.GetMounts(mountinfo.PrefixFilter(n.root))
	if err != nil {
		n.t.Fatal(err)
	}
	return all
}

// views lists the overlay mounts below the node's root.
func (n *node) views() []*mountinfo.Info {
	return slices.DeleteFunc(n.mounts(), func(m *mountinfo.Info) bool { return m.FSType != "overlay" })
}

// nothingMounted tells whether Larder has no view mounted.
func (n *node) nothingMounted() error {
	if left := n.views(); len(left) > 0 {
		return fmt.Errorf("%d views are mounted, the first at %s", len(left), left[0].Mountpoint)
	}
	return nil
}

// noUppers tells whether nothing that containers wrote is left: neither of a
// run (uppers/run/VOLUME/ID), nor of a volume (uppers/volume/VOLUME), nor what
// is to be taken over (uppers/absorb/VOLUME) or deleted (uppers/dropped).
func (n *node) noUppers() error {
	for _, kind := range []string{"run", "volume", "absorb", "dropped"} {
		left, err := os.ReadDir(filepath.Join(n.root, "node", "uppers", kind))
		if errors.Is(err, fs.ErrNotExist) && kind == "absorb" {
			continue
		}
		if err != nil {
			return err
		}
		if len(left) > 0 {
			return fmt.Errorf("uppers/%s has %d entries, the first is %s", kind, len(left), left[0].Name())
		}
	}
	return nil
}

// age makes every mount look as if it had been asked for some minutes ago: an
// engine has so long to start its container before the mount is taken away.
func (n *node) age() {
	n.t.Helper()
	var records []string
	n.within(10*time.Second, "the record of each mount is complete", func() (err error) {
		records, err = filepath.Glob(filepath.Join(n.root, "node", "mounts", "*", "*", "*.json"))
		if err != nil || len(records) == 0 {
			return fmt.Errorf("no record of a mount: %v, %w", records, err)
		}
		for _, path := range records { // the plugin writes it once more when the mount is made
			if text := read(n.t, path); !strings.Contains(text, `"device"`) {
				return fmt.Errorf("%s is %s", path, text)
			}
		}
		return nil
	})
	for _, path := range records {
		var record map[string]any
		ok(n.t, json.Unmarshal([]byte(read(n.t, path)), &record))
		called, is := record["called"].(float64)
		if !is {
			n.t.Fatalf("%s does not say when the mount was asked for", path)
		}
		record["called"] = called - 16*60
		data, err := json.Marshal(record)
		ok(n.t, err)
		ok(n.t, os.WriteFile(path+".aged", data, 0o600))
		ok(n.t, os.Rename(path+".aged", path))
	}
}

// quick checks that something, which tells how long it took, stays within a
// limit once in three attempts: a busy machine may be slow, a mistake is always.
func quick(t *testing.T, limit time.Duration, what string, do func() time.Duration) {
	t.Helper()
	var took time.Duration
	for range 3 {
		if took = do(); took <= limit {
			return
		}
	}
	t.Errorf("%s took %s, three times over %s", what, took, limit)
}

// eventually waits until check has nothing to complain about.
func (n *node) eventually(what string, check func() error) {
	n.t.Helper()
	n.within(patience, what, check)
}

func (n *node) within(limit time.Duration, what string, check func() error) {
	n.t.Helper()
	for deadline := time.Now().Add(limit); ; {
		err := check()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			n.t.Errorf("%s: not after %s: %v", what, limit, err)
			return
		}
		time.Sleep(50 * time.Millisecond)
	}
}

// model is what a test imports.
type model map[string][]byte

// weights are a mebibyte that no other file has.
func weights(seed byte) []byte {
	data := make([]byte, 1<<20)
	x := uint32(seed)*2654435761 + 1
	for i := range data {
		x ^= x << 13
		x ^= x >> 17
		x ^= x << 5
		data[i] = byte(x)
	}
	return data
}

// tiny is a model of three files and a little more than a mebibyte.
func tiny(seed byte) model {
	return model{
		"config.json":         []byte(fmt.Sprintf(`{"model_type":"tiny","seed":%d}`, seed)),
		"model.safetensors":   weights(seed),
		"tokenizer/vocab.txt": []byte("a\nb\nc\n"),
	}
}

// size of all files in bytes.
func (m model) size() int64 {
	var sum int64
	for _, data := range m {
		sum += int64(len(data))
	}
	return sum
}

// importModel brings a model into the node's store under that name.
func (n *node) importModel(name string, m model) {
	n.t.Helper()
	dir := n.t.TempDir()
	for file, data := range m {
		path := filepath.Join(dir, file)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			n.t.Fatal(err)
		}
		if err := os.WriteFile(path, data, 0o644); err != nil {
			n.t.Fatal(err)
		}
	}
	n.larder("import", dir, name)
}

// used is the space that everything below dir takes, in bytes; a file with
// several names counts once.
func used(t *testing.T, dir string) int64 {
	t.Helper()
	out, err := exec.Command("du", "-x", "-s", "-B1", dir).Output()
	if err != nil {
		t.Fatalf("du %s: %v", dir, err)
	}
	var bytes int64
	if _, err := fmt.Sscan(string(out), &bytes); err != nil {
		t.Fatal(err)
	}
	return bytes
}

// inspect is one template of docker volume inspect.
func (n *node) inspect(volume, template string) string {
	n.t.Helper()
	return n.docker("volume", "inspect", "--format", template, volume)
}

// in is the node as a subtest sees it: failures are the subtest's.
func (n *node) in(t *testing.T) *node {
	sub := *n
	sub.t = t
	return &sub
}

func sha256hex(data []byte) string {
	sum := sha256.Sum256(data)
	return hex.EncodeToString(sum[:])
}

func write(t *testing.T, path, content string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(content), 0o644); err != nil {
		t.Fatal(err)
	}
}

// runProgram runs a program and returns what it printed on its standard
// output.
func runProgram(t *testing.T, env []string, program string, args ...string) string {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), program, args...)
	cmd.Env = env
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil {
		t.Fatalf("%s %s: %v\n%s%s", program, strings.Join(args, " "), err, stdout.Bytes(), stderr.Bytes())
	}
	return stdout.String()
}

// exitCode is the exit status behind an error of larderErr; 0 without one.
func exitCode(err error) int {
	if exit := (*exec.ExitError)(nil); errors.As(err, &exit) {
		return exit.ExitCode()
	}
	if err != nil {
		return -1
	}
	return 0
}
