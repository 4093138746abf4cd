"""DERP over WebSocket on a loopback socket: what the link sees is what a socket would give it."""

from __future__ import annotations

import asyncio
import gc
import random
import weakref
from contextlib import suppress

import pytest
from websockets.frames import CloseCode, Frame, Opcode
from websockets.protocol import Protocol, Side

from derper.net import websocket
from derper.relay.limits import Limits
from derper.wire import frames, handshake
from derper.wire.frames import FrameType
from derper.wire.handshake import ClientInfo

from ..fuzz.targets._wire import Stranger
from .loopback import FAST, PATIENCE, LoopbackRelay, RawClient, private, relay, until

pytestmark = pytest.mark.both_loops
ALICE, BOB = private(1), private(2)
KEY = b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
HEAD = b"GET /derp HTTP/1.1\r\nHost: x\r\nConnection: keep-alive, Upgrade\r\nUpgrade: WebSocket\r\n" + KEY
UPGRADE = HEAD + b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Protocol: derp\r\n\r\n"


class Browser:
    """A WebSocket client that collects the bytes of its messages."""

    def __init__(self, raw: RawClient) -> None:
        self.raw = raw
        self.protocol = Protocol(Side.CLIENT)
        self.messages: list[bytes] = []
        self.data = bytearray()
        self.pongs: list[bytes] = []

    def say(self, *opcodes: tuple[Opcode, bytes]) -> None:
        """Frames as they are given."""
        self.raw.send(*(Frame(opcode, data).serialize(mask=True) for opcode, data in opcodes))

    def send(self, data: bytes) -> None:
        self.say((Opcode.BINARY, data))

    async def more(self) -> bool:
        """Read once; false at the end."""
        async with asyncio.timeout(PATIENCE):
            data = await self.raw.reader.read(1 << 16)
        if not data:
            return False
        self.protocol.receive_data(data)
        for event in self.protocol.events_received():
            assert isinstance(event, Frame)
            if event.opcode is Opcode.BINARY:
                self.messages.append(bytes(event.data))
                self.data += event.data
            if event.opcode is Opcode.PONG:
                self.pongs.append(bytes(event.data))
        return True

    async def frame(self) -> tuple[int, bytes]:
        """The next DERP frame."""
        while len(self.data) < 5 or len(self.data) < 5 + int.from_bytes(self.data[1:5], "big"):
            assert await self.more(), self.protocol.close_rcvd
        kind, end = self.data[0], 5 + int.from_bytes(self.data[1:5], "big")
        payload = bytes(self.data[5:end])
        del self.data[:end]
        return kind, payload

    async def closed(self) -> int | None:
        """Read to the end: the code with which the relay closed."""
        with suppress(ConnectionResetError):
            while await self.more():
                pass
        return None if self.protocol.close_rcvd is None else self.protocol.close_rcvd.code


def login(node: LoopbackRelay) -> bytes:
    return handshake.client_info_frame(ALICE, node.public_key, ClientInfo())


async def browser(node: LoopbackRelay, early: bytes = b"") -> Browser:
    """Connected, up to the server's key."""
    raw = await node.connect()
    raw.send(UPGRADE, early)
    assert (await raw.head()).startswith(b"HTTP/1.1 101 ")
    client = Browser(raw)
    assert await client.frame() == (FrameType.SERVER_KEY, frames.MAGIC + node.public_key)
    return client


async def logged_in(node: LoopbackRelay) -> Browser:
    client = await browser(node)
    client.send(login(node))
    assert (await client.frame())[0] == FrameType.SERVER_INFO
    return client


async def plain(node: LoopbackRelay) -> RawClient:
    client = await node.connect()
    await client.login(BOB, node.public_key)
    return client


# -- the handshake


