package pull

// How a file came to be in the store.
type How int

// The ways.
const (
	Fetched How = iota // its bytes came over the network
	Copied             // its bytes were copied on this machine
	Cloned             // it shares its blocks with the original
	Moved              // it is the original, taken over
	Reused             // the store had it
)

// String is the word for programs and people.
func (h How) String() string {
	return [...]string{"fetched", "copied", "cloned", "moved", "reused"}[h]
}

// Plan is what a pull is about to do.
type Plan struct {
	Source   string // hf://org/name, or empty
	Revision string // commit, or empty
	Files    []PlanFile
	Bytes    int64 // to be fetched or copied
	Reused   int64 // that the store has
}

// PlanFile is one content of a plan; files that are equal are one.
type PlanFile struct {
	Path string
	Size int64
	Have bool // the store has it: nothing more is reported
}

// Progress is told how a pull goes on. Its methods are called from several
// goroutines and must return fast.
type Progress interface {
	// Start comes once, before everything else.
	Start(Plan)
	// Wait: another process is fetching this file.
	Wait(path string)
	// Bytes: n more bytes of the file are here; n is negative when bytes
	// turned out wrong and are asked for again.
	Bytes(path string, n int64)
	// Have: n bytes of the file took no time: an earlier attempt or another
	// process has brought them.
	Have(path string, n int64)
	// Done: the file is in the store.
	Done(path string, how How)
}

type silent struct{}

func (silent) Start(Plan)          {}
func (silent) Wait(string)         {}
func (silent) Bytes(string, int64) {}
func (silent) Have(string, int64)  {}
func (silent) Done(string, How)    {}

func (r *run) plan() Plan {
	p := Plan{Source: r.snap.Source, Revision: r.snap.Revision, Files: make([]PlanFile, len(r.items))}
	for i, it := range r.items {
		have := it.digest != ""
		p.Files[i] = PlanFile{Path: it.want.Path, Size: it.want.Size, Have: have}
		if have {
			p.Reused += it.want.Size
		} else {
			p.Bytes += it.want.Size
		}
	}
	return p
}
