package main

import (
	"context"
	"errors"
	"log"
	"net"
	"os"
	"sync"
	"time"

	"tailscale.com/net/netcheck"
	"tailscale.com/net/netmon"
	"tailscale.com/net/stun"
	"tailscale.com/tailcfg"
)

// prober runs the checks that clients run before they choose a relay.
type prober struct {
	mu sync.Mutex // netcheck reports must not overlap
}

func newProber() *prober { return &prober{} }

// stun sends one binding request with the stock codec. No answer within the time-out is an answer, too: a relay that
// would not serve must be silent.
func (p *prober) stun(r *request) {
	var a struct {
		Addr      string `json:"addr"`
		TimeoutMS int    `json:"timeout_ms"`
	}
	if err := r.decode(&a); err != nil {
		r.reply(nil, err)
		return
	}
	conn, err := net.Dial("udp", a.Addr)
	if err != nil {
		r.reply(nil, err)
		return
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(time.Duration(max(a.TimeoutMS, 1)) * time.Millisecond))
	id := stun.NewTxID()
	start := time.Now()
	if _, err := conn.Write(stun.Request(id)); err != nil {
		r.reply(nil, err)
		return
	}
	buf := make([]byte, 1500)
	n, err := conn.Read(buf)
	switch {
	case errors.Is(err, os.ErrDeadlineExceeded):
		r.reply(event{"answered": false}, nil)
		return
	case err != nil: // an ICMP error: nobody listens there
		r.reply(event{"answered": false, "refused": err.Error()}, nil)
		return
	}
	rtt := time.Since(start)
	gotID, mapped, err := stun.ParseResponse(buf[:n])
	if err == nil && gotID != id {
		err = errors.New("the answer has another transaction id")
	}
	r.reply(event{
		"answered": true,
		"mapped":   mapped.String(),
		"local":    conn.LocalAddr().String(),
		"ms":       milliseconds(rtt),
	}, err)
}

// netcheck makes the report from which a client chooses its home region.
func (p *prober) netcheck(r *request) {
	var a struct {
		Map *tailcfg.DERPMap `json:"map"`
	}
	if err := r.decode(&a); err != nil {
		r.reply(nil, err)
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	c := &netcheck.Client{NetMon: netmon.NewStatic(), Logf: log.Printf}
	if err := c.Standalone(ctx, ":0"); err != nil {
		r.reply(nil, err)
		return
	}
	report, err := c.GetReport(ctx, a.Map, nil)
	if err != nil {
		r.reply(nil, err)
		return
	}
	latency := map[int]float64{}
	for region, d := range report.RegionLatency {
		latency[region] = milliseconds(d)
	}
	r.reply(event{"udp": report.UDP, "preferred": report.PreferredDERP, "latency_ms": latency}, nil)
}
