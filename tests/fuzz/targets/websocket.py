"""Frames of a WebSocket client, compared with the same DERP bytes on a connection without WebSocket."""

from __future__ import annotations

from collections.abc import Iterator

from websockets.frames import Frame, Opcode
from websockets.protocol import Protocol, Side

from derper.wire import frames, handshake
from derper.wire.handshake import ClientInfo

from ..target import Target, in_pieces
from ._keys import CLIENT, SERVER, PlainPrivate
from ._wire import Stranger

PLAIN = b"GET /derp HTTP/1.1\r\nHost: x\r\nUpgrade: DERP\r\nDerp-Fast-Start: 1\r\n\r\n"
UPGRADE = (
    b"GET /derp HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
    b"Sec-WebSocket-Protocol: derp\r\nSec-WebSocket-Version: 13\r\n"
    b"Sec-WebSocket-Key: MDEyMzQ1Njc4OTAxMjM0NQ==\r\n\r\n"
)
BINARY, CONTINUATION, PING, PONG = 2, 0, 9, 10
FIN, MASKED = 0x80, 0x80


def run(data: bytes) -> None:
    """Nothing is left behind, whatever comes; and clean frames mean what their bytes mean without frames."""
    stream, pieces = in_pieces(data)
    answered = _converse([UPGRADE, *pieces])
    assert answered.startswith(b"HTTP/1.1 101 ")
    payload = _payload(stream)
    if payload is not None:
        assert _messages(answered.partition(b"\r\n\r\n")[2]) == _converse([PLAIN + payload])


def _converse(pieces: list[bytes]) -> bytes:
    stranger = Stranger()
    for piece in pieces:
        stranger.says(piece)
    stranger.leaves()
    assert not stranger.hub.links
    assert not stranger.hub.router.active
    assert not stranger.hub.kept_alive
    assert not stranger.timers.alive, "a timer outlives its connection"
    return bytes(stranger.wire.written)


def _messages(written: bytes) -> bytes:
    client = Protocol(Side.CLIENT)
    client.receive_data(written)
    assert client.parser_exc is None, "the relay's own frames are wrong"
    events = [event for event in client.events_received() if isinstance(event, Frame)]
    return b"".join(bytes(frame.data) for frame in events if frame.opcode in (Opcode.BINARY, Opcode.CONT))


def _payload(stream: bytes) -> bytes | None:
    """What a stream of whole, clean frames carries; None for any other stream (RFC 6455, section 5.2)."""
    found, pos, in_message = b"", 0, False
    while pos < len(stream):
        if len(stream) - pos < 2:
            return None
        first, second = stream[pos], stream[pos + 1]
        kind, length = first & 0x0F, second & 0x7F
        pos += 2
        if length >= 126:
            size = 2 if length == 126 else 8
            length = int.from_bytes(stream[pos : pos + size], "big")
            pos += size
        mask, body = stream[pos : pos + 4], stream[pos + 4 : pos + 4 + length]
        pos += 4 + length
        if pos > len(stream) or first & 0x70 or not second & MASKED:
            return None
        if kind in (PING, PONG) and first & FIN and second & 0x7F < 126:
            continue
        if kind != (CONTINUATION if in_message else BINARY):
            return None
        in_message = not first & FIN
        found += bytes(byte ^ mask[index % 4] for index, byte in enumerate(body))
    return found


def message(payload: bytes, *, kind: int = BINARY, fin: int = FIN, mask: bytes = bytes(4)) -> bytes:
    size = len(payload)
    length = bytes((MASKED | size,)) if size < 126 else bytes((MASKED | 126,)) + size.to_bytes(2, "big")
    body = bytes(byte ^ mask[index % 4] for index, byte in enumerate(payload))
    return bytes((fin | kind,)) + length + mask + body


def seeds() -> Iterator[bytes]:
    login = handshake.client_info_frame(PlainPrivate(CLIENT), SERVER.public, ClientInfo())
    packet = frames.send_packet(CLIENT.public, b"hello me")
    conversation = login + packet + frames.ping(b"12345678")
    yield b"\xff\xff" + message(conversation)
    yield b"\0\0" + message(login) + message(packet, mask=b"mask") + message(frames.ping(b"12345678"))
    yield (
        b"\x07\x30" + message(login[:20], fin=0) + message(b"ping", kind=PING) + message(login[20:], kind=CONTINUATION)
    )
    yield (
        b"\x10\x10"
        + message(login)
        + message(b"", kind=PING)
        + message(packet[:3])
        + message(b"")
        + message(packet[3:])
    )
    yield b"\xff\xff" + message(login) + message(b"\x03\xe8bye", kind=8) + message(packet)
    yield b"\xff\xff" + message(b"text", kind=1)
    yield b"\xff\xff" + message(b"unmasked").replace(bytes((MASKED | 8,)), b"\x08")
    yield b"\xff\xff" + message(b"x", kind=3)
    yield b"\xff\xff" + message(b"x", kind=CONTINUATION)
    yield b"\xff\xff" + message(b"compressed", fin=0xC0)
    yield b"\xff\xff\x82\xff\x7f" + bytes(11)
    yield b"\xff\xff" + message(b"\x03", kind=8)
    yield b"\xff\xff" + message(b"a ping that cannot be answered", kind=PING, fin=0)
    yield b"\xff\xff" + message(frames.keep_alive())
    yield b"\xff\xff" + message(login) + message(frames.HEADER.pack(4, 1 << 20))


TARGET = Target(run, seeds)
