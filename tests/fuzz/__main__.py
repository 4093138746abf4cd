"""`python -m tests.fuzz`: fuzz targets, replay the corpus, add to it."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from . import campaign, corpus, targets

_LOG_TAIL = 3000


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; 1 if something was found."""
    options = _parser().parse_args(arguments)
    unknown = set(options.targets) - set(targets.names())
    if unknown:
        print(f"fuzz: there is no target {min(unknown)!r}; there are {', '.join(targets.names())}", file=sys.stderr)
        return 2
    chosen = options.targets or targets.names()
    if options.command == "run":
        return _run(chosen, options)
    if options.command == "seeds":
        return _seeds(chosen)
    if options.command == "add":
        return _add(options.targets[0] if options.targets else "", options.file)
    return _replay(chosen)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__, allow_abbrev=False)
    parser.add_argument("command", choices=["run", "replay", "seeds", "add"])
    parser.add_argument("targets", nargs="*", help=f"{', '.join(targets.names())}; all without it")
    parser.add_argument("--seconds", type=int, default=60, help="for each target (default 60)")
    parser.add_argument("--runs", type=int, help="the same so many inputs each time, and no more")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="targets at a time (default: cores)")
    parser.add_argument("--keep", type=Path, help="folder for what is learnt, to go on from there")
    parser.add_argument("--file", type=Path, help="for add: an input that broke something")
    return parser


def _run(chosen: Sequence[str], options: argparse.Namespace) -> int:
    why = campaign.missing()
    if why:
        print(f"fuzz: skipped {', '.join(chosen)}: {why}; the unit tests replay the corpus all the same")
        return 0

    def done(result: campaign.Result) -> None:
        print(f"fuzz: {result.target}: {result.executions:,} executions, {len(result.findings)} findings", flush=True)
        if result.failed:
            print(result.log[-_LOG_TAIL:], flush=True)
        for data in result.findings:
            print(f"fuzz: {result.target} fails with {data!r}", flush=True)

    results = campaign.run(chosen, options.seconds, runs=options.runs, jobs=options.jobs, keep=options.keep, done=done)
    print(campaign.table(results))
    return 1 if any(result.failed for result in results) else 0


def _replay(chosen: Sequence[str]) -> int:
    for name in chosen:
        target, inputs = targets.load(name), corpus.entries(name)
        for data in inputs:
            target.run(data)
        print(f"fuzz: {name}: {len(inputs)} inputs hold")
    return 0


def _seeds(chosen: Sequence[str]) -> int:
    for name in chosen:
        print(f"fuzz: {name}: {corpus.add(name, targets.load(name).seeds())} new seeds")
    return 0


def _add(name: str, file: Path | None) -> int:
    if not name or file is None:
        print("fuzz: usage: python -m tests.fuzz add TARGET --file INPUT", file=sys.stderr)
        return 2
    print(f"fuzz: {name}: {corpus.add(name, [file.read_bytes()], comment='regression')} added")
    return 0


if __name__ == "__main__":
    sys.exit(main())
