package containerd

import (
	"context"
	"time"
)

// topics are the events after which containers may use other versions, in
// every namespace. Those of exec are left out: probes make them by the second.
var topics = []string{
	`topic=="/containers/create"`, `topic=="/containers/update"`, `topic=="/containers/delete"`,
	`topic=="/tasks/start"`, `topic=="/tasks/paused"`, `topic=="/tasks/resumed"`, `topic=="/tasks/delete"`,
}

// How long Watch waits before it tries again to reach a containerd, and how
// often it looks where no event tells it to.
const (
	retryFirst = time.Second
	retryLast  = 30 * time.Second
	period     = time.Minute
)

// Watch calls changed when containers may have begun or ended a use, until the
// context ends: on events, when containerd goes, when it is back, and each
// minute, because events that nobody heard are not told again. Calls come one
// after another.
func (s *Source) Watch(ctx context.Context, changed func()) {
	wait := retryFirst
	for ctx.Err() == nil {
		begun := time.Now()
		s.follow(ctx, changed)
		if time.Since(begun) > retryLast {
			wait = retryFirst
		}
		select {
		case <-ctx.Done():
		case <-time.After(wait):
		}
		wait = min(2*wait, retryLast)
	}
}

// follow reads events until the stream breaks.
func (s *Source) follow(ctx context.Context, changed func()) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	c, err := s.connect()
	if err != nil {
		return
	}
	defer c.Close()
	soon, done := context.WithTimeout(ctx, limit)
	_, err = c.Version(soon)
	done()
	if err != nil {
		return
	}
	events, broken := c.EventService().Subscribe(ctx, topics...)
	changed()
	// Nothing tells when the subscription holds: the first second is looked at
	// once more.
	next := time.NewTimer(time.Second)
	defer next.Stop()
	for {
		select {
		case <-events:
			changed()
		case <-next.C:
			changed()
			next.Reset(period)
		case <-broken:
			if ctx.Err() == nil {
				changed()
			}
			return
		}
	}
}
