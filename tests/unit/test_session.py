"""A session: frames in, packets out, all bounds."""

from __future__ import annotations

import contextlib
from dataclasses import asdict
from ipaddress import ip_address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from derper.relay.counters import DropReason
from derper.relay.limits import QUEUE_DEPTH, TokenBucket
from derper.relay.runs import frames_of, packets_of
from derper.relay.session import Remote
from derper.wire import frames
from derper.wire.client import KeepAlive, PeerGone, PeerPresent, Pong, ReceivedPacket
from derper.wire.errors import ProtocolError
from derper.wire.frames import HEADER, FrameType, PeerGoneReason

from .core import Bench, BenchLink, key
from .streams import cuts

A, B, C = key(1), key(2), key(3)
DISCO = frames.DISCO_MAGIC + bytes(32 + 24)
MAX = 64 << 10


@pytest.fixture
def bench() -> Bench:
    return Bench()


# -- packets between two clients


@pytest.mark.parametrize("size", [0, 1, 5, 6, 7, 61, 62, 1280, MAX])
def test_a_packet_arrives_under_its_senders_key(bench: Bench, size: int) -> None:
    alice, bob = bench.client(1), bench.client(2)
    packet = bytes(i & 0xFF for i in range(size))
    alice.feed(frames.send_packet(B, packet))
    assert b"".join(bob.writes) == frames.recv_packet(A, packet)
    assert alice.writes == []
    counters = bench.counters
    assert (counters.packets_received, counters.packets_sent) == (1, 1)
    assert (counters.bytes_received, counters.bytes_sent) == (size, size)


@pytest.mark.parametrize(("start", "end"), [(-1, 5), (6, 5), (0, 101)])
def test_offsets_outside_of_the_buffer(bench: Bench, start: int, end: int) -> None:
    with pytest.raises(IndexError):
        bench.client(1).session.receive(bytearray(100), start, end, 0.0)


def test_a_packet_for_oneself(bench: Bench) -> None:
    alice = bench.client(1)
    alice.feed(frames.send_packet(A, b"hello me"))
    assert alice.received() == [ReceivedPacket(A, b"hello me")]


def test_neighbours_for_one_client_leave_in_one_write(bench: Bench) -> None:
    alice, bob, carol = bench.client(1), bench.client(2), bench.client(3)
    stream = [frames.send_packet(dst, bytes([n]) * 40) for n, dst in enumerate((B, B, B, C, C, B))]
    alice.feed(*stream)
    assert [len(packets_of(write)) for write in bob.writes] == [3, 1]
    assert [len(packets_of(write)) for write in carol.writes] == [2]
    assert [e.data[0] for e in bob.received() if isinstance(e, ReceivedPacket)] == [0, 1, 2, 5]


def test_short_packets_keep_their_place(bench: Bench) -> None:
    alice, bob = bench.client(1), bench.client(2)
    packets = [b"a" * 40, b"", b"b" * 40, b"c", b"d" * 5, b"e" * 6]
    alice.feed(*(frames.send_packet(B, packet) for packet in packets))
    assert bob.received() == [ReceivedPacket(A, packet) for packet in packets]


def test_disco_packets_are_counted(bench: Bench) -> None:
    alice = bench.client(1)
    alice.feed(frames.send_packet(B, DISCO), frames.send_packet(B, DISCO[:-1]), frames.send_packet(B, b"x" * 100))
    assert (bench.counters.packets_received, bench.counters.packets_received_disco) == (3, 1)


# -- to nobody


def test_a_packet_to_nobody_is_dropped_in_silence(bench: Bench) -> None:
    alice = bench.client(1)
    alice.feed(frames.send_packet(B, b"hello"), frames.send_packet(B, b"hello" * 20))
    assert alice.writes == []
    assert bench.counters.packets_dropped[DropReason.UNKNOWN_DEST, False] == 2
    assert bench.counters.bytes_dropped[DropReason.UNKNOWN_DEST, False] == 105


