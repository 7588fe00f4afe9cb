package main

import (
	"fmt"
	"time"

	"github.com/spf13/cobra"

	"github.com/larder-project/larder/internal/store"
)

// nodeInfo is a node of a shared store, as --json prints it.
type nodeInfo struct {
	Node     string     `json:"node"`
	This     bool       `json:"this,omitempty"` // the command runs on it
	Alive    bool       `json:"alive"`          // a process of it runs that stays
	Seen     *time.Time `json:"seen,omitempty"` // when one last began
	Versions []string   `json:"versions"`       // digests that it uses
}

func (a *app) cmdNode() *cobra.Command {
	cmd := &cobra.Command{
		Use:     "node",
		GroupID: host,
		Short:   "List the nodes that share the store, and forget those that are gone",
		Long: `Nodes that share a store keep each other's versions from being removed. What a
node that is gone for good has said it uses stays until it is forgotten: no
clock decides that.`,
		SuggestionsMinimumDistance: 2,

		Args: a.onlyVerbs,
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	ls := &cobra.Command{
		Use:               "ls",
		Aliases:           []string{"list"},
		Short:             "List the nodes and how many versions each uses",
		Args:              takes(0, 0, "no arguments"),
		ValidArgsFunction: cobra.NoFileCompletions,
		RunE:              func(*cobra.Command, []string) error { return a.listNodes() },
	}
	forget := &cobra.Command{
		Use:   "forget NODE",
		Short: "Drop what a node that is gone for good has said it uses",
		Long: `Drop what a node has said it uses, so that nothing is kept for it any more. One
of which a process runs is refused. If it comes back it says anew what it uses;
what was removed meanwhile is gone from it.`,
		Args: takes(1, 1, "the name of a node"),
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := store.CheckNode(args[0]); err != nil {
				return &usageError{err: err, hint: "larder node ls lists them"}
			}
			st, err := a.store()
			if err != nil {
				return err
			}
			if args[0] == a.cfg.Node {
				return &usageError{err: fmt.Errorf("%s is this node", args[0]), hint: "remove its volumes instead: larder volume ls"}
			}
			if err := st.ForgetNode(cmd.Context(), args[0]); err != nil {
				return err
			}
			if a.json {
				return printJSON(a.out, nodeInfo{Node: args[0], Versions: []string{}})
			}
			_, err = fmt.Fprintf(a.out, "forgot %s\n", args[0])
			return err
		},
	}
	cmd.AddCommand(ls, forget)
	return cmd
}

func (a *app) listNodes() error {
	st, err := a.store()
	if err != nil {
		return err
	}
	nodes, err := st.Nodes()
	if err != nil {
		return err
	}
	t := newTable("NODE", "STATE", "SEEN", ">VERSIONS IN USE")
	for _, n := range nodes {
		out := nodeInfo{Node: n.Name, This: n.Name == a.cfg.Node, Alive: n.Alive, Versions: []string{}}
		for _, d := range n.Versions {
			out.Versions = append(out.Versions, d.String())
		}
		if !n.Seen.IsZero() {
			out.Seen = &n.Seen
		}
		if a.json {
			if err := printJSON(a.out, out); err != nil {
				return err
			}
			continue
		}
		state := "not running"
		switch {
		case out.This:
			state = "this node"
		case out.Alive:
			state = "running"
		}
		t.add(n.Name, state, age(time.Now(), n.Seen), fmt.Sprint(len(n.Versions)))
	}
	if a.json {
		return nil
	}
	return t.print(a.out)
}
