"""DERP frames: the protocol's numbers and layouts, and how to write each frame.

The specification is ``derp/derp.go`` of tailscale.com; this file says the same in Python.

Every frame is a 5-byte header and a payload::

    1 byte type | 4 bytes length of the payload, big endian | payload

Login::

    client -> server   an HTTP request that upgrades to DERP (or, with fast start, is followed at once by frames)
    server -> client   SERVER_KEY
    client -> server   CLIENT_INFO      who it is, sealed to the server's key: this proves the client's key
    server -> client   SERVER_INFO

Then, until one side closes::

    client -> server   SEND_PACKET      and the server gives the receiver
    server -> client   RECV_PACKET      the same frame, with the source's key in place of the destination's
    server -> client   KEEP_ALIVE       about once a minute
    either direction   PING, answered by PONG with the same 8 bytes

Relays of one region mesh: each is a client of every other and proves it with the mesh key.  It then
sends WATCH_CONNS, is told of every client there by PEER_PRESENT and PEER_GONE, and hands packets for
those clients over in FORWARD_PACKET, which is delivered to a local client or dropped, never forwarded again.
"""

from __future__ import annotations

from enum import IntEnum
from ipaddress import IPv4Address, IPv6Address
from struct import Struct
from typing import Final

from .keys import KEY_LEN

__all__ = [
    "DISCO_MAGIC",
    "HEADER",
    "HEADER_LEN",
    "KEEP_ALIVE_SECONDS",
    "MAGIC",
    "MAX_CLIENT_INFO",
    "MAX_PACKET",
    "PROTOCOL_VERSION",
    "FrameType",
    "PeerGoneReason",
    "PeerPresentFlags",
    "close_peer",
    "forward_packet",
    "frame",
    "health",
    "is_disco",
    "keep_alive",
    "note_preferred",
    "peer_gone",
    "peer_present",
    "ping",
    "pong",
    "recv_packet",
    "restarting",
    "send_packet",
    "watch_conns",
]

PROTOCOL_VERSION: Final = 2
MAGIC: Final = "DERP🔑".encode()  # 8 bytes, starts SERVER_KEY

HEADER: Final = Struct(">BI")
HEADER_LEN: Final = HEADER.size

MAX_PACKET: Final = 64 << 10  # bytes of a packet, without framing (derp.MaxPacketSize)
MAX_CLIENT_INFO: Final = 256 << 10  # what an unknown client may make the server buffer (derpserver.recvClientKey)
MAX_SERVER_FRAME: Final = 1 << 20  # what a client accepts from a server (derp_client.go, recvTimeout)
MAX_PING: Final = 1000  # derpserver.handleFramePing
PING_LEN: Final = 8
KEEP_ALIVE_SECONDS: Final = 60.0  # the server adds up to 5 s of jitter (derp.KeepAlive)

DISCO_MAGIC: Final = "TS💬".encode()  # 6 bytes that start a disco message (disco/disco.go)
_DISCO_MIN: Final = len(DISCO_MAGIC) + KEY_LEN + 24


class FrameType(IntEnum):
    """The first byte of a frame."""

    SERVER_KEY = 0x01  # 8 magic + 32 public key (+ bytes for future use)
    CLIENT_INFO = 0x02  # 32 public key + 24 nonce + box(JSON)
    SERVER_INFO = 0x03  # 24 nonce + box(JSON)
    SEND_PACKET = 0x04  # 32 destination key + packet
    RECV_PACKET = 0x05  # 32 source key + packet
    KEEP_ALIVE = 0x06  # empty
    NOTE_PREFERRED = 0x07  # 1 byte: 1 if this is the client's home, else 0
    PEER_GONE = 0x08  # 32 key + 1 reason
    PEER_PRESENT = 0x09  # 32 key + 16 IP + 2 port + 1 flags (older servers send less)
    FORWARD_PACKET = 0x0A  # 32 source key + 32 destination key + packet     (mesh)
    WATCH_CONNS = 0x10  # empty                                           (mesh)
    CLOSE_PEER = 0x11  # 32 key of the client to disconnect               (mesh)
    PING = 0x12  # 8 bytes (a server takes up to 1000 and echoes the first 8)
    PONG = 0x13  # the 8 bytes of the ping
    HEALTH = 0x14  # text of the problem; empty clears it
    RESTARTING = 0x15  # 4 reconnect in + 4 try for, milliseconds


