package main

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"
)

// containersOnOneModel is part 2: what many containers on one model use of the
// disk and of the page cache.
func (b *bench) containersOnOneModel(ctx context.Context) (err error) {
	s, err := b.setStage(ctx)
	if err != nil {
		return err
	}
	var ids []string
	defer func() {
		if e := s.remove(context.WithoutCancel(ctx), ids...); err == nil {
			err = e
		}
	}()
	for range b.Containers {
		id, err := s.start(ctx, s.volume())
		if err != nil {
			return err
		}
		ids = append(ids, id)
		if _, err := s.probeIn(ctx, id, "own", "/models/own.bin", strconv.FormatInt(b.Own, 10)); err != nil {
			return err
		}
	}
	now, err := used(s.fs)
	if err != nil {
		return err
	}
	model := b.Model + b.Changed
	spent := now - s.empty
	allowed := 1.01*float64(model) + float64(b.Containers)*1.2*float64(b.Own)
	b.add(figure{
		Part: 2, Space: true,
		What:   fmt.Sprintf("disk for %d containers on a model of %s, each wrote %s", b.Containers, size(model), size(b.Own)),
		Larder: size(spent),
		Beside: size(int64(b.Containers) * (model + b.Own)), Other: "a copy each",
	}.atMost(float64(spent)/allowed, 1, "× (1.01 model + 1.2 writes)"))

	// The programs of the engine are in the cache before the counting begins.
	if err := dropCaches(); err != nil {
		return err
	}
	if _, err := s.probeIn(ctx, ids[0], "read", "/probe", "1"); err != nil {
		return err
	}
	before, err := s.pageCache(ctx, ids)
	if err != nil {
		return err
	}
	for _, id := range ids {
		if _, err := s.probeIn(ctx, id, "read", filepath.Join("/models", weightName), "1"); err != nil {
			return err
		}
	}
	after, err := s.pageCache(ctx, ids)
	if err != nil {
		return err
	}
	held, err := resident(s.blob)
	if err != nil {
		return err
	}
	b.say("the page cache holds %s of the blob, of %s", size(held), size(b.Model))
	// The host of a virtual machine may take a few pages back meanwhile.
	if float64(held) < 0.95*float64(b.Model) {
		return fmt.Errorf("after all containers read the blob, %s of its %s are cached: the figure of the page cache would say nothing", size(held), size(b.Model))
	}
	b.add(figure{
		Part: 2, Space: true,
		What:   fmt.Sprintf("page cache of %d containers that read the %s of weights", b.Containers, size(b.Model)),
		Larder: size(after - before),
		Beside: size(int64(b.Containers) * b.Model), Other: "a copy each",
	}.atMost(float64(after-before)/float64(held), 1.05, "× weights"))
	return nil
}

// pageCache is what the kernel charges to containers for cached files, in
// bytes: each page to the one that read it first. A page that each container
// held for itself would be charged to each.
func (s *stage) pageCache(ctx context.Context, ids []string) (int64, error) {
	time.Sleep(3 * time.Second) // the kernel adds up its counters every two seconds
	pids, err := s.engine.Docker(ctx, append([]string{"inspect", "--format", "{{.State.Pid}}"}, ids...)...)
	if err != nil {
		return 0, err
	}
	var sum int64
	for _, pid := range strings.Fields(pids) {
		n, err := cachedBy(pid)
		if err != nil {
			return 0, fmt.Errorf("read the page cache of a container: %w", err)
		}
		sum += n
	}
	return sum, nil
}

// cachedBy reads the file memory of a process's control group, in bytes.
func cachedBy(pid string) (int64, error) {
	groups, err := os.ReadFile("/proc/" + pid + "/cgroup")
	if err != nil {
		return 0, err
	}
	for _, l := range strings.Split(string(groups), "\n") {
		fields := strings.SplitN(l, ":", 3)
		if len(fields) != 3 {
			continue
		}
		stat, key := "/sys/fs/cgroup"+fields[2]+"/memory.stat", "file "
		if fields[1] == "memory" { // version 1
			stat, key = "/sys/fs/cgroup/memory"+fields[2]+"/memory.stat", "cache "
		} else if fields[1] != "" {
			continue
		}
		if text := line(stat, key); text != "" {
			return strconv.ParseInt(text, 10, 64)
		}
	}
	return 0, fmt.Errorf("process %s is in no control group that counts memory", pid)
}

// reading is part 3: the same bytes read in a container and from the blob.
func (b *bench) reading(ctx context.Context) (err error) {
	s, err := b.setStage(ctx)
	if err != nil {
		return err
	}
	id, err := s.start(ctx, s.volume())
	if err != nil {
		return err
	}
	defer func() {
		if e := s.remove(context.WithoutCancel(ctx), id); err == nil {
			err = e
		}
	}()
	for _, c := range []struct {
		name  string
		times string // that each process reads it
		ready func() error
	}{
		{"cold", "1", dropCaches},
		// While a process in a container starts, the engine is still at work
		// on both cores: the median of several readings is past that.
		{"warm", "7", func() error { return nil }},
	} {
		inside := func() (time.Duration, error) {
			return s.probeIn(ctx, id, "read", filepath.Join("/models", weightName), c.times)
		}
		direct := func() (time.Duration, error) { return s.probeHere(ctx, "read", s.blob, c.times) }
		var larder, blob []time.Duration
		for i := range b.Reads {
			err := inTurns(i, func() error { return sample(&larder, c.ready, inside) },
				func() error { return sample(&blob, c.ready, direct) })
			if err != nil {
				return err
			}
		}
		b.add(figure{
			Part:   3,
			What:   fmt.Sprintf("reading %s in a container, %s", size(b.Model), c.name),
			Larder: rate(b.Model, median(larder)),
			Beside: rate(b.Model, median(blob)), Other: "the blob, directly",
		}.atLeast(medianRatio(blob, larder), 0.97, "×"))
	}
	return nil
}

// sample makes ready, takes a time and keeps it.
func sample(to *[]time.Duration, ready func() error, take func() (time.Duration, error)) error {
	if err := ready(); err != nil {
		return err
	}
	d, err := take()
	*to = append(*to, d)
	return err
}

// inTurns runs all of fs, beginning with another one each round, so that none
// always has the better place.
func inTurns(round int, fs ...func() error) error {
	for i := range fs {
		if err := fs[(round+i)%len(fs)](); err != nil {
			return err
		}
	}
	return nil
}
