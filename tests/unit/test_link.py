"""DERP links on loopback sockets: login, admission, limits, clients that misbehave, and what is left of them."""

from __future__ import annotations

import asyncio
import gc
import os
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from derper.net import link as link_module
from derper.net.admission import Address, Admission
from derper.net.doorman import Doorman, Reception
from derper.net.hub import Hub
from derper.net.link import Link
from derper.relay.admission import AdmissionPolicy
from derper.relay.counters import DropReason
from derper.relay.limits import Limits
from derper.relay.session import Session
from derper.wire import frames, handshake
from derper.wire.client import KeepAlive
from derper.wire.frames import HEADER, FrameType
from derper.wire.handshake import ClientInfo
from derper.wire.keys import MeshKey, MeshKeys, NodePrivate, NodePublic

from .core import Bench, events_of
from .loopback import FAST, PATIENCE, UPGRADE, LoopbackRelay, RawClient, private, relay, until
from .streams import cuts

pytestmark = pytest.mark.both_loops
ALICE, BOB, CAROL = private(1), private(2), private(3)
MESH_KEY = MeshKey(b"\xab" * 32)


def login_frame(node: LoopbackRelay, key: NodePrivate = ALICE, info: ClientInfo | None = None) -> bytes:
    return handshake.client_info_frame(key, node.public_key, info or ClientInfo())


# -- the login


async def test_who_does_not_log_in_is_dropped(node: LoopbackRelay, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link_module, "LOGIN_SECONDS", 0.02)
    client = await node.connect()
    client.send(FAST, login_frame(node)[:50])
    assert await client.rest() == handshake.server_key_frame(node.public_key)
    assert node.hub.counters.protocol_errors == 1


@pytest.mark.parametrize("head", [UPGRADE, FAST])
@pytest.mark.parametrize("early", [frames.ping(b"12345678"), b"\x02\0\0\0\x60" + bytes(96)])
async def test_who_begins_badly_is_greeted_all_the_same(node: LoopbackRelay, head: bytes, early: bytes) -> None:
    """As by stock derper, which reads nothing before it has said who it is."""
    client = await node.connect()
    client.send(head, early)
    if head == UPGRADE:
        assert (await client.head()).startswith(b"HTTP/1.1 101 ")
    assert await client.rest() == handshake.server_key_frame(node.public_key)


async def test_the_login_timer_ends_with_the_login(node: LoopbackRelay, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link_module, "LOGIN_SECONDS", 0.02)
    client = await node.log_in(ALICE)
    idle = await node.connect()
    idle.send(FAST)
    await idle.rest()
    client.send(frames.ping(b"12345678"))
    assert await client.frame() == (FrameType.PONG, b"12345678")


@pytest.mark.parametrize(
    "first",
    [
        frames.ping(b"12345678"),
        b"GET / HTTP/1.1\r\n",
        HEADER.pack(FrameType.CLIENT_INFO, 0xFFFFFFFF),
        HEADER.pack(FrameType.CLIENT_INFO, (256 << 10) + 1),
        HEADER.pack(FrameType.CLIENT_INFO, 55),
        frames.frame(FrameType.CLIENT_INFO, bytes(55)),
        frames.frame(FrameType.CLIENT_INFO, bytes(200)),
        bytes(5),
    ],
    ids=["ping", "http", "4 GiB", "256 KiB + 1", "head of a short one", "short", "zeros", "type 0"],
)
async def test_a_login_that_is_none(node: LoopbackRelay, first: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link_module, "LOGIN_SECONDS", 2 * PATIENCE)  # it is not the timer that ends it
    client = await node.connect()
    client.send(FAST, first)
    assert await client.rest() == handshake.server_key_frame(node.public_key)
    assert node.hub.counters.protocol_errors == 1
    assert not node.hub.router.active


async def test_the_longest_login(node: LoopbackRelay) -> None:
    overhead = len(login_frame(node, info=ClientInfo(app_name="x"))) - 1
    info = ClientInfo(app_name="x" * ((256 << 10) + 5 - overhead))
    frame = login_frame(node, info=info)
    assert len(frame) == (256 << 10) + 5
    client = await node.connect()
    client.send(FAST, frame, frames.send_packet(ALICE.public, bytes(64 << 10)), frames.ping(b"12345678"))
    assert [(await client.frame())[0] for _ in range(4)] == [
        FrameType.SERVER_KEY,
        FrameType.SERVER_INFO,
        FrameType.RECV_PACKET,
        FrameType.PONG,
    ]


