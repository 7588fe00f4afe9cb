package pull

import (
	"context"
	"errors"
	"maps"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/larder-project/larder/internal/source"
	"github.com/larder-project/larder/internal/source/huggingface"
	"github.com/larder-project/larder/internal/source/huggingface/hubtest"
)

// hubSource reads org/model of a hub through the real client.
func hubSource(t testing.TB, hub *hubtest.Server, repo, token string) *huggingface.Source {
	t.Helper()
	s, err := huggingface.New(huggingface.Options{
		Endpoint: hub.URL, Repo: repo, Token: token,
		Retries: 2, Backoff: time.Millisecond, MaxWait: 3 * time.Second, Idle: 2 * time.Second,
	})
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// Over HTTP, with the hub's real client: each fault that passes is survived,
// each that stays is an error that says what it is, and nothing half-made is
// left visible. Afterwards the same pull succeeds and asks for no file twice.
func TestPullFromHub(t *testing.T) {
	const large, small = "model-1.safetensors", "config.json"
	tests := []struct {
		name  string
		fault hubtest.Fault
		token bool
		gated bool
		err   error  // nil: the pull succeeds
		says  string // in the error
	}{
		{name: "nothing wrong"},
		{name: "connection breaks once", fault: hubtest.Fault{Path: large, CutAfter: hubtest.At(1000), Times: 1}},
		{name: "short body", fault: hubtest.Fault{Path: large, Shorten: 1, Times: 2}},
		{name: "wrong byte once", fault: hubtest.Fault{Path: large, Flip: hubtest.At(100_000), Times: 1}},
		{name: "wrong byte once in a small file", fault: hubtest.Fault{Path: small, Flip: hubtest.At(3), Times: 1}},
		{name: "wrong byte always", fault: hubtest.Fault{Path: large, Flip: hubtest.At(100_000)}, err: source.ErrChanged, says: "was promised"},
		{name: "wrong byte always in a small file", fault: hubtest.Fault{Path: small, Flip: hubtest.At(3)}, err: source.ErrChanged, says: "git:"},
		{name: "range not satisfiable", fault: hubtest.Fault{Path: large, Status: 416}, err: source.ErrInvalid, says: "416"},
		{name: "server error twice", fault: hubtest.Fault{Path: large, Status: 503, Times: 2}},
		{name: "server error always", fault: hubtest.Fault{Path: large, Status: 503}, err: source.ErrUnavailable, says: "503"},
		{name: "rate limit that passes", fault: hubtest.Fault{Path: large, Status: 429, Header: map[string]string{"Retry-After": "1"}, Times: 1}},
		{name: "rate limit that stays", fault: hubtest.Fault{Path: large, Status: 429, Header: map[string]string{"Retry-After": "100"}}, err: source.ErrRateLimited},
		{name: "file is gone", fault: hubtest.Fault{Path: large, Status: 404, Code: "EntryNotFound"}, err: source.ErrNotFound, says: large},
		{name: "gated", gated: true, err: source.ErrGated},
		{name: "gated, with a token", gated: true, token: true},
		{name: "range ignored", fault: hubtest.Fault{Path: large, IgnoreRange: true, Times: 1}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			files := sampleFiles()
			hub := hubtest.Start(t, hubtest.Options{})
			repo := hub.Repo("org/model")
			if _, err := repo.CommitMap("main", files); err != nil {
				t.Fatal(err)
			}
			token := ""
			if tt.gated {
				repo.Gated()
				hub.AddToken("hf_test", "org/model")
			}
			if tt.token {
				token = "hf_test"
			}
			if tt.fault.Path != "" {
				hub.Inject(tt.fault)
			}
			st := openStore(t, t.TempDir())
			_, err := Run(t.Context(), st, hubSource(t, hub, "org/model", token), Options{Node: "test"})
			if tt.err == nil {
				if err != nil {
					t.Fatal(err)
				}
				checkVersion(t, st, name, files)
				return
			}
			if !errors.Is(err, tt.err) || !strings.Contains(err.Error(), tt.says) {
				t.Fatalf("error %v, want %v that says %q", err, tt.err, tt.says)
			}
			if versions, err := st.Versions(); err != nil || len(versions) > 0 {
				t.Errorf("versions %v, %v", versions, err)
			}
			hub.ClearFaults()
			hub.AddToken("hf_test", "org/model")
			var there []string
			for p, b := range files {
				if _, ok, err := st.Stat(digest.FromBytes(b)); err != nil {
					t.Fatal(err)
				} else if ok {
					there = append(there, p)
				}
			}
			hub.ResetRequests()
			mustRun(t, st, hubSource(t, hub, "org/model", "hf_test"), Options{})
			checkVersion(t, st, name, files)
			for _, p := range there {
				if n := hub.Sent(p); n > 0 {
					t.Errorf("%s was in the store, and %d bytes of it were asked for", p, n)
				}
			}
		})
	}
}

