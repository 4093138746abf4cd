"""What is measured. A scenario is a few lines: open clients, make a load, yield figures.

To add one: write a frozen dataclass with `name` and `measure`, and put instances of it into `quick` or `full`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

from bench.generator import Flow, Generator, Paced, PingPong, Result, Shape
from bench.relays import Relay
from bench.search import Lattice, Search

TOLERATED_LOSS = 0.01
HOPELESS_LOSS = 0.05
LEAST_OFFERED = 0.9
SATURATED = 0.9
BUSY = 0.95
CLIENTS_BEFORE = 20


@dataclass(frozen=True)
class Figure:
    """One measured number. `better` is "more", "less", or empty for a number that only explains others."""

    name: str
    value: float
    unit: str
    better: str = ""
    note: str = ""


@dataclass(frozen=True)
class Effort:
    """How long is measured: seconds per window, before a window, and for memory to settle; the lattice of rates."""

    window: float
    warm_up: float
    settle: float
    lattice: Lattice


@dataclass
class Rig:
    """One relay in one round, and the means to load it."""

    relay: Relay
    generators: Callable[[], AbstractContextManager[Generator]]
    fresh_relays: Callable[[], AbstractContextManager[Relay]]
    effort: Effort
    hints: dict[str, int]
    """Where the search of an earlier round ended, by scenario."""


class Scenario(Protocol):
    """Something to measure on one relay at a time."""

    @property
    def name(self) -> str:
        """Short, unique, the same for every relay."""

    def measure(self, rig: Rig) -> Iterator[Figure]:
        """Runs once and yields its figures."""


def pairs(count: int) -> list[Flow]:
    """Client i sends to client count + i."""
    return [(i, count + i) for i in range(count)]


@dataclass(frozen=True)
class Run:
    """A result, the rate that was asked for (packets/s, 0 in a closed loop) and the relay's CPU seconds."""

    result: Result
    wanted: float
    relay_seconds: float
    elapsed: float

    @property
    def relay_share(self) -> float:
        """The relay's share of its core."""
        return self.relay_seconds / self.elapsed

    @property
    def microseconds_per_packet(self) -> float:
        """CPU time of the relay for each delivered packet."""
        return 1e6 * self.relay_seconds / self.result.delivered_total if self.result.delivered_total else float("nan")

    @property
    def offered(self) -> bool:
        """Whether the generator kept its schedule, whatever became of the packets."""
        return self.result.offered >= LEAST_OFFERED * self.wanted * self.result.seconds

    @property
    def loss_free(self) -> bool:
        """Everything that was meant to be offered was, and arrived in time."""
        return self.offered and self.result.loss <= TOLERATED_LOSS


def run(rig: Rig, generator: Generator, *loads: Paced | PingPong) -> Run:
    """One window of load on the rig's relay."""
    effort, cpu = rig.effort, rig.relay.cpu_seconds()
    result = generator.run(*loads, seconds=effort.window, warm_up=effort.warm_up)
    wanted = sum(load.rate for load in loads if isinstance(load, Paced))
    return Run(result, wanted, rig.relay.cpu_seconds() - cpu, effort.window + effort.warm_up)


