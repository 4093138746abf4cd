// Command peers holds the real DERP peers that the interop and end-to-end tests talk to:
// stock clients, a tailnet's control server, and tailnet nodes, all from the published tailscale.com module.
//
// Each subcommand is driven by one JSON object per line on stdin and answers the same way on stdout (see lines.go).
// It ends when stdin ends, so that no test run leaves a process behind.
package main

import (
	"fmt"
	"os"

	"tailscale.com/net/netns"
)

func main() {
	// The peers reach relays over loopback and over addresses of this host: no socket may be bound to a default route.
	netns.SetEnabled(false)
	run := map[string]func(args []string) error{
		"clients": runClients,
		"control": runControl,
		"node":    runNode,
	}
	if len(os.Args) < 2 || run[os.Args[1]] == nil {
		fmt.Fprintln(os.Stderr, "usage: peers clients | control | node [flags]")
		os.Exit(2)
	}
	if err := run[os.Args[1]](os.Args[2:]); err != nil {
		fmt.Fprintf(os.Stderr, "peers %s: %v\n", os.Args[1], err)
		os.Exit(1)
	}
}
