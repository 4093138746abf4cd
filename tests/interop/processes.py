"""Child processes of the tests: each in a group of its own, ended by it, its log kept for the failure message."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import re
import shutil
import signal
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

Event = dict[str, Any]

HANG = 60.0
"""Seconds after which a test is taken to hang. Never a measure of speed."""

# A run of tests that is killed takes along what cannot notice it (Linux; setpriv is part of util-linux).
TETHER = ("setpriv", "--pdeathsig", "KILL", "--") if shutil.which("setpriv") else ()

LINE_LIMIT = 4 << 20
LOG_TAIL = 4000


class PeerError(Exception):
    """A peer said no: the text is the peer's own error."""


class ProcessEndedError(Exception):
    """A process ended before it did what was waited for; the text has the end of its log."""


class Child:
    """A process with its output in `log`. Use as an async context manager: leaving it ends the process."""

    def __init__(self, argv: Sequence[str | Path], log: Path, env: Mapping[str, str] | None = None) -> None:
        self.argv = [str(arg) for arg in argv]
        self.log = log
        self.env = {**os.environ, **(env or {})}
        self.process: asyncio.subprocess.Process | None = None

    async def __aenter__(self) -> Self:
        try:
            await self.start()
        except BaseException:
            await self.stop()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def start(self) -> None:
        """Start the process; a subclass also waits until it does its work."""
        with self.log.open("ab") as log:
            self.process = await asyncio.create_subprocess_exec(
                *TETHER,
                *self.argv,
                env=self.env,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                process_group=0,
            )

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    @property
    def running(self) -> bool:
        return self.process is not None and self.process.returncode is None

    def send_signal(self, number: int) -> None:
        """Send a signal to the whole group."""
        if self.running:
            os.killpg(self.pid, number)

    async def stop(self, number: int = signal.SIGTERM, patience: float = 15.0) -> int | None:
        """End the process and return its exit status. One that has not ended after `patience` seconds is killed."""
        if self.process is None:
            return None
        self.send_signal(number)
        return await self.ended(patience)

    async def kill(self) -> None:
        """End the process without a chance to say goodbye."""
        await self.stop(signal.SIGKILL)

    async def ended(self, patience: float) -> int:
        assert self.process is not None
        try:
            async with asyncio.timeout(patience):
                await self.process.wait()
        except TimeoutError:
            self.send_signal(signal.SIGKILL)
            await self.process.wait()
        assert self.process.returncode is not None
        return self.process.returncode

    def log_text(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    async def logged(self, pattern: str, count: int = 1) -> None:
        """Wait until the log has `count` matches of a regular expression."""
        async with asyncio.timeout(HANG):
            while len(re.findall(pattern, self.log_text())) < count:  # noqa: ASYNC110 -- a log tells of no change
                await asyncio.sleep(0.02)

    def died(self) -> ProcessEndedError:
        status = self.process.returncode if self.process else None
        return ProcessEndedError(
            f"{Path(self.argv[0]).name} ended with status {status}:\n{self.log_text()[-LOG_TAIL:]}"
        )


class LineProcess(Child):
    """A peer that takes commands on stdin and tells events on stdout, as JSON, one a line (see peers/lines.go)."""

    def __init__(self, argv: Sequence[str | Path], log: Path, env: Mapping[str, str] | None = None) -> None:
        super().__init__(argv, log, env)
        self._numbers = itertools.count(1)
        self._replies: dict[int, asyncio.Future[Event]] = {}
        self._reader: asyncio.Task[None] | None = None
        self._gone = asyncio.Event()
        self.events = Events()

    async def start(self) -> None:
        with self.log.open("ab") as log:
            self.process = await asyncio.create_subprocess_exec(
                *self.argv,
                env=self.env,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=log,
                process_group=0,
                limit=LINE_LIMIT,
            )
        self._reader = asyncio.create_task(self._read())

    async def stop(self, number: int = signal.SIGTERM, patience: float = 15.0) -> int | None:
        """End the process by the end of its stdin; see Child.stop for what follows if it does not end."""
        if self.process is None:
            return None
        assert self.process.stdin is not None
        self.process.stdin.close()
        status = await self.ended(patience)
        if self._reader is not None:
            await self._reader
        return status

    async def command(self, cmd: str, **members: object) -> Event:
        """Run one command and return its answer. Raises PeerError with the peer's own words if it failed."""
        assert self.process is not None
        assert self.process.stdin is not None
        number = next(self._numbers)
        line = json.dumps({"cmd": cmd, "seq": number, **members}) + "\n"
        if self._gone.is_set():
            raise self.died()
        answer = self._replies[number] = asyncio.get_running_loop().create_future()
        self.process.stdin.write(line.encode())
        await self.process.stdin.drain()
        async with asyncio.timeout(HANG):
            reply: Event = await answer
        if error := reply.get("error"):
            raise PeerError(error)
        return reply

    def dispatch(self, event: Event) -> None:
        """Where an event goes that answers no command; subclasses sort them by client."""
        self.events.add(event)

    async def _read(self) -> None:
        assert self.process is not None
        assert self.process.stdout is not None
        while line := await self.process.stdout.readline():
            event: Event = json.loads(line)
            if event["event"] != "reply":
                self.dispatch(event)
            elif not (waiting := self._replies.pop(event["seq"])).done():
                waiting.set_result(event)
        await self.process.wait()
        self._gone.set()
        self.end_events()
        for answer in self._replies.values():
            if not answer.done():
                answer.set_exception(self.died())

    def end_events(self) -> None:
        """No event can come any more: wake those who wait for one."""
        self.events.end(self.died())


class Events:
    """Events in the order in which they came, each to be taken once."""

    def __init__(self) -> None:
        self.pending: list[Event] = []
        self._changed = asyncio.Event()
        self._over: Exception | None = None

    def add(self, event: Event) -> None:
        self.pending.append(event)
        self._changed.set()

    def end(self, why: Exception) -> None:
        self._over = why
        self._changed.set()

    def take(self, name: str, where: Callable[[Event], bool] = lambda _: True) -> Event | None:
        """The oldest event of that name that satisfies `where`, if there is one."""
        for i, event in enumerate(self.pending):
            if event["event"] == name and where(event):
                return self.pending.pop(i)
        return None

    async def expect(
        self, name: str, where: Callable[[Event], bool] = lambda _: True, *, patience: float = HANG
    ) -> Event:
        """Wait for an event of that name that satisfies `where`, and take it."""
        try:
            async with asyncio.timeout(patience):
                while (event := self.take(name, where)) is None:
                    if self._over is not None:
                        raise self._over
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            raise AssertionError(f"no event {name!r} within {patience:g} s; there are {self.pending[-20:]}") from None
        return event
