"""The client half without I/O: bytes in, events out."""

from __future__ import annotations

import contextlib
from ipaddress import ip_address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from derper.wire import frames, handshake
from derper.wire.client import (
    ClientConnection,
    Event,
    Health,
    KeepAlive,
    PeerGone,
    PeerPresent,
    Ping,
    Pong,
    ReceivedPacket,
    Restarting,
    ServerInfoReceived,
    ServerKey,
)
from derper.wire.errors import ProtocolError
from derper.wire.frames import HEADER, HEADER_LEN, FrameType, PeerGoneReason, PeerPresentFlags
from derper.wire.handshake import ClientInfo, ServerInfo
from derper.wire.keys import NodePrivate, NodePublic

from .streams import cuts

CLIENT, SERVER = NodePrivate(b"\x18" * 32), NodePrivate(b"\x28" * 32)
PEER = NodePublic(b"\xaa" * 32)
GREETING = handshake.server_key_frame(SERVER.public)
INFO = handshake.server_info_frame(SERVER, CLIENT.public, ServerInfo())

STEADY: list[tuple[bytes, Event | None]] = [
    (frames.recv_packet(PEER, b"hello"), ReceivedPacket(PEER, b"hello")),
    (frames.recv_packet(PEER, b""), ReceivedPacket(PEER, b"")),
    (frames.recv_packet(PEER, bytes(64 << 10)), ReceivedPacket(PEER, bytes(64 << 10))),
    (frames.frame(FrameType.RECV_PACKET, bytes(31)), None),
    (frames.keep_alive(), KeepAlive()),
    (frames.frame(FrameType.KEEP_ALIVE, b"future"), KeepAlive()),
    (frames.peer_gone(PEER, PeerGoneReason.NOT_HERE), PeerGone(PEER, 1)),
    (frames.peer_gone(PEER, 0x77), PeerGone(PEER, 0x77)),
    (frames.frame(FrameType.PEER_GONE, PEER), PeerGone(PEER, 0)),
    (frames.frame(FrameType.PEER_GONE, PEER + b"\x01future"), PeerGone(PEER, 1)),
    (frames.frame(FrameType.PEER_GONE, bytes(31)), None),
    (
        frames.peer_present(PEER, ip_address("192.0.2.1"), 443, PeerPresentFlags.REGULAR),
        PeerPresent(PEER, ip_address("192.0.2.1"), 443, 1),
    ),
    (
        frames.peer_present(PEER, ip_address("2001:db8::1"), 443, 0xFF) + b"",
        PeerPresent(PEER, ip_address("2001:db8::1"), 443, 0xFF),
    ),
    (frames.frame(FrameType.PEER_PRESENT, PEER), PeerPresent(PEER, None, 0, 0)),
    (frames.frame(FrameType.PEER_PRESENT, PEER + bytes(17)), PeerPresent(PEER, None, 0, 0)),
    (
        frames.frame(FrameType.PEER_PRESENT, PEER + bytes(15) + b"\x01\x01\xbb"),
        PeerPresent(PEER, ip_address("::1"), 443, 0),
    ),
    (
        frames.frame(FrameType.PEER_PRESENT, PEER + bytes(15) + b"\x01\x01\xbb\x02future"),
        PeerPresent(PEER, ip_address("::1"), 443, 2),
    ),
    (frames.frame(FrameType.PEER_PRESENT, bytes(31)), None),
    (frames.ping(b"12345678"), Ping(b"12345678")),
    (frames.ping(b"12345678future"), Ping(b"12345678")),
    (frames.ping(b"1234567"), None),
    (frames.pong(b"12345678"), Pong(b"12345678")),
    (frames.pong(b""), None),
    (frames.health("your key is used twice"), Health("your key is used twice")),
    (frames.health(""), Health("")),
    (frames.frame(FrameType.HEALTH, b"\xff"), Health("\N{REPLACEMENT CHARACTER}")),
    (frames.restarting(1.5, 30), Restarting(1.5, 30.0)),
    (frames.frame(FrameType.RESTARTING, bytes(7)), None),
    (frames.frame(FrameType.RESTARTING, bytes(8) + b"future"), Restarting(0.0, 0.0)),
    (frames.frame(0xEE, b"what is this"), None),
    (frames.frame(FrameType.SEND_PACKET, bytes(40)), None),
]


def logged_in() -> ClientConnection:
    connection = ClientConnection(CLIENT)
    connection.receive_data(GREETING + INFO)
    connection.data_to_send()
    return connection


