"""The first message of a TLS connection, read before TLS starts: whom the client wants to speak to, and how.

The certificate is chosen from it, and who cannot be served is told so in the words of Go's crypto/tls, which stock
derper uses: clients then report the same error for both relays.  Only what the choice needs is read; the TLS
library reads the same bytes again and judges the rest.
(RFC 8446 sections 4.1.2 and 5.1, RFC 6066 section 3, RFC 7301 section 3.1; Go: crypto/tls/conn.go readRecordOrCCS,
handshake_messages.go clientHelloMsg.unmarshal, net/http/server.go tlsRecordHeaderLooksLikeHTTP)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from struct import Struct
from typing import Final

from .errors import ProtocolError

__all__ = ["MAX_BYTES", "ClientHello", "HelloError", "check_offer", "parse", "refused_name"]

MAX_BYTES: Final = 16 << 10  #: of a connection's first bytes, records and all

_UNEXPECTED_MESSAGE: Final = 10
_RECORD_OVERFLOW: Final = 22
_DECODE_ERROR: Final = 50
_PROTOCOL_VERSION: Final = 70
_INTERNAL_ERROR: Final = 80
_NO_APPLICATION_PROTOCOL: Final = 120

_RECORD: Final = Struct(">BHH")  # type, version, length
_EXTENSION: Final = Struct(">HH")
_ALERT_RECORD: Final = 21
_HANDSHAKE_RECORD: Final = 22
_SSL_2_RECORD: Final = 0x80  # what a record of SSL 2 looks like: a length with the first bit set
_MAX_RECORD: Final = 16384 + 2048
_HANDSHAKE_HEADER: Final = 4
_CLIENT_HELLO: Final = 1
_SERVER_NAME: Final = 0
_ALPN: Final = 16
_SUPPORTED_VERSIONS: Final = 43
_HOST_NAME: Final = 0

_TLS_1_0: Final = 0x0301
_TLS_1_2: Final = 0x0303
_SERVED_VERSIONS: Final = frozenset((_TLS_1_2, 0x0304))

_HTTP_BEGINS: Final = (b"GET /", b"HEAD ", b"POST ", b"PUT /", b"OPTIO")
_HTTP_ANSWER: Final = b"HTTP/1.0 400 Bad Request\r\n\r\nClient sent an HTTP request to an HTTPS server.\n"


@dataclass(frozen=True, slots=True)
class ClientHello:
    """What the client asks for."""

    server_name: str  #: as it was sent, read as Latin-1; empty if none was
    protocols: tuple[bytes, ...]  #: ALPN; empty if the client does not care
    versions: tuple[int, ...]  #: of TLS, 0x0303 for 1.2


class HelloError(ProtocolError):
    """The connection cannot become TLS.  The caller's duty: send `answer`, which may be empty, and close."""

    def __init__(self, why: str, answer: bytes = b"") -> None:
        super().__init__(why)
        self.answer = answer


def _refusal(why: str, alert: int, *, version: int = _TLS_1_0) -> HelloError:
    """An error that is told to the client with a fatal alert; `version` goes into its record, as crypto/tls does it:
    TLS 1.0 before there is an agreement, then 1.2."""
    return HelloError(why, _RECORD.pack(_ALERT_RECORD, version, 2) + bytes((2, alert)))


def check_offer(hello: ClientHello, protocols: Sequence[bytes]) -> None:
    """Whether there is a version of TLS, 1.2 or 1.3, and one of `protocols` on which both sides can agree.

    Raises `HelloError`.
    """
    if _SERVED_VERSIONS.isdisjoint(hello.versions):
        raise _refusal("the client offers only old versions of TLS", _PROTOCOL_VERSION)
    if hello.protocols and not any(protocol in hello.protocols for protocol in protocols):
        why = f"the client offers only the protocols {b', '.join(hello.protocols)!r}"
        raise _refusal(why, _NO_APPLICATION_PROTOCOL, version=_TLS_1_2)


def refused_name(hello: ClientHello) -> HelloError:
    """For a client that asks for a name which is not served (crypto/tls, where GetCertificate fails)."""
    return _refusal(f"there is no certificate for {hello.server_name!r}", _INTERNAL_ERROR, version=_TLS_1_2)


def parse(data: bytes) -> ClientHello | int:
    """Read the first bytes of a connection: the hello, or how many bytes there must be before it can be complete.

    Raises `HelloError`, at the latest when there are `MAX_BYTES`.
    """
    found = _message(data[:MAX_BYTES])
    if isinstance(found, int):
        if found > MAX_BYTES:
            raise _refusal(f"a client hello of more than {MAX_BYTES} bytes", _INTERNAL_ERROR)
        return found
    try:
        return _hello(_Reader(found))
    except _MalformedError:
        raise _refusal("malformed client hello", _DECODE_ERROR) from None