async def test_handshake(node: LoopbackRelay) -> None:
    client = await node.connect()
    client.send(UPGRADE[:-2] + b"Sec-WebSocket-Extensions: permessage-deflate\r\nOrigin: https://any.example\r\n\r\n")
    lines = (await client.head()).split(b"\r\n")
    assert lines[0] == b"HTTP/1.1 101 Switching Protocols"
    assert sorted(line for line in lines[1:] if line and not line.startswith(b"Date: ")) == [
        b"Connection: Upgrade",
        b"Sec-Websocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=",
        b"Sec-Websocket-Protocol: derp",
        b"Upgrade: websocket",
    ]
    assert node.hub.counters.websocket_accepts == 1
    assert node.hub.counters.accepts == 1


@pytest.mark.parametrize(
    ("old", "new", "status"),
    [
        (b"HTTP/1.1", b"HTTP/1.0", 426),
        (b"Connection: keep-alive, Upgrade\r\n", b"", 426),
        (b"GET", b"POST", 405),
        (b"Version: 13", b"Version: 8", 400),
        (b"Sec-WebSocket-Version: 13\r\n", b"", 400),
        (KEY, b"", 400),
        (KEY, KEY + KEY, 400),
        (b"jZQ==", b"jZQ=", 400),
        (b"dGhl", b"dG!l", 400),
    ],
)
async def test_wrong_handshakes(node: LoopbackRelay, old: bytes, new: bytes, status: int) -> None:
    client = await node.connect()
    client.send(UPGRADE.replace(old, new)[:-2] + b"Connection: close\r\n\r\n")
    assert (await client.rest()).split(b" ", 2)[1] == str(status).encode()
    assert node.hub.counters.accepts == node.hub.counters.websocket_accepts == 0


async def test_a_wrong_handshake_may_be_followed_by_a_right_one(node: LoopbackRelay) -> None:
    client = await node.connect()
    client.send(UPGRADE.replace(b"Version: 13", b"Version: 8"), UPGRADE)
    head = await client.head()
    assert b"\r\nSec-Websocket-Version: 13\r\n" in head
    await client.exactly(len(b'unsupported WebSocket protocol version (only 13 is supported): "8"\n'))
    assert (await client.head()).startswith(b"HTTP/1.1 101 ")


@pytest.mark.parametrize("offered", [b"derpy", b"Derp, derp", b"derp2, DERP"])
async def test_subprotocols_that_are_not_derp(node: LoopbackRelay, offered: bytes) -> None:
    """As stock derper: "derp" somewhere in it means WebSocket, and only "derp" itself is served."""
    client = await node.connect()
    client.send(UPGRADE.replace(b"Protocol: derp", b"Protocol: " + offered))
    assert (await client.head()).startswith(b"HTTP/1.1 101 ")
    rest = Browser(client)
    await rest.more()
    rest.say((Opcode.CLOSE, b"\x03\xf0"))
    assert await rest.closed() == CloseCode.POLICY_VIOLATION
    assert node.hub.counters.accepts == 0


# -- bytes in, bytes out


async def test_any_message_boundaries(node: LoopbackRelay) -> None:
    """DERP frames split over messages, joined in one, messages split over frames, with pings in between."""
    rng = random.Random(7)
    sent = login(node) + b"".join(frames.send_packet(ALICE.public, bytes([n]) * n * 10) for n in range(1, 60))
    pieces, start = [], 0
    while start < len(sent):
        end = start + rng.choice((0, 1, 2, 7, 700, 3000))
        pieces.append(sent[start:end])
        start = end
    stream = b""
    for number, piece in enumerate(pieces):
        cut = rng.randint(0, len(piece))
        stream += Frame(Opcode.BINARY, piece[:cut], fin=False).serialize(mask=True)
        stream += Frame(Opcode.PING, b"%d" % number).serialize(mask=True)
        stream += Frame(Opcode.CONT, piece[cut:]).serialize(mask=True)
    client = await browser(node, stream[:50])
    start = 50
    while start < len(stream):
        end = start + rng.choice((1, 2, 3, 100, 5000))
        client.raw.send(stream[start:end])
        await asyncio.sleep(0)
        start = end
    assert (await client.frame())[0] == FrameType.SERVER_INFO
    for n in range(1, 60):
        assert await client.frame() == (FrameType.RECV_PACKET, ALICE.public + bytes([n]) * n * 10)


