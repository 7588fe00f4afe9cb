package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"strings"
	"sync"
	"sync/atomic"

	"github.com/docker/go-units"
	"golang.org/x/time/rate"

	"github.com/larder-project/larder/internal/config"
	"github.com/larder-project/larder/internal/pull"
	"github.com/larder-project/larder/internal/reference"
	"github.com/larder-project/larder/internal/source"
	"github.com/larder-project/larder/internal/source/huggingface"
	"github.com/larder-project/larder/internal/store"
)

// puller fetches models for volumes that are created with the option pull. A
// fetch goes on when the engine's patience ends; asking again joins it.
type puller struct {
	ctx context.Context // of the plugin
	st  *store.Store
	src func(reference.Reference) (source.Source, error)
	cfg config.Config
	log *slog.Logger

	mu      sync.Mutex
	running map[string]*fetch
}

// fetch is one pull under way. It is also told how far it is.
type fetch struct {
	done         chan struct{}
	err          error // valid when done is closed
	total, there atomic.Int64
}

func newPuller(ctx context.Context, st *store.Store, cfg config.Config, log *slog.Logger) *puller {
	p := &puller{ctx: ctx, st: st, cfg: cfg, log: log, running: map[string]*fetch{}}
	pace := huggingface.PerMinute(cfg.HubCalls)
	p.src = func(ref reference.Reference) (source.Source, error) { return hubSource(cfg, pace, ref) }
	return p
}

// Pull implements volume.Puller.
func (p *puller) Pull(ctx context.Context, ref reference.Reference) error {
	f := p.join(ref)
	select {
	case <-f.done:
		return f.err
	case <-ctx.Done():
		return fmt.Errorf("model %s is still being fetched: %s; it goes on in the background, repeat the command in a while", ref, f.how())
	}
}

func (p *puller) join(ref reference.Reference) *fetch {
	p.mu.Lock()
	defer p.mu.Unlock()
	name := ref.String()
	if f, ok := p.running[name]; ok {
		return f
	}
	f := &fetch{done: make(chan struct{})}
	p.running[name] = f
	go func() {
		f.err = p.fetch(ref, f)
		p.mu.Lock()
		delete(p.running, name)
		p.mu.Unlock()
		close(f.done)
	}()
	return f
}

func (p *puller) fetch(ref reference.Reference, f *fetch) error {
	src, err := p.src(ref)
	if err != nil {
		return fmt.Errorf("fetch model %s: %w", ref, err)
	}
	p.log.Info("fetching a model", "model", ref.String())
	result, err := pull.Run(p.ctx, p.st, src, pull.Options{Node: p.cfg.Node, Jobs: p.cfg.Jobs, Progress: f})
	if err != nil {
		if !errors.Is(err, context.Canceled) {
			p.log.Warn("fetching a model failed", "model", ref.String(), "error", err)
		}
		return fmt.Errorf("fetch model %s: %w", ref, err)
	}
	p.log.Info("fetched a model", "model", ref.String(), "digest", result.Version.Digest.String())
	return nil
}

func (f *fetch) how() string {
	there, total := f.there.Load(), f.total.Load()
	if total == 0 {
		return "the hub is being asked what it has"
	}
	return fmt.Sprintf("%d %% of %s", 100*there/total, units.BytesSize(float64(total)))
}

// Start, Wait, Bytes, Have and Done implement pull.Progress.
func (f *fetch) Start(plan pull.Plan)    { f.total.Store(plan.Bytes) }
func (f *fetch) Wait(string)             {}
func (f *fetch) Bytes(_ string, n int64) { f.there.Add(n) }
func (f *fetch) Have(_ string, n int64)  { f.there.Add(n) }
func (f *fetch) Done(string, pull.How)   {}

// hubSource is the repository of a hub that a reference names.
func hubSource(cfg config.Config, pace *rate.Limiter, ref reference.Reference) (source.Source, error) {
	token, err := hubToken(cfg)
	if err != nil {
		return nil, err
	}
	return huggingface.New(huggingface.Options{
		Endpoint: cfg.HubEndpoint, Token: token, Repo: ref.Repo, Revision: ref.Revision, UserAgent: "larder-plugin/" + version, Pace: pace,
	})
}

func hubToken(cfg config.Config) (string, error) {
	if cfg.HubTokenFile == "" {
		return huggingface.Token(os.Getenv)
	}
	data, err := os.ReadFile(cfg.HubTokenFile)
	if err != nil {
		return "", fmt.Errorf("read the hub's token: %w", err)
	}
	return strings.TrimSpace(string(data)), nil
}
