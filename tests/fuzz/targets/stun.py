"""STUN datagrams, requests and responses."""

from __future__ import annotations

import zlib
from collections.abc import Iterator

from derper.wire import stun
from derper.wire.errors import ProtocolError

from ..target import Target, outcome_of

TX = bytes(range(12))
_ANSWER = 44  # bytes of the longest answer; a request that gets one has at least 40


def run(data: bytes) -> None:
    """An odd first byte has the fingerprint made right, which no fuzzer guesses."""
    packet = data[1:]
    if data[:1] and data[0] & 1:
        packet = _with_fingerprint(packet)
    _request(packet)
    _response(packet)


def _request(packet: bytes) -> None:
    tx_id = outcome_of(lambda: stun.parse_request(packet), ProtocolError)
    if isinstance(tx_id, str):
        return
    assert tx_id == packet[8:20]
    for host in ("192.0.2.1", "2001:db8::1%eth0", "::ffff:192.0.2.1"):
        answer = stun.response(tx_id, host, 3478)
        assert len(answer) <= min(_ANSWER, len(packet) + 4), "an answer must not amplify"
        expected = host.partition("%")[0].removeprefix("::ffff:")
        assert stun.parse_response(answer) == (tx_id, (expected, 3478))


def _response(packet: bytes) -> None:
    found = outcome_of(lambda: stun.parse_response(packet), ProtocolError)
    if isinstance(found, str):
        return
    tx_id, (host, port) = found
    assert 0 <= port <= 0xFFFF
    if not host.startswith("::ffff:"):  # what a server sees as IPv4-mapped it answers as IPv4
        assert stun.parse_response(stun.response(tx_id, host, port)) == found


def _with_fingerprint(body: bytes) -> bytes:
    fingerprint = (zlib.crc32(body) ^ 0x5354554E).to_bytes(4, "big")
    return body + b"\x80\x28\x00\x04" + fingerprint


def seeds() -> Iterator[bytes]:
    request = stun.request(TX)
    yield b"\0" + request
    yield b"\1" + request[:-8]
    yield b"\1" + request[:-8] + b"\x00\x06\x00\x03abc\0"
    for host in ("192.0.2.1", "2001:db8::1"):
        answer = stun.response(TX, host, 0x1234)
        yield b"\0" + answer
        yield b"\0" + answer[:20] + b"\x80\x20" + answer[22:]
    plain = b"\x00\x01\x00\x08\x00\x01\x12\x34\xc0\x00\x02\x01"
    yield b"\0" + b"\x01\x01\x00\x0c\x21\x12\xa4\x42" + TX + plain
    yield b"\0" + b"\x01\x01\xff\xff\x21\x12\xa4\x42" + TX + plain[:7]


TARGET = Target(run, seeds, longest=600)
