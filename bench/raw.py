"""The raw file of a run. It grows scenario by scenario, so that a run which was ended can go on where it was."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from bench import figures
from bench.errors import BenchError
from bench.figures import Row

__all__ = ["Raw", "begin", "read", "resume"]

FACT = "# "


@dataclass
class Raw:
    """What a run has found so far. `facts` say what was measured, where, and in which way; the first is the date."""

    facts: Sequence[str]
    rows: list[Row] = field(default_factory=list)
    path: Path | None = None
    """The file that keeps it; None if nothing does."""

    def add(self, rows: Sequence[Row]) -> None:
        """Keeps what one scenario found on one relay in one round: all of it or nothing."""
        self.rows += rows
        if self.path:
            with self.path.open("a") as file:
                file.write(figures.to_csv(rows, head=False))

    def has(self, number: int, scenario: str, side: str) -> bool:
        """Whether that was measured in this round, or left out."""
        return any((row.round, row.scenario, row.side) == (number, scenario, side) for row in self.rows)

    @property
    def sides(self) -> tuple[str, ...]:
        """The names of the relays, the baseline first: in the order of the first round."""
        return tuple(dict.fromkeys(row.side for row in self.rows if row.round == 0))


def begin(path: Path | None, facts: Sequence[str]) -> Raw:
    """A run without rows; what the file had is gone."""
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(f"{FACT}{fact}\n" for fact in facts) + figures.to_csv([]))
    return Raw(tuple(facts), [], path)


def read(path: Path) -> Raw:
    """What a file has. Raises BenchError if there is none, or another one."""
    try:
        lines = path.read_text().splitlines(keepends=True)
        rows = figures.from_csv("".join(line for line in lines if not line.startswith(FACT)))
    except OSError as error:
        raise BenchError(f"there are no raw figures in {path}: {error.strerror}") from error
    except (KeyError, TypeError, ValueError) as error:
        raise BenchError(f"{path} does not have the raw figures of a benchmark: remove it, and measure anew") from error
    return Raw([line.removeprefix(FACT).strip() for line in lines if line.startswith(FACT)], rows, path)


def resume(path: Path, facts: Sequence[str]) -> Raw:
    """What a file has, to go on with. Raises BenchError if other things were measured, or in another way."""
    if not path.exists():
        return begin(path, facts)
    raw = read(path)
    if list(raw.facts[1:]) != list(facts[1:]):
        differing = next(iter(_without(facts[1:], raw.facts[1:]) or _without(raw.facts[1:], facts[1:])))
        raise BenchError(f"{path} is of another run, which differs in `{differing}`: begin anew without --resume")
    return raw


def _without(facts: Iterable[str], others: Iterable[str]) -> list[str]:
    known = set(others)
    return [fact for fact in facts if fact not in known]
