"""Three relays and their mesh, real routers, sessions and mesh links without sockets: clients and links come and go
in any order, bytes are under way for any time, and links break with what is on them.

`test_router` compares one relay with a model step by step; here is what must hold for a region.
"""

from __future__ import annotations

import asyncio
import json
from collections import defaultdict
from collections.abc import Callable
from itertools import permutations
from types import SimpleNamespace
from typing import Any, cast

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from derper.net.meshlink import _AT_ONCE, _QUEUE_PACKETS, MeshLink, PeerConnection
from derper.relay.follower import Follower
from derper.relay.limits import QUEUE_DEPTH
from derper.relay.moves import PATIENCE
from derper.wire import frames
from derper.wire.client import ReceivedPacket
from derper.wire.frames import FrameType

from .core import Bench, BenchClient, events_of, key

NODES = range(3)
KEYS = range(1, 5)  # few, so that they meet
BY_MESH = 0xF0  # added to a node's number: its key


class Turns:
    """What a node's event loop does at the end of its turn."""

    def __init__(self) -> None:
        self._due: list[Callable[[], None]] = []

    def call_soon(self, callback: Callable[[], None]) -> SimpleNamespace:
        self._due.append(callback)
        return SimpleNamespace(cancel=lambda: self._due.remove(callback))

    def end(self) -> None:
        due, self._due = self._due, []
        for callback in due:
            callback()


class Dialed:
    """The dialing end of a mesh link: what `MeshLink` needs of a `PeerConnection`."""

    def __init__(self) -> None:
        self.writable = True
        self.under_way: list[bytes] = []
        self.on_writable: Any = None

    def write(self, data: bytes) -> None:
        self.under_way.append(data)

    def unblock(self) -> None:
        self.writable = True
        self.on_writable(True)


class Way:
    """A mesh link from one node to another, while it stands."""

    def __init__(self, dialer: Bench, listener: Bench) -> None:
        self.dialer, self.listener = dialer, listener
        self.near = Dialed()
        self.turns = Turns()
        loop = cast(asyncio.AbstractEventLoop, self.turns)
        self.link = MeshLink(cast(PeerConnection, self.near), dialer.counters, loop, stall=30.0, stalled=self.fail)
        ignored = frozenset((dialer.router.public_key, listener.router.public_key))
        self.follower = Follower(dialer.router, self.link, ignored, self.near.write)
        self.far = listener.client(dialer.router.public_key[0], mesh=True)
        self.far.feed(frames.watch_conns())

    def fail(self) -> None:
        raise AssertionError("nothing waits so long here")

    def carry_there(self, most: int) -> None:
        for data in self.near.under_way[:most]:
            self.far.feed(data)
        del self.near.under_way[:most]

    def carry_back(self, most: int) -> None:
        for data in self.far.writes[:most]:
            assert not any(isinstance(event, ReceivedPacket) for event in events_of(data)), "relays are sent no packets"
            assert self.follower.receive(bytearray(data), 0, len(data)) == len(data)
        del self.far.writes[:most]

    def forwards_under_way(self) -> int:
        found = 0
        for data in self.near.under_way:
            pos = 0
            while pos < len(data):
                kind, length = frames.HEADER.unpack_from(data, pos)
                found += kind == FrameType.FORWARD_PACKET
                pos += frames.HEADER_LEN + length
        return found

    def dialer_notices(self) -> None:
        self.follower.close()
        self.link.close()

    def listener_notices(self) -> None:
        self.listener.leave(self.far)


