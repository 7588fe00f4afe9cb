// Command bench measures what Larder costs beside what people do without it:
// copies of a model, a bind mount, cp, sha256sum, curl. Both sides of each
// figure are taken in the same run, interleaved where they are times, and each
// figure stands beside the bar that it must meet.
//
//	go run ./test/bench              everything, some ten minutes, 20 GB of disk
//	go run ./test/bench -only 3,4    the reading and the mounting
//	go run ./test/bench -quick       small sizes: does it run, not how fast
//
// It needs root, xfsprogs, e2fsprogs, curl and a Docker engine (test/setup.sh),
// and bin/larder and bin/larder-plugin (make build). It makes its file systems
// on loop devices in a folder of its own and removes all at the end.
//
// The numbers of the parts are those of the promises in docs/benchmarks.md.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// sizes of one run. Bytes where nothing else is said.
type sizes struct {
	Model      int64 `json:"model"`      // parts 2, 3, 6
	Containers int   `json:"containers"` // part 2
	Own        int64 `json:"own"`        // what each container writes, part 2
	Reads      int   `json:"reads"`      // pairs of readings, cold, and as many warm
	Live       []int `json:"live"`       // mounts live while others are timed, part 4
	Mounts     int   `json:"mounts"`     // timed, for each of Live
	Runs       int   `json:"runs"`       // rounds of docker run
	Import     int64 `json:"import"`     // part 5
	Pull       int64 `json:"pull"`       // part 5
	Rounds     int   `json:"rounds"`     // of imports and pulls
	Changed    int64 `json:"changed"`    // the one file that differs, part 6
}

const (
	kib = int64(1) << 10
	mib = int64(1) << 20
	gib = int64(1) << 30
)

var full = sizes{
	Model: gib, Containers: 50, Own: mib, Reads: 11, Live: []int{20, 200, 2000}, Mounts: 400, Runs: 51,
	Import: 4 * gib, Pull: 2 * gib, Rounds: 3, Changed: 64 * mib,
}

var quick = sizes{
	Model: 64 * mib, Containers: 4, Own: mib, Reads: 3, Live: []int{2, 10}, Mounts: 20, Runs: 2,
	Import: 128 * mib, Pull: 64 * mib, Rounds: 1, Changed: 8 * mib,
}

// bench is one run.
type bench struct {
	sizes
	bin     string // folder of larder and larder-plugin
	quick   bool
	host    *host
	figures []figure
	stage   *stage // shared by parts 2, 3, 4 and 6; nil until the first of them
}

func (b *bench) say(format string, args ...any) {
	fmt.Fprintf(os.Stderr, "bench: "+format+"\n", args...)
}

func (b *bench) add(f figure) {
	// Small sizes tell whether things work; their times are mostly noise.
	f.Binding = !b.quick || f.Space
	b.figures = append(b.figures, f)
	b.say("%s", f)
}

func main() {
	// The same program is the reader in a container and the hub in a process
	// of its own.
	if len(os.Args) > 1 {
		switch os.Args[1] {
		case "read", "poke", "own":
			os.Exit(probe(os.Args[1:]))
		case "hub":
			os.Exit(serveHub(os.Args[2:]))
		case "inside":
			os.Args = append(os.Args[:1], os.Args[2:]...)
			if err := run(); err != nil {
				fmt.Fprintf(os.Stderr, "bench: %v\n", err)
				os.Exit(1)
			}
			return
		}
	}
	status, err := goInside(os.Args[1:])
	if err != nil {
		fmt.Fprintf(os.Stderr, "bench: %v\n", err)
		os.Exit(1)
	}
	os.Exit(status)
}