def test_disco_to_nobody_is_answered_but_not_for_ever(bench: Bench) -> None:
    """Three at once, then one per second (derpserver, peerGoneLim)."""
    alice = bench.client(1)
    alice.feed(*[frames.send_packet(B, DISCO)] * 5)
    assert alice.received() == [PeerGone(B, PeerGoneReason.NOT_HERE)] * 3
    alice.feed(frames.send_packet(B, DISCO), now=0.9)
    assert alice.received() == []
    alice.feed(*[frames.send_packet(B, DISCO)] * 2, now=1.0)
    assert alice.received() == [PeerGone(B, PeerGoneReason.NOT_HERE)]
    assert bench.counters.peer_gone_not_here_frames == 4
    assert bench.counters.packets_dropped[DropReason.UNKNOWN_DEST, True] == 8


# -- the lengths of frames

BOUNDS = [
    (FrameType.SEND_PACKET, 32, 32 + MAX),
    (FrameType.FORWARD_PACKET, 64, 64 + MAX),
    (FrameType.NOTE_PREFERRED, 1, 1),
    (FrameType.WATCH_CONNS, 0, 0),
    (FrameType.CLOSE_PEER, 32, 32),
    (FrameType.PING, 8, 1000),
]


@pytest.mark.parametrize(("kind", "shortest", "longest"), BOUNDS)
def test_bounds_of_frames(kind: FrameType, shortest: int, longest: int) -> None:
    for length in {shortest, longest}:
        client = Bench().client(1, mesh=True)
        client.feed(frames.frame(kind, bytes(length)))
        assert client.tail == b""
    for length in {shortest - 1, longest + 1, 0xFFFFFFFF} - {-1}:
        client = Bench().client(1, mesh=True)
        with pytest.raises(ProtocolError) as caught:
            client.feed(HEADER.pack(kind, length))  # the header is enough
        assert str(caught.value) == f"{kind.name} of {length} bytes; it has {shortest} to {longest}"


def test_a_packet_that_is_too_long_reaches_nobody(bench: Bench) -> None:
    alice, bob = bench.client(1), bench.client(2)
    with pytest.raises(ProtocolError):
        alice.feed(frames.send_packet(B, bytes(MAX + 1)))
    assert bob.writes == []


@pytest.mark.parametrize("length", [7, 1001])
def test_a_ping_of_a_wrong_length_is_counted_all_the_same(bench: Bench, length: int) -> None:
    with pytest.raises(ProtocolError):
        bench.client(1).feed(frames.ping(bytes(length)))
    assert (bench.counters.got_ping, bench.counters.sent_pong) == (1, 0)


@pytest.mark.parametrize("kind", [0x00, 0x01, 0x02, 0x03, 0x05, 0x06, 0x08, 0x09, 0x13, 0x14, 0x15, 0x42, 0xFF])
def test_unknown_frames_are_skipped(bench: Bench, kind: int) -> None:
    alice = bench.client(1)
    alice.feed(frames.frame(kind, b"x" * 100) + frames.frame(kind) + frames.ping(b"12345678"))
    assert alice.received() == [Pong(b"12345678")]
    assert bench.counters.unknown_frames == 2


def test_an_unknown_frame_of_4_gib_is_skipped_without_keeping_it(bench: Bench) -> None:
    alice = bench.client(1)
    alice.feed(HEADER.pack(0x42, 0xFFFFFFFF))
    for _ in range(100):
        alice.feed(frames.ping(b"12345678") * 1000)  # these bytes are the frame's body
        assert alice.tail == b""
    assert alice.writes == []


