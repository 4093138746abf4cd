"""One run: which scenarios on which relays in which round, and what is still missing."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from bench import generator, machine, relays, targets
from bench.errors import SkipError
from bench.figures import LEFT_OUT, Row
from bench.raw import Raw
from bench.rig import Effort, Known, Rig, Scenario
from bench.starter import Starter

__all__ = ["Run"]


@dataclass
class Run:
    """What stays the same through all rounds, and what they found. `limit` is a point of time to end at, if there is
    one, `clock` tells it; `known` may have learnt from earlier runs where searches end.
    """

    builds: tuple[relays.Build, ...]
    binary: Path
    cores: machine.Cores
    effort: Effort
    known: Known
    raw: Raw
    limit: float | None
    clock: Callable[[], float] = time.monotonic

    def measure(self, chosen: Sequence[Scenario], rounds: int, step: relays.Step) -> bool:
        """Measures what is missing, and keeps it; tells whether nothing is missing any more."""
        self.known.learn(self.raw.rows)
        for number in range(rounds):
            missing = [scenario for scenario in chosen if any(self._missing(number, scenario))]
            if missing:
                step(f"round {number + 1} of {rounds}")
            if missing and not self._round(number, missing, step):
                return False
        return True

    def _missing(self, number: int, scenario: Scenario) -> Iterator[relays.Build]:
        """The relays that this round lacks, in the round's order."""
        if scenario.once and number > 0:
            return
        first = number % len(self.builds)
        for build in self.builds[first:] + self.builds[:first]:
            wanted = number == 0 or build.side != targets.YARDSTICK or targets.needs_yardstick(scenario.name)
            if wanted and not self.raw.has(number, scenario.name, build.side):
                yield build

    def _round(self, number: int, missing: Sequence[Scenario], step: relays.Step) -> bool:
        with ExitStack() as stack:
            running = {
                build.side: stack.enter_context(relays.running(build, core=self.cores.relay)) for build in self.builds
            }
            for scenario in missing:
                for build in self._missing(number, scenario):
                    rows = self._measured(number, scenario, self._rig(build, running[build.side]), step)
                    self.raw.add(rows)
                    self.known.learn(rows)
                if self.limit is not None and self.clock() >= self.limit:
                    return not any(any(self._missing(number, other)) for other in missing)
        return True

    def _rig(self, build: relays.Build, running: relays.Relay) -> Rig:
        return Rig(
            side=build.side,
            baseline=self.builds[0].side,
            relay=running,
            relays=Starter(build, self.cores.relay),
            generators=functools.partial(generator.generating, self.binary, core=self.cores.generator),
            cores=(self.cores.relay, self.cores.generator),
            effort=self.effort,
            known=self.known,
        )

    def _measured(self, number: int, scenario: Scenario, rig: Rig, step: relays.Step) -> list[Row]:
        before = machine.sample(self.cores)
        try:
            found = list(scenario.measure(rig))
        except SkipError as error:
            return [Row(number, rig.side, scenario.name, LEFT_OUT, 0, "", "", str(error), 0)]
        foreign = machine.foreign_share(before, machine.sample(self.cores))
        shown = ", ".join(f"{figure.name} {figure.value:.4g} {figure.unit}".strip() for figure in found)
        step(f"{scenario.name} | {rig.side}: {shown}")
        return [Row(number, rig.side, scenario.name, f.name, f.value, f.unit, f.better, f.note, foreign) for f in found]
