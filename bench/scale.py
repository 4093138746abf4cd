"""`python -m bench.scale`: the control plane of a large region, ours and stock derper's in one run.

Many clients on a few nodes that mesh: what each node keeps and says of them, how soon a new client can be reached from
everywhere, and how soon all nodes agree again after one of them was lost.
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path

from bench import figures, generator, machine, network, reach, relays, report
from bench.command import exit_status
from bench.errors import BenchError
from bench.generator import Generator
from bench.region import Gauges, Region, meshed
from bench.relays import Build
from bench.rig import Figure

HERE = Path(__file__).parent
SETTLE = 2.0
AGREE_LIMIT = 120.0
TOTAL = "gauge_clients_total"

HOW = """\
Written by `python -m bench.scale` from the raw figures beside it (`scale.csv`). {rounds} rounds, both relays in each.

All nodes of the region share one core, all simulated clients and the measuring have the other: so every time here
contains the work of all nodes. Clients hold idle TLS connections. A new client is *reached* when a packet from a client
of every other node has come to it; each of these sends one every millisecond from the moment of the login on.
*Lost* is a node whose process is killed, so that its connections are reset; its clients come back on the other nodes,
as fast as these take them. The nodes *agree* when each counts all clients of the region.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Parses the command line, measures, writes the results. Returns the exit status."""
    arguments = _parser().parse_args(argv)
    return exit_status("bench.scale", lambda: _bench(arguments))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.scale", description=__doc__, allow_abbrev=False)
    parser.add_argument("--nodes", type=int, default=9, help="relays of the region, at least 3 (default 9)")
    parser.add_argument("--clients", type=int, default=20_000, help="in the whole region (default 20000)")
    parser.add_argument("--probes", type=int, default=200, help="new clients to reach, one by one (default 200)")
    parser.add_argument("--rounds", type=int, default=1, help="how often all is measured (default 1)")
    parser.add_argument("--side", choices=("both", "stock", "ours"), default="both", help="only one of the relays")
    parser.add_argument("--output", type=Path, default=HERE, metavar="DIR", help="where results go (default bench/)")
    return parser


def _bench(arguments: argparse.Namespace) -> None:
    started = time.monotonic()

    def step(text: str) -> None:
        print(f"[{time.monotonic() - started:6.1f} s] {text}", flush=True)

    if min(arguments.rounds, arguments.probes) < 1 or arguments.nodes < 3 or arguments.clients < arguments.nodes:
        raise BenchError("a region needs three nodes or more, a client for each, one round and one probe or more")
    builds = [relays.stock(step), relays.ours()]
    builds = [build for build in builds if arguments.side in ("both", build.side)]
    binary, cores = generator.build(step), machine.pick_cores()
    tcp = network.describe(network.enter())
    step(tcp)
    machine.allow_many_files()
    os.sched_setaffinity(0, {cores.generator})  # the other core is the region's alone
    generators = functools.partial(generator.generating, binary, core=cores.generator)
    scenario = Scale(arguments.nodes, arguments.clients, arguments.probes, cores, generators)
    rows: list[figures.Row] = []
    for number in range(arguments.rounds):
        for build in builds if number % 2 == 0 else reversed(builds):
            for row in _measured(scenario, number, build):
                step(f"{build.side} | {row.figure}: {row.value:.4g} {row.unit} {row.note}".rstrip())
                rows.append(row)
    _write(arguments, rows, builds, tcp, step)


def _measured(scenario: Scale, number: int, build: Build) -> Iterator[figures.Row]:
    before = machine.sample(scenario.cores)
    for f in scenario.measure(build):
        after = machine.sample(scenario.cores)
        foreign, before = machine.foreign_share(before, after), after
        yield figures.Row(number, build.side, scenario.name, f.name, f.value, f.unit, f.better, f.note, foreign)


def _write(
    arguments: argparse.Namespace, rows: Sequence[figures.Row], builds: Sequence[Build], tcp: str, step: relays.Step
) -> None:
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / "scale.csv").write_text(figures.to_csv(rows))
    if len(builds) == 2:
        sides = (builds[0].side, builds[1].side)
        table = report.table(figures.compare(rows, sides), sides, {})
        facts = [time.strftime("%Y-%m-%d"), *(f"{build.side}: {build.version}" for build in builds)]
        listed = "\n".join(f"- {fact}" for fact in (*facts, *machine.describe(), tcp, report.quiet(rows)))
        how = HOW.format(rounds=arguments.rounds)
        text = f"# The control plane of a large region\n\n{listed}\n\n{how}\n{table}\n"
        (arguments.output / "SCALE.md").write_text(text)
        print(f"\n{table}\n")
    step(f"written to {arguments.output.name}/")


@dataclass(frozen=True)
class Scale:
    """A region of `nodes` with `clients`, spread evenly; the last node is lost, and comes back."""

    nodes: int
    clients: int
    probes: int
    cores: machine.Cores
    generators: Callable[[], AbstractContextManager[Generator]]

    @property
    def name(self) -> str:
        """For example `9 nodes, 20000 clients`."""
        return f"{self.nodes} nodes, {self.clients} clients"

    def measure(self, build: Build) -> Iterator[Figure]:
        """Everything, in the order of a bad day."""
        with meshed(build, self.nodes, core=self.cores.relay) as region, ExitStack() as stack:
            with Gauges(region.nodes) as gauges:
                empty = {number: gauges.read(TOTAL, number) for number in region.nodes}
                yield from self._fill(region, gauges, empty, stack)
            yield from self._reach(region)
            with stack.pop_all():  # the clients
                yield from self._lose(region, empty)

    def _fill(self, region: Region, gauges: Gauges, empty: dict[int, int], stack: ExitStack) -> Iterator[Figure]:
        memory, cpu, seconds = region.resident_bytes(), region.cpu_seconds(), 0.0
        for some in [*_halves(list(region.nodes)[:-1]), list(region.nodes)[-1:]]:
            load = stack.enter_context(self.generators())
            seconds += sum(load.open(region.nodes[number], self._share(number)) for number in some)
        late = gauges.wait(TOTAL, {number: known + self.clients for number, known in empty.items()}, AGREE_LIMIT)
        cpu = region.cpu_seconds() - cpu
        time.sleep(SETTLE)
        memory = region.resident_bytes() - memory
        yield Figure("connects per second", self.clients / seconds, "/s", "more")
        yield Figure("CPU of all nodes per connect", 1e6 * cpu / self.clients, "us", "less")
        yield Figure("the last client until all nodes agree", 1e3 * late, "ms", "less")
        yield Figure("memory of all nodes per client", memory / self.clients / 1024, "KiB", "less")
        idle = region.cpu_seconds()
        time.sleep(SETTLE)
        yield Figure(
            "CPU of all nodes while nothing happens", 100 * (region.cpu_seconds() - idle) / SETTLE, "%", "less"
        )

    def _reach(self, region: Region) -> Iterator[Figure]:
        found = reach.measure(region, self.probes)
        yield Figure("a new client until it is reached from all nodes, p50", 1e3 * found.quantile(0.5), "ms", "less")
        yield Figure("a new client until it is reached from all nodes, p99", 1e3 * found.quantile(0.99), "ms", "less")
        yield Figure("a new peer until it knows a node's clients", 1e3 * found.snapshot_seconds, "ms", "less")
        clients = found.snapshot_clients
        yield Figure("bytes to a new peer per client of a node", found.snapshot_bytes / clients, "B", "less")
        yield Figure("bytes to each peer per arrival or departure", found.change_bytes / found.changes, "B", "less")

    def _lose(self, region: Region, empty: dict[int, int]) -> Iterator[Figure]:
        lost = max(region.nodes)
        cpu = region.cpu_seconds() - region.nodes[lost].cpu_seconds()
        region.kill(lost)
        moved = self._share(lost)
        without = {number: empty[number] - 1 + self.clients - moved for number in region.nodes}
        with Gauges(region.nodes) as gauges:
            yield Figure(
                "a node lost until all others know", 1e3 * gauges.wait(TOTAL, without, AGREE_LIMIT), "ms", "less"
            )
            with self.generators() as load:
                started = time.monotonic()
                for index, number in enumerate(region.nodes):
                    load.open(region.nodes[number], _part(moved, len(region.nodes), index))
                back = time.monotonic() - started
                whole = {number: known + moved for number, known in without.items()}
                late = gauges.wait(TOTAL, whole, AGREE_LIMIT)
                cpu = region.cpu_seconds() - cpu
                yield Figure("its clients until they are back", back, "s", "less")
                yield Figure("the last of them until all nodes agree", 1e3 * late, "ms", "less")
                yield Figure("CPU of all others for the loss", cpu, "s", "less")
                yield from self._return(region, lost, empty[lost])

    def _return(self, region: Region, lost: int, empty: int) -> Iterator[Figure]:
        started = time.monotonic()
        node = region.start(lost)
        with Gauges({lost: node}) as gauges:
            gauges.wait(TOTAL, {lost: empty + self.clients}, AGREE_LIMIT)
        yield Figure("a node's start until it knows all clients", 1e3 * (time.monotonic() - started), "ms", "less")

    def _share(self, number: int) -> int:
        return _part(self.clients, self.nodes, number)


def _part(whole: int, parts: int, index: int) -> int:
    return whole // parts + (index < whole % parts)


def _halves(numbers: list[int]) -> list[list[int]]:
    """Two generators: one may not open as many files as there are clients."""
    middle = len(numbers) // 2
    return [numbers[:middle], numbers[middle:]]


if __name__ == "__main__":
    sys.exit(main())
