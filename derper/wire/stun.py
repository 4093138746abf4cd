"""STUN binding, as much of RFC 5389 as DERP clients use (net/stun/stun.go).

Clients measure latency with it and learn their public address.  A request must carry
SOFTWARE "tailnode" and end in a correct FINGERPRINT; anything else gets no answer, so the
port cannot be used to reflect traffic at others.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from ipaddress import IPv4Address, IPv6Address, ip_address
from struct import Struct
from typing import Final

from .errors import ProtocolError

__all__ = ["TX_ID_LEN", "is_stun", "parse_request", "parse_response", "request", "response"]

TX_ID_LEN: Final = 12

_HEADER: Final = Struct(">2sH4s12s")
_ATTRIBUTE: Final = Struct(">HH")
_COOKIE: Final = b"\x21\x12\xa4\x42"
_BINDING_REQUEST: Final = b"\x00\x01"
_BINDING_SUCCESS: Final = b"\x01\x01"
_SOFTWARE_NAME: Final = b"tailnode"
_FINGERPRINT_LEN: Final = 8
_FINGERPRINT_XOR: Final = 0x5354554E

_MAPPED_ADDRESS: Final = 0x0001
_XOR_MAPPED_ADDRESS: Final = 0x0020
_XOR_MAPPED_ADDRESS_ALT: Final = 0x8020
_SOFTWARE: Final = 0x8022
_FINGERPRINT: Final = 0x8028


def is_stun(packet: bytes) -> bool:
    """Whether a datagram has a STUN header (two zero bits and the magic cookie)."""
    return len(packet) >= _HEADER.size and packet[0] & 0b1100_0000 == 0 and packet[4:8] == _COOKIE


def request(tx_id: bytes) -> bytes:
    """A binding request that DERP servers answer.  `tx_id` is 12 random bytes."""
    software = _attribute(_SOFTWARE, _SOFTWARE_NAME)
    body = _HEADER.pack(_BINDING_REQUEST, len(software) + _FINGERPRINT_LEN, _COOKIE, tx_id) + software
    return body + _attribute(_FINGERPRINT, _fingerprint(body))


def parse_request(packet: bytes) -> bytes:
    """The transaction id of a binding request from a DERP client.

    Raises `ProtocolError` for everything else; the caller then stays silent.
    """
    if not is_stun(packet):
        raise ProtocolError("not a STUN packet")
    if packet[:2] != _BINDING_REQUEST:
        raise ProtocolError("not a STUN binding request")
    software_ok = False
    last, fingerprint = 0, bytes(4)
    for kind, value in _attributes(packet):
        last = kind
        if kind == _SOFTWARE and value == _SOFTWARE_NAME:
            software_ok = True
        elif kind == _FINGERPRINT and len(value) == len(fingerprint):
            fingerprint = value
    if not software_ok:
        raise ProtocolError("STUN request from other software")
    if last != _FINGERPRINT or fingerprint != _fingerprint(packet[:-_FINGERPRINT_LEN]):
        raise ProtocolError("STUN request without a correct fingerprint")
    return packet[8 : _HEADER.size]


def response(tx_id: bytes, host: str, port: int) -> bytes:
    """The answer to a binding request that came from `host`:`port` (an IP address in text form)."""
    address = _unmapped(host)
    family = b"\x00\x01" if address.version == 4 else b"\x00\x02"
    mask = _COOKIE + tx_id
    xored = bytes(a ^ b for a, b in zip(address.packed, mask, strict=False))
    value = family + (port ^ 0x2112).to_bytes(2, "big") + xored
    return _HEADER.pack(_BINDING_SUCCESS, 4 + len(value), _COOKIE, tx_id) + _attribute(_XOR_MAPPED_ADDRESS, value)


def parse_response(packet: bytes) -> tuple[bytes, tuple[str, int]]:
    """``(tx_id, (host, port))`` of a success response.  Raises `ProtocolError`."""
    if not is_stun(packet):
        raise ProtocolError("not a STUN packet")
    if packet[:2] != _BINDING_SUCCESS:
        raise ProtocolError("not a STUN success response")
    tx_id = packet[8 : _HEADER.size]
    end = _HEADER.size + int.from_bytes(packet[2:4], "big")
    if len(packet) < end:
        raise ProtocolError("malformed STUN attributes")
    plain: tuple[str, int] | None = None
    for kind, value in _attributes(packet[:end]):
        if kind in (_XOR_MAPPED_ADDRESS, _XOR_MAPPED_ADDRESS_ALT):
            return tx_id, _address(value, _COOKIE + tx_id)
        if kind == _MAPPED_ADDRESS:
            plain = _address(value, bytes(16))
    if plain is None:
        raise ProtocolError("STUN response without an address")
    return tx_id, plain


def _attribute(kind: int, value: bytes) -> bytes:
    return _ATTRIBUTE.pack(kind, len(value)) + value


def _attributes(packet: bytes) -> Iterator[tuple[int, bytes]]:
    pos = _HEADER.size
    while pos < len(packet):
        if len(packet) - pos < _ATTRIBUTE.size:
            raise ProtocolError("malformed STUN attributes")
        kind, length = _ATTRIBUTE.unpack_from(packet, pos)
        pos += _ATTRIBUTE.size
        padded = (length + 3) & ~3
        if len(packet) - pos < padded:
            raise ProtocolError("malformed STUN attributes")
        yield kind, packet[pos : pos + length]
        pos += padded


def _fingerprint(body: bytes) -> bytes:
    return (zlib.crc32(body) ^ _FINGERPRINT_XOR).to_bytes(4, "big")


def _unmapped(host: str) -> IPv4Address | IPv6Address:
    """The address without a zone; an IPv4-mapped IPv6 address (dual-stack sockets give them) as IPv4."""
    address = ip_address(host.partition("%")[0])
    if isinstance(address, IPv6Address) and address.ipv4_mapped is not None:
        return address.ipv4_mapped
    return address


def _address(value: bytes, mask: bytes) -> tuple[str, int]:
    size = {1: 4, 2: 16}.get(value[1]) if len(value) >= 4 else None
    if size is None or len(value) < 4 + size:
        raise ProtocolError("malformed STUN address")
    raw = bytes(a ^ b for a, b in zip(value[4 : 4 + size], mask, strict=False))
    port = int.from_bytes(value[2:4], "big") ^ int.from_bytes(mask[:2], "big")
    return str(ip_address(raw)), port
