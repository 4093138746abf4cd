"""Frames: the exact bytes of every layout in derp.go."""

from __future__ import annotations

from ipaddress import ip_address

import pytest

from derper.wire import frames
from derper.wire.frames import FrameType, PeerGoneReason, PeerPresentFlags

A, B = b"\xaa" * 32, b"\xbb" * 32
HEX_A, HEX_B = "aa" * 32, "bb" * 32

# Those that a client sends were recorded from derp.Client of tailscale.com v1.102.3; the others follow derpserver.go.
GOLDEN = {
    "SEND_PACKET": (frames.send_packet(B, b"hello"), f"04 00000025 {HEX_B} 68656c6c6f"),
    "SEND_PACKET, empty": (frames.send_packet(B, b""), f"04 00000020 {HEX_B}"),
    "RECV_PACKET": (frames.recv_packet(A, b"hello"), f"05 00000025 {HEX_A} 68656c6c6f"),
    "KEEP_ALIVE": (frames.keep_alive(), "06 00000000"),
    "NOTE_PREFERRED, true": (frames.note_preferred(True), "07 00000001 01"),
    "NOTE_PREFERRED, false": (frames.note_preferred(False), "07 00000001 00"),
    "PEER_GONE": (frames.peer_gone(A, PeerGoneReason.DISCONNECTED), f"08 00000021 {HEX_A} 00"),
    "PEER_GONE, not here": (frames.peer_gone(A, PeerGoneReason.NOT_HERE), f"08 00000021 {HEX_A} 01"),
    "PEER_PRESENT, IPv4": (
        frames.peer_present(A, ip_address("192.0.2.1"), 0x1234, PeerPresentFlags.REGULAR),
        f"09 00000033 {HEX_A} 00000000000000000000ffffc0000201 1234 01",
    ),
    "PEER_PRESENT, IPv6": (
        frames.peer_present(A, ip_address("2001:db8::1"), 0x1234, PeerPresentFlags.MESH_PEER | PeerPresentFlags.PROBER),
        f"09 00000033 {HEX_A} 20010db8000000000000000000000001 1234 06",
    ),
    "PEER_PRESENT, no address": (
        frames.peer_present(A, None, 0, PeerPresentFlags.NOT_IDEAL),
        f"09 00000033 {HEX_A} 00000000000000000000000000000000 0000 08",
    ),
    "FORWARD_PACKET": (frames.forward_packet(A, B, b"hello"), f"0a 00000045 {HEX_A} {HEX_B} 68656c6c6f"),
    "WATCH_CONNS": (frames.watch_conns(), "10 00000000"),
    "CLOSE_PEER": (frames.close_peer(A), f"11 00000020 {HEX_A}"),
    "PING": (frames.ping(bytes(range(1, 9))), "12 00000008 0102030405060708"),
    "PONG": (frames.pong(bytes(range(1, 9))), "13 00000008 0102030405060708"),
    "HEALTH": (frames.health("käse"), "14 00000005 6bc3a47365"),
    "HEALTH, well": (frames.health(""), "14 00000000"),
    "RESTARTING": (frames.restarting(0.25, 5.0), "15 00000008 000000fa 00001388"),
    "unknown": (frames.frame(0xFE, b"\x01\x02"), "fe 00000002 0102"),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_bytes(name: str) -> None:
    made, golden = GOLDEN[name]
    assert made.hex() == golden.replace(" ", "")


def test_magic() -> None:
    assert frames.MAGIC.hex() == "44455250f09f9491"


def test_the_numbers_of_derp_go() -> None:
    assert {kind.name: int(kind) for kind in FrameType} == {
        "SERVER_KEY": 0x01,
        "CLIENT_INFO": 0x02,
        "SERVER_INFO": 0x03,
        "SEND_PACKET": 0x04,
        "RECV_PACKET": 0x05,
        "KEEP_ALIVE": 0x06,
        "NOTE_PREFERRED": 0x07,
        "PEER_GONE": 0x08,
        "PEER_PRESENT": 0x09,
        "FORWARD_PACKET": 0x0A,
        "WATCH_CONNS": 0x10,
        "CLOSE_PEER": 0x11,
        "PING": 0x12,
        "PONG": 0x13,
        "HEALTH": 0x14,
        "RESTARTING": 0x15,
    }


@pytest.mark.parametrize(
    ("packet", "disco"),
    [
        (frames.DISCO_MAGIC + bytes(32 + 24), True),
        (frames.DISCO_MAGIC + bytes(32 + 23), False),
        (b"TS\xf0\x9f\x92\xad" + bytes(100), False),
        (b"", False),
    ],
)
def test_is_disco(packet: bytes, disco: bool) -> None:
    """As disco.LooksLikeDiscoWrapper: magic, key and nonce must be there."""
    for kind in (bytes, bytearray, memoryview):
        assert frames.is_disco(kind(packet)) is disco
