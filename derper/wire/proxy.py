"""The header that a proxy in front of the relay begins a connection with: PROXY protocol, version 2.

It says who the proxy's client is.  Version 1, a line of text, is refused: a length in front is read with certainty.
(HAProxy, doc/proxy-protocol.txt, sections 2.2 and 2.2.1)
"""

from __future__ import annotations

from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address
from struct import Struct
from typing import Final

from .errors import ProtocolError

__all__ = ["MAX_BYTES", "ProxyHeader", "parse"]

MAX_BYTES: Final = 4 << 10  #: of the whole header; proxies add some hundred bytes about TLS and the like

_SIGNATURE: Final = b"\r\n\r\n\0\r\nQUIT\n"
_VERSION_1: Final = b"PROXY "
_HEADER_LEN: Final = 16  # signature, version and command, family and transport, length
_LOCAL: Final = 0x20
_PROXY: Final = 0x21
_UNSPECIFIED: Final = 0x00
_TCP_4: Final = 0x11
_TCP_6: Final = 0x21
_ADDRESSES: Final = {_TCP_4: Struct(">4s4sHH"), _TCP_6: Struct(">16s16sHH")}  # source, destination, their ports


@dataclass(frozen=True, slots=True)
class ProxyHeader:
    """What a proxy said.  `source` is None where it speaks for itself, as in its health checks."""

    size: int  #: in bytes; the client's own begin behind them
    source: tuple[IPv4Address | IPv6Address, int] | None


def parse(data: bytes) -> ProxyHeader | int:
    """Read the first bytes of a connection: the header, or how many bytes there must be before it can be complete.

    What follows the addresses (TLVs) is skipped.  Raises `ProtocolError`, at the latest when there are `MAX_BYTES`.
    """
    if data[: len(_SIGNATURE)] != _SIGNATURE[: len(data)]:
        if data[: len(_VERSION_1)] == _VERSION_1[: len(data)]:
            raise ProtocolError("it speaks version 1 of the PROXY protocol; let it send version 2")
        raise ProtocolError("its connection does not begin with a PROXY protocol header; let it send version 2")
    if len(data) < _HEADER_LEN:
        return _HEADER_LEN
    command, family = data[12:14]
    length = int.from_bytes(data[14:_HEADER_LEN], "big")
    size = _HEADER_LEN + length
    if command not in (_LOCAL, _PROXY):
        raise ProtocolError(f"its PROXY protocol header has the unknown version and command {command:#04x}")
    if size > MAX_BYTES:
        raise ProtocolError(f"its PROXY protocol header has {size} bytes; at most {MAX_BYTES} are read")
    if len(data) < size:
        return size
    if command == _LOCAL or family == _UNSPECIFIED:
        return ProxyHeader(size, None)
    return ProxyHeader(size, _source(data, family, length))


def _source(data: bytes, family: int, length: int) -> tuple[IPv4Address | IPv6Address, int]:
    form = _ADDRESSES.get(family)
    if form is None:
        raise ProtocolError(f"its PROXY protocol header is about no TCP connection but about family {family:#04x}")
    if length < form.size:
        raise ProtocolError("its PROXY protocol header is too short for its addresses")
    source, _, port, _ = form.unpack_from(data, _HEADER_LEN)
    if family == _TCP_4:
        return IPv4Address(source), port
    address = IPv6Address(source)
    return address.ipv4_mapped or address, port
