"""Accepting connections: a limit on new ones, socket options, TLS, then the doorman."""

from __future__ import annotations

import asyncio
import logging
import math
import socket
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from ..relay.limits import TokenBucket
from .doorman import HEAD_SECONDS
from .sockets import bind

__all__ = ["Listener", "SocketOptions"]

log = logging.getLogger("derper")

_BACKLOG: Final = 1024
_ACCEPTS_AT_ONCE: Final = 64
_HANDSHAKES_AT_ONCE: Final = 2000
_HANDSHAKE_GRACE: Final = 5.0  # seconds; one that takes longer gives way when there are too many
_OUT_OF_FILES_PAUSE: Final = 0.5  # seconds


@dataclass(frozen=True, slots=True)
class SocketOptions:
    """Options of TCP sockets, in seconds (cmd/derper, -tcp-keepalive-time and -tcp-user-timeout)."""

    keep_alive: float = 600.0
    user_timeout: float = 15.0
    keep_alive_interval: float = 15.0  #: between probes without an answer (Go's default)

    def apply(self, sock: socket.socket) -> None:
        """Set them, as far as the system knows them."""
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if self.keep_alive:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            if hasattr(socket, "TCP_KEEPIDLE"):
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, math.ceil(self.keep_alive))
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, math.ceil(self.keep_alive_interval))
        if self.user_timeout and hasattr(socket, "TCP_USER_TIMEOUT"):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(self.user_timeout * 1000))


class Listener:
    """One listening TCP socket.

    `context` is asked at each connection, so that certificates can change; None for plain HTTP.  `limit` may
    be replaced at any time.
    """

    def __init__(
        self,
        sock: socket.socket,
        protocol: Callable[[], asyncio.Protocol],
        *,
        context: Callable[[], ssl.SSLContext | None] | None,
        options: SocketOptions,
    ) -> None:
        self._sock = sock
        self._protocol = protocol
        self._context = context
        self._options = options
        self._loop = asyncio.get_running_loop()
        self._handshakes: dict[asyncio.Task[None], float] = {}  # and when it began, the oldest first
        self.limit: TokenBucket | None = None
        self.accepted = 0
        self.rejected = 0
        self.tls_errors = 0

    @classmethod
    def listen(
        cls,
        host: str,
        port: int,
        protocol: Callable[[], asyncio.Protocol],
        *,
        context: Callable[[], ssl.SSLContext | None] | None,
        options: SocketOptions,
    ) -> Listener:
        """Bind and start to accept.  Raises OSError."""
        sock = bind(host, port, socket.SOCK_STREAM)
        sock.listen(_BACKLOG)
        listener = cls(sock, protocol, context=context, options=options)
        listener._loop.add_reader(sock.fileno(), listener._accept)
        return listener

    @property
    def port(self) -> int:
        """The bound port."""
        return int(self._sock.getsockname()[1])

    def close(self) -> None:
        """Refuse new connections from now on, and give up unfinished handshakes; the others live on."""
        if self._sock.fileno() >= 0:
            self._loop.remove_reader(self._sock.fileno())
            self._sock.close()
        for task in tuple(self._handshakes):
            task.cancel()

    def _accept(self) -> None:
        for _ in range(_ACCEPTS_AT_ONCE):
            try:
                conn, _address = self._sock.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:
                self._rest(error)
                return
            if self._refused():
                self.rejected += 1
                conn.close()
                continue
            self.accepted += 1
            self._welcome(conn)

    def _refused(self) -> bool:
        if len(self._handshakes) >= _HANDSHAKES_AT_ONCE and not self._give_up_oldest():
            return True
        return self.limit is not None and not self.limit.allow(self._loop.time())

    def _give_up_oldest(self) -> bool:
        """Make room: who connects and says nothing must not keep out those who do, nor a rush spoil its own work."""
        task, since = next(iter(self._handshakes.items()))
        if self._loop.time() - since < _HANDSHAKE_GRACE:
            return False
        del self._handshakes[task]
        task.cancel()
        self.rejected += 1
        return True

    def _rest(self, error: OSError) -> None:
        """Out of file descriptors: do not spin on a socket that stays readable."""
        log.warning("cannot accept connections: %s; trying again in %.1f s", error.strerror, _OUT_OF_FILES_PAUSE)
        descriptor = self._sock.fileno()
        self._loop.remove_reader(descriptor)
        self._loop.call_later(_OUT_OF_FILES_PAUSE, self._resume)

    def _resume(self) -> None:
        if self._sock.fileno() >= 0:
            self._loop.add_reader(self._sock.fileno(), self._accept)

    def _welcome(self, conn: socket.socket) -> None:
        conn.setblocking(False)
        self._options.apply(conn)
        task = self._loop.create_task(self._handshake(conn))
        self._handshakes[task] = self._loop.time()
        task.add_done_callback(lambda task: self._handshakes.pop(task, None))

    async def _handshake(self, conn: socket.socket) -> None:
        """TLS; the doorman takes over from there."""
        context = None
        if self._context is not None:
            context = self._context()
            if context is None:
                conn.close()
                return
        timeout = HEAD_SECONDS if context is not None else None
        try:
            await self._loop.connect_accepted_socket(self._protocol, conn, ssl=context, ssl_handshake_timeout=timeout)
        except (OSError, ssl.SSLError) as error:  # TimeoutError is an OSError
            self.tls_errors += 1
            log.debug("TLS handshake failed: %s", error)
            conn.close()
