package main

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"sync"
)

// event is one line of output. Its "event" member says what happened. The answer to a command is the event
// "reply": it repeats the command's "seq", and has an "error" if the command failed.
type event map[string]any

// output writes events as whole lines, from any goroutine.
type output struct {
	mu  sync.Mutex
	enc *json.Encoder
}

func newOutput(w io.Writer) *output { return &output{enc: json.NewEncoder(w)} }

func (o *output) emit(name string, e event) {
	if e == nil {
		e = event{}
	}
	e["event"] = name
	o.mu.Lock()
	defer o.mu.Unlock()
	o.enc.Encode(e) // a broken stdout means that the driver is gone: stdin ends, too
}

// request is one command with a way to answer it.
type request struct {
	Cmd string `json:"cmd"`
	Seq int    `json:"seq"`

	line []byte
	out  *output
}

// decode reads the command's own members into v.
func (r *request) decode(v any) error { return json.Unmarshal(r.line, v) }

// reply answers the command; a nil answer is an empty one.
func (r *request) reply(answer event, err error) {
	if answer == nil {
		answer = event{}
	}
	answer["seq"] = r.Seq
	if err != nil {
		answer["error"] = err.Error()
	}
	r.out.emit("reply", answer)
}

// serve hands every command on in to handle, in order, until in ends. Handlers must not block: what waits for the
// network belongs into a goroutine that replies later.
func serve(in io.Reader, out *output, handle func(*request)) error {
	lines := bufio.NewReaderSize(in, 1<<20)
	for {
		line, err := lines.ReadBytes('\n')
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		r := &request{line: line, out: out}
		if err := json.Unmarshal(line, r); err != nil {
			return fmt.Errorf("command %q: %w", line, err)
		}
		handle(r)
	}
}
