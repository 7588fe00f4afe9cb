package space

import (
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/opencontainers/go-digest"

	"github.com/larder-project/larder/internal/modelpack"
)

func model(files ...modelpack.File) modelpack.Model { return modelpack.Model{Files: files} }

func content(path string, size int64) modelpack.File {
	return modelpack.File{Path: path, Size: size, Digest: digest.FromString(path)}
}

func TestDivideTellsSharedFromUnique(t *testing.T) {
	t.Parallel()
	weights, tokens, twice := content("weights", 1000), content("tokens", 10), content("twice", 100)
	again := twice
	again.Path = "again"
	spaces, sums := Divide([]modelpack.Model{
		model(weights, tokens),
		model(content("other weights", 2000), tokens),
		model(twice, again),
	})
	want := []Share{
		{Size: 1010, Unique: 1000, Shared: 10},
		{Size: 2010, Unique: 2000, Shared: 10},
		{Size: 200, Unique: 100},
	}
	if diff := cmp.Diff(want, spaces); diff != "" {
		t.Errorf("spaces (-want +got):\n%s", diff)
	}
	if diff := cmp.Diff(Sums{Logical: 3220, Stored: 3110}, sums); diff != "" {
		t.Errorf("sums (-want +got):\n%s", diff)
	}
	if sums.Saved() != 110 {
		t.Errorf("saved %d, want 110: tokens once and the repeated file once", sums.Saved())
	}
}
