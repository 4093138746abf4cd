"""docs/parity.md, the relay compared with stock derper: `python -m dev.parity write` makes it, `... check` compares.

The table is `tests/interop/parity/*.toml`, one file per area, one row per behaviour of stock derper::

    title = "Frames"
    [[row]]
    behaviour = "A frame of an unknown type is skipped and counted"
    source = "derp/derpserver/derpserver.go, sclient.run"
    status = "same"                       # same | differs | missing
    test = ["test_server.py::test_unknown_frames"]
    why = ""                              # for differs and missing: the reason

A row that is the same names tests in tests/interop which ask both relays: they use the fixture `make`, which runs a
test once with each, or `both`, for tests that compare the answers.
"""

from __future__ import annotations

import ast
import sys
import tomllib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

ROOT: Final = Path(__file__).parents[1]
INTEROP: Final = ROOT / "tests" / "interop"
TABLE: Final = INTEROP / "parity"
PAGE: Final = ROOT / "docs" / "parity.md"

STATUSES: Final = {"same": "same", "differs": "differs on purpose", "missing": "missing"}
_FIELDS: Final = {"behaviour", "source", "status", "test", "why"}
_ON_BOTH: Final = {"make", "both"}

_INTRODUCTION = """\
# Parity with stock derper

Generated from `tests/interop/parity/` by `python -m dev.parity write`. The reference is `derper` of
tailscale.com v1.102.3; each test named here asks both relays the same in one run of `make test-interop`.

{counts}
"""


class TableError(Exception):
    """The table is malformed; the message says where."""


@dataclass(frozen=True, slots=True)
class Row:
    """One behaviour of stock derper."""

    behaviour: str
    source: str  #: where stock does it
    status: str
    tests: tuple[str, ...]  #: FILE::FUNCTION
    why: str


@dataclass(frozen=True, slots=True)
class Area:
    """The rows of one file."""

    name: str
    title: str
    rows: tuple[Row, ...]


def read_table(folder: Path = TABLE) -> tuple[Area, ...]:
    """All areas, sorted by title.  Raises `TableError`."""
    areas = (_area(path) for path in folder.glob("*.toml"))
    return tuple(sorted(areas, key=lambda area: area.title))


def _area(path: Path) -> Area:
    try:
        body = tomllib.loads(path.read_text())
    except tomllib.TOMLDecodeError as error:
        raise TableError(f"{path.name}: {error}") from None
    rows = tuple(_row(row, f"{path.name}, row {number}") for number, row in enumerate(body.get("row", ()), 1))
    return Area(path.stem, body["title"], rows)


def _row(row: Mapping[str, Any], where: str) -> Row:
    if not {"behaviour", "source", "status"} <= row.keys() <= _FIELDS:
        raise TableError(f"{where}: it has the fields {', '.join(row)}, not those of the table")
    if row["status"] not in STATUSES:
        raise TableError(f"{where}: its status is {row['status']!r}; it must be {', '.join(STATUSES)}")
    found = Row(row["behaviour"], row["source"], row["status"], tuple(row.get("test", ())), row.get("why", ""))
    if found.status == "same" and not found.tests:
        raise TableError(f"{where}: it is the same, but no test says so")
    if found.status != "same" and not found.why:
        raise TableError(f"{where}: it {found.status}, but does not say why")
    return found


def page(areas: Sequence[Area]) -> str:
    """The document."""
    counts = Counter(row.status for area in areas for row in area.rows)
    summary = ", ".join(f"{counts[status]} {text}" for status, text in STATUSES.items())
    lines = [_INTRODUCTION.format(counts=f"{sum(counts.values())} behaviours: {summary}.")]
    for area in areas:
        lines += [
            f"## {area.title}",
            "",
            "| behaviour of stock derper | where | ours | shown by |",
            "|---|---|---|---|",
        ]
        lines += [_line(row) for row in area.rows]
        lines.append("")
    return "\n".join(lines)


def _line(row: Row) -> str:
    ours = STATUSES[row.status] + (f": {row.why}" if row.why else "")
    tests = ", ".join(f"`{test}`" for test in row.tests)
    return "| " + " | ".join(text.replace("|", "\\|") for text in (row.behaviour, row.source, ours, tests)) + " |"


# -- the tests that the table names


def asking_both(folder: Path) -> tuple[set[str], set[str]]:
    """All interop tests, and those of them that run on stock derper and on ours (FILE::FUNCTION)."""
    shared = _fixtures(ast.parse((folder / "conftest.py").read_text()))
    every, on_both = set(), set()
    for path in folder.glob("test_*.py"):
        tree = ast.parse(path.read_text())
        fixtures = shared | _fixtures(tree)
        for function in _functions(tree):
            if function.name.startswith("test_"):
                name = f"{path.name}::{function.name}"
                every.add(name)
                if _closure(_needs(function), fixtures) & _ON_BOTH:
                    on_both.add(name)
    return every, on_both


_Function = ast.FunctionDef | ast.AsyncFunctionDef


def _functions(tree: ast.Module) -> Iterator[_Function]:
    return (node for node in tree.body if isinstance(node, _Function))


def _needs(function: _Function) -> set[str]:
    return {argument.arg for argument in (*function.args.args, *function.args.kwonlyargs)}


def _fixtures(tree: ast.Module) -> dict[str, set[str]]:
    marked = (f for f in _functions(tree) if any("fixture" in ast.unparse(mark) for mark in f.decorator_list))
    return {function.name: _needs(function) for function in marked}


def _closure(needs: set[str], fixtures: Mapping[str, set[str]]) -> set[str]:
    found: set[str] = set()
    while needs:
        name = needs.pop()
        if name not in found:
            found.add(name)
            needs |= fixtures.get(name, set())
    return found


def faults(areas: Sequence[Area], folder: Path = INTEROP) -> list[str]:
    """What is wrong with the tests that the table names, one sentence each."""
    every, on_both = asking_both(folder)
    found = []
    for area in areas:
        for row in area.rows:
            found += [f"{area.name}: there is no test {test}" for test in row.tests if test not in every]
            if row.status == "same":
                lone = [test for test in row.tests if test in every - on_both]
                found += [f"{area.name}: {test} does not ask both relays (fixture make or both)" for test in lone]
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point."""
    command = list(sys.argv[1:] if arguments is None else arguments)
    if command not in (["write"], ["check"]):
        print("usage: python -m dev.parity write|check", file=sys.stderr)
        return 2
    try:
        areas = read_table()
    except TableError as error:
        print(f"parity: {error}", file=sys.stderr)
        return 1
    problems = faults(areas)
    if command == ["write"]:
        PAGE.write_text(page(areas))
    elif not PAGE.exists() or PAGE.read_text() != page(areas):
        problems.append("docs/parity.md is not what the table says; run: python -m dev.parity write")
    for problem in problems:
        print(f"parity: {problem}", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
