"""The process around a relay."""

from __future__ import annotations

import asyncio
import gc
import os
import resource
import signal
import sys

from derper import runtime


def test_as_many_files_as_allowed() -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(1024, before[1]), before[1]))
        runtime.raise_file_limit()
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (before[1], before[1])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_the_collector_leaves_alone_what_lives_long() -> None:
    before = gc.get_threshold()
    try:
        runtime.settle()
        assert gc.get_freeze_count() > 10_000
        assert gc.get_threshold()[0] >= 2000
        assert gc.get_threshold()[2] >= 1000 or sys.version_info >= (3, 14)  # which looks at a part at a time
    finally:
        gc.unfreeze()
        gc.set_threshold(*before)


async def test_signals() -> None:
    """SIGTERM and SIGINT are heard; the users' signals do nothing, rather than end the process."""
    loop, numbers = asyncio.get_running_loop(), (signal.SIGTERM, signal.SIGINT)
    before = {number: signal.getsignal(number) for number in (*numbers, signal.SIGUSR1, signal.SIGUSR2)}
    try:
        stop = runtime.stop_signals()
        os.kill(os.getpid(), signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGUSR2)
        for number in numbers:
            assert not stop.is_set()
            os.kill(os.getpid(), number)
            await stop.wait()
            stop.clear()
    finally:
        for number in numbers:
            loop.remove_signal_handler(number)
        for number, handler in before.items():
            signal.signal(number, handler)
