package usage

import (
	"context"
	"errors"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// source answers what a test gives it.
type source struct {
	name string
	uses []Use
	err  error
	hang chan struct{} // answers when it is closed, whatever the context says
}

func (s source) Name() string { return s.name }
func (s source) Uses(context.Context) ([]Use, error) {
	if s.hang != nil {
		<-s.hang
	}
	return s.uses, s.err
}

func TestGatherAsksAllAndNamesThoseThatFail(t *testing.T) {
	t.Parallel()
	broken := errors.New("broken")
	hang := make(chan struct{})
	defer close(hang)
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	uses, failed := Gather(ctx, []Source{
		source{name: "one", uses: []Use{{Version: version("a"), By: "x"}}},
		source{name: "two", uses: []Use{{Version: version("b")}}, err: broken},
		source{name: "three", hang: hang},
		source{name: "four", uses: []Use{{Version: version("a"), By: "y", Source: "wrong"}}},
	})
	want := []Use{{Version: version("a"), By: "x", Source: "one"}, {Version: version("b"), Source: "two"}, {Version: version("a"), By: "y", Source: "four"}}
	if diff := cmp.Diff(want, uses); diff != "" {
		t.Errorf("uses (-want +got):\n%s", diff)
	}
	if len(failed) != 2 || failed[0].Source != "two" || !errors.Is(failed[0], broken) || failed[1].Source != "three" || !errors.Is(failed[1], context.DeadlineExceeded) {
		t.Errorf("failed: %v", failed)
	}
}

func TestLabelsOfContainers(t *testing.T) {
	t.Parallel()
	long := "7a3c1e5b9d2f4068a1c3e5f7092b4d6e8fa1c3b5d7e9f0123456789abcdef012"
	for want, c := range map[string]Container{
		"eager_lamport":       {Engine: "docker", ID: long, Name: "eager_lamport"},
		"7a3c1e5b9d2f":        {Engine: "containerd", Namespace: "moby", ID: long},
		"a-name-that-is-long": {Engine: "containerd", Namespace: "default", ID: "a-name-that-is-long"},
		"k8s.io/llm-0/server": {Engine: "containerd", Namespace: "k8s.io", ID: long, Name: "llm-0/server"},
	} {
		if got := c.Label(); got != want {
			t.Errorf("%+v is called %q, want %q", c, got, want)
		}
	}
}
