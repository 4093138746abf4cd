"""Three relays in one process, meshed over loopback."""

from __future__ import annotations

import asyncio
import random
import socket
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import replace
from typing import Any

import pytest

from derper import certs
from derper.client import Client
from derper.net import meshlink
from derper.net.listener import SocketOptions
from derper.net.mesh import Mesh, Peer, Timings
from derper.net.meshlink import MeshLink, PeerConnection
from derper.relay.counters import Counters, DropReason
from derper.wire import frames
from derper.wire.client import PeerGone, ReceivedPacket
from derper.wire.keys import MeshKey, MeshKeys, NodePublic

from .core import key
from .loopback import PATIENCE, LoopbackRelay, private, relay, until

pytestmark = pytest.mark.both_loops
MESH_KEY, OTHER_KEY = MeshKey(b"\xab" * 32), MeshKey(b"\xcd" * 32)
ALICE, BOB, CAROL = private(1), private(2), private(3)


class Node:
    """A relay and its mesh."""

    def __init__(self, name: str, running: LoopbackRelay, timings: Timings) -> None:
        self.name = name
        self.relay = running
        self.hub = running.hub
        self.hub.mesh_keys = MeshKeys(MESH_KEY, (MESH_KEY,))
        self.mesh = Mesh(self.hub, rng=random.Random(1), timings=timings)
        self.hub.mesh_peer_seen = self.mesh.seen

    @property
    def peer(self) -> Peer:
        return Peer(self.name, self.relay.endpoint, NodePublic(self.relay.public_key))

    def meet(self, *others: Node) -> None:
        self.mesh.set_peers({other.name: other.peer for other in others})

    def knows(self, public: bytes) -> bool:
        return public in self.hub.router.forwarders

    def linked(self, *others: Node) -> bool:
        status = self.mesh.status()
        return all(other.name in status and status[other.name].connected for other in others)

    def error(self, other: Node) -> str | None:
        return self.mesh.status()[other.name].error


QUICK = Timings(first_retry=0.01, last_retry=0.05)
ONCE = Timings(first_retry=1000.0)


@pytest.fixture
def timings() -> Timings:
    """A test that wants others parametrizes it."""
    return QUICK


@pytest.fixture
async def nodes(timings: Timings) -> AsyncIterator[list[Node]]:
    """Not meshed yet."""
    async with AsyncExitStack() as stack:
        made = []
        for number in range(3):
            running = await stack.enter_async_context(relay(0xF0 + number, tls=True))
            made.append(Node(f"n{number}", running, timings))
            stack.push_async_callback(made[-1].mesh.stop)
        yield made
        for node in made:
            await node.mesh.stop()
        assert not any(node.hub.router.forwarders for node in made)


async def meshed(nodes: list[Node]) -> None:
    for node in nodes:
        node.meet(*(other for other in nodes if other is not node))
    await until(lambda: all(node.linked(*(other for other in nodes if other is not node)) for node in nodes))


async def dial(node: Node, private_key: Any) -> Client:
    return await node.relay.dial(private_key)


async def test_packets_go_both_ways(nodes: list[Node]) -> None:
    await meshed(nodes)
    alice, bob = await dial(nodes[0], ALICE), await dial(nodes[1], BOB)
    await until(lambda: nodes[0].knows(BOB.public) and nodes[1].knows(ALICE.public))
    for number in range(50):
        alice.send(BOB.public, bytes([number]) * number)
    for number in range(50):
        assert await bob.receive_packet() == ReceivedPacket(ALICE.public, bytes([number]) * number)
    bob.send(ALICE.public, bytes(64 << 10))
    assert await alice.receive_packet() == ReceivedPacket(BOB.public, bytes(64 << 10))
    counters = [node.hub.counters for node in nodes]
    assert [counter.packets_forwarded_out for counter in counters] == [50, 1, 0]
    assert [counter.packets_forwarded_in for counter in counters] == [1, 50, 0]
    await alice.close()
    assert await bob.receive() == PeerGone(ALICE.public, 0)
    await bob.close()


async def test_a_client_that_moves_is_followed(nodes: list[Node]) -> None:
    await meshed(nodes)
    bob = await dial(nodes[0], BOB)
    for turn in (1, 2, 0):
        alice = await dial(nodes[turn], ALICE)
        await until(lambda: turn == 0 or nodes[0].knows(ALICE.public))  # noqa: B023
        bob.send(ALICE.public, b"hello")
        assert await alice.receive_packet() == ReceivedPacket(BOB.public, b"hello")
        await alice.close()
        await until(lambda: not nodes[0].knows(ALICE.public))
    await bob.close()


