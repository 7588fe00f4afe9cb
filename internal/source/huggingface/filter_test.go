package huggingface

import "testing"

func TestFilterOfAFolder(t *testing.T) {
	f, err := newFilter([]string{"sub/"}, nil)
	if err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]bool{"sub/x": true, "sub/a/b": true, "sub": false, "sub2/x": false, "a/sub/x": false} {
		if got := f.keeps(name); got != want {
			t.Errorf("sub/ keeps %q: %t, want %t", name, got, want)
		}
	}
}