async def test_packets_between_clients(node: LoopbackRelay) -> None:
    alice, bob = await node.log_in(ALICE), await node.log_in(BOB)
    packets = [os.urandom(size) for size in (0, 1, 1280, 64 << 10, 100)] * 5
    alice.send(*(frames.send_packet(BOB.public, packet) for packet in packets))
    for packet in packets:
        assert await bob.frame() == (FrameType.RECV_PACKET, ALICE.public + packet)


@pytest.mark.parametrize(
    "garbage",
    [
        HEADER.pack(FrameType.SEND_PACKET, 0xFFFFFFFF),
        frames.frame(FrameType.SEND_PACKET, bytes(31)),
        frames.watch_conns(),
        frames.ping(bytes(1001)),
    ],
    ids=["4 GiB packet", "short packet", "watch", "long ping"],
)
async def test_garbage_ends_one_connection_and_no_other(node: LoopbackRelay, garbage: bytes) -> None:
    alice, mallory = await node.log_in(ALICE), await node.log_in(BOB)
    mallory.send(garbage)
    assert await mallory.rest() == b""
    assert node.hub.counters.protocol_errors == 1
    alice.send(frames.send_packet(ALICE.public, b"still here"))
    assert await alice.frame() == (FrameType.RECV_PACKET, ALICE.public + b"still here")
    assert list(node.hub.router.active) == [ALICE.public]


async def test_an_unknown_frame_of_4_gib_is_not_kept(node: LoopbackRelay) -> None:
    alice = await node.log_in(ALICE)
    alice.send(HEADER.pack(0x42, 0xFFFFFFFF))
    for _ in range(64):
        alice.send(bytes(64 << 10))
        await alice.writer.drain()
    (link,) = node.hub.links
    await until(lambda: node.session(ALICE)._skip == 0xFFFFFFFF - 64 * (64 << 10))
    assert link._tail == b""


async def test_a_relay_survives_clients_that_break_off_anywhere(node: LoopbackRelay) -> None:
    stream = FAST + login_frame(node) + frames.send_packet(ALICE.public, b"hello") + frames.ping(b"12345678")
    for length in range(0, len(stream), 7):
        client = await node.connect()
        client.send(stream[:length])
        if length % 2:
            client.writer.transport.abort()
        else:
            await client.close()
    survivor = await node.log_in(BOB)
    survivor.send(frames.ping(b"12345678"))
    assert await survivor.frame() == (FrameType.PONG, b"12345678")
    await until(lambda: len(node.hub.links) == 1)


# -- admission


class AskedAdmission(Admission):
    """Answers when the test says so."""

    def __init__(self) -> None:
        super().__init__(AdmissionPolicy())
        self.asked: asyncio.Queue[tuple[NodePublic, Address, Callable[[str | None], None]]] = asyncio.Queue()

    def ask(self, key: NodePublic, source: Address, answered: Callable[[str | None], None]) -> None:
        self.asked.put_nowait((key, source, answered))


async def test_bytes_wait_for_the_admission() -> None:
    admission = AskedAdmission()
    async with relay(admission=admission) as node:
        client = await node.connect()
        client.send(FAST, login_frame(node), frames.send_packet(ALICE.public, b"1"), frames.ping(b"12345678")[:6])
        key, source, answered = await admission.asked.get()
        assert (key, str(source)) == (ALICE.public, "127.0.0.1")
        await client.frame()
        assert not node.hub.router.active
        answered(None)
        assert (await client.frame())[0] == FrameType.SERVER_INFO
        assert await client.frame() == (FrameType.RECV_PACKET, ALICE.public + b"1")
        client.send(frames.ping(b"12345678")[6:], frames.send_packet(ALICE.public, b"2"))
        assert await client.frame() == (FrameType.PONG, b"12345678")
        assert await client.frame() == (FrameType.RECV_PACKET, ALICE.public + b"2")