// goInside runs this program again in a mount namespace of its own. Whatever
// else makes namespaces on this machine meanwhile does not copy the run's
// mounts and so hold them, and all of them go with the run.
func goInside(args []string) (status int, err error) {
	self, err := os.Executable()
	if err != nil {
		return 0, err
	}
	cmd := exec.Command(self, append([]string{"inside"}, args...)...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	if os.Geteuid() == 0 { // else run says what is wrong
		cmd.SysProcAttr = &syscall.SysProcAttr{Unshareflags: syscall.CLONE_NEWNS, Pdeathsig: syscall.SIGTERM}
	}
	// From a terminal the signal comes to both; the other cleans up, this one
	// waits for it.
	signals := make(chan os.Signal, 4)
	signal.Notify(signals, os.Interrupt, syscall.SIGTERM)
	runtime.LockOSThread() // the parent-death signal is bound to this thread
	if err := cmd.Start(); err != nil {
		return 0, fmt.Errorf("start in a mount namespace: %w", err)
	}
	go func() {
		for s := range signals {
			if s == syscall.SIGTERM {
				_ = cmd.Process.Signal(s)
			}
		}
	}()
	var exit *exec.ExitError
	if err := cmd.Wait(); err != nil && !errors.As(err, &exit) {
		return 0, err
	}
	return cmd.ProcessState.ExitCode(), nil
}

func run() error {
	var (
		small  = flag.Bool("quick", false, "small sizes; times are shown and not judged")
		asJSON = flag.Bool("json", false, "print one JSON object instead of the table")
		only   = flag.String("only", "2,3,4,5,6", "parts to run")
		bin    = flag.String("bin", "bin", "folder of larder and larder-plugin")
		dir    = flag.String("dir", "/var/tmp", "where the run makes its folder")
		model  = flag.Int64("model-mib", 0, "size of the model of parts 2, 3 and 6")
		imp    = flag.Int64("import-mib", 0, "size of what part 5 imports")
		pull   = flag.Int64("pull-mib", 0, "size of what part 5 pulls")
		rounds = flag.Int("rounds", 0, "rounds of imports and pulls")
		runs   = flag.Int("runs", 0, "rounds of docker run")
	)
	flag.Parse()
	b := &bench{sizes: full, quick: *small}
	if *small {
		b.sizes = quick
	}
	override(&b.Model, *model*mib)
	override(&b.Import, *imp*mib)
	override(&b.Pull, *pull*mib)
	override(&b.Rounds, *rounds)
	override(&b.Runs, *runs)
	var err error
	if b.bin, err = filepath.Abs(*bin); err != nil {
		return err
	}
	parts, err := chosen(*only)
	if err != nil {
		return err
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	began := time.Now()
	runErr := b.run(ctx, *dir, parts)
	if *asJSON {
		err = printJSON(os.Stdout, b, began)
	} else {
		err = printTable(os.Stdout, b, began)
	}
	return errors.Join(runErr, err, b.verdict())
}

func override[T int | int64](to *T, v T) {
	if v > 0 {
		*to = v
	}
}

func chosen(only string) ([]int, error) {
	var parts []int
	for _, word := range strings.Split(only, ",") {
		n, err := strconv.Atoi(strings.TrimSpace(word))
		if err != nil || n < 2 || n > 6 {
			return nil, fmt.Errorf("-only takes numbers from 2 to 6, not %q", word)
		}
		parts = append(parts, n)
	}
	return parts, nil
}

func (b *bench) run(ctx context.Context, dir string, parts []int) (err error) {
	if os.Geteuid() != 0 {
		return errors.New("it mounts file systems: run it as root")
	}
	// As on a host with systemd: what is unmounted here is unmounted in the
	// namespaces of containers too, and not held by them.
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_SHARED, ""); err != nil {
		return fmt.Errorf("share the mounts of this namespace: %w", err)
	}
	for _, program := range []string{"larder", "larder-plugin"} {
		if _, err := os.Stat(filepath.Join(b.bin, program)); err != nil {
			return fmt.Errorf("find the programs (make build): %w", err)
		}
	}
	if b.host, err = newHost(dir); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, b.host.close()) }()

	for _, part := range []struct {
		number int
		name   string
		run    func(context.Context) error
	}{
		{2, "one model, many containers", b.containersOnOneModel},
		{3, "reading", b.reading},
		{6, "what versions and writes share", b.sharing},
		{4, "mounting", b.mounting},
		{5, "bringing models in", b.bringingIn},
	} {
		if !slices.Contains(parts, part.number) {
			continue
		}
		if part.number == 5 {
			// Its file systems need the room that the stage takes.
			if err := b.strike(); err != nil {
				return err
			}
		}
		b.say("part %d: %s", part.number, part.name)
		if err := part.run(ctx); err != nil {
			return fmt.Errorf("part %d, %s: %w", part.number, part.name, err)
		}
	}
	return nil
}

// verdict is an error that names what missed its bar.
func (b *bench) verdict() error {
	var missed []string
	for _, f := range b.figures {
		if f.Binding && !f.Pass {
			missed = append(missed, f.What)
		}
	}
	if len(missed) > 0 {
		return fmt.Errorf("%d of %d figures miss their bar: %s", len(missed), len(b.figures), strings.Join(missed, "; "))
	}
	return nil
}

func printJSON(out *os.File, b *bench, began time.Time) error {
	enc := json.NewEncoder(out)
	enc.SetIndent("", "  ")
	return enc.Encode(struct {
		Machine machine   `json:"machine"`
		Began   time.Time `json:"began"`
		Seconds float64   `json:"seconds"`
		Quick   bool      `json:"quick"`
		Sizes   sizes     `json:"sizes"`
		Figures []figure  `json:"figures"`
	}{thisMachine(), began.UTC(), time.Since(began).Seconds(), b.quick, b.sizes, b.figures})
}
