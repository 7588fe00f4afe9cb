//go:build faults

package cleanup

import (
	"fmt"
	"testing"
	"time"

	"github.com/larder-project/larder/internal/testenv"
)

// Killed at every step between two changes of the disk, a run is finished by
// the next one: what was to go is gone, for good, and nothing else is.
func TestARunKilledAtEveryStepIsFinishedByTheNext(t *testing.T) {
	policy := parse(t, weekly)
	// Made eight days ago, looked at now: m:1 goes, m:2 is in use, what lies in
	// the trash has lain there for long.
	const later = 8 * day
	if dir := testenv.Child(); dir != "" {
		n := nodeAt(t, dir)
		n.pass(later)
		n.source.set(nil, n.digest("m:2"))
		n.once(Options{Policy: policy})
		return
	}
	for step := 1; ; step++ {
		n := newNode(t)
		n.publish("m:1")
		n.publish("m:2")
		n.publish("gone:1")
		n.remove("gone:1")
		n.partial("broken")
		killed := testenv.Rerun(t, n.dir, fmt.Sprintf("kill:%d", step))
		n.pass(later + time.Minute)
		n.source.set(nil, n.digest("m:2"))
		n.check()
		r := n.once(Options{Policy: policy})
		if n.has("m:1") || !n.has("m:2") || n.partialThere("broken") {
			t.Fatalf("killed at step %d, after the next run: m:1 %v, m:2 %v, leftovers %v", step, n.has("m:1"), n.has("m:2"), n.partialThere("broken"))
		}
		n.pass(3 * day)
		n.once(Options{Policy: policy})
		if n.trash() != 0 {
			t.Fatalf("killed at step %d: the trash is not emptied", step)
		}
		if left, err := n.store.Shredding(); err != nil || left > 0 {
			t.Fatalf("killed at step %d: %d bytes are left of what was deleted (%v)", step, left, err)
		}
		n.check()
		if !killed {
			if step < 30 {
				t.Fatalf("only %d steps were found: %+v", step-1, r)
			}
			t.Logf("killed at each of %d steps", step-1)
			return
		}
	}
}
