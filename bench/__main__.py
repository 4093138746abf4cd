"""`python -m bench`: relays side by side in one run, interleaved, with medians, ratios and a verdict on each target."""

from __future__ import annotations

import argparse
import functools
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from bench import figures, generator, machine, network, relays, report, scenarios, targets
from bench.command import exit_status
from bench.errors import BenchError, SkipError
from bench.rig import Effort, Known, Rig, Scenario
from bench.starter import Starter

HERE = Path(__file__).parent


def main(argv: Sequence[str] | None = None) -> int:
    """Parses the command line, measures, writes the results. Returns the exit status."""
    arguments = _parser().parse_args(argv)
    return exit_status("bench", lambda: _bench(arguments))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__, allow_abbrev=False)
    parser.add_argument("--quick", action="store_true", help="a few scenarios with short windows, two to three minutes")
    parser.add_argument("--rounds", type=int, help="how often each scenario runs on each relay (default 3; quick 2)")
    parser.add_argument("--only", default="", metavar="TEXT", help="only the scenarios whose name contains this text")
    parser.add_argument("--list", action="store_true", help="the names of the scenarios, and nothing else")
    parser.add_argument("--noise", action="store_true", help="stock derper against itself: how far ratios stray from 1")
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help="where the results go (default: bench/ after a whole full run)"
    )
    return parser


def _bench(arguments: argparse.Namespace) -> None:
    started = time.monotonic()

    def step(text: str) -> None:
        print(f"[{time.monotonic() - started:6.1f} s] {text}", flush=True)

    rounds = arguments.rounds or (2 if arguments.quick else 3)
    chosen = scenarios.quick() if arguments.quick else scenarios.full()
    chosen = [scenario for scenario in chosen if arguments.only in scenario.name]
    if not chosen or rounds < 1:
        raise BenchError(f"nothing to measure: no scenario contains {arguments.only!r}, or --rounds is below 1")
    if arguments.list:
        print("\n".join(scenario.name for scenario in chosen))
        return
    run = _prepare(arguments, step)
    for number in range(rounds):
        step(f"round {number + 1} of {rounds}")
        run.rows += _round(number, run, chosen, step)
    _write(arguments, run, step)


@dataclass
class Run:
    """What stays the same through all rounds, and what they found."""

    builds: tuple[relays.Build, ...]
    binary: Path
    cores: machine.Cores
    effort: Effort
    tcp: str
    known: Known = field(default_factory=Known)
    rows: list[figures.Row] = field(default_factory=list)
    skipped: dict[str, None] = field(default_factory=dict)

    def rig(self, build: relays.Build, running: relays.Relay) -> Rig:
        """What a scenario needs to measure one relay."""
        return Rig(
            side=build.side,
            baseline=self.builds[0].side,
            relay=running,
            relays=Starter(build, self.cores.relay),
            generators=functools.partial(generator.generating, self.binary, core=self.cores.generator),
            cores=(self.cores.relay, self.cores.generator),
            effort=self.effort,
            known=self.known,
        )

    @property
    def sides(self) -> tuple[str, ...]:
        """The names of the relays, the baseline first."""
        return tuple(build.side for build in self.builds)


def _prepare(arguments: argparse.Namespace, step: relays.Step) -> Run:
    stock = relays.stock(step)
    if arguments.noise:
        builds: tuple[relays.Build, ...] = (stock, relays.stock(step, side="stock again"))
    else:
        builds = (stock, relays.ours(), relays.limit(step))
    binary = generator.build(step)
    cores = machine.pick_cores()
    os.sched_setaffinity(0, {cores.generator})  # what this process does meanwhile must not cost the relays
    tcp = network.describe(network.enter())
    step(tcp)
    machine.allow_many_files()
    effort = scenarios.QUICK_EFFORT if arguments.quick else scenarios.FULL_EFFORT
    return Run(builds, binary, cores, effort, tcp)


def _round(number: int, run: Run, chosen: Sequence[Scenario], step: relays.Step) -> Iterator[figures.Row]:
    first = number % len(run.builds)
    order = run.builds if number == 0 else run.builds[first:] + run.builds[:first]
    with ExitStack() as stack:
        rigs = [run.rig(build, stack.enter_context(relays.running(build, core=run.cores.relay))) for build in order]
        for scenario in chosen:
            if scenario.once and number > 0:
                continue
            for rig in rigs:
                yield from _measured(number, run, scenario, rig, step)


def _measured(number: int, run: Run, scenario: Scenario, rig: Rig, step: relays.Step) -> Iterator[figures.Row]:
    before = machine.sample(run.cores)
    try:
        found = list(scenario.measure(rig))
    except SkipError as error:
        run.skipped[f"{scenario.name}: {rig.side} {error}"] = None
        return
    foreign = machine.foreign_share(before, machine.sample(run.cores))
    shown = ", ".join(f"{figure.name} {figure.value:.4g} {figure.unit}".strip() for figure in found)
    step(f"{scenario.name} | {rig.side}: {shown}")
    for f in found:
        yield figures.Row(number, rig.side, scenario.name, f.name, f.value, f.unit, f.better, f.note, foreign)


def _write(arguments: argparse.Namespace, run: Run, step: relays.Step) -> None:
    folder = arguments.output or (None if arguments.quick or arguments.only else HERE)
    known = {} if arguments.noise else _known_noise()
    comparisons = figures.compare(run.rows, run.sides)
    print("\n" + report.table(comparisons, run.sides, known) + "\n")
    if not arguments.noise:
        print(targets.table(targets.judge(comparisons)) + "\n")
    print("".join(f"left out: {line}\n" for line in run.skipped))
    if folder is None:
        return
    folder.mkdir(parents=True, exist_ok=True)
    (folder / ("noise.csv" if arguments.noise else "results.csv")).write_text(figures.to_csv(run.rows))
    if not arguments.noise:
        facts = [
            f"{time.strftime('%Y-%m-%d')}, {'quick' if arguments.quick else 'full'} run",
            *(f"{build.side}: {build.version}" for build in run.builds),
            *machine.describe(),
            run.tcp,
            report.quiet(run.rows),
        ]
        text = report.results(run.rows, run.sides, facts, list(run.skipped), known)
        (folder / "RESULTS.md").write_text(text)
    step(f"written to {folder.name}/")


def _known_noise() -> figures.Noise:
    file = HERE / "noise.csv"
    return figures.noise_of(figures.from_csv(file.read_text())) if file.exists() else {}


if __name__ == "__main__":
    sys.exit(main())
