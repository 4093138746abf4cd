"""What was promised of the relay's speed, and what the figures say of it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Final

from bench.figures import Comparison, Side, line, number

__all__ = ["TARGETS", "Target", "Verdict", "judge", "table"]

OURS: Final = "ours"
CEILING: Final = "loss-free ceiling"
GENERATOR_BOUND: Final = "generator-bound"


@dataclass(frozen=True)
class Target:
    """A bound of one figure: of its ratio to another relay's, or, if `to` is empty, of the figure itself."""

    scenario: str
    figure: str
    least: float | None = None
    most: float | None = None
    to: str = "stock"

    @property
    def bound(self) -> str:
        """For example `at least 2.00 x stock`."""
        number_of = number(self.least if self.least is not None else self.most or 0)
        return f"{'at least' if self.least is not None else 'at most'} {number_of}{f' x {self.to}' * bool(self.to)}"

    def holds(self, value: float) -> bool:
        """Whether a measured value keeps the bound."""
        return (self.least is None or value >= self.least) and (self.most is None or value <= self.most)


@dataclass(frozen=True)
class Verdict:
    """A target, what was measured (None: nothing), and what that means."""

    target: Target
    measured: float | None
    word: str


def _pairs(count: int) -> str:
    return f"{count} pair{'s' * (count > 1)}"


def _targets() -> Iterator[Target]:
    ceiling, cost = CEILING, "CPU per packet at the ceiling"
    steep = {(1300, "1x1"): 2.0, (1300, "1x8"): 3.0, (1300, "16x1"): 3.5, (100, "1x8"): 4.0, (100, "16x1"): 7.0}
    for (size, shape), least in steep.items():
        yield Target(f"{size} B, 10 pairs, {shape}", ceiling, least=least)
        if (size, shape) == (1300, "1x1"):
            yield Target(f"{size} B, 10 pairs, {shape}", cost, most=0.55)
    for count in (1, 100):
        for size, shape in steep:
            yield Target(f"{size} B, {_pairs(count)}, {shape}", ceiling, least=2.0)
    for size, shape in steep:
        here = f"{size} B, 10 pairs, {shape}"
        yield Target(here, ceiling, least=0.6, to="limit")
        yield Target(here, "delivered at 3x, of the ceiling", least=0.9, to="")
        yield Target(here, "p99 latency at 3x", most=25e3, to="")
        yield Target(here, "slowest pair to mean at 3x", least=0.7, to="")
        yield Target(here, "p99 latency at 80 % of the ceiling", most=5e3, to="")
        yield Target(here, "p99 latency at stock's ceiling", most=1.0)
    for rate in (10, 50):
        yield Target(f"1300 B, 10 pairs, 1x1 at {rate} kpps", "CPU per packet", most=0.85)
    for count in (1, 64):
        for load in ("", ", half load"):
            yield Target(f"ping-pong, {_pairs(count)}{load}", "p50 round trip", most=0.95)
            yield Target(f"ping-pong, {_pairs(count)}{load}", "p99 round trip", most=0.95)
    for clients in (5000, 50_000):
        yield Target(f"{clients} idle clients", "memory per client", most=0.35)
        yield Target(f"{clients} idle clients", "memory per client", most=1.3, to="limit")
    yield Target("5000 idle clients", "CPU per connect", most=0.85)
    for shape in ("1x1", "1x8"):
        yield Target(f"1300 B, 10 pairs, {shape}, across the mesh", ceiling, least=2.0)
    workers = "two workers, 1300 B, 10 pairs, 1x8 at 50 kpps"
    yield Target(workers, "CPU per packet, two workers to one", most=1.2, to="")
    yield Target(
        "metrics scraped each second, 1300 B, 10 pairs, 1x8", "CPU per packet, of that without", most=1.05, to=""
    )


TARGETS: Final = tuple(_targets())


def judge(comparisons: Iterable[Comparison]) -> list[Verdict]:
    """A verdict on each target."""
    found = {(c.scenario, c.figure): c for c in comparisons}
    return [_verdict(target, found.get((target.scenario, target.figure))) for target in TARGETS]


def _verdict(target: Target, comparison: Comparison | None) -> Verdict:
    if comparison is None or OURS not in comparison.sides:
        return Verdict(target, None, "not measured")
    ours = comparison.sides[OURS]
    measured = comparison.ratio(OURS, target.to) if target.to else ours.median
    if measured is None:
        return Verdict(target, None, "not measured")
    holds = target.holds(measured)
    # A ceiling that the generator limits can only be higher; what else it limits was not put to the test.
    is_floor = holds and target.figure == CEILING
    if (_bound(ours) and not is_floor) or (target.to and _bound(comparison.sides[target.to])):
        return Verdict(target, measured, GENERATOR_BOUND)
    return Verdict(target, measured, "met" if holds else "missed")


def _bound(side: Side) -> bool:
    return any(GENERATOR_BOUND in note for note in side.notes)


def table(verdicts: Iterable[Verdict]) -> str:
    """A Markdown table, without what was not measured, but for a last line that counts."""
    verdicts = list(verdicts)
    lines = [line(["scenario", "figure", "target", "measured", ""]), "|---" * 5 + "|"]
    for v in verdicts:
        if v.measured is not None:
            lines.append(
                line([v.target.scenario, v.target.figure, v.target.bound, number(v.measured), f"**{v.word}**"])
            )
    words = [v.word for v in verdicts]
    counts = ", ".join(f"{words.count(word)} {word}" for word in ("met", "missed", GENERATOR_BOUND, "not measured"))
    return "\n".join(lines) + f"\n\n{counts}."
