"""What the clients noticed, row by row: the tests write it, `python -m tests.e2e.ledger` makes tables of it."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path
from typing import Any

from dev.cluster import state

from .clients import Seen

CHANGES = "changes"
FAULTS = "faults"
HEADS = {
    CHANGES: ("change", "requests", "failed", "longest stall", "reconnects", "forced", "unknown peer"),
    FAULTS: ("fault", "requests", "failed", "longest stall", "reconnects", "unknown peer", "status says", "heals"),
}
DOCUMENT = state.repository() / "docs" / "changes.md"
_UNKNOWN = ("unknown_dest", "unknown_dest_on_fwd", "gone_disconnected")

Row = dict[str, Any]


class Ledger:
    """The rows of this run; those of earlier runs stay if this one has none of the same name."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: dict[str, Row] = json.loads(path.read_text()) if path.exists() else {}

    def add(self, table: str, what: str, seen: Seen, *, heals: str) -> None:
        self.rows[what] = {
            "table": table,
            "requests": seen.answered + seen.failed,
            "failed": seen.failed,
            "stall_ms": round(seen.stall),
            "reconnects": seen.reconnects,
            "forced": {name: count - seen.needless[name] for name, count in seen.reconnects.items()},
            "maps": seen.maps,
            "dropped": dict(seen.drops),
            "says": ", ".join(seen.reasons),
            "heals": heals,
        }

    def write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(self.rows, indent=1) + "\n")

    def table(self, table: str) -> str:
        """Markdown."""
        cells = [_cells(what, row) for what, row in self.rows.items() if row["table"] == table]
        lines = [HEADS[table], ["---"] * len(HEADS[table]), *([row[head] for head in HEADS[table]] for row in cells)]
        return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _cells(what: str, row: Row) -> dict[str, str]:
    counts = [row["reconnects"].values(), row["forced"].values()]
    reconnects, forced = (_range(min(values), max(values)) for values in counts)
    return {
        "change": what,
        "fault": what,
        "requests": str(row["requests"]),
        "failed": str(row["failed"]),
        "longest stall": f"{row['stall_ms']} ms",
        "reconnects": reconnects,
        "forced": forced,
        "unknown peer": str(sum(row["dropped"].get(reason, 0) for reason in _UNKNOWN)),
        "status says": row["says"],
        "heals": row["heals"],
    }


def _range(low: int, high: int) -> str:
    return str(low) if low == high else f"{low} to {high}"


def renewed(document: str, ledger: Ledger) -> str:
    """The document with its tables made anew; each stands between two comments that name it."""
    for table in HEADS:
        between = re.compile(rf"(<!-- {table} -->\n).*(<!-- end of {table} -->)", re.DOTALL)
        if (marks := between.search(document)) is None:
            raise ValueError(f"{DOCUMENT} has no place for the table {table}")
        document = document.replace(marks[0], f"{marks[1]}{ledger.table(table)}{marks[2]}")
    return document


def main() -> int:
    ledger = Ledger(state.paths(os.environ).cache / "noticed.json")
    if not ledger.rows:
        print("there are no figures yet; `make test-e2e test-faults` collects them", file=sys.stderr)
        return 1
    DOCUMENT.write_text(renewed(DOCUMENT.read_text(), ledger))
    return 0


if __name__ == "__main__":
    sys.exit(main())
