package hubtest

import (
	"net/http"
	"time"
)

// Fault makes some requests fail. It strikes requests that fit Kind, Method
// and Path, after letting Skip of them through, Times times.
type Fault struct {
	Kind   string // Kind...; empty: any
	Method string // empty: any
	Path   string // of the file; empty: any
	Skip   int    // requests that fit and are let through first
	Times  int    // requests that are struck; 0: all

	// What happens, in this order. Fields that are not set do nothing.
	Delay    time.Duration     // before anything is sent
	Reset    bool              // the connection ends without an answer
	Header   map[string]string // added to the answer; an empty value removes one
	Status   int               // in place of the answer
	Code     string            // X-Error-Code, with Status
	Text     string            // X-Error-Message and body, with Status
	Redirect string            // a Location, with status 302

	IgnoreRange  bool   // all of the file, with status 200
	ContentRange string // in place of the true one
	Chunked      bool   // no Content-Length
	Extra        int    // bytes too many, with Chunked
	Flip         *int64 // the byte at this offset of the file is another
	Shorten      int64  // bytes of the range that are left out, as a server may
	CutAfter     *int64 // the connection ends after this many bytes of body
	StallAfter   *int64 // nothing more comes after this many bytes of body
}

// At is a pointer to n, for the fields of Fault and File.
func At(n int64) *int64 { return &n }

type armed struct {
	Fault
	seen, struck int
}

// Inject adds a fault. The first that fits a request strikes it.
func (h *Hub) Inject(f Fault) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.faults = append(h.faults, &armed{Fault: f})
}

// ClearFaults makes the hub honest again.
func (h *Hub) ClearFaults() {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.faults = nil
}

// strike needs h.mu.
func (h *Hub) strike(r Request) Fault {
	for _, f := range h.faults {
		if f.Kind != "" && f.Kind != r.Kind || f.Method != "" && f.Method != r.Method || f.Path != "" && f.Path != r.Path {
			continue
		}
		if f.seen++; f.seen <= f.Skip || f.Times > 0 && f.struck >= f.Times {
			continue
		}
		f.struck++
		return f.Fault
	}
	return Fault{}
}

// applyFault does what a fault does before the answer, and tells whether there
// is still one to give.
func (x *exchange) applyFault() bool {
	f := x.fault
	if f.Delay > 0 {
		select {
		case <-time.After(f.Delay):
		case <-x.r.Context().Done():
		case <-x.h.closed:
		}
	}
	if f.Reset {
		panic(http.ErrAbortHandler)
	}
	switch {
	case f.Redirect != "":
		x.w.Header().Set("Location", f.Redirect)
		x.json(http.StatusFound, map[string]string{})
		return false
	case f.Status != 0:
		text := f.Text
		if text == "" {
			text = http.StatusText(f.Status)
		}
		x.refuse(f.Status, f.Code, text)
		return false
	}
	return true
}

// header is called last before the status goes out.
func (x *exchange) header() {
	for name, value := range x.fault.Header {
		if value == "" {
			x.w.Header().Del(name)
		} else {
			x.w.Header().Set(name, value)
		}
	}
}

// abort ends the connection after what was sent so far.
func (x *exchange) abort() {
	_ = http.NewResponseController(x.w).Flush()
	panic(http.ErrAbortHandler)
}

func (x *exchange) stall() {
	_ = http.NewResponseController(x.w).Flush()
	select {
	case <-x.r.Context().Done():
	case <-x.h.closed:
	}
	panic(http.ErrAbortHandler)
}
