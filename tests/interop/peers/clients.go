package main

import (
	"context"
	"fmt"
	"log"
	"os"
	"time"

	"tailscale.com/types/key"
)

// clients is every stock client of this process, by the name that the driver gave it.
type clients struct {
	out   *output
	byID  map[string]*client
	probe *prober
}

// runClients serves commands for any number of derphttp clients, and the stock STUN and netcheck probes.
func runClients([]string) error {
	log.SetOutput(os.Stderr)
	out := newOutput(os.Stdout)
	c := &clients{out: out, byID: map[string]*client{}, probe: newProber()}
	out.emit("ready", nil)
	return serve(os.Stdin, out, c.handle)
}

func (c *clients) handle(r *request) {
	switch r.Cmd {
	case "dial":
		c.dial(r)
	case "stun":
		go c.probe.stun(r)
	case "netcheck":
		go c.probe.netcheck(r)
	default:
		c.onClient(r)
	}
}

func (c *clients) dial(r *request) {
	var opts dialOptions
	if err := r.decode(&opts); err != nil {
		r.reply(nil, err)
		return
	}
	cl, err := newClient(opts, c.out)
	if err != nil {
		r.reply(nil, err)
		return
	}
	c.byID[opts.Client] = cl
	cl.do(func() { r.reply(cl.connect()) })
}

// clientArgs are the members of all commands to one client.
type clientArgs struct {
	Client    string         `json:"client"`
	Dst       key.NodePublic `json:"dst"`
	Src       key.NodePublic `json:"src"`
	Payload   []byte         `json:"payload"`
	Count     int            `json:"count"`
	Preferred bool           `json:"preferred"`
}

func (c *clients) onClient(r *request) {
	var a clientArgs
	if err := r.decode(&a); err != nil {
		r.reply(nil, err)
		return
	}
	cl := c.byID[a.Client]
	if cl == nil {
		r.reply(nil, fmt.Errorf("no client %q", a.Client))
		return
	}
	if r.Cmd == "close" { // not queued: it must get through to a client that is stuck
		r.reply(nil, cl.close())
		return
	}
	cl.do(func() { r.reply(cl.command(r.Cmd, a)) })
}

// command runs one command on the client's own goroutine.
func (cl *client) command(cmd string, a clientArgs) (event, error) {
	switch cmd {
	case "send":
		for range max(a.Count, 1) {
			if err := cl.derp.Send(a.Dst, a.Payload); err != nil {
				return nil, err
			}
		}
		return nil, nil
	case "forward":
		return nil, cl.derp.ForwardPacket(a.Src, a.Dst, a.Payload)
	case "ping":
		start := time.Now()
		err := cl.derp.Ping(context.Background())
		return event{"ms": milliseconds(time.Since(start))}, err
	case "note_preferred":
		cl.derp.NotePreferred(a.Preferred)
		return nil, nil
	case "close_peer":
		return nil, cl.derp.ClosePeer(a.Dst)
	case "pause":
		cl.reading.Lock()
		return nil, nil
	case "resume":
		cl.reading.Unlock()
		return nil, nil
	}
	return nil, fmt.Errorf("unknown command %q", cmd)
}

func milliseconds(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 }
