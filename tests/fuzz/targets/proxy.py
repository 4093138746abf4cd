"""The PROXY protocol header in front of a connection."""

from __future__ import annotations

from collections.abc import Iterator
from ipaddress import IPv4Address, ip_address

from derper.wire.proxy import MAX_BYTES, ProxyHeader, parse

from ..target import Target
from ._peeked import ask

SIGNATURE = b"\r\n\r\n\0\r\nQUIT\n"


def run(data: bytes) -> None:
    """It takes the header and nothing behind it, and asks for no more than that."""
    found = ask(parse, data, MAX_BYTES)
    if not isinstance(found, ProxyHeader):
        return
    assert data.startswith(SIGNATURE)
    assert 16 <= found.size == 16 + int.from_bytes(data[14:16], "big") <= len(data)
    assert parse(data[: found.size]) == found == parse(data + b"more")
    if found.source is not None:
        address, port = found.source
        size = 4 if data[13] == 0x11 else 16
        raw = data[16 : 16 + size]
        assert address.packed == (raw if len(raw) == len(address.packed) else raw[12:])
        assert isinstance(address, IPv4Address) or address.ipv4_mapped is None
        assert port == int.from_bytes(data[16 + 2 * size : 18 + 2 * size], "big")


def header(command: int, family: int, body: bytes) -> bytes:
    return SIGNATURE + bytes((command, family)) + len(body).to_bytes(2, "big") + body


def seeds() -> Iterator[bytes]:
    four = ip_address("192.0.2.1").packed + ip_address("192.0.2.2").packed + b"\x12\x34\x01\xbb"
    six = ip_address("2001:db8::1").packed + ip_address("::ffff:192.0.2.2").packed + b"\x12\x34\x01\xbb"
    yield header(0x21, 0x11, four) + b"\x16\x03\x01"
    yield header(0x21, 0x11, four + b"\x03\0\x04abcd")
    yield header(0x21, 0x21, six)
    yield header(0x21, 0x21, six[16:32] + six)
    yield header(0x20, 0x00, b"")
    yield header(0x21, 0x11, four[:-1])
    yield header(0x21, 0x31, bytes(216))
    yield header(0x22, 0x11, four)
    yield SIGNATURE + b"\x21\x11\xff\xff" + four
    yield b"PROXY TCP4 192.0.2.1 192.0.2.2 1 2\r\n"
    yield b"\r\n\r\n\0\r\nQUIX\n"


TARGET = Target(run, seeds, longest=600)
