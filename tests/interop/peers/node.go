package main

import (
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"os"
	"reflect"
	"regexp"
	"strconv"
	"time"

	"tailscale.com/client/local"
	"tailscale.com/envknob"
	"tailscale.com/ipn/store/mem"
	"tailscale.com/net/netmon"
	"tailscale.com/tailcfg"
	"tailscale.com/tsnet"
)

// node is one real Tailscale client whose traffic has no way but through relays.
type node struct {
	server  *tsnet.Server
	local   *local.Client
	out     *output
	relays  chan [2]int // region and generation of each new relay connection
	traffic map[string]*traffic
}

func readMap(path string) (*tailcfg.DERPMap, error) {
	text, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	m := new(tailcfg.DERPMap)
	return m, json.Unmarshal(text, m)
}

func runNode(args []string) error {
	flags := flag.NewFlagSet("node", flag.ExitOnError)
	controlURL := flags.String("control", "", "URL of the control server")
	hostname := flags.String("hostname", "", "host name in the tailnet")
	dir := flags.String("dir", "", "state directory")
	flags.Parse(args)
	log.SetOutput(os.Stderr)

	envknob.Setenv("TS_DEBUG_NEVER_DIRECT_UDP", "1") // STUN still works, unlike with TS_DEBUG_ALWAYS_USE_DERP
	envknob.Setenv("TS_DISABLE_PORTMAPPER", "1")
	envknob.SetNoLogsNoSupport()
	netmon.RegisterInterfaceGetter(steadyInterfaces)

	n := &node{out: newOutput(os.Stdout), relays: make(chan [2]int, 64), traffic: map[string]*traffic{}}
	n.server = &tsnet.Server{
		Dir:        *dir,
		Store:      new(mem.Store),
		ControlURL: *controlURL,
		Hostname:   *hostname,
		Ephemeral:  true,
		Logf:       n.logf,
		UserLogf:   log.Printf,
	}
	defer n.server.Close()
	go n.reportRelays()
	if err := n.up(); err != nil {
		return err
	}
	return serve(os.Stdin, n.out, n.handle)
}

// steadyInterfaces is the host as the client sees it: one interface that never changes and has no default route.
//
// On loopback a STUN answer may come before the send has returned. The client then believes that it cannot send, rebinds,
// and closes its relay connection because that is not on the interface of the default route; and on a host that
// runs the cluster under test, interfaces come and go. Neither happens to a client in the field.
func steadyInterfaces() ([]netmon.Interface, error) {
	address := &net.IPNet{IP: net.IPv4(192, 0, 2, 1), Mask: net.CIDRMask(24, 32)}
	return []netmon.Interface{{
		Interface: &net.Interface{Index: 1, MTU: 1500, Name: "steady0", Flags: net.FlagUp | net.FlagRunning},
		AltAddrs:  []net.Addr{address},
	}}, nil
}

func (n *node) up() error {
	ctx, cancel := context.WithTimeout(context.Background(), 60*time.Second)
	defer cancel()
	status, err := n.server.Up(ctx)
	if err != nil {
		return err
	}
	if n.local, err = n.server.LocalClient(); err != nil {
		return err
	}
	ln, err := n.server.Listen("tcp", ":80")
	if err != nil {
		return err
	}
	go http.Serve(ln, http.HandlerFunc(echo))
	n.out.emit("up", event{"ip": status.TailscaleIPs[0].String(), "key": status.Self.PublicKey.String()})
	return nil
}

// echo answers with the request's body.
func echo(w http.ResponseWriter, r *http.Request) {
	body, err := io.ReadAll(r.Body) // all of it first: HTTP/1 is not full duplex here
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	w.Header().Set("Content-Type", "application/octet-stream")
	w.Write(body)
}

// connected is the line that magicsock logs when a relay has answered. There is no other signal of it.
var connected = regexp.MustCompile(`magicsock: derp-(\d+) connected; connGen=(\d+)`)

func (n *node) logf(format string, args ...any) {
	line := fmt.Sprintf(format, args...)
	log.Print(line)
	if m := connected.FindStringSubmatch(line); m != nil {
		region, _ := strconv.Atoi(m[1])
		generation, _ := strconv.Atoi(m[2])
		n.relays <- [2]int{region, generation}
	}
}

func (n *node) reportRelays() {
	for r := range n.relays {
		remotes, err := establishedRemotes()
		if err != nil {
			log.Printf("relays: %v", err)
		}
		n.out.emit("relay", event{"region": r[0], "generation": r[1], "remotes": remotes})
	}
}

func (n *node) handle(r *request) {
	switch r.Cmd {
	case "start_traffic":
		r.reply(nil, n.startTraffic(r))
	case "stop_traffic":
		n.stopTraffic(r)
	case "await_map":
		go func() { r.reply(nil, n.awaitMap(r)) }()
	case "await_peers":
		go func() { r.reply(nil, n.awaitPeers(r)) }()
	case "reconnect":
		go func() { r.reply(nil, n.local.DebugAction(context.Background(), "break-derp-conns")) }()
	case "status":
		go func() { r.reply(n.status()) }()
	default:
		r.reply(nil, fmt.Errorf("unknown command %q", r.Cmd))
	}
}

// awaitMap returns when the client uses the given DERP map.
func (n *node) awaitMap(r *request) error {
	var a struct {
		Map *tailcfg.DERPMap `json:"map"`
	}
	if err := r.decode(&a); err != nil {
		return err
	}
	return until(func(ctx context.Context) (bool, error) {
		now, err := n.local.CurrentDERPMap(ctx)
		return err == nil && reflect.DeepEqual(now.Regions, a.Map.Regions), err
	})
}

// awaitPeers returns when the client knows the home regions of so many peers. What it sends to a peer before is lost,
// and a lost handshake is repeated after five seconds.
func (n *node) awaitPeers(r *request) error {
	var a struct {
		Count int `json:"count"`
	}
	if err := r.decode(&a); err != nil {
		return err
	}
	return until(func(ctx context.Context) (bool, error) {
		status, err := n.local.Status(ctx)
		if err != nil {
			return false, err
		}
		known := 0
		for _, p := range status.Peer {
			if p.Relay != "" {
				known++
			}
		}
		return known == a.Count, nil
	})
}

// until asks the client again and again, for it tells nobody.
func until(holds func(context.Context) (bool, error)) error {
	ctx, cancel := context.WithTimeout(context.Background(), 60*time.Second)
	defer cancel()
	for {
		if ok, err := holds(ctx); ok || err != nil {
			return err
		}
		time.Sleep(5 * time.Millisecond)
	}
}

// status tells the home region, the TCP connections (among them the one to the relay), and how peers are reached:
// a peer with an address is reached without a relay.
func (n *node) status() (event, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	status, err := n.local.Status(ctx)
	if err != nil {
		return nil, err
	}
	remotes, err := establishedRemotes()
	peers := event{}
	for _, p := range status.Peer {
		peers[p.HostName] = event{"relay": p.Relay, "direct": p.CurAddr}
	}
	return event{"home": status.Self.Relay, "remotes": remotes, "peers": peers, "health": status.Health}, err
}
