"""The figures of docs/sizing.md, from the raw figures of `python -m bench` and `python -m bench.scale`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final

from bench.errors import BenchError
from bench.figures import CEILING, Row, compare, line, number

__all__ = ["PAGE", "section", "write"]

PAGE: Final = Path(__file__).parents[1] / "docs" / "sizing.md"
BEGIN: Final = "<!-- from here on written by `python -m bench --sizing` -->\n"
END: Final = "<!-- until here -->\n"
OURS: Final = "ours"
BITS: Final = 1300 * 8
OTHER_NODES: Final = 8

IDLE: Final = "5000 idle clients"
REGION: Final = "9 nodes, 20000 clients"
PLAIN: Final = "1300 B, 10 pairs, 1x1"
BURSTY: Final = "1300 B, 10 pairs, 1x8"
WORKERS: Final = "two workers, 1300 B, 10 pairs, 1x8 at 50 kpps"
AT_CEILING: Final = "CPU per packet at the ceiling"


def write(bench: Iterable[Row], scale: Iterable[Row], page: Path = PAGE) -> None:
    """Puts the section in its place. Raises BenchError if a figure or the place is missing."""
    text = page.read_text()
    before, begin, rest = text.partition(BEGIN)
    _old, end, after = rest.partition(END)
    if not (begin and end):
        raise BenchError(f"{page.name} has no place for the figures, between `{BEGIN.strip()}` and `{END.strip()}`")
    page.write_text(f"{before}{begin}{section(bench, scale)}{end}{after}")


def section(bench: Iterable[Row], scale: Iterable[Row]) -> str:
    """The table and what follows from it. Raises BenchError if a figure is missing."""
    figures = _Figures([*bench, *scale])
    rows = [line(["what", "cost", "measured by"]), "|---|---|---|", *(line(cells) for cells in _table(figures))]
    return "\n".join(rows) + "\n\n" + _conclusion(figures)


class _Figures:
    def __init__(self, rows: Iterable[Row]) -> None:
        self._found = {(c.scenario, c.figure): c.sides for c in compare(rows, (OURS,))}

    def __call__(self, scenario: str, figure: str) -> float:
        try:
            return self._found[scenario, figure][OURS].median
        except KeyError:
            raise BenchError(f"the raw figures lack `{scenario}`, `{figure}`: measure it, then try again") from None


def _table(of: _Figures) -> Iterator[tuple[str, str, str]]:
    idle, login = of(IDLE, "memory per client"), of(IDLE, "CPU per connect")
    foreign = (of(REGION, "memory of all nodes per client") - idle) / OTHER_NODES
    announced = (of(REGION, "CPU of all nodes per connect") - login) / OTHER_NODES
    by_idle, by_rate, by_load, by_mesh, by_workers = (
        f"`make bench ARGS=\"--only '{text}'\"`" for text in ("idle", "kpps", "10 pairs", "mesh", "two workers")
    )
    yield "a relay without clients", f"{of(IDLE, 'memory without clients'):.0f} MiB", by_idle
    yield "an idle client, on its node", f"{idle:.0f} KiB, and what its socket takes in the kernel", by_idle
    yield "a client of another node", f"{foreign:.1f} KiB", "`make bench-scale`, less the line above"
    cost = f"{login / 1e3:.2f} ms of CPU on its node, and {announced:.0f} µs on every other"
    yield "a login", cost, "both of these"
    for rate in (10, 50):
        cost = f"{number(of(f'{PLAIN} at {rate} kpps', 'CPU per packet'))} µs of CPU"
        yield f"a packet of 1300 bytes, one by one, {rate},000 per second", cost, by_rate
    for name, how in ((PLAIN, "one by one"), (BURSTY, "in bursts of eight, as busy clients send")):
        what = f"the same, {how}, {of(name, CEILING):.0f},000 per second: a core's most"
        yield what, f"{number(of(name, AT_CEILING))} µs", by_load
    mesh = number(of(f"{BURSTY}, across the mesh", AT_CEILING))
    yield "a packet in bursts that crosses the mesh, on both nodes together", f"{mesh} µs", by_mesh
    more = of(WORKERS, "CPU per packet, two workers to one")
    yield "the same packets with two workers", f"{more:.2f} times the CPU of one", by_workers


def _conclusion(of: _Figures) -> str:
    single, bursts = (of(name, CEILING) * BITS / 1e3 for name in (PLAIN, BURSTY))
    sparse = of(f"{PLAIN} at 50 kpps", "CPU per packet") * 50e3 / 1e6
    logins = 1e6 / of(IDLE, "CPU per connect")
    clients = (1024**2 - of(IDLE, "memory without clients") * 1024) / of(IDLE, "memory per client")
    return f"""\
So **one core** carries {_round(single)} Mbit/s of full-sized packets that come one by one, and {_round(bursts)} in
bursts, before it loses any. Half a gigabit, 50,000 packets one by one, keeps {sparse:.0%} of it busy: what is on its
way together costs less, so a core that looks busy has much in reserve. It takes **{_round(logins)} logins per second**
in a region of one node. **One GiB** holds {_round(clients)} idle clients; plan with half of that, as the next section
does.
"""


def _round(value: float) -> str:
    """With two digits, and a comma between thousands."""
    return f"{float(f'{value:.2g}'):,.0f}"
