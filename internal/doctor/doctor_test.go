package doctor

import (
	"context"
	"net"
	"net/http"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/larder-project/larder/internal/config"
	"github.com/larder-project/larder/internal/overlay"
	"github.com/larder-project/larder/internal/view"
)

// verdicts are the findings' names with their verdicts.
func verdicts(found []Finding) map[string]Verdict {
	out := map[string]Verdict{}
	for _, f := range found {
		out[f.Name] = f.Verdict
	}
	return out
}

func TestCapabilitiesBecomeFindings(t *testing.T) {
	t.Parallel()
	works := overlay.Capability{OK: true, Reason: "it was tried"}
	fails := overlay.Capability{Reason: "refused", Advice: "do this"}
	for name, tc := range map[string]struct {
		caps  overlay.Capabilities
		views Verdict
		says  []string // in the finding about views
	}{
		"best": {
			caps:  overlay.Capabilities{Method: view.DataOnly, DataOnly: works, Lower: works, HardLink: works},
			views: Good, says: []string{"data-only"},
		},
		"second": {
			caps:  overlay.Capabilities{Method: view.Lower, DataOnly: fails, Lower: works, HardLink: works},
			views: Good, says: []string{"lower", "not data-only: refused"},
		},
		"last resort": {
			caps:  overlay.Capabilities{Method: view.HardLink, DataOnly: fails, Lower: fails, HardLink: works},
			views: Better, says: []string{"hard-link", "not data-only: refused", "not lower: refused", "do this"},
		},
		"none": {
			caps:  overlay.Capabilities{DataOnly: fails, Lower: fails, HardLink: fails},
			views: Bad, says: []string{"none works", "not hard-link: refused", "do this"},
		},
	} {
		tc.caps.Quota, tc.caps.Tmpfs = fails, works
		d := &doctor{}
		d.capabilities(tc.caps)
		got := verdicts(d.out)
		want := map[string]Verdict{"kernel": Good, "views": tc.views, "reflink": Better, "quota": Better, "tmpfs": Good, "loop": Better}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("%s (-want +got):\n%s", name, diff)
		}
		for _, f := range d.out {
			for _, s := range tc.says {
				if f.Name == "views" && !strings.Contains(f.Found+" "+f.Advice, s) {
					t.Errorf("%s: %q is not in %q, %q", name, s, f.Found, f.Advice)
				}
			}
		}
		if Usable(d.out) != (tc.views != Bad) {
			t.Errorf("%s: usable is %v", name, Usable(d.out))
		}
	}
}

// Quotas are kept by who keeps to them; a setting does without.
func TestWhatQuotasDoNotHoldAgainstIsSaid(t *testing.T) {
	t.Parallel()
	works, fails := overlay.Capability{OK: true, Reason: "it was tried"}, overlay.Capability{Reason: "none here", Advice: "mount it so"}
	for name, tc := range map[string]struct {
		loopOnly bool
		quota    overlay.Capability
		verdict  Verdict
		says     string
	}{
		"quotas":           {false, works, Good, "it was tried; a container can take files"},
		"no quotas":        {false, fails, Better, "none here -> mount it so"},
		"quotas not used":  {true, works, Good, "not used: volumes.limit is loop"},
		"none, none asked": {true, fails, Good, "not used: volumes.limit is loop"},
	} {
		d := &doctor{c: config.Config{LoopOnly: tc.loopOnly}}
		d.capabilities(overlay.Capabilities{Method: view.DataOnly, DataOnly: works, Lower: works, HardLink: works, Quota: tc.quota, Tmpfs: works, Loop: works})
		for _, f := range d.out {
			said := f.Found + " -> " + f.Advice
			if f.Name == "quota" && (f.Verdict != tc.verdict || !strings.Contains(said, tc.says) || strings.Contains(said, "set volumes.limit to loop") != (name == "quotas")) {
				t.Errorf("%s: %+v", name, f)
			}
		}
	}
}

func TestPluginThatAnswersAndOthers(t *testing.T) {
	t.Parallel()
	listen := func(t *testing.T, answer string) string {
		sock := filepath.Join(t.TempDir(), "p.sock")
		l, err := net.Listen("unix", sock)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = l.Close() })
		if answer != "" {
			srv := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				if r.Method == http.MethodPost && r.URL.Path == "/Plugin.Activate" {
					_, _ = w.Write([]byte(answer))
				}
			})}
			go func() { _ = srv.Serve(l) }()
			t.Cleanup(func() { _ = srv.Close() })
		}
		return sock
	}
	for name, tc := range map[string]struct {
		socket string
		want   Verdict
		says   string
	}{
		"a volume driver":  {listen(t, `{"Implements": ["VolumeDriver"]}`), Good, "VolumeDriver"},
		"something else":   {listen(t, `<html>`), Bad, "no plugin"},
		"nothing in it":    {listen(t, `{}`), Bad, "implements nothing"},
		"one that is deaf": {listen(t, ""), Bad, "does not answer"},
		"no socket":        {filepath.Join(t.TempDir(), "none.sock"), Better, "nothing at"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			ctx, cancel := context.WithTimeout(t.Context(), time.Second)
			defer cancel()
			d := &doctor{c: config.Config{Socket: tc.socket}}
			d.plugin(ctx)
			if len(d.out) != 1 || d.out[0].Verdict != tc.want || !strings.Contains(d.out[0].Found, tc.says) {
				t.Errorf("%+v, want %s and %q", d.out, tc.want, tc.says)
			}
			if tc.want != Good && d.out[0].Advice == "" {
				t.Error("no advice")
			}
		})
	}
}
