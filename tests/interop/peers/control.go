package main

import (
	"context"
	"flag"
	"fmt"
	"log"
	"maps"
	"net/http/httptest"
	"os"
	"sync"
	"time"

	"tailscale.com/tailcfg"
	"tailscale.com/tstest/integration/testcontrol"
	"tailscale.com/types/key"
)

// control is a tailnet's control server that can hand out a new DERP map at any time, to all nodes or to one.
type control struct {
	server  *testcontrol.Server
	sending sync.Mutex

	mu     sync.Mutex
	manual bool                        // a map was set: from then on every update is pushed by us
	common *tailcfg.DERPMap            // for nodes without a map of their own
	own    map[string]*tailcfg.DERPMap // by host name
}

func runControl(args []string) error {
	flags := flag.NewFlagSet("control", flag.ExitOnError)
	mapFile := flags.String("map", "", "file with the first DERP map, as JSON")
	flags.Parse(args)
	log.SetOutput(os.Stderr)

	first, err := readMap(*mapFile)
	if err != nil {
		return err
	}
	c := &control{common: first, own: map[string]*tailcfg.DERPMap{}}
	c.server = &testcontrol.Server{
		DERPMap:        first,
		AllOnline:      true,
		HoldMapRequest: c.afterMapRequest,
		ModifyFirstMapResponse: func(res *tailcfg.MapResponse, req *tailcfg.MapRequest) {
			res.DERPMap = c.mapOf(c.server.Node(req.NodeKey).Hostinfo.Hostname())
		},
	}
	c.server.HTTPTestServer = httptest.NewServer(c.server)
	out := newOutput(os.Stdout)
	out.emit("ready", event{"url": c.server.HTTPTestServer.URL})
	return serve(os.Stdin, out, func(r *request) {
		if r.Cmd != "set_map" {
			r.reply(nil, fmt.Errorf("unknown command %q", r.Cmd))
			return
		}
		go func() { r.reply(nil, c.setMap(r)) }()
	})
}

func (c *control) setMap(r *request) error {
	var a struct {
		Map  *tailcfg.DERPMap            `json:"map"`  // for all nodes
		Maps map[string]*tailcfg.DERPMap `json:"maps"` // or for each of these, by host name
	}
	if err := r.decode(&a); err != nil {
		return err
	}
	c.mu.Lock()
	c.manual = true
	if a.Map != nil {
		c.common = a.Map
		clear(c.own)
	}
	maps.Copy(c.own, a.Maps)
	c.mu.Unlock()
	return c.push()
}

// afterMapRequest keeps the nodes informed of each other's changes (the home region, above all) once maps are pushed:
// testcontrol stops its own updates to a node with the first raw response.
func (c *control) afterMapRequest(req *tailcfg.MapRequest) func() {
	if req.Stream {
		return nil
	}
	return func() {
		c.mu.Lock()
		manual := c.manual
		c.mu.Unlock()
		if manual {
			go c.push()
		}
	}
}

// push sends every node its view of the tailnet with the DERP map that is meant for it.
func (c *control) push() error {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	for _, node := range c.server.AllNodes() {
		if err := c.server.AwaitNodeInMapRequest(ctx, node.Key); err != nil {
			return fmt.Errorf("node %s: %w", node.Hostinfo.Hostname(), err)
		}
		if err := c.pushTo(node.Key, node.Hostinfo.Hostname()); err != nil {
			return err
		}
	}
	return nil
}

func (c *control) pushTo(node key.NodePublic, hostname string) error {
	res, err := c.server.MapResponse(&tailcfg.MapRequest{NodeKey: node})
	if err != nil {
		return err
	}
	c.sending.Lock()
	defer c.sending.Unlock() // a map must not overtake a newer one
	res.DERPMap = c.mapOf(hostname)
	if !c.server.AddRawMapResponse(node, res) {
		return fmt.Errorf("node %s is not connected to its control server", hostname)
	}
	return nil
}

func (c *control) mapOf(hostname string) *tailcfg.DERPMap {
	c.mu.Lock()
	defer c.mu.Unlock()
	if own := c.own[hostname]; own != nil {
		return own
	}
	return c.common
}
