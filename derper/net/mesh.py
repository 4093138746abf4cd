"""The mesh: this relay is a client of every other relay of its region (derp/README.md, derphttp/mesh_client.go).

For each peer there is one task that dials, proves the mesh key, watches the peer's clients, and registers a
`MeshLink` in the router as the way to each of them.  The peer does the same towards us; together the two links
carry packets both ways.  Membership may change at any time: links to peers that stay are not touched.

Unlike stock derper, the dialer checks the peer's pin and its server key, and dials again at once when a peer
that cannot be reached shows up as a client of ours: where it comes from, it can be found.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime

from ..client import Client, DialError, Endpoint, Options, dial_endpoint
from ..dial import Secure
from ..relay.follower import Follower
from ..wire.keys import NodePublic
from .hub import Hub
from .listener import SocketOptions
from .meshlink import MeshLink, PeerConnection
from .transports import Transports

__all__ = ["Mesh", "Peer", "PeerStatus", "Timings"]

log = logging.getLogger("derper")


@dataclass(frozen=True, slots=True)
class Timings:
    """How patient the mesh is, in seconds."""

    dial: float = 5.0  #: for DNS and TCP
    first_retry: float = 0.25  #: doubled up to the last, each with jitter
    last_retry: float = 5.0  #: mesh_client.go, retryInterval; a link that held for less does not make it begin anew
    silence: float = 120.0  #: two missed keep-alives (derp_client.go, Recv)
    stall: float = 30.0  #: that a link's socket may stay full
    #: A peer that is gone without a word is noticed by TCP, long before its silence is.
    sockets: SocketOptions = field(default_factory=lambda: SocketOptions(10.0, 15.0, keep_alive_interval=5.0))


@dataclass(frozen=True, slots=True)
class Peer:
    """Another relay of the region.  With `server_key`, nobody else is accepted in its place."""

    name: str
    endpoint: Endpoint
    server_key: NodePublic | None = None


@dataclass(slots=True)
class PeerStatus:
    """What is known of the link to a peer."""

    connected: bool = False
    since: datetime | None = None
    error: str | None = None
    clients: int = 0
    link: MeshLink | None = None

    @property
    def queued(self) -> int:
        """Packets that wait for the peer to read."""
        return self.link.queued if self.link is not None else 0


class Mesh:
    """Keeps a link to every peer.  `set_peers` may be called at any time, `stop` once at the end."""

    def __init__(self, hub: Hub, *, rng: random.Random, timings: Timings = Timings()) -> None:
        self._hub = hub
        self._rng = rng
        self._timings = timings
        self._transports = Transports(hub.loop)
        self._dialers: dict[str, _Dialer] = {}

    def set_peers(self, peers: Mapping[str, Peer]) -> None:
        """These are the peers now: dial the new ones, drop those gone, leave the others alone."""
        for name, dialer in list(self._dialers.items()):
            if peers.get(name) != dialer.peer:
                # A peer with a new pin or address keeps its link as long as it lives; the next dial uses the new data.
                if name in peers and peers[name].server_key == dialer.peer.server_key:
                    dialer.peer = peers[name]
                    dialer.wake()
                else:
                    dialer.stop()
                    del self._dialers[name]
        for name, peer in peers.items():
            if name not in self._dialers:
                self._dialers[name] = _Dialer(self._hub, peer, self._rng, self._timings, self._transports.secure)

    def seen(self, key: bytes, host: str) -> None:
        """A mesh peer with this server key connected from this address: if it cannot be reached yet, try there now."""
        for dialer in self._dialers.values():
            if dialer.known_key == key and not dialer.status.connected:
                dialer.hint(host)

    def status(self) -> dict[str, PeerStatus]:
        """The state of every link."""
        return {name: dialer.status for name, dialer in self._dialers.items() if not dialer.is_self}

    async def stop(self) -> None:
        """End all links."""
        dialers = list(self._dialers.values())
        self._dialers.clear()
        for dialer in dialers:
            dialer.stop()
        await asyncio.gather(*(dialer.task for dialer in dialers), return_exceptions=True)


class _Dialer:
    """The task for one peer."""

    def __init__(self, hub: Hub, peer: Peer, rng: random.Random, timings: Timings, secure: Secure | None) -> None:
        self.peer = peer
        self.status = PeerStatus()
        self.is_self = False  # -mesh-with may name the relay itself
        self._hub = hub
        self._rng = rng
        self._timings = timings
        self._secure = secure
        self._wake = asyncio.Event()
        self._hint: str | None = None
        self._last_key: bytes | None = None
        self.task = asyncio.get_running_loop().create_task(self._run())

    @property
    def known_key(self) -> bytes | None:
        """The peer's server key, as configured or else as seen on the last link."""
        return self.peer.server_key or self._last_key

    def stop(self) -> None:
        self.task.cancel()

    def wake(self) -> None:
        """Do not wait any longer before the next dial."""
        self._wake.set()

    def hint(self, host: str) -> None:
        self._hint = host
        self._wake.set()

    async def _run(self) -> None:
        timings, clock = self._timings, self._hub.clock
        retry = timings.first_retry
        while True:
            self._wake.clear()
            try:
                client = await self._dial()
            except DialError as error:
                self._note(str(error))
            else:
                if client.server_key == self._hub.private_key.public:
                    log.info("mesh: %s is this relay itself; not meshing with it", self.peer.name)
                    self.is_self = True
                    await client.close()
                    return
                since = clock()
                await self._serve(client)
                if clock() - since >= timings.last_retry:
                    retry = timings.first_retry
            await self._pause(retry * (0.5 + self._rng.random()))
            retry = min(retry * 2, timings.last_retry)

    async def _dial(self) -> Client:
        endpoint = self.peer.endpoint
        hint, self._hint = self._hint, None
        if hint is not None:
            endpoint = replace(endpoint, addresses=(hint, *endpoint.addresses))
        keys = self._hub.mesh_keys
        if keys is None:
            raise DialError("derp", "there is no mesh key yet")
        options = Options(
            mesh_key=keys.current,
            server_key=self.peer.server_key,
            prepare=self._timings.sockets.apply,
            secure=self._secure,
            dial_seconds=self._timings.dial,
        )
        return await dial_endpoint(endpoint, self._hub.private_key, options)

    async def _pause(self, seconds: float) -> None:
        try:
            async with asyncio.timeout(seconds):
                await self._wake.wait()
        except TimeoutError:
            pass

    async def _serve(self, client: Client) -> None:
        """Follow the peer's clients until the link breaks.

        A peer that accepts the mesh key names its clients at once, us among them; only then are we connected.
        """
        hub, server_key = self._hub, client.server_key
        self._last_key = server_key
        try:
            connection = PeerConnection(hub, client)
        except ConnectionError as error:
            self._ended(str(error))
            return
        link = MeshLink(connection, hub.counters, hub.loop, stall=self._timings.stall, stalled=connection.abort)
        ignored = frozenset((bytes(hub.private_key.public), bytes(server_key)))
        follower = Follower(hub.router, link, ignored, connection.write)
        connection.watch(follower, lambda: self._heard(server_key, link, follower))
        try:
            await self._until_silent(connection)
            self._ended(connection.closed_because or f"nothing heard for {self._timings.silence:.0f} s")
        finally:
            follower.close()
            link.close()
            self.status = PeerStatus(error=self.status.error)
            connection.abort()
            await asyncio.wait([connection.closed])

    def _ended(self, why: str) -> None:
        refused = "" if self.status.connected else " when asked for its clients; is its mesh key the same?"
        self._note(f"{why}{refused}")

    def _heard(self, server_key: NodePublic, link: MeshLink, follower: Follower) -> None:
        if not self.status.connected:
            self.status = PeerStatus(connected=True, since=datetime.now(UTC), link=link)
            log.info("mesh: connected to %s (%s)", self.peer.name, server_key.short())
        self.status.clients = len(follower.present)

    async def _until_silent(self, connection: PeerConnection) -> None:
        """Returns when the connection is closed, or nothing was heard for too long."""
        while not connection.closed.done():
            left = connection.heard_at + self._timings.silence - self._hub.clock()
            if left <= 0:
                return
            await asyncio.wait([connection.closed], timeout=left)

    def _note(self, error: str) -> None:
        if error != self.status.error:
            log.warning("mesh: %s: %s", self.peer.name, error)
        self.status.connected = False
        self.status.error = error
