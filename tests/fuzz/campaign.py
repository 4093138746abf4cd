"""Many targets under atheris for a while, each in a process of its own, and what came of it."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from . import corpus

__all__ = ["Result", "missing", "run", "table"]

_PROGRESS: Final = re.compile(rb"^#(\d+)\s+(\w+)\s+cov: (\d+) ft: (\d+) corp: (\d+)", re.MULTILINE)
_SLOWEST: Final = 60  # seconds for one input; more is a hang
_GRACE: Final = 60  # seconds that a process may take over its time, to start and to end
_MEMORY: Final = 2048  # MiB
_SEED: Final = 1


@dataclass(frozen=True)
class Result:
    """One target's run."""

    target: str
    seconds: int
    executions: int
    coverage: tuple[int, int]  #: edges after the corpus was read, and at the end
    inputs: tuple[int, int]  #: the same of inputs that are worth keeping
    findings: tuple[bytes, ...]  #: inputs that broke an oracle, hung, or took all memory
    log: str

    @property
    def failed(self) -> bool:
        """Whether there is something to look at."""
        return bool(self.findings) or not self.executions


def missing() -> str:
    """Why this machine cannot fuzz; empty if it can."""
    if importlib.util.find_spec("atheris") is None:
        return "atheris is not installed (it needs CPython on x86-64 Linux)"
    return ""


def run(
    targets: Sequence[str],
    seconds: int,
    *,
    runs: int | None = None,
    jobs: int,
    keep: Path | None = None,
    done: Callable[[Result], None],
) -> list[Result]:
    """Run each target for so many seconds, `jobs` at a time; `done` hears of each.

    With `runs` it is so many inputs, the same each time: what a change did not break does not fail by chance.
    `keep` is a folder where what was learnt stays for the next run, besides the corpus of the repository.
    """
    with tempfile.TemporaryDirectory(prefix="derp-fuzz-") as scratch, ThreadPoolExecutor(jobs) as pool:

        def one(target: str) -> Result:
            result = _run_one(target, seconds, runs, Path(scratch) / target, keep / target if keep else None)
            done(result)
            return result

        return list(pool.map(one, targets))


def _run_one(target: str, seconds: int, runs: int | None, scratch: Path, keep: Path | None) -> Result:
    seeds, found, learnt = scratch / "seeds", scratch / "found", keep or scratch / "learnt"
    for folder in (found, learnt):
        folder.mkdir(parents=True, exist_ok=True)
    corpus.expand(target, seeds)
    command = [
        *(sys.executable, "-m", f"{__package__}.engine", target, str(learnt), str(seeds)),
        *(
            f"-max_total_time={seconds}",
            *(() if runs is None else (f"-runs={runs}", f"-seed={_SEED}")),
            f"-timeout={_SLOWEST}",
            f"-rss_limit_mb={_MEMORY}",
            f"-artifact_prefix={found}/",
        ),
    ]
    try:
        ended = subprocess.run(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=seconds + _GRACE + _SLOWEST,
            env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "PYTHONHASHSEED": str(_SEED)},
            check=False,
        )
        log = ended.stdout
    except subprocess.TimeoutExpired as hung:
        log = (hung.stdout or b"") + b"\nthe process did not end in time\n"
    findings = tuple(path.read_bytes() for path in sorted(found.iterdir()))
    return _result(target, seconds, log, findings)


def _result(target: str, seconds: int, log: bytes, findings: tuple[bytes, ...]) -> Result:
    lines = _PROGRESS.findall(log)
    first = next((line for line in lines if line[1] == b"INITED"), lines[0] if lines else None)
    last = lines[-1] if lines else None
    return Result(
        target=target,
        seconds=seconds,
        executions=int(last[0]) if last else 0,
        coverage=(int(first[2]), int(last[2])) if first and last else (0, 0),
        inputs=(int(first[4]), int(last[4])) if first and last else (0, 0),
        findings=findings,
        log=log.decode(errors="replace"),
    )


def table(results: Sequence[Result]) -> str:
    """The figures, for people."""
    lines = [f"{'target':<14}{'seconds':>8}{'executions':>13}{'edges':>14}{'inputs':>14}  findings"]
    for r in results:
        edges, inputs = (f"{before} > {after}" for before, after in (r.coverage, r.inputs))
        lines.append(f"{r.target:<14}{r.seconds:>8}{r.executions:>13,}{edges:>14}{inputs:>14}  {len(r.findings)}")
    lines.append(f"{'all':<14}{sum(r.seconds for r in results):>8}{sum(r.executions for r in results):>13,}")
    return "\n".join(lines)
