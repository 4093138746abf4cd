"""`python -m bench`: both relays in one run, interleaved, with medians and ratios."""

from __future__ import annotations

import argparse
import functools
import resource
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

from bench import generator, machine, network, relays, report, scenarios
from bench.errors import BenchError

HERE = Path(__file__).parent


def main(argv: Sequence[str] | None = None) -> int:
    """Parses the command line, measures, writes the results. Returns the exit status."""
    arguments = _parser().parse_args(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        _bench(arguments)
    except BenchError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__, allow_abbrev=False)
    parser.add_argument("--quick", action="store_true", help="a few scenarios with short windows, about two minutes")
    parser.add_argument("--rounds", type=int, default=3, help="how often each scenario runs on each relay (default 3)")
    parser.add_argument("--only", default="", metavar="TEXT", help="only the scenarios whose name contains this text")
    parser.add_argument("--noise", action="store_true", help="stock derper against itself: how far ratios stray from 1")
    parser.add_argument(
        "--output", type=Path, default=HERE, metavar="DIR", help="where the results go (default bench/)"
    )
    return parser


def _bench(arguments: argparse.Namespace) -> None:
    started = time.monotonic()

    def step(text: str) -> None:
        print(f"[{time.monotonic() - started:6.1f} s] {text}", flush=True)

    chosen = scenarios.quick() if arguments.quick else scenarios.full()
    chosen = [scenario for scenario in chosen if arguments.only in scenario.name]
    if not chosen or arguments.rounds < 1:
        raise BenchError(f"nothing to measure: no scenario contains {arguments.only!r}, or --rounds is below 1")
    first = relays.stock(step)
    second = relays.stock(step, side="stock again") if arguments.noise else relays.ours()
    binary = generator.build(step)
    cores = machine.pick_cores()
    tcp = network.describe(network.enter())
    step(tcp)
    allow_many_files()
    effort = scenarios.QUICK_EFFORT if arguments.quick else scenarios.FULL_EFFORT
    hints: dict[str, dict[str, int]] = {first.side: {}, second.side: {}}
    rows: list[report.Row] = []
    for number in range(arguments.rounds):
        order = (first, second) if number % 2 == 0 else (second, first)
        step(f"round {number + 1} of {arguments.rounds}")
        rows += _round(number, order, chosen, Bench(binary, cores, effort, hints), step)
    _write(arguments, rows, (first, second), step)


class Bench:
    """What stays the same through all rounds."""

    def __init__(
        self, binary: Path, cores: machine.Cores, effort: scenarios.Effort, hints: dict[str, dict[str, int]]
    ) -> None:
        self.effort = effort
        self.cores = cores
        self.hints = hints
        self.generators = functools.partial(generator.generating, binary, core=cores.generator)
        self.relay = functools.partial(relays.running, core=cores.relay)

    def rig(self, build: relays.Build, running: relays.Relay) -> scenarios.Rig:
        """What a scenario needs to measure one relay."""
        fresh = functools.partial(self.relay, build)
        return scenarios.Rig(running, self.generators, fresh, self.effort, self.hints[build.side])


def _round(
    number: int,
    order: tuple[relays.Build, relays.Build],
    chosen: Sequence[scenarios.Scenario],
    bench: Bench,
    step: relays.Step,
) -> Iterator[report.Row]:
    with ExitStack() as stack:
        rigs = [(build.side, bench.rig(build, stack.enter_context(bench.relay(build)))) for build in order]
        for scenario in chosen:
            for side, rig in rigs:
                before = machine.sample(bench.cores)
                figures = list(scenario.measure(rig))
                foreign = machine.foreign_share(before, machine.sample(bench.cores))
                shown = ", ".join(f"{figure.name} {figure.value:.4g} {figure.unit}".strip() for figure in figures)
                step(f"{scenario.name} | {side}: {shown}")
                for f in figures:
                    yield report.Row(number, side, scenario.name, f.name, f.value, f.unit, f.better, f.note, foreign)


def _write(
    arguments: argparse.Namespace,
    rows: Sequence[report.Row],
    builds: tuple[relays.Build, relays.Build],
    step: relays.Step,
) -> None:
    sides = (builds[0].side, builds[1].side)
    arguments.output.mkdir(parents=True, exist_ok=True)
    raw = arguments.output / ("noise.csv" if arguments.noise else "results.csv")
    raw.write_text(report.to_csv(rows))
    known = {} if arguments.noise else _known_noise()
    print("\n" + report.table(report.compare(rows, sides), sides, known) + "\n")
    if not arguments.noise:
        facts = [
            f"{time.strftime('%Y-%m-%d')}, {'quick' if arguments.quick else 'full'} run",
            *(f"{build.side}: {build.version}" for build in builds),
            *machine.describe(),
            report.quiet(rows),
        ]
        (arguments.output / "RESULTS.md").write_text(report.results(rows, sides, facts, known))
    step(f"written to {arguments.output.name}/")


def _known_noise() -> dict[tuple[str, str], float]:
    file = HERE / "noise.csv"
    return report.noise_of(report.from_csv(file.read_text())) if file.exists() else {}


def allow_many_files() -> None:
    """As many as the system lets this process and its children open."""
    _soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


if __name__ == "__main__":
    sys.exit(main())