def _message(data: bytes) -> bytes | int:
    """The handshake message from its records, without its header."""
    pieces: list[bytes] = []
    have, want, pos = 0, _HANDSHAKE_HEADER, 0
    while have < want:
        if len(data) - pos < _RECORD.size:
            return pos + _RECORD.size + (want - have if pos else 0)
        length = _check_record(data, pos)
        pos += _RECORD.size
        if len(data) - pos < length:
            return pos + length + (_RECORD.size + want - have - length if length < want - have else 0)
        pieces.append(data[pos : pos + length])
        have += length
        pos += length
        if want == _HANDSHAKE_HEADER and have >= want:
            want += _message_length(b"".join(pieces))
    return b"".join(pieces)[:want]


def _check_record(data: bytes, pos: int) -> int:
    """The length of the record at `pos`."""
    kind, version, length = _RECORD.unpack_from(data, pos)
    if kind == _SSL_2_RECORD:
        raise _refusal("the client speaks SSL 2", _PROTOCOL_VERSION)
    if (kind not in (_ALERT_RECORD, _HANDSHAKE_RECORD) and not pos) or version >= 0x1000:
        raise HelloError("this is not TLS", _HTTP_ANSWER if data[:5] in _HTTP_BEGINS else b"")
    if length > _MAX_RECORD:
        raise _refusal(f"a TLS record of {length} bytes", _RECORD_OVERFLOW)
    if kind == _ALERT_RECORD:
        raise HelloError("the client began with an alert")
    if kind != _HANDSHAKE_RECORD or not length:
        raise _refusal("a record that is no part of a client hello", _UNEXPECTED_MESSAGE)
    return int(length)


def _message_length(message: bytes) -> int:
    if message[0] != _CLIENT_HELLO:
        raise _refusal("a handshake that does not begin with a client hello", _UNEXPECTED_MESSAGE)
    return int.from_bytes(message[1:_HANDSHAKE_HEADER], "big")


class _MalformedError(Exception):
    """A length that does not fit."""


class _Reader:
    """Bytes with a place in them."""

    __slots__ = ("_data", "_pos")

    def __init__(self, data: bytes, pos: int = 0) -> None:
        self._data = data
        self._pos = pos

    def __bool__(self) -> bool:
        return self._pos < len(self._data)

    def number(self, size: int) -> int:
        return int.from_bytes(self.take(size), "big")

    def take(self, count: int) -> bytes:
        start, self._pos = self._pos, self._pos + count
        if self._pos > len(self._data):
            raise _MalformedError
        return self._data[start : self._pos]

    def prefixed(self, size: int) -> bytes:
        """Bytes behind their length, a number of `size` bytes."""
        return self.take(self.number(size))

    def list(self, size: int) -> _Reader:
        """A list behind its length, which must not be empty."""
        inner = self.prefixed(size)
        if not inner:
            raise _MalformedError
        return _Reader(inner)


def _hello(message: _Reader) -> ClientHello:
    message.take(_HANDSHAKE_HEADER)
    legacy = message.number(2)
    message.take(32)  # random
    message.prefixed(1)  # session id
    if len(message.prefixed(2)) % 2:  # cipher suites
        raise _MalformedError
    message.prefixed(1)  # compression methods
    name = ""
    protocols: tuple[bytes, ...] = ()
    versions: tuple[int, ...] = (min(legacy, _TLS_1_2),)  # 1.3 is only offered in the extension
    for kind, body in _extensions(message):
        if kind == _SERVER_NAME:
            name = _server_name(_Reader(body))
        elif kind == _ALPN:
            protocols = _protocols(_Reader(body))
        elif kind == _SUPPORTED_VERSIONS:
            versions = _versions(_Reader(body))
    return ClientHello(name, protocols, versions)


def _extensions(message: _Reader) -> Iterator[tuple[int, bytes]]:
    if not message:
        return
    data = message.prefixed(2)
    if message:
        raise _MalformedError
    pos, seen = 0, set()
    while pos < len(data):
        if len(data) - pos < _EXTENSION.size:
            raise _MalformedError
        kind, length = _EXTENSION.unpack_from(data, pos)
        pos += _EXTENSION.size + length
        if pos > len(data) or kind in seen:
            raise _MalformedError
        seen.add(kind)
        yield kind, data[pos - length : pos]


def _server_name(body: _Reader) -> str:
    found, names = b"", body.list(2)
    while names:
        kind, name = names.number(1), names.prefixed(2)
        if not name or (kind == _HOST_NAME and (found or name.endswith(b"."))):
            raise _MalformedError
        if kind == _HOST_NAME:
            found = name
    return found.decode("latin-1")


def _protocols(body: _Reader) -> tuple[bytes, ...]:
    found, names = [], body.list(2)
    while names:
        found.append(names.prefixed(1))
        if not found[-1]:
            raise _MalformedError
    return tuple(found)


def _versions(body: _Reader) -> tuple[int, ...]:
    found, versions = [], body.list(1)
    while versions:
        found.append(versions.number(2))
    return tuple(found)
