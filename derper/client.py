"""A DERP client: dials a node as Tailscale's clients do, then sends and receives (derp/derphttp).

The mesh, the prober and the tests use it::

    client = await dial_region(region, private_key)
    client.send(peer, b"...")
    async for event in client: ...
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections import deque
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Final

from . import certs
from .derpmap import DERPNode, DERPRegion
from .dial import DialError, Endpoint, Secure, connect, endpoint_of, reason, start_tls, verify
from .wire import client as wire
from .wire import frames
from .wire.client import Event, PeerGone, ReceivedPacket
from .wire.errors import ProtocolError
from .wire.handshake import ClientInfo
from .wire.keys import MeshKey, NodePrivate, NodePublic

__all__ = ["Client", "DialError", "Endpoint", "dial_endpoint", "dial_node", "dial_region", "endpoint_of"]

DIAL_SECONDS: Final = 1.5  # for DNS and TCP (derphttp, dialNodeTimeout)
CONNECT_SECONDS: Final = 10.0  # TLS, HTTP and DERP together (derphttp, connect)
_HEAD_BYTES: Final = 8 << 10
_EVENTS: Final = 256  # that may wait for the reader, and those of one read more


@dataclass(frozen=True, slots=True)
class Options:
    """What the client says of itself, and whom it expects."""

    mesh_key: MeshKey | None = None
    can_ack_pings: bool = True
    is_prober: bool = False
    preferred: bool = False
    watch: bool = False
    ideal_node: str = ""  #: the node of the region it would rather be on
    server_key: NodePublic | None = None  #: refuse any other server
    fast_start: bool = True
    connected: Callable[[], None] | None = None  #: called when TCP is up
    prepare: Callable[[socket.socket], None] | None = None  #: sets options of the connected socket
    secure: Secure | None = None  #: starts TLS in another way than the event loop does
    dial_seconds: float = DIAL_SECONDS  #: for DNS and TCP
    connect_seconds: float = CONNECT_SECONDS  #: for TLS, HTTP and DERP


class Client:
    """A connected client.  Iterate over it for events; the iteration ends when the connection does."""

    def __init__(self, transport: asyncio.Transport, protocol: _Protocol, server_key: NodePublic) -> None:
        self._transport = transport
        self._protocol = protocol
        self.server_key = server_key

    @property
    def public_key(self) -> NodePublic:
        """The client's own address."""
        return self._protocol.private_key.public

    @property
    def writable(self) -> bool:
        """False while the socket is full or closed: what is sent now is only kept in memory, or lost."""
        return not self._protocol.paused

    @property
    def remote_host(self) -> str:
        """The IP address of the server."""
        return str(self._transport.get_extra_info("peername")[0])

    @property
    def closed_because(self) -> str | None:
        """Why the connection ended; None while it is open."""
        return self._protocol.closed_because

    def send(self, dst: bytes, packet: bytes) -> None:
        """Send a packet of at most 64 KiB.  Raises ValueError for a longer one."""
        if len(packet) > frames.MAX_PACKET:
            raise ValueError(f"packet of {len(packet)} bytes; at most {frames.MAX_PACKET} are allowed")
        self._transport.write(frames.send_packet(dst, packet))

    def write(self, data: bytes) -> None:
        """Send whole frames, see `derper.wire.frames`."""
        self._transport.write(data)

    def on_writable(self, changed: Callable[[bool], None]) -> None:
        """Call `changed` when the socket becomes full (False) or has room again (True)."""
        self._protocol.on_writable = changed

    def set_high_water(self, size: int) -> None:
        """Bytes that may wait in memory before the client is not `writable`."""
        self._transport.set_write_buffer_limits(high=size)

    async def receive(self) -> Event:
        """The next event.  Raises `ConnectionError` when the connection has ended."""
        return await self._protocol.next_event()

    async def receive_packet(self) -> ReceivedPacket:
        """The next packet; other events are dropped, but a PEER_GONE for our destination raises ConnectionError."""
        while True:
            event = await self.receive()
            if isinstance(event, ReceivedPacket):
                return event
            if isinstance(event, PeerGone):
                raise ConnectionError(f"the peer {event.peer.short()} is not in the region")

    async def __aiter__(self) -> AsyncIterator[Event]:
        while True:
            try:
                event = await self.receive()
            except ConnectionError:
                return
            yield event

    def abort(self) -> None:
        """Close now; who waits in `receive` gets a ConnectionError."""
        self._transport.abort()

    def detach(self, protocol: asyncio.BaseProtocol) -> tuple[asyncio.Transport, bytes]:
        """Give the connection to another protocol; the client is of no use any more.

        Returns its transport, and the start of a frame that has not come whole.  Events that wait are lost.  Raises
        ConnectionError if the connection has ended.
        """
        unused = self._protocol.release()
        self._transport.set_protocol(protocol)
        return self._transport, unused

    async def close(self) -> None:
        """Close and wait until it is closed."""
        self._transport.abort()
        await self._protocol.wait_closed()


