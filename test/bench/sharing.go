package main

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"time"
)

// sharing is part 6: what a second version adds, and what one byte written into
// a large file costs.
func (b *bench) sharing(ctx context.Context) error {
	s, err := b.setStage(ctx)
	if err != nil {
		return err
	}
	if err := b.secondVersion(ctx, s); err != nil {
		return err
	}
	return b.oneByte(ctx, s)
}

func (b *bench) secondVersion(ctx context.Context, s *stage) error {
	// The changed file in a folder that shares all others with the first.
	next := filepath.Join(b.host.dir, "model-next")
	if err := os.Mkdir(next, 0o755); err != nil {
		return err
	}
	entries, err := os.ReadDir(s.model)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if e.Name() == extraName {
			err = writeRandom(filepath.Join(next, extraName), b.Changed, 3)
		} else {
			err = os.Link(filepath.Join(s.model, e.Name()), filepath.Join(next, e.Name()))
		}
		if err != nil {
			return err
		}
	}
	before, err := used(s.fs)
	if err != nil {
		return err
	}
	if _, err := timed(b.larder(ctx, s.root, "import", next, modelName+":next")); err != nil {
		return err
	}
	after, err := used(s.fs)
	if err != nil {
		return err
	}
	b.add(figure{
		Part: 6, Space: true,
		What:   fmt.Sprintf("disk for a second version with one other file of %s", size(b.Changed)),
		Larder: size(after - before),
		Beside: size(b.Model + b.Changed), Other: "a second copy",
		// A manifest, a configuration, and what the file system rounds up.
	}.atMost(float64(after-before)/float64(b.Changed), 1+float64(mib)/float64(b.Changed), "× the file"))
	return nil
}

func (b *bench) oneByte(ctx context.Context, s *stage) (err error) {
	var ids []string
	defer func() {
		if e := s.remove(context.WithoutCancel(ctx), ids...); err == nil {
			err = e
		}
	}()
	var larder, copies []time.Duration
	var most int64
	for i := range max(3, b.Rounds) {
		id, err := s.start(ctx, s.volume())
		if err != nil {
			return err
		}
		ids = append(ids, id)
		// Both find the file in the page cache.
		if _, err := s.probeHere(ctx, "read", s.blob, "1"); err != nil {
			return err
		}
		write := func() error {
			before, err := used(s.fs)
			if err != nil {
				return err
			}
			d, err := s.probeIn(ctx, id, "poke", filepath.Join("/models", weightName))
			if err != nil {
				return err
			}
			after, err := used(s.fs)
			larder, most = append(larder, d), max(most, after-before)
			return err
		}
		copyAll := func() error {
			target := filepath.Join(s.fs, "copy")
			began := time.Now()
			if _, err := command(ctx, "cp", "--reflink=never", s.blob, target); err != nil {
				return err
			}
			copies = append(copies, time.Since(began))
			return os.Remove(target)
		}
		if err := inTurns(i, write, copyAll); err != nil {
			return err
		}
	}
	b.add(figure{
		Part:   6,
		What:   fmt.Sprintf("a container changes one byte of a file of %s: time", size(b.Model)),
		Larder: span(median(larder)),
		Beside: span(median(copies)), Other: "copying the file",
	}.atMost(ratio(median(larder), median(copies)), 0.05, "×"))
	b.add(figure{
		Part: 6, Space: true,
		What:   fmt.Sprintf("a container changes one byte of a file of %s: disk", size(b.Model)),
		Larder: size(most),
		Beside: size(b.Model), Other: "copying the file",
	}.atMost(float64(most)/float64(mib), 1, "MiB"))
	return nil
}
