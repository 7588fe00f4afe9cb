package pull

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/larder-project/larder/internal/reference"
	"github.com/larder-project/larder/internal/source"
	"github.com/larder-project/larder/internal/source/directory"
	"github.com/larder-project/larder/internal/source/huggingface"
	"github.com/larder-project/larder/internal/store"
	"github.com/larder-project/larder/internal/testenv"
)

// task is one pull or import in a process of its own: this test program, run
// again with the task in its environment.
type task struct {
	Store  string
	Hub    string // URL of a hub: pull org/model from it
	Folder string // import this folder
	Move   bool
	Name   string // what an import is published as
}

const taskVariable = "LARDER_PULL_TEST_TASK"

// helper carries out the task of the environment, if there is one.
func helper() (code int, ok bool) {
	text := os.Getenv(taskVariable)
	if text == "" {
		return 0, false
	}
	if err := runTask(text); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1, true
	}
	return 0, true
}

func runTask(text string) error {
	var t task
	if err := json.Unmarshal([]byte(text), &t); err != nil {
		return err
	}
	st, err := store.Open(t.Store)
	if err != nil {
		return err
	}
	var src source.Source
	if t.Hub != "" {
		src, err = huggingface.New(huggingface.Options{Endpoint: t.Hub, Repo: "org/model", Retries: 2, Backoff: 10 * time.Millisecond})
	} else {
		var ref reference.Reference
		if ref, err = reference.Parse(t.Name); err == nil {
			src, err = directory.New(t.Folder, directory.Options{References: []reference.Reference{ref}})
		}
	}
	if err != nil {
		return err
	}
	res, err := Run(context.Background(), st, src, Options{Node: "test", Jobs: 3, Move: t.Move})
	if err != nil {
		return err
	}
	return json.NewEncoder(os.Stdout).Encode(res)
}

// faultyDir holds faulty; TestMain removes it.
var faultyDir string

// faulty is this test program built with the tag "faults".
var faulty = sync.OnceValues(func() (string, error) {
	dir, err := os.MkdirTemp("", "larder-pull-test-")
	if err != nil {
		return "", err
	}
	faultyDir = dir
	path := filepath.Join(dir, "pull.test")
	if out, err := exec.Command("go", "test", "-c", "-tags", "faults", "-o", path, ".").CombinedOutput(); err != nil {
		return "", fmt.Errorf("build with faults: %w\n%s", err, out)
	}
	return path, nil
})

// command is the process for a task. fault is what LARDER_FAULT is to be;
// with "" it cannot fail.
func (k task) command(t testing.TB, fault string, env ...string) (*exec.Cmd, *bytes.Buffer) {
	t.Helper()
	path, err := os.Executable()
	if fault != "" {
		testenv.NeedPrograms(t, "go")
		path, err = faulty()
	}
	if err != nil {
		t.Fatal(err)
	}
	text, err := json.Marshal(k)
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(path)
	cmd.Env = append(os.Environ(), append(env, taskVariable+"="+string(text), "LARDER_FAULT="+fault)...)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	return cmd, &stderr
}

// do runs a task that must succeed.
func (k task) do(t testing.TB) Result {
	t.Helper()
	cmd, stderr := k.command(t, "")
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%+v: %v\n%s", k, err, stderr)
	}
	var res Result
	if err := json.Unmarshal(out, &res); err != nil {
		t.Fatal(err)
	}
	return res
}

// steps counts the changes of the disk that a task makes.
func (k task) steps(t testing.TB) int {
	t.Helper()
	log := filepath.Join(t.TempDir(), "steps")
	cmd, stderr := k.command(t, "count", "LARDER_FAULT_LOG="+log)
	if err := cmd.Run(); err != nil {
		t.Fatalf("%+v: %v\n%s", k, err, stderr)
	}
	text, err := os.ReadFile(log)
	if err != nil {
		t.Fatal(err)
	}
	return bytes.Count(text, []byte("\n"))
}
