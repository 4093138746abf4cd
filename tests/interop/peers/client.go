package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"log"
	"net"
	"strings"
	"sync"
	"time"

	"tailscale.com/derp"
	"tailscale.com/derp/derpconst"
	"tailscale.com/derp/derphttp"
	"tailscale.com/net/netmon"
	"tailscale.com/tailcfg"
	"tailscale.com/types/key"
)

// dialOptions says where a stock client connects, and as whom. Either URL or Map and Region are set.
type dialOptions struct {
	Client string `json:"client"` // the name of the client in later commands and in events

	URL     string           `json:"url"`
	DialTo  string           `json:"dial_to"` // host:port to connect to instead of the URL's
	CA      string           `json:"ca"`      // PEM; trusted besides the system's roots
	Map     *tailcfg.DERPMap `json:"map"`
	Region  int              `json:"region"`
	OnlyTo  string           `json:"node"` // restricts the region to the node of this name
	MaxTLS2 bool             `json:"tls12"`

	PrivateKey  key.NodePrivate `json:"private_key"`
	MeshKey     string          `json:"mesh_key"`
	Watch       bool            `json:"watch"` // subscribe to connection changes
	Prober      bool            `json:"prober"`
	CanAckPings bool            `json:"can_ack_pings"`
	Reconnect   bool            `json:"reconnect"` // dial again when the connection breaks, as tailscaled does
}

// client is one stock DERP client. Its commands run in order on a goroutine of its own.
type client struct {
	id        string
	derp      *derphttp.Client
	out       *output
	reconnect bool
	work      chan func()
	reading   sync.Mutex // held by the driver while the client must not read
}

func newClient(o dialOptions, out *output) (*client, error) {
	if o.PrivateKey.IsZero() {
		o.PrivateKey = key.NewNode()
	}
	dc, err := newDERP(o)
	if err != nil {
		return nil, err
	}
	if o.MeshKey != "" {
		if dc.MeshKey, err = key.ParseDERPMesh(o.MeshKey); err != nil {
			return nil, err
		}
	}
	dc.TLSConfig, err = tlsConfig(o)
	if err != nil {
		return nil, err
	}
	dc.WatchConnectionChanges = o.Watch
	dc.IsProber = o.Prober
	dc.SetCanAckPings(o.CanAckPings)
	cl := &client{id: o.Client, derp: dc, out: out, reconnect: o.Reconnect, work: make(chan func(), 1024)}
	go func() {
		for f := range cl.work {
			f()
		}
	}()
	return cl, nil
}

func newDERP(o dialOptions) (*derphttp.Client, error) {
	if o.URL == "" {
		region, err := regionOf(o)
		if err != nil {
			return nil, err
		}
		get := func() *tailcfg.DERPRegion { return region }
		return derphttp.NewRegionClient(o.PrivateKey, log.Printf, netmon.NewStatic(), get), nil
	}
	dc, err := derphttp.NewClient(o.PrivateKey, o.URL, log.Printf, netmon.NewStatic())
	if err == nil && o.DialTo != "" {
		dc.SetURLDialer(func(ctx context.Context, network, _ string) (net.Conn, error) {
			var d net.Dialer
			return d.DialContext(ctx, network, o.DialTo)
		})
	}
	return dc, err
}

func regionOf(o dialOptions) (*tailcfg.DERPRegion, error) {
	if o.Map == nil || o.Map.Regions[o.Region] == nil {
		return nil, errors.New("dial wants a url, or a map and one of its regions")
	}
	region := o.Map.Regions[o.Region]
	if o.OnlyTo == "" {
		return region, nil
	}
	for _, n := range region.Nodes {
		if n.Name == o.OnlyTo {
			only := *region
			only.Nodes = []*tailcfg.DERPNode{n}
			return &only, nil
		}
	}
	return nil, errors.New("the region has no node " + o.OnlyTo)
}

func tlsConfig(o dialOptions) (*tls.Config, error) {
	conf := new(tls.Config)
	if o.MaxTLS2 { // a stock client takes the fast start at TLS 1.3 only
		conf.MaxVersion = tls.VersionTLS12
	}
	if o.CA != "" {
		conf.RootCAs = x509.NewCertPool()
		if !conf.RootCAs.AppendCertsFromPEM([]byte(o.CA)) {
			return nil, errors.New("ca: no certificate in the PEM text")
		}
	}
	return conf, nil
}

