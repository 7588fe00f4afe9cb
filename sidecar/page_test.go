package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/chromedp/cdproto/cdp"
	"github.com/chromedp/cdproto/emulation"
	"github.com/chromedp/cdproto/log"
	"github.com/chromedp/cdproto/network"
	"github.com/chromedp/cdproto/runtime"
	"github.com/chromedp/chromedp"
	"github.com/opencontainers/go-digest"

	"github.com/larder-project/larder/internal/cleanup"
	"github.com/larder-project/larder/internal/progress"
	"github.com/larder-project/larder/internal/store"
	"github.com/larder-project/larder/internal/testenv"
)

// hostile is what a name could be that means the reader of the page no good.
const hostile = `"><script>window.hacked=1</script><img src=x onerror="window.hacked=1">&lt;b&gt;</td></table><h1>gone</h1>`

// crowded is a node with something of everything.
func crowded(t *testing.T) *bench {
	b := newBench(t, `
version: 1
rules:
  - {models: ["hf://*"], unusedFor: 30d, rollback: 1, minAge: 0s}
  - {models: ["*"], keepNewest: 2, rollback: 0, minAge: 0s}
pressure: {minFree: 1KiB}
`)
	const mib = 1 << 20
	first := b.publish("hf://Qwen/Qwen2.5-0.5B@main", map[string]int{"model.safetensors": 24 * mib, "tokenizer.json": 2 * mib})
	for i := range 5 {
		b.pass(week)
		b.publish(fmt.Sprintf("bert:1.%d.0", i), map[string]int{fmt.Sprint("weights-", i): 3 * mib, "vocab.txt": mib})
	}
	tuned := b.publish("hf://Qwen/Qwen2.5-0.5B@tuned", map[string]int{"model.safetensors": 24 * mib, "tokenizer.json": 2 * mib, "adapter.bin": mib})
	b.publish("whisper:0.9", map[string]int{"old": 5 * mib})
	last := b.publish("bert:1.9.0", map[string]int{"weights-9": 4 * mib, "vocab.txt": mib})
	removeByName(t, b.collector, "whisper:0.9")
	pin := store.Pin{Time: b.clock(), Node: "node-1", Why: "release " + hostile}
	if err := b.store.Pin(t.Context(), first, pin); err != nil {
		t.Fatal(err)
	}
	b.engine.set(nil, container(1, "eager_lamport", "running", tuned), container(2, "batch-job", "exited", tuned), container(3, hostile, "running", last))
	b.alias(last, hostile+":1")
	return b
}

// alias gives a version one more name, as another tool could that writes
// index.json.
func (b *bench) alias(d digest.Digest, name string) {
	b.t.Helper()
	path := filepath.Join(b.store.Dir(), "index.json")
	data, err := os.ReadFile(path)
	if err != nil {
		b.t.Fatal(err)
	}
	var index map[string]any
	if err := json.Unmarshal(data, &index); err != nil {
		b.t.Fatal(err)
	}
	manifests := index["manifests"].([]any)
	for _, m := range manifests {
		if m := m.(map[string]any); m["digest"] == string(d) {
			copied := map[string]any{}
			for k, v := range m {
				copied[k] = v
			}
			annotations := map[string]any{}
			for k, v := range m["annotations"].(map[string]any) {
				annotations[k] = v
			}
			annotations["org.opencontainers.image.ref.name"] = name
			copied["annotations"] = annotations
			index["manifests"] = append(manifests, copied)
			break
		}
	}
	if data, err = json.Marshal(index); err != nil {
		b.t.Fatal(err)
	}
	if err := os.WriteFile(path, data, 0o600); err != nil {
		b.t.Fatal(err)
	}
}

// browser is a real Chromium with one tab.
type browser struct {
	context.Context
	t *testing.T

	mu       sync.Mutex
	requests []string
	problems []string
}

