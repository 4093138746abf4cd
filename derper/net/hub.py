"""What all DERP connections of one relay share: its identity, its routing table, its timers."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import TYPE_CHECKING, Final

from ..relay.counters import Counters
from ..relay.limits import Limits
from ..relay.moves import PATIENCE
from ..relay.router import Router
from ..relay.session import Session
from ..wire import frames, handshake
from ..wire.client import PeerPresent, parse_event
from ..wire.frames import HEADER_LEN, KEEP_ALIVE_SECONDS, MAX_CLIENT_INFO, FrameType
from ..wire.handshake import ClientInfo
from ..wire.keys import MeshKeys, NodePrivate
from .admission import Admission
from .roundtrips import RoundTrips
from .sockets import tells_tcp_info
from .stalls import Stalls
from .turns import Turns

if TYPE_CHECKING:
    from .link import Link

__all__ = ["Hub"]

log = logging.getLogger("derper")

_KEEP_ALIVES: Final = range(int(KEEP_ALIVE_SECONDS), int(KEEP_ALIVE_SECONDS) + 6)  # seconds between two
_TICK: Final = 1.0
_TELL: Final = 0.005  # seconds between two pieces of news for mesh peers, if much happens
_LOOK: Final = 0.1  # seconds between looks for stalled clients, and for those that do not come back
_INFOS: Final = 64  # client infos to remember
_INFO_BYTES: Final = 256  # of the longest such
_READ_BUFFER: Final = 2 * MAX_CLIENT_INFO  # the longest frame that must be held whole, and as much again to read into


class Hub:
    """One relay's connections.  Create it inside the running loop, `start` it once, `stop` it at the end."""

    def __init__(
        self,
        private_key: NodePrivate,
        admission: Admission,
        *,
        limits: Limits | None = None,
        number: int = 0,  # among the workers of its node
    ) -> None:
        self.private_key = private_key
        self.admission = admission
        self.mesh_keys: MeshKeys | None = None
        self.limits = limits or Limits()
        self.greeting = handshake.server_key_frame(private_key.public)
        self.counters = Counters()
        self.router = Router(private_key.public, self.counters, number)
        self.router.has_news = self._has_news
        self._told = 0.0  # when the watchers were last told
        self.loop = asyncio.get_running_loop()
        self.clock = self.loop.time
        self.tells_tcp_info = tells_tcp_info()
        self.links: set[Link] = set()
        self.most_links = 0  # at a time, since somebody has looked
        self.link_lost = asyncio.Event()  # set whenever a link closes
        self.paused: set[Link] = set()  # those whose socket is full
        self.stalls = Stalls()
        self.round_trips = RoundTrips(self.counters)
        # One read buffer for all links: what a link does not use at once it copies.
        self.read_buffer = bytearray(_READ_BUFFER)
        self.read_view = memoryview(self.read_buffer)
        #: told the server key and the address of every mesh peer that logs in, also at another worker
        self.mesh_peer_seen: Callable[[bytes, str], None] | None = None
        self.router.node.mesh_peer_came = self._mesh_peer_came
        self._known_info = lru_cache(_INFOS)(handshake.read_client_info)
        # Each client has its own period, so that clients that came together drift apart.
        self._keep_alives = tuple(Turns[Session](seconds) for seconds in _KEEP_ALIVES)
        self._ticks = 0
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

    def space_behind(self, tail: bytes, limit: int = 0) -> memoryview:
        """Where to read to: the shared buffer behind `tail`, which is put in front; `limit` bytes, 0 for all."""
        start = len(tail)
        self.read_buffer[:start] = tail
        return self.read_view[start : start + limit if limit else None]

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

    @property
    def draining(self) -> bool:
        """Whether new clients are sent elsewhere."""
        return self.router.draining

    async def settled(self) -> None:
        """Wait, a second at most, for the clients that have just left: what came for them then follows them."""
        for _ in range(PATIENCE):
            if not self.router.moves:
                return
            await asyncio.sleep(_LOOK)

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
        self._keep_alives_of(session).add(session, self._ticks)
        if session.can_mesh and self.mesh_peer_seen is not None:
            self.mesh_peer_seen(session.key, str(session.remote.ip))

    def leave(self, session: Session) -> None:
        """A client's connection is gone."""
        self._keep_alives_of(session).remove(session)
        self.router.unregister(session)
        session.close()

    def _keep_alives_of(self, session: Session) -> Turns[Session]:
        return self._keep_alives[session.key[0] % len(self._keep_alives)]  # a key is as good as random

    @property
    def kept_alive(self) -> int:
        """How many clients get keep-alives."""
        return sum(map(len, self._keep_alives))

    def _mesh_peer_came(self, frame: bytes) -> None:
        event = parse_event(FrameType.PEER_PRESENT, frame[HEADER_LEN:])
        if isinstance(event, PeerPresent) and self.mesh_peer_seen is not None:
            self.mesh_peer_seen(event.peer, str(event.ip))

    def _has_news(self) -> None:
        """Clients that come, or go, in quick succession are told of together."""
        wait = self._told + _TELL - self.clock()
        if wait > 0:
            self.loop.call_later(wait, self._tell)
        else:
            self.loop.call_soon(self._tell)

    def _tell(self) -> None:
        self._told = self.clock()
        self.router.tell()

    def _tick(self) -> None:
        self._timer = self.loop.call_later(_TICK, self._tick)
        self._ticks += 1
        keep_alive = frames.keep_alive()
        for turns in self._keep_alives:
            for session in turns.due(self._ticks):
                session.control(keep_alive)
        self.round_trips.sample(self.clock())

    def _look(self) -> None:
        self._look_timer = self.loop.call_later(_LOOK, self._look)
        now = self.clock()
        for link, seconds in self.stalls.look(self.paused, now):
            link.stalled(seconds)
        self.router.give_up(now)
