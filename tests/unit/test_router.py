"""The routing table against a small model, and the cases that the model's rules seldom reach."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, rule

from derper.relay import router as router_module
from derper.relay.limits import QUEUE_DEPTH
from derper.relay.moves import PATIENCE
from derper.relay.runs import packets_of
from derper.wire import frames
from derper.wire.client import PeerGone, PeerPresent, ReceivedPacket
from derper.wire.frames import PeerGoneReason

from .core import Bench, BenchClient, BenchLink, events_of, key

KEYS = range(1, 4)  # few, so that they meet


class Model:
    """What the router should do, without any of its shortcuts."""

    def __init__(self) -> None:
        self.here: dict[int, list[int]] = defaultdict(list)  # key -> its clients, who spoke last is at the end
        self.silent: set[int] = set()  # came second and have not spoken yet: of three they are the last to take over
        self.ways: dict[int, list[int]] = defaultdict(list)  # key -> mesh links, the oldest first
        self.paused: set[int] = set()
        self.got: dict[int, list[tuple[int, int]]] = defaultdict(list)  # client -> (source key, packet)
        self.queue: dict[int, list[tuple[int, int]]] = defaultdict(list)
        self.heard: dict[int, set[int]] = defaultdict(set)  # client -> keys it had packets from
        self.gone: dict[int, list[int]] = defaultdict(list)  # client -> keys it was told are gone
        self.forwarded: dict[int, list[tuple[int, int, int]]] = defaultdict(list)
        self.moving: dict[int, int] = {}  # key -> turns since it left the last peer that had it
        self.waiting: dict[int, list[tuple[int, int]]] = defaultdict(list)  # key -> (source key, packet)
        self.dropped = 0

    def connect(self, client: int, number: int) -> None:
        others = self.here[number]
        if len(others) == 1:
            self.silent.add(client)
        elif others and others[-1] in self.silent:
            others.insert(0, others.pop())
        others.append(client)
        for source, packet in self.found(number):
            self.send(source, number, packet)

    def spoke(self, client: int, number: int) -> None:
        self.here[number].sort(key=client.__eq__)  # to the end
        self.silent.discard(client)

    def send(self, source: int, dst: int, packet: int, *, by_mesh: bool = False) -> None:
        if self.here[dst]:
            client = self.here[dst][-1]
            if client in self.paused:
                self.queue[client].append((source, packet))
            else:
                self.heard[client].add(source)
                self.got[client].append((source, packet))
            self.dropped += len(self.queue[client]) - len(self.queue[client][-QUEUE_DEPTH:])
            self.queue[client] = self.queue[client][-QUEUE_DEPTH:]
        elif self.ways[dst] and not by_mesh:
            self.forwarded[self.ways[dst][0]].append((source, dst, packet))
        elif dst in self.moving and not by_mesh:
            self.waiting[dst].append((source, packet))
            self.dropped += len(self.waiting[dst]) > QUEUE_DEPTH
            self.waiting[dst] = self.waiting[dst][-QUEUE_DEPTH:]
        else:
            self.dropped += 1

    def resume(self, client: int) -> None:
        self.paused.discard(client)
        waiting = self.queue.pop(client, [])
        self.heard[client].update(source for source, _ in waiting)
        self.got[client] += waiting

    def leave(self, client: int, number: int) -> None:
        self.here[number].remove(client)
        if len(self.here[number]) == 1:
            self.silent.difference_update(self.here[number])
        self.silent.discard(client)
        self.paused.discard(client)
        self.dropped += len(self.queue.pop(client, []))
        self.heard.pop(client, None)
        self.left_region(number)

    def found(self, number: int) -> list[tuple[int, int]]:
        self.moving.pop(number, None)
        return self.waiting.pop(number, [])

    def turn(self) -> None:
        for number in self.moving:
            self.moving[number] += 1
        for number in [number for number, turns in self.moving.items() if turns == PATIENCE]:
            self.dropped += len(self.found(number))

    def left_region(self, number: int) -> None:
        for client, sources in self.heard.items():
            if number in sources and not self.here[number] and not self.ways[number]:
                sources.remove(number)
                self.gone[client].append(number)


class RouterMachine(RuleBasedStateMachine):
    """Clients and mesh links come, talk and go, in any order."""

    clients: Bundle[BenchClient] = Bundle("clients")
    keys = st.sampled_from(KEYS)

    @initialize()
    def start(self) -> None:
        self.bench = Bench()
        self.model = Model()
        self.links = [BenchLink(self.bench.counters) for _ in range(2)]
        self.live: dict[int, BenchClient] = {}  # by id()
        self.views: dict[int, set[int]] = {}  # what each watcher was told
        self.packets: Iterator[int] = iter(range(1 << 30))

    def feed(self, client: BenchClient, *stream: bytes) -> None:
        self.model.spoke(id(client), client.key[0])
        client.feed(*stream)

    def packet(self, number: int, size: int) -> bytes:
        return number.to_bytes(4, "big") + bytes(size)

    # -- rules

    @rule(target=clients, number=keys, mesh=st.booleans())
    def connect(self, number: int, mesh: bool) -> BenchClient:
        client = self.bench.client(number, mesh=mesh)
        self.live[id(client)] = client
        self.bench.router.catch_up(client.session)
        self.model.connect(id(client), number)
        return client

    @rule(client=clients, dst=keys, count=st.integers(1, 40), size=st.sampled_from([0, 30]))
    def send(self, client: BenchClient, dst: int, count: int, size: int) -> None:
        numbers = [next(self.packets) for _ in range(count)]
        self.feed(client, *(frames.send_packet(key(dst), self.packet(number, size)) for number in numbers))
        for number in numbers:
            self.model.send(client.key[0], dst, number)

    @rule(client=clients, src=keys, dst=keys)
    def arrive_by_mesh(self, client: BenchClient, src: int, dst: int) -> None:
        if client.session.can_mesh:
            number = next(self.packets)
            self.feed(client, frames.forward_packet(key(src), key(dst), self.packet(number, 5)))
            self.model.send(src, dst, number, by_mesh=True)

    @rule(client=clients, preferred=st.booleans())
    def prefer(self, client: BenchClient, preferred: bool) -> None:
        self.feed(client, frames.note_preferred(preferred))

    @rule(client=clients)
    def watch(self, client: BenchClient) -> None:
        if client.session.can_mesh:
            self.feed(client, frames.watch_conns())
            self.views.setdefault(id(client), set())

    @rule(client=clients)
    def freeze(self, client: BenchClient) -> None:
        if id(client) not in self.model.paused:
            client.session.pause(0.0)
            self.model.paused.add(id(client))

    @rule(client=clients)
    def thaw(self, client: BenchClient) -> None:
        if id(client) in self.model.paused:
            assert not client.writes
            client.session.resume(1.0)
            self.model.resume(id(client))

    @rule(client=consumes(clients))
    def leave(self, client: BenchClient) -> None:
        self.drop(client)

    @rule(client=clients, number=keys)
    def close_peer(self, client: BenchClient, number: int) -> None:
        if not client.session.can_mesh:
            return
        self.feed(client, frames.close_peer(key(number)))
        assert {id(other) for other in self.live.values() if other.aborted} == set(self.model.here[number])
        for other in [other for other in self.live.values() if other.aborted]:
            other.aborted = False  # here their owner lets them live: a rule cannot take others out of the bundle

    @rule(link=st.integers(0, 1), number=keys)
    def appears_at_a_peer(self, link: int, number: int) -> None:
        self.bench.router.add_forwarder(key(number), self.links[link])
        if link not in self.model.ways[number]:
            self.model.ways[number].append(link)
            for source, packet in self.model.found(number):
                self.model.forwarded[link].append((source, number, packet))

    @rule(link=st.integers(0, 1), number=keys)
    def disappears_from_a_peer(self, link: int, number: int) -> None:
        self.bench.router.remove_forwarder(key(number), self.links[link])
        if link in self.model.ways[number]:
            self.model.ways[number].remove(link)
            if not self.model.ways[number] and not self.model.here[number]:
                self.model.moving[number] = 0
            self.model.left_region(number)

    @rule(turns=st.integers(1, PATIENCE))
    def time_passes(self, turns: int) -> None:
        for _ in range(turns):
            self.bench.router.give_up(0.0)
            self.model.turn()

    def drop(self, client: BenchClient) -> None:
        if id(client) in self.model.paused:
            assert not client.writes
        else:
            self.read(client)
        self.bench.leave(client)
        del self.live[id(client)]
        self.views.pop(id(client), None)
        self.model.leave(id(client), client.key[0])
        self.model.got.pop(id(client), None)
        self.model.gone.pop(id(client), None)

    # -- what must hold

    def read(self, client: BenchClient) -> None:
        """What was written to the client is what the model says."""
        got, gone = [], []
        view = self.views.get(id(client))
        for event in client.received():
            if isinstance(event, ReceivedPacket):
                got.append((event.source[0], int.from_bytes(event.data[:4], "big")))
            elif isinstance(event, PeerPresent):
                assert view is not None, "only watchers are told who comes"
                view.add(event.peer[0])
            elif isinstance(event, PeerGone):
                assert event.reason == PeerGoneReason.DISCONNECTED
                gone.append(event.peer[0])
                if view is not None:
                    view.discard(event.peer[0])
        assert got == self.model.got.pop(id(client), [])
        expected = self.model.gone.pop(id(client), [])
        if view is None:
            assert sorted(gone) == sorted(expected)

    @invariant()
    def clients_got_what_was_for_them(self) -> None:
        for client in self.live.values():
            if id(client) not in self.model.paused:
                self.read(client)

    @invariant()
    def mesh_links_got_what_was_for_them(self) -> None:
        for number, link in enumerate(self.links):
            forwarded = [
                (src[0], dst[0], int.from_bytes(packet[:4], "big"))
                for src, dst, chunk in link.forwarded
                for packet in packets_of(chunk)
            ]
            link.forwarded.clear()
            assert forwarded == self.model.forwarded.pop(number, [])

    @invariant()
    def watchers_know_who_is_here(self) -> None:
        here = {number for number, clients in self.model.here.items() if clients}
        for client, view in self.views.items():
            if client not in self.model.paused:
                assert view == here

    @invariant()
    def counters_add_up(self) -> None:
        counters, model = self.bench.counters, self.model
        queued = sum(map(len, (*model.queue.values(), *model.waiting.values())))
        dropped = sum(counters.packets_dropped.values())
        assert dropped == model.dropped
        assert counters.packets_received + counters.packets_forwarded_in == (
            counters.packets_sent + dropped + queued + counters.packets_forwarded_out
        )
        assert counters.current_connections == len(self.live)
        assert counters.current_home_connections == sum(client.session.preferred for client in self.live.values())

    @invariant()
    def the_table_is_the_truth(self) -> None:
        router, here = self.bench.router, {n: ids for n, ids in self.model.here.items() if ids}
        assert {public[0]: id(session.sink) for public, session in router.active.items()} == {
            number: ids[-1] for number, ids in here.items()
        }
        assert {public[0] for public in router.forwarders} == {n for n, links in self.model.ways.items() if links}
        assert {id(session.sink) for session in router.sessions()} == set(self.live)
        assert router.duplicate_keys == sum(len(ids) > 1 for ids in here.values())
        assert router.duplicate_connections == sum(len(ids) for ids in here.values() if len(ids) > 1)
        assert router.clients_total == len(here.keys() | {n for n, links in self.model.ways.items() if links})

    def teardown(self) -> None:
        """When all have left, nothing is left of them."""
        if not hasattr(self, "bench"):
            return
        for client in list(self.live.values()):
            if id(client) in self.model.paused:
                self.thaw(client)
            self.drop(client)
        for number in KEYS:
            for link in self.links:
                self.bench.router.remove_forwarder(key(number), link)
        router = self.bench.router
        for _ in range(PATIENCE):
            router.give_up(0.0)
        assert not router.moves
        assert not router.active
        assert not router.forwarders
        assert not router.watchers
        assert not router._duplicates
        assert not router._interested


TestRouter = RouterMachine.TestCase
TestRouter.settings = settings(max_examples=200, stateful_step_count=50, deadline=None)


@pytest.fixture
def bench() -> Bench:
    return Bench()


def told_gone(client: BenchClient) -> list[bytes]:
    return [event.peer for event in client.received() if isinstance(event, PeerGone)]


def test_who_never_had_a_packet_is_not_told(bench: Bench) -> None:
    alice, bob, carol = (bench.client(number) for number in (1, 2, 3))
    alice.feed(frames.send_packet(bob.key, b"hello"))
    bench.leave(alice)
    assert told_gone(bob) == [alice.key]
    assert told_gone(carol) == []
    assert bench.counters.peer_gone_disconnected_frames == 1


def test_a_key_that_is_still_in_the_region_is_not_gone(bench: Bench) -> None:
    alice, bob, link = bench.client(1), bench.client(2), BenchLink()
    alice.feed(frames.send_packet(bob.key, b"hello"))
    bob.received()
    bench.router.add_forwarder(alice.key, link)
    bench.leave(alice)
    assert bob.writes == []
    bench.router.remove_forwarder(alice.key, link)
    assert told_gone(bob) == [alice.key]


def test_a_key_that_leaves_a_peer_and_is_here_is_not_gone(bench: Bench) -> None:
    alice, bob, link = bench.client(1), bench.client(2), BenchLink()
    bench.router.add_forwarder(alice.key, link)
    alice.feed(frames.send_packet(bob.key, b"hello"))
    bob.received()
    bench.router.remove_forwarder(alice.key, link)
    assert bob.writes == []
    bench.leave(alice)
    assert told_gone(bob) == [alice.key]


def test_a_key_can_be_gone_twice(bench: Bench) -> None:
    bob = bench.client(2)
    for _ in range(2):
        alice = bench.client(1)
        alice.feed(frames.send_packet(bob.key, b"hello"))
        bench.leave(alice)
        assert told_gone(bob) == [alice.key]


def test_a_client_that_spoke_with_itself_leaves(bench: Bench) -> None:
    alice = bench.client(1)
    alice.feed(frames.send_packet(alice.key, b"hello"))
    alice.writes.clear()
    bench.leave(alice)
    assert not bench.router._interested
    assert alice.writes == [], "nothing may be written to a connection that is gone"
    assert bench.counters.peer_gone_disconnected_frames == 0


def test_a_watcher_that_leaves_is_not_told_of_itself(bench: Bench) -> None:
    watcher, other = bench.client(9, mesh=True), bench.client(8, mesh=True)
    for client in (watcher, other):
        client.feed(frames.watch_conns())
        client.writes.clear()
    bench.leave(watcher)
    assert watcher.writes == []
    assert told_gone(other) == [watcher.key]


def test_a_source_from_afar_is_forgotten_with_its_receiver(bench: Bench) -> None:
    peer, bob = bench.client(9, mesh=True), bench.client(2)
    peer.feed(frames.forward_packet(key(77), bob.key, b"hello"))
    bench.leave(bob)
    assert not bench.router._interested


def test_who_spoke_last_gets_the_packets_of_a_key_used_twice(bench: Bench) -> None:
    old, sender, new = bench.client(1), bench.client(2), bench.client(1)
    for speaker, receiver in ((None, new), (old, old), (new, new)):
        if speaker is not None:
            speaker.feed(frames.ping(b"12345678"))
            speaker.writes.clear()
        sender.feed(frames.send_packet(new.key, b"hello"))
        assert [client for client in (old, new) if client.writes] == [receiver]
        receiver.writes.clear()
    bench.leave(new)
    sender.feed(frames.send_packet(old.key, b"hello"))
    assert old.received() == [ReceivedPacket(sender.key, b"hello")]
    assert not old.session.is_duplicate
    assert (bench.router.duplicate_keys, bench.router.duplicate_connections) == (0, 0)
    assert bench.counters.total_dup_client_conns == 1


def test_of_three_the_one_who_spoke_before_takes_over(bench: Bench) -> None:
    first, second, third = (bench.client(1) for _ in range(3))
    for speaker in (second, third, first, third):
        speaker.feed(frames.ping(b"12345678"))
    for leaver, heir in ((third, first), (first, second)):
        bench.leave(leaver)
        assert bench.router.active[key(1)] is heir.session
    assert not second.session.is_duplicate


def test_of_three_the_second_that_never_spoke_takes_over_last(bench: Bench) -> None:
    """As in derpserver: the second connection enters the history when it speaks, the third when it comes."""
    first, second, third = (bench.client(1) for _ in range(3))
    for leaver, heir in ((third, first), (first, second)):
        bench.leave(leaver)
        assert bench.router.active[key(1)] is heir.session
    third = bench.client(1)
    bench.leave(third)
    assert bench.router.active[key(1)] is second.session


def test_of_three_the_second_that_spoke_takes_over_first(bench: Bench) -> None:
    bench.client(1)
    second = bench.client(1)
    second.feed(frames.ping(b"12345678"))  # it was the active one before, too
    bench.leave(bench.client(1))
    assert bench.router.active[key(1)] is second.session


def test_only_the_head_of_a_frame_is_activity(bench: Bench) -> None:
    old, new = bench.client(1), bench.client(1)
    packet, unknown = frames.send_packet(key(2), bytes(100)), frames.frame(0x99, bytes(100))
    for piece, active in (
        (packet[:4], new),
        (packet[4:50], old),
        (packet[50:], new),
        (unknown[:4], new),
        (unknown[4:50], old),
        (unknown[50:100], new),
        (unknown[100:] + packet[:4], new),
        (packet[4:], old),
        (packet + packet[:50], old),
        (packet[50:] + packet[:4], new),
        (packet[4:50], old),
        (packet[50:] + packet[:5], old),
    ):
        new.feed(frames.ping(b"12345678"))
        old.feed(piece)
        assert bench.router.active[key(1)] is active.session


def test_what_was_dropped_from_a_queue_tells_of_no_one(bench: Bench) -> None:
    """Who leaves is told to those who got packets from it (derpserver, noteSendFromSrc)."""
    alice, bob, carol = (bench.client(number) for number in (1, 2, 3))
    bob.session.pause(0.0)
    alice.feed(frames.send_packet(bob.key, b"dropped"))
    carol.feed(*[frames.send_packet(bob.key, b"hello")] * QUEUE_DEPTH)
    bob.session.resume(0.0)
    bob.writes.clear()
    for leaver in (alice, carol):
        bench.leave(leaver)
    assert told_gone(bob) == [carol.key]


def test_forwarders_that_are_not_there_are_counted_as_stock_counts_them(bench: Bench) -> None:
    """derpserver, RemovePacketForwarder: not for an unknown key, nor where there are several others."""
    links = [BenchLink() for _ in range(3)]
    bench.client(1)
    counted = []
    for number, known in ((1, []), (2, []), (3, links[:1]), (4, links[:2])):
        for link in known:
            bench.router.add_forwarder(key(number), link)
        bench.router.remove_forwarder(key(number), links[2])
        counted.append(bench.counters.packet_forwarder_delete_other_value)
    assert counted == [1, 1, 2, 2]


def test_watchers_that_are_told_who_is_gone_are_counted(bench: Bench) -> None:
    for number in (8, 9):
        bench.client(number, mesh=True).feed(frames.watch_conns())
    bench.leave(bench.client(1))
    assert bench.counters.peer_gone_disconnected_frames == 2


def test_activity_of_a_key_that_is_used_once_changes_nothing(bench: Bench) -> None:
    alice = bench.client(1)
    bench.router.note_activity(alice.session)
    assert bench.router.active == {alice.key: alice.session}


def test_of_three_ways_two_are_left(bench: Bench) -> None:
    links = [BenchLink() for _ in range(3)]
    for link in links:
        bench.router.add_forwarder(key(2), link)
    bench.router.remove_forwarder(key(2), links[0])
    assert bench.router.forwarders[key(2)] == (links[1], links[2])
    assert bench.counters.multiforwarder_deleted == 0


def test_watchers_hear_of_keys_and_not_of_connections(bench: Bench) -> None:
    """derp_client.go: PEER_PRESENT comes for every connection, PEER_GONE for the last one (tailscale issue 13566)."""
    watcher = bench.client(9, mesh=True)
    watcher.feed(frames.watch_conns())
    watcher.writes.clear()
    first, second = bench.client(1), bench.client(1)
    assert len(watcher.received()) == 2
    bench.leave(first)
    assert watcher.writes == []
    bench.leave(second)
    assert told_gone(watcher) == [key(1)]


def test_a_relay_that_dialed_itself_is_not_told(bench: Bench) -> None:
    itself = bench.client(bench.router.public_key[0], mesh=True)
    itself.feed(frames.watch_conns())
    bench.client(1)
    assert itself.writes == []


def test_a_second_way_takes_over(bench: Bench) -> None:
    alice, first, second = bench.client(1), BenchLink(), BenchLink()
    for link in (first, second, second):
        bench.router.add_forwarder(key(2), link)
    for link, expected in ((second, first), (first, second)):
        alice.feed(frames.send_packet(key(2), b"hello"))
        assert [way for way in (first, second) if way.forwarded] == [expected]
        expected.forwarded.clear()
        bench.router.remove_forwarder(key(2), first)
        del link
    bench.router.remove_forwarder(key(2), first)
    counters = bench.counters
    assert (counters.multiforwarder_created, counters.multiforwarder_deleted) == (1, 1)
    assert counters.packet_forwarder_delete_other_value == 2


def test_news_that_are_collected_are_told_together_and_in_order(bench: Bench) -> None:
    watcher = bench.client(9, mesh=True)
    watcher.feed(frames.watch_conns())
    watcher.writes.clear()
    asked: list[None] = []
    bench.router.has_news = lambda: asked.append(None)
    alice = bench.client(1)
    bench.leave(alice)
    bench.client(2)
    assert (len(asked), watcher.writes) == (1, [])
    bench.router.tell()
    assert len(watcher.writes) == 1
    told = [(type(event), event.peer) for event in watcher.received() if isinstance(event, PeerPresent | PeerGone)]
    assert told == [(PeerPresent, key(1)), (PeerGone, key(1)), (PeerPresent, key(2))]
    bench.router.tell()
    assert watcher.writes == []


def test_who_begins_to_watch_is_not_told_what_is_older(bench: Bench) -> None:
    first, second = bench.client(8, mesh=True), bench.client(9, mesh=True)
    first.feed(frames.watch_conns())
    first.writes.clear()
    bench.router.has_news = lambda: None
    bench.leave(bench.client(1))
    second.feed(frames.watch_conns())
    assert [type(event) for event in first.received()] == [PeerPresent, PeerGone]
    assert all(isinstance(event, PeerPresent) and event.peer != key(1) for event in second.received())
    bench.router.tell()
    assert first.writes == second.writes == []


def test_no_more_news_wait_than_a_bound(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(router_module, "_MOST_NEWS", 3)
    watcher = bench.client(9, mesh=True)
    watcher.feed(frames.watch_conns())
    watcher.writes.clear()
    bench.router.has_news = lambda: None
    for number in range(1, 6):
        bench.client(number)
    assert [len(events_of(write)) for write in watcher.writes] == [3]
