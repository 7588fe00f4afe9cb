package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"
)

// memoryBar is how much memory a program that brings models in may take.
const memoryBar = 150e6

// bringingIn is part 5: import and pull beside the tools that do part of it.
func (b *bench) bringingIn(ctx context.Context) error {
	for _, part := range []func(context.Context) error{b.importByCopy, b.importByReflink, b.pull} {
		mark := b.host.mark()
		err := part(ctx)
		if err := errors.Join(err, b.host.backTo(mark)); err != nil {
			return err
		}
	}
	return nil
}

// race times two ways in turns, each from a cold cache and with nothing left
// to be written by the other. clear removes what a way has made.
func (b *bench) race(larder, other func() error, clear func() error) (l, o []time.Duration, err error) {
	timeIt := func(to *[]time.Duration, f func() error) func() error {
		return func() error {
			if err := dropCaches(); err != nil {
				return err
			}
			began := time.Now()
			if err := f(); err != nil {
				return err
			}
			*to = append(*to, time.Since(began))
			return clear()
		}
	}
	for round := range b.Rounds {
		if err := inTurns(round, timeIt(&l, larder), timeIt(&o, other)); err != nil {
			return nil, nil, err
		}
	}
	return l, o, nil
}

// importing is what both imports share: a file system with a model on it.
func (b *bench) importing(ctx context.Context, kind string) (fs, model string, err error) {
	if fs, err = b.host.fileSystem(ctx, kind, 2*b.Import+b.Import/4+gib); err != nil {
		return "", "", err
	}
	model = filepath.Join(fs, "model")
	return fs, model, modelFolder(model, b.Import, 4, 5)
}

// shell runs a command line whose parts a person would type.
func shell(ctx context.Context, line string, args ...string) error {
	_, err := command(ctx, "sh", append([]string{"-ec", line, "sh"}, args...)...)
	return err
}

// importOnce imports and keeps the highest peak of memory.
func (b *bench) importOnce(ctx context.Context, root, model string, peak *int64) func() error {
	return func() error {
		o, err := timed(b.larder(ctx, root, "import", model, modelName))
		*peak = max(*peak, o.peak)
		return err
	}
}

func (b *bench) importByCopy(ctx context.Context) error {
	fs, model, err := b.importing(ctx, "ext4")
	if err != nil {
		return err
	}
	root, copied := filepath.Join(fs, "larder"), filepath.Join(fs, "copy")
	var peak int64
	larder, other, err := b.race(b.importOnce(ctx, root, model, &peak),
		func() error { return shell(ctx, `cp -r "$1" "$2"; sha256sum "$2"/*`, model, copied) },
		func() error { return errors.Join(os.RemoveAll(root), os.RemoveAll(copied)) })
	if err != nil {
		return err
	}
	b.add(figure{
		Part:   5,
		What:   fmt.Sprintf("larder import of %s on ext4, synced", size(b.Import)),
		Larder: span(median(larder)),
		Beside: span(median(other)), Other: "cp, then sha256sum (not synced)",
	}.atMost(medianRatio(larder, other), 1.3, "×"))
	b.memory("larder import on ext4", peak)
	return nil
}

func (b *bench) importByReflink(ctx context.Context) error {
	fs, model, err := b.importing(ctx, "xfs")
	if err != nil {
		return err
	}
	root := filepath.Join(fs, "larder")
	var peak, before, after int64
	if before, err = used(fs); err != nil {
		return err
	}
	once := b.importOnce(ctx, root, model, &peak)
	larder, other, err := b.race(once, func() error { return shell(ctx, `sha256sum "$1"/*`, model) },
		func() error {
			now, err := used(fs)
			after = max(after, now)
			return errors.Join(err, os.RemoveAll(root))
		})
	if err != nil {
		return err
	}
	b.add(figure{
		Part:   5,
		What:   fmt.Sprintf("larder import of %s on XFS, by reflink", size(b.Import)),
		Larder: span(median(larder)),
		Beside: span(median(other)), Other: "sha256sum alone",
	}.atMost(medianRatio(larder, other), 1.2, "×"))
	b.add(figure{
		Part: 5, Space: true,
		What:   fmt.Sprintf("disk that the import of %s by reflink added", size(b.Import)),
		Larder: size(after - before),
		Beside: size(b.Import), Other: "a copy",
	}.atMost(float64(after-before)/float64(b.Import), 0.02, "×"))
	b.memory("larder import on XFS", peak)
	return nil
}

func (b *bench) pull(ctx context.Context) error {
	fs, err := b.host.fileSystem(ctx, "ext4", b.Pull+b.Pull/4+gib)
	if err != nil {
		return err
	}
	endpoint, err := b.startHub()
	if err != nil {
		return err
	}
	root, file := filepath.Join(fs, "larder"), filepath.Join(fs, "file")
	var peak int64
	larder, other, err := b.race(func() error {
		cmd := b.larder(ctx, root, "pull", "hf://"+hubRepo)
		cmd.Env = cleanEnv("HF_ENDPOINT=" + endpoint)
		o, err := timed(cmd)
		peak = max(peak, o.peak)
		return err
	}, func() error {
		return shell(ctx, `curl -sSfL -o "$1" "$2"; sha256sum "$1"`, file, endpoint+"/"+hubRepo+"/resolve/main/"+weightName)
	}, func() error { return errors.Join(os.RemoveAll(root), os.RemoveAll(file)) })
	if err != nil {
		return err
	}
	b.add(figure{
		Part:   5,
		What:   fmt.Sprintf("larder pull of %s from a hub on loopback, synced", size(b.Pull)),
		Larder: rate(b.Pull, median(larder)),
		Beside: rate(b.Pull, median(other)), Other: "curl, then sha256sum (not synced)",
	}.atLeast(medianRatio(other, larder), 0.8, "×"))
	b.memory("larder pull", peak)
	return nil
}

func (b *bench) memory(what string, peak int64) {
	b.add(figure{
		Part: 5, Space: true,
		What: what + ", peak of memory", Larder: fmt.Sprintf("%.0f MB", float64(peak)/1e6),
		Other: "resident, as the kernel counts it",
	}.atMost(float64(peak)/1e6, memoryBar/1e6, "MB"))
}
