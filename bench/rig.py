"""What every scenario works with: a relay under test, the means to load it, and one measured window."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import Protocol

from bench import machine
from bench.figures import CEILING, DISTURBED, GENERATOR_BOUND, Row
from bench.generator import Flow, Generator, Paced, PingPong, Result, Shape
from bench.relays import Relay
from bench.search import Lattice

TOLERATED_LOSS = 0.01
LEAST_OFFERED = 0.9
BUSY = 0.95
HALF_LOAD = 50e3
"""Packets per second, for a part of a ceiling that is not known."""
CALM = 0.01
CALM_TRIES = 4
NOISY = 0.03
"""Twice what the threads of stock derper wait for each other."""


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
    """How long is measured, in seconds, and on which rates.

    `window` and `warm_up` are for each attempt of a search, `long` for a window that is measured once, `settle` for
    memory to settle.
    """

    window: float
    warm_up: float
    long: float
    settle: float
    lattice: Lattice


class Known:
    """What earlier scenarios and rounds found: the last value of each figure, by relay and scenario."""

    def __init__(self, rows: Iterable[Row] = ()) -> None:
        self._values: dict[tuple[str, str, str], float] = {}
        self.learn(rows)

    def learn(self, rows: Iterable[Row]) -> None:
        """Takes in rows, later ones last."""
        for row in rows:
            key = (row.side, row.scenario, row.figure)
            self._values.pop(key, None)
            self._values[key] = row.value

    def value(self, side: str, scenario: str, figure: str) -> float | None:
        """The last value; None if there is none."""
        return self._values.get((side, scenario, figure))

    def latest(self, side: str, figure: str) -> float | None:
        """The value that was learnt last, whatever the scenario; None if there is none."""
        found = [value for (of, _, name), value in self._values.items() if (of, name) == (side, figure)]
        return found[-1] if found else None


class Relays(Protocol):
    """Starts relays for one scenario."""

    def fresh(self, *, workers: int = 1, cores: Sequence[int] = (), files: int = 0) -> AbstractContextManager[Relay]:
        """One relay, or on more cores one with so many workers, which may open so many files. Raises SkipError."""

    def meshed(self) -> AbstractContextManager[Sequence[Relay]]:
        """Two relays of one region, both on the relays' core. Raises SkipError."""


@dataclass
class Rig:
    """One relay in one round, and the means to load it. `baseline` is the side that the others are compared with."""

    side: str
    baseline: str
    relay: Relay
    relays: Relays
    generators: Callable[[], AbstractContextManager[Generator]]
    cores: Sequence[int]
    effort: Effort
    known: Known

    def ceiling(self, load: Load) -> float | None:
        """The last loss-free ceiling of this relay under a load, packets per second; None before."""
        return _packets(self.known.value(self.side, str(load), CEILING))

    def baselines_ceiling(self, load: Load) -> float | None:
        """The same of the baseline."""
        return _packets(self.known.value(self.baseline, str(load), CEILING))


def _packets(kilo: float | None) -> float | None:
    return None if kilo is None else kilo * 1e3


class Scenario(ABC):
    """Something to measure on one relay at a time."""

    once = False
    """Whether one round is enough."""

    @property
    @abstractmethod
    def name(self) -> str:
        """Short, unique, the same for every relay."""

    @abstractmethod
    def measure(self, rig: Rig) -> Iterator[Figure]:
        """Runs once and yields its figures. Raises SkipError."""


@dataclass(frozen=True)
class Flows:
    """Who sends to whom. The first `senders` clients send; in a mesh they are on one relay, the others on another."""

    name: str
    senders: int
    receivers: int
    flows: Sequence[Flow]


def pairs(count: int) -> list[Flow]:
    """Client i sends to client count + i."""
    return [(i, count + i) for i in range(count)]


def paired(count: int) -> Flows:
    """So many pairs."""
    return Flows(f"{count} pair{'s' * (count > 1)}", count, count, pairs(count))


def fan_in(count: int) -> Flows:
    """Many to one."""
    return Flows(f"{count} to 1", count, 1, [(i, count) for i in range(count)])


