"""A DERP client: dials a node as Tailscale's clients do, then sends and receives (derp/derphttp).

The mesh, the prober and the tests use it::

    client = await dial_region(region, private_key)
    client.send(peer, b"...")
    async for event in client: ...
"""

from __future__ import annotations

import asyncio
import os
import socket
import ssl
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from ipaddress import ip_address
from typing import Any, Final

from aiohappyeyeballs import AddrInfoType, start_connection
from cryptography import x509

from . import certs
from .derpmap import DERPNode, DERPRegion
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
_NEXT_ADDRESS: Final = 0.25  # seconds; when to try the next one as well (RFC 8305, section 5)


class DialError(Exception):
    """A node cannot be used; the message is one sentence.  `stage` says how far it got: tcp, tls, http or derp."""

    def __init__(self, stage: str, message: str) -> None:
        super().__init__(message)
        self.stage = stage


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where to dial and whom to expect there."""

    addresses: tuple[str, ...]  #: IP addresses or DNS names; names are asked for when no IP address answers
    port: int
    host_name: str  #: sent as SNI unless it is an IP address, and as HTTP host
    cert_name: str = ""  #: ``sha256-raw:<hex>``, or a name that the certificate must carry, or empty: `host_name`
    insecure: bool = False
    roots: ssl.SSLContext | None = None  #: trust these authorities and not the system's

    def __str__(self) -> str:
        return f"{self.host_name} ({', '.join(self.addresses)} port {self.port})"


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

    async def close(self) -> None:
        """Close and wait until it is closed."""
        self._transport.abort()
        await self._protocol.wait_closed()


def endpoint_of(node: DERPNode, roots: ssl.SSLContext | None = None) -> Endpoint:
    """Where a node of the map is.  An empty IPv4 or IPv6 means to ask DNS, "none" not to use the family."""
    addresses = [address for address in (node.ipv4, node.ipv6) if address and address != "none"]
    if "" in (node.ipv4, node.ipv6) and node.host_name not in addresses:
        addresses.append(node.host_name)
    return Endpoint(
        addresses=tuple(addresses),
        port=node.derp_port or 443,
        host_name=node.host_name,
        cert_name=node.cert_name,
        insecure=node.insecure_for_tests,
        roots=roots,
    )


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
            connection = await _dial_tcp(endpoint_of(node), chosen)
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
    return await _upgrade(await _dial_tcp(endpoint, chosen), endpoint, private_key, chosen, chosen.ideal_node)


# -- TCP and TLS -----------------------------------------------------------------------------------------


class _Idle(asyncio.Protocol):
    """Stands in until TLS is up."""


async def _dial_tcp(endpoint: Endpoint, options: Options) -> asyncio.Transport:
    """Connect to the first address that answers, and of those the first in order."""
    literals = [address for address in endpoint.addresses if _is_ip(address)]
    names = [address for address in endpoint.addresses if not _is_ip(address)]
    problem: Exception | None = None
    for addresses in (literals, names):
        try:
            if addresses:
                async with asyncio.timeout(options.dial_seconds):
                    return await _race(addresses, endpoint.port, options)
        except TimeoutError:
            problem = problem or TimeoutError(f"no answer within {options.dial_seconds:g} s")
        except OSError as error:
            problem = problem or error
    raise DialError("tcp", f"cannot reach {endpoint}: {_reason(problem)}")


async def _race(addresses: Sequence[str], port: int, options: Options) -> asyncio.Transport:
    """Connect to whichever address is faster; families alternate, each a little later (RFC 8305)."""
    loop = asyncio.get_running_loop()
    found: list[AddrInfoType] = []
    problem: OSError | None = None
    for address in addresses:
        try:
            found += await loop.getaddrinfo(address, port, type=socket.SOCK_STREAM)
        except UnicodeError:  # Python encodes names itself
            problem = problem or OSError(f"{address!r} is not a host name")
        except OSError as error:
            problem = problem or error
    if not found:
        raise problem or OSError("it has no address")
    sock = await start_connection(found, happy_eyeballs_delay=_NEXT_ADDRESS)
    try:
        if options.prepare is not None:
            options.prepare(sock)
        transport, _ = await loop.create_connection(_Idle, sock=sock)
    except BaseException:
        sock.close()
        raise
    return transport


def _is_ip(address: str) -> bool:
    try:
        ip_address(address)
    except ValueError:
        return False
    return True


def client_context(endpoint: Endpoint) -> ssl.SSLContext:
    """A context that checks the chain only where a name is expected; `check_peer` does the rest."""
    if endpoint.insecure or endpoint.cert_name.startswith(certs.PIN_PREFIX):
        # Not the default context: to read the system's authorities takes 20 ms, in which the loop stands still.
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    else:
        context = endpoint.roots or ssl.create_default_context()
        context.check_hostname = False
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    return context


def check_peer(endpoint: Endpoint, presented: Sequence[x509.Certificate], now: datetime) -> None:
    """Check what the server presented, as tlsdial does.  Raises `certs.CertificateError`."""
    if endpoint.insecure:
        return
    server_name = "" if certs.ip_address_of(endpoint.host_name) else endpoint.host_name
    if endpoint.cert_name.startswith(certs.PIN_PREFIX):
        certs.verify_pin(presented, endpoint.cert_name, server_name=server_name, now=now)
    else:
        certs.check(presented[0], now=now, name=endpoint.cert_name or endpoint.host_name, source="The certificate")


def presented_certificates(connection: Any) -> list[x509.Certificate]:
    """The certificates that the peer sent, leaf first."""
    public = getattr(connection, "get_unverified_chain", None)  # Python 3.13
    if public is not None:
        return [x509.load_der_x509_certificate(der) for der in public()]
    private = connection._sslobj.get_unverified_chain()
    return [x509.load_pem_x509_certificate(item.public_bytes().encode()) for item in private]


async def _start_tls(transport: asyncio.Transport, endpoint: Endpoint, protocol: _Protocol) -> NodePublic | None:
    """TLS, and the server's key if a meta certificate tells it."""
    loop = asyncio.get_running_loop()
    name = endpoint.host_name or endpoint.addresses[0]
    secured = await loop.start_tls(transport, protocol, client_context(endpoint), server_hostname=name)
    if secured is None:
        raise ConnectionResetError("the connection closed during the TLS handshake")
    protocol.attach(secured)
    connection = secured.get_extra_info("ssl_object")
    chain = presented_certificates(connection)
    check_peer(endpoint, chain, datetime.now(UTC))
    if connection.version() != "TLSv1.3":
        return None
    for certificate in chain:
        key = certs.meta_key(certificate)
        if key is not None:
            return NodePublic(bytes.fromhex(key[0]))
    return None