async def test_with_a_plain_client_both_ways(node: LoopbackRelay) -> None:
    client, other = await logged_in(node), await plain(node)
    biggest = b"x" * frames.MAX_PACKET
    client.send(frames.send_packet(BOB.public, biggest))
    assert await other.frame() == (FrameType.RECV_PACKET, ALICE.public + biggest)
    other.send(frames.send_packet(ALICE.public, biggest), frames.send_packet(ALICE.public, b"small"))
    assert await client.frame() == (FrameType.RECV_PACKET, BOB.public + biggest)
    assert await client.frame() == (FrameType.RECV_PACKET, BOB.public + b"small")
    assert max(map(len, client.messages)) == 32768  # more is too much for a stock client


async def test_one_write_is_one_message(node: LoopbackRelay) -> None:
    client, other = await logged_in(node), await plain(node)
    other.send(frames.send_packet(ALICE.public, b"first one") + frames.send_packet(ALICE.public, b"other one"))
    await client.frame()
    await client.frame()
    assert [len(message) for message in client.messages[2:]] == [2 * (5 + 32 + 9)]


async def test_pings_are_answered(node: LoopbackRelay) -> None:
    client = await logged_in(node)
    client.say((Opcode.PING, b"hello"), (Opcode.BINARY, frames.ping(b"12345678")))
    raw = await client.raw.exactly(7)
    assert raw == b"\x8a\x05hello"
    assert await client.frame() == (FrameType.PONG, b"12345678")


# -- the end


@pytest.mark.parametrize(
    ("said", "code"),
    [
        ((Opcode.TEXT, b"hello"), CloseCode.UNSUPPORTED_DATA),
        ((Opcode.CONT, b"hello"), CloseCode.PROTOCOL_ERROR),
        ((Opcode.CLOSE, b"\x03\xe9bye"), CloseCode.GOING_AWAY),
        ((Opcode.CLOSE, b""), CloseCode.NO_STATUS_RCVD),
        ((Opcode.CLOSE, b"\x03\xed"), CloseCode.PROTOCOL_ERROR),
        ((Opcode.BINARY, b"\x7f" * ((64 << 10) + 70)), CloseCode.MESSAGE_TOO_BIG),
        ((Opcode.BINARY, frames.frame(FrameType.WATCH_CONNS)), CloseCode.NORMAL_CLOSURE),
    ],
)
async def test_how_it_ends(node: LoopbackRelay, said: tuple[Opcode, bytes], code: int) -> None:
    client = await logged_in(node)
    client.say(said)
    await until(lambda: not node.hub.links)
    await client.more()
    client.say((Opcode.CLOSE, b"\x03\xe8"))
    await client.raw.close()
    assert client.protocol.close_rcvd is not None
    assert client.protocol.close_rcvd.code == code


async def test_packets_before_the_goodbye_are_delivered(node: LoopbackRelay) -> None:
    client, other = await logged_in(node), await plain(node)
    packet = frames.send_packet(BOB.public, b"last words")
    client.say((Opcode.BINARY, packet), (Opcode.CLOSE, b""), (Opcode.BINARY, packet))
    assert await other.frame() == (FrameType.RECV_PACKET, ALICE.public + b"last words")
    await until(lambda: len(node.hub.links) == 1)
    assert node.hub.counters.packets_received == 1