func newBrowser(t *testing.T) *browser {
	t.Helper()
	path, err := exec.LookPath("chromium")
	testenv.Need(t, err == nil, "Chromium (run test/setup.sh)")
	ctx, cancel := chromedp.NewExecAllocator(context.Background(), chromedp.ExecPath(path), chromedp.Headless, chromedp.NoSandbox, chromedp.DisableGPU,
		chromedp.NoFirstRun, chromedp.Flag("disable-quic", true), chromedp.Flag("disable-background-networking", true),
		chromedp.Flag("disable-component-update", true), chromedp.Flag("disable-sync", true), chromedp.UserDataDir(t.TempDir()),
		chromedp.WSURLReadTimeout(2*time.Minute))
	t.Cleanup(cancel)
	ctx, cancelTab := chromedp.NewContext(ctx)
	t.Cleanup(cancelTab)
	if err := chromedp.Do(ctx); err != nil { // starts it; no limit here, or the browser would have that
		t.Fatal(err)
	}
	limited, cancelTime := context.WithTimeout(ctx, 90*time.Second)
	t.Cleanup(cancelTime)
	b := &browser{Context: limited, t: t}
	err = chromedp.Listen(ctx, func(ev any) {
		b.mu.Lock()
		defer b.mu.Unlock()
		switch ev := ev.(type) {
		case *network.EventRequestWillBeSent:
			b.requests = append(b.requests, ev.Request.URL)
		case *runtime.EventExceptionThrown:
			b.problems = append(b.problems, "exception: "+ev.ExceptionDetails.Text)
		case *runtime.EventConsoleAPICalled:
			b.problems = append(b.problems, "console: "+string(ev.Type))
		case *log.EventEntryAdded:
			b.problems = append(b.problems, string(ev.Entry.Level)+": "+ev.Entry.Text+" "+ev.Entry.URL)
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	call(b, network.Enable, network.EnableParams{})
	call(b, runtime.Enable, cdp.Empty{})
	call(b, log.Enable, cdp.Empty{})
	return b
}

func (b *browser) do(steps ...chromedp.Action[chromedp.Void]) {
	b.t.Helper()
	if err := chromedp.Do(b, steps...); err != nil {
		b.t.Fatal(err)
	}
}

func call[P, R any](b *browser, c cdp.Command[P, R], params P) R {
	b.t.Helper()
	r, err := chromedp.Call(b, c, params)
	if err != nil {
		b.t.Fatal(err)
	}
	return r
}

// eval gives the value of an expression on the page.
func eval[T any](b *browser, expression string) T {
	b.t.Helper()
	v, err := chromedp.Run(b, chromedp.Evaluate[T](expression))
	if err != nil {
		b.t.Fatalf("%s: %v", expression, err)
	}
	return v
}

// open goes to a page and waits until it has an element.
func (b *browser) open(url, element string) {
	b.t.Helper()
	b.do(chromedp.Navigate(url), chromedp.WaitVisible(chromedp.CSS(element)))
}

// as looks at the page with a screen of a size, light or dark.
func (b *browser) as(width, height int64, mobile bool, scheme string) {
	b.t.Helper()
	call(b, emulation.SetDeviceMetricsOverride, emulation.SetDeviceMetricsOverrideParams{Width: width, Height: height, DeviceScaleFactor: 1, Mobile: mobile})
	call(b, emulation.SetEmulatedMedia, emulation.SetEmulatedMediaParams{Features: []*emulation.MediaFeature{{Name: "prefers-color-scheme", Value: scheme}}})
}

// shoot keeps a picture of the whole page under out/, as test output.
func (b *browser) shoot(name string) {
	b.t.Helper()
	dir, err := filepath.Abs("../out/screenshots")
	if err != nil {
		b.t.Fatal(err)
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		b.t.Fatal(err)
	}
	picture, err := chromedp.Run(b, chromedp.FullScreenshot(100))
	if err != nil {
		b.t.Fatal(err)
	}
	path := filepath.Join(dir, name+".png")
	if err := os.WriteFile(path, picture, 0o644); err != nil {
		b.t.Fatal(err)
	}
	b.t.Logf("screenshot: %s", path)
}

// contrast finds text that is too faint to read (WCAG 2.1 AA).
const contrast = `(() => {
  const parse = c => { const m = c.match(/[\d.]+/g).map(Number); return m.length < 4 ? [...m, 1] : m };
  const light = c => { const f = c.slice(0, 3).map(v => (v /= 255) <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4); return .2126 * f[0] + .7152 * f[1] + .0722 * f[2] };
  const ground = e => { for (; e; e = e.parentElement) { const c = parse(getComputedStyle(e).backgroundColor); if (c[3] > 0) return c } return [255, 255, 255, 1] };
  const faint = [];
  const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walk.nextNode()) {
    const e = walk.currentNode.parentElement;
    if (!walk.currentNode.textContent.trim() || !e.getClientRects().length || e.closest('svg')) continue;
    const a = light(parse(getComputedStyle(e).color)), b = light(ground(e));
    const ratio = (Math.max(a, b) + .05) / (Math.min(a, b) + .05);
    if (ratio < 4.5) faint.push(ratio.toFixed(2) + ' ' + e.textContent.trim().slice(0, 40));
  }
  return faint;
})()`

func TestThePageInARealBrowser(t *testing.T) {
	b := crowded(t)
	b.node.loop.SetPolicy(b.node.policy.state().policy)
	b.samples()
	b.run()
	inv := b.node.loop.Status().Inventory
	plan := b.node.loop.Plan()
	w := newBrowser(t)
	w.as(1280, 900, false, "light")
	w.open(b.server.URL, "#models")
	w.shoot("page-light")

	t.Run("it shows the numbers of the store", func(t *testing.T) {
		type row struct {
			Names        string
			Size, Unique int64
		}
		rows := eval[[]row](w, `[...document.querySelectorAll('#models tbody tr:not(.model)')].map(r => ({
			Names: [...r.querySelectorAll('.name')].map(n => n.textContent).sort().join(' '),
			Size: +r.querySelectorAll('td')[0].dataset.value, Unique: +r.querySelectorAll('td')[1].dataset.value}))`)
		var want []row
		for _, v := range inv.Versions {
			names := slices.Sorted(slices.Values(v.References))
			want = append(want, row{strings.Join(names, " "), v.Size, v.Unique})
		}
		byName := func(a, b row) int { return strings.Compare(a.Names, b.Names) }
		slices.SortFunc(rows, byName)
		slices.SortFunc(want, byName)
		if len(want) != 8 || !slices.Equal(rows, want) {
			t.Errorf("the page has\n%+v\nthe store\n%+v", rows, want)
		}
		sum := summarize(inv)
		for id, n := range map[string]int64{
			"stored": sum.stored, "saved": sum.logical - sum.stored,
			"versions": 8, "containers": 2, "trash": inv.Usage.Trash, "frees": plan.Frees,
		} {
			if got := eval[int64](w, `+document.getElementById('`+id+`').dataset.value`); got != n {
				t.Errorf("%s is %d, want %d", id, got, n)
			}
		}
		if stored := eval[string](w, `document.getElementById('stored').textContent`); stored != progress.Bytes(sum.stored) {
			t.Errorf("stored is written %q", stored)
		}
		// What is free changes with everything that the host does.
		free := eval[int64](w, `+document.getElementById('free').dataset.value`)
		text := eval[string](w, `document.getElementById('free').textContent`)
		if free <= 0 || free >= b.node.loop.Status().Space.Capacity || text != progress.Bytes(free) {
			t.Errorf("free is %d, written %q", free, text)
		}
	})
	t.Run("it shows the plan that would be carried out", func(t *testing.T) {
		going := eval[[]string](w, `[...document.querySelectorAll('#going tbody tr')].map(r => r.cells[0].textContent + ' | ' + r.cells[1].textContent)`)
		var want []string
		for _, d := range plan.Decisions {
			if d.Remove {
				want = append(want, strings.Join(d.References, ", ")+" | "+d.Why)
			}
		}
		if len(want) < 3 || !slices.Equal(going, want) {
			t.Errorf("the page has %q, the plan %q", going, want)
		}
	})
	t.Run("it shows what was removed", func(t *testing.T) {
		if got := eval[string](w, `document.querySelector('#history tbody').innerText`); !strings.Contains(got, "whisper:0.9") || !strings.Contains(got, "larder rm") {
			t.Errorf("the history says %q", got)
		}
	})
	t.Run("names from outside are text", func(t *testing.T) {
		if eval[bool](w, `window.hacked !== undefined || document.querySelectorAll('script, img, h1').length !== 1 || document.querySelectorAll('b b').length > 0`) {
			t.Error("a name became part of the page")
		}
		for what, expression := range map[string]string{
			"container": `[...document.querySelectorAll('.user')].map(u => u.textContent).join('\n')`,
			"reference": `[...document.querySelectorAll('.name')].map(u => u.textContent).join('\n')`,
			"pin":       `document.querySelector('.pin').title`,
		} {
			if got := eval[string](w, expression); !strings.Contains(got, hostile) {
				t.Errorf("the name of a %s is written %q", what, got)
			}
		}
	})
	t.Run("it can be read, small and in the dark", func(t *testing.T) {
		for name, screen := range map[string]struct {
			width, height int64
			mobile        bool
			scheme        string
		}{
			"page-dark": {1280, 900, false, "dark"}, "page-phone": {390, 844, true, "light"}, "page-phone-dark": {390, 844, true, "dark"},
			"page-wide": {1280, 900, false, "light"},
		} {
			w.as(screen.width, screen.height, screen.mobile, screen.scheme)
			w.open(b.server.URL, "#models")
			if name != "page-wide" {
				w.shoot(name)
			}
			eval[any](w, `document.querySelectorAll('details').forEach(d => d.open = true), 0`)
			if faint := eval[[]string](w, contrast); len(faint) > 0 {
				t.Errorf("%s: too faint: %q", name, faint)
			}
			if wide := eval[int64](w, `document.documentElement.scrollWidth`); wide > screen.width {
				t.Errorf("%s: the page is %d wide, the screen %d", name, wide, screen.width)
			}
		}
	})
	t.Run("it has names for everything that one cannot see", func(t *testing.T) {
		for what, expression := range map[string]string{
			"language":                 `document.documentElement.lang === 'en'`,
			"headings of tables":       `[...document.querySelectorAll('table')].every(t => t.querySelectorAll('thead th[scope=col]').length > 1)`,
			"rows of tables":           `[...document.querySelectorAll('tbody tr')].every(r => r.querySelector('th[scope]'))`,
			"pictures":                 `[...document.querySelectorAll('svg')].length === 2 && [...document.querySelectorAll('svg')].every(s => s.getAttribute('role') === 'img' && s.querySelector('title').textContent)`,
			"references":               `[...document.querySelectorAll('[aria-labelledby]')].every(e => document.getElementById(e.getAttribute('aria-labelledby')))`,
			"names that are one's own": `new Set([...document.querySelectorAll('[id]')].map(e => e.id)).size === document.querySelectorAll('[id]').length`,
		} {
			if !eval[bool](w, expression) {
				t.Errorf("%s are missing or wrong", what)
			}
		}
	})
	t.Run("nothing leaves it and nothing is wrong with it", func(t *testing.T) {
		w.mu.Lock()
		defer w.mu.Unlock()
		if len(w.requests) == 0 {
			t.Error("no request was seen: the check is blind")
		}
		for _, url := range w.requests {
			if url != b.server.URL+"/" && !strings.HasPrefix(url, "data:") {
				t.Errorf("the page asks for %s", url)
			}
		}
		if len(w.problems) > 0 {
			t.Errorf("the browser says %q", w.problems)
		}
	})
}

// samples gives the node a history of free space.
func (b *bench) samples() {
	b.t.Helper()
	var list []cleanup.Sample
	begun := time.Now().Add(-week).Truncate(5 * time.Minute)
	for i := range 7*24*12 - 1 {
		free := int64(400<<30) - int64(i%700)*300<<20 + int64(i%97)<<26
		list = append(list, cleanup.Sample{Time: begun.Add(time.Duration(i) * 5 * time.Minute), Free: free, Limit: 100 << 30})
	}
	data, err := json.Marshal(list)
	if err != nil {
		b.t.Fatal(err)
	}
	b.write("node/free-space.json", string(data))
}

func TestThePageOfANodeInNeed(t *testing.T) {
	b := crowded(t)
	b.run()
	b.engine.set(errors.New("docker at unix:///var/run/docker.sock: " + hostile))
	b.write("policy.yaml", "version: 1\nrules: 7\n")
	b.node.policy.reload(false)
	b.look()
	w := newBrowser(t)
	w.as(1280, 900, false, "light")
	w.open(b.server.URL, "#models")
	w.shoot("page-in-need")
	alarm := eval[string](w, `document.querySelector('.alarm').innerText`)
	for _, want := range []string{"sources: nothing is removed while these cannot tell what is in use: engine: docker at unix:///var/run/docker.sock: " + hostile, "rules takes a list"} {
		if !strings.Contains(alarm, want) {
			t.Errorf("the alarm says %q and not %q", alarm, want)
		}
	}
	if eval[bool](w, `window.hacked !== undefined`) {
		t.Error("a name became part of the page")
	}
	if faint := eval[[]string](w, contrast); len(faint) > 0 {
		t.Errorf("too faint: %q", faint)
	}
}

func TestThePageOfANodeWithNothing(t *testing.T) {
	b := newBench(t, "version: 1\nrules: []\n")
	if err := os.Remove(filepath.Join(b.root, "policy.yaml")); err != nil {
		t.Fatal(err)
	}
	b.node.policy.reload(false)
	b.node.loop.SetPolicy(nil)
	w := newBrowser(t)
	w.as(1280, 900, false, "light")
	w.open(b.server.URL, "#h-next")
	if text := eval[string](w, `document.body.innerText`); !strings.Contains(text, "was not looked at yet") {
		t.Errorf("before the first look the page says %q", text)
	}
	b.run()
	w.open(b.server.URL, "#h-models")
	w.shoot("page-empty")
	text := eval[string](w, `document.body.innerText`)
	for _, want := range []string{"There is no policy, so nothing is removed", "The store is empty", "Clean-up works"} {
		if !strings.Contains(text, want) {
			t.Errorf("the page does not say %q: %q", want, text)
		}
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if len(w.problems) > 0 {
		t.Errorf("the browser says %q", w.problems)
	}
}
