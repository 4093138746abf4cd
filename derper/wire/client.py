"""The client half of a DERP connection, without I/O (derp_client.go).

::

    connection = ClientConnection(private_key)          # or server_key=... for fast start
    write(connection.data_to_send())
    for event in connection.receive_data(read()): ...   # raises ProtocolError: close the connection

The first events are `ServerKey` (unless the key was given) and `ServerInfoReceived`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address

from . import frames, handshake
from .errors import ProtocolError
from .frames import HEADER, HEADER_LEN, FrameType
from .handshake import ClientInfo, ServerInfo
from .keys import KEY_LEN, NodePrivate, NodePublic

__all__ = [
    "ClientConnection",
    "Event",
    "Health",
    "KeepAlive",
    "PeerGone",
    "PeerPresent",
    "Ping",
    "Pong",
    "ReceivedPacket",
    "Restarting",
    "ServerInfoReceived",
    "ServerKey",
]


@dataclass(frozen=True, slots=True)
class ServerKey:
    """The server said who it is."""

    key: NodePublic


@dataclass(frozen=True, slots=True)
class ServerInfoReceived:
    """The login is complete."""

    info: ServerInfo


@dataclass(frozen=True, slots=True)
class ReceivedPacket:
    """A packet from another client."""

    source: NodePublic
    data: bytes


@dataclass(frozen=True, slots=True)
class KeepAlive:
    """The server is alive."""


@dataclass(frozen=True, slots=True)
class PeerGone:
    """A client is not, or no longer, reachable through this server; see `frames.PeerGoneReason`."""

    peer: NodePublic
    reason: int


@dataclass(frozen=True, slots=True)
class PeerPresent:
    """A client is connected to the server (only sent to those who watch).  Old servers leave out all but the key."""

    peer: NodePublic
    ip: IPv4Address | IPv6Address | None
    port: int
    flags: int


@dataclass(frozen=True, slots=True)
class Ping:
    """Answer it with a pong of the same 8 bytes."""

    data: bytes


@dataclass(frozen=True, slots=True)
class Pong:
    """The answer to a ping."""

    data: bytes


@dataclass(frozen=True, slots=True)
class Health:
    """Why the connection is unhealthy; an empty text means that it is well again."""

    problem: str


@dataclass(frozen=True, slots=True)
class Restarting:
    """The server goes away: reconnect in so many seconds and try for so many."""

    reconnect_in: float
    try_for: float


Event = (
    ServerKey
    | ServerInfoReceived
    | ReceivedPacket
    | KeepAlive
    | PeerGone
    | PeerPresent
    | Ping
    | Pong
    | Health
    | Restarting
)


class ClientConnection:
    """One DERP connection, seen from the client.

    `server_key` is known beforehand with fast start (from the meta certificate, see `derper.certs`); the
    client then speaks first.  Otherwise the server's greeting tells it.
    """

    def __init__(
        self, private_key: NodePrivate, info: ClientInfo | None = None, *, server_key: bytes | None = None
    ) -> None:
        self._private = private_key
        self._info = info or ClientInfo()
        self._buffer = bytearray()
        self._out: list[bytes] = []
        self._server_key: NodePublic | None = None
        if server_key is not None:
            self._login(NodePublic(server_key))

    @property
    def server_key(self) -> NodePublic | None:
        """The server's public key, once it is known."""
        return self._server_key

    @property
    def unused(self) -> bytes:
        """The start of a frame that has not come whole."""
        return bytes(self._buffer)

    def data_to_send(self) -> bytes:
        """Bytes that the login wants written; call it at the start and after `receive_data`."""
        data = b"".join(self._out)
        self._out.clear()
        return data

    def receive_data(self, data: bytes) -> list[Event]:
        """Events in `data` and what was left of earlier data.

        Unknown frames are skipped, and short ones too, as Go's client does.  Raises `ProtocolError`.
        """
        self._buffer += data
        return list(self._events())

    def _events(self) -> Iterator[Event]:
        buffer, pos = self._buffer, 0
        try:
            while len(buffer) - pos >= HEADER_LEN:
                kind, length = HEADER.unpack_from(buffer, pos)
                if length > frames.MAX_SERVER_FRAME:
                    raise ProtocolError(f"unexpectedly large frame of {length} bytes")
                end = pos + HEADER_LEN + length
                if len(buffer) < end:
                    break
                payload = bytes(buffer[pos + HEADER_LEN : end])
                pos = end
                event = self._event(kind, payload)
                if event is not None:
                    yield event
        finally:
            del buffer[:pos]

    def _event(self, kind: int, payload: bytes) -> Event | None:
        if self._server_key is None:
            if kind != FrameType.SERVER_KEY:
                raise ProtocolError("the server did not start with its key")
            return ServerKey(self._login(handshake.parse_server_key(payload)))
        if kind == FrameType.SERVER_INFO:
            return ServerInfoReceived(handshake.open_server_info(self._private, self._server_key, payload))
        return parse_event(kind, payload)

    def _login(self, server_key: NodePublic) -> NodePublic:
        self._server_key = server_key
        self._out.append(handshake.client_info_frame(self._private, server_key, self._info))
        return server_key


def parse_event(kind: int, payload: bytes) -> Event | None:
    """The event of one steady-state frame; None for an unknown or a too short one."""
    size = len(payload)
    if kind == FrameType.RECV_PACKET and size >= KEY_LEN:
        return ReceivedPacket(NodePublic(payload[:KEY_LEN]), payload[KEY_LEN:])
    if kind == FrameType.KEEP_ALIVE:
        return KeepAlive()
    if kind == FrameType.PEER_GONE and size >= KEY_LEN:
        reason = payload[KEY_LEN] if size > KEY_LEN else frames.PeerGoneReason.DISCONNECTED
        return PeerGone(NodePublic(payload[:KEY_LEN]), int(reason))
    if kind == FrameType.PEER_PRESENT and size >= KEY_LEN:
        return _peer_present(payload)
    if kind == FrameType.PING and size >= frames.PING_LEN:
        return Ping(payload[: frames.PING_LEN])
    if kind == FrameType.PONG and size >= frames.PING_LEN:
        return Pong(payload[: frames.PING_LEN])
    if kind == FrameType.HEALTH:
        return Health(payload.decode(errors="replace"))
    if kind == FrameType.RESTARTING and size >= 8:
        reconnect_in, try_for = int.from_bytes(payload[:4], "big"), int.from_bytes(payload[4:8], "big")
        return Restarting(reconnect_in / 1000, try_for / 1000)
    return None


def _peer_present(payload: bytes) -> PeerPresent:
    peer = NodePublic(payload[:KEY_LEN])
    if len(payload) < KEY_LEN + 18:
        return PeerPresent(peer, None, 0, 0)
    address = ip_address(payload[KEY_LEN : KEY_LEN + 16])
    assert isinstance(address, IPv6Address)
    port = int.from_bytes(payload[KEY_LEN + 16 : KEY_LEN + 18], "big")
    flags = payload[KEY_LEN + 18] if len(payload) > KEY_LEN + 18 else 0
    return PeerPresent(peer, address.ipv4_mapped or address, port, flags)