async def test_there_is_no_second_hop(nodes: list[Node]) -> None:
    """n0 believes that n1 has the client; n1 knows that n2 has it, and drops the packet all the same."""
    first, second, third = nodes
    first.meet(second)
    second.meet(third)
    alice, bob, carol = await dial(first, ALICE), await dial(third, BOB), await dial(second, CAROL)
    await until(lambda: first.knows(CAROL.public) and second.knows(BOB.public))
    (link,) = first.hub.router.forwarders[CAROL.public]
    first.hub.router.add_forwarder(BOB.public, link)
    alice.send(BOB.public, b"hello")
    dropped = second.hub.counters.packets_dropped
    await until(lambda: dropped[DropReason.UNKNOWN_DEST_ON_FWD, False] == 1)
    assert second.hub.counters.packets_forwarded_in == 1
    assert second.hub.counters.packets_forwarded_out == 0
    first.hub.router.remove_forwarder(BOB.public, link)
    for one in (alice, bob, carol):
        await one.close()


async def test_membership_changes_without_touching_other_links(nodes: list[Node]) -> None:
    first, second, third = nodes
    first.meet(second)
    await until(lambda: first.linked(second))
    since = first.mesh.status()["n1"].since
    first.meet(second, third)
    await until(lambda: first.linked(second, third))
    first.meet(second)
    assert list(first.mesh.status()) == ["n1"]
    await until(lambda: not third.hub.links)
    assert first.mesh.status()["n1"].since == since
    assert len(second.hub.links) == 1


async def test_a_peer_with_new_data_keeps_its_link(nodes: list[Node]) -> None:
    """A rotated pin must drop no link; the next dial uses it."""
    first, second, _ = nodes
    first.meet(second)
    await until(lambda: first.linked(second))
    status = first.mesh.status()["n1"]
    new_pin = replace(second.peer, endpoint=replace(second.relay.endpoint, cert_name=certs.PIN_PREFIX + "0" * 64))
    first.mesh.set_peers({"n1": new_pin})
    assert first.mesh.status()["n1"] is status
    assert status.connected
    (link,) = second.hub.links
    link.abort()
    await until(lambda: "The server's certificate is sha256-raw:" in str(first.error(second)))
    first.meet(second)
    await until(lambda: first.linked(second))


async def test_a_peer_with_another_server_key_is_another_peer(nodes: list[Node]) -> None:
    first, second, _ = nodes
    first.meet(second)
    await until(lambda: first.linked(second))
    first.mesh.set_peers({"n1": replace(second.peer, server_key=key(9))})
    await until(lambda: "the server's key is" in str(first.error(second)))
    assert not first.linked(second)
    await until(lambda: not second.hub.links)


async def test_a_wrong_mesh_key_makes_no_mesh(nodes: list[Node]) -> None:
    first, second, _ = nodes
    second.hub.mesh_keys = MeshKeys(OTHER_KEY, (OTHER_KEY,))
    first.meet(second)
    await until(lambda: second.hub.counters.protocol_errors >= 2)  # WATCH_CONNS of an ordinary client
    assert not second.hub.router.watchers
    await until(lambda: "when asked for its clients; is its mesh key the same?" in str(first.error(second)))
    assert not first.linked(second)
    second.hub.mesh_keys = MeshKeys(OTHER_KEY, (OTHER_KEY, MESH_KEY))
    await until(lambda: bool(second.hub.router.watchers))


async def test_rotating_the_mesh_key_drops_no_link(nodes: list[Node]) -> None:
    first, second, _ = nodes
    first.meet(second)
    await until(lambda: first.linked(second))
    since = first.mesh.status()["n1"].since
    for keys in (
        MeshKeys(MESH_KEY, (MESH_KEY, OTHER_KEY)),
        MeshKeys(OTHER_KEY, (OTHER_KEY, MESH_KEY)),
        MeshKeys(OTHER_KEY, (OTHER_KEY,)),
    ):
        first.hub.mesh_keys = second.hub.mesh_keys = keys
    assert first.mesh.status()["n1"].since == since


async def test_without_a_mesh_key(nodes: list[Node]) -> None:
    first, second, _ = nodes
    first.hub.mesh_keys = None
    first.meet(second)
    await until(lambda: first.error(second) == "there is no mesh key yet")
    first.hub.mesh_keys = MeshKeys(MESH_KEY, (MESH_KEY,))
    await until(lambda: first.linked(second))


