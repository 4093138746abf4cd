"""What a mesh peer says of its clients, and what the routing table makes of it."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from derper.relay.follower import Follower
from derper.wire import frames
from derper.wire.errors import ProtocolError
from derper.wire.frames import HEADER, MAX_SERVER_FRAME, FrameType, PeerGoneReason

from .core import Bench, BenchLink, key
from .streams import cuts

OURS, PEER = key(0xFF), key(0xEE)


class Followed:
    """A relay, and a peer whom it follows."""

    def __init__(self) -> None:
        self.bench = Bench(OURS[0])
        self.link = BenchLink()
        self.answers: list[bytes] = []
        self.follower = Follower(self.bench.router, self.link, frozenset((OURS, PEER)), self.answers.append)
        self._tail = b""

    def feed(self, data: bytes) -> None:
        """As a connection does it: what is not used comes again, in a buffer that others use meanwhile."""
        held = self._tail + data
        buffer = bytearray(b"\xdd" * 7 + held + b"\xdd" * 7)
        used = self.follower.receive(buffer, 7, 7 + len(held))
        self._tail = bytes(buffer[used : 7 + len(held)])
        assert len(self._tail) < 64

    @property
    def ways(self) -> set[bytes]:
        assert set(self.bench.router.forwarders.values()) <= {(self.link,)}
        return set(self.bench.router.forwarders)


def present(number: int) -> bytes:
    return frames.peer_present(key(number), None, 1, 1)


def gone(number: int) -> bytes:
    return frames.peer_gone(key(number), PeerGoneReason.DISCONNECTED)


FRAMES = st.one_of(
    st.integers(1, 4).map(present),
    st.integers(1, 4).map(gone),
    st.sampled_from([0xFF, 0xEE]).map(present),
    st.integers(1, 4).map(lambda number: frames.frame(FrameType.PEER_PRESENT, key(number))),  # of an old server
    st.tuples(st.sampled_from([0, 5, 6, 8, 9, 0x12, 0x14, 0x99]), st.binary(max_size=200)).map(
        lambda pair: frames.frame(*pair)
    ),
    st.binary(min_size=8, max_size=40).map(frames.ping),
)


def outcome(pieces: list[bytes]) -> object:
    followed = Followed()
    for piece in pieces:
        followed.feed(piece)
    assert followed.follower.present == followed.ways
    return followed.ways, followed.answers, followed.bench.counters


@given(st.data())
def test_any_split_gives_the_same_result(data: st.DataObject) -> None:
    stream = b"".join(data.draw(st.lists(FRAMES, max_size=12)))
    assert outcome(data.draw(cuts(stream))) == outcome([stream])


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 4))))
@example([(True, 1), (True, 1), (False, 1), (False, 1)])
def test_who_came_last_and_did_not_go_is_reached(changes: list[tuple[bool, int]]) -> None:
    followed = Followed()
    followed.feed(b"".join((present if came else gone)(number) for came, number in changes))
    expected = {number: came for came, number in changes}
    assert followed.ways == {key(number) for number, came in expected.items() if came}
    assert followed.bench.counters.packet_forwarder_delete_other_value == 0
    followed.follower.close()
    assert followed.ways == followed.follower.present == set()


def test_the_relays_themselves_are_no_clients() -> None:
    followed = Followed()
    followed.feed(present(0xFF) + present(0xEE) + gone(0xFF) + present(1))
    assert followed.ways == {key(1)}


def test_pings_are_answered() -> None:
    followed = Followed()
    followed.feed(frames.ping(b"12345678abc") + frames.frame(FrameType.PING, b"short") + frames.keep_alive())
    assert followed.answers == [frames.pong(b"12345678")]


def test_long_frames_are_not_held() -> None:
    followed = Followed()
    for _ in range(2):
        followed.feed(HEADER.pack(FrameType.RECV_PACKET, MAX_SERVER_FRAME) + bytes(1000))
        for _ in range(MAX_SERVER_FRAME // 1000 - 1):
            followed.feed(bytes(1000))
        followed.feed(bytes(MAX_SERVER_FRAME % 1000) + present(1))
    assert followed.ways == {key(1)}


def test_too_long_a_frame() -> None:
    followed = Followed()
    with pytest.raises(ProtocolError, match=r"^unexpectedly large frame of 1048577 bytes$"):
        followed.feed(HEADER.pack(FrameType.HEALTH, MAX_SERVER_FRAME + 1))
