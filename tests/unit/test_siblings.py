"""Workers of one node: their clients reach each other, and to everybody else they are one relay."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from itertools import combinations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, rule

from derper.relay import consistency
from derper.relay.moves import PATIENCE
from derper.relay.siblings import MAX_FRAME, QUEUE_PACKETS, Sibling
from derper.wire import frames
from derper.wire.client import PeerGone, PeerPresent, ReceivedPacket
from derper.wire.errors import ProtocolError
from derper.wire.frames import PeerGoneReason, PeerPresentFlags

from .core import Bench, BenchClient, BenchLink, key

DISCO = frames.DISCO_MAGIC + bytes(32 + 24)


class Way:
    """One direction between two workers: what was written waits until it is pumped."""

    def __init__(self) -> None:
        self.waiting: deque[bytes] = deque()
        self.to: Sibling
        self.tail = b""
        self.open = True

    def write(self, data: bytes) -> None:
        assert data
        self.waiting.append(data)

    def pump(self) -> bool:
        """Deliver one write, if there is one."""
        if not self.waiting:
            return False
        self.feed(self.waiting.popleft())
        return True

    def feed(self, data: bytes) -> None:
        data = self.tail + data
        used = self.to.receive(bytearray(data), 0, len(data), 0.0)
        self.tail = data[used:]


class Workers:
    """A node of `count` workers; each is a bench of its own with the node's key."""

    def __init__(self, count: int = 2, number: int = 0xFF) -> None:
        self.number = number
        self.benches = [Bench(number, worker) for worker in range(count)]
        self.ways: dict[tuple[int, int], Way] = {}
        self.synced: list[tuple[int, int]] = []
        for a, b in combinations(range(count), 2):
            self.join(a, b)

    def __getitem__(self, worker: int) -> Bench:
        return self.benches[worker]

    def join(self, a: int, b: int) -> None:
        there, back = Way(), Way()
        self.ways[a, b], self.ways[b, a] = there, back
        ends = [
            (self.benches[near].router, Sibling(self.benches[near].router, way.write, self._synced(near, far)))
            for near, far, way in ((a, b, there), (b, a, back))
        ]
        there.to, back.to = ends[1][1], ends[0][1]
        for router, sibling in ends:
            router.node.meet(sibling)

    def _synced(self, near: int, far: int) -> Callable[[], None]:
        def note() -> None:
            self.synced.append((near, far))

        return note

    def settle(self) -> None:
        """Deliver all that is under way."""
        while any(way.pump() for way in self.ways.values()):
            pass

    def end(self, worker: int) -> None:
        """The worker dies: the others see their sockets close."""
        for other in range(len(self.benches)):
            if other != worker:
                del self.ways[other, worker]
                self.ways.pop((worker, other)).to.close()
        self.benches[worker] = Bench(self.number, worker)

    def start(self, worker: int) -> None:
        for other in range(len(self.benches)):
            if other != worker:
                self.join(*sorted((worker, other)))

    def faults(self) -> list[str]:
        return [fault for bench in self.benches for fault in consistency.faults(bench.router)]


@pytest.fixture
def workers() -> Workers:
    return Workers()


def told(client: BenchClient) -> list[tuple[str, int]]:
    """What a watcher or a client heard of others."""
    events = client.received()
    return [
        ("present", event.peer[0]) if isinstance(event, PeerPresent) else ("gone", event.peer[0])
        for event in events
        if isinstance(event, PeerPresent | PeerGone)
    ]


# -- packets


@pytest.mark.parametrize("count", [1, 5])
def test_a_run_crosses_as_it_is(workers: Workers, count: int) -> None:
    alice, bob = workers[0].client(1), workers[1].client(2)
    workers.settle()
    packets = [bytes([n]) * 100 for n in range(count)]
    alice.feed(*(frames.send_packet(bob.key, packet) for packet in packets))
    workers.settle()
    assert len(bob.writes) == 1
    assert bob.received() == [ReceivedPacket(alice.key, packet) for packet in packets]
    here, there = workers[0].counters, workers[1].counters
    assert (here.packets_received, here.packets_sent, here.crossed_out) == (count, 0, count)
    assert (there.packets_received, there.packets_sent, there.crossed_in) == (0, count, count)
    assert not here.packets_forwarded_out
    assert not there.packets_forwarded_in


