"""A supervisor that has no worker."""

from __future__ import annotations

import asyncio
import errno
import logging
import random
from typing import Any

import pytest

from derper.commands import status
from derper.config import parse_flags
from derper.ports import StartError
from derper.totals import total_status
from derper.workers import supervisor as supervisor_module
from derper.workers.process import WorkerProcess
from derper.workers.supervisor import Supervisor

from .loopback import PATIENCE, until

pytestmark = pytest.mark.both_loops


async def too_many(*_: Any) -> WorkerProcess:
    raise OSError(errno.EAGAIN, "Resource temporarily unavailable")


@pytest.fixture
def supervisor(monkeypatch: pytest.MonkeyPatch) -> Supervisor:
    """It cannot start any process."""
    monkeypatch.setattr(WorkerProcess, "start", too_many)
    flags = ["-dev", "-a", "127.0.0.1:0", "-stun=false"]
    return Supervisor(parse_flags(flags, {}, is_root=False), 2, rng=random.Random(1))


class Ended:
    """A worker that is no more."""

    pid = 70
    pulse = None

    async def ended(self) -> str:
        return "status 1"


async def test_no_process_at_the_start(supervisor: Supervisor) -> None:
    with pytest.raises(
        StartError, match=r"^cannot start 2 workers: resource temporarily unavailable; try fewer with -workers$"
    ):
        await supervisor.start()


async def test_no_process_later(
    supervisor: Supervisor, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It is tried ever more seldom, however long the last worker has lived."""
    monkeypatch.setattr(supervisor_module, "_FIRST_RETRY", 0.001)
    monkeypatch.setattr(supervisor_module, "_LAST_RETRY", 0.004)
    caplog.set_level(logging.ERROR)

    supervisor._workers[0] = Ended()  # type: ignore[assignment]
    keeper = asyncio.create_task(supervisor._keep(0))
    await until(lambda: len([r for r in caplog.messages if "starting it again" in r]) >= 4)
    keeper.cancel()
    waits = [text.rpartition(" in ")[2] for text in caplog.messages if "starting it again" in text]
    assert waits[:4] == ["0.001 s", "0.002 s", "0.004 s", "0.004 s"]
    assert "derper: cannot start worker 0: resource temporarily unavailable" in caplog.messages


async def test_what_derper_status_says_then(supervisor: Supervisor) -> None:
    supervisor._workers[0] = Ended()  # type: ignore[assignment]
    lines = status._as_text(total_status(await supervisor.gather("status"))).splitlines()
    assert lines[:3] == [
        "the relay does not serve: no worker runs",
        "problem: worker 0 does not run",
        "no worker answers",
    ]
    assert lines[-1].split() == ["0", "70", "no", "-", "-", "-", "0"]


async def test_no_worker_is_started_anew_while_it_drains(supervisor: Supervisor) -> None:
    supervisor._workers[0] = Ended()  # type: ignore[assignment]
    supervisor._draining = True
    async with asyncio.timeout(PATIENCE):
        await supervisor._keep(0)
    assert supervisor._restarts[0] == 0
