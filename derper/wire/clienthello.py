"""The first message of a TLS connection, read before TLS starts: whom the client wants to speak to, and how.

The certificate is chosen from it, and who cannot be served is told so in the words of Go's crypto/tls, which stock
derper uses: clients then report the same error for both relays.  Only what the choice needs is read; the TLS
library reads the same bytes again and judges the rest.
(RFC 8446 sections 4.1.2 and 5.1, RFC 6066 section 3, RFC 7301 section 3.1; Go: crypto/tls/conn.go readRecordOrCCS,
handshake_messages.go clientHelloMsg.unmarshal, net/http/server.go tlsRecordHeaderLooksLikeHTTP)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from struct import Struct, error, unpack
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
_RANDOM: Final = _HANDSHAKE_HEADER + 2  # where it begins, behind the version
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
        return _hello(found)
    except (_MalformedError, error):
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
            return pos + max(length, want - have)  # never less than was asked for before this record's header came
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
    if kind not in (_ALERT_RECORD, _HANDSHAKE_RECORD) or version >= 0x1000:
        raise HelloError("this is not TLS", _HTTP_ANSWER if data[pos : pos + 5] in _HTTP_BEGINS else b"")
    if length > _MAX_RECORD:
        raise _refusal(f"a TLS record of {length} bytes", _RECORD_OVERFLOW)
    if kind == _ALERT_RECORD:
        raise HelloError("the client began with an alert")
    if not length:
        raise _refusal("an empty record", _UNEXPECTED_MESSAGE)
    return int(length)


def _message_length(message: bytes) -> int:
    if message[0] != _CLIENT_HELLO:
        raise _refusal("a handshake that does not begin with a client hello", _UNEXPECTED_MESSAGE)
    return int.from_bytes(message[1:_HANDSHAKE_HEADER], "big")


class _MalformedError(Exception):
    """A length that does not fit."""


def _hello(message: bytes) -> ClientHello:
    legacy = int.from_bytes(message[_HANDSHAKE_HEADER:_RANDOM], "big")
    name = ""
    protocols: tuple[bytes, ...] = ()
    versions: tuple[int, ...] = (min(legacy, _TLS_1_2),)  # 1.3 is only offered in the extension
    pos, end = _extensions(message)
    while pos < end:
        kind, length = _EXTENSION.unpack_from(message, pos)
        start = pos + _EXTENSION.size
        pos = start + length
        if kind == _SERVER_NAME:
            name = _server_name(message[start:pos])
        elif kind == _ALPN:
            protocols = _protocols(message[start:pos])
        elif kind == _SUPPORTED_VERSIONS:
            versions = _versions(message[start:pos])
    if pos != end:
        raise _MalformedError
    return ClientHello(name, protocols, versions)


def _extensions(message: bytes) -> tuple[int, int]:
    """Where they begin and end."""
    pos = _RANDOM + 32
    _, pos = _prefixed(message, pos, 1)
    suites, pos = _prefixed(message, pos, 2)
    _, pos = _prefixed(message, pos, 1)
    if len(suites) % 2:
        raise _MalformedError
    if pos == len(message):
        return pos, pos
    extensions, end = _prefixed(message, pos, 2)
    if end != len(message):
        raise _MalformedError
    return end - len(extensions), end


def _server_name(body: bytes) -> str:
    found, names, pos = b"", _list(body, 2), 0
    while pos < len(names):
        kind = names[pos]
        name, pos = _prefixed(names, pos + 1, 2)
        if not name or (kind == _HOST_NAME and (found or name.endswith(b"."))):
            raise _MalformedError
        if kind == _HOST_NAME:
            found = name
    return found.decode("latin-1")


def _protocols(body: bytes) -> tuple[bytes, ...]:
    found, names, pos = [], _list(body, 2), 0
    while pos < len(names):
        name, pos = _prefixed(names, pos, 1)
        if not name:
            raise _MalformedError
        found.append(name)
    return tuple(found)


def _versions(body: bytes) -> tuple[int, ...]:
    numbers = _list(body, 1)
    if len(numbers) % 2:
        raise _MalformedError
    return unpack(f">{len(numbers) // 2}H", numbers)


def _list(body: bytes, size: int) -> bytes:
    """Entries behind their length in bytes; there must be one.  What follows them does not count, as in Go."""
    entries, _ = _prefixed(body, 0, size)
    if not entries:
        raise _MalformedError
    return entries


def _prefixed(data: bytes, pos: int, size: int) -> tuple[bytes, int]:
    """The bytes behind their length, a number of `size` bytes at `pos`, and where they end."""
    start = pos + size
    end = start + int.from_bytes(data[pos:start], "big")
    if end > len(data):
        raise _MalformedError
    return data[start:end], end
