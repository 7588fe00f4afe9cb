package retention

import (
	"errors"
	"fmt"
	"math"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/docker/go-units"
)

// Policy says what may go, when, and how fast.
type Policy struct {
	Name     string      // the file it was read from, or "profile ci"
	Profile  string      // that it builds on, or empty
	Rules    []Rule      // the first whose pattern fits a model counts for it
	Pressure *Watermarks // nil: however little space is free, nothing goes for it

	TrashHold      time.Duration // how long what was removed can be brought back
	UnfinishedHold time.Duration // how long partial downloads, and blobs that no version needs and no lease holds, are kept
	Windows        []Window      // when rules may remove; none: at any time
	Limits         Limits
	Interval       time.Duration // how often the sidecar runs
	Asked          bool          // Pressure is what a person asks for, for one run: see UntilFree

	origins map[string]origin // by key of the file: "trash.hold", "rules[0].minAge"
}

// Rule is what is wanted of the models that its patterns name.
type Rule struct {
	Models []string // patterns, as package pattern has them; one that fits is enough

	Protect      bool          // all versions stay, whatever else is said
	NewestPatch  bool          // of each MAJOR.MINOR only the newest patch is wanted
	KeepNewest   int           // so many of the newest stay; 0: not said
	UnusedFor    time.Duration // what was not used for so long goes; 0: not said
	AbandonedFor time.Duration // a model of which no version was used for so long goes whole; 0: not said
	Rollback     int           // earlier versions that stay to roll back to
	MinAge       time.Duration // what came or was used less than this ago stays
}

// What a rule has where it says nothing, and what counts where there is no rule.
const (
	DefaultRollback = 2
	DefaultMinAge   = time.Hour
)

const day = 24 * time.Hour

// Watermarks are the room that is kept free.
type Watermarks struct {
	MinFree Amount // with less than this free, versions go,
	Target  Amount // until so much is free
}

// Limits bound how fast the trash is emptied; zero values: no bound.
type Limits struct {
	BytesPerSecond int64
	FilesPerSecond int
}

// None is the policy where there is none: it removes nothing.
func None() *Policy {
	return &Policy{Name: "no policy", TrashHold: day, UnfinishedHold: 7 * day, Interval: time.Hour}
}

// UntilFree is p for one run that makes so much room and no more: what p
// protects and keeps to roll back to stays, its rules take nothing by
// themselves, and there are no windows to wait for.
func (p *Policy) UntilFree(target Amount) *Policy {
	out := *p
	out.Pressure, out.Asked = &Watermarks{MinFree: target, Target: target}, true
	out.Windows = nil
	out.Rules = slices.Clone(p.Rules)
	for i, r := range out.Rules {
		out.Rules[i] = Rule{Models: r.Models, Protect: r.Protect, Rollback: r.Rollback, MinAge: r.MinAge}
	}
	return &out
}

// removes tells whether any version can ever go by the rule.
func (r Rule) removes() bool {
	return r.NewestPatch || r.KeepNewest > 0 || r.UnusedFor > 0 || r.AbandonedFor > 0
}

// label is how plans and messages call the rule.
func (r Rule) label(i int) string {
	more := ""
	if len(r.Models) > 1 {
		more = ", …"
	}
	return fmt.Sprintf("rules[%d] (%s%s)", i, r.Models[0], more)
}

// Amount is an amount of space: so many bytes and a share of a file system,
// added up. A person gives one of the two.
type Amount struct {
	Bytes   int64
	Percent float64
}

// ParseAmount reads "10%" or "500GiB".
func ParseAmount(s string) (Amount, error) {
	if n, ok := strings.CutSuffix(s, "%"); ok {
		percent, err := strconv.ParseFloat(strings.TrimSpace(n), 64)
		if err != nil || !(percent > 0 && percent < 100) {
			return Amount{}, fmt.Errorf("%.50q is not a share between 0%% and 100%%", s)
		}
		return Amount{Percent: percent}, nil
	}
	n, err := parseSize(s)
	if err != nil {
		return Amount{}, fmt.Errorf("%.50q is neither a size such as 500GiB nor a share such as 10%%", s)
	}
	return Amount{Bytes: n}, nil
}

// Of is the amount in bytes, on a file system of this capacity.
func (a Amount) Of(capacity int64) int64 {
	return a.Bytes + int64(a.Percent/100*float64(capacity))
}

// String is how the amount is written in a policy.
func (a Amount) String() string {
	percent := strconv.FormatFloat(a.Percent, 'g', 6, 64) + "%"
	switch {
	case a.Bytes == 0:
		return percent
	case a.Percent == 0:
		return units.BytesSize(float64(a.Bytes))
	}
	return units.BytesSize(float64(a.Bytes)) + " + " + percent
}

var errSize = errors.New("not a size")

// parseSize reads "200MiB" and "1073741824"; as everywhere in Larder, K, M, G
// and so on are binary.
func parseSize(s string) (int64, error) {
	n, err := units.RAMInBytes(s)
	if err != nil || n <= 0 || n > math.MaxInt64/4 {
		return 0, errSize
	}
	return n, nil
}
