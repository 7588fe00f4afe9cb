package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/larder-project/larder/internal/source/huggingface/hubtest"
)

// hubRepo is the one repository of the hub.
const hubRepo = "bench/model"

// serveHub is the hub in a process of its own: "hub BYTES". Its weights are
// made as they are read, so it takes no disk. It prints its URL, and ends with
// its standard input.
func serveHub(args []string) int {
	if err := runHub(args); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return 0
}

func runHub(args []string) error {
	if len(args) != 1 {
		return errors.New("usage: hub BYTES")
	}
	bytes, err := strconv.ParseInt(args[0], 10, 64)
	if err != nil {
		return err
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	go func() {
		_, _ = os.Stdin.Read(make([]byte, 1)) // nobody writes: it returns when the other end is closed
		stop()
	}()
	hub := hubtest.NewHub(hubtest.Options{})
	_, err = hub.Repo(hubRepo).Commit("main",
		hubtest.File{Path: weightName, Content: hubtest.Pattern(6, bytes)},
		hubtest.File{Path: "config.json", Content: hubtest.Text("{\"model\": 6}\n")},
		hubtest.File{Path: "tokenizer.json", Content: hubtest.Text("{\"tokens\": []}\n")})
	if err != nil {
		return err
	}
	return hubtest.ListenAndServe(ctx, hub, "127.0.0.1:0", func(s *hubtest.Server) { fmt.Println(s.URL) })
}

// startHub starts that process and gives its URL.
func (b *bench) startHub() (string, error) {
	self, err := os.Executable()
	if err != nil {
		return "", err
	}
	cmd := exec.Command(self, "hub", strconv.FormatInt(b.Pull, 10))
	cmd.Stderr = os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	stdin, err := cmd.StdinPipe()
	if err != nil {
		return "", err
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		return "", err
	}
	if err := cmd.Start(); err != nil {
		return "", fmt.Errorf("start the hub: %w", err)
	}
	b.host.later(func() error {
		_ = stdin.Close()
		kill := time.AfterFunc(10*time.Second, func() { _ = cmd.Process.Kill() })
		defer kill.Stop()
		return cmd.Wait()
	})
	url, err := bufio.NewReader(stdout).ReadString('\n')
	if err != nil {
		return "", fmt.Errorf("read the hub's address: %w", err)
	}
	return strings.TrimSpace(url), nil
}