@dataclass(frozen=True)
class Ceiling:
    """The highest rate with at most 1 % loss; then, if asked for, what is delivered at three times that rate."""

    size: int
    pairs: int
    shape: Shape
    overload: bool = False

    @property
    def name(self) -> str:
        """For example `1300 B, 10 pairs, 1x8`."""
        return f"{self.size} B, {self.pairs} pair{'s' * (self.pairs > 1)}, {self.shape}"

    def measure(self, rig: Rig) -> Iterator[Figure]:
        """The ceiling, CPU and latency at it, and the behaviour above it."""
        with rig.generators() as generator:
            generator.open(rig.relay, 2 * self.pairs)
            yield from self._search(rig, generator)

    def _search(self, rig: Rig, generator: Generator) -> Iterator[Figure]:
        lattice = rig.effort.lattice
        search = Search(
            attempt=lambda k: self._at(rig, generator, lattice.rate(k)),
            passes=lambda tried: tried.loss_free,
            hopeless=lambda tried: tried.result.loss > HOPELESS_LOSS or not tried.offered,
        )
        found = search.highest(lattice.top, rig.hints.get(self.name, lattice.top // 3))
        if found.best is None or found.passed is None:
            yield Figure("loss-free ceiling", 0, "kpps", "more", f"loses packets at {lattice.base:.0f}/s")
            return
        rig.hints[self.name] = found.best
        ceiling = found.passed
        rate = ceiling.result.delivered_rate
        yield Figure("loss-free ceiling", rate / 1e3, "kpps", "more", _limit(found.failed))
        yield Figure("generator busy at the ceiling", 100 * ceiling.result.busy, "%")
        yield Figure("CPU per packet at the ceiling", ceiling.microseconds_per_packet, "us", "less")
        yield Figure("p99 latency at the ceiling", ceiling.result.latency.p99, "us", "less")
        if self.overload:
            yield from self._overload(rig, generator, rate)

    def _overload(self, rig: Rig, generator: Generator, ceiling: float) -> Iterator[Figure]:
        over = self._at(rig, generator, 3 * ceiling).result
        note = "" if over.offered / over.seconds > 2.5 * ceiling else "generator-bound: less than 2.5x was offered"
        yield Figure("delivered at 3x, of the ceiling", over.delivered_rate / ceiling, "", "more", note)
        yield Figure("p99 latency at 3x", over.latency.p99, "us", "less", note)
        yield Figure("slowest pair to mean at 3x", over.slowest_to_mean, "", "more", note)

    def _at(self, rig: Rig, generator: Generator, rate: float) -> Run:
        return run(rig, generator, Paced(pairs(self.pairs), self.shape, self.size, rate))


@dataclass(frozen=True)
class FixedRate:
    """CPU time and latency at a rate that every relay carries."""

    size: int
    pairs: int
    shape: Shape
    rate: float

    @property
    def name(self) -> str:
        """For example `1300 B, 10 pairs, 1x1 at 10 kpps`."""
        return f"{self.size} B, {self.pairs} pairs, {self.shape} at {self.rate / 1e3:.0f} kpps"

    def measure(self, rig: Rig) -> Iterator[Figure]:
        """CPU per packet, latency, loss."""
        with rig.generators() as generator:
            generator.open(rig.relay, 2 * self.pairs)
            done = run(rig, generator, Paced(pairs(self.pairs), self.shape, self.size, self.rate))
        note = "" if done.loss_free else f"{done.result.loss:.1%} lost"
        yield Figure("CPU per packet", done.microseconds_per_packet, "us", "less", note)
        yield Figure("p50 latency", done.result.latency.p50, "us", "less", note)
        yield Figure("p99 latency", done.result.latency.p99, "us", "less", note)


@dataclass(frozen=True)
class RoundTrips:
    """Ping-pong: the time there and back through the relay, one packet under way per pair."""

    pairs: int
    size: int = 100

    @property
    def name(self) -> str:
        """For example `ping-pong, 64 pairs`."""
        return f"ping-pong, {self.pairs} pair{'s' * (self.pairs > 1)}"

    def measure(self, rig: Rig) -> Iterator[Figure]:
        """Median and tail of the round trip."""
        with rig.generators() as generator:
            generator.open(rig.relay, 2 * self.pairs)
            rtt = run(rig, generator, PingPong(pairs(self.pairs), self.size)).result.rtt
        yield Figure("p50 round trip", rtt.p50, "us", "less")
        yield Figure("p99 round trip", rtt.p99, "us", "less")


@dataclass(frozen=True)
class Idle:
    """Many clients that log in and then say nothing, on a relay that was started for them."""

    clients: int

    @property
    def name(self) -> str:
        """For example `1000 idle clients`."""
        return f"{self.clients} idle clients"

    def measure(self, rig: Rig) -> Iterator[Figure]:
        """Start-up, connects per second, CPU per connect, memory per client."""
        with rig.fresh_relays() as relay, rig.generators() as generator:
            generator.open(relay, CLIENTS_BEFORE)  # what the first clients cost once is not a cost per client
            time.sleep(rig.effort.settle)
            memory, cpu = relay.resident_bytes(), relay.cpu_seconds()
            seconds = generator.open(relay, self.clients)
            cpu = relay.cpu_seconds() - cpu
            time.sleep(rig.effort.settle)
            memory = relay.resident_bytes() - memory
        yield Figure("start until the port accepts", relay.start_seconds * 1e3, "ms", "less")
        yield Figure("connects per second", self.clients / seconds, "/s", "more")
        yield Figure("CPU per connect", cpu / self.clients * 1e6, "us", "less")
        yield Figure("memory per client", memory / self.clients / 1024, "KiB", "less")


QUICK_EFFORT = Effort(window=0.3, warm_up=0.1, settle=1.0, lattice=Lattice(base=10e3, step=1.06, limit=2e6))
FULL_EFFORT = Effort(window=1.0, warm_up=0.3, settle=5.0, lattice=Lattice(base=10e3, step=1.03, limit=3e6))

SINGLE, BURSTS, BATCHED = Shape(1, 1), Shape(1, 8), Shape(16, 1)


def quick() -> Sequence[Scenario]:
    """Two minutes: enough to see whether a change helped."""
    return [
        Idle(1000),
        Ceiling(1300, 10, SINGLE, overload=True),
        Ceiling(1300, 10, BURSTS),
        Ceiling(100, 10, BURSTS),
        FixedRate(1300, 10, SINGLE, 10e3),
        RoundTrips(1),
        RoundTrips(64),
    ]


def full() -> Sequence[Scenario]:
    """Everything: about twenty minutes."""
    return [
        Idle(5000),
        *(
            Ceiling(size, count, shape, overload=count == 10)
            for size in (1300, 100)
            for count in (1, 10)
            for shape in (SINGLE, BURSTS, BATCHED)
        ),
        FixedRate(1300, 10, SINGLE, 10e3),
        FixedRate(1300, 10, SINGLE, 50e3),
        RoundTrips(1),
        RoundTrips(64),
    ]


def _limit(failed: Run | None) -> str:
    """What stopped the search: nothing to say when it was the relay."""
    if failed is None:
        return "the highest rate tried"
    if failed.relay_share < SATURATED and failed.result.busy >= BUSY:
        return "generator-bound"
    return "" if failed.offered else "disturbed: others used the generator's core"