class PeerGoneReason(IntEnum):
    """The byte after the key in PEER_GONE."""

    DISCONNECTED = 0x00  # it was here and left the region
    NOT_HERE = 0x01  # this server does not know it (only said in answer to a disco packet)


class PeerPresentFlags(IntEnum):
    """Bits of the last byte of PEER_PRESENT; a current server always sets at least one."""

    REGULAR = 1 << 0
    MESH_PEER = 1 << 1
    PROBER = 1 << 2
    NOT_IDEAL = 1 << 3  # the client would rather be on another node of the region


_KEY_FRAME: Final = Struct(">BI32s")
_PEER_GONE: Final = Struct(">BI32sB")
_PEER_PRESENT: Final = Struct(">BI32s16sHB")
_FORWARD: Final = Struct(">BI32s32s")
_RESTARTING: Final = Struct(">BIII")


def is_disco(packet: bytes | bytearray | memoryview) -> bool:
    """Whether a packet looks like a disco message (path discovery) and not WireGuard (disco.LooksLikeDiscoWrapper)."""
    return len(packet) >= _DISCO_MIN and packet[: len(DISCO_MAGIC)] == DISCO_MAGIC


def frame(kind: int, payload: bytes = b"") -> bytes:
    """Any frame from its type and payload."""
    return HEADER.pack(kind, len(payload)) + payload


def send_packet(dst: bytes, packet: bytes) -> bytes:
    """SEND_PACKET.  `packet` must be at most MAX_PACKET bytes, or the server closes the connection."""
    return _KEY_FRAME.pack(FrameType.SEND_PACKET, KEY_LEN + len(packet), dst) + packet


def recv_packet(src: bytes, packet: bytes) -> bytes:
    """RECV_PACKET."""
    return _KEY_FRAME.pack(FrameType.RECV_PACKET, KEY_LEN + len(packet), src) + packet


def forward_packet(src: bytes, dst: bytes, packet: bytes) -> bytes:
    """FORWARD_PACKET."""
    return _FORWARD.pack(FrameType.FORWARD_PACKET, 2 * KEY_LEN + len(packet), src, dst) + packet


def keep_alive() -> bytes:
    """KEEP_ALIVE."""
    return HEADER.pack(FrameType.KEEP_ALIVE, 0)


def note_preferred(preferred: bool) -> bytes:
    """NOTE_PREFERRED."""
    return frame(FrameType.NOTE_PREFERRED, b"\x01" if preferred else b"\x00")


def peer_gone(key: bytes, reason: int) -> bytes:
    """PEER_GONE."""
    return _PEER_GONE.pack(FrameType.PEER_GONE, KEY_LEN + 1, key, reason)


def peer_present(key: bytes, ip: IPv4Address | IPv6Address | None, port: int, flags: int) -> bytes:
    """PEER_PRESENT; an IPv4 address is sent in its IPv6-mapped form, an unknown one as zeros."""
    if ip is None:
        packed = bytes(16)
    else:
        packed = ip.packed if ip.version == 6 else b"\x00" * 10 + b"\xff\xff" + ip.packed
    return _PEER_PRESENT.pack(FrameType.PEER_PRESENT, KEY_LEN + 19, key, packed, port, flags)


def watch_conns() -> bytes:
    """WATCH_CONNS."""
    return HEADER.pack(FrameType.WATCH_CONNS, 0)


def close_peer(key: bytes) -> bytes:
    """CLOSE_PEER."""
    return _KEY_FRAME.pack(FrameType.CLOSE_PEER, KEY_LEN, key)


def ping(data: bytes) -> bytes:
    """PING with 8 bytes."""
    return frame(FrameType.PING, data)


def pong(data: bytes) -> bytes:
    """PONG with the 8 bytes of the ping."""
    return frame(FrameType.PONG, data)


def health(problem: str) -> bytes:
    """HEALTH; clients show the text to their user, and an empty one clears it."""
    return frame(FrameType.HEALTH, problem.encode())


def restarting(reconnect_in: float, try_for: float) -> bytes:
    """RESTARTING: reconnect after so many seconds, and keep trying for so many (derp.ServerRestartingMessage)."""
    return _RESTARTING.pack(FrameType.RESTARTING, 8, int(reconnect_in * 1000), int(try_for * 1000))
