"""What all DERP connections of one relay share: its identity, its routing table, its timers."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Final

from ..relay.counters import Counters
from ..relay.limits import Limits
from ..relay.router import Router
from ..relay.session import Session
from ..wire import frames, handshake
from ..wire.frames import KEEP_ALIVE_SECONDS, MAX_CLIENT_INFO
from ..wire.handshake import ClientInfo
from ..wire.keys import MeshKeys, NodePrivate
from .admission import Admission
from .roundtrips import RoundTrips
from .sockets import tells_tcp_info
from .stalls import Stalls

if TYPE_CHECKING:
    from .link import Link

__all__ = ["Hub"]

log = logging.getLogger("derper")

_KEEP_ALIVE_JITTER: Final = 5  # seconds
_TICK: Final = 1.0
_LOOK: Final = 0.1  # seconds between looks for stalled clients
_INFOS: Final = 64  # client infos to remember
_INFO_BYTES: Final = 256  # of the longest such
_READ_BUFFER: Final = 2 * MAX_CLIENT_INFO  # the longest frame that must be held whole, and as much again to read into


@dataclass(slots=True)
class _Wheel:
    """Keep-alive times: every session sits in one slot, and a slot comes up once per turn.

    Each session has its own period of 60 to 65 seconds, so that clients that came together drift apart.
    """

    slots: list[set[Session]] = field(
        default_factory=lambda: [set() for _ in range(int(KEEP_ALIVE_SECONDS) + _KEEP_ALIVE_JITTER + 1)]
    )
    position: int = 0
    places: dict[Session, tuple[int, int]] = field(default_factory=dict)  # session -> (slot, period)

    def add(self, session: Session, jitter: int) -> None:
        self._place(session, int(KEEP_ALIVE_SECONDS) + jitter)

    def remove(self, session: Session) -> None:
        place = self.places.pop(session, None)
        if place is not None:
            self.slots[place[0]].discard(session)

    def turn(self) -> Iterable[Session]:
        self.position = (self.position + 1) % len(self.slots)
        due = self.slots[self.position]
        self.slots[self.position] = set()
        for session in due:
            self._place(session, self.places[session][1])
        return due

    def _place(self, session: Session, period: int) -> None:
        slot = (self.position + period) % len(self.slots)
        self.slots[slot].add(session)
        self.places[session] = (slot, period)


class Hub:
    """One relay's connections.  Create it inside the running loop, `start` it once, `stop` it at the end."""

    def __init__(
        self, private_key: NodePrivate, admission: Admission, *, rng: random.Random, limits: Limits | None = None
    ) -> None:
        self.private_key = private_key
        self.admission = admission
        self.mesh_keys: MeshKeys | None = None
        self.limits = limits or Limits()
        self.greeting = handshake.server_key_frame(private_key.public)
        self.counters = Counters()
        self.router = Router(private_key.public, self.counters)
        self.loop = asyncio.get_running_loop()
        self.clock = self.loop.time
        self.tells_tcp_info = tells_tcp_info()
        self.links: set[Link] = set()
        self.draining = False  # no new clients
        self.link_lost = asyncio.Event()  # set whenever a link closes
        self.paused: set[Link] = set()  # those whose socket is full
        self.stalls = Stalls()
        self.round_trips = RoundTrips(self.counters)
        # One read buffer for all links: what a link does not use at once it copies.
        self.read_buffer = bytearray(_READ_BUFFER)
        self.read_view = memoryview(self.read_buffer)
        #: told the server key and the address of every mesh peer that logs in
        self.mesh_peer_seen: Callable[[bytes, str], None] | None = None
        self._known_info = lru_cache(_INFOS)(handshake.read_client_info)
        self._rng = rng
        self._wheel = _Wheel()
        self._timer: asyncio.TimerHandle | None = None
        self._look_timer: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """Start the timers."""
        self._timer = self.loop.call_later(_TICK, self._tick)
        self._look_timer = self.loop.call_later(_LOOK, self._look)

    def stop(self) -> None:
        """Stop the timers and drop every connection."""
        for timer in (self._timer, self._look_timer):
            if timer is not None:
                timer.cancel()
        for link in tuple(self.links):
            link.abort()

    async def closed(self, links: Iterable[Link], seconds: float) -> None:
        """Wait until all these links are closed, but not longer than `seconds`."""
        waiting = set(links)
        try:
            async with asyncio.timeout(seconds):
                while waiting & self.links:
                    self.link_lost.clear()
                    await self.link_lost.wait()
        except TimeoutError:
            pass

    def set_limits(self, limits: Limits) -> None:
        """New limits, for the connected clients too."""
        if limits == self.limits:
            return
        self.limits = limits
        now = self.clock()
        for link in tuple(self.links):  # one that goes on reading may bring anything
            link.set_bucket(limits.client_bucket(now))

    def read_client_info(self, message: bytes) -> ClientInfo:
        """As `handshake.read_client_info`; most clients say the same, so they share what was read before."""
        return self._known_info(message) if len(message) <= _INFO_BYTES else handshake.read_client_info(message)

    def join(self, session: Session) -> None:
        """A client has logged in."""
        session.set_bucket(self.limits.client_bucket(session.connected_at))
        self.router.register(session)
        self._wheel.add(session, int(self._rng.random() * (_KEEP_ALIVE_JITTER + 1)))
        if session.can_mesh and self.mesh_peer_seen is not None:
            self.mesh_peer_seen(session.key, str(session.remote.ip))

    def leave(self, session: Session) -> None:
        """A client's connection is gone."""
        self._wheel.remove(session)
        self.router.unregister(session)
        session.close()

    def _tick(self) -> None:
        self._timer = self.loop.call_later(_TICK, self._tick)
        keep_alive = frames.keep_alive()
        for session in self._wheel.turn():
            session.control(keep_alive)
        self.round_trips.sample(self.clock())

    def _look(self) -> None:
        self._look_timer = self.loop.call_later(_LOOK, self._look)
        for link, seconds in self.stalls.look(self.paused, self.clock()):
            link.stalled(seconds)
