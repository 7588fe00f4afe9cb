// Command hubserver serves models as a Hugging Face hub would, for end-to-end
// tests and benchmarks:
//
//	hubserver -dir MODELS -pattern acme/big=model.safetensors:4294967296:1
//
// MODELS/ORG/NAME becomes the repository ORG/NAME. A pattern is a file of so
// many bytes, made from a seed while it is read; several for one repository
// make up one revision. Once it listens it prints one line, HF_ENDPOINT=URL.
// GET /_test/requests on the hub gives the log of requests as JSON; POST
// /_test/fault takes a hubtest.Fault as JSON, DELETE forgets all of them.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"strconv"
	"strings"
	"syscall"

	"github.com/larder-project/larder/internal/source/huggingface/hubtest"
)

func main() {
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, "hubserver:", err)
		os.Exit(1)
	}
}

func run() error {
	o := hubtest.Options{Control: true}
	patterns := map[string][]hubtest.File{}
	addr := flag.String("listen", "127.0.0.1:0", "`HOST:PORT` of the hub")
	dir := flag.String("dir", "", "`folder` of ORG/NAME folders")
	flag.BoolVar(&o.Direct, "direct", false, "no second host for the data of large files")
	flag.Func("pattern", "`ORG/NAME=FILE:BYTES:SEED`, may be repeated", func(s string) error {
		repo, spec, ok := strings.Cut(s, "=")
		parts := strings.Split(spec, ":")
		if !ok || len(parts) != 3 {
			return errors.New("it is ORG/NAME=FILE:BYTES:SEED")
		}
		size, err := strconv.ParseInt(parts[1], 10, 64)
		if err != nil {
			return err
		}
		seed, err := strconv.ParseUint(parts[2], 10, 64)
		if err != nil {
			return err
		}
		patterns[repo] = append(patterns[repo], hubtest.File{Path: parts[0], Content: hubtest.Pattern(seed, size)})
		return nil
	})
	flag.Parse()

	hub := hubtest.NewHub(o)
	if *dir != "" {
		if err := hub.AddDir(*dir); err != nil {
			return err
		}
	}
	for repo, files := range patterns {
		if _, err := hub.Repo(repo).Commit("main", files...); err != nil {
			return err
		}
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	return hubtest.ListenAndServe(ctx, hub, *addr, func(s *hubtest.Server) { fmt.Printf("HF_ENDPOINT=%s\n", s.URL) })
}
