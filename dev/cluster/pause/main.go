// Process 1 of every pod: it holds the pod's namespaces and waits to be told to go.
package main

import (
	"os"
	"os/signal"
	"syscall"
)

func main() {
	// Ignored SIGCHLD means that the kernel reaps orphans, so nothing else is left to do.
	signal.Ignore(syscall.SIGCHLD)
	end := make(chan os.Signal, 1)
	signal.Notify(end, syscall.SIGINT, syscall.SIGTERM)
	<-end
}