// Several processes that pull one model at once: each file that is known by
// its digest comes once.
func TestPullByTwoProcesses(t *testing.T) {
	files := sampleFiles()
	hub := hubtest.Start(t, hubtest.Options{})
	if _, err := hub.Repo("org/model").CommitMap("main", files); err != nil {
		t.Fatal(err)
	}
	hub.Inject(hubtest.Fault{Kind: hubtest.KindData, Delay: 30 * time.Millisecond}) // so that they meet
	st := openStore(t, t.TempDir())
	var wg sync.WaitGroup
	for range 3 {
		cmd, stderr := task{Store: st.Dir(), Hub: hub.URL}.command(t, "")
		wg.Go(func() {
			if err := cmd.Run(); err != nil {
				t.Errorf("%v: %s", err, stderr)
			}
		})
	}
	wg.Wait()
	checkVersion(t, st, name, files)
	for p, b := range files {
		if isLFS(p) && hub.Sent(p) != int64(len(b)) {
			t.Errorf("%s: %d bytes of %d were sent to three processes", p, hub.Sent(p), len(b))
		}
	}
	if left := leftovers(t, st); len(left) > 0 {
		t.Errorf("left in ingest: %v", left)
	}
}

// impatient gives a pull up when it has to wait.
type impatient struct {
	*recorder
	cancel func()
}

func (p *impatient) Wait(path string) {
	p.recorder.Wait(path)
	p.cancel()
}

// Who waits for another process is told so.
func TestPullSaysThatItWaits(t *testing.T) {
	files := map[string][]byte{"model.safetensors": noise(30, 300<<10)}
	src := newFake(t, files, name)
	st := openStore(t, t.TempDir())
	ing, err := st.Ingest(t.Context(), "sha256-"+digest.FromBytes(files["model.safetensors"]).Encoded())
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	rec := &impatient{newRecorder(), cancel}
	if _, err := Run(ctx, st, src, Options{Node: "test", Progress: rec}); !errors.Is(err, context.Canceled) {
		t.Errorf("error %v, want the context's", err)
	}
	if rec.waits["model.safetensors"] != 1 {
		t.Errorf("waits that were reported: %v", rec.waits)
	}
	if err := ing.Discard(); err != nil {
		t.Fatal(err)
	}
	mustRun(t, st, src, Options{})
}

// A killed pull goes on where it was, in another process.
func TestPullResumesInAnotherProcess(t *testing.T) {
	files := map[string][]byte{"model-1.safetensors": noise(31, 2<<20)}
	hub := hubtest.Start(t, hubtest.Options{})
	if _, err := hub.Repo("org/model").CommitMap("main", files); err != nil {
		t.Fatal(err)
	}
	hub.Inject(hubtest.Fault{Kind: hubtest.KindData, Skip: 4, StallAfter: hubtest.At(0)})
	st := openStore(t, t.TempDir())
	cmd, _ := task{Store: st.Dir(), Hub: hub.URL}.command(t, "")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	key := "sha256-" + digest.FromBytes(files["model-1.safetensors"]).Encoded()
	for deadline := time.Now().Add(20 * time.Second); !slices.Contains(leftovers(t, st), key+".progress"); {
		if time.Now().After(deadline) {
			t.Fatal("no progress is saved")
		}
		time.Sleep(10 * time.Millisecond)
	}
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait() // it was killed
	hub.ClearFaults()
	hub.ResetRequests()
	res := task{Store: st.Dir(), Hub: hub.URL}.do(t)
	checkVersion(t, st, name, files)
	if sent := hub.Sent("model-1.safetensors"); res.Resumed < 2*pieceSize || sent != 2<<20-res.Resumed {
		t.Errorf("resumed %d bytes, and %d of %d were sent", res.Resumed, sent, 2<<20)
	}
}

func TestSecondModelSharesFiles(t *testing.T) {
	files := sampleFiles()
	hub := hubtest.Start(t, hubtest.Options{})
	if _, err := hub.Repo("org/model").CommitMap("main", files); err != nil {
		t.Fatal(err)
	}
	other := maps.Clone(files)
	other["model-2.safetensors"] = noise(40, 280<<10)
	if _, err := hub.Repo("other/fork").CommitMap("main", other); err != nil {
		t.Fatal(err)
	}
	st := openStore(t, t.TempDir())
	mustRun(t, st, hubSource(t, hub, "org/model", ""), Options{})
	hub.ResetRequests()
	res := mustRun(t, st, hubSource(t, hub, "other/fork", ""), Options{})
	if res.Fetched != 280<<10 || hub.Sent("") != 280<<10 {
		t.Errorf("%d bytes were fetched and %d sent; one file of %d is new", res.Fetched, hub.Sent(""), 280<<10)
	}
	checkVersion(t, st, "hf://other/fork@main", other)
}