class RegionMachine(RuleBasedStateMachine):
    """Each packet names its sender, its receiver and its number."""

    @initialize(waits=st.booleans())
    def start(self, waits: bool) -> None:
        self.nodes = [Bench(BY_MESH + number) for number in NODES]
        self.waits = waits
        for node in self.nodes:
            node.router.waits = waits
            node.router.has_news = lambda: None  # they are told when a rule says so
        self.ways: dict[tuple[int, int], Way] = {}
        for pair in permutations(NODES, 2):
            self.dial(*pair)
        self.clients: list[tuple[int, BenchClient]] = []  # with the node of each
        self.number = 0
        self.last: dict[tuple[int, int], int] = defaultdict(int)  # sender and receiver -> number of the last packet
        self.got: set[tuple[int, int]] = set()
        self.lost = 0  # forwarded, and gone with their link
        self.kept: list[BenchClient] = []  # so that no id() comes twice

    def teardown(self) -> None:
        if not hasattr(self, "nodes"):
            return
        for pair in permutations(NODES, 2):
            self.dial(*pair)
        for way in self.ways.values():
            way.near.unblock()
        self.carry_everything()
        self.everybody_knows_everybody()
        for _, client in self.clients:
            client.session.resume(2.0)
        self.nobody_got_what_was_not_for_them()
        self.counters_add_up()
        while self.clients:
            self.leave(0)
        self.carry_everything()
        for a, b in list(self.ways):
            self.cut(a, b, True)
        for node in self.nodes:
            router = node.router
            for _ in range(PATIENCE):
                router.give_up(0.0)
            assert not router.moves
            assert router.moves.held == 0
            for table in (router.active, router.forwarders, router.watchers, router._duplicates, router._interested):
                assert not table
            assert node.counters.current_connections == 0

    # -- clients

    @rule(node=st.sampled_from(NODES), number=st.sampled_from(KEYS), known=st.booleans())
    def connect(self, node: int, number: int, known: bool) -> None:
        client = self.nodes[node].client(number)
        self.nodes[node].router.catch_up(client.session)
        self.clients.append((node, client))
        self.kept.append(client)
        if known:
            self.carry_everything()

    @precondition(lambda self: self.clients)
    @rule(index=st.integers(0, 99))
    def leave(self, index: int) -> None:
        node, client = self.clients.pop(index % len(self.clients))
        if client.session.paused_since is None:
            self.look(client)
        self.nodes[node].leave(client)

    @precondition(lambda self: self.clients)
    @rule(
        index=st.integers(0, 99),
        to=st.integers(0, 99),
        count=st.sampled_from([1, 1, 3, QUEUE_DEPTH + 3]),
        blocked=st.booleans(),
        arrives=st.booleans(),
    )
    def send(self, index: int, to: int, count: int, blocked: bool, arrives: bool) -> None:
        node, client = self.clients[index % len(self.clients)]
        dst = self.clients[to % len(self.clients)][1].key[0]
        if blocked:
            for (a, _), way in self.ways.items():
                way.near.writable = way.near.writable and a != node
        packets = []
        for _ in range(count):
            self.number += 1
            text = json.dumps([client.key[0], dst, id(client), self.number])
            packets.append(frames.send_packet(key(dst), text.encode()))
        client.feed(*packets)
        if arrives:
            self.carry_everything()

    @precondition(lambda self: self.clients)
    @rule(index=st.integers(0, 99), number=st.sampled_from(KEYS))
    def send_to_whoever(self, index: int, number: int) -> None:
        """Also to a key that nobody has."""
        _, client = self.clients[index % len(self.clients)]
        self.number += 1
        text = json.dumps([client.key[0], number, id(client), self.number])
        client.feed(frames.send_packet(key(number), text.encode()))

    @precondition(lambda self: self.clients)
    @rule(index=st.integers(0, 99))
    def stop_or_go(self, index: int) -> None:
        _, client = self.clients[index % len(self.clients)]
        if client.session.paused_since is None:
            self.look(client)
            client.session.pause(0.0)
        else:
            client.session.resume(1.0)

    @rule(node=st.sampled_from(NODES), turns=st.sampled_from([1, PATIENCE]))
    def time_passes(self, node: int, turns: int) -> None:
        for _ in range(turns):
            self.nodes[node].router.give_up(0.0)

    # -- the mesh, and its faults

    @rule(way=st.sampled_from(list(permutations(NODES, 2))), there=st.booleans(), most=st.sampled_from([1, 1000]))
    def carry(self, way: tuple[int, int], there: bool, most: int) -> None:
        if way in self.ways:
            (self.ways[way].carry_there if there else self.ways[way].carry_back)(most)

    @rule(node=st.sampled_from(NODES))
    def tell(self, node: int) -> None:
        self.nodes[node].router.tell()

    @rule(way=st.sampled_from(list(permutations(NODES, 2))))
    def end_turn(self, way: tuple[int, int]) -> None:
        if way in self.ways:
            self.ways[way].turns.end()

    @rule(way=st.sampled_from(list(permutations(NODES, 2))))
    def block_or_unblock(self, way: tuple[int, int]) -> None:
        if way in self.ways:
            near = self.ways[way].near
            if near.writable:
                near.writable = False
            else:
                near.unblock()

    @rule(way=st.sampled_from(list(permutations(NODES, 2))), dialer_first=st.booleans())
    def break_or_mend(self, way: tuple[int, int], dialer_first: bool) -> None:
        if way in self.ways:
            self.cut(*way, dialer_first)
        else:
            self.dial(*way)

    def dial(self, a: int, b: int) -> None:
        if (a, b) not in self.ways:
            self.ways[a, b] = Way(self.nodes[a], self.nodes[b])

    def cut(self, a: int, b: int, dialer_first: bool) -> None:
        way = self.ways.pop((a, b))
        if dialer_first:
            way.dialer_notices()
            way.listener_notices()
        else:
            way.listener_notices()
            way.dialer_notices()
        self.lost += way.forwards_under_way()

    def carry_everything(self) -> None:
        for way in self.ways.values():
            way.turns.end()
        for node in self.nodes:
            node.router.tell()
        while any(way.near.under_way or way.far.writes for way in self.ways.values()):
            for way in self.ways.values():
                way.carry_back(1000)
                way.carry_there(1000)

    # -- what must hold

    @invariant()
    def nobody_got_what_was_not_for_them(self) -> None:
        for _, client in self.clients:
            if client.session.paused_since is None:
                self.look(client)

    def look(self, client: BenchClient) -> None:
        """To the right key, under the sender's, once, and in order."""
        for event in client.received():
            if isinstance(event, ReceivedPacket):
                source, dst, sender, number = json.loads(event.data)
                assert (event.source, client.key) == (key(source), key(dst))
                assert (number, id(client)) not in self.got
                self.got.add((number, id(client)))
                if not self.waits:  # else what goes round by a client's last node may be late
                    assert number > self.last[sender, id(client)]
                self.last[sender, id(client)] = number

    @invariant()
    def counters_add_up(self) -> None:
        for number, node in enumerate(self.nodes):
            counters = node.counters
            queued = sum(session.queued for session in node.router.sessions()) + node.router.moves.held
            queued += sum(way.link.queued for (a, _), way in self.ways.items() if a == number)
            assert counters.packets_received + counters.packets_forwarded_in == (
                counters.packets_sent + sum(counters.packets_dropped.values()) + queued + counters.packets_forwarded_out
            )
        forwarded = sum(node.counters.packets_forwarded_out for node in self.nodes)
        arrived = sum(node.counters.packets_forwarded_in for node in self.nodes)
        assert forwarded == arrived + self.lost + sum(way.forwards_under_way() for way in self.ways.values())

    @invariant()
    def queues_are_bounded(self) -> None:
        for node in self.nodes:
            assert node.router.moves.held <= len(KEYS) * QUEUE_DEPTH
            for session in node.router.sessions():
                assert session.queued <= (0 if session.paused_since is None else QUEUE_DEPTH)
        for way in self.ways.values():
            assert way.link.queued <= (_AT_ONCE if way.near.writable else _QUEUE_PACKETS)

    @invariant()
    def tables_hold_only_what_is_there(self) -> None:
        for number, node in enumerate(self.nodes):
            here = {client.key for at, client in self.clients if at == number}
            meshed = {way.far.key for (_, b), way in self.ways.items() if b == number}
            assert set(node.router.active) == here | meshed
            links = {way.link for (a, _), way in self.ways.items() if a == number}
            assert {link for known in node.router.forwarders.values() for link in known} <= links
            assert node.router.watchers == {way.far.session for (_, b), way in self.ways.items() if b == number}

    def everybody_knows_everybody(self) -> None:
        """When nothing is under way, each relay knows the ways to all clients of the others, and no more."""
        for number, node in enumerate(self.nodes):
            expected: dict[bytes, set[object]] = defaultdict(set)
            for (a, b), way in self.ways.items():
                if a == number:
                    there = set(self.nodes[b].router.active) - {node.router.public_key, self.nodes[b].router.public_key}
                    for found in there:
                        expected[found].add(way.link)
            assert {found: set(links) for found, links in node.router.forwarders.items()} == expected


TestRegion = RegionMachine.TestCase
TestRegion.settings = settings(max_examples=100, stateful_step_count=60, deadline=None)