def test_a_stream_between_workers_may_be_cut_anywhere(workers: Workers) -> None:
    alice, bob = workers[0].client(1), workers[1].client(2)
    workers.settle()
    alice.feed(frames.send_packet(bob.key, b"x" * 50), frames.send_packet(bob.key, b""))
    workers[0].client(3)
    way = workers.ways[0, 1]
    data = b"".join(way.waiting)
    way.waiting.clear()
    for piece in (data[i : i + 1] for i in range(len(data))):
        way.feed(piece)
    assert bob.received() == [ReceivedPacket(alice.key, b"x" * 50), ReceivedPacket(alice.key, b"")]
    assert workers[1].router.has(key(3))


def test_a_run_too_long_for_a_frame_is_cut(workers: Workers) -> None:
    alice, bob = workers[0].client(1), workers[1].client(2)
    workers.settle()
    packets = [bytes([n]) * frames.MAX_PACKET for n in range(5)]
    alice.feed(*(frames.send_packet(bob.key, packet) for packet in packets))
    assert all(len(data) <= MAX_FRAME + 5 for data in workers.ways[0, 1].waiting)
    workers.settle()
    assert bob.received() == [ReceivedPacket(alice.key, packet) for packet in packets]
    assert workers[1].counters.crossed_in == 5


def test_what_crosses_goes_no_further(workers: Workers) -> None:
    """The client has just left for another worker, or for another node: the packet is dropped, not sent after it."""
    three = Workers(3)
    alice, bob = three[0].client(1), three[1].client(2)
    three.settle()
    alice.feed(frames.send_packet(bob.key, b"hello"))
    three[1].leave(bob)
    again = three[2].client(2)
    three[1].router.add_forwarder(key(2), link := BenchLink())
    three.settle()
    assert not again.writes
    assert not link.forwarded
    assert three[1].dropped() == {"gone_disconnected": 1}


def test_a_packet_from_another_node_takes_one_hop_inside(workers: Workers) -> None:
    peer, bob = workers[0].client(9, mesh=True), workers[1].client(2)
    workers.settle()
    peer.feed(frames.forward_packet(key(7), bob.key, b"hello"))
    workers.settle()
    assert bob.received() == [ReceivedPacket(key(7), b"hello")]
    assert workers[0].counters.packets_forwarded_in == 1
    assert workers[0].counters.crossed_out == workers[1].counters.crossed_in == 1


def test_a_packet_from_another_node_never_leaves_for_a_third(workers: Workers) -> None:
    peer = workers[0].client(9, mesh=True)
    for bench in workers.benches:
        bench.router.add_forwarder(key(2), BenchLink())
    peer.feed(frames.forward_packet(key(7), key(2), b"hello"))
    workers.settle()
    assert workers[0].dropped() == {"unknown_dest_on_fwd": 1}


def test_a_client_of_the_node_wins_over_other_nodes(workers: Workers) -> None:
    alice, bob = workers[0].client(1), workers[1].client(2)
    workers[0].router.add_forwarder(bob.key, link := BenchLink())
    workers.settle()
    alice.feed(frames.send_packet(bob.key, b"hello"))
    workers.settle()
    assert bob.received() == [ReceivedPacket(alice.key, b"hello")]
    assert not link.forwarded


def test_a_packet_may_be_faster_than_the_news_of_a_login(workers: Workers) -> None:
    alice, bob = workers[0].client(1), workers[1].client(2)
    alice.feed(frames.send_packet(bob.key, b"hello"))
    workers.settle()
    assert bob.received() == [ReceivedPacket(alice.key, b"hello")]
    assert workers[0].dropped() == {}


def test_nobody_has_it(workers: Workers) -> None:
    alice = workers[0].client(1)
    alice.feed(frames.send_packet(key(2), DISCO))
    assert (alice.received(), workers[0].dropped()) == ([], {})  # it might come in this moment
    for _ in range(PATIENCE):
        workers[0].router.give_up(0.0)
    assert alice.received() == [PeerGone(key(2), PeerGoneReason.NOT_HERE)]
    assert workers[0].dropped() == {"unknown_dest": 1}


