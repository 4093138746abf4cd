"""From measured rows to medians, ratios and the two result files. No measuring here."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from statistics import median

Noise = dict[tuple[str, str], float]
"""By scenario and figure: the ratio that stock derper reached against itself."""

HOW = """\
Written by `python -m bench` from the raw figures beside it. {rounds} rounds; in each, every scenario runs on both
relays in turn, and the next round swaps their order. Cells are medians (lowest - highest of the rounds).

Each relay is alone on one core while it is measured, the load generator on the other. Loads are named FxR: bursts of R
writes with F frames each; a stock client writes one frame at a time. The loss-free ceiling is the highest offered rate
of which 99 % arrives in the same time. Every packet's content, order, sender and receiver are checked.

CPU per packet is what the kernel charges to the relay, the loopback network included. `generator-bound` means that the
relay could do more. Latencies include the generator's share.
"""
NOISE = """
`same relay twice` is the ratio of stock derper to itself by the same method: the noise of a figure.
"""


@dataclass(frozen=True)
class Row:
    """One figure of one relay in one round. `foreign`: the share of the two cores that others used meanwhile."""

    round: int
    side: str
    scenario: str
    figure: str
    value: float
    unit: str
    better: str
    note: str
    foreign: float


@dataclass(frozen=True)
class Side:
    """All rounds of one figure on one relay."""

    median: float
    low: float
    high: float
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Comparison:
    """One figure on both relays. The ratio is the second relay's median to the first's."""

    scenario: str
    figure: str
    unit: str
    better: str
    first: Side
    second: Side

    @property
    def ratio(self) -> float:
        """More than one when the second relay has the higher number, good or bad."""
        return self.second.median / self.first.median if self.first.median else float("nan")

    @property
    def notes(self) -> str:
        """Every remark that a run made on this figure."""
        return "; ".join((*self.first.notes, *self.second.notes))


def compare(rows: Iterable[Row], sides: tuple[str, str]) -> list[Comparison]:
    """One comparison per scenario and figure, in the order of the rows; figures that one relay lacks are left out."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.scenario, row.figure), []).append(row)
    found = []
    for (scenario, figure), group in groups.items():
        first, second = (_side([row for row in group if row.side == side], side) for side in sides)
        if first and second:
            found.append(Comparison(scenario, figure, group[0].unit, group[0].better, first, second))
    return found


def table(comparisons: Sequence[Comparison], sides: tuple[str, str], noise: Noise) -> str:
    """A Markdown table."""
    noisy = " same relay twice |" if noise else ""
    lines = [f"| scenario | figure | {sides[0]} | {sides[1]} | ratio |{noisy} notes |"]
    lines.append("|---|---|---|---|---|" + ("---|" if noise else "") + "---|")
    scenario = ""
    for c in comparisons:
        shown = c.scenario if c.scenario != scenario else ""
        scenario = c.scenario
        known = noise.get((c.scenario, c.figure))
        cell = f" {known:.2f} |" if known is not None else " - |"
        unit = f", {c.unit}" if c.unit else ""
        wish = f" ({c.better} is better)" if c.better else ""
        lines.append(
            f"| {shown} | {c.figure}{unit}{wish} | {_cell(c.first)} | {_cell(c.second)} "
            f"| **{c.ratio:.2f}** |{cell if noise else ''} {c.notes} |"
        )
    return "\n".join(lines)


def noise_of(rows: Iterable[Row]) -> Noise:
    """The ratios of a run in which both sides were the same relay."""
    found = list(rows)
    sides = list(dict.fromkeys(row.side for row in found))
    if len(sides) != 2:
        return {}
    return {(c.scenario, c.figure): c.ratio for c in compare(found, (sides[0], sides[1]))}


def results(rows: Sequence[Row], sides: tuple[str, str], facts: Sequence[str], noise: Noise) -> str:
    """The whole RESULTS.md."""
    comparisons = compare(rows, sides)
    rounds = 1 + max((row.round for row in rows), default=-1)
    how = HOW.format(rounds=rounds) + (NOISE if noise else "")
    facts_list = "\n".join(f"- {fact}" for fact in facts)
    return f"# Benchmark results\n\n{facts_list}\n\n{how}\n{table(comparisons, sides, noise)}\n"


def quiet(rows: Iterable[Row]) -> str:
    """How quiet the machine was, in a sentence."""
    shares = [row.foreign for row in rows]
    return f"others used {median(shares):.0%} of the two cores meanwhile (median; at worst {max(shares):.0%})"


def to_csv(rows: Iterable[Row]) -> str:
    """The raw figures, one per line."""
    out = io.StringIO()
    writer = csv.DictWriter(out, [field.name for field in fields(Row)], lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({**asdict(row), "value": f"{row.value:.6g}", "foreign": f"{row.foreign:.4f}"})
    return out.getvalue()


def from_csv(text: str) -> list[Row]:
    """The rows of `to_csv`. Raises KeyError or ValueError for another table."""
    return [
        Row(
            round=int(line["round"]),
            side=line["side"],
            scenario=line["scenario"],
            figure=line["figure"],
            value=float(line["value"]),
            unit=line["unit"],
            better=line["better"],
            note=line["note"],
            foreign=float(line["foreign"]),
        )
        for line in csv.DictReader(io.StringIO(text))
    ]


def _side(rows: Sequence[Row], side: str) -> Side | None:
    values = [row.value for row in rows]
    if not values:
        return None
    notes = tuple(dict.fromkeys(f"{side}: {row.note}" for row in rows if row.note))
    return Side(median(values), min(values), max(values), notes)


def _cell(side: Side) -> str:
    return f"{_number(side.median)} ({_number(side.low)} - {_number(side.high)})"


def _number(value: float) -> str:
    if abs(value) >= 100:
        return f"{value:.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"
