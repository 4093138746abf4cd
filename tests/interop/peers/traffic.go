package main

import (
	"bytes"
	"context"
	"crypto/rand"
	"fmt"
	"io"
	"net/http"
	"slices"
	"time"
)

// trafficOptions describe a stream of HTTP requests through the tunnel, one after the other.
type trafficOptions struct {
	ID         string  `json:"id"`
	URL        string  `json:"url"`
	Size       int     `json:"size"`        // bytes in each request, and in its answer
	IntervalMS float64 `json:"interval_ms"` // between the starts of two requests, if the first is done by then
	TimeoutMS  int     `json:"timeout_ms"`  // per request
	Count      int     `json:"count"`       // 0: until stopped
	NewConn    bool    `json:"new_conn"`    // a TCP connection per request instead of one for all
}

type traffic struct {
	trafficOptions
	node   *node
	client *http.Client
	stop   chan struct{}
	done   chan struct{}

	ok, failed  int
	latencies   []float64
	lastOK      time.Time
	longest     time.Duration // without a good answer
	firstErrors []string
}

func (n *node) startTraffic(r *request) error {
	t := &traffic{node: n, stop: make(chan struct{}), done: make(chan struct{})}
	if err := r.decode(&t.trafficOptions); err != nil {
		return err
	}
	transport := &http.Transport{DialContext: n.server.Dial, DisableKeepAlives: t.NewConn}
	t.client = &http.Client{Transport: transport, Timeout: time.Duration(t.TimeoutMS) * time.Millisecond}
	n.traffic[t.ID] = t
	go t.run()
	return nil
}

// stopTraffic ends a stream and sums it up; a stream with a count ends by itself, and is waited for.
func (n *node) stopTraffic(r *request) {
	var a struct {
		ID string `json:"id"`
	}
	if err := r.decode(&a); err != nil {
		r.reply(nil, err)
		return
	}
	t := n.traffic[a.ID]
	if t == nil {
		r.reply(nil, fmt.Errorf("no traffic %q", a.ID))
		return
	}
	delete(n.traffic, a.ID)
	if t.Count == 0 {
		close(t.stop)
	}
	go func() {
		<-t.done
		r.reply(t.summary(), nil)
	}()
}

func (t *traffic) run() {
	defer close(t.done)
	defer t.client.CloseIdleConnections()
	t.lastOK = time.Now()
	for i := 0; t.Count == 0 || i < t.Count; i++ {
		start := time.Now()
		err := t.request()
		t.record(i, start, err)
		rest := time.Duration(t.IntervalMS*float64(time.Millisecond)) - time.Since(start)
		select {
		case <-t.stop:
			t.noteStall(time.Now())
			return
		case <-time.After(rest):
		}
	}
}

func (t *traffic) request() error {
	body := make([]byte, t.Size)
	rand.Read(body)
	req, err := http.NewRequestWithContext(context.Background(), "POST", t.URL, bytes.NewReader(body))
	if err != nil {
		return err
	}
	res, err := t.client.Do(req)
	if err != nil {
		return err
	}
	defer res.Body.Close()
	answer, err := io.ReadAll(res.Body)
	if err != nil {
		return err
	}
	if res.StatusCode != http.StatusOK || !bytes.Equal(answer, body) {
		return fmt.Errorf("status %d, and %d bytes that are not those sent", res.StatusCode, len(answer))
	}
	return nil
}

func (t *traffic) record(i int, start time.Time, err error) {
	now := time.Now()
	e := event{"traffic": t.ID, "n": i, "ok": err == nil, "ms": milliseconds(now.Sub(start))}
	if err != nil {
		t.failed++
		e["error"] = err.Error()
		if len(t.firstErrors) < 5 {
			t.firstErrors = append(t.firstErrors, err.Error())
		}
	} else {
		t.ok++
		t.latencies = append(t.latencies, milliseconds(now.Sub(start)))
		t.noteStall(now)
		t.lastOK = now
	}
	t.node.out.emit("request", e)
}

func (t *traffic) noteStall(now time.Time) { t.longest = max(t.longest, now.Sub(t.lastOK)) }

func (t *traffic) summary() event {
	e := event{"ok": t.ok, "failed": t.failed, "longest_stall_ms": milliseconds(t.longest), "errors": t.firstErrors}
	if len(t.latencies) > 0 {
		slices.Sort(t.latencies)
		e["median_ms"] = t.latencies[len(t.latencies)/2]
		e["max_ms"] = t.latencies[len(t.latencies)-1]
	}
	return e
}