def test_while_a_worker_does_not_read_the_oldest_packets_go_first(workers: Workers) -> None:
    alice, bob = workers[0].client(1), workers[1].client(2)
    workers.settle()
    sibling = workers.ways[1, 0].to
    sibling.pause()
    for n in range(QUEUE_PACKETS + 3):
        alice.feed(frames.send_packet(bob.key, n.to_bytes(2, "big")))
    assert sibling.queued == QUEUE_PACKETS
    assert workers[0].dropped() == {"queue_head": 3}
    carol = workers[0].client(3)  # what is no packet does not wait
    workers.settle()
    assert workers[1].router.has(carol.key)
    sibling.resume()
    workers.settle()
    got = [int.from_bytes(event.data, "big") for event in bob.received() if isinstance(event, ReceivedPacket)]
    assert got == list(range(3, QUEUE_PACKETS + 3))
    assert workers[0].counters.crossed_out == QUEUE_PACKETS
    assert not sibling.queued


def test_what_waited_for_a_worker_that_ends_is_dropped(workers: Workers) -> None:
    alice, bob = workers[0].client(1), workers[1].client(2)
    workers.settle()
    workers.ways[1, 0].to.pause()
    alice.feed(*[frames.send_packet(bob.key, b"hello")] * 2)
    workers.end(1)
    assert workers[0].dropped() == {"gone_disconnected": 2}


@pytest.mark.parametrize("data", [frames.frame(0x77), frames.frame(5, b"")[:1] + b"\xff" * 4])
def test_what_no_sibling_says(workers: Workers, data: bytes) -> None:
    with pytest.raises(ProtocolError, match="from a sibling"):
        workers.ways[0, 1].feed(data)


# -- who is told


def test_a_watcher_of_any_worker_hears_of_all_clients_once(workers: Workers) -> None:
    workers[0].client(1)
    workers[1].client(2, not_ideal=True)
    workers.settle()
    watcher = workers[0].client(9, mesh=True)
    workers.settle()
    watcher.received()
    watcher.feed(frames.watch_conns())
    present = {event.peer[0]: event for event in watcher.received() if isinstance(event, PeerPresent)}
    assert set(present) == {1, 2, 9}
    assert present[2].flags == PeerPresentFlags.NOT_IDEAL
    assert (str(present[2].ip), present[2].port) == ("192.0.2.1", 2)
    dave = workers[1].client(4)
    workers.settle()
    assert told(watcher) == [("present", 4)]
    workers[1].leave(dave)
    workers.settle()
    assert told(watcher) == [("gone", 4)]
    assert workers[0].counters.peer_gone_disconnected_frames == 1


def test_those_who_got_packets_are_told_who_leaves(workers: Workers) -> None:
    alice, bob = workers[0].client(1), workers[1].client(2)
    workers.settle()
    alice.feed(frames.send_packet(bob.key, b"hello"))
    workers.settle()
    bob.received()
    workers[0].leave(alice)
    workers.settle()
    assert bob.received() == [PeerGone(alice.key, PeerGoneReason.DISCONNECTED)]


def test_who_went_to_another_node_is_not_gone(workers: Workers) -> None:
    alice, bob = workers[0].client(1), workers[1].client(2)
    workers.settle()
    alice.feed(frames.send_packet(bob.key, b"hello"))
    workers.settle()
    bob.received()
    link = BenchLink()
    workers[1].router.add_forwarder(alice.key, link)
    workers[0].leave(alice)
    workers.settle()
    assert told(bob) == []
    workers[1].router.remove_forwarder(alice.key, link)
    assert told(bob) == [("gone", 1)]


def test_who_is_elsewhere_on_the_node_is_not_gone_from_the_mesh(workers: Workers) -> None:
    alice, bob = workers[0].client(1), workers[1].client(2)
    workers.settle()
    link = BenchLink()
    workers[1].router.add_forwarder(alice.key, link)
    alice.feed(frames.send_packet(bob.key, b"hello"))
    workers.settle()
    bob.received()
    workers[1].router.remove_forwarder(alice.key, link)
    assert told(bob) == []


# -- one key, several workers


