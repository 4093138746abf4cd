"""Named steps with elapsed time, so that a person sees what runs, how long it took, and that it lives."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TextIO, TypeVar

HEARTBEAT_SECONDS = 15.0
POLL_SECONDS = 0.05

T = TypeVar("T")


class ClusterError(Exception):
    """Something failed; the text is one sentence for the person at the terminal."""


class UnsupportedError(ClusterError):
    """This machine cannot do it; the text says what is missing and what to do instead."""


class Steps:
    """Prints ``[elapsed] step`` lines; within a long step a line every 15 s says that it is still running."""

    def __init__(self, out: TextIO = sys.stderr, clock: Callable[[], float] = time.monotonic) -> None:
        self._out = out
        self._clock = clock
        self._start = clock()

    def say(self, text: str) -> None:
        print(f"[{self._clock() - self._start:6.1f} s] {text}", file=self._out, flush=True)

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        self.say(name)
        began = self._clock()
        over = threading.Event()
        heart = threading.Thread(target=self._beat, args=(name, began, over), daemon=True)
        heart.start()
        try:
            yield
        finally:
            over.set()
            heart.join()

    def _beat(self, name: str, began: float, over: threading.Event) -> None:
        while not over.wait(HEARTBEAT_SECONDS):
            self.say(f"  {name}: still at it after {self._clock() - began:.0f} s")


def run(
    argv: Sequence[str | Path], *, log: Path, env: Mapping[str, str] | None = None, cwd: Path | None = None
) -> None:
    """Run a long command with its output in a log file; raises ClusterError with the log's last lines."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as output:
        done = subprocess.run(argv, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=env, cwd=cwd)
    if done.returncode:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
        raise ClusterError(f"{Path(argv[0]).name} failed with status {done.returncode}; the end of {log} says:\n{tail}")


def output(argv: Sequence[str | Path], *, stdin: str | IO[bytes] = "") -> str:
    """Run a short command and return what it prints; raises ClusterError with its complaint."""
    if isinstance(stdin, str):
        done = subprocess.run(argv, input=stdin, capture_output=True, text=True)
    else:
        done = subprocess.run(argv, stdin=stdin, capture_output=True, text=True)
    if done.returncode:
        raise ClusterError(f"`{' '.join(map(str, argv))}` failed: {(done.stderr or done.stdout).strip()}")
    return done.stdout


def wait_for(look: Callable[[], T | None], *, otherwise: str, timeout: float = 120.0) -> T:
    """Look until there is something true to see, and return it; raises ClusterError(otherwise) after `timeout` s."""
    deadline = time.monotonic() + timeout
    while not (seen := look()):
        if time.monotonic() > deadline:
            raise ClusterError(f"{otherwise} within {timeout:.0f} s")
        time.sleep(POLL_SECONDS)
    return seen
