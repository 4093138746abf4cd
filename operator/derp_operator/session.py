"""Sessions with the API server that leave no connection behind."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from typing import Protocol
from weakref import WeakSet

import aiohttp

from . import names


class Connection(Protocol):
    """Where the API server is and how to prove who we are; kopf's `ConnectionInfo` is one."""

    @property
    def server(self) -> str: ...

    def as_ssl_context(self) -> ssl.SSLContext: ...

    def as_http_headers(self) -> dict[str, str]: ...


class Session:
    """A session of aiohttp, `http`, with the API server at `server`.  The caller closes it, in the loop that made it.

    `limit` is the most connections at a time, 0 for any number; `timeout` is in seconds, for one request as a whole.

    aiohttp forgets a connection as soon as its request is cancelled: TLS takes leave of the other side in the
    background, and a loop that ends before the other side has answered leaves the socket open.  So this keeps count of
    the sockets.
    """

    def __init__(self, connection: Connection, *, limit: int = 0, timeout: float | None = None) -> None:
        self._sockets: WeakSet[_Socket] = WeakSet()
        self.server = connection.server.rstrip("/")
        self.http = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(
                ssl=connection.as_ssl_context(), limit=limit, socket_factory=self._new_socket
            ),
            headers={"User-Agent": names.MANAGER} | connection.as_http_headers(),
            timeout=aiohttp.ClientTimeout(total=timeout),
        )

    async def close(self) -> None:
        """End every connection, and return when all are closed.  Waits for nothing that the other side does."""
        await self.http.close()
        for left in tuple(self._sockets):
            with contextlib.suppress(OSError):  # closed, or not connected yet: then it closes with its request
                left.shutdown(socket.SHUT_RDWR)  # to the transport, the other side has gone
            await left.closed.wait()

    def _new_socket(self, address: aiohttp.AddrInfoType) -> socket.socket:
        family, kind, protocol, *_ = address
        made = _Socket(family, kind, protocol)
        self._sockets.add(made)
        return made


class _Socket(socket.socket):
    """Tells when it is closed."""

    def __init__(self, family: int, kind: int, protocol: int) -> None:
        super().__init__(family, kind, protocol)
        self.closed = asyncio.Event()

    def close(self) -> None:
        super().close()
        self.closed.set()