def test_who_comes_last_wins_at_once(workers: Workers) -> None:
    old = workers[0].client(1)
    sender = workers[0].client(3)
    workers.settle()
    new = workers[1].client(1)
    workers.settle()
    sender.feed(frames.send_packet(key(1), b"hello"))
    workers.settle()
    assert [client for client in (old, new) if client.writes] == [new]
    assert old.session.is_duplicate
    assert new.session.is_duplicate
    assert sum(bench.router.duplicate_keys for bench in workers.benches) == 1
    assert sum(bench.router.duplicate_connections for bench in workers.benches) == 2
    assert sum(bench.counters.total_dup_client_conns for bench in workers.benches) == 1
    assert sum(len(bench.router.active) for bench in workers.benches) == 2
    assert workers.faults() == []


def test_who_spoke_last_is_the_active_one(workers: Workers) -> None:
    clients = [workers[0].client(1), workers[1].client(1)]
    sender = workers[1].client(3)
    workers.settle()
    for speaker in (0, 1, 1, 0):
        clients[speaker].feed(frames.ping(b"12345678"))
        workers.settle()
        for client in clients:
            client.writes.clear()
        sender.feed(frames.send_packet(key(1), b"hello"))
        workers.settle()
        assert [bool(client.writes) for client in clients] == [speaker == 0, speaker == 1]
    assert workers.faults() == []


def test_a_key_is_gone_with_its_last_session(workers: Workers) -> None:
    clients = [workers[0].client(1), workers[1].client(1)]
    bob = workers[0].client(2)
    watcher = workers[1].client(9, mesh=True)
    watcher.feed(frames.watch_conns())
    workers.settle()
    clients[1].feed(frames.send_packet(bob.key, b"hello"))
    workers.settle()
    for client in (bob, watcher):
        client.received()
    workers[1].leave(clients[1])
    workers.settle()
    assert told(bob) == told(watcher) == []
    assert not clients[0].session.is_duplicate
    assert workers[0].router.active[key(1)] is clients[0].session
    workers[0].leave(clients[0])
    workers.settle()
    assert told(bob) == told(watcher) == [("gone", 1)]


def test_three_at_two_workers(workers: Workers) -> None:
    first, second, third = workers[0].client(1), workers[0].client(1), workers[1].client(1)
    workers.settle()
    assert workers[0].router.here(key(1)) is second.session
    workers[0].leave(second)
    assert first.session.is_duplicate
    assert workers.faults() == []
    workers[1].leave(third)
    workers.settle()
    assert not first.session.is_duplicate
    assert workers[0].router.active[key(1)] is first.session


def test_both_speak_at_the_same_time(workers: Workers) -> None:
    clients = [workers[0].client(1), workers[1].client(1)]
    workers.settle()
    clients[0].feed(frames.ping(b"12345678"))
    clients[1].feed(frames.ping(b"12345678"))
    workers.settle()
    for client in clients:
        client.feed(frames.ping(b"12345678"))
    workers.settle()
    assert sum(key(1) in bench.router.active for bench in workers.benches) == 1
    assert workers.faults() == []


def test_what_was_under_way_to_a_session_that_gave_way_still_arrives() -> None:
    workers = Workers(3)
    old, new, sender = workers[0].client(1), workers[1].client(1), workers[2].client(2)
    workers.settle()
    sender.feed(frames.send_packet(key(1), b"hello"))
    old.feed(frames.ping(b"12345678"))
    while workers.ways[0, 1].pump():
        pass
    assert workers[1].router.here(key(1)) is new.session
    assert not workers[1].router.active
    workers.settle()
    assert new.received() == [ReceivedPacket(sender.key, b"hello")]


def test_a_mesh_peer_that_speaks_claims_nothing(workers: Workers) -> None:
    """Each of its links speaks all the time, and nobody writes to its key."""
    links = [workers[0].client(9, mesh=True), workers[1].client(9, mesh=True)]
    workers.settle()
    for link in links:
        link.feed(frames.ping(b"12345678"))
    assert not any(way.waiting for way in workers.ways.values())
    assert workers.faults() == []


def test_close_peer_reaches_all_sessions(workers: Workers) -> None:
    clients = [workers[0].client(1), workers[1].client(1), workers[1].client(1)]
    peer = workers[0].client(9, mesh=True)
    workers.settle()
    peer.feed(frames.close_peer(key(1)))
    workers.settle()
    assert [client.aborted for client in clients] == [True] * 3


# -- workers end and start


