"""A TLS server of one transport's kind, whose protocols note each callback and watch over asyncio's contract."""

from __future__ import annotations

import asyncio
import os
import socket
import ssl
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from functools import cache
from typing import Any, TypeVar

from derper.net.tls import ServerTLS
from derper.net.transports import Transports

from .loopback import HOST_NAME, PATIENCE, pair_for, until
from .tlspeer import Peer

_P = TypeVar("_P", bound=asyncio.BaseProtocol)

__all__ = ["Buffered", "Gate", "Plain", "Watched", "descriptors", "pattern", "server_context"]


@cache
def pattern(size: int, start: int = 0) -> bytes:
    """Bytes of which a misplaced one is seen."""
    return b"".join((number * 2654435761 % 2**32).to_bytes(4) for number in range(start, start + size // 4 + 1))[:size]


def descriptors() -> Counter[str]:
    """The sockets and epoll instances of this process."""
    found = []
    for name in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):
            found.append(os.readlink(f"/proc/self/fd/{name}").rstrip("[0123456789]"))
    return Counter(what for what in found if what.startswith(("socket:", "anon_inode:[eventpoll")))


class Watched:
    """What protocols of both kinds have.  Each callback is noted, and may be replaced by an attribute `on_...`."""

    def __init__(self) -> None:
        self.calls: list[str] = []  # runs of the same call are noted once, and get_buffer not at all
        self.data = bytearray()
        self.error: BaseException | None = None
        self.lost = asyncio.Event()
        self.is_full = False
        self.transport: Any = None
        self.on_made: Callable[[], object] = lambda: None
        self.on_data: Callable[[], object] = lambda: None
        self.on_eof: Callable[[], object] = lambda: None
        self.on_pause: Callable[[], object] = lambda: None
        self.on_resume: Callable[[], object] = lambda: None
        self.on_lost: Callable[[], object] = lambda: None
        self._depth = 0

    def call(self, name: str, hook: Callable[[], object]) -> None:
        """Note it, and see that it may come now."""
        assert not self.lost.is_set(), f"{name} after connection_lost"
        assert name != "lost" or not self._depth, "connection_lost within a callback"
        if name != "get" and self.calls[-1:] != [name]:
            self.calls.append(name)
        self._depth += 1
        try:
            hook()
        finally:
            self._depth -= 1

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport
        self.call("made", self.on_made)

    def eof_received(self) -> bool:
        self.call("eof", self.on_eof)
        return False

    def pause_writing(self) -> None:
        assert not self.is_full
        self.is_full = True
        self.call("pause", self.on_pause)

    def resume_writing(self) -> None:
        assert self.is_full
        self.is_full = False
        self.call("resume", self.on_resume)

    def connection_lost(self, exc: BaseException | None) -> None:
        self.call("lost", self.on_lost)
        self.error = exc
        self.lost.set()

    async def end(self) -> list[str]:
        """Wait for the connection's end.  All calls."""
        async with asyncio.timeout(PATIENCE):
            await self.lost.wait()
        return self.calls


class Plain(Watched, asyncio.Protocol):
    """Is given bytes."""

    def data_received(self, data: bytes) -> None:
        assert type(data) is bytes
        assert data
        self.data += data
        self.call("data", self.on_data)


class Buffered(Watched, asyncio.BufferedProtocol):
    """Has a buffer, of which it lends `room` bytes."""

    def __init__(self, room: int = 1 << 18) -> None:
        super().__init__()
        self.buffer = bytearray(room)
        self.room = room
        self.on_get: Callable[[], object] = lambda: None

    def get_buffer(self, sizehint: int) -> memoryview:
        self.call("get", self.on_get)
        return memoryview(self.buffer)[: self.room]

    def buffer_updated(self, nbytes: int) -> None:
        assert 0 < nbytes <= self.room
        self.data += self.buffer[:nbytes]
        self.call("data", self.on_data)


class _Counting:
    """The loop, and how often it found that a poller has something to do."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self.turns = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loop, name)

    def add_reader(self, fd: int, callback: Callable[[], object]) -> None:
        def counted() -> None:
            self.turns += 1
            callback()

        self._loop.add_reader(fd, counted)


class Gate:
    """Accepts on a port.  Small socket buffers make both sides wait for each other soon."""

    def __init__(self, *, own: bool, buffers: int | None = None, context: ssl.SSLContext | None = None) -> None:
        self.own = own
        self.loop = asyncio.get_running_loop()
        self._counting: Any = self.loop
        if own:
            self._counting = _Counting(self.loop)
        self.transports = Transports(self._counting)
        self.context = context or server_context()
        self.results: list[Exception | None] = []
        self.peers: list[Peer] = []
        self._buffers = buffers
        self._sock = socket.create_server(("127.0.0.1", 0), backlog=512)
        self._sock.setblocking(False)
        if buffers is not None:
            for option in (socket.SO_RCVBUF, socket.SO_SNDBUF):
                self._sock.setsockopt(socket.SOL_SOCKET, option, buffers)

    async def dial(self, context: ssl.SSLContext | None = None, session: ssl.SSLSession | None = None) -> Peer:
        """A connection that is not accepted yet."""
        sock = socket.socket()
        sock.setblocking(False)
        if self._buffers is not None:
            for option in (socket.SO_RCVBUF, socket.SO_SNDBUF):
                sock.setsockopt(socket.SOL_SOCKET, option, self._buffers)
        await self.loop.sock_connect(sock, self._sock.getsockname())
        peer = Peer(sock, context, session)
        self.peers.append(peer)
        return peer

    async def accept(self, factory: Callable[[], asyncio.BaseProtocol]) -> Callable[[], object]:
        """Accept one; its result comes to `results`.  Returns what gives it up."""
        sock, _ = await self.loop.sock_accept(self._sock)
        sock.setblocking(False)
        return self.transports.open(sock, self.context, factory, self.results.append)

    async def connect(
        self, protocol: _P, context: ssl.SSLContext | None = None, session: ssl.SSLSession | None = None
    ) -> tuple[Peer, _P]:
        """Both ends of a connection."""
        peer = await self.dial(context, session)
        await self.accept(lambda: protocol)
        count = len(self.results)
        await peer.handshake()
        await until(lambda: len(self.results) > count)
        assert self.results[-1] is None
        return peer, protocol

    async def is_idle(self) -> bool:
        """Whether nothing goes on now.  Only our own poller can be asked."""
        if self.own:
            await asyncio.sleep(0.01)  # for what is under way
            before = self._counting.turns
            for _ in range(50):
                await asyncio.sleep(0)
            return bool(self._counting.turns - before <= 2)
        return True

    def close(self) -> None:
        self._sock.close()
        for peer in self.peers:
            peer.sock.close()


@cache
def _served() -> ServerTLS:
    tls = ServerTLS("00" * 32)
    tls.load([pair_for(HOST_NAME)], datetime.now(UTC))
    return tls


def server_context() -> ssl.SSLContext:
    """As the relay's."""
    return _served().certificates[0].context
