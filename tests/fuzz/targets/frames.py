"""Frames of a client that has logged in, against a second reading of derp.go that takes no shortcuts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict

from derper.relay.limits import QUEUE_DEPTH
from derper.relay.runs import frames_of
from derper.wire import frames
from derper.wire.errors import ProtocolError
from derper.wire.frames import DISCO_MAGIC, HEADER, HEADER_LEN, MAX_PACKET, FrameType

from ...unit.core import Bench, BenchClient, BenchLink, key
from ..target import Target, in_pieces

SENDER, MESHED, PAUSED, AFAR = key(1), key(2), key(3), key(4)
MESH, WATCH = 0x80, 0x40  # bits of the first byte


class Table:
    """One sender, and everybody whom its packets can reach."""

    def __init__(self, *, mesh: bool, watched: bool) -> None:
        self.bench = Bench()
        self.sender = self.bench.client(1, mesh=mesh)
        self.others = [self.bench.client(2, mesh=True), self.bench.client(3)]
        self.link = BenchLink(self.bench.counters)
        self.bench.router.add_forwarder(AFAR, self.link)
        if watched:
            self.others[0].feed(frames.watch_conns())
            self.others[0].writes.clear()
        self.others[1].session.pause(0.0)

    def feed(self, pieces: list[bytes]) -> str:
        """The error that ended it, if one did."""
        try:
            for piece in pieces:
                self.sender.feed(piece)
                assert len(self.sender.tail) < HEADER_LEN + 64 + MAX_PACKET, "keeps more than the longest frame"
        except ProtocolError as error:
            return str(error)
        return ""

    def written(self) -> list[bytes]:
        """What everybody got; who was paused reads now."""
        self.others[1].session.resume(1.0)
        return [b"".join(client.writes) for client in (self.sender, *self.others)]

    def forwarded(self) -> list[tuple[bytes, bytes, bytes]]:
        return [(src, dst, frame) for src, dst, chunk in self.link.forwarded for frame in frames_of(chunk)]

    def counted(self) -> dict[str, object]:
        """All counters but that of writes, which are as many as the pieces make them."""
        return asdict(self.bench.counters) | {"runs": None}

    def end(self) -> None:
        """Everybody leaves, and nothing of them may stay."""
        for client in (self.sender, *self.others):
            self.bench.leave(client)
        self.bench.router.remove_forwarder(AFAR, self.link)
        router = self.bench.router
        tables = (router.active, router.forwarders, router.watchers, router._interested, router._duplicates)
        assert not any(tables), tables
        counters = self.bench.counters
        assert counters.packets_received + counters.packets_forwarded_in == (
            counters.packets_sent + counters.packets_forwarded_out + sum(counters.packets_dropped.values())
        ), "a packet is lost without being counted"
        assert counters.current_connections == counters.current_home_connections == 0


def packets_in(stream: bytes, *, mesh: bool) -> Iterator[tuple[bytes, bytes, bytes, bool]]:
    """The packets of a stream as derp.go has them, up to its first fault: source, destination, packet, forwarded."""
    pos = 0
    while len(stream) - pos >= HEADER_LEN:
        kind, length = HEADER.unpack_from(stream, pos)
        body = stream[pos + HEADER_LEN : pos + HEADER_LEN + length]
        pos += HEADER_LEN + length
        if kind == FrameType.SEND_PACKET and 32 <= length <= 32 + MAX_PACKET:
            if len(body) == length:
                yield SENDER, body[:32], body[32:], False
        elif kind == FrameType.FORWARD_PACKET and 64 <= length <= 64 + MAX_PACKET:
            if len(body) < length or not mesh:
                return
            yield body[:32], body[32:64], body[64:], True
        elif kind in (FrameType.SEND_PACKET, FrameType.FORWARD_PACKET) or _ends(kind, length, mesh=mesh):
            return


def _ends(kind: int, length: int, *, mesh: bool) -> bool:
    bounds = {
        FrameType.NOTE_PREFERRED: (1, 1),
        FrameType.WATCH_CONNS: (0, 0),
        FrameType.CLOSE_PEER: (32, 32),
        FrameType.PING: (8, 1000),
    }.get(FrameType(kind) if kind in FrameType._value2member_map_ else FrameType.PONG)
    if bounds is None:
        return False
    return not bounds[0] <= length <= bounds[1] or (kind in (FrameType.WATCH_CONNS, FrameType.CLOSE_PEER) and not mesh)


def packets_of_client(data: bytes) -> list[bytes]:
    """RECV_PACKET frames among what a client got."""
    return [frame for frame in frames_of(data) if frame[0] == FrameType.RECV_PACKET]


def _paused_queue(expected: list[bytes]) -> list[bytes]:
    """A client that does not read keeps the newest packets, and gets disco messages first."""
    disco = [frame for frame in expected if frames.is_disco(frame[HEADER_LEN + 32 :])]
    others = [frame for frame in expected if not frames.is_disco(frame[HEADER_LEN + 32 :])]
    return disco[-QUEUE_DEPTH:] + others[-QUEUE_DEPTH:]


def run(data: bytes) -> None:
    """Any split means the same, and every packet reaches the one whom it is for, in order, under its sender's key."""
    options, rest = data[:1] or b"\0", data[1:]
    mesh, watched = bool(options[0] & MESH), bool(options[0] & WATCH)
    stream, pieces = in_pieces(rest)
    whole, cut = Table(mesh=mesh, watched=watched), Table(mesh=mesh, watched=watched)
    assert whole.feed([stream]) == cut.feed(pieces)
    written = whole.written()
    assert written == cut.written()
    assert whole.forwarded() == cut.forwarded()
    assert whole.counted() == cut.counted()

    packets = list(packets_in(stream, mesh=mesh))
    for client, got in zip((whole.sender, *whole.others), written, strict=True):
        expected = [frames.recv_packet(src, packet) for src, dst, packet, _ in packets if dst == client.key]
        assert packets_of_client(got) == (_paused_queue(expected) if client.key == PAUSED else expected)
        _only_known_frames(client, got)
    assert whole.forwarded() == [
        (src, dst, frames.recv_packet(src, packet)) for src, dst, packet, again in packets if dst == AFAR and not again
    ]
    whole.end()
    cut.end()


