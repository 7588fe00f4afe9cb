package cleanup

import (
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/larder-project/larder/internal/gc"
	"github.com/larder-project/larder/internal/pull"
	"github.com/larder-project/larder/internal/reference"
	"github.com/larder-project/larder/internal/source/directory"
)

// A pull that says that a model is there is not followed by its removal, though
// another had brought it long ago; nor is one that comes after the plan.
func TestWhatIsPulledAgainStays(t *testing.T) {
	n := newNode(t)
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "weights"), []byte("weights"), 0o644); err != nil {
		t.Fatal(err)
	}
	name, err := reference.Parse("ci:nightly")
	if err != nil {
		t.Fatal(err)
	}
	bring := func() pull.Result {
		src, err := directory.New(dir, directory.Options{References: []reference.Reference{name}})
		if err != nil {
			t.Fatal(err)
		}
		defer src.Close()
		res, err := pull.Run(t.Context(), n.store, src, pull.Options{Node: "test"})
		if err != nil {
			t.Fatal(err)
		}
		return res
	}
	policy := parse(t, "rules: [{models: ['*'], unusedFor: 7d, minAge: 1h, rollback: 0}]")
	first := bring()
	n.pass(8 * 24 * time.Hour)
	prep, err := n.cleaner.Prepare(t.Context(), Options{Policy: policy})
	if err != nil {
		t.Fatal(err)
	}
	n.pass(time.Second)
	if again := bring(); !again.Unchanged || again.Version.Digest != first.Version.Digest {
		t.Fatalf("the second pull gave %+v", again.Version)
	}
	err = prep.Do(t.Context())
	if got := prep.Report.Outcomes; err != nil || len(got) != 1 || got[0].Fate != gc.Skipped {
		t.Errorf("pulled again after the plan: %+v, %v", got, err)
	}
	report, err := n.cleaner.Once(t.Context(), Options{Policy: policy})
	if err != nil || len(report.Outcomes) != 0 {
		t.Errorf("pulled again before the plan: %+v, %v", report.Outcomes, err)
	}
	n.pass(8 * 24 * time.Hour)
	report, err = n.cleaner.Once(t.Context(), Options{Policy: policy})
	if err != nil || len(report.Outcomes) != 1 || report.Outcomes[0].Fate != gc.Gone {
		t.Errorf("eight days after: %+v, %v", report.Outcomes, err)
	}
}