async def test_a_peer_that_is_lost_is_dialed_again(nodes: list[Node]) -> None:
    first, second, _ = nodes
    first.meet(second)
    await until(lambda: first.linked(second))
    bob = await dial(second, BOB)
    await until(lambda: first.knows(BOB.public))
    for _ in range(3):
        since = first.mesh.status()["n1"].since
        for link in [link for link in second.hub.links if link.session is not None and link.session.can_mesh]:
            link.abort()
        await until(lambda: first.linked(second) and first.mesh.status()["n1"].since != since)  # noqa: B023
        await until(lambda: first.knows(BOB.public))
    assert first.mesh.status()["n1"].clients == 1
    await bob.close()


@pytest.mark.parametrize("timings", [ONCE])
async def test_a_peer_that_dials_us_is_dialed_at_its_address(nodes: list[Node]) -> None:
    """Where it comes from, it can be found: at once, whatever the retry."""
    first, second, _ = nodes
    lost = replace(second.peer, endpoint=replace(second.relay.endpoint, addresses=("127.0.0.2",)))
    first.mesh.set_peers({"n1": lost})
    await until(lambda: first.error(second) is not None)
    second.meet(first)
    await until(lambda: first.linked(second))


@pytest.mark.parametrize("timings", [ONCE])
async def test_new_data_are_tried_at_once(nodes: list[Node]) -> None:
    first, second, _ = nodes
    lost = replace(second.peer, endpoint=replace(second.relay.endpoint, addresses=("127.0.0.2",)))
    first.mesh.set_peers({"n1": lost})
    await until(lambda: first.error(second) is not None)
    first.meet(second)
    await until(lambda: first.linked(second))


@pytest.mark.parametrize("host", ["x" * 70, "a..b"])
async def test_an_address_that_is_none_does_not_end_the_dialing(nodes: list[Node], host: str) -> None:
    first, second, _ = nodes
    bad = replace(second.peer, endpoint=replace(second.relay.endpoint, addresses=(host,)))
    first.mesh.set_peers({"n1": bad})
    await until(lambda: first.error(second) is not None)
    assert "is not a host name" in str(first.error(second))
    first.meet(second)
    await until(lambda: first.linked(second))


async def test_a_relay_that_meets_itself(nodes: list[Node]) -> None:
    """-mesh-with may name the relay itself, as stock derper's may."""
    first = nodes[0]
    first.mesh.set_peers({"n0": replace(first.peer, server_key=None)})
    await until(lambda: first.mesh.status() == {})
    await until(lambda: not first.hub.links)


@pytest.mark.parametrize("timings", [replace(ONCE, silence=0.05)])
async def test_a_peer_that_falls_silent(nodes: list[Node]) -> None:
    first, second, _ = nodes
    first.meet(second)
    await until(lambda: first.error(second) == "nothing heard for 0 s")
    assert not first.linked(second)


async def test_pings_of_a_peer_are_answered(nodes: list[Node]) -> None:
    first, second, _ = nodes
    first.meet(second)
    await until(lambda: first.linked(second))
    (link,) = second.hub.links
    assert link.session is not None
    before = second.hub.counters.unknown_frames  # the relay has no use for the pong
    link.session.control(frames.ping(b"12345678"))
    await until(lambda: second.hub.counters.unknown_frames == before + 1)


async def test_a_relay_that_goes_takes_its_clients_out_of_the_table(nodes: list[Node]) -> None:
    await meshed(nodes)
    alice, bob = await dial(nodes[0], ALICE), await dial(nodes[1], BOB)
    await until(lambda: nodes[0].knows(BOB.public) and nodes[1].knows(ALICE.public))
    bob.send(ALICE.public, b"hello")
    await alice.receive_packet()
    nodes[1].relay.listener.close()
    await nodes[1].mesh.stop()
    nodes[1].hub.stop()
    assert await alice.receive() == PeerGone(BOB.public, 0)
    assert not nodes[0].knows(BOB.public)
    await alice.close()
    await bob.close()


@pytest.mark.parametrize("timings", [replace(QUICK, last_retry=1000.0)])
async def test_a_link_that_never_holds_is_dialed_ever_more_slowly(nodes: list[Node]) -> None:
    """A wrong mesh key must not make two relays dial each other four times a second."""
    first, second, _ = nodes
    second.hub.mesh_keys = MeshKeys(OTHER_KEY, (OTHER_KEY,))
    pauses: list[float] = []
    first.meet(second)
    (dialer,) = first.mesh._dialers.values()

    async def pause(seconds: float) -> None:
        pauses.append(seconds)
        await asyncio.sleep(0)

    dialer._pause = pause  # type: ignore[method-assign]
    await until(lambda: len(pauses) >= 5)
    assert all(5 <= pause / 0.01 / 2**number * 10 <= 15 for number, pause in enumerate(pauses))