async def test_who_does_not_say_goodbye_is_cut_off(node: LoopbackRelay, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(websocket, "GOODBYE_SECONDS", 0.02)
    client = await logged_in(node)
    client.send(frames.frame(FrameType.WATCH_CONNS))
    assert await client.closed() == CloseCode.NORMAL_CLOSURE


async def test_a_drained_client_is_told(node: LoopbackRelay) -> None:
    client = await logged_in(node)
    (link,) = node.hub.links
    link.close()
    assert await client.closed() == CloseCode.NORMAL_CLOSURE


async def test_a_client_that_just_leaves(node: LoopbackRelay) -> None:
    client = await logged_in(node)
    await client.raw.close()
    await until(lambda: not node.hub.links)


async def test_nothing_is_left(node: LoopbackRelay) -> None:
    """No cycle keeps a socket until some garbage collection."""
    client = await logged_in(node)
    (link,) = node.hub.links
    left = [weakref.ref(link._transport), weakref.ref(link._transport._protocol)]  # type: ignore[attr-defined]
    del link
    gc.collect()
    gc.disable()
    try:
        await client.raw.close()
        await until(lambda: not node.hub.links)
        await until(lambda: not any(ref() for ref in left))
    finally:
        gc.enable()


# -- back-pressure


async def test_a_rate_limit_holds_for_messages() -> None:
    """What was read and may not be used yet waits, in the middle of a message too; all of it arrives."""
    async with relay(limits=Limits(client_bytes_per_second=200_000, client_burst_bytes=2000)) as node:
        client, other = await logged_in(node), await plain(node)
        (link,) = [link for link in node.hub.links if link.session and link.session.key == ALICE.public]
        packets = [frames.send_packet(BOB.public, b"%04d" % n * 200) for n in range(200)]
        messages = [Frame(Opcode.BINARY, b"".join(packets[n : n + 50])) for n in range(0, 200, 50)]
        link._transport.data_received(  # type: ignore[attr-defined]
            b"".join(message.serialize(mask=True) for message in messages)
        )
        assert node.hub.counters.packets_received < 150
        assert node.hub.counters.rate_limit_waits == 1
        for n in range(200):
            assert await other.frame() == (FrameType.RECV_PACKET, ALICE.public + b"%04d" % n * 200)
        await client.raw.close()


async def test_a_stalled_browser_is_dropped_and_costs_only_its_own_packets() -> None:
    async with relay(limits=Limits(write_timeout=0.1)) as node:
        client, other = await logged_in(node), await plain(node)
        client.raw.writer.transport.pause_reading()  # type: ignore[attr-defined]
        packet = frames.send_packet(ALICE.public, b"x" * 60_000)
        async with asyncio.timeout(PATIENCE):
            while len(node.hub.links) == 2:
                other.send(packet)
                client.say((Opcode.PING, b"are you there?"))
                await asyncio.sleep(0.01)
        assert node.hub.counters.write_timeouts == 1
        other.send(frames.ping(b"12345678"))
        while (await other.frame())[0] != FrameType.PONG:
            pass


async def test_a_browser_that_reads_again_gets_what_waited() -> None:
    """The newest packets of each queue, and the last pong only."""
    async with relay(limits=Limits(write_timeout=PATIENCE)) as node:
        client, other = await logged_in(node), await plain(node)
        (session,) = [s for s in node.hub.router.active.values() if s.key == ALICE.public]
        client.raw.writer.transport.pause_reading()  # type: ignore[attr-defined]
        number = 0
        while session.paused_since is None:
            number += 1
            other.send(frames.send_packet(ALICE.public, b"%06d" % number * 2000))
            await asyncio.sleep(0)
        for ping in range(100):
            client.say((Opcode.PING, b"%03d" % ping))
        other.send(frames.send_packet(ALICE.public, b"the last one"), frames.ping(b"12345678"))
        while (await other.frame())[0] != FrameType.PONG:
            pass
        await until(lambda: node.hub.counters.packets_received == number + 1)
        (link,) = [link for link in node.hub.links if link.session is session]
        await until(lambda: link._transport._pong[2:] == b"099")  # type: ignore[attr-defined]
        client.raw.writer.transport.resume_reading()  # type: ignore[attr-defined]
        while (await client.frame())[1] != BOB.public + b"the last one":
            pass
        client.send(frames.ping(b"12345678"))
        while await client.frame() != (FrameType.PONG, b"12345678"):
            pass
        assert client.pongs == [b"099"]


class Deaf(asyncio.Transport):
    """A socket whose other side takes everything and answers nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.ended = ""

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        pass

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        pass

    def resume_reading(self) -> None:
        pass

    def write(self, data: bytes | bytearray | memoryview) -> None:
        pass

    def is_closing(self) -> bool:
        return bool(self.ended)

    def close(self) -> None:
        self.ended = "close"

    def abort(self) -> None:
        self.ended = "abort"


async def test_an_abort_after_the_goodbye_is_one(node: LoopbackRelay) -> None:
    deaf = Deaf()
    socket = websocket.WebSocket(deaf, node.hub.loop)
    socket.close()
    assert deaf.ended == "close"
    socket.abort()
    assert deaf.ended == "abort"
    socket.connection_lost(None)


async def test_nothing_is_kept_of_what_comes_after_the_goodbye(node: LoopbackRelay) -> None:
    socket = websocket.WebSocket(Deaf(), node.hub.loop)
    socket.end(CloseCode.NORMAL_CLOSURE)
    socket.data_received(Frame(Opcode.BINARY, b"x" * 60_000).serialize(mask=True))
    assert not socket._received
    socket.connection_lost(None)


async def test_admission_is_waited_for(node: LoopbackRelay) -> None:
    """Bytes behind the login wait until the link reads again, and keep their order."""
    client = await browser(node, b"")
    (link,) = node.hub.links
    link._transport.pause_reading()
    client.send(login(node))
    client.send(frames.ping(b"12345678"))
    await asyncio.sleep(0.01)
    assert link.session is None
    link._transport.resume_reading()
    assert (await client.frame())[0] == FrameType.SERVER_INFO
    assert await client.frame() == (FrameType.PONG, b"12345678")


async def test_websocket_after_other_requests(node: LoopbackRelay) -> None:
    client = await node.connect()
    client.send(b"GET /generate_204 HTTP/1.1\r\nHost: x\r\n\r\n", UPGRADE)
    assert (await client.head()).startswith(b"HTTP/1.1 204 ")
    assert (await client.head()).startswith(b"HTTP/1.1 101 ")
    assert await Browser(client).frame() == (FrameType.SERVER_KEY, frames.MAGIC + node.public_key)


async def test_fast_start_means_nothing_here(node: LoopbackRelay) -> None:
    client = await node.connect()
    client.send(UPGRADE[:-2] + FAST[FAST.index(b"Derp-Fast-Start") :])
    assert (await client.head()).startswith(b"HTTP/1.1 101 ")


def test_after_some_frames_it_is_the_turn_of_others() -> None:
    """A frame is work, however short: thousands of them in one read must not hold up everybody."""
    stranger = Stranger()
    stranger.says(UPGRADE)
    pings = b"".join(Frame(Opcode.PING, b"").serialize(mask=True) for _ in range(1000))
    stranger.wire.written.clear()
    stranger.wire.feed(pings)
    assert 0 < len(stranger.wire.written) // 2 < 300  # a pong has two bytes
    assert not stranger.wire.is_reading()
    stranger.wire.feed(b"")
    stranger.timers.turn()
    assert len(stranger.wire.written) // 2 == 1000
    assert stranger.wire.is_reading()
    stranger.leaves()


def test_frames_that_wait_for_their_turn_go_with_the_connection() -> None:
    stranger = Stranger()
    stranger.says(UPGRADE)
    stranger.wire.feed(b"".join(Frame(Opcode.PING, b"").serialize(mask=True) for _ in range(1000)))
    stranger.wire.written.clear()
    stranger.leaves()
    assert not stranger.wire.written
