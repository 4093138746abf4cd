"""The load generator of bench/loadgen: built once into the cache, driven over its standard input and output."""

from __future__ import annotations

import json
import secrets
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nacl.bindings import crypto_box
from nacl.public import PrivateKey

from bench.compiler import compiled
from bench.errors import BenchError
from bench.processes import pinned
from bench.relays import Relay

SOURCES = Path(__file__).parent / "loadgen"
OPEN_LIMIT = 120.0
CLIENT_INFO = json.dumps({"version": 2, "CanAckPings": True}).encode()

Flow = tuple[int, int]
"""Sender and receiver, as indices of clients in the order in which they were opened."""


@dataclass(frozen=True)
class Shape:
    """How a burst is written: frames per write, so per TLS record, and writes per burst. Stock clients do 1 x n."""

    frames: int
    records: int

    def __str__(self) -> str:
        return f"{self.frames}x{self.records}"


@dataclass(frozen=True)
class Paced:
    """An open loop: `rate` packets of `size` bytes per second in all, spread evenly over the flows."""

    flows: Sequence[Flow]
    shape: Shape
    size: int
    rate: float


@dataclass(frozen=True)
class PingPong:
    """A closed loop: each flow has one packet of `size` bytes under way, echoed by its receiver."""

    flows: Sequence[Flow]
    size: int


@dataclass(frozen=True)
class Times:
    """A distribution, in microseconds."""

    count: int
    p50: float
    p99: float
    p999: float
    max: float


@dataclass(frozen=True)
class Result:
    """What one run offered and what arrived, within its window unless a name says total. Times in microseconds.

    `blocked` packets were due while their sender's socket was full and were dropped there; they count as offered.
    `busy` is the generator's own share of its core. `unread` is at most what a packet waited for the generator to look,
    which is a part of its latency.
    """

    seconds: float
    busy: float
    offered: int
    blocked: int
    delivered: int
    sent_total: int
    delivered_total: int
    unexpected: int
    closed: int
    slowest_to_mean: float
    latency: Times
    unread: Times
    rtt: Times

    @property
    def loss(self) -> float:
        """The share of the offered packets that did not arrive in the same time. A growing backlog counts as lost."""
        return max(0.0, 1 - self.delivered / self.offered) if self.offered else 0.0

    @property
    def delivered_rate(self) -> float:
        """Packets per second."""
        return self.delivered / self.seconds


class Generator:
    """Clients of running relays, and what they send each other. Made by `generating`."""

    def __init__(self, process: subprocess.Popen[bytes], folder: Path) -> None:
        self._process = process
        self._folder = folder
        self._errors = folder / "stderr"

    @property
    def pid(self) -> int:
        """The process that makes the load."""
        return self._process.pid

    def open(self, relay: Relay, count: int, *, parallel: int = 32, source: str = "127.0.0.1") -> float:
        """Connects and logs in more clients, numbered on from the last; returns the seconds that it took.

        An address of the loopback, `source`, has ports for some 28,000 connections to a relay. Raises BenchError unless
        all of them are logged in.
        """
        logins = self._folder / "logins"
        logins.write_text("".join(_logins(relay.public_key, count)))
        answer = self._ask(f"open {relay.port} {source} {count} {parallel} {OPEN_LIMIT} {logins}")
        if failed := answer["failed"]:
            raise BenchError(f"{failed} of {count} clients could not log in to the relay on port {relay.port}")
        return float(answer["seconds"])

    def run(self, *loads: Paced | PingPong, seconds: float, warm_up: float, quiet: float = 0.05) -> Result:
        """Makes the loads at once, then waits for packets under way until none came for `quiet` seconds.

        Raises BenchError if a packet arrives changed, at a wrong client or out of order.
        """
        answer = self._ask(*map(_declaration, loads), f"run {warm_up} {seconds} {quiet}")
        for fault in ("corrupt", "misrouted", "reordered"):
            if count := answer[fault]:
                raise BenchError(f"the relay is broken: {count} packets arrived {fault}; its speed means nothing")
        return _result(answer)

    def _ask(self, *lines: str) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write("".join(f"{line}\n" for line in lines).encode())
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
        except BrokenPipeError:
            answer = b""
        if not answer:
            words = self._errors.read_text(errors="replace").strip()
            raise BenchError(f"the load generator ended: {words or 'it said nothing'}")
        parsed: dict[str, Any] = json.loads(answer)
        return parsed


@contextmanager
def generating(binary: Path, *, core: int) -> Iterator[Generator]:
    """A load generator on its core, without clients yet; they disconnect when the block ends."""
    with tempfile.TemporaryDirectory(prefix="derp-bench-") as folder, Path(folder, "stderr").open("wb") as errors:
        pipe = subprocess.PIPE
        with pinned([str(binary)], cores=[core], stdin=pipe, stdout=pipe, stderr=errors) as process:
            yield Generator(process, Path(folder))


def build(step: Callable[[str], None]) -> Path:
    """The compiled generator. Raises BenchError without gcc or OpenSSL's headers."""
    return compiled(SOURCES, step)


def _logins(server_key: bytes, count: int) -> Iterable[str]:
    for _ in range(count):
        key = PrivateKey.generate()
        nonce = secrets.token_bytes(24)
        body = bytes(key.public_key) + nonce + crypto_box(CLIENT_INFO, nonce, server_key, bytes(key))
        frame = b"\x02" + len(body).to_bytes(4, "big") + body
        yield f"{server_key.hex()} {bytes(key.public_key).hex()} {frame.hex()}\n"


def _declaration(load: Paced | PingPong) -> str:
    flows = " ".join(f"{sender}:{receiver}" for sender, receiver in load.flows)
    if isinstance(load, PingPong):
        return f"ping {load.size} {flows}"
    return f"pace {load.shape.frames} {load.shape.records} {load.size} {load.rate:.3f} {flows}"


def _result(answer: dict[str, Any]) -> Result:
    def times(name: str) -> Times:
        found = answer[name]
        return Times(found["count"], found["p50"], found["p99"], found["p99.9"], found["max"])

    plain = {name: answer[name] for name in Result.__dataclass_fields__ if name not in ("latency", "unread", "rtt")}
    return Result(**plain, latency=times("latency"), unread=times("unread"), rtt=times("rtt"))