# -- HTTP and DERP ---------------------------------------------------------------------------------------


async def _upgrade(
    transport: asyncio.Transport, endpoint: Endpoint, private_key: NodePrivate, options: Options, ideal_node: str
) -> Client:
    protocol = _Protocol(private_key, options)
    stage = "tls"
    if options.connected is not None:
        options.connected()
    try:
        async with asyncio.timeout(options.connect_seconds):
            announced = await _start_tls(transport, endpoint, protocol)
            fast = announced if options.fast_start else None
            stage = "http" if fast is None else "derp"
            protocol.begin(_request(endpoint, ideal_node, fast is not None), fast)
            server_key = await protocol.logged_in()
            if options.server_key is not None and server_key != options.server_key:
                raise ProtocolError(f"the server's key is {server_key}, not {options.server_key}")
            return Client(protocol.transport, protocol, server_key)
    except (certs.CertificateError, ssl.SSLError) as error:
        problem = DialError("tls", f"{endpoint}: {_reason(error)}")
    except TimeoutError:
        problem = DialError(stage, f"{endpoint}: no DERP connection within {options.connect_seconds:g} s")
    except (ProtocolError, OSError, ValueError) as error:  # ValueError: a name or a certificate that is none
        problem = DialError(protocol.stage or stage, f"{endpoint}: {_reason(error)}")
    except BaseException:
        protocol.abort(transport)
        raise
    protocol.abort(transport)
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

    def attach(self, transport: asyncio.Transport) -> None:
        self.transport = transport

    def abort(self, transport: asyncio.Transport) -> None:
        """Give the connection up, at whatever stage it is."""
        getattr(self, "transport", transport).abort()

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

    # -- asyncio.Protocol

    def connection_lost(self, exc: Exception | None) -> None:
        self.paused = True
        if self.closed_because is None:
            self.closed_because = _reason(exc) if exc else "the server closed the connection"
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


def _reason(error: BaseException | None) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"the certificate is not trusted: {error.verify_message}"
    if isinstance(error, ssl.SSLError | socket.gaierror):  # their numbers are not the system's
        return error.strerror or str(error)
    if isinstance(error, OSError) and error.errno:  # asyncio puts the address into the text
        return os.strerror(error.errno).lower()
    if isinstance(error, ConnectionError) and not str(error):
        return "the server closed the connection"
    return str(error) or type(error).__name__