async def dial_region(region: DERPRegion, private_key: NodePrivate, options: Options | None = None) -> Client:
    """Connect to the first node of the region that accepts TCP (derphttp.dialRegion).

    As with stock clients, a node that accepts TCP and then fails is an error for the whole attempt.
    Raises `DialError`.
    """
    candidates = [node for node in region.nodes if not node.stun_only]
    if not candidates:
        raise DialError("tcp", f"region {region.region_id} has no nodes that relay")
    first_error: DialError | None = None
    chosen = options or Options()
    for node in candidates:
        try:
            connection = await connect(endpoint_of(node), chosen.dial_seconds, chosen.prepare)
        except DialError as error:
            first_error = first_error or error
            continue
        ideal = "" if node is region.nodes[0] else region.nodes[0].name  # also one that does not relay, as stock's
        return await _upgrade(connection, endpoint_of(node), private_key, chosen, ideal)
    assert first_error is not None
    raise first_error


async def dial_node(node: DERPNode, private_key: NodePrivate, options: Options | None = None) -> Client:
    """Connect to one node of a map.  Raises `DialError`."""
    return await dial_endpoint(endpoint_of(node), private_key, options)


async def dial_endpoint(endpoint: Endpoint, private_key: NodePrivate, options: Options | None = None) -> Client:
    """Connect to a server that is not in a map, as the mesh does.  Raises `DialError`."""
    chosen = options or Options()
    connection = await connect(endpoint, chosen.dial_seconds, chosen.prepare)
    return await _upgrade(connection, endpoint, private_key, chosen, chosen.ideal_node)


# -- HTTP and DERP ---------------------------------------------------------------------------------------


async def _upgrade(
    sock: socket.socket, endpoint: Endpoint, private_key: NodePrivate, options: Options, ideal_node: str
) -> Client:
    protocol = _Protocol(private_key, options)
    stage = "tls"
    if options.connected is not None:
        options.connected()
    try:
        async with asyncio.timeout(options.connect_seconds):
            protocol.transport = await start_tls(sock, endpoint, protocol, options.secure)
            announced = verify(protocol.transport, endpoint)
            fast = announced if options.fast_start else None
            stage = "http" if fast is None else "derp"
            protocol.begin(_request(endpoint, ideal_node, fast is not None), fast)
            server_key = await protocol.logged_in()
            if options.server_key is not None and server_key != options.server_key:
                raise ProtocolError(f"the server's key is {server_key}, not {options.server_key}")
            return Client(protocol.transport, protocol, server_key)
    except (certs.CertificateError, ssl.SSLError) as error:
        problem = DialError("tls", f"{endpoint}: {reason(error)}")
    except TimeoutError:
        problem = DialError(stage, f"{endpoint}: no DERP connection within {options.connect_seconds:g} s")
    except (ProtocolError, OSError, ValueError) as error:  # ValueError: a name or a certificate that is none
        problem = DialError(protocol.stage or stage, f"{endpoint}: {reason(error)}")
    except BaseException:
        protocol.abort()
        raise
    protocol.abort()
    raise problem


def _request(endpoint: Endpoint, ideal_node: str, fast: bool) -> bytes:
    host = f"[{endpoint.host_name}]" if ":" in endpoint.host_name else endpoint.host_name
    if endpoint.port != 443:
        host += f":{endpoint.port}"
    lines = ["GET /derp HTTP/1.1", f"Host: {host}", "User-Agent: derper", "Connection: Upgrade", "Upgrade: DERP"]
    if ideal_node:
        lines.append(f"Ideal-Node: {ideal_node}")
    if fast:
        lines.append("Derp-Fast-Start: 1")
    return ("\r\n".join(lines) + "\r\n\r\n").encode()


