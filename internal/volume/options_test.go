package volume

import (
	"errors"
	"strings"
	"testing"

	"github.com/larder-project/larder/internal/overlay"
	"github.com/larder-project/larder/internal/view"
)

func options(pairs string) map[string]string {
	raw := map[string]string{}
	for pair := range strings.SplitSeq(pairs, ";") {
		if k, v, ok := strings.Cut(pair, "="); ok {
			raw[k] = v
		}
	}
	return raw
}

func TestWhatBoundsAnUpper(t *testing.T) {
	t.Parallel()
	for raw, want := range map[string][2]overlay.Limit{ // by default, and with loop images alone
		"":                       {{}, {}},
		"size=2MiB":              {{Bytes: 2 << 20}, {Bytes: 2 << 20, Backend: overlay.Loop}},
		"size=2MiB;scope=volume": {{Bytes: 2 << 20}, {Bytes: 2 << 20, Backend: overlay.Loop}},
		"size=2MiB;upper=tmpfs":  {{Bytes: 2 << 20, Backend: overlay.Tmpfs}, {Bytes: 2 << 20, Backend: overlay.Tmpfs}},
		"upper=tmpfs":            {{Backend: overlay.Tmpfs}, {Backend: overlay.Tmpfs}},
	} {
		o, err := ParseOptions("m", options(raw))
		if err != nil {
			t.Fatal(err)
		}
		if got := [2]overlay.Limit{(&Manager{}).limit(o), (&Manager{loopOnly: true}).limit(o)}; got != want {
			t.Errorf("%q: %+v, want %+v", raw, got, want)
		}
	}
}

func TestOptionsThatCannotBeAreRefusedWithWhatCan(t *testing.T) {
	t.Parallel()
	anonymousName := strings.Repeat("0a", 32)
	for _, c := range []struct{ name, raw, want string }{
		{"m", "modle=x", "known are"},
		{"m", "modelo=x", "did you mean model"},
		{"m", "layout=flat", "files, hf"},
		{"m", "access=rw", "overlay, ro"},
		{"m", "scope=container", "run, volume"},
		{"m", "size=big", "512MiB"},
		{"m", "size=-1", "512MiB"},
		{"m", "size=10", "at least 1MiB"},
		{"m", "upper=ssd", "disk, tmpfs"},
		{"m", "uid=root", "number"},
		{"m", "uid=4294967295", "number"},
		{"m", "mode=999", "octal"},
		{"m", "mode=7777", "octal"},
		{"m", "pull=now", "never, missing, always"},
		{"m", "pull=missing", "hub"},
		{"m", "absorb=yes", "off, on"},
		{"m", "absorb=on", "layout=hf"},
		{"m", "model=", "names no model"},
		{"m", "model=a,a", "twice"},
		{"m", "model=../x", "not a name"},
		{"m", "model=*;layout=files", "layout is hf"},
		{"m", "model=*;pull=always", "nothing to pull"},
		{"m", "access=ro;size=2GiB", "nothing is written"},
		{"m", "access=ro;upper=tmpfs", "nothing is written"},
		{"m", "scope=volume;upper=tmpfs", "tmpfs does not"},
		{"m", "scope=volume;layout=hf;absorb=on", "keeps them"},
		{"My_Model", "", "short name"},
		{anonymousName, "", "needs the option model"},
	} {
		_, err := ParseOptions(c.name, options(c.raw))
		if !errors.Is(err, ErrInvalid) || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s %s: got %v, want ErrInvalid with %q", c.name, c.raw, err, c.want)
		}
	}
	for _, name := range []string{"", "..", "../x", "a/b", "-a", ".a", "a b", "a\x00", strings.Repeat("a", 201)} {
		if err := CheckName(name); !errors.Is(err, ErrInvalid) {
			t.Errorf("name %q: got %v, want ErrInvalid", name, err)
		}
		if name != "a b" && len(name) < 128 {
			if err := CheckID(name); !errors.Is(err, ErrInvalid) {
				t.Errorf("id %q: got %v, want ErrInvalid", name, err)
			}
		}
	}
}