async def test_a_refused_client_learns_nothing() -> None:
    admission = AskedAdmission()
    async with relay(admission=admission) as node:
        client = await node.connect()
        client.send(FAST, login_frame(node))
        (await admission.asked.get())[2]("it is on no list of admitted keys")
        assert await client.rest() == handshake.server_key_frame(node.public_key)
        assert node.hub.counters.protocol_errors == 0
        assert node.hub.counters.current_connections == 0


async def test_an_answer_for_a_client_that_left() -> None:
    admission = AskedAdmission()
    async with relay(admission=admission) as node:
        for refusal in (None, "no"):
            client = await node.connect()
            client.send(FAST, login_frame(node))
            answered = (await admission.asked.get())[2]
            (link,) = node.hub.links
            link.abort()
            await until(lambda: not node.hub.links)
            answered(refusal)
            assert not node.hub.router.active


async def test_the_answer_comes_too_late(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link_module, "LOGIN_SECONDS", 0.02)
    admission = AskedAdmission()
    async with relay(admission=admission) as node:
        client = await node.connect()
        client.send(FAST, login_frame(node))
        answered = (await admission.asked.get())[2]
        await client.rest()
        answered(None)
        assert not node.hub.router.active


async def test_a_flood_while_the_admission_is_asked_is_not_read() -> None:
    admission = AskedAdmission()
    async with relay(admission=admission) as node:
        client = await node.connect()
        client.send(FAST, login_frame(node))
        answered = (await admission.asked.get())[2]
        packet = frames.send_packet(ALICE.public, bytes(1000))
        client.send(packet * 600)
        answered(None)
        await client.frame()
        await client.frame()
        for _ in range(600):
            kind, payload = await client.frame()
            assert (kind, len(payload)) == (FrameType.RECV_PACKET, 1032)


async def test_mesh_peers_need_no_admission() -> None:
    seen: list[tuple[bytes, str]] = []
    async with relay(admission=AskedAdmission()) as node:
        node.hub.mesh_keys = MeshKeys(MeshKey(bytes(31) + b"\x01"), (MeshKey(bytes(31) + b"\x01"), MESH_KEY))
        node.hub.mesh_peer_seen = lambda key, host: seen.append((key, host))
        peer = await node.log_in(ALICE, ClientInfo(mesh_key=MESH_KEY))
        peer.send(frames.watch_conns())
        assert (await peer.frame())[0] == FrameType.PEER_PRESENT
        assert seen == [(ALICE.public, "127.0.0.1")]


async def test_a_wrong_mesh_key_makes_an_ordinary_client(node: LoopbackRelay) -> None:
    for keys in (None, MeshKeys(MESH_KEY, (MESH_KEY,))):
        node.hub.mesh_keys = keys
        client = await node.log_in(ALICE, ClientInfo(mesh_key=MeshKey(b"\xac" * 32)))
        assert not node.session(ALICE).can_mesh
        client.send(frames.watch_conns())
        assert await client.rest() == b""


# -- limits


async def test_a_client_over_its_rate_is_read_more_slowly() -> None:
    limits = Limits(client_bytes_per_second=2_000_000, client_burst_bytes=1)
    async with relay(limits=limits) as node:
        alice, bob = await node.log_in(ALICE), await node.log_in(BOB)
        started = asyncio.get_running_loop().time()
        count = 300
        alice.send(frames.send_packet(BOB.public, bytes(1000)) * count)
        for _ in range(count):
            await bob.frame()
        took = asyncio.get_running_loop().time() - started
        assert node.hub.counters.rate_limit_waits > 0
        # What is over the burst of one largest frame takes its time; the last read may still be unpaid.
        assert took > (count * 1037 - 65_568 - (256 << 10)) / 2_000_000
        node.hub.set_limits(Limits())
        assert node.session(ALICE).throttle(1 << 30, 0.0) == 0.0


async def test_a_client_with_a_rate_waits_often_and_never_for_long() -> None:
    async with relay(limits=Limits(client_bytes_per_second=50_000)) as node:
        alice = await node.log_in(ALICE)
        alice.send(frames.send_packet(BOB.public, bytes(1000)) * 300)
        await until(lambda: node.hub.counters.rate_limit_waits)
        burst, a_read = 65_568, 4096
        assert node.hub.counters.bytes_received <= burst + a_read


