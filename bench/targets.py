"""What was promised of the relay's speed, and what the figures say of it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from bench.figures import CEILING, DISTURBED, GENERATOR_BOUND, OFFERED_AT_3X, Comparison, Side, line, number

__all__ = ["TARGETS", "YARDSTICK", "Target", "Verdict", "judge", "needs_yardstick", "table"]

OURS: Final = "ours"
YARDSTICK: Final = "limit"
NOT_MEASURED: Final = "not measured"


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
    """A target, what was measured (None: nothing), what that means, and where it needs one, an explanation."""

    target: Target
    measured: float | None
    word: str
    remark: str = ""


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
        yield Target(here, ceiling, least=0.6, to=YARDSTICK)
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
        yield Target(f"{clients} idle clients", "memory per client", most=1.3, to=YARDSTICK)
    yield Target("5000 idle clients", "CPU per connect", most=0.85)
    for shape in ("1x1", "1x8"):
        yield Target(f"1300 B, 10 pairs, {shape}, across the mesh", ceiling, least=2.0)
    for shape in ("1x1", "1x8"):
        for load in ("50 kpps", "half of one worker's ceiling"):
            workers = f"two workers, 1300 B, 10 pairs, {shape} at {load}"
            yield Target(workers, "CPU per packet, two workers to one", most=1.2, to="")
    yield from _twice_the_clients("twice the clients, two workers with 4000 to one with 2000")
    yield Target(
        "metrics scraped each second, 1300 B, 10 pairs, 1x8", "CPU per packet, of that without", most=1.05, to=""
    )


def _twice_the_clients(scenario: str) -> Iterator[Target]:
    yield Target(scenario, "memory per client, two workers to one", most=1.1, to="")
    yield Target(scenario, "CPU per connect, two workers to one", most=1.2, to="")
    yield Target(scenario, "CPU per packet at twice the rate, two workers to one", most=1.2, to="")
    yield Target(scenario, "lost", most=1.0, to="")
    yield Target(scenario, "clients when the fuller of two workers is full, to one worker", least=1.8, to="")


TARGETS: Final = tuple(_targets())


def needs_yardstick(scenario: str) -> bool:
    """Whether a target compares ours with the yardstick there: then it takes part in each round."""
    return any(target.scenario == scenario and target.to == YARDSTICK for target in TARGETS)


def judge(comparisons: Iterable[Comparison]) -> list[Verdict]:
    """A verdict on each target."""
    found = {(c.scenario, c.figure): c for c in comparisons}
    return [_verdict(target, found) for target in TARGETS]


def _verdict(target: Target, found: Mapping[tuple[str, str], Comparison]) -> Verdict:
    comparison = found.get((target.scenario, target.figure))
    if comparison is None or OURS not in comparison.sides:
        return Verdict(target, None, NOT_MEASURED)
    ours = comparison.sides[OURS]
    measured = comparison.ratio(OURS, target.to) if target.to else ours.median
    if measured is None:
        return Verdict(target, None, NOT_MEASURED)
    holds = target.holds(measured)
    # A ceiling that the generator limits can only be higher; what else it limits was not put to the test.
    is_floor = holds and target.figure == CEILING
    if _bound(ours) and not is_floor:
        return Verdict(target, measured, GENERATOR_BOUND, _offered(target, found, holds))
    if target.to and _bound(comparison.sides[target.to]):
        return Verdict(target, measured, GENERATOR_BOUND, f"{target.to} may do more")
    if holds:
        return Verdict(target, measured, "met")
    return Verdict(target, measured, "missed", DISTURBED * any(DISTURBED in note for note in ours.notes))


def _offered(target: Target, found: Mapping[tuple[str, str], Comparison], holds: bool) -> str:
    """How far the generator came, and whether the bound was kept there."""
    offered, ceiling = (found.get((target.scenario, figure)) for figure in (OFFERED_AT_3X, CEILING))
    if "3x" not in target.figure or not offered or not ceiling:
        return "ours may do more"
    came, wanted = offered.sides[OURS].median, 3 * ceiling.sides[OURS].median
    return f"offered {came:.0f} of {wanted:.0f} kpps; there the bound is {'kept' if holds else 'not kept'}"


def _bound(side: Side) -> bool:
    return any(GENERATOR_BOUND in note for note in side.notes)


def table(verdicts: Iterable[Verdict]) -> str:
    """A Markdown table, without what was not measured, but for a last line that counts."""
    verdicts = list(verdicts)
    lines = [line(["scenario", "figure", "target", "measured", ""]), "|---" * 5 + "|"]
    for v in verdicts:
        if v.measured is not None:
            lines.append(line([v.target.scenario, v.target.figure, v.target.bound, number(v.measured), _in_words(v)]))
    words = [v.word for v in verdicts]
    counts = ", ".join(f"{words.count(word)} {word}" for word in ("met", "missed", GENERATOR_BOUND, NOT_MEASURED))
    return "\n".join(lines) + f"\n\n{counts}."


def _in_words(verdict: Verdict) -> str:
    word = "limited by the generator" if verdict.word == GENERATOR_BOUND else verdict.word
    return f"**{word}**" + f": {verdict.remark}" * bool(verdict.remark)