def test_login() -> None:
    connection = ClientConnection(CLIENT, ClientInfo(can_ack_pings=True))
    assert connection.data_to_send() == b""
    assert connection.server_key is None
    assert connection.receive_data(GREETING) == [ServerKey(SERVER.public)]
    assert connection.server_key == SERVER.public
    sent = connection.data_to_send()
    assert handshake.open_client_info(SERVER, sent[HEADER_LEN:]) == (CLIENT.public, ClientInfo(can_ack_pings=True))
    assert connection.data_to_send() == b""
    assert connection.receive_data(INFO) == [ServerInfoReceived(ServerInfo())]


def test_fast_start_speaks_first() -> None:
    """The server greets all the same; its greeting is skipped, as Go does."""
    connection = ClientConnection(CLIENT, server_key=SERVER.public)
    assert connection.server_key == SERVER.public
    assert handshake.open_client_info(SERVER, connection.data_to_send()[HEADER_LEN:])[0] == CLIENT.public
    assert connection.receive_data(GREETING + INFO) == [ServerInfoReceived(ServerInfo())]


@pytest.mark.parametrize(("frame", "event"), STEADY)
def test_steady_state(frame: bytes, event: Event | None) -> None:
    assert logged_in().receive_data(frame) == ([] if event is None else [event])


@given(st.data())
def test_any_split_gives_the_same_events(data: st.DataObject) -> None:
    chosen = data.draw(st.lists(st.sampled_from([item for item in STEADY if len(item[0]) < 1000]), max_size=8))
    stream = GREETING + INFO + b"".join(frame for frame, _ in chosen)
    expected = ClientConnection(CLIENT).receive_data(stream)
    assert expected[2:] == [event for _, event in chosen if event is not None]
    connection = ClientConnection(CLIENT)
    assert [event for piece in data.draw(cuts(stream)) for event in connection.receive_data(piece)] == expected


def test_byte_by_byte() -> None:
    stream = GREETING + INFO + b"".join(frame for frame, _ in STEADY if len(frame) < 1000)
    connection = ClientConnection(CLIENT)
    events = [event for i in range(len(stream)) for event in connection.receive_data(stream[i : i + 1])]
    assert events == ClientConnection(CLIENT).receive_data(stream)


def test_the_first_frame_must_be_the_greeting() -> None:
    with pytest.raises(ProtocolError, match=r"^the server did not start with its key$"):
        ClientConnection(CLIENT).receive_data(frames.keep_alive())


def test_a_weak_server_key_breaks_the_protocol() -> None:
    with pytest.raises(ProtocolError, match=r"public key is weak$"):
        ClientConnection(CLIENT).receive_data(handshake.server_key_frame(bytes(32)))
    with pytest.raises(ProtocolError, match=r"public key is weak$"):
        ClientConnection(CLIENT, server_key=bytes(32))


def test_another_servers_info() -> None:
    other = NodePrivate(b"\x38" * 32)
    with pytest.raises(ProtocolError, match=r"^cannot open a sealed message"):
        logged_in().receive_data(handshake.server_info_frame(other, CLIENT.public, ServerInfo()))


def test_frames_of_up_to_a_mebibyte_are_taken() -> None:
    big = frames.health("x" * (1 << 20))
    assert logged_in().receive_data(big) == [Health("x" * (1 << 20))]


@pytest.mark.parametrize("length", [(1 << 20) + 1, 0xFFFFFFFF])
def test_longer_frames_are_refused_at_their_header(length: int) -> None:
    connection = logged_in()
    with pytest.raises(ProtocolError, match=f"^unexpectedly large frame of {length} bytes$"):
        connection.receive_data(HEADER.pack(FrameType.RECV_PACKET, length))


def test_events_before_an_error_are_not_delivered_twice() -> None:
    connection = logged_in()
    with pytest.raises(ProtocolError):
        connection.receive_data(frames.keep_alive() + HEADER.pack(FrameType.RECV_PACKET, 1 << 30))
    with pytest.raises(ProtocolError):
        connection.receive_data(b"")


@given(st.lists(st.binary(max_size=80)), st.sampled_from([b"", GREETING, GREETING + INFO]))
def test_any_bytes_give_events_or_break_the_protocol(pieces: list[bytes], start: bytes) -> None:
    connection = ClientConnection(CLIENT)
    connection.receive_data(start)
    with contextlib.suppress(ProtocolError):
        for piece in pieces:
            connection.receive_data(piece)


@given(st.sampled_from(FrameType), st.binary(max_size=80))
def test_any_payload_gives_an_event_or_breaks_the_protocol(kind: FrameType, payload: bytes) -> None:
    with contextlib.suppress(ProtocolError):
        assert len(logged_in().receive_data(frames.frame(kind, payload))) <= 1
