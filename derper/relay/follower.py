"""What another relay of the region says on a link that we dialed: who comes to it, and who goes.

It names its clients one by one in PEER_PRESENT when it is asked to (WATCH_CONNS), then each that comes; PEER_GONE says
who went.  Of either frame only the key matters here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from ..wire import frames
from ..wire.errors import ProtocolError
from ..wire.frames import HEADER, HEADER_LEN, MAX_SERVER_FRAME, PING_LEN, FrameType
from ..wire.keys import KEY_LEN
from .router import Forwarder, Router

__all__ = ["Follower"]

_PRESENT: Final = int(FrameType.PEER_PRESENT)
_GONE: Final = int(FrameType.PEER_GONE)
_PING: Final = int(FrameType.PING)


class Follower:
    """Keeps `forwarder` in the routing table as the way to each of the peer's clients.

    Feed it with `receive`, and `close` it once, when the connection is gone.  Clients named by a key in `ignored` (the
    two relays themselves) have no way through a link.  `write` takes what the peer must be answered.
    """

    __slots__ = ("_forwarder", "_ignored", "_router", "_skip", "_write", "present")

    def __init__(
        self, router: Router, forwarder: Forwarder, ignored: frozenset[bytes], write: Callable[[bytes], None]
    ) -> None:
        self._router = router
        self._forwarder = forwarder
        self._ignored = ignored
        self._write = write
        self._skip = 0  # bytes of a frame that are of no interest, still to come
        #: the keys of the peer's clients
        self.present: set[bytes] = set()

    def receive(self, buffer: bytearray, start: int, end: int) -> int:
        """Follow the frames in ``buffer[start:end]``.

        Returns the offset of the first byte not used, less than 64 bytes before `end`: the caller keeps the rest and
        hands it in again, in front of what comes next.  Raises `ProtocolError`: the caller closes the connection.
        """
        pos = start + min(self._skip, end - start)
        self._skip -= pos - start
        unpack = HEADER.unpack_from
        while end - pos >= HEADER_LEN:
            kind, length = unpack(buffer, pos)
            body = pos + HEADER_LEN
            if length > MAX_SERVER_FRAME:
                raise ProtocolError(f"unexpectedly large frame of {length} bytes")
            if body + (length if length < KEY_LEN else KEY_LEN) > end:
                break
            if kind == _PRESENT and length >= KEY_LEN:
                self._came(bytes(buffer[body : body + KEY_LEN]))
            elif kind == _GONE and length >= KEY_LEN:
                self._went(bytes(buffer[body : body + KEY_LEN]))
            elif kind == _PING and length >= PING_LEN:
                self._write(frames.pong(bytes(buffer[body : body + PING_LEN])))
            pos = body + length
        if pos > end:
            self._skip, pos = pos - end, end
        return pos

    def close(self) -> None:
        """The connection is gone: there is no way to these clients, nor to any that came later."""
        for key in self.present:
            self._router.remove_forwarder(key, self._forwarder)
        self.present.clear()

    def _came(self, key: bytes) -> None:
        if key not in self._ignored:
            self.present.add(key)
            self._router.add_forwarder(key, self._forwarder)

    def _went(self, key: bytes) -> None:
        if key in self.present:
            self.present.discard(key)
            self._router.remove_forwarder(key, self._forwarder)
