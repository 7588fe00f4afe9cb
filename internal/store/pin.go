package store

import "time"

// Pin keeps a version from every policy and from larder rm, until it is taken
// away.
type Pin struct {
	Time time.Time `json:"time"`
	Node string    `json:"node"` // where it was set
	Why  string    `json:"why,omitempty"`
}
