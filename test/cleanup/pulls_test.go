package cleanup

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/larder-project/larder/internal/source/huggingface/hubtest"
)

const pulls = 20

// Twenty pulls share most of their files with versions that a loop of prune
// removes at the same time: what one finds in the store must not go before it
// is published.
func TestPullsWhileWhatTheyShareIsRemoved(t *testing.T) {
	shared := map[string][]byte{}
	for i := range 6 {
		b := make([]byte, 2<<20)
		fill(b, uint64(500+i))
		shared[fmt.Sprintf("shared-%d.safetensors", i)] = b
	}
	hub := hubtest.Start(t, hubtest.Options{})
	for i := range pulls {
		own := make([]byte, 1<<20)
		fill(own, uint64(900+i))
		files := map[string][]byte{"own.safetensors": own, "config.json": fmt.Appendf(nil, `{"n":%d}`, i)}
		for name, b := range shared {
			files[name] = b
		}
		_, err := hub.Repo(fmt.Sprintf("org/model-%d", i)).CommitMap("main", files)
		ok(t, err)
	}
	policy := filepath.Join(t.TempDir(), "policy.yaml")
	ok(t, os.WriteFile(policy, []byte(`
version: 1
rules:
  - models: ["old"]
    keepNewest: 1
    rollback: 0
    minAge: 0s
trash: {hold: 0s}
unfinished: {hold: 0s}
`), 0o644))
	l := newLarder(t, t.TempDir(), "HF_ENDPOINT="+hub.URL, "LARDER_POLICY="+policy)
	old := t.TempDir()
	for name, b := range shared {
		ok(t, os.WriteFile(filepath.Join(old, name), b, 0o644))
	}

	stop := make(chan struct{})
	var loop sync.WaitGroup
	prunes, removed := 0, 0
	loop.Go(func() {
		// Versions that have the shared files come and go, and now and then
		// nothing but the pulls under way needs those files.
		for n := 0; ; n++ {
			select {
			case <-stop:
				return
			default:
			}
			ok := func(args ...string) []byte {
				out, err := l.command(args...).CombinedOutput()
				if err != nil {
					t.Errorf("larder %s: %v\n%s", strings.Join(args, " "), err, out)
				}
				return out
			}
			if err := os.WriteFile(filepath.Join(old, "config.json"), fmt.Appendf(nil, `{"old":%d}`, n), 0o644); err != nil {
				t.Error(err)
				return
			}
			ok("import", "-q", old, fmt.Sprintf("old:1.%d.0", n))
			out := ok("prune", "--json")
			prunes++
			removed += bytes.Count(out, []byte(`"fate":"removed"`))
			if n%3 == 2 {
				ok("rm", "--now", fmt.Sprintf("old:1.%d.0", n))
				ok("prune", "--json")
			}
		}
	})
	var group sync.WaitGroup
	for i := range pulls {
		group.Go(func() {
			time.Sleep(time.Duration(i) * 100 * time.Millisecond)
			out, err := l.command("pull", "-q", fmt.Sprintf("hf://org/model-%d", i)).CombinedOutput()
			if err != nil {
				t.Errorf("pull %d: %v\n%s", i, err, out)
			}
		})
	}
	group.Wait()
	close(stop)
	loop.Wait()
	t.Logf("%d pulls, %d prunes that removed %d versions meanwhile", pulls, prunes, removed)
	if prunes < 3 || removed == 0 {
		t.Errorf("%d prunes removed %d versions: nothing was shown", prunes, removed)
	}
	l.run("verify", "-q")
	list := l.run("ls")
	for i := range pulls {
		if !strings.Contains(list, fmt.Sprintf("hf://org/model-%d@main", i)) {
			t.Errorf("model %d is not there:\n%s", i, list)
		}
	}
}
