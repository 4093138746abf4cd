"""Which transports carry connections: for TLS our own where they are built, else the event loop's."""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Callable
from typing import cast

from ..dial import Secure

try:
    from . import openssl, poller, tlsio
except ImportError:  # not compiled, or there is no OpenSSL that it can use
    tlsio = None  # type: ignore[assignment]

__all__ = ["Transports"]


class Transports:
    """Makes the transports of one event loop.  `contexts` may be dropped when they are not used any more: they are
    kept only as long as their connections."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._poller = None if tlsio is None else poller.Poller(loop)
        self._last: tuple[ssl.SSLContext, openssl.Context] | None = None

    def open(
        self,
        sock: socket.socket,
        context: ssl.SSLContext | None,
        factory: Callable[[], asyncio.BaseProtocol],
        done: Callable[[Exception | None], None],
    ) -> Callable[[], object]:
        """Begin a connection on an accepted socket, with TLS if there is a context.  The socket is the transport's now.

        `done` is called once: with None when the protocol that `factory` made has its transport, else with the reason
        why not.  Returns what gives up the handshake, of which there is no time-out; then nothing is called.
        """
        if context is None or self._poller is None:
            task = self._loop.create_task(self._on_loop(sock, context, factory, done))
            task.add_done_callback(lambda task: sock.close() if task.cancelled() else None)
            return task.cancel
        transport = tlsio.Transport(self._poller, sock, self._context(context), factory, done)
        transport.start()
        return transport.abort

    @property
    def secure(self) -> Secure | None:
        """What makes a connected socket a TLS client's, for `derper.client.Options`; None where the loop must do it."""
        return None if self._poller is None else self._secure

    async def _secure(
        self, sock: socket.socket, context: ssl.SSLContext, server_name: str, protocol: asyncio.Protocol
    ) -> asyncio.Transport:
        up: asyncio.Future[None] = self._loop.create_future()

        def done(error: Exception | None) -> None:
            if not up.done():
                up.set_result(None) if error is None else up.set_exception(error)

        transport = tlsio.Transport(self._poller, sock, openssl.Context(context), lambda: protocol, done, server_name)
        transport.start()
        try:
            await up
        except BaseException:
            transport.abort()
            raise
        return cast(asyncio.Transport, transport)

    def _context(self, context: ssl.SSLContext) -> openssl.Context:
        if self._last is None or self._last[0] is not context:
            self._last = context, openssl.Context(context)
        return self._last[1]

    async def _on_loop(
        self,
        sock: socket.socket,
        context: ssl.SSLContext | None,
        factory: Callable[[], asyncio.BaseProtocol],
        done: Callable[[Exception | None], None],
    ) -> None:
        try:
            await self._loop.connect_accepted_socket(factory, sock, ssl=context)
        except Exception as error:
            if not isinstance(error, OSError):  # but the protocol's
                self._loop.call_exception_handler({"message": "A connection could not begin", "exception": error})
            sock.close()
            done(error)
        else:
            done(None)
