"""The results in words and tables."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import median

from bench import targets
from bench.figures import Comparison, Noise, Row, Side, compare, left_out, line, number

HOW = """\
Written by `python -m bench` from the raw figures in results.csv. {rounds}; in each, every scenario runs on all relays
in turn, and the next round begins with another one. `limit` runs once where no target speaks of it, and all relays run
once with as many idle clients as fit. Cells are medians (lowest - highest of the rounds).

Each relay is alone on one core while it is measured, the load generator on the other. Loads are named FxR: bursts of R
writes with F frames each; a stock client writes one frame at a time. The loss-free ceiling is the highest offered rate
of which 99 % arrives in the same time. Every packet's content, order, sender and receiver are checked.

`limit` is bench/limit, about the least that a relay in C with epoll and OpenSSL can do; its limit.h says what is left
out.

CPU per packet is what the kernel charges to the relay, the loopback network included. `generator-bound` means that the
relay could do more: the kernel's part of a write alone keeps a core from more than some 430,000 writes per second.
Latencies go from just before a packet's write to the return of the recv that had it. `unread` is the part that packets
may have waited for the generator to look, at most. A window for latencies is repeated, up to four times, while other
processes keep relay or generator from their cores for more than 1 % of it, as the kernel tells; the calmest one counts,
and is `disturbed` if it was more than 3 %.
Across the mesh both relays share the relays' core.

`Two workers` and the generator share both cores. `Twice the clients` is what can be seen of two workers beside a
generator: with twice the clients and twice the packets of one worker, what each client, login and packet costs, and how
evenly the clients are spread. If the costs are those of one worker, two workers on two free cores carry twice as much.
"""
NOISE = """
`same relay twice` is the ratio of stock derper to itself by the same method: the noise of a figure.
"""


def table(comparisons: Sequence[Comparison], sides: Sequence[str], noise: Noise) -> str:
    """A Markdown table. Each relay but the first is compared with the first, and the second also with the third."""
    ratios = [(sides[1], sides[0]), *((sides[1], other) for other in sides[2:])]
    heads = ["scenario", "figure", *sides, *(f"{side} / {to}" for side, to in ratios)]
    heads += ["same relay twice"] * bool(noise) + ["notes"]
    lines = [line(heads), "|---" * len(heads) + "|"]
    scenario = ""
    for c in comparisons:
        cells = ["" if c.scenario == scenario else c.scenario, _figure(c)]
        cells += [_cell(c.sides[side]) if side in c.sides else "-" for side in sides]
        cells += [_ratio(c.ratio(side, to)) for side, to in ratios]
        cells += [f"{noise[c.scenario, c.figure]:.2f}" if (c.scenario, c.figure) in noise else "-"] * bool(noise)
        lines.append(line([*cells, c.notes]))
        scenario = c.scenario
    return "\n".join(lines)


def results(rows: Sequence[Row], sides: Sequence[str], facts: Sequence[str], noise: Noise) -> str:
    """The whole RESULTS.md."""
    comparisons, skipped = compare(rows, sides), left_out(rows)
    parts = [
        "# Benchmark results",
        "\n".join(f"- {fact}" for fact in facts),
        HOW.format(rounds=_rounds(rows)) + (NOISE if noise else ""),
        f"## Targets\n\n{targets.table(targets.judge(comparisons))}",
        f"## All figures\n\n{table(comparisons, sides, noise)}",
    ]
    if skipped:
        parts.append("## Left out\n\n" + "\n".join(f"- {reason}" for reason in skipped))
    return "\n\n".join(part.strip() for part in parts) + "\n"


def _rounds(rows: Iterable[Row]) -> str:
    count = 1 + max((row.round for row in rows), default=-1)
    return f"{count} round{'s' * (count != 1)}"


def quiet(rows: Iterable[Row]) -> str:
    """How quiet the machine was, in a sentence."""
    shares = [row.foreign for row in rows]
    return f"others used {median(shares):.0%} of the two cores meanwhile (median; at worst {max(shares):.0%})"


def _figure(c: Comparison) -> str:
    unit = f", {c.unit}" if c.unit else ""
    return f"{c.figure}{unit}" + (f" ({c.better} is better)" if c.better else "")


def _ratio(ratio: float | None) -> str:
    return "-" if ratio is None else f"**{ratio:.2f}**"


def _cell(side: Side) -> str:
    return f"{number(side.median)} ({number(side.low)} - {number(side.high)})"