func (cl *client) do(f func()) { cl.work <- f }

func (cl *client) close() error {
	if err := cl.derp.Close(); !errors.Is(err, derphttp.ErrClientClosed) {
		return err
	}
	return nil // it had ended before
}

// connect returns when the server has told its settings: from then on it routes packets to the client.
func (cl *client) connect() (event, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 15*time.Second)
	defer cancel()
	if err := cl.derp.Connect(ctx); err != nil {
		return nil, err
	}
	info := make(chan derp.ServerInfoMessage, 1)
	broken := make(chan error, 1)
	go cl.read(info, broken)
	select {
	case err := <-broken:
		return nil, err
	case i := <-info:
		return cl.connected(i), nil
	}
}

func (cl *client) connected(i derp.ServerInfoMessage) event {
	e := event{
		"public_key":       cl.derp.SelfPublicKey().String(),
		"server_key":       cl.derp.ServerPublicKey().String(),
		"bytes_per_second": i.TokenBucketBytesPerSecond,
		"burst_bytes":      i.TokenBucketBytesBurst,
	}
	if addr, err := cl.derp.LocalAddr(); err == nil {
		e["local"] = addr.String()
	}
	if state, ok := cl.derp.TLSConnectionState(); ok {
		e["tls"] = tls.VersionName(state.Version)
		e["fast_start"] = state.Version >= tls.VersionTLS13 && hasMetaCert(state)
		e["certificates"] = names(state)
	}
	return e
}

func hasMetaCert(state *tls.ConnectionState) bool {
	for _, c := range state.PeerCertificates {
		if strings.HasPrefix(c.Subject.CommonName, derpconst.MetaCertCommonNamePrefix) {
			return true
		}
	}
	return false
}

func names(state *tls.ConnectionState) (names []string) {
	for _, c := range state.PeerCertificates {
		names = append(names, c.Subject.CommonName)
	}
	return names
}

// read turns what the server sends into events, until the connection ends. The first server info and an earlier
// failure go to the channels instead: they answer the dial command.
func (cl *client) read(info chan<- derp.ServerInfoMessage, broken chan<- error) {
	generation := 0
	for {
		cl.reading.Lock()
		cl.reading.Unlock()
		m, gen, err := cl.derp.RecvDetail()
		switch {
		case err != nil && generation == 0:
			broken <- err
			return
		case err != nil:
			cl.emit("disconnected", event{"error": err.Error()})
			if !cl.reconnect || errors.Is(err, derphttp.ErrClientClosed) {
				cl.derp.Close() // else a later send would quietly connect again
				return
			}
			time.Sleep(20 * time.Millisecond)
			continue
		}
		if i, ok := m.(derp.ServerInfoMessage); ok {
			generation = gen
			if gen == 1 {
				info <- i
			} else {
				cl.emit("reconnected", cl.connected(i))
			}
			continue
		}
		cl.message(m)
	}
}

func (cl *client) emit(name string, e event) {
	e["client"] = cl.id
	cl.out.emit(name, e)
}

func (cl *client) message(m derp.ReceivedMessage) {
	switch m := m.(type) {
	case derp.ReceivedPacket:
		cl.emit("recv", event{"src": m.Source.String(), "payload": m.Data})
	case derp.PeerGoneMessage:
		cl.emit("peer_gone", event{"key": m.Peer.String(), "reason": int(m.Reason)})
	case derp.PeerPresentMessage:
		cl.emit("peer_present", event{"key": m.Key.String(), "addr": m.IPPort.String(), "flags": int(m.Flags)})
	case derp.PingMessage:
		cl.derp.SendPong(m)
		cl.emit("ping", event{})
	case derp.PongMessage:
		cl.emit("pong", event{})
	case derp.KeepAliveMessage:
		cl.emit("keep_alive", event{})
	case derp.HealthMessage:
		cl.emit("health", event{"problem": m.Problem})
	case derp.ServerRestartingMessage:
		cl.emit("restarting", event{"reconnect_in_ms": m.ReconnectIn.Milliseconds(), "try_for_ms": m.TryFor.Milliseconds()})
	}
}
