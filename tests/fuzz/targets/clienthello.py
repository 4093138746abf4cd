"""The first message of a TLS connection."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from derper.wire.clienthello import MAX_BYTES, ClientHello, HelloError, check_offer, parse

from ..target import Target
from ._peeked import ask

LONGEST_ANSWER = 100


def run(data: bytes) -> None:
    """A hello, a refusal, or a wish for more; the same hello when it comes in other records."""
    found = ask(parse, data, MAX_BYTES)
    assert len(_answer(lambda: parse(data)) or b"") < LONGEST_ANSWER
    if not isinstance(found, ClientHello):
        return
    assert parse(data + b"more") == found
    assert all(found.protocols)
    refused = _answer(lambda: check_offer(found, (b"h2", b"http/1.1")))
    assert refused is None or 0 < len(refused) < LONGEST_ANSWER
    message = _message(data)
    assert parse(_records(message, 100)) == found
    assert parse(_records(message, 16384)) == found


def _answer(call: Callable[[], object]) -> bytes | None:
    """What a refusal tells the client; None if there is none."""
    try:
        call()
    except HelloError as refusal:
        return refusal.answer
    return None


def _message(data: bytes) -> bytes:
    """What is inside of the records, as far as the handshake goes."""
    message, pos = b"", 0
    while len(message) < 4 or len(message) < 4 + int.from_bytes(message[1:4], "big"):
        length = int.from_bytes(data[pos + 3 : pos + 5], "big")
        message += data[pos + 5 : pos + 5 + length]
        pos += 5 + length
    return message[: 4 + int.from_bytes(message[1:4], "big")]


def _records(message: bytes, size: int) -> bytes:
    pieces = (message[pos : pos + size] for pos in range(0, len(message), size))
    return b"".join(b"\x16\x03\x01" + len(piece).to_bytes(2, "big") + piece for piece in pieces)


def hello(extensions: Sequence[tuple[int, bytes]], *, version: bytes = b"\x03\x03") -> bytes:
    """A hello of zeros with these extensions."""
    block = b"".join(kind.to_bytes(2, "big") + _counted(body, 2) for kind, body in extensions)
    body = version + bytes(32) + _counted(bytes(32), 1) + _counted(b"\x13\x01", 2) + _counted(b"\0", 1)
    body += _counted(block, 2) if extensions else b""
    return _records(b"\x01" + _counted(body, 3), 16384)


def _counted(body: bytes, size: int) -> bytes:
    return len(body).to_bytes(size, "big") + body


def seeds() -> Iterator[bytes]:
    name = (0, _counted(b"\0" + _counted(b"node.derp.internal", 2), 2))
    protocols = (16, _counted(_counted(b"h2", 1) + _counted(b"http/1.1", 1), 2))
    versions = (43, _counted(b"\x03\x04\x03\x03", 1))
    whole = hello([name, protocols, versions, (0x1A1A, b"")])
    yield whole
    yield _records(whole[5:], 7)
    yield hello([])
    yield hello([], version=b"\x03\x01")
    yield hello([(43, b"\x03\x03\x04\x03")])
    yield hello([(16, _counted(_counted(b"spdy/1", 1), 2))])
    yield hello([(0, _counted(b"\0" + _counted(b"a.", 2), 2))])
    yield whole[:60]
    yield b"\x16\x03\x01\0\0"
    yield b"\x16\x03\x01\xff\xff"
    yield b"\x16\x03\x01\x00\x04\x01\xff\xff\xff"
    yield b"\x15\x03\x01\x00\x02\x01\x00"
    yield b"GET / HTTP/1.1\r\n\r\n"
    yield b"\x80\x2e\x01\x03\x01"


TARGET = Target(run, seeds, longest=1500)
