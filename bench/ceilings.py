"""The highest rates: loss-free, above, and a little below."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Final

from bench.errors import BenchError
from bench.figures import CEILING, GENERATOR_BOUND, OFFERED_AT_3X
from bench.rig import Field, Figure, Load, Rig, Run, Scenario, on_one_relay
from bench.search import Search

EDGE: Final = "searched up to"
HOPELESS_LOSS = 0.05
MESH_LIMIT = 10.0


@dataclass(frozen=True)
class Ceiling(Scenario):
    """The highest rate with at most 1 % loss. `beyond` adds the latency below it and what happens above."""

    load: Load
    beyond: bool = False

    @property
    def name(self) -> str:
        """For example `1300 B, 10 pairs, 1x8`."""
        return str(self.load)

    def measure(self, rig: Rig) -> Iterator[Figure]:
        """The ceiling, CPU and latency at it, and what else is asked for."""
        with self._field(rig) as field:
            yield from self._search(rig, field)

    def _field(self, rig: Rig) -> AbstractContextManager[Field]:
        return on_one_relay(rig, self.load.clients)

    def _search(self, rig: Rig, field: Field) -> Iterator[Figure]:
        lattice = rig.effort.lattice
        search = Search(
            attempt=lambda k: field.run(self.load.at(lattice.rate(k)), seconds=rig.effort.window),
            passes=lambda tried: tried.loss_free,
            hopeless=lambda tried: tried.result.loss > HOPELESS_LOSS or not tried.offered,
        )
        found = search.highest(lattice.top, self._start(rig))
        yield Figure(EDGE, lattice.rate(found.edge) / 1e3, "kpps")
        if found.best is None or found.passed is None:
            yield Figure(CEILING, 0, "kpps", "more", f"loses packets at {lattice.base:.0f}/s")
            return
        rate = found.passed.result.delivered_rate
        yield Figure(CEILING, rate / 1e3, "kpps", "more", _limit(found.failed))
        yield Figure("generator busy at the ceiling", 100 * found.passed.result.busy, "%")
        yield Figure("CPU per packet at the ceiling", found.passed.microseconds_per_packet, "us", "less")
        if self.beyond:
            baselines = rate if rig.side == rig.baseline else rig.baselines_ceiling(self.load) or rate
            yield from self._below(field, "at 80 % of the ceiling", 0.8 * rate)
            yield from self._below(field, f"at {rig.baseline}'s ceiling", baselines)
            yield from self._overload(field, rate)

    def _start(self, rig: Rig) -> int:
        """Where this search ended the last time, or where that relay's last search of all did."""
        ended = rig.known.value(rig.side, self.name, EDGE) or rig.known.latest(rig.side, EDGE)
        lattice = rig.effort.lattice
        return lattice.top // 2 if ended is None else lattice.index(ended * 1e3)

    def _below(self, field: Field, where: str, rate: float) -> Iterator[Figure]:
        run = field.run_calmly(self.load.at(rate))
        yield Figure(f"p99 latency {where}", run.result.latency.p99, "us", "less", run.note)
        yield Figure(f"unread for at most, p99 {where}", run.result.unread.p99, "us")

    def _overload(self, field: Field, ceiling: float) -> Iterator[Figure]:
        over = field.run(self.load.at(3 * ceiling)).result
        offered = over.offered / over.seconds
        note = "" if offered > 2.7 * ceiling else GENERATOR_BOUND
        yield Figure(OFFERED_AT_3X, offered / 1e3, "kpps")
        yield Figure("delivered at 3x, of the ceiling", over.delivered_rate / ceiling, "", "more", note)
        yield Figure("p99 latency at 3x", over.latency.p99, "us", "less", note)
        yield Figure("slowest pair to mean at 3x", over.slowest_to_mean, "", "more", note)


@dataclass(frozen=True)
class AcrossMesh(Ceiling):
    """The same from clients of one relay to clients of another one of the same region.

    Both relays share the core that otherwise one has, since two cores are all that the benchmark asks for, and the load
    needs its own. So the ceiling is that of both relays' work together, and so is the CPU time.
    """

    @property
    def name(self) -> str:
        """For example `1300 B, 10 pairs, 1x8, across the mesh`."""
        return f"{super().name}, across the mesh"

    def _field(self, rig: Rig) -> AbstractContextManager[Field]:
        return self._across(rig)

    @contextmanager
    def _across(self, rig: Rig) -> Iterator[Field]:
        with rig.relays.meshed() as (first, second), rig.generators() as generator:
            generator.open(first, self.load.flows.senders)
            generator.open(second, self.load.flows.receivers)
            field = Field(generator, [first, second], rig.effort)
            until_reached(lambda: field.run(self.load.at(1e3), seconds=rig.effort.window))
            yield field


def until_reached(attempt: Callable[[], Run]) -> None:
    """Waits until the nodes of a region have told each other of their clients. Raises BenchError if they do not."""
    deadline = time.monotonic() + MESH_LIMIT
    while attempt().result.loss > 0:
        if time.monotonic() > deadline:
            raise BenchError(f"packets did not get across the mesh within {MESH_LIMIT:.0f} s")


def _limit(failed: Run | None) -> str:
    return "the highest rate tried" if failed is None else failed.limit