async def test_the_socket_of_a_link_notices_a_dead_peer(nodes: list[Node]) -> None:
    """Nothing need be sent: the system asks after 10 s of silence, and gives up 15 s after the last answer."""
    first, second, _ = nodes
    set_options: list[dict[str, int]] = []

    class Noting(SocketOptions):
        def apply(self, sock: socket.socket) -> None:
            super().apply(sock)
            tcp = {name: getattr(socket, f"TCP_{name}") for name in ("KEEPIDLE", "KEEPINTVL", "USER_TIMEOUT")}
            set_options.append({name: sock.getsockopt(socket.IPPROTO_TCP, number) for name, number in tcp.items()})
            set_options[-1]["KEEPALIVE"] = sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)

    usual = Timings().sockets
    first.mesh._timings = replace(
        QUICK, sockets=Noting(usual.keep_alive, usual.user_timeout, usual.keep_alive_interval)
    )
    first.meet(second)
    await until(lambda: first.linked(second))
    assert set_options == [{"KEEPIDLE": 10, "KEEPINTVL": 5, "USER_TIMEOUT": 15000, "KEEPALIVE": 1}]


# -- a link that is full


class FakeConnection:
    """A connection whose socket the test fills."""

    def __init__(self) -> None:
        self.writable = True
        self.written: list[bytes] = []
        self.on_writable: Any = None

    def write(self, data: bytes) -> None:
        self.written.append(data)

    def fill(self, full: bool) -> None:
        self.writable = not full
        self.on_writable(not full)


class FullLink:
    """A link on such a connection, and what it counts."""

    def __init__(self, stall: float = 1000.0) -> None:
        self.connection = FakeConnection()
        self.counters = Counters()
        self.stalled = asyncio.Event()
        self.link = MeshLink(
            self.connection,  # type: ignore[arg-type]
            self.counters,
            asyncio.get_running_loop(),
            stall=stall,
            stalled=self.stalled.set,
        )

    def forward(self, *packets: bytes) -> None:
        self.link.forward(key(1), key(2), b"".join(frames.recv_packet(key(1), packet) for packet in packets))

    def dropped(self, reason: DropReason) -> tuple[int, int]:
        return self.counters.packets_dropped[reason, False], self.counters.bytes_dropped[reason, False]


PACKETS = [bytes([number]) * number for number in range(6)]
FORWARDED = [frames.forward_packet(key(1), key(2), packet) for packet in PACKETS]