async def test_a_new_limit_holds_for_who_waits_under_the_old_one() -> None:
    async with relay(limits=Limits(client_bytes_per_second=1)) as node:
        alice, bob = await node.log_in(ALICE), await node.log_in(BOB)
        alice.send(frames.send_packet(BOB.public, bytes(60_000)) * 3)
        await until(lambda: node.hub.counters.rate_limit_waits)
        node.hub.set_limits(Limits(client_bytes_per_second=1 << 30))
        for _ in range(3):
            await bob.frame()
        node.hub.set_limits(Limits())
        assert node.session(ALICE).read_limit == 0


async def test_a_client_that_leaves_while_it_is_throttled() -> None:
    async with relay(limits=Limits(client_bytes_per_second=1)) as node:
        alice = await node.log_in(ALICE)
        alice.send(frames.send_packet(BOB.public, bytes(60_000)) * 3)
        await until(lambda: node.hub.counters.rate_limit_waits)
        (link,) = node.hub.links
        assert not link._transport.is_reading()
        link.abort()
        await until(lambda: not node.hub.links)


async def test_a_mesh_peer_closes_others_and_itself(node: LoopbackRelay) -> None:
    """What it sends behind that is still its own: it is closed when the loop comes to it."""
    node.hub.mesh_keys = MeshKeys(MESH_KEY, (MESH_KEY,))
    peer, bob = await node.log_in(ALICE, ClientInfo(mesh_key=MESH_KEY)), await node.log_in(BOB)
    peer.send(frames.close_peer(BOB.public))
    assert await bob.rest() == b""
    peer.send(frames.close_peer(ALICE.public), frames.note_preferred(True), frames.ping(b"12345678"))
    assert await peer.rest() == frames.pong(b"12345678")
    await until(lambda: not node.hub.links)
    assert node.hub.counters.current_home_connections == 0


async def test_packets_for_a_client_that_is_just_being_dropped_are_counted(node: LoopbackRelay) -> None:
    await node.log_in(ALICE)
    session = node.session(ALICE)
    (link,) = node.hub.links
    link.abort()
    session.deliver(BOB.public, frames.recv_packet(BOB.public, b"too late"), 1, 0.0)
    await until(lambda: not node.hub.links)
    counters = node.hub.counters
    assert (counters.packets_sent, counters.packets_dropped[DropReason.GONE_DISCONNECTED, False]) == (0, 1)


@pytest.mark.parametrize("first", range(7))
async def test_keep_alives_come_once_in_60_to_65_seconds(first: int) -> None:
    hub, client = Hub(private(0xF0), Admission(AdmissionPolicy(is_open=True))), Bench().client(first)
    hub.join(client.session)
    due = []
    for second in range(1, 1000):
        hub._tick()
        due += [second for event in client.received() if event == KeepAlive()]
    assert due == list(range(60 + first % 6, 1000, 60 + first % 6))
    hub.leave(client.session)
    assert hub.kept_alive == 0
    hub.stop()


# -- any split of the login and what follows, without sockets


class FakeTransport(asyncio.Transport):
    """Hands bytes to the protocol as a loop does, and keeps what it writes."""

    def __init__(self) -> None:
        super().__init__({"peername": ("192.0.2.1", 1)})
        self.protocol: asyncio.BaseProtocol
        self.written = b""
        self.closed = False

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        self.protocol = protocol

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        pass

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.written += bytes(data)

    def is_closing(self) -> bool:
        return self.closed

    def abort(self) -> None:
        self.closed = True

    close = abort

    def deliver(self, data: bytes) -> None:
        while data and not self.closed:
            protocol = self.protocol
            if isinstance(protocol, asyncio.BufferedProtocol):
                buffer = memoryview(protocol.get_buffer(-1))
                count = min(len(buffer), len(data))
                assert count
                buffer[:count] = data[:count]
                protocol.buffer_updated(count)
                data = data[count:]
            else:
                assert isinstance(protocol, asyncio.Protocol)
                protocol.data_received(data)
                return


