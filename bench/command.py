"""What every command of the benchmark does around its work."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable

from bench.errors import BenchError

__all__ = ["exit_status"]


def exit_status(name: str, work: Callable[[], int | None]) -> int:
    """Does the work, which may return a status; a BenchError becomes one line that begins with `name`.

    Cleans up on SIGTERM and Ctrl-C, too.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        return work() or 0
    except BenchError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
