package main

import (
	"fmt"
	"runtime"
	"runtime/debug"

	"github.com/spf13/cobra"
)

// version is set by the linker for a release: -X main.version=v1.2.3.
var version = ""

// build is this program as --json prints it.
type build struct {
	Version  string `json:"version"`
	Commit   string `json:"commit,omitempty"`
	Modified bool   `json:"modified,omitempty"` // built from a changed checkout
	Go       string `json:"go"`
	Platform string `json:"platform"`
}

func (a *app) cmdVersion() *cobra.Command {
	return &cobra.Command{
		Use:               "version",
		GroupID:           host,
		Short:             "Print the version of this program",
		Args:              takes(0, 0, "no arguments"),
		ValidArgsFunction: cobra.NoFileCompletions,
		RunE: func(*cobra.Command, []string) error {
			b := thisBuild()
			if a.json {
				return printJSON(a.out, b)
			}
			line := "larder " + b.Version
			if b.Commit != "" {
				line += " (" + b.Commit[:min(12, len(b.Commit))]
				if b.Modified {
					line += ", changed"
				}
				line += ")"
			}
			_, err := fmt.Fprintf(a.out, "%s %s %s\n", line, b.Go, b.Platform)
			return err
		},
	}
}

func thisBuild() build {
	b := build{Version: version, Go: runtime.Version(), Platform: runtime.GOOS + "/" + runtime.GOARCH}
	info, ok := debug.ReadBuildInfo()
	if ok {
		if b.Version == "" {
			b.Version = info.Main.Version
		}
		for _, s := range info.Settings {
			switch s.Key {
			case "vcs.revision":
				b.Commit = s.Value
			case "vcs.modified":
				b.Modified = s.Value == "true"
			}
		}
	}
	if b.Version == "" || b.Version == "(devel)" {
		b.Version = "development"
	}
	return b
}
