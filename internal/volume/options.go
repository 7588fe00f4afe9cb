package volume

import (
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"github.com/docker/go-units"

	"github.com/larder-project/larder/internal/overlay"
	"github.com/larder-project/larder/internal/reference"
	"github.com/larder-project/larder/internal/view"
)

// ErrInvalid is wrapped by every refusal of a name, an ID or an option.
var ErrInvalid = errors.New("invalid volume")

// Scope says whose writes a volume keeps.
type Scope string

// The scopes of writes.
const (
	ScopeRun    Scope = "run"    // each run its own, dropped at its end
	ScopeVolume Scope = "volume" // kept with the volume
)

// Pull says when a missing model is fetched.
type Pull string

// When a model is fetched. Never inside a mount.
const (
	PullNever   Pull = "never"
	PullMissing Pull = "missing"
	PullAlways  Pull = "always"
)

// Options is what a user may say of a volume, checked and with its defaults.
type Options struct {
	Models   []reference.Reference // empty with Catalog
	Catalog  bool                  // every model in the store
	Layout   view.Layout
	ReadOnly bool
	Scope    Scope
	Size     int64 // bytes that may be written; 0: no limit
	Tmpfs    bool  // what is written goes to memory
	UID, GID *uint32
	Mode     *fs.FileMode
	Pull     Pull
	Absorb   bool
}

// Layouts, as package view has them.
var layouts = []string{string(view.Files), string(view.HF)}

// minSize is the least limit that some backend can keep; what this host can is
// checked when a volume is made.
const minSize = overlay.MinBytes

// optionNames lists what may be given, with what it takes.
var optionNames = map[string]string{
	"model":  "a reference, several with commas, or * for every model",
	"layout": "files or hf",
	"access": "overlay or ro",
	"scope":  "run or volume",
	"size":   "a number of bytes such as 512MiB or 2GiB",
	"upper":  "disk or tmpfs",
	"uid":    "a number",
	"gid":    "a number",
	"mode":   "an octal file mode such as 0644",
	"pull":   "never, missing or always",
	"absorb": "off or on",
}

var (
	volumeName = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9_.-]{0,199}$`)
	mountID    = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9_.-]{0,127}$`)
	// An engine gives a volume without a name 64 random hex digits.
	anonymous = regexp.MustCompile(`^[0-9a-f]{64}$`)
)

// CheckName refuses names that no engine would give a volume.
func CheckName(name string) error {
	if !volumeName.MatchString(name) {
		return fmt.Errorf("%w name %.100q: use letters, digits, '_', '.' and '-', at most 200", ErrInvalid, name)
	}
	return nil
}

// CheckID refuses mount IDs that cannot be a file name.
func CheckID(id string) error {
	if !mountID.MatchString(id) {
		return fmt.Errorf("%w mount ID %.100q: use letters, digits, '_', '.' and '-', at most 128", ErrInvalid, id)
	}
	return nil
}

// ParseOptions checks the options of a volume. Without the option model, the
// volume's name is the short name of a model. An anonymous volume keeps its
// writes unless told otherwise, for it lives as long as its one container.
func ParseOptions(name string, raw map[string]string) (Options, error) {
	o := Options{Layout: view.Files, Scope: ScopeRun, Pull: PullNever}
	if anonymous.MatchString(name) {
		o.Scope = ScopeVolume
	}
	for _, key := range slices.Sorted(maps.Keys(raw)) {
		if _, ok := optionNames[key]; !ok {
			return o, unknownOption(key)
		}
		if err := o.set(key, raw[key]); err != nil {
			return o, fmt.Errorf("%w option %s=%.100q: %w", ErrInvalid, key, raw[key], err)
		}
	}
	if _, ok := raw["model"]; !ok {
		if anonymous.MatchString(name) {
			return o, fmt.Errorf("%w: a volume without a name needs the option model (volume-opt=model=NAME)", ErrInvalid)
		}
		if err := o.setModels(name); err != nil {
			return o, fmt.Errorf("%w: without the option model, the volume's name is the short name of a model: %w", ErrInvalid, err)
		}
	}
	return o, o.check(raw)
}

func unknownOption(key string) error {
	names := slices.Sorted(maps.Keys(optionNames))
	best := ""
	for _, name := range names {
		near := strings.HasPrefix(name, key) || strings.HasPrefix(key, name) || strings.EqualFold(name, key)
		if near && len(name) > len(best) {
			best = name
		}
	}
	if best != "" {
		return fmt.Errorf("%w: unknown option %.100q; did you mean %s (%s)?", ErrInvalid, key, best, optionNames[best])
	}
	return fmt.Errorf("%w: unknown option %.100q; known are %s", ErrInvalid, key, strings.Join(names, ", "))
}

