"""How the supervisor and a worker talk: two sockets, which they have from the moment the worker is started.

`Channel` carries messages and questions both ways, any Python object that can be pickled: both ends are the same
program under the same user, and nobody else has the socket.  `Handover` carries open sockets to the worker.
"""

from __future__ import annotations

import asyncio
import logging
import os
import pickle
import socket
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass
from enum import Enum, auto
from itertools import count
from struct import Struct
from typing import Any, Final, cast

__all__ = ["Channel", "ChannelClosed", "Handover"]

log = logging.getLogger("derper")

_LENGTH: Final = Struct(">I")
_HANDED_AT_ONCE: Final = 64

Respond = Callable[[Any], AsyncGenerator[Any, None]]
"""Answers a question, in pieces if it is long."""


class ChannelClosed(ConnectionError):  # noqa: N818 - as ConnectionResetError
    """The other process is gone."""


class _Kind(Enum):
    NOTE = auto()
    QUESTION = auto()
    ANSWER = auto()
    MORE = auto()  # the next piece may come
    STOP = auto()  # nobody waits for it any more
    END = auto()


Taken = Callable[[bytes, socket.socket | None], None]
"""Takes a label and its socket; without one if this process has no descriptor left, and the system has closed it."""


@dataclass(slots=True)
class _Failure:
    text: str


class Channel(asyncio.Protocol):
    """Messages (`tell`) and questions (`ask`, `stream`).  `note` gets messages, `respond` answers questions."""

    def __init__(self, note: Callable[[Any], None], respond: Respond, lost: Callable[[], None]) -> None:
        self._note = note
        self._respond = respond
        self._lost = lost
        self._transport: asyncio.Transport
        self._buffer = bytearray()
        self._numbers = count()
        self._answers: dict[int, asyncio.Queue[Any]] = {}  # to our questions
        self._tasks: dict[int, asyncio.Task[None]] = {}  # for theirs
        self._taken: dict[int, asyncio.Event] = {}  # whether they want more
        self.closed = False

    @classmethod
    async def open(
        cls, sock: socket.socket, note: Callable[[Any], None], respond: Respond, lost: Callable[[], None]
    ) -> Channel:
        """Talk over a connected socket."""
        loop = asyncio.get_running_loop()
        _, channel = await loop.create_unix_connection(lambda: cls(note, respond, lost), sock=sock)
        return channel

    def tell(self, message: Any) -> None:
        """Send a message; nothing if the other process is gone."""
        self._send(_Kind.NOTE, 0, message)

    async def ask(self, question: Any, seconds: float) -> Any:
        """The answer, or its first piece.  Raises `ChannelClosed`, or TimeoutError if there is none in time."""
        async with asyncio.timeout(seconds), aclosing(self.stream(question)) as answers:
            async for answer in answers:
                return answer
        raise ChannelClosed("there was no answer")

    async def stream(self, question: Any) -> AsyncGenerator[Any, None]:
        """The pieces of an answer, each made when the one before has been taken.  Raises `ChannelClosed`."""
        if self.closed:
            raise ChannelClosed("the other process is gone")
        number = next(self._numbers)
        waiting = self._answers[number] = asyncio.Queue()
        self._send(_Kind.QUESTION, number, question)
        kind = None
        try:
            while True:
                kind, piece = await waiting.get()
                if kind is not _Kind.ANSWER:
                    break
                yield piece
                self._send(_Kind.MORE, number, None)
        finally:
            del self._answers[number]
            if kind is not _Kind.END:
                self._send(_Kind.STOP, number, None)
        if isinstance(piece, _Failure):
            raise ChannelClosed(piece.text)

    def close(self) -> None:
        """Close; `lost` is called."""
        self._transport.abort()

    # -- asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """The channel is open."""
        self._transport = cast(asyncio.Transport, transport)

    def connection_lost(self, exc: Exception | None) -> None:
        """The other process is gone."""
        self.closed = True
        for waiting in self._answers.values():
            waiting.put_nowait((_Kind.END, _Failure("the other process is gone")))
        for task in self._tasks.values():
            task.cancel()
        self._lost()

    def data_received(self, data: bytes) -> None:
        """Handle every whole message."""
        self._buffer += data
        while len(self._buffer) >= _LENGTH.size:
            end = _LENGTH.size + _LENGTH.unpack_from(self._buffer)[0]
            if len(self._buffer) < end:
                return
            message = pickle.loads(memoryview(self._buffer)[_LENGTH.size : end])
            del self._buffer[:end]
            self._receive(*message)

    def _receive(self, kind: _Kind, number: int, content: Any) -> None:
        if kind is _Kind.NOTE:
            self._note(content)
        elif kind is _Kind.QUESTION:
            self._taken[number] = asyncio.Event()
            self._tasks[number] = asyncio.get_running_loop().create_task(self._answer(number, content))
        elif kind is _Kind.MORE:
            if number in self._taken:
                self._taken[number].set()
        elif kind is _Kind.STOP:
            if number in self._tasks:
                self._tasks[number].cancel()
        elif number in self._answers:
            self._answers[number].put_nowait((kind, content))

    async def _answer(self, number: int, question: Any) -> None:
        failure, taken = None, self._taken[number]
        try:
            async with aclosing(self._respond(question)) as pieces:
                async for piece in pieces:
                    taken.clear()
                    self._send(_Kind.ANSWER, number, piece)
                    await taken.wait()
        except ChannelClosed as error:  # of the channel through which the answer came
            failure = _Failure(str(error))
        except Exception as error:
            log.exception("cannot answer %r", question)
            failure = _Failure(f"the other process failed: {error}")
        finally:
            del self._taken[number], self._tasks[number]
        self._send(_Kind.END, number, failure)

    def _send(self, kind: _Kind, number: int, content: Any) -> None:
        if not self.closed:
            data = pickle.dumps((kind, number, content), pickle.HIGHEST_PROTOCOL)
            self._transport.write(_LENGTH.pack(len(data)) + data)


class Handover:
    """Open sockets on their way to a worker, each with a label of one or more bytes."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._sock = sock

    def give(self, label: bytes, sock: socket.socket) -> bool:
        """Hand over a socket, which the caller then closes.  False if too many are on their way, or nobody is there."""
        try:
            socket.send_fds(self._sock, [label], [sock.fileno()])
        except OSError:
            return False
        return True

    def receive(self, taken: Taken) -> None:
        """Call `taken` for each socket that comes, from now on."""
        loop = asyncio.get_running_loop()
        loop.add_reader(self._sock.fileno(), self._take, taken)

    def close(self) -> None:
        """No more."""
        if self._sock.fileno() >= 0:
            asyncio.get_running_loop().remove_reader(self._sock.fileno())
            self._sock.close()

    def _take(self, taken: Taken) -> None:
        for _ in range(_HANDED_AT_ONCE):
            try:
                label, descriptors, _, _ = socket.recv_fds(self._sock, 64, 1)
            except BlockingIOError:
                return
            except OSError:
                continue
            if not label:  # the other end is gone
                self.close()
                return
            if not descriptors:
                taken(label, None)
            for descriptor in descriptors:
                os.set_inheritable(descriptor, False)
                taken(label, socket.socket(fileno=descriptor))
