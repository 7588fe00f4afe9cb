package overlay

import (
	"github.com/larder-project/larder/internal/view"
)

// Capability is one thing that a host can do, or not.
type Capability struct {
	OK     bool   `json:"ok"`
	Reason string `json:"reason,omitempty"` // how it was found, or why it does not work
	Advice string `json:"advice,omitempty"` // what a person may do about it
}

// Capabilities is what Probe found about a store and a state folder.
type Capabilities struct {
	Kernel string `json:"kernel"` // release, as uname gives it
	// Method is the best one that works. It is empty when none does; then
	// nothing can be mounted, and the reasons of all three say why.
	Method view.Method `json:"method"`

	DataOnly Capability `json:"data_only"`
	Lower    Capability `json:"lower"`
	HardLink Capability `json:"hard_link"`
	// Reflink: a write into a large file copies no data.
	Reflink Capability `json:"reflink"`
	// Quota, Tmpfs and Loop can bound what is written (Limit).
	Quota Capability `json:"quota"`
	Tmpfs Capability `json:"tmpfs"`
	Loop  Capability `json:"loop"`
}
