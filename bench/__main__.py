"""`python -m bench`: relays side by side in one run, interleaved, with medians, ratios and a verdict on each target."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from bench import figures, generator, machine, network, raw, relays, report, scenarios, sizing, targets
from bench.ceilings import EDGE
from bench.command import exit_status
from bench.errors import BenchError
from bench.rig import Known, Scenario
from bench.run import Run

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
        "--output", type=Path, metavar="DIR", help="where the results go (default: bench/, unless --quick or --only)"
    )
    parser.add_argument(
        "--resume", action="store_true", help="go on with the raw figures of a run that was ended: measure what lacks"
    )
    parser.add_argument(
        "--seconds",
        type=float,
        metavar="N",
        help=f"end after the scenario that runs then, with status {os.EX_TEMPFAIL} if others are left to --resume",
    )
    parser.add_argument("--report", action="store_true", help="measure nothing: write the results from the raw figures")
    parser.add_argument("--sizing", action="store_true", help="measure nothing: write the figures of docs/sizing.md")
    return parser


def _bench(arguments: argparse.Namespace) -> int:
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
    elif arguments.sizing:
        sizing.write(raw.read(HERE / "results.csv").rows, raw.read(HERE / "scale.csv").rows)
    elif arguments.report:
        _write(arguments, raw.read(_file(arguments) or HERE / "results.csv"))
    else:
        return _measure(arguments, chosen, rounds, step)
    return 0


def _measure(arguments: argparse.Namespace, chosen: Sequence[Scenario], rounds: int, step: relays.Step) -> int:
    limit = None if arguments.seconds is None else time.monotonic() + arguments.seconds
    run = _prepare(arguments, limit, step)
    if not run.measure(chosen, rounds, step):
        step("not all is measured: go on with --resume")
        return os.EX_TEMPFAIL
    _write(arguments, run.raw)
    step("done")
    return 0


def _prepare(arguments: argparse.Namespace, limit: float | None, step: relays.Step) -> Run:
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
    facts = [
        f"begun on {time.strftime('%Y-%m-%d')}",
        f"{'quick' if arguments.quick else 'full'} run, load generator {binary.parent.name}",
        *(f"{build.side}: {build.version}" for build in builds),
        *machine.describe(),
        tcp,
    ]
    known, file = Known(_ends_of_searches()), _file(arguments)
    kept = raw.resume(file, facts) if file and arguments.resume else raw.begin(file, facts)
    effort = scenarios.QUICK_EFFORT if arguments.quick else scenarios.FULL_EFFORT
    return Run(builds, binary, cores, effort, known, kept, limit)


def _file(arguments: argparse.Namespace) -> Path | None:
    """Where the raw figures are kept; None for a run that is only to be looked at."""
    kept = arguments.resume or arguments.report or not (arguments.quick or arguments.only)
    folder = arguments.output or (HERE if kept else None)
    return folder / ("noise.csv" if arguments.noise else "results.csv") if folder else None


def _ends_of_searches() -> list[figures.Row]:
    """Where searches ended in the run before: to begin there saves time, and does not change where they end."""
    file = HERE / "results.csv"
    return [row for row in raw.read(file).rows if row.figure == EDGE] if file.exists() else []


def _write(arguments: argparse.Namespace, found: raw.Raw) -> None:
    known = {} if arguments.noise else _known_noise()
    comparisons = figures.compare(found.rows, found.sides)
    print("\n" + report.table(comparisons, found.sides, known) + "\n")
    if arguments.noise:
        return
    print(targets.table(targets.judge(comparisons)) + "\n")
    if found.path:
        facts = [*found.facts, report.quiet(found.rows)]
        found.path.with_name("RESULTS.md").write_text(report.results(found.rows, found.sides, facts, known))


def _known_noise() -> figures.Noise:
    file = HERE / "noise.csv"
    return figures.noise_of(raw.read(file).rows) if file.exists() else {}


if __name__ == "__main__":
    sys.exit(main())