def fan_out(count: int) -> Flows:
    """One to many."""
    return Flows(f"1 to {count}", 1, count, [(0, 1 + i) for i in range(count)])


@dataclass(frozen=True)
class Load:
    """Packets of so many bytes on all flows, written in one shape. As text, for example `1300 B, 10 pairs, 1x8`."""

    size: int
    flows: Flows
    shape: Shape

    def __str__(self) -> str:
        return f"{self.size} B, {self.flows.name}, {self.shape}"

    @property
    def clients(self) -> int:
        """How many take part."""
        return self.flows.senders + self.flows.receivers

    def at(self, rate: float) -> Paced:
        """The load at so many packets per second."""
        return Paced(self.flows.flows, self.shape, self.size, rate)


@dataclass(frozen=True)
class Field:
    """Clients that are logged in, and the relays between them."""

    generator: Generator
    relays: Sequence[Relay]
    effort: Effort

    def run(self, *loads: Paced | PingPong, seconds: float | None = None) -> Run:
        """One window of load, the long one unless told otherwise."""
        cpu = self._cpu_seconds()
        result = self.generator.run(*loads, seconds=seconds or self.effort.long, warm_up=self.effort.warm_up)
        wanted = sum(load.rate for load in loads if isinstance(load, Paced))
        return Run(result, wanted, self._cpu_seconds() - cpu)

    def run_calmly(self, *loads: Paced | PingPong) -> Run:
        """The long window, up to `CALM_TRIES` times; the one counts in which others disturbed it least.

        One per cent of a second is ten milliseconds, and one other process that gets the relay's or the generator's
        core for a tick takes four of them: a p99 would tell of the machine. How long the two were kept waiting is what
        the kernel says, whatever the outcome was; threads of one relay that wait for each other count the same in all.
        """
        tried = []
        for _ in range(CALM_TRIES):
            before = self._waiting_seconds()
            run = self.run(*loads)
            tried.append(replace(run, waited=(self._waiting_seconds() - before) / self.effort.long))
            if tried[-1].waited < CALM:
                break
        return min(tried, key=lambda run: run.waited)

    def _cpu_seconds(self) -> float:
        return sum(relay.cpu_seconds() for relay in self.relays)

    def _waiting_seconds(self) -> float:
        return sum(machine.waiting_seconds(pid) for pid in (self.generator.pid, *(relay.pid for relay in self.relays)))


@contextmanager
def on_one_relay(rig: Rig, clients: int, *, relay: Relay | None = None) -> Iterator[Field]:
    """Clients of the rig's relay, or of another one."""
    relay = relay or rig.relay
    with rig.generators() as generator:
        generator.open(relay, clients)
        yield Field(generator, [relay], rig.effort)


@dataclass(frozen=True)
class Run:
    """A result, the rate that was asked for (packets/s, 0 in a closed loop) and the relays' CPU seconds.

    `waited` is the share of the window in which relay or generator waited for a core, where that was looked at.
    """

    result: Result
    wanted: float
    relay_seconds: float
    waited: float = 0.0

    @property
    def microseconds_per_packet(self) -> float:
        """CPU time of the relays for each delivered packet."""
        return 1e6 * self.relay_seconds / self.result.delivered_total if self.result.delivered_total else float("nan")

    @property
    def offered(self) -> bool:
        """Whether the generator kept its schedule, whatever became of the packets."""
        return self.result.offered >= LEAST_OFFERED * self.wanted * self.result.seconds

    @property
    def loss_free(self) -> bool:
        """Everything that was meant to be offered was, and arrived in time."""
        return self.offered and self.result.loss <= TOLERATED_LOSS

    @property
    def note(self) -> str:
        """What to know of its latencies: that packets were lost, or that others had the cores for too long."""
        lost = "" if self.loss_free else self.limit or f"{self.result.loss:.1%} lost"
        return ", ".join(filter(None, (lost, DISTURBED if self.waited > NOISY else "")))

    @property
    def limit(self) -> str:
        """Why this run was no success; nothing to say when it was the relay."""
        if self.offered or self.result.loss > TOLERATED_LOSS:
            return ""
        return GENERATOR_BOUND if self.result.busy >= BUSY else DISTURBED