func TestDefaults(t *testing.T) {
	t.Parallel()
	o, err := ParseOptions("qwen", nil)
	if err != nil || o.Models[0].String() != "qwen" || o.Scope != ScopeRun || o.Layout != view.Files || o.ReadOnly || o.Pull != PullNever {
		t.Errorf("name alone: %+v %v", o, err)
	}
	o, err = ParseOptions(strings.Repeat("0a", 32), options("model=hf://o/n;size=2GiB;uid=7;mode=0640"))
	if err != nil || o.Scope != ScopeVolume || o.Size != 2<<30 || *o.UID != 7 || *o.Mode != 0o640 {
		t.Errorf("anonymous: %+v %v; a volume of one container keeps its writes", o, err)
	}
	o, err = ParseOptions("c", options("model=*"))
	if err != nil || !o.Catalog || o.Layout != view.HF {
		t.Errorf("catalog: %+v %v", o, err)
	}
	o, err = ParseOptions("c", options("model=a:1,hf://o/n@v1 b"))
	if err != nil || len(o.Models) != 3 {
		t.Errorf("several: %+v %v", o, err)
	}
	o, err = ParseOptions("c", options("model=bert:>=1.2, <2"))
	if err != nil || len(o.Models) != 1 || o.Models[0].Constraint != ">=1.2, <2" {
		t.Errorf("a range with a comma: %+v %v", o, err)
	}
}

func FuzzRecords(f *testing.F) {
	f.Add([]byte(`{"format":1,"name":"m","options":{},"created":"2026-01-01T00:00:00Z"}`))
	f.Add([]byte(`{"format":1,"volume":"m","id":"a","refs":1,"manual":false,"target":"/x","view":"k","versions":[],"time":"2026-01-01T00:00:00Z","called":1,"seen":false}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		if r, err := parseRecord(data); err == nil && CheckName(r.Name) != nil {
			t.Errorf("a record of the volume %q was accepted", r.Name)
		}
		if r, err := parseMountRecord(data); err == nil && (CheckName(r.Volume) != nil || CheckID(r.ID) != nil) {
			t.Errorf("a record of the mount %q %q was accepted", r.Volume, r.ID)
		}
	})
}

// The first text is what Linux 6.18 showed of folders below /a b,c:d=e\f.
func TestOverlayFoldersUndoEscapes(t *testing.T) {
	t.Parallel()
	view, upper := overlayFolders(`rw,lowerdir=/a\040b\134\054c\134:d=e\134\134f/v::/a\040b\134\054c\134:d=e\134\134f/b,upperdir=/a\040b\134\054c:d=e\134\134f/u,workdir=/w,redirect_dir=on,uuid=on,metacopy=on`)
	if view != `/a b,c:d=e\f/v` || upper != `/a b,c:d=e\f/u` {
		t.Errorf("got %q and %q", view, upper)
	}
	view, upper = overlayFolders("ro,lowerdir+=/view,datadir+=/blobs")
	if view != "/view" || upper != "" {
		t.Errorf("got %q and %q", view, upper)
	}
}

// Options come from whoever may create a volume. What is accepted can be told
// again: it is within the bounds that the rest of the package relies on.
func FuzzOptions(f *testing.F) {
	f.Add("m", "model=qwen:1.9;size=2GiB;uid=1000;mode=0640")
	f.Add(strings.Repeat("0a", 32), "model=hf://o/n,x:~1;layout=hf;absorb=on")
	f.Add("x", "model=*;upper=tmpfs;scope=volume")
	f.Fuzz(func(t *testing.T, name, pairs string) {
		o, err := ParseOptions(name, options(pairs))
		if err != nil {
			return
		}
		switch {
		case len(o.Models) == 0 && !o.Catalog:
			t.Error("a volume without a model")
		case o.Size != 0 && o.Size < 1<<20:
			t.Errorf("a size of %d", o.Size)
		case o.UID != nil && *o.UID == 1<<32-1, o.GID != nil && *o.GID == 1<<32-1:
			t.Error("an owner that the kernel takes for none")
		case o.Mode != nil && *o.Mode&^0o777 != 0:
			t.Errorf("mode %o", *o.Mode)
		case o.Absorb && (o.ReadOnly || o.Layout != view.HF || o.Scope == ScopeVolume):
			t.Errorf("absorb with %+v", o)
		}
	})
}

// The options of a mount as a mount table shows them may be those of anybody's
// overlay.
func FuzzOverlayFolders(f *testing.F) {
	f.Add(`rw,lowerdir=/a\040b\134\054c\134:d/v::/b,upperdir=/u,workdir=/w`)
	f.Add(`lowerdir+=/view,datadir+=/blobs`)
	f.Add(`lowerdir=\`)
	f.Fuzz(func(_ *testing.T, text string) { overlayFolders(text) }) // must not panic
}
