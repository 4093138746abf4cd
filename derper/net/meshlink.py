"""A link to another relay of the region that this one dialed: packets go out on it, news of clients come in.

::

    mesh --dials--> Client --transport--> PeerConnection --frames--> Follower --> routing table
    sessions --> MeshLink --> PeerConnection --> the peer, for its clients
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Final

from ..client import Client
from ..dial import reason
from ..relay.counters import Counters, DropReason
from ..relay.follower import Follower
from ..relay.runs import forward_parts
from ..wire import frames
from ..wire.errors import ProtocolError
from .hub import Hub

__all__ = ["MeshLink", "PeerConnection"]

_HIGH_WATER: Final = 1 << 20
_QUEUE_PACKETS: Final = 1024
_AT_ONCE: Final = 64


class PeerConnection(asyncio.BufferedProtocol):
    """A connection to a peer, taken from a client that has just logged in.  `watch` before the loop runs on.

    Raises ConnectionError if it is closed already.
    """

    def __init__(self, hub: Hub, client: Client) -> None:
        self.on_writable: Callable[[bool], None] = lambda writable: None  # a MeshLink takes its place
        self.writable = client.writable
        self.heard_at = hub.clock()  #: when the peer last said something
        self.closed_because: str | None = None
        self.closed: asyncio.Future[None] = hub.loop.create_future()
        self._hub = hub
        self._follower: Follower
        self._heard: Callable[[], None]
        self._transport, self._tail = client.detach(self)
        self._transport.set_write_buffer_limits(high=_HIGH_WATER)

    def watch(self, follower: Follower, heard: Callable[[], None]) -> None:
        """Ask the peer for its clients.  `heard` is called whenever it has said something."""
        self._follower, self._heard = follower, heard
        self.write(frames.watch_conns())

    def write(self, data: bytes) -> None:
        """Send whole frames."""
        self._transport.write(data)

    def abort(self) -> None:
        """Close now; `closed` will say so.  Who looks whether it is `writable` sends nothing any more."""
        self.writable = False
        self._transport.abort()

    # -- asyncio.BufferedProtocol

    def get_buffer(self, sizehint: int) -> memoryview:
        """The shared buffer, with what is left of earlier reads in front."""
        return self._hub.space_behind(self._tail)

    def buffer_updated(self, nbytes: int) -> None:
        """`nbytes` were read behind the tail."""
        hub, end = self._hub, len(self._tail) + nbytes
        self.heard_at = hub.clock()
        try:
            used = self._follower.receive(hub.read_buffer, 0, end)
        except ProtocolError as error:
            self.closed_because, used = str(error), end
            self.abort()
        self._tail = bytes(hub.read_view[used:end])
        self._heard()

    def pause_writing(self) -> None:
        """The socket is full."""
        self.writable = False
        self.on_writable(False)

    def resume_writing(self) -> None:
        """The socket has room."""
        self.writable = True
        self.on_writable(True)

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection is gone, whoever ended it."""
        self.writable = False
        if self.closed_because is None:
            self.closed_because = reason(exc) if exc else "the server closed the connection"
        self.closed.set_result(None)


class MeshLink:
    """The way to a peer's clients.

    What all clients send to the peer in one turn of the loop leaves together, at the turn's end.  While the socket is
    full, at most `_QUEUE_PACKETS` wait, the oldest goes first.  `stalled` is called when the socket stays full for
    `stall` seconds.  `close` it once, when the connection is gone.
    """

    def __init__(
        self,
        connection: PeerConnection,
        counters: Counters,
        loop: asyncio.AbstractEventLoop,
        *,
        stall: float,
        stalled: Callable[[], None],
    ) -> None:
        self._connection = connection
        self._counters = counters
        self._loop = loop
        self._parts: deque[bytes] = deque()  # two for each packet: the head of its FORWARD_PACKET, and the packet
        self._stall = stall
        self._stalled = stalled
        self._timer: asyncio.TimerHandle | None = None
        self._flush: asyncio.Handle | None = None
        connection.on_writable = self._writable

    def forward(self, src: bytes, dst: bytes, chunk: bytes) -> None:
        """Send the packets of a run of RECV_PACKET frames from `src` to `dst`, who is at the peer."""
        parts = self._parts
        parts.extend(forward_parts(src, dst, chunk))
        if not self._connection.writable:
            while len(parts) > 2 * _QUEUE_PACKETS:
                self._drop_oldest(DropReason.QUEUE_HEAD)
        elif len(parts) >= 2 * _AT_ONCE:
            self._send()
        elif self._flush is None:
            self._flush = self._loop.call_soon(self._turn_ended)

    @property
    def queued(self) -> int:
        """Packets that wait."""
        return len(self._parts) // 2

    def close(self) -> None:
        """The connection is gone, and with it what waited."""
        self._stop_timer()
        if self._flush is not None:
            self._flush.cancel()
        while self._parts:
            self._drop_oldest(DropReason.GONE_DISCONNECTED)

    def _turn_ended(self) -> None:
        self._flush = None
        if self._connection.writable:
            self._send()

    def _send(self) -> None:
        waiting = b"".join(self._parts)
        self._counters.packets_forwarded_out += self.queued
        self._parts.clear()
        if waiting:
            self._connection.write(waiting)

    def _drop_oldest(self, reason: DropReason) -> None:
        self._parts.popleft()
        packet = self._parts.popleft()
        self._counters.drop(reason, frames.is_disco(packet), len(packet))

    def _writable(self, writable: bool) -> None:
        self._stop_timer()
        if not writable:
            self._timer = self._loop.call_later(self._stall, self._stalled)
        else:
            self._send()

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
