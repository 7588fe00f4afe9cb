// Command larder keeps one copy of every AI model on a node, and gives each
// container a private writable view of it.
//
// Each verb is one file, cmd_VERB.go. A verb reads its arguments, calls the
// packages that do the work, and prints what they say; it decides nothing.
// docs/cli.md has the verbs, the JSON they print and the exit codes.
package main

import (
	"context"
	"os"
	"os/signal"
	"syscall"
)

func main() { os.Exit(run()) }

func run() int {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	// A second signal ends the process at once: nothing is lost by that, only
	// leases and partial files are left, which the next command finds.
	context.AfterFunc(ctx, stop)

	a := &app{out: os.Stdout, err: os.Stderr, lookup: os.LookupEnv}
	root := a.root()
	root.SetArgs(os.Args[1:])
	cmd, err := root.ExecuteContextC(ctx)
	if err == nil {
		return exitDone
	}
	if ctx.Err() != nil {
		err = interrupted(err)
	}
	// A wrong flag ends the reading of flags, so --json may not be set yet.
	return report(a.err, verbOf(cmd), err, a.json || asksForJSON(os.Args[1:]))
}
