"""One worker process, as its supervisor sees it."""

from __future__ import annotations

import asyncio
import os
import socket
import sys
from asyncio.subprocess import DEVNULL, Process
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Final, Self

from ..ports import StartError
from .channel import Channel, Handover, Respond
from .messages import VARIABLE, Failed, Order, Place, Pulse

__all__ = ["WorkerProcess"]

_LINK_SECONDS: Final = 5.0  # for a worker to take what leads to another one
_NEXT_TRY: Final = 0.01  # seconds


class WorkerProcess:
    """A worker that has been started.  `pulse` is what it said last, None before its first one and after its end."""

    def __init__(self, number: int, process: Process, handover: Handover) -> None:
        loop = asyncio.get_running_loop()
        self.number = number
        self.handover = handover
        self.channel: Channel
        self.pulse: Pulse | None = None
        self._process = process
        self._given = 0
        self._links = 0  # sockets to others that wait for room
        self._beaten = False
        self._first: asyncio.Future[None] = loop.create_future()
        self._drained = asyncio.Event()

    @classmethod
    async def start(cls, number: int, respond: Respond, pulsed: Callable[[WorkerProcess], None]) -> Self:
        """Run this program's command again as the worker with this number.

        It is a program of its own and no fork: event loop, threads and TLS libraries begin anew.  In a session of its
        own, for what the terminal or the shell sends to the group is meant for the supervisor.  Raises OSError.
        """
        channel, their_channel = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        handover, their_handover = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        theirs = (their_channel.fileno(), their_handover.fileno())
        try:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                *sys.orig_argv[1:],
                stdin=DEVNULL,
                env={**os.environ, VARIABLE: str(Place(number, *theirs))},
                pass_fds=theirs,
                start_new_session=True,
            )
        except BaseException:  # we may be told to stop at any moment
            channel.close()
            handover.close()
            raise
        finally:
            their_channel.close()
            their_handover.close()
        worker = cls(number, process, Handover(handover))

        def note(message: Any) -> None:
            worker._note(message)
            if worker.pulse is not None:
                pulsed(worker)

        try:
            worker.channel = await Channel.open(channel, note, respond, worker._lost)
        except BaseException:
            worker.kill()
            handover.close()
            raise
        return worker

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._process.pid

    @property
    def load(self) -> int:
        """Connections that it has, and those on their way to it."""
        return 0 if self.pulse is None else self.pulse.connections + self._given - self.pulse.taken

    def give(self, label: bytes, sock: socket.socket) -> bool:
        """Hand over a connection, which the caller then closes; false if there is no room for more."""
        given = not self._links and self.handover.give(label, sock)
        self._given += given
        return given

    async def link(self, label: bytes, sock: socket.socket) -> None:
        """Hand over a socket to another worker, and close it here.

        A rush of connections may fill the way to this one: then they wait.  If it takes nothing for long, it is ended.
        """
        self._links += 1
        try:
            async with asyncio.timeout(_LINK_SECONDS):
                while not self.channel.closed and not self.handover.give(label, sock):  # noqa: ASYNC110 - of the system
                    await asyncio.sleep(_NEXT_TRY)
        except TimeoutError:
            self.kill()
        finally:
            self._links -= 1
            sock.close()

    def take_beat(self) -> bool:
        """Whether it has said anything since the last call."""
        beaten, self._beaten = self._beaten, False
        return beaten

    async def started(self) -> None:
        """Wait until it runs.  Raises `StartError` if it cannot."""
        await self._first

    async def is_drained(self) -> None:
        """Wait until its clients have been sent away, or it has ended."""
        await self._drained.wait()

    async def ended(self) -> str:
        """Wait until it has ended; how."""
        status = await self._process.wait()
        self.handover.close()
        return f"signal {-status}" if status < 0 else f"status {status}"

    async def end(self, seconds: float) -> None:
        """Let it end, and make it end if it takes longer."""
        self._first.cancel()  # nobody waits for it any more
        self.channel.tell(Order.END)
        try:
            async with asyncio.timeout(seconds):
                await self.ended()
        except TimeoutError:
            self.kill()
            await self.ended()

    def kill(self) -> None:
        """End it at once."""
        with suppress(ProcessLookupError):
            self._process.kill()

    def _note(self, message: Any) -> None:
        self._beaten = True
        if isinstance(message, Pulse):
            self.pulse = message
            if not self._first.done():
                self._first.set_result(None)
        elif isinstance(message, Failed) and not self._first.done():
            self._first.set_exception(StartError(message.why))
        elif message is Order.DRAIN:
            self._drained.set()

    def _lost(self) -> None:
        self.pulse = None
        self._drained.set()
        if not self._first.done():
            self._first.set_exception(StartError(f"worker {self.number} ended before it had started; see its messages"))