def conversation(pieces: list[bytes]) -> tuple[bool, list[object]]:
    """What a client gets for these bytes: whether it was closed, and the events behind the login."""
    hub = Hub(private(0xF0), Admission(AdmissionPolicy(is_open=True)))
    transport = FakeTransport()
    first = Doorman(Reception(hub, lambda *_: pytest.fail("no DERP")))
    transport.set_protocol(first)
    first.connection_made(transport)
    for piece in pieces:
        transport.deliver(piece)
    written, closed = transport.written, transport.closed
    if isinstance(transport.protocol, asyncio.BufferedProtocol):
        transport.protocol.connection_lost(None)
        assert not hub.links
        assert not hub.router.active
    else:
        first.connection_lost(None)
    greeting = handshake.server_key_frame(hub.private_key.public)
    if not written.startswith(greeting) or len(written) == len(greeting):
        return closed, [written]
    behind = written[len(greeting) :]
    length = HEADER.size + HEADER.unpack_from(behind)[1]
    return closed, list(events_of(behind[length:]))


FRAMES = st.one_of(
    st.tuples(st.sampled_from([ALICE.public, BOB.public]), st.binary(max_size=90)).map(
        lambda pair: frames.send_packet(*pair)
    ),
    st.binary(min_size=8, max_size=20).map(frames.ping),
    st.binary(max_size=60).map(lambda body: frames.frame(0x99, body)),
    st.just(frames.watch_conns()),
)
LOGIN = handshake.client_info_frame(ALICE, private(0xF0).public, ClientInfo())


async def test_any_split_gives_the_same_conversation() -> None:
    @given(st.data())
    def check(data: st.DataObject) -> None:
        stream = FAST + LOGIN + b"".join(data.draw(st.lists(FRAMES, max_size=6)))
        assert conversation(data.draw(cuts(stream))) == conversation([stream])

    check()


async def test_any_bytes_are_answered_or_close_the_connection() -> None:
    """And no other exception leaves the callbacks."""

    @given(st.lists(st.binary(max_size=60), max_size=5), st.sampled_from([b"", FAST[:-2], FAST, FAST + LOGIN[:5]]))
    def check(pieces: list[bytes], start: bytes) -> None:
        conversation([start, *pieces])

    check()


# -- nothing is left


async def test_what_is_closed_waits_for_no_garbage_collection() -> None:
    """A connection's TLS is tens of kilobytes, and the old generation is rarely looked at."""
    async with relay(tls=True) as node:
        gc.collect()
        gc.freeze()  # so that only what is made from here on is searched
        gc.disable()
        try:
            client = await node.dial(ALICE)
            await client.close()
            await until(lambda: not node.hub.links)
            await until(lambda: not any(isinstance(found, Link | Session) for found in gc.get_objects()))
        finally:
            gc.enable()
            gc.unfreeze()


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="counts descriptors in /proc")
@pytest.mark.parametrize("tls", [False, True])
async def test_a_thousand_clients_leave_nothing(tls: bool) -> None:
    async with relay(tls=tls) as node:
        keys = [private(number) for number in range(1, 11)]

        async def come_and_go(key: NodePrivate, rounds: int) -> None:
            for number in range(rounds):
                if tls:
                    client = await node.dial(key)
                    client.send(keys[number % 10].public, b"hello")
                    await client.close()
                    continue
                reader, writer = await asyncio.open_connection("127.0.0.1", node.listener.port)
                raw = RawClient(reader, writer)
                await raw.login(key, node.public_key)
                raw.send(frames.send_packet(keys[number % 10].public, b"hello"))
                writer.transport.abort()
                await raw.rest()

        await come_and_go(ALICE, 1)  # libuv keeps a descriptor from the first connection on
        await until(lambda: not node.hub.links)
        before, tasks = descriptors(), len(asyncio.all_tasks())
        await asyncio.gather(*(come_and_go(key, 30 if tls else 100) for key in keys))
        await until(lambda: not node.hub.links)
        assert node.hub.counters.accepts == (301 if tls else 1001)
        assert not node.hub.router.active
        assert not node.hub.router._interested
        await until(lambda: descriptors() <= before)
        assert len(asyncio.all_tasks()) == tasks


async def test_clients_that_say_the_same_share_it() -> None:
    hub = Hub(private(0xF0), Admission(AdmissionPolicy(is_open=True)))
    short, long = b'{"version":2}', b'{"AppName":"' + b"x" * 256 + b'"}'
    assert hub.read_client_info(bytes(short)) is hub.read_client_info(short)
    assert hub.read_client_info(long) == hub.read_client_info(long)
    assert hub.read_client_info(long) is not hub.read_client_info(long)