def test_a_worker_ends_and_its_clients_are_gone(workers: Workers) -> None:
    alice, bob, carol = workers[0].client(1), workers[1].client(2), workers[1].client(3)
    clone = workers[0].client(3)
    watcher = workers[0].client(9, mesh=True)
    watcher.feed(frames.watch_conns())
    workers.settle()
    bob.feed(frames.send_packet(alice.key, b"hello"))
    carol.feed(frames.send_packet(alice.key, b"hello"))
    workers.settle()
    for client in (alice, watcher):
        client.received()
    workers.end(1)
    assert told(alice) == told(watcher) == [("gone", 2)]
    assert workers[0].router.active[key(3)] is clone.session
    assert not clone.session.is_duplicate
    assert workers.faults() == []


def test_a_worker_starts_and_hears_of_all(workers: Workers) -> None:
    alice = workers[0].client(1)
    workers.end(1)
    workers[0].client(2)
    workers.start(1)
    again = workers[1].client(2)  # before it has heard of the other one
    workers.settle()
    assert (1, 0) in workers.synced
    again.feed(frames.send_packet(alice.key, b"hello"))
    workers.settle()
    assert alice.received() == [ReceivedPacket(again.key, b"hello")]
    assert [key(2) in bench.router.active for bench in workers.benches].count(True) == 1
    assert workers.faults() == []


def test_both_had_the_key_before_they_met(workers: Workers) -> None:
    workers.end(1)
    workers[0].client(1)
    workers[1].client(1)
    workers.start(1)
    workers.settle()
    assert sum(key(1) in bench.router.active for bench in workers.benches) == 1
    assert workers.faults() == []


class Agreement(RuleBasedStateMachine):
    """Whatever happens and in whatever order it is heard of, in the end all workers know the same."""

    clients: Bundle[tuple[int, BenchClient]] = Bundle("clients")

    @initialize(count=st.integers(2, 3))
    def begin(self, count: int) -> None:
        self.workers = Workers(count)
        self.alive: list[tuple[int, BenchClient]] = []

    @rule(target=clients, worker=st.integers(0, 2), number=st.integers(1, 2))
    def connect(self, worker: int, number: int) -> tuple[int, BenchClient]:
        worker %= len(self.workers.benches)
        made = (worker, self.workers[worker].client(number))
        self.alive.append(made)
        return made

    @rule(client=clients)
    def speak(self, client: tuple[int, BenchClient]) -> None:
        if client in self.alive:
            client[1].feed(frames.ping(b"12345678"))

    @rule(client=consumes(clients))
    def leave(self, client: tuple[int, BenchClient]) -> None:
        if client in self.alive:
            self.alive.remove(client)
            self.workers[client[0]].leave(client[1])

    @rule(worker=st.integers(0, 2))
    def restart(self, worker: int) -> None:
        worker %= len(self.workers.benches)
        self.workers.end(worker)
        self.workers.start(worker)
        self.alive = [client for client in self.alive if client[0] != worker]

    @rule(a=st.integers(0, 2), b=st.integers(0, 2))
    def hear(self, a: int, b: int) -> None:
        if (a, b) in self.workers.ways:
            self.workers.ways[a, b].pump()

    @rule()
    def settle(self) -> None:
        self.workers.settle()
        assert self.workers.faults() == []
        numbers = {client.key[0] for _, client in self.alive}
        for bench in self.workers.benches:
            assert {found[0] for found in (*bench.router.active, *bench.router.elsewhere)} == numbers
        owners: dict[bytes, int] = {}
        for worker, bench in enumerate(self.workers.benches):
            for found in bench.router.active:
                assert owners.setdefault(found, worker) == worker
        for bench in self.workers.benches:
            for found, elsewhere in bench.router.elsewhere.items():
                owner = self.workers[owners[found]]
                assert any(way.to is elsewhere.sibling for way in self.workers.ways.values())
                assert elsewhere.frame in [s.present_frame() for s in owner.router.sessions_of(found)]
        count = sum(bench.router.duplicate_connections for bench in self.workers.benches)
        keys = [client.key for _, client in self.alive]
        assert count == sum(keys.count(found) > 1 for found in keys)

    def teardown(self) -> None:
        self.settle()


TestAgreement = Agreement.TestCase
TestAgreement.settings = settings(max_examples=300, stateful_step_count=50, deadline=None)