def _only_known_frames(client: BenchClient, got: bytes) -> None:
    client.writes = [got] if got else []
    client.received()


def seeds() -> Iterator[bytes]:
    disco = DISCO_MAGIC + bytes(56)
    for options, cut in ((0, b"\0\0"), (0, b"\xff\xff"), (MESH, b"\x06\x28"), (MESH | WATCH, b"\x28\xff")):
        start = bytes([options]) + cut
        yield start + b"".join(frames.send_packet(dst, b"hello") for dst in (MESHED, MESHED, PAUSED, AFAR, SENDER))
        yield start + b"".join(frames.send_packet(PAUSED, bytes([n])) for n in range(40))
        yield start + frames.send_packet(key(9), disco) * 4 + frames.send_packet(MESHED, b"x" * 40) * 3
        yield start + frames.ping(b"12345678") + frames.note_preferred(True) + frames.frame(0x42, b"unknown")
        yield start + frames.forward_packet(AFAR, MESHED, b"hello") + frames.forward_packet(MESHED, AFAR, disco)
        yield start + frames.watch_conns() + frames.close_peer(PAUSED) + frames.send_packet(MESHED, b"")
        yield start + frames.send_packet(MESHED, b"") + HEADER.pack(FrameType.SEND_PACKET, 1 << 20)
        yield start + HEADER.pack(0x42, 1 << 31) + frames.send_packet(MESHED, b"hidden")


TARGET = Target(run, seeds)
