"""Clients that read slowly or not at all: what it costs them, and nobody else."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

import pytest

from derper.net import link as link_module
from derper.net import stalls as stalls_module
from derper.net.stalls import Stalls
from derper.relay.limits import Limits
from derper.wire import frames
from derper.wire.frames import FrameType
from derper.wire.handshake import ClientInfo
from derper.wire.keys import MeshKey, MeshKeys, NodePrivate

from .loopback import LoopbackRelay, RawClient, private, relay, until

pytestmark = pytest.mark.both_loops
ALICE, BOB, CAROL = private(1), private(2), private(3)
MESH_KEY = MeshKey(b"\xab" * 32)


async def stalled(node: LoopbackRelay, key: NodePrivate, info: ClientInfo | None = None) -> RawClient:
    """A client that has logged in and reads no more."""
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sock.setblocking(False)
    await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", node.listener.port))
    client = RawClient(*await asyncio.open_connection(sock=sock))
    node.raw_clients.append(client)
    await client.login(key, node.public_key, info)
    transport: Any = client.writer.transport
    transport.pause_reading()
    return client


def only_the_test_looks(node: LoopbackRelay) -> None:
    """For stalled clients: the hub does not."""
    assert node.hub._look_timer is not None
    node.hub._look_timer.cancel()


async def test_a_client_that_does_not_read_costs_nobody_else() -> None:
    async with relay() as node:
        only_the_test_looks(node)
        alice, carol = await node.log_in(ALICE), await node.log_in(CAROL)
        await stalled(node, BOB)
        session, counters = node.session(BOB), node.hub.counters
        while session.paused_since is None:
            alice.send(*[frames.send_packet(BOB.public, bytes(60_000))] * 10, frames.send_packet(CAROL.public, b"turn"))
            assert await carol.frame() == (FrameType.RECV_PACKET, ALICE.public + b"turn")
        alice.send(*[frames.send_packet(BOB.public, bytes(1000))] * 100, frames.send_packet(CAROL.public, b"last"))
        assert await carol.frame() == (FrameType.RECV_PACKET, ALICE.public + b"last")
        assert len(session._queue) == 32
        assert sum(counters.packets_dropped.values()) >= 68
        (link,) = node.hub.paused
        ((found, seconds),) = node.hub.stalls.look([link], session.paused_since + 2.0)
        assert found is link
        assert seconds == pytest.approx(2.0)
        link.stalled(2.0)
        assert not link._transport.is_closing()
        link.stalled(2.1)
        await until(lambda: BOB.public not in node.hub.router.active)
        assert counters.write_timeouts == 1
        assert not node.hub.paused
        assert counters.packets_received == (
            counters.packets_sent + sum(counters.packets_dropped.values()) + counters.packets_forwarded_out
        )
        alice.send(frames.send_packet(CAROL.public, b"after"))
        assert await carol.frame() == (FrameType.RECV_PACKET, ALICE.public + b"after")


async def test_a_client_that_reads_again_gets_the_newest_packets() -> None:
    async with relay() as node:
        alice = await node.log_in(ALICE)
        bob = await stalled(node, BOB)
        session, number = node.session(BOB), 0
        while session.paused_since is None or len(session._queue or ()) < 32:
            alice.send(frames.send_packet(BOB.public, number.to_bytes(4, "big") + bytes(50_000)), frames.ping(bytes(8)))
            assert (await alice.frame())[0] == FrameType.PONG
            number += 1
        transport: Any = bob.writer.transport
        transport.resume_reading()
        numbers: list[int] = []
        while not numbers or numbers[-1] != number - 1:
            kind, payload = await bob.frame()
            assert kind == FrameType.RECV_PACKET
            numbers.append(int.from_bytes(payload[32:36], "big"))
        assert numbers == sorted(numbers)
        assert numbers[-32:] == list(range(number - 32, number))
        assert len(numbers) + sum(node.hub.counters.packets_dropped.values()) == number


async def test_mesh_peers_may_stall_for_longer() -> None:
    async with relay() as node:
        node.hub.mesh_keys = MeshKeys(MESH_KEY, (MESH_KEY,))
        await stalled(node, ALICE, ClientInfo(mesh_key=MESH_KEY))
        (link,) = node.hub.links
        link.stalled(29.9)
        assert not link._transport.is_closing()
        link.stalled(30.1)
        await until(lambda: not node.hub.links)


async def test_no_write_timeout() -> None:
    async with relay(limits=Limits(write_timeout=0.0)) as node:
        await node.log_in(ALICE)
        (link,) = node.hub.links
        link.stalled(1e9)
        assert not link._transport.is_closing()


async def test_the_hub_drops_stalled_clients_and_keeps_others_alive() -> None:
    async with relay() as node:
        alice = await node.log_in(ALICE)
        await node.log_in(BOB)
        hub = node.hub
        (stalling,) = [link for link in hub.links if link.session is not None and link.session.key == BOB.public]
        stalling.pause_writing()
        assert stalling.session is not None
        stalling.session.paused_since = hub.clock() - 3.0
        for _ in range(65):
            assert hub._timer is not None
            hub._timer.cancel()
            hub._tick()
        assert hub._look_timer is not None
        hub._look_timer.cancel()
        hub._look()
        assert await alice.frame() == (FrameType.KEEP_ALIVE, b"")
        await until(lambda: BOB.public not in hub.router.active)


async def test_a_client_with_little_traffic_that_does_not_read_is_noticed() -> None:
    """Long before so much waits that the transport complains."""
    async with relay() as node:
        alice, bob = await node.log_in(ALICE), await stalled(node, BOB)
        only_the_test_looks(node)
        session, hub, now = node.session(BOB), node.hub, 1000.0
        (link,) = [link for link in hub.links if link.session is session]
        while not (found := hub.stalls.look(hub.paused, now)):
            alice.send(frames.send_packet(BOB.public, bytes(1000)), frames.ping(bytes(8)))
            assert (await alice.frame())[0] == FrameType.PONG
            assert session.paused_since is None
        assert found == [(link, 0.0)]
        assert hub.stalls.look((), now + 2.5) == [(link, 2.5)]
        transport: Any = bob.writer.transport
        transport.resume_reading()
        await bob.frame()
        await until(lambda: not hub.stalls.look((), now + 3.0))


async def test_only_the_first_write_after_a_look_is_noted(node: LoopbackRelay, monkeypatch: pytest.MonkeyPatch) -> None:
    alice = await node.log_in(ALICE)
    (link,) = node.hub.links
    session, stalls = node.session(ALICE), node.hub.stalls
    for _ in range(2):
        assert stalls.look((), 0.0) == []
        assert (list(stalls._written), session.write) == ([], link.write)
        for _ in range(2):
            alice.send(frames.ping(bytes(8)))
            await alice.frame()
            assert (list(stalls._written), session.write) == ([link], link._transport.write)


async def test_who_is_closed_is_gone_at_once(node: LoopbackRelay, monkeypatch: pytest.MonkeyPatch) -> None:
    """For all others; the connection itself ends when the client has taken what it was sent, or does not."""
    monkeypatch.setattr(link_module, "_GOODBYE_SECONDS", 0.05)
    alice, _ = await node.log_in(ALICE), await stalled(node, BOB)
    session = node.session(BOB)
    (link,) = [link for link in node.hub.links if link.session is session]
    while session.paused_since is None:
        alice.send(frames.send_packet(BOB.public, bytes(60_000)), frames.ping(bytes(8)))
        await alice.frame()
    link.close()
    assert BOB.public not in node.hub.router.active
    assert link in node.hub.links
    assert link not in node.hub.paused
    late = frames.send_packet(ALICE.public, b"too late")  # TLS hands over what it has while it flushes
    link.get_buffer(-1)[: len(late)] = late
    link.buffer_updated(len(late))
    assert node.hub.counters.protocol_errors == 0
    link.close()  # once more changes nothing
    await until(lambda: link not in node.hub.links)
    link.close()
    alice.send(frames.ping(b"12345678"))
    assert await alice.frame() == (FrameType.PONG, b"12345678")


class SlowLink:
    """A link of which bytes wait."""

    tcp_descriptor = None

    def __init__(self) -> None:
        self.acknowledged = 0
        self.paused_since = 10.0
        self.found_empty = 0

    def note_next_write(self) -> None:
        self.found_empty += 1


def test_only_so_many_links_are_looked_at_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stalls_module, "_AT_ONCE", 3)
    stalls, links = Stalls(), [SlowLink() for _ in range(7)]
    some: list[Any] = list(links)
    for link in some:
        stalls.note_write(link)
    stalls.forget(some[0])
    for found in (3, 6, 6):
        stalls.look(some[:1], 20.0)
        assert sum(link.found_empty for link in links) == found
    assert [link.found_empty for link in links] == [0, 1, 1, 1, 1, 1, 1]


def test_a_client_that_reads_slowly_has_not_stalled() -> None:
    stalls, link = Stalls(), SlowLink()
    waiting: Any = [link]
    looks = []
    for second in range(10, 16):
        looks += [seconds for _, seconds in stalls.look(waiting, float(second))]
        link.acknowledged += 1024
    assert looks == [0, 1, 0, 1, 0, 1]
    assert [seconds for _, seconds in stalls.look(waiting, 20.0)] == [0]
    assert [seconds for _, seconds in stalls.look(waiting, 29.0)] == [9]
    stalls.forget(waiting[0])
    assert stalls.look((), 30.0) == []
