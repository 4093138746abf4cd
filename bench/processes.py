"""Child processes on one core: pinned, undisturbed as far as that can be had, never left behind."""

from __future__ import annotations

import resource
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
    cores: Sequence[int],
    files: int = 0,
    env: Mapping[str, str] | None = None,
    stdin: int | None = subprocess.DEVNULL,
    stdout: int | IO[bytes] | None = None,
    stderr: int | IO[bytes] | None = None,
) -> Iterator[subprocess.Popen[bytes]]:
    """Runs a command on some cores with raised priority (as root; else with the usual one) until the block ends.

    It may open `files` files, if more than others; `machine.files_allowed` says how many can be had. The kernel ends
    the child when this process dies, however it dies. Raises BenchError when util-linux is missing.
    """
    if not all(map(shutil.which, ("setpriv", "taskset", "prlimit", "nice"))):
        raise BenchError("setpriv, taskset, prlimit and nice are needed: install util-linux and coreutils")
    listed = ",".join(map(str, cores))
    prefix = f"setpriv --pdeathsig KILL taskset --cpu-list {listed} nice --adjustment {PRIORITY}".split()
    if files > resource.getrlimit(resource.RLIMIT_NOFILE)[1]:
        prefix = ["prlimit", f"--nofile={files}:{files}", *prefix]
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
