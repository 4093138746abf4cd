"""What a server, or somebody in its place, sends to our client."""

from __future__ import annotations

from collections.abc import Iterator
from ipaddress import ip_address

from derper.wire import frames, handshake
from derper.wire.client import ClientConnection, Event, ReceivedPacket
from derper.wire.errors import ProtocolError
from derper.wire.frames import HEADER, HEADER_LEN, FrameType
from derper.wire.handshake import ServerInfo
from derper.wire.keys import KEY_LEN

from ..target import Target, in_pieces
from ._keys import CLIENT, SERVER, PlainPrivate


def run(data: bytes) -> None:
    """Any split gives the same events; an error ends both; nobody's key but that in the frame is given out."""
    fast_start = bool(data[:1] > b"\x7f")
    stream, pieces = in_pieces(data[1:])
    whole, whole_error = _events([stream], fast_start=fast_start)
    cut, cut_error = _events(pieces, fast_start=fast_start)
    assert whole_error == cut_error
    if not whole_error:
        assert whole == cut
    got = [frames.recv_packet(event.source, event.data) for event in cut if isinstance(event, ReceivedPacket)]
    sent = _packets(stream, greeted=fast_start)
    assert got == (sent[: len(got)] if cut_error else sent)


def _events(pieces: list[bytes], *, fast_start: bool) -> tuple[list[Event], str]:
    connection = ClientConnection(PlainPrivate(CLIENT), server_key=SERVER.public if fast_start else None)
    events: list[Event] = []
    try:
        for piece in pieces:
            events += connection.receive_data(piece)
            connection.data_to_send()
    except ProtocolError as error:
        return events, str(error) or "an error without a message"
    return events, ""


def _packets(stream: bytes, *, greeted: bool) -> list[bytes]:
    """The whole RECV_PACKET frames of a stream."""
    found, pos = [], 0
    while len(stream) - pos >= HEADER_LEN:
        kind, length = HEADER.unpack_from(stream, pos)
        frame = stream[pos : pos + HEADER_LEN + length]
        pos += HEADER_LEN + length
        if greeted and kind == FrameType.RECV_PACKET and length >= KEY_LEN and pos <= len(stream):
            found.append(frame)
        greeted = True
    return found


def seeds() -> Iterator[bytes]:
    greeting = handshake.server_key_frame(SERVER.public)
    info = handshake.server_info_frame(PlainPrivate(SERVER), CLIENT.public, ServerInfo(2, 1000, 2000))
    peer = bytes(range(32))
    steady = [
        frames.recv_packet(peer, b"hello"),
        frames.keep_alive(),
        frames.peer_gone(peer, 1),
        frames.peer_present(peer, ip_address("192.0.2.1"), 443, 1),
        frames.peer_present(peer, ip_address("2001:db8::1"), 443, 8),
        frames.ping(b"12345678"),
        frames.pong(b"12345678"),
        frames.health("two of you"),
        frames.restarting(1, 5),
        frames.frame(0x42, b"unknown"),
        HEADER.pack(FrameType.RECV_PACKET, (1 << 20) + 1),
    ]
    for start in (b"\0\0\0", b"\0\xff\xff", b"\xff\x04\x1f"):
        yield start + greeting + info
        for frame in steady:
            yield start + greeting + info + frame
        yield start + greeting + info + b"".join(steady)


TARGET = Target(run, seeds)
