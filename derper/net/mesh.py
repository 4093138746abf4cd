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
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Final

from ..client import Client, DialError, Endpoint, Options, dial_endpoint
from ..relay.counters import Counters, DropReason
from ..relay.runs import forward_parts
from ..wire import frames
from ..wire.client import PeerGone, PeerPresent, Ping
from ..wire.keys import NodePublic
from .hub import Hub
from .listener import SocketOptions

__all__ = ["Mesh", "MeshLink", "Peer", "PeerStatus", "Timings"]

log = logging.getLogger("derper")

_HIGH_WATER: Final = 1 << 20
_QUEUE_PACKETS: Final = 1024
_AT_ONCE: Final = 64


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


class MeshLink:
    """The way to a peer's clients.

    What all clients send to the peer in one turn of the loop leaves together, at the turn's end.  While the socket is
    full, at most `_QUEUE_PACKETS` wait, the oldest goes first.  `stalled` is called when the socket stays full for
    `stall` seconds.  `close` it once, when the connection is gone.
    """

    def __init__(
        self,
        client: Client,
        counters: Counters,
        loop: asyncio.AbstractEventLoop,
        *,
        stall: float,
        stalled: Callable[[], None],
    ) -> None:
        self._client = client
        self._counters = counters
        self._loop = loop
        self._parts: deque[bytes] = deque()  # two for each packet: the head of its FORWARD_PACKET, and the packet
        self._stall = stall
        self._stalled = stalled
        self._timer: asyncio.TimerHandle | None = None
        self._flush: asyncio.Handle | None = None
        client.set_high_water(_HIGH_WATER)
        client.on_writable(self._writable)

    def forward(self, src: bytes, dst: bytes, chunk: bytes, now: float) -> None:
        """Send the packets of a run of RECV_PACKET frames from `src` to `dst`, who is at the peer."""
        parts = self._parts
        parts.extend(forward_parts(src, dst, chunk))
        if not self._client.writable:
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
        if self._client.writable:
            self._send()

    def _send(self) -> None:
        waiting = b"".join(self._parts)
        self._counters.packets_forwarded_out += self.queued
        self._parts.clear()
        if waiting:
            self._client.write(waiting)

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


class Mesh:
    """Keeps a link to every peer.  `set_peers` may be called at any time, `stop` once at the end."""

    def __init__(self, hub: Hub, *, rng: random.Random, timings: Timings = Timings()) -> None:
        self._hub = hub
        self._rng = rng
        self._timings = timings
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
                self._dialers[name] = _Dialer(self._hub, peer, self._rng, self._timings)

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

    def __init__(self, hub: Hub, peer: Peer, rng: random.Random, timings: Timings) -> None:
        self.peer = peer
        self.status = PeerStatus()
        self.is_self = False  # -mesh-with may name the relay itself
        self._hub = hub
        self._rng = rng
        self._timings = timings
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
            watch=True,
            server_key=self.peer.server_key,
            prepare=self._timings.sockets.apply,
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
        timings = self._timings
        link = MeshLink(client, self._hub.counters, self._hub.loop, stall=timings.stall, stalled=client.abort)
        self._last_key = client.server_key
        present: set[bytes] = set()
        try:
            while True:
                async with asyncio.timeout(timings.silence):
                    event = await client.receive()
                if not self.status.connected:
                    self.status = PeerStatus(connected=True, since=datetime.now(UTC), link=link)
                    log.info("mesh: connected to %s (%s)", self.peer.name, client.server_key.short())
                self._follow(event, client, link, present)
                self.status.clients = len(present)
        except TimeoutError:
            self._note(f"nothing heard for {timings.silence:.0f} s")
        except ConnectionError as error:
            refused = "" if self.status.connected else " when asked for its clients; is its mesh key the same?"
            self._note(f"{error}{refused}")
        finally:
            for key in present:
                self._hub.router.remove_forwarder(key, link)
            link.close()
            self.status = PeerStatus(error=self.status.error)
            await client.close()

    def _follow(self, event: object, client: Client, link: MeshLink, present: set[bytes]) -> None:
        router = self._hub.router
        if isinstance(event, PeerPresent):
            if event.peer not in (self._hub.private_key.public, client.server_key):
                present.add(event.peer)
                router.add_forwarder(event.peer, link)
        elif isinstance(event, PeerGone):
            if event.peer in present:
                present.discard(event.peer)
                router.remove_forwarder(event.peer, link)
        elif isinstance(event, Ping):
            client.write(frames.pong(event.data))

    def _note(self, error: str) -> None:
        if error != self.status.error:
            log.warning("mesh: %s: %s", self.peer.name, error)
        self.status.connected = False
        self.status.error = error
