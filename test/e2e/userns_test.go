package e2e

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/larder-project/larder/internal/testenv"
	"github.com/larder-project/larder/test/engine"
)

// The root of a container in a user namespace is a user of the host that cannot
// enter Larder's folders. It gets its volumes all the same.
func TestContainersInAUserNamespace(t *testing.T) {
	need(t)
	t.Parallel()
	for _, k := range kinds {
		t.Run(k.name, func(t *testing.T) {
			kind, err := k.find()
			testenv.Need(t, err == nil, "the engine")
			dir, err := os.MkdirTemp("", "larder-e2e-eng-")
			ok(t, err)
			ok(t, os.Chmod(dir, 0o711)) // the containers' own files lie in it
			// The engine, and nobody else, finds a range of users for nobody.
			ids, start := filepath.Join(dir, "ids"), filepath.Join(dir, "dockerd")
			ok(t, os.WriteFile(ids, []byte("nobody:300000:65536\n"), 0o644))
			script := "#!/bin/sh\nexec unshare --mount --propagation slave -- sh -c 'mount --bind " + ids + " /etc/subuid && mount --bind " + ids + ` /etc/subgid && exec "$@"' sh ` + kind.Dockerd + ` "$@"` + "\n"
			ok(t, os.WriteFile(start, []byte(script), 0o755))
			kind.Dockerd, kind.Args = start, append(append([]string{}, kind.Args...), "--userns-remap=nobody:nogroup")
			e, err := engine.New(kind, dir, engine.Options{})
			ok(t, err)
			t.Cleanup(func() {
				if t.Failed() {
					t.Logf("the engine's last words:\n%s", e.LogTail(25))
				}
				if err := e.Close(); err != nil {
					t.Errorf("close the engine: %v", err)
				}
			})
			ok(t, e.Start(t.Context()))
			ok(t, e.LoadImage(t.Context()))
			n := newNode(t, e)
			ok(t, os.Chmod(n.root, 0o711)) // as Larder makes it
			n.importModel("tiny", tiny(61))
			n.startPlugin()
			run, kept := n.volume("run", "model=tiny"), n.volume("kept", "model=tiny", "scope=volume")
			c := n.start("-v", run+":/models", "-v", kept+":/kept")
			if got := n.sh(c, "cat /proc/self/uid_map"); !strings.Contains(got, "300000") {
				t.Fatalf("the container is in no user namespace: %s", got)
			}
			if got := n.sh(c, "echo x > /models/mine && echo y > /kept/mine && cat /models/mine /kept/mine /models/tokenizer/vocab.txt"); got != "x\ny\na\nb\nc" {
				t.Errorf("the container sees %q", got)
			}
			n.docker("rm", "-f", c)
			n.eventually("nothing is mounted", n.nothingMounted)
			n.docker("volume", "rm", run, kept)
			n.eventually("nothing is left of what was written", n.noUppers)
		})
	}
}
