"""Looking at the first bytes of a connection without taking them, until a parser has seen enough."""

from __future__ import annotations

import asyncio
import select
import socket
from collections.abc import Callable
from typing import Final, Generic, TypeVar

from ..wire.errors import ProtocolError

__all__ = ["Peek", "first_look"]

_T = TypeVar("_T")

_USUAL: Final = 4 << 10  # bytes; of first messages, few are longer
_PAUSE: Final = 0.05  # seconds; where a socket that has too few bytes counts as readable
_CHECK: Final = 1.0  # seconds; how often a socket that is waited for is looked at anyway
_OVER: Final = getattr(select, "POLLRDHUP", 0) | select.POLLHUP | select.POLLERR


def first_look(sock: socket.socket, parse: Callable[[bytes], _T | int]) -> _T | None:
    """What `parse` finds in what is there at once; None if it finds nothing, for whatever reason: then use `Peek`."""
    try:
        found = parse(sock.recv(_USUAL, socket.MSG_PEEK))
    except (ProtocolError, OSError):
        return None
    return None if isinstance(found, int) else found


class Peek(Generic[_T]):
    """Calls `parse` with what a socket has received so far, up to `most` bytes, until it gives no number.

    A number is how many bytes there must be before it is worth to ask again; the system wakes us no sooner
    (SO_RCVLOWAT), so who sends byte by byte costs no more than others.  At the end `done` gets the result, or
    `failed` the parser's ProtocolError, the socket's OSError or an EOFError.  The bytes are still there then.
    """

    __slots__ = ("_done", "_failed", "_loop", "_most", "_need", "_parse", "_pause", "_reading", "_sock", "_timer")

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        sock: socket.socket,
        parse: Callable[[bytes], _T | int],
        most: int,
        done: Callable[[_T], None],
        failed: Callable[[Exception], None],
    ) -> None:
        self._loop = loop
        self._sock = sock
        self._parse = parse
        self._most = most
        self._done = done
        self._failed = failed
        self._need = 1
        self._reading = False
        self._pause = _PAUSE
        self._timer: asyncio.TimerHandle | None = None

    def look(self) -> None:
        """Begin, and go on."""
        self._stop_timer()
        try:
            data = self._sock.recv(self._most, socket.MSG_PEEK)
            if not data:
                raise EOFError("the client closed the connection")
            found = self._parse(data)
        except (BlockingIOError, InterruptedError):
            self._watch()
        except (ProtocolError, OSError, EOFError) as error:
            self._stop()
            self._failed(error)
        else:
            if isinstance(found, int):
                self._wait(found)
            else:
                self._stop()
                self._done(found)

    def cancel(self) -> None:
        """Look no more; neither `done` nor `failed` is called."""
        self._stop()

    def _wait(self, need: int) -> None:
        """Until there are `need` bytes."""
        if need == self._need:
            self._rest()
            return
        self._need = need
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, need)
        self._watch()

    def _rest(self) -> None:
        """Awake too soon: the other side has sent all it will, or the system does not count; do not spin."""
        if self._is_over():
            self._stop()
            self._failed(EOFError("the client closed the connection in the middle of its first message"))
            return
        self._ignore()
        self._timer = self._loop.call_later(self._pause, self.look)
        self._pause *= 2

    def _watch(self) -> None:
        if not self._reading:
            self._reading = True
            self._loop.add_reader(self._sock.fileno(), self.look)
        self._timer = self._loop.call_later(_CHECK, self._check)

    def _check(self) -> None:
        """A reader of uvloop is not told of a reset."""
        if self._is_over():
            self.look()
        else:
            self._timer = self._loop.call_later(_CHECK, self._check)

    def _is_over(self) -> bool:
        poll = select.poll()
        poll.register(self._sock, _OVER)
        return any(event & _OVER for _, event in poll.poll(0))

    def _ignore(self) -> None:
        if self._reading:
            self._reading = False
            self._loop.remove_reader(self._sock.fileno())

    def _stop(self) -> None:
        self._ignore()
        self._stop_timer()
        if self._need != 1:
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, 1)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
