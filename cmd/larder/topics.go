package main

import (
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	"github.com/larder-project/larder/internal/config"
)

// Topics are pages of the help that are no verbs: larder help exit-codes.

func (a *app) topicExitCodes() *cobra.Command {
	return &cobra.Command{
		Use:   "exit-codes",
		Short: "What the exit codes mean",
		Long: `Exit codes:
  0  done
  1  failed
  2  wrong use: a flag, an argument, a setting, a name that is not allowed
  3  not found: a model, a volume, a file, a repository of a hub
  4  in use
  5  damaged

With --json a failure is one object on stderr: error, hint, code (failed, usage,
not_found, in_use, damaged) and exit, the number above.`,
	}
}

func (a *app) topicConfig() *cobra.Command {
	var b strings.Builder
	fmt.Fprintf(&b, `Settings, each from the first that says something: its flag, its environment
variable, the configuration file, the default. The file is --config, LARDER_CONFIG
or %s; a key that is not known is refused.

`, config.DefaultFile)
	for _, k := range config.Keys() {
		fmt.Fprintf(&b, "%s\n    %s", k.Name, k.Usage)
		if k.Default != "" {
			fmt.Fprintf(&b, " (default %s)", k.Default)
		}
		b.WriteString("\n    ")
		if k.Flag != "" {
			if k.Program != "" {
				b.WriteString(k.Program + " ")
			}
			b.WriteString("--" + k.Flag + ", ")
		}
		b.WriteString(strings.Join(k.Env, ", ") + "\n")
	}
	return &cobra.Command{
		Use:   "config",
		Short: "The settings, and where they come from",
		Long:  strings.TrimSuffix(b.String(), "\n"),
	}
}
