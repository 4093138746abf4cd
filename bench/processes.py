"""Child processes on one core: pinned, undisturbed as far as that can be had, never left behind."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from bench.errors import BenchError

PRIORITY = -15


@contextmanager
def pinned(
    command: Sequence[str],
    *,
    core: int,
    env: Mapping[str, str] | None = None,
    stdin: int | None = subprocess.DEVNULL,
    stdout: int | IO[bytes] | None = None,
    stderr: int | IO[bytes] | None = None,
) -> Iterator[subprocess.Popen[bytes]]:
    """Runs a command on one core with raised priority (as root; else with the usual one) until the block ends.

    The kernel ends the child when this process dies, however it dies. Raises BenchError when util-linux is missing.
    """
    if not all(map(shutil.which, ("setpriv", "taskset", "nice"))):
        raise BenchError("setpriv, taskset and nice are needed: install util-linux and coreutils")
    prefix = f"setpriv --pdeathsig KILL taskset --cpu-list {core} nice --adjustment {PRIORITY}".split()
    process = subprocess.Popen(
        [*prefix, *command], env=env, stdin=stdin, stdout=stdout, stderr=stderr, start_new_session=True
    )
    try:
        # Where the kernel groups processes by session, priorities count within one only: so the session needs one too.
        with suppress(OSError):
            Path(f"/proc/{process.pid}/autogroup").write_text(str(PRIORITY))
        yield process
    finally:
        if process.stdin:
            with suppress(BrokenPipeError):
                process.stdin.close()
        process.terminate()
        try:
            process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if process.stdout:
            process.stdout.close()
