"""Measured rows, what follows from them, and the raw file. No measuring here, and no words."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from statistics import median
from typing import Final

Noise = dict[tuple[str, str], float]
"""By scenario and figure: the ratio that stock derper reached against itself."""
CEILING: Final = "loss-free ceiling"
OFFERED_AT_3X: Final = "offered at 3x"
GENERATOR_BOUND: Final = "generator-bound"
"""The beginning of a note on a figure that the generator limited, not the relay."""
DISTURBED: Final = "disturbed by others on the machine"
LEFT_OUT: Final = "left out"
"""The figure of a row that stands for a scenario which a relay cannot do; its note says why."""


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
    """One figure on all relays that have it."""

    scenario: str
    figure: str
    unit: str
    better: str
    sides: Mapping[str, Side]

    def ratio(self, side: str, to: str) -> float | None:
        """One relay's median to another's; None if a relay lacks the figure. More than one is more, good or bad."""
        if side not in self.sides or to not in self.sides or not self.sides[to].median:
            return None
        return self.sides[side].median / self.sides[to].median

    @property
    def notes(self) -> str:
        """Every remark that a run made on this figure."""
        names: dict[str, list[str]] = {}
        for name, side in self.sides.items():
            for note in side.notes:
                names.setdefault(note, []).append(name)
        return "; ".join(f"{', '.join(of)}: {note}" for note, of in names.items())


def compare(rows: Iterable[Row], sides: Sequence[str]) -> list[Comparison]:
    """One comparison per scenario and figure, in the order of the rows."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if row.figure != LEFT_OUT:
            groups.setdefault((row.scenario, row.figure), []).append(row)
    found = []
    for (scenario, figure), group in groups.items():
        by_side = {side: [row for row in group if row.side == side] for side in sides}
        known = {side: _side(of_side) for side, of_side in by_side.items() if of_side}
        found.append(Comparison(scenario, figure, group[0].unit, group[0].better, known))
    return found


def noise_of(rows: Iterable[Row]) -> Noise:
    """The ratios of a run in which both sides were the same relay."""
    found = list(rows)
    sides = list(dict.fromkeys(row.side for row in found))
    if len(sides) != 2:
        return {}
    ratios = ((c.scenario, c.figure, c.ratio(sides[1], sides[0])) for c in compare(found, sides))
    return {(scenario, figure): ratio for scenario, figure, ratio in ratios if ratio is not None}


def left_out(rows: Iterable[Row]) -> list[str]:
    """What could not be measured, and why."""
    return list(dict.fromkeys(f"{row.scenario}: {row.side} {row.note}" for row in rows if row.figure == LEFT_OUT))


def to_csv(rows: Iterable[Row], *, head: bool = True) -> str:
    """The raw figures, one per line, below the names of their columns."""
    out = io.StringIO()
    writer = csv.DictWriter(out, [field.name for field in fields(Row)], lineterminator="\n")
    if head:
        writer.writeheader()
    for row in rows:
        writer.writerow({**asdict(row), "value": f"{row.value:.6g}", "foreign": f"{row.foreign:.4f}"})
    return out.getvalue()


def from_csv(text: str) -> list[Row]:
    """The rows of `to_csv`. Raises KeyError, TypeError or ValueError for another table."""
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


def number(value: float) -> str:
    """With three digits or so."""
    if abs(value) >= 100:
        return f"{value:.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def line(cells: Sequence[str]) -> str:
    """A row of a Markdown table."""
    return f"| {' | '.join(cells)} |"


def _side(rows: Sequence[Row]) -> Side:
    values = [row.value for row in rows]
    notes = tuple(dict.fromkeys(row.note for row in rows if row.note))
    return Side(median(values), min(values), max(values), notes)
