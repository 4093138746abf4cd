"""A listening TCP socket, and a limit on what is taken from it."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable
from typing import Any, Final

from ..relay.limits import TokenBucket

__all__ = ["Acceptor"]

log = logging.getLogger("derper")

_BACKLOG: Final = 1024
_ACCEPTS_AT_ONCE: Final = 64
_OUT_OF_FILES_PAUSE: Final = 0.5  # seconds


class Acceptor:
    """Listens on a bound socket and offers each connection, with its address, to `offer`.

    What `offer` does not take (it returns false), and what exceeds `limit`, is closed and counted as rejected.
    `limit` may be replaced at any time.  Raises OSError.
    """

    def __init__(self, sock: socket.socket, offer: Callable[[socket.socket, Any], bool]) -> None:
        self._sock = sock
        self._offer = offer
        self._loop = asyncio.get_running_loop()
        self.limit: TokenBucket | None = None
        self.rejected = 0
        self._rest: asyncio.TimerHandle | None = None
        sock.listen(_BACKLOG)
        self._loop.add_reader(sock.fileno(), self._accept)

    @property
    def port(self) -> int:
        """The bound port."""
        return int(self._sock.getsockname()[1])

    def close(self) -> None:
        """Refuse new connections from now on."""
        if self._sock.fileno() >= 0:
            self._loop.remove_reader(self._sock.fileno())
            self._sock.close()

    def rest(self, seconds: float) -> None:
        """Accept nothing for so long from now on, not even the next one; who connects meanwhile waits."""
        self._loop.remove_reader(self._sock.fileno())
        if self._rest is not None:
            self._rest.cancel()
        self._rest = self._loop.call_later(seconds, self._resume)

    def _accept(self) -> None:
        for _ in range(_ACCEPTS_AT_ONCE):
            if self._rest is not None:
                return
            try:
                conn, address = self._sock.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:
                # Out of file descriptors: do not spin on a socket that stays readable.
                log.warning(
                    "cannot accept connections: %s; trying again in %.1f s", error.strerror, _OUT_OF_FILES_PAUSE
                )
                self.rest(_OUT_OF_FILES_PAUSE)
                return
            if not ((self.limit is None or self.limit.allow(self._loop.time())) and self._offer(conn, address)):
                self.rejected += 1
                conn.close()

    def _resume(self) -> None:
        self._rest = None
        if self._sock.fileno() >= 0:
            self._loop.add_reader(self._sock.fileno(), self._accept)
