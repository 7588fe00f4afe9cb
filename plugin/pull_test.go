package main

import (
	"context"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/spf13/pflag"

	"github.com/larder-project/larder/internal/config"
	"github.com/larder-project/larder/internal/reference"
	"github.com/larder-project/larder/internal/source/huggingface/hubtest"
	"github.com/larder-project/larder/internal/store"
)

// pullerOf is a puller with the settings of this process's environment.
func pullerOf(t *testing.T) *puller {
	t.Helper()
	t.Setenv("LARDER_CONFIG", filepath.Join(t.TempDir(), "none.yaml"))
	if err := os.WriteFile(os.Getenv("LARDER_CONFIG"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	cfg, err := config.Register(pflag.NewFlagSet("test", pflag.ContinueOnError), "larder-plugin").Load(os.LookupEnv)
	if err != nil {
		t.Fatal(err)
	}
	cfg.Node = "test"
	st, err := store.Open(filepath.Join(t.TempDir(), "store"))
	if err != nil {
		t.Fatal(err)
	}
	return newPuller(t.Context(), st, cfg, slog.New(slog.DiscardHandler))
}

func model(t *testing.T) reference.Reference {
	t.Helper()
	r, err := reference.Parse("hf://org/name")
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// Whoever asks loses patience; the fetch does not, and who asks again joins it.
func TestPullOutlivesWhoAskedForIt(t *testing.T) {
	hub := hubtest.Start(t, hubtest.Options{})
	t.Setenv("HF_ENDPOINT", hub.URL)
	files := map[string][]byte{"config.json": []byte("{}"), "model.safetensors": make([]byte, 1<<20)}
	if _, err := hub.Repo("org/name").CommitMap("main", files); err != nil {
		t.Fatal(err)
	}
	p := pullerOf(t)
	ended, end := context.WithCancel(t.Context())
	end()
	for _, c := range []struct {
		fault hubtest.Fault
		says  string
	}{
		{hubtest.Fault{Kind: hubtest.KindRevision, Delay: time.Second}, "the hub is being asked"},
		{hubtest.Fault{Path: "model.safetensors", Delay: 2 * time.Second}, " % of 1"},
	} {
		hub.Inject(c.fault)
		var err error
		for deadline := time.Now().Add(10 * time.Second); time.Now().Before(deadline); time.Sleep(10 * time.Millisecond) {
			if err = p.Pull(ended, model(t)); err == nil || strings.Contains(err.Error(), c.says) {
				break
			}
		}
		if err == nil || !strings.Contains(err.Error(), "model hf://org/name@main is still being fetched") || !strings.Contains(err.Error(), c.says) {
			t.Fatalf("with an ended context: %v, want %q", err, c.says)
		}
	}
	if err := p.Pull(t.Context(), model(t)); err != nil {
		t.Fatal(err)
	}
	if got := hub.Asked(hubtest.KindRevision, ""); got != 1 {
		t.Errorf("the hub was asked %d times for the revision, want one fetch for all that asked", got)
	}
	if _, err := p.st.Resolve(model(t)); err != nil {
		t.Error(err)
	}
	if _, err := hub.Repo("org/name").CommitMap("main", map[string][]byte{"config.json": []byte("{ }")}); err != nil {
		t.Fatal(err)
	}
	if err := p.Pull(t.Context(), model(t)); err != nil || hub.Asked(hubtest.KindRevision, "") != 2 {
		t.Errorf("after its end a fetch begins anew: %v", err)
	}
}

func TestTokenAndEndpointOfTheEnvironmentAreUsed(t *testing.T) {
	hub := hubtest.Start(t, hubtest.Options{})
	hub.AddToken("hf_secret", "org/name")
	hub.Repo("org/name").Private()
	if _, err := hub.Repo("org/name").CommitMap("main", map[string][]byte{"config.json": []byte("{}")}); err != nil {
		t.Fatal(err)
	}
	t.Setenv("HF_ENDPOINT", hub.URL+"/")
	t.Setenv("HF_HOME", t.TempDir())
	if err := pullerOf(t).Pull(t.Context(), model(t)); err == nil {
		t.Error("a private model was fetched without a token")
	}
	t.Setenv("HF_TOKEN", "hf_secret")
	if err := pullerOf(t).Pull(t.Context(), model(t)); err != nil {
		t.Error(err)
	}
	t.Setenv("HF_TOKEN", "")
	path := filepath.Join(t.TempDir(), "token")
	if err := os.WriteFile(path, []byte("hf_secret\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	p := pullerOf(t)
	p.cfg.HubTokenFile = path
	p.src = newPuller(t.Context(), p.st, p.cfg, p.log).src
	if err := p.Pull(t.Context(), model(t)); err != nil {
		t.Errorf("with a token file: %v", err)
	}
}
