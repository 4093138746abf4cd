"""Packets for clients that have just left: they wait a little, and follow the client when it is found."""

from __future__ import annotations

import pytest

from derper.relay import moves as moves_module
from derper.relay.limits import QUEUE_DEPTH
from derper.relay.moves import PATIENCE
from derper.relay.router import Router
from derper.wire import frames
from derper.wire.client import PeerGone, ReceivedPacket
from derper.wire.frames import PeerGoneReason

from .core import Bench, BenchClient, BenchLink, events_of, key

DISCO = frames.DISCO_MAGIC + bytes(32 + 24)


@pytest.fixture
def bench() -> Bench:
    return Bench()


@pytest.fixture
def alice(bench: Bench) -> BenchClient:
    return bench.client(1)


def at_peer(bench: Bench, number: int = 2) -> BenchLink:
    """A mesh peer that had this client until a moment ago."""
    link = BenchLink(bench.counters)
    bench.router.add_forwarder(key(number), link)
    bench.router.remove_forwarder(key(number), link)
    return link


def send(client: BenchClient, *packets: bytes, to: int = 2) -> None:
    client.feed(*(frames.send_packet(key(to), packet) for packet in packets))


def wait(router: Router, turns: int) -> None:
    for _ in range(turns):
        router.give_up(0.0)


def packets(link: BenchLink) -> list[tuple[bytes, bytes, bytes]]:
    found = []
    for source, to, chunk in link.forwarded:
        found += [(source, to, event.data) for event in events_of(chunk) if isinstance(event, ReceivedPacket)]
    return found


def arrive(bench: Bench, number: int = 2) -> BenchClient:
    """A client logs in, as a link does it."""
    client = bench.client(number)
    bench.router.catch_up(client.session)
    return client


def test_packets_follow_a_client_to_another_node(bench: Bench, alice: BenchClient) -> None:
    at_peer(bench)
    send(alice, b"one", b"two")
    send(bench.client(3), b"three")
    other = BenchLink(bench.counters)
    bench.router.add_forwarder(key(2), other)
    assert packets(other) == [(key(1), key(2), b"one"), (key(1), key(2), b"two"), (key(3), key(2), b"three")]
    send(alice, b"four")
    assert packets(other)[3:] == [(key(1), key(2), b"four")]
    assert bench.counters.moved == 3
    assert bench.dropped() == {}


def test_packets_follow_a_client_to_this_node(bench: Bench, alice: BenchClient) -> None:
    at_peer(bench)
    send(alice, b"one", b"two")
    bob = arrive(bench)
    assert bob.received() == [ReceivedPacket(key(1), b"one"), ReceivedPacket(key(1), b"two")]
    assert bench.router.interested()


def test_who_does_not_come_back_is_unknown(bench: Bench, alice: BenchClient) -> None:
    at_peer(bench)
    send(alice, b"data", DISCO)
    wait(bench.router, PATIENCE - 1)
    assert (bench.dropped(), alice.received()) == ({}, [])
    wait(bench.router, 1)
    assert bench.dropped() == {"unknown_dest": 2}
    assert alice.received() == [PeerGone(key(2), PeerGoneReason.NOT_HERE)]
    send(alice, b"late")
    assert bench.dropped() == {"unknown_dest": 3}
    assert not bench.router.moves


def test_who_left_later_waits_longer(bench: Bench, alice: BenchClient) -> None:
    at_peer(bench, 2)
    at_peer(bench, 3)
    wait(bench.router, PATIENCE - 1)
    at_peer(bench, 2)
    send(alice, b"second")
    send(alice, b"third", to=3)
    wait(bench.router, 1)
    assert bench.dropped() == {"unknown_dest": 1}
    assert [event.data for event in arrive(bench).received() if isinstance(event, ReceivedPacket)] == [b"second"]


def test_the_sender_may_have_gone_meanwhile(bench: Bench, alice: BenchClient) -> None:
    at_peer(bench)
    send(alice, b"last words", DISCO)
    bench.leave(alice)
    wait(bench.router, PATIENCE)
    assert bench.dropped() == {"unknown_dest_on_fwd": 2}


def test_a_stranger_is_not_waited_for(bench: Bench, alice: BenchClient) -> None:
    send(alice, b"hello")
    assert bench.dropped() == {"unknown_dest": 1}


def test_who_leaves_this_node_is_gone_unless_it_drains(bench: Bench, alice: BenchClient) -> None:
    bench.leave(bench.client(2))
    send(alice, b"hello")
    assert bench.dropped() == {"unknown_dest": 1}
    bob = bench.client(2)
    bench.router.draining = True
    bench.leave(bob)
    send(alice, b"wait")
    other = BenchLink(bench.counters)
    bench.router.add_forwarder(key(2), other)
    assert packets(other) == [(key(1), key(2), b"wait")]


def test_in_a_region_who_leaves_may_come_back(bench: Bench, alice: BenchClient) -> None:
    """When the DERP map changes all clients connect anew."""
    bench.router.waits = True
    peer = bench.client(9, mesh=True)
    bench.leave(bench.client(2))
    send(alice, b"one")
    peer.feed(frames.forward_packet(key(3), key(2), b"two"))
    assert [event.data for event in arrive(bench).received() if isinstance(event, ReceivedPacket)] == [b"one", b"two"]
    assert bench.dropped() == {}


def test_a_node_that_drains_sends_on_what_others_sent_it(bench: Bench) -> None:
    peer, bob = bench.client(9, mesh=True), bench.client(2)
    forwarded = frames.forward_packet(key(3), key(2), b"from afar")
    bench.leave(bob)
    peer.feed(forwarded)
    assert bench.dropped() == {"unknown_dest_on_fwd": 1}
    bob = bench.client(2)
    bench.router.draining = True
    bench.leave(bob)
    peer.feed(forwarded)
    other = BenchLink(bench.counters)
    bench.router.add_forwarder(key(2), other)
    assert packets(other) == [(key(3), key(2), b"from afar")]


def test_a_node_that_stays_never_forwards_twice(bench: Bench) -> None:
    peer = bench.client(9, mesh=True)
    at_peer(bench)
    peer.feed(frames.forward_packet(key(3), key(2), b"lost its way"))
    assert bench.dropped() == {"unknown_dest_on_fwd": 1}


def test_of_many_packets_the_oldest_goes(bench: Bench, alice: BenchClient) -> None:
    at_peer(bench)
    numbers = [b"%d" % number for number in range(QUEUE_DEPTH + 3)]
    send(alice, *numbers)
    assert bench.dropped() == {"queue_head": 3}
    bob = arrive(bench)
    assert [event.data for event in bob.received() if isinstance(event, ReceivedPacket)] == numbers[3:]


def test_there_is_a_bound_for_all_together(bench: Bench, alice: BenchClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moves_module, "_MOST_HELD", 2)
    for number in (2, 3):
        at_peer(bench, number)
    send(alice, b"one", b"two")
    send(alice, b"three", to=3)
    assert bench.dropped() == {"unknown_dest": 1}
    arrive(bench, 2)
    send(alice, b"four", to=3)
    assert bench.dropped() == {"unknown_dest": 1}
    wait(bench.router, PATIENCE)
    assert bench.dropped() == {"unknown_dest": 2}
