package main

import (
	"fmt"
	"strings"
	"time"

	"github.com/larder-project/larder/internal/cleanup"
)

// check is one condition of being ready.
type check struct {
	Name   string `json:"name"`
	OK     bool   `json:"ok"`
	Detail string `json:"detail,omitempty"`
}

// staleAfter is how old the last look at the store may be.
const staleAfter = 20 * time.Minute

// ready tells whether clean-up works, condition by condition.
func (n *node) ready(now time.Time) (all []check, ok bool) {
	s := n.loop.Status()
	all = []check{checkStore(s, now), checkSources(s), n.checkPolicy(s), checkRun(s), n.checkClock()}
	ok = true
	for _, c := range all {
		ok = ok && c.OK
	}
	return all, ok
}

func checkStore(s cleanup.Status, now time.Time) check {
	c := check{Name: "store"}
	switch {
	case s.SpaceErr != nil:
		c.Detail = s.SpaceErr.Error()
	case s.LookErr != nil:
		c.Detail = s.LookErr.Error()
	case s.Inventory == nil:
		c.Detail = "it was not looked at yet"
	case now.Sub(s.Looked) > staleAfter:
		c.Detail = "it was last looked at on " + s.Looked.UTC().Format(time.RFC3339)
	default:
		c.OK = true
	}
	return c
}

func checkSources(s cleanup.Status) check {
	c := check{Name: "sources"}
	if s.Inventory == nil {
		c.Detail = "they were not asked yet"
		return c
	}
	var failed []string
	for _, f := range s.Inventory.Failed {
		failed = append(failed, fmt.Sprintf("%s: %v", f.Source, f.Err))
	}
	if len(failed) > 0 {
		c.Detail = "nothing is removed while these cannot tell what is in use: " + strings.Join(failed, "; ")
		return c
	}
	c.OK = true
	return c
}

func (n *node) checkPolicy(s cleanup.Status) check {
	p := n.policy.state()
	c := check{Name: "policy", OK: p.err == nil}
	switch {
	case p.err != nil && p.policy != nil:
		c.Detail = "the file is refused, and the policy from before is in force: " + p.err.Error()
	case p.err != nil:
		c.Detail = "there is none in force, so nothing is removed: " + p.err.Error()
	case p.policy == nil:
		c.Detail = "there is none, so nothing is removed"
	case !s.Measured.IsZero():
		c.Detail = p.policy.Beyond(s.Space.Capacity)
		c.OK = c.Detail == ""
	}
	return c
}

func checkRun(s cleanup.Status) check {
	c := check{Name: "last_run", OK: true}
	switch {
	case s.Last == nil:
		c.Detail = "none yet"
	case s.Last.Err != nil:
		c.OK, c.Detail = false, s.Last.Err.Error()
	case s.Last.Result == cleanup.Short:
		c.Detail = "all was done that may be, and space is short of its target"
	}
	return c
}

func (n *node) checkClock() check {
	if err := n.clock.Err(); err != nil {
		return check{Name: "clock", Detail: err.Error()}
	}
	return check{Name: "clock", OK: true}
}
