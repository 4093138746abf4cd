"""Everything that a stranger can say on a new connection: the HTTP head, the login behind it, the first frames."""

from __future__ import annotations

import re
from collections.abc import Iterator

from websockets.frames import Frame, Opcode
from websockets.protocol import Protocol, Side

from derper.wire import frames, handshake
from derper.wire.handshake import ClientInfo

from ..target import Target, in_pieces
from ._keys import CLIENT, SERVER, PlainPrivate
from ._wire import Stranger

HEAD_BYTES = 8 << 10
WEBSOCKET = b"\r\nUpgrade: websocket\r\n"
CLEAN = re.compile(rb"[A-Z]+ [!-~]+ HTTP/1\.[01]\r\n(?:[!-9;-~]+: [\t -~\x80-\xff]*\r\n)+\r\n")
DATE = re.compile(rb"Date: [^\r]*\r\n")
UPGRADE = b"GET /derp HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: DERP\r\n\r\n"
FAST = UPGRADE[:-2] + b"Derp-Fast-Start: 1\r\n\r\n"


def run(data: bytes) -> None:
    """Any split has the same outcome: the same answer, the same bytes for aiohttp, and nothing left behind."""
    stream, pieces = in_pieces(data)
    (whole, *more), (cut, *cut_more) = _outcome([stream]), _outcome(pieces)
    if WEBSOCKET in whole:  # frames of one read are parsed before the first is used, so its answers may come too late
        whole, cut = _messages(whole), _messages(cut)
        whole, cut = sorted((whole, cut), key=len)
        cut = cut[: len(whole)]
    assert whole == cut, f"{whole!r} in one piece, {cut!r} in {len(pieces)}"
    assert more == cut_more, f"for aiohttp, and the end: {more} in one piece, {cut_more} in {len(pieces)}"


def _messages(written: bytes) -> bytes:
    """What a WebSocket client is told, without pongs and closes."""
    head, _, stream = written.partition(b"\r\n\r\n")
    client = Protocol(Side.CLIENT)
    client.receive_data(stream)
    events = client.events_received()
    return head + b"".join(bytes(e.data) for e in events if isinstance(e, Frame) and e.opcode is Opcode.BINARY)


def _outcome(pieces: list[bytes]) -> tuple[bytes, bytes, bool]:
    stranger = Stranger()
    for piece in pieces:
        stranger.says(piece)
    wire, hub, http = stranger.wire, stranger.hub, bytes(stranger.http.got)
    if http:
        assert CLEAN.match(http), "aiohttp was given what it may read otherwise"
    if wire.written:
        assert wire.written.startswith((b"HTTP/1.", b"\x01\0\0\0\x28DERP"))
    ended = wire.closing
    stranger.leaves()
    assert not hub.links
    assert not hub.router.active
    assert not hub.kept_alive
    assert not stranger.timers.alive, "a timer outlives its connection"
    return DATE.sub(b"", wire.written), http, ended


def seeds() -> Iterator[bytes]:
    client = PlainPrivate(CLIENT)
    login = handshake.client_info_frame(client, SERVER.public, ClientInfo(can_ack_pings=True))
    packet = frames.send_packet(CLIENT.public, b"hello me")
    for cut in (b"\xff\xff", b"\0\0", b"\x3f\x07"):
        yield cut + FAST + login + packet + frames.ping(b"12345678")
        yield cut + UPGRADE + login + frames.frame(0x42, b"unknown") + packet
        yield cut + FAST + frames.frame(2, bytes(60))
        yield cut + FAST + frames.HEADER.pack(2, 1 << 20)
        yield cut + FAST + frames.keep_alive()
        yield cut + FAST[:-2] + b"Ideal-Node: 900a\r\n\r\n" + login
    for head in (
        b"GET /derp HTTP/1.1\r\nHost: x\r\nUpgrade: WebSocket\r\n\r\n",
        b"GET /derp HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
        b"Sec-WebSocket-Protocol: derp\r\nSec-WebSocket-Version: 13\r\n"
        b"Sec-WebSocket-Key: MDEyMzQ1Njc4OTAxMjM0NQ==\r\n\r\n\x82\x80abcd",
        b"GET http://x/derp?y HTTP/1.1\r\nHost: x\r\nUpgrade: derp\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\nGET /x",
        b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\nabc",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
        b"GET / HTTP/1.1\r\nX: y\r\n folded\r\n\r\n",
        b"GET / HTTP/1.1\n\n",
        b"GET / HTTP/1.1\r\nX: " + b"x" * HEAD_BYTES + b"\r\n\r\n",
        b"\r\n\r\nGET / HTTP/1.1\r\nHost: x\r\n\r\n",
    ):
        yield b"\x1f\x80" + head


TARGET = Target(run, seeds, longest=9000)