class _Protocol(asyncio.Protocol):
    """Bytes to events; one reader may wait for them."""

    def __init__(self, private_key: NodePrivate, options: Options) -> None:
        self.private_key = private_key
        self.paused = False
        self.on_writable: Callable[[bool], None] | None = None
        self.closed_because: str | None = None
        self.stage = ""
        self.transport: asyncio.Transport
        self._options = options
        self._head: bytearray | None = None  # the HTTP answer, while it comes in
        self._wire: wire.ClientConnection | None = None
        self._events: deque[Event] = deque()
        self._is_held = False  # nothing is read until the events that wait are fewer
        self._waiter: asyncio.Future[None] | None = None
        self._closed = asyncio.get_running_loop().create_future()
        self._early = bytearray()

    def abort(self) -> None:
        """Give the connection up, at whatever stage it is."""
        transport: asyncio.Transport | None = getattr(self, "transport", None)
        if transport is not None:
            transport.abort()

    def begin(self, request: bytes, server_key: NodePublic | None) -> None:
        """Send the request; with a server key go on at once, else wait for the answer."""
        self._wire = wire.ClientConnection(self.private_key, self._info(), server_key=server_key)
        if server_key is None:
            self._head = bytearray()
            self.stage = "http"
        else:
            self.stage = "derp"
        self.transport.write(request + self._wire.data_to_send())

    def _info(self) -> ClientInfo:
        options = self._options
        return ClientInfo(mesh_key=options.mesh_key, can_ack_pings=options.can_ack_pings, is_prober=options.is_prober)

    async def logged_in(self) -> NodePublic:
        while True:
            event = await self.next_event()
            if isinstance(event, wire.ServerInfoReceived):
                break
        assert self._wire is not None
        assert self._wire.server_key is not None
        wanted = b""
        if self._options.preferred:
            wanted += frames.note_preferred(True)
        if self._options.watch:
            wanted += frames.watch_conns()
        if wanted:
            self.transport.write(wanted)
        return self._wire.server_key

    async def next_event(self) -> Event:
        while not self._events:
            if self.closed_because is not None:
                raise ConnectionError(self.closed_because)
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        event = self._events.popleft()
        if self._is_held and len(self._events) <= _EVENTS // 2:
            self._is_held = False
            if self.closed_because is None:
                self.transport.resume_reading()
        return event

    async def wait_closed(self) -> None:
        await asyncio.shield(self._closed)

    def release(self) -> bytes:
        """Somebody else reads from now on: what was read in vain."""
        if self.closed_because is not None:
            raise ConnectionError(self.closed_because)
        if self._is_held:
            self.transport.resume_reading()
        return b"" if self._wire is None else self._wire.unused

    # -- asyncio.Protocol

    def connection_lost(self, exc: Exception | None) -> None:
        self.paused = True
        if self.closed_because is None:
            self.closed_because = reason(exc) if exc else "the server closed the connection"
        if not self._closed.done():
            self._closed.set_result(None)
        self._wake()

    def pause_writing(self) -> None:
        self.paused = True
        if self.on_writable is not None:
            self.on_writable(False)

    def resume_writing(self) -> None:
        self.paused = False
        if self.on_writable is not None:
            self.on_writable(True)

    def data_received(self, data: bytes) -> None:
        try:
            if self._head is not None:
                data = self._read_head(data)
            if data and self._wire is not None:
                self._events.extend(self._wire.receive_data(data))
                answer = self._wire.data_to_send()
                if answer:
                    self.transport.write(answer)
                if len(self._events) > _EVENTS and not self._is_held:
                    self._is_held = True
                    self.transport.pause_reading()
        except ProtocolError as error:
            self.closed_because = str(error)
            self.transport.abort()
        self._wake()

    def _read_head(self, data: bytes) -> bytes:
        """The bytes behind the HTTP answer, once it is whole."""
        assert self._head is not None
        self._head += data
        end = self._head.find(b"\r\n\r\n")
        if end < 0:
            if len(self._head) > _HEAD_BYTES:
                raise ProtocolError("the HTTP answer has too long a head")
            return b""
        status = bytes(self._head[:end]).split(b"\r\n", 1)[0].decode("latin-1")
        rest = bytes(self._head[end + 4 :])
        if status.split(" ")[1:2] != ["101"]:
            raise ProtocolError(f"the server refused the upgrade: {status}")
        self._head = None
        self.stage = "derp"
        return rest

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