func (o *Options) set(key, value string) error {
	var err error
	switch key {
	case "model":
		return o.setModels(value)
	case "layout":
		var layout string
		layout, err = oneOf(value, layouts...)
		o.Layout = view.Layout(layout)
	case "access":
		value, err = oneOf(value, "overlay", "ro")
		o.ReadOnly = value == "ro"
	case "scope":
		value, err = oneOf(value, string(ScopeRun), string(ScopeVolume))
		o.Scope = Scope(value)
	case "size":
		if o.Size, err = units.RAMInBytes(value); err != nil || o.Size < minSize {
			return fmt.Errorf("give %s, at least 1MiB", optionNames[key])
		}
	case "upper":
		value, err = oneOf(value, "disk", "tmpfs")
		o.Tmpfs = value == "tmpfs"
	case "uid":
		o.UID, err = parseID(value)
	case "gid":
		o.GID, err = parseID(value)
	case "mode":
		o.Mode, err = parseMode(value)
	case "pull":
		value, err = oneOf(value, string(PullNever), string(PullMissing), string(PullAlways))
		o.Pull = Pull(value)
	case "absorb":
		value, err = oneOf(value, "off", "on")
		o.Absorb = value == "on"
	}
	return err
}

func oneOf(value string, allowed ...string) (string, error) {
	if !slices.Contains(allowed, value) {
		return "", fmt.Errorf("allowed are %s", strings.Join(allowed, ", "))
	}
	return value, nil
}

// The last two user ids mean "nobody said" and overflow.
const maxID = 1<<32 - 2

func parseID(value string) (*uint32, error) {
	n, err := strconv.ParseUint(value, 10, 32)
	if err != nil || n >= maxID {
		return nil, errors.New("give a number from 0 to 4294967293")
	}
	id := uint32(n)
	return &id, nil
}

func parseMode(value string) (*fs.FileMode, error) {
	n, err := strconv.ParseUint(value, 8, 32)
	if err != nil || n > 0o777 {
		return nil, errors.New("give an octal file mode from 0000 to 0777")
	}
	mode := fs.FileMode(n)
	return &mode, nil
}

func (o *Options) setModels(value string) error {
	o.Models, o.Catalog = nil, false
	if value == "*" {
		o.Catalog = true
		return nil
	}
	for part := range strings.FieldsFuncSeq(value, func(r rune) bool { return r == ',' || r == ' ' }) {
		// A constraint may itself contain a space or a comma; one reference
		// given alone is therefore tried whole first.
		r, err := reference.Parse(part)
		if err != nil {
			if whole, wholeErr := reference.Parse(value); wholeErr == nil {
				o.Models = []reference.Reference{whole}
				return nil
			}
			return err
		}
		if slices.Contains(o.Models, r) {
			return fmt.Errorf("model %s is given twice", r)
		}
		o.Models = append(o.Models, r)
	}
	if len(o.Models) == 0 {
		return errors.New("it names no model")
	}
	return nil
}

// check refuses options that contradict each other.
func (o *Options) check(raw map[string]string) error {
	_, layoutGiven := raw["layout"]
	switch {
	case o.Catalog && layoutGiven && o.Layout != view.HF:
		return fmt.Errorf("%w: model=* shows every model as one hub cache, so its layout is hf", ErrInvalid)
	case o.ReadOnly && (o.Size > 0 || o.Tmpfs):
		return fmt.Errorf("%w: with access=ro nothing is written, so size and upper mean nothing", ErrInvalid)
	case o.ReadOnly && o.Absorb:
		return fmt.Errorf("%w: with access=ro nothing is written that absorb=on could take over", ErrInvalid)
	case o.Absorb && !o.Catalog && o.Layout != view.HF:
		return fmt.Errorf("%w: absorb=on takes over what a hub's client downloads, so it needs layout=hf", ErrInvalid)
	case o.Absorb && raw["scope"] == string(ScopeVolume):
		return fmt.Errorf("%w: absorb=on moves downloads into the store when a run ends, scope=volume keeps them in the volume", ErrInvalid)
	case o.Tmpfs && o.Scope == ScopeVolume && raw["scope"] != "":
		return fmt.Errorf("%w: scope=volume keeps what is written, upper=tmpfs does not", ErrInvalid)
	}
	for _, m := range o.Models {
		if m.Kind != reference.Hub && o.Pull != PullNever {
			return fmt.Errorf("%w: pull=%s needs a model that a hub has (hf://ORG/NAME), not %s", ErrInvalid, o.Pull, m)
		}
	}
	if o.Catalog {
		o.Layout = view.HF
		if o.Pull != PullNever {
			return fmt.Errorf("%w: model=* shows what is in the store; it has nothing to pull", ErrInvalid)
		}
	}
	if o.Tmpfs || o.Absorb {
		o.Scope = ScopeRun // of an anonymous volume; see above for others
	}
	return nil
}

// limit is what bounds an upper of a volume with these options.
func (m *Manager) limit(o Options) overlay.Limit {
	l := overlay.Limit{Bytes: o.Size}
	switch {
	case o.Tmpfs:
		l.Backend = overlay.Tmpfs
	case m.loopOnly && o.Size > 0:
		l.Backend = overlay.Loop
	}
	return l
}