def test_the_frame_behind_a_skipped_one_is_found(bench: Bench) -> None:
    alice = bench.client(1)
    alice.feed(HEADER.pack(0x42, 200_000) + bytes(100))
    for _ in range(199_900 // 100):
        alice.feed(bytes(100))
    alice.feed(frames.ping(b"12345678"))
    assert alice.received() == [Pong(b"12345678")]


# -- control frames


def test_ping_is_answered_with_its_first_8_bytes(bench: Bench) -> None:
    alice = bench.client(1)
    alice.feed(frames.ping(b"12345678" + bytes(992)))
    assert alice.received() == [Pong(b"12345678")]


def test_pings_of_a_client_that_does_not_read_are_answered_once(bench: Bench) -> None:
    alice = bench.client(1)
    alice.session.pause(0.0)
    alice.feed(frames.ping(b"1st.....") + frames.ping(b"2nd.....") * 1000)
    assert alice.writes == []
    alice.session.resume(1.0)
    assert alice.received() == [Pong(b"1st.....")]
    assert (bench.counters.got_ping, bench.counters.sent_pong) == (1001, 1)
    alice.feed(frames.ping(b"3rd....."))
    assert alice.received() == [Pong(b"3rd.....")]


def test_note_preferred_is_counted_once(bench: Bench) -> None:
    alice = bench.client(1)
    counters = bench.counters
    for preferred, now, home in ((True, 1.0, 1), (True, 2.0, 1), (False, 3.0, 0), (True, 6.0, 1), (False, 7.0, 0)):
        alice.feed(frames.note_preferred(preferred), now=now)
        assert counters.current_home_connections == home
    assert (counters.home_moves_in, counters.home_moves_out) == (1, 1)  # the first seconds are no moves


def test_a_home_client_that_leaves_is_home_no_more(bench: Bench) -> None:
    alice = bench.client(1, not_ideal=True)
    alice.feed(frames.note_preferred(True))
    assert bench.counters.current_notideal_connections == 1
    bench.leave(alice)
    counters = bench.counters
    assert counters.current_home_connections == counters.current_notideal_connections == 0
    assert counters.current_connections == 0


@pytest.mark.parametrize(
    "frame", [frames.watch_conns(), frames.close_peer(B), frames.forward_packet(C, B, b"hello")], ids=lambda f: f[0]
)
def test_mesh_frames_need_the_mesh_key(bench: Bench, frame: bytes) -> None:
    mallory, bob = bench.client(1), bench.client(2)
    with pytest.raises(ProtocolError, match=r"from a client without the mesh key$"):
        mallory.feed(frame[:5])  # the head is enough
    assert not bob.writes
    assert not bob.aborted
    assert not bench.router.watchers


def test_close_peer_closes_all_connections_of_a_key(bench: Bench) -> None:
    peer, bob, bob_again, carol = bench.client(9, mesh=True), bench.client(2), bench.client(2), bench.client(3)
    peer.feed(frames.close_peer(B) + frames.close_peer(key(77)))
    assert (bob.aborted, bob_again.aborted, carol.aborted) == (True, True, False)


def test_present_frame_says_what_the_client_is(bench: Bench) -> None:
    address = bench.client(1).session.remote
    flags = {
        bench.client(1): 1,
        bench.client(2, mesh=True): 2,
        bench.client(3, prober=True): 4,
        bench.client(4, not_ideal=True): 8,
        bench.client(5, mesh=True, prober=True, not_ideal=True): 14,
    }
    for client, expected in flags.items():
        made = client.session.present_frame()
        assert made == frames.peer_present(client.key, address.ip, client.key[0], expected)


# -- the mesh


def test_forwarded_packets_reach_a_client(bench: Bench) -> None:
    peer, bob = bench.client(9, mesh=True), bench.client(2)
    for packet in (b"", b"hello", bytes(MAX)):
        peer.feed(frames.forward_packet(A, B, packet))
        assert b"".join(bob.writes) == frames.recv_packet(A, packet)
        bob.writes.clear()
    assert bench.counters.packets_forwarded_in == bench.counters.packets_sent == 3
    assert bench.counters.packets_received == 0


def test_forwarded_packets_of_a_pair_arrive_in_one_write(bench: Bench) -> None:
    peer, bob, carol = bench.client(9, mesh=True), bench.client(2), bench.client(3)
    sent = [(A, B, b"1" * 40), (A, B, b""), (A, C, b"3" * 1300), (key(7), C, b"4"), (A, B, b"5"), (A, key(8), b"6")]
    peer.feed(b"".join(frames.forward_packet(*packet) for packet in sent) + frames.ping(b"12345678"))
    assert bob.writes == [
        frames.recv_packet(A, b"1" * 40) + frames.recv_packet(A, b""),
        frames.recv_packet(A, b"5"),
    ]
    assert carol.writes == [frames.recv_packet(A, b"3" * 1300), frames.recv_packet(key(7), b"4")]
    assert peer.received() == [Pong(b"12345678")]
    counters = bench.counters
    assert (counters.packets_forwarded_in, counters.packets_sent, counters.bytes_sent) == (6, 5, 1342)
    assert counters.runs.sum == 2
    assert bench.dropped() == {"unknown_dest_on_fwd": 1}
    assert bob.session.sources == {A}
    assert carol.session.sources == {A, key(7)}


def test_forwarded_packets_are_never_forwarded_again(bench: Bench) -> None:
    peer, link = bench.client(9, mesh=True), BenchLink()
    bench.router.add_forwarder(B, link)
    peer.feed(frames.forward_packet(A, B, b"hello") + frames.forward_packet(A, B, DISCO))
    assert link.forwarded == []
    assert bench.dropped() == {"unknown_dest_on_fwd": 2}
    assert peer.received() == [PeerGone(B, PeerGoneReason.NOT_HERE)]


def test_packets_leave_through_the_mesh(bench: Bench) -> None:
    alice, link = bench.client(1), BenchLink(bench.counters)
    bench.router.add_forwarder(B, link)
    alice.feed(frames.send_packet(B, b"x" * 40) + frames.send_packet(B, b"y" * 50) + frames.send_packet(B, b"z"))
    assert [(src, dst, packets_of(chunk)) for src, dst, chunk in link.forwarded] == [
        (A, B, [b"x" * 40, b"y" * 50]),
        (A, B, [b"z"]),
    ]
    assert bench.counters.packets_forwarded_out == 3
    assert bench.dropped() == {}


def test_a_client_here_wins_over_the_mesh(bench: Bench) -> None:
    alice, bob, link = bench.client(1), bench.client(2), BenchLink()
    bench.router.add_forwarder(B, link)
    alice.feed(frames.send_packet(B, b"hello"))
    assert bob.received() == [ReceivedPacket(A, b"hello")]
    assert link.forwarded == []


# -- a client that does not read


def test_the_oldest_of_33_packets_is_dropped(bench: Bench) -> None:
    alice, bob = bench.client(1), bench.client(2)
    bob.session.pause(0.0)
    for number in range(QUEUE_DEPTH + 1):
        alice.feed(frames.send_packet(B, bytes([number]) * 50))
        alice.feed(frames.send_packet(B, DISCO + bytes([number])))
    assert bob.writes == []
    assert bench.counters.packets_dropped[DropReason.QUEUE_HEAD, False] == 1
    assert bench.counters.packets_dropped[DropReason.QUEUE_HEAD, True] == 1
    assert bench.counters.bytes_dropped[DropReason.QUEUE_HEAD, False] == 50
    assert bench.counters.bytes_dropped[DropReason.QUEUE_HEAD, True] == len(DISCO) + 1
    bob.session.resume(1.0)
    assert len(bob.writes) == 1
    expected = [DISCO + bytes([n]) for n in range(1, 33)] + [bytes([n]) * 50 for n in range(1, 33)]
    assert bob.received() == [ReceivedPacket(A, packet) for packet in expected]
    assert bench.counters.packets_sent == 64
    assert bench.counters.bytes_sent == sum(map(len, expected))


def test_a_run_for_a_client_that_does_not_read_is_taken_apart(bench: Bench) -> None:
    alice, bob = bench.client(1), bench.client(2)
    bob.session.pause(0.0)
    alice.feed(*(frames.send_packet(B, bytes([number]) * 50) for number in range(40)))
    bob.session.resume(0.0)
    assert [e.data[0] for e in bob.received() if isinstance(e, ReceivedPacket)] == list(range(8, 40))
    assert bench.dropped() == {"queue_head": 8}


def test_control_frames_overtake_queued_packets(bench: Bench) -> None:
    alice, bob = bench.client(1), bench.client(2)
    bob.session.pause(0.0)
    alice.feed(frames.send_packet(B, b"hello"))
    bob.session.control(frames.keep_alive())
    bob.session.resume(0.0)
    assert bob.received() == [KeepAlive(), ReceivedPacket(A, b"hello")]


def test_nothing_is_written_twice(bench: Bench) -> None:
    alice, bob = bench.client(1), bench.client(2)
    for _ in range(2):
        bob.session.pause(0.0)
        alice.feed(frames.send_packet(B, b"hello"))
        bob.session.control(frames.keep_alive())
        bob.session.resume(0.0)
        assert len(bob.received()) == 2
        bob.session.resume(0.0)
        assert bob.writes == []


def test_time_in_the_queue_is_measured(bench: Bench) -> None:
    alice, bob = bench.client(1), bench.client(2)
    bob.session.pause(0.0)
    alice.feed(frames.send_packet(B, b"hello"), now=1.0)
    bob.session.resume(3.0)
    assert bench.counters.average_queue_duration == pytest.approx(200.0)  # a tenth of 2000 ms
    alice.feed(frames.send_packet(B, b"hello") * 2)
    assert bench.counters.average_queue_duration == pytest.approx(200.0 * 0.9**2)  # these did not wait
    bob.session.pause(0.0)
    alice.feed(frames.send_packet(B, b"hello"), now=1.0)
    bob.session.resume(1.1)
    assert bench.counters.average_queue_duration == pytest.approx(200.0 * 0.9**3 + 10)


@pytest.mark.parametrize(("mesh", "bound"), [(False, 64 << 10), (True, 16 << 20)])
def test_control_frames_that_pile_up_end_the_connection(bench: Bench, mesh: bool, bound: int) -> None:
    client = bench.client(1, mesh=mesh)
    client.session.pause(0.0)
    client.session.control(bytes(bound))
    assert not client.aborted
    client.session.control(b"x")
    assert client.aborted


def test_what_is_queued_for_a_client_that_leaves_is_dropped(bench: Bench) -> None:
    alice, bob = bench.client(1), bench.client(2)
    bob.session.pause(0.0)
    alice.feed(frames.send_packet(B, b"hello"), frames.send_packet(B, DISCO))
    bench.leave(bob)
    assert bench.counters.packets_dropped[DropReason.GONE_DISCONNECTED, False] == 1
    assert bench.counters.packets_dropped[DropReason.GONE_DISCONNECTED, True] == 1
    bob.session.control(frames.keep_alive())
    assert not any(isinstance(event, KeepAlive) for event in bob.received())


# -- rate limits


def test_a_client_is_throttled_when_its_bucket_is_empty(bench: Bench) -> None:
    alice, peer = bench.client(1), bench.client(9, mesh=True)
    assert alice.session.throttle(1 << 30, 0.0) == 0.0
    for client in (alice, peer):
        client.session.set_bucket(TokenBucket(1000, 5000, 0.0))
    assert alice.session.throttle(5000, 0.0) == 0.0
    assert alice.session.throttle(500, 0.0) == 0.5
    assert alice.session.throttle(0, 0.25) == 0.25
    assert peer.session.throttle(1 << 30, 0.0) == 0.0
    alice.session.set_bucket(None)
    assert alice.session.throttle(1 << 30, 0.0) == 0.0


def test_a_client_that_chatters_is_read_in_small_pieces(bench: Bench) -> None:
    """Thousands of empty frames in one read hold up everybody for its length."""
    for frame in (frames.ping(b"12345678"), frames.frame(0x42), frames.send_packet(B, b"")):
        alice, peer = bench.client(1), bench.client(9, mesh=True)
        for client in (alice, peer):
            client.feed(frame * 499, frames.send_packet(B, bytes(100)) * 1000)
            assert client.session.read_limit == 0
            client.feed(frame * 500)
        assert 0 < alice.session.read_limit <= 4096
        assert peer.session.read_limit == 0
        bench.leave(alice)
        bench.leave(peer)


# -- properties

FRAMES = st.one_of(
    st.tuples(st.sampled_from([A, B, C, key(77)]), st.binary(max_size=90) | st.just(DISCO)).map(
        lambda pair: frames.send_packet(*pair)
    ),
    st.tuples(st.sampled_from([A, B, key(77)]), st.sampled_from([B, C, key(78)]), st.binary(max_size=60)).map(
        lambda triple: frames.forward_packet(*triple)
    ),
    st.booleans().map(frames.note_preferred),
    st.just(frames.watch_conns()),
    st.binary(min_size=8, max_size=20).map(frames.ping),
    st.tuples(st.sampled_from([0x00, 0x05, 0x13, 0x99]), st.binary(max_size=60)).map(lambda pair: frames.frame(*pair)),
)


def outcome(pieces: list[bytes]) -> object:
    bench = Bench()
    clients = [bench.client(1, mesh=True), bench.client(2), bench.client(3)]
    link = BenchLink()
    bench.router.add_forwarder(key(77), link)
    for piece in pieces:
        clients[0].feed(piece)
    forwarded = [(src, dst, frame) for src, dst, chunk in link.forwarded for frame in frames_of(chunk)]
    counters = asdict(bench.counters)
    del counters["runs"]  # how many frames go at once depends on how many come at once
    return [b"".join(client.writes) for client in clients], clients[0].tail, forwarded, counters


@given(st.data())
def test_any_split_gives_the_same_result(data: st.DataObject) -> None:
    stream = b"".join(data.draw(st.lists(FRAMES, max_size=12)))
    assert outcome(data.draw(cuts(stream))) == outcome([stream])


def test_byte_by_byte() -> None:
    stream = b"".join(
        [
            frames.send_packet(B, b"x" * 40),
            frames.send_packet(B, b""),
            frames.forward_packet(C, B, b"hello"),
            frames.frame(0x99, b"unknown"),
            frames.ping(b"12345678"),
            frames.send_packet(key(77), b"far away"),
        ]
    )
    assert outcome([bytes([byte]) for byte in stream]) == outcome([stream])


@given(st.lists(st.binary(max_size=60) | FRAMES, max_size=6), st.booleans())
def test_any_bytes_are_handled_or_break_the_protocol(pieces: list[bytes], mesh: bool) -> None:
    bench = Bench()
    mallory, bob = bench.client(1, mesh=mesh), bench.client(2)
    with contextlib.suppress(ProtocolError):
        for piece in pieces:
            mallory.feed(piece)
            assert len(mallory.tail) < 5 + 64 + MAX
    bob.received()  # whole frames, whatever came in


@given(st.lists(FRAMES, max_size=6), st.binary(max_size=60))
def test_nobody_gets_a_packet_under_a_third_key(stream: list[bytes], garbage: bytes) -> None:
    """Whatever a client without the mesh key sends, its packets bear its own key."""
    bench = Bench()
    mallory, bob = bench.client(1), bench.client(2)
    with contextlib.suppress(ProtocolError):
        mallory.feed(*stream, garbage)
    assert all(isinstance(event, ReceivedPacket) and event.source == A for event in bob.received())


def test_remotes_in_logs() -> None:
    assert str(Remote(ip_address("192.0.2.1"), 443)) == "192.0.2.1:443"
    assert str(Remote(ip_address("2001:db8::1"), 443)) == "[2001:db8::1]:443"
    assert str(Remote(None, 0)) == "unknown"


def test_watching_tells_of_everybody(bench: Bench) -> None:
    alice, peer = bench.client(1), bench.client(9, mesh=True)
    peer.feed(frames.watch_conns())
    assert {event.peer for event in peer.received() if isinstance(event, PeerPresent)} == {A, peer.key}
    bob = bench.client(2)
    bench.leave(alice)
    events = peer.received()
    assert isinstance(events[0], PeerPresent)
    assert events[0].peer == bob.key
    assert events[1:] == [PeerGone(A, PeerGoneReason.DISCONNECTED)]