async def test_a_full_link_keeps_the_newest_packets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each packet is counted once: when it leaves, or when it is dropped."""
    monkeypatch.setattr(meshlink, "_QUEUE_PACKETS", 3)
    full = FullLink()
    full.forward(*PACKETS)
    await asyncio.sleep(0)
    assert full.connection.written == [b"".join(FORWARDED)]
    full.connection.written.clear()
    full.connection.fill(True)
    full.forward(*PACKETS)
    assert full.connection.written == []
    assert full.dropped(DropReason.QUEUE_HEAD) == (3, 0 + 1 + 2)
    assert full.counters.packets_forwarded_out == 6
    full.connection.fill(False)
    assert full.connection.written == [b"".join(FORWARDED[3:])]
    assert full.counters.packets_forwarded_out == 6 + 3
    full.connection.fill(True)
    full.connection.fill(False)
    assert len(full.connection.written) == 1
    full.link.close()
    assert sum(full.counters.packets_dropped.values()) == 3


async def test_the_packets_of_one_turn_leave_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """But not so many that they fill the memory, and none twice."""
    monkeypatch.setattr(meshlink, "_AT_ONCE", 12)
    full = FullLink()
    full.forward(*PACKETS[:2])
    full.forward(*PACKETS[2:])
    assert full.connection.written == []
    assert full.link.queued == 6
    await asyncio.sleep(0)
    assert full.connection.written == [b"".join(FORWARDED)]
    full.forward(*PACKETS)
    full.forward(*PACKETS)
    assert full.connection.written[1:] == [b"".join(FORWARDED + FORWARDED)]
    full.forward(*PACKETS[:1])
    await asyncio.sleep(0)
    assert full.connection.written[2:] == [FORWARDED[0]]
    assert full.link.queued == 0
    assert full.counters.packets_forwarded_out == 6 + 12 + 1


async def test_packets_of_a_turn_in_which_the_link_fills_up_wait() -> None:
    full = FullLink()
    full.forward(*PACKETS)
    full.connection.fill(True)
    await asyncio.sleep(0)
    assert full.connection.written == []
    full.connection.fill(False)
    assert full.connection.written == [b"".join(FORWARDED)]


async def test_a_link_that_breaks_within_a_turn_writes_nothing_more() -> None:
    full = FullLink()
    full.forward(*PACKETS)
    full.link.close()
    await asyncio.sleep(0)
    assert full.connection.written == []
    assert full.dropped(DropReason.GONE_DISCONNECTED) == (6, 0 + 1 + 2 + 3 + 4 + 5)


async def test_what_waits_for_a_link_that_breaks_is_counted() -> None:
    full = FullLink()
    full.connection.fill(True)
    full.forward(*PACKETS)
    full.link.close()
    assert full.dropped(DropReason.GONE_DISCONNECTED) == (6, 0 + 1 + 2 + 3 + 4 + 5)
    assert full.counters.packets_forwarded_out == 0


class Detached:
    """A client whose transport a link takes; it is the transport, too."""

    writable = True

    def __init__(self) -> None:
        self.calls: list[str] = []

    def detach(self, _: object) -> tuple[Detached, bytes]:
        return self, b""

    def set_write_buffer_limits(self, high: int) -> None:
        pass

    def write(self, data: bytes) -> None:
        self.calls.append("write")

    def abort(self) -> None:
        self.calls.append("abort")


async def test_packets_for_a_link_that_was_just_aborted_are_not_counted_as_forwarded(node: LoopbackRelay) -> None:
    """Until the loop says that the connection is gone, too."""
    client, full = Detached(), FullLink()
    connection = PeerConnection(node.hub, client)  # type: ignore[arg-type]
    full.link = MeshLink(connection, full.counters, node.hub.loop, stall=1000.0, stalled=full.stalled.set)
    full.forward(*PACKETS[:3])
    connection.abort()
    full.forward(*PACKETS[3:])
    await asyncio.sleep(0)
    assert client.calls == ["abort"]
    full.link.close()
    assert full.counters.packets_forwarded_out == 0
    assert full.dropped(DropReason.GONE_DISCONNECTED) == (6, 0 + 1 + 2 + 3 + 4 + 5)


async def test_a_link_that_stays_full_is_given_up() -> None:
    full = FullLink(stall=0.01)
    full.connection.fill(True)
    async with asyncio.timeout(PATIENCE):
        await full.stalled.wait()


async def test_a_link_that_has_room_again_is_not_given_up() -> None:
    full = FullLink()
    full.connection.fill(True)
    timer = full.link._timer
    assert timer is not None
    full.connection.fill(False)
    assert timer.cancelled()
    full.connection.fill(True)
    timer = full.link._timer
    full.link.close()
    assert timer is not None
    assert timer.cancelled()


async def test_a_peer_that_does_not_read_is_given_up(nodes: list[Node]) -> None:
    """Its clients are gone for ours, who are told; what waited is counted."""
    first, second, _ = nodes
    first.mesh._timings = replace(ONCE, stall=0.2)
    first.meet(second)
    await until(lambda: first.linked(second))
    alice, bob = await dial(first, ALICE), await dial(second, BOB)
    await until(lambda: first.knows(BOB.public))
    (link,) = [link for link in second.hub.links if link.session is not None and link.session.can_mesh]
    link._transport.pause_reading()
    while first.knows(BOB.public):
        alice.send(BOB.public, bytes(64 << 10))
        await asyncio.sleep(0)
    assert "closed" in str(first.error(second))
    counters = first.hub.counters
    await alice.close()
    await until(lambda: not first.hub.links and not first.hub.router.moves)
    assert counters.packets_dropped[DropReason.GONE_DISCONNECTED, False] > 0
    assert counters.packets_received == counters.packets_forwarded_out + sum(counters.packets_dropped.values())
    await bob.close()


async def test_stopping_in_the_middle_of_a_dial(nodes: list[Node]) -> None:
    """The peer accepts TCP and never answers."""
    accepted = asyncio.Event()

    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)
        accepted.set()
        await reader.read()
        writer.close()

    server = await asyncio.start_server(silent, "127.0.0.1", 0)
    endpoint = replace(nodes[1].relay.endpoint, port=server.sockets[0].getsockname()[1])
    nodes[0].mesh.set_peers({"n1": replace(nodes[1].peer, endpoint=endpoint)})
    async with asyncio.timeout(PATIENCE):
        await accepted.wait()
        await nodes[0].mesh.stop()
        server.close()
        await server.wait_closed()
    assert nodes[0].mesh.status() == {}
