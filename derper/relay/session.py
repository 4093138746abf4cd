"""One logged-in client of the relay: its frames in, its packets out.

This is the data path.  Three rules keep it fast and fair:

* **In place.**  SEND_PACKET and RECV_PACKET have the same layout, so a packet is turned around by
  overwriting its type and key in the read buffer.  It never becomes an object.
* **In runs.**  Neighbouring frames for one destination leave as one slice: one lookup, one copy, one
  write, and so one TLS record for many packets.
* **Bounded.**  While a client's socket is full, at most `QUEUE_DEPTH` packets wait for it, and as many
  disco messages; the oldest is dropped first.  A slow reader costs its own packets, nobody else's.

The session writes through a `Sink` and reads no clock: `now` is seconds of a monotonic clock.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address
from typing import Final, Protocol

from ..text import host_port
from ..wire import frames, inplace
from ..wire.errors import ProtocolError
from ..wire.frames import DISCO_MAGIC, HEADER_LEN, MAX_PACKET, MAX_PING, PING_LEN, FrameType, PeerGoneReason
from ..wire.handshake import ClientInfo
from ..wire.keys import KEY_LEN, NodePublic
from .counters import DropReason
from .limits import QUEUE_DEPTH, TokenBucket
from .router import Router
from .runs import KEYED, frames_of, packets_of

__all__ = ["Remote", "Session", "Sink"]

_FORWARD_LEN: Final = KEYED + KEY_LEN
_SEND_LEN: Final = KEYED + len(DISCO_MAGIC)
_SHORTEST: Final = _SEND_LEN - HEADER_LEN
_MAGIC: Final = int.from_bytes(DISCO_MAGIC[:4], "big")
_MORE_MAGIC: Final = int.from_bytes(DISCO_MAGIC[4:], "big")
_LONGEST: Final = KEY_LEN + MAX_PACKET
_DISCO_MIN: Final = KEYED + len(DISCO_MAGIC) + KEY_LEN + 24
_SEND_PACKET: Final = int(FrameType.SEND_PACKET)
_RECV_PACKET: Final = int(FrameType.RECV_PACKET)
_FORWARD_PACKET: Final = int(FrameType.FORWARD_PACKET)

_CONTROL_BOUND: Final = 64 << 10  # bytes of control frames that may wait for a client that does not read
_MESH_CONTROL_BOUND: Final = 16 << 20  # the same for a watcher, which is told of every client
_CHATTER: Final = 500  # frames in one read, beside packets of usual size
_CHATTER_READ: Final = 2 << 10  # bytes to read at a time from a client that sends so many
_HOME_MOVE_AFTER: Final = 5.0  # seconds; an earlier NOTE_PREFERRED is part of connecting, not a move
_PEER_GONE_RATE: Final = 1.0
_PEER_GONE_BURST: Final = 3.0
_NOBODY: Final[set[bytes]] = set()  # shared by all who have received nothing; it is replaced, never filled


class Sink(Protocol):
    """Where a session's bytes go.  No method may call back into the session, or into its router, before it returns."""

    def write(self, data: bytes, /) -> None:
        """Queue bytes for the client."""

    def end(self) -> None:
        """Close the connection soon, after what was written has been sent."""

    def abort(self) -> None:
        """Close the connection now, dropping what is unsent."""


@dataclass(frozen=True, slots=True)
class Remote:
    """Where a client comes from."""

    ip: IPv4Address | IPv6Address | None
    port: int

    def __str__(self) -> str:
        if self.ip is None:
            return "unknown"
        return host_port(self.ip, self.port)


class Session:
    """A client's state.  The owner feeds it with `receive`, tells it `pause` and `resume`, and closes it once."""

    __slots__ = (
        "_bucket",
        "_control",
        "_control_size",
        "_disco_queue",
        "_gone_bucket",
        "_left",
        "_pong_waiting",
        "_queue",
        "_skip",
        "can_mesh",
        "closed",
        "connected_at",
        "counters",
        "info",
        "is_duplicate",
        "key",
        "not_ideal",
        "paused_since",
        "preferred",
        "read_limit",
        "remote",
        "router",
        "sink",
        "sources",
        "write",
    )

    def __init__(
        self,
        router: Router,
        sink: Sink,
        key: NodePublic,
        info: ClientInfo,
        *,
        now: float,
        remote: Remote,
        can_mesh: bool = False,
        not_ideal: bool = False,
    ) -> None:
        self.router = router
        self.counters = router.counters
        self.sink = sink
        self.write: Callable[[bytes], object] = sink.write  # the sink may put its own writer here, to save a call
        self.key = key
        self.info = info
        self.remote = remote
        self.can_mesh = can_mesh
        self.not_ideal = not_ideal  # the client said that it would rather be on another node
        self.connected_at = now
        self.preferred = False  # the client said that this relay is its home
        self.is_duplicate = False  # another session has the same key
        self.closed = False
        self.paused_since: float | None = None  # when the socket became full
        self.sources = _NOBODY  # keys that sent packets to this client
        self._skip = 0  # bytes of an unknown frame that are still to come
        self._left = 0  # bytes that `receive` did not use
        self._bucket: TokenBucket | None = None
        self.read_limit = 0  # bytes to read at a time, 0 for as many as there are
        self._gone_bucket: TokenBucket | None = None
        # Made when first needed: most clients never fall behind.
        self._queue: deque[tuple[float, bytes]] | None = None
        self._disco_queue: deque[tuple[float, bytes]] | None = None
        self._control: list[bytes] = []
        self._control_size = 0
        self._pong_waiting = False

    # -- frames in -----------------------------------------------------------------------------------

    def receive(self, buffer: bytearray, start: int, end: int, now: float) -> int:
        """Handle every whole frame in ``buffer[start:end]``, which is overwritten.

        Returns the offset of the first byte not used: the caller keeps the rest and hands it in again,
        in front of what comes next.  Raises `ProtocolError`: the caller closes the connection.
        """
        if not 0 <= start <= end <= len(buffer):
            raise IndexError("offsets outside of the buffer")  # compiled code would not notice
        pos = self._skipped(start, end)
        if self.is_duplicate and self._begins_frame(buffer, pos, end):
            self.router.note_activity(self)
        handled = 0
        while True:
            pos = self._packets(buffer, pos, end, now)
            self._left = end - pos
            if end - pos < HEADER_LEN:
                return pos
            kind, length = inplace.head_at(buffer, pos)
            self._check_head(kind, length)
            body = pos + HEADER_LEN
            if kind not in _LENGTHS:
                self.counters.unknown_frames += 1
                self._skip = length
                pos = self._skipped(body, end)
            elif body + length > end:
                return pos
            elif kind == _FORWARD_PACKET:
                pos = self._forwarded(buffer, pos, end, now)
            else:
                _HANDLERS[kind](self, buffer, body, body + length, now)
                pos = body + length
            handled += 1
            if handled == _CHATTER:
                self._read_less()

    def _read_less(self) -> None:
        """Too many frames that are no packets came at once: each is work, so this client's turns become shorter."""
        if not self.can_mesh:
            self.read_limit = min(self.read_limit or _CHATTER_READ, _CHATTER_READ)

    def _check_head(self, kind: int, length: int) -> None:
        """A frame that must not be ends the connection at its head: nothing of it is waited for."""
        shortest, longest = _LENGTHS.get(kind, _ANY_LENGTH)
        if not shortest <= length <= longest:
            if kind == FrameType.PING:
                self.counters.got_ping += 1
            raise ProtocolError(f"{FrameType(kind).name} of {length} bytes; it has {shortest} to {longest}")
        if kind in _MESH_ONLY and not self.can_mesh:
            raise ProtocolError(f"{FrameType(kind).name} from a client without the mesh key")

    def _begins_frame(self, buffer: bytearray, pos: int, end: int) -> bool:
        """Whether a frame's head is in what came since the last call."""
        if self._left >= HEADER_LEN:
            pos += HEADER_LEN + inplace.head_at(buffer, pos)[1]
        return end - pos >= HEADER_LEN

    def _skipped(self, start: int, end: int) -> int:
        count = min(self._skip, end - start)
        self._skip -= count
        return start + count

    def _packets(self, buffer: bytearray, pos: int, end: int, now: float) -> int:
        """The hot loop: turn the SEND_PACKET frames at `pos` around, stop at anything else."""
        begin = start = pos
        own_key, dst = self.key, b""
        count = total = disco = 0
        while end - pos >= _SEND_LEN:
            kind, length, key, magic, more_magic = inplace.packet_at(buffer, pos)
            after = pos + HEADER_LEN + length
            if kind != _SEND_PACKET or after > end or length < _SHORTEST or length > _LONGEST:
                break
            if not inplace.same_key(key, dst):
                if count:
                    self._dispatch(buffer, start, pos, dst, count, now)
                start, dst, count = pos, inplace.key_of(key), 0
            inplace.set_head(buffer, pos, _RECV_PACKET, length, own_key)
            if magic == _MAGIC and more_magic == _MORE_MAGIC and after - pos >= _DISCO_MIN:
                disco += 1
            count += 1
            total += 1
            pos = after
        if count:
            self._dispatch(buffer, start, pos, dst, count, now)
        if total:
            counters = self.counters
            counters.packets_received += total
            counters.packets_received_disco += disco
            counters.bytes_received += pos - begin - total * KEYED
        return pos

    def _dispatch(self, buffer: bytearray, start: int, end: int, dst: bytes, count: int, now: float) -> None:
        """Send a run of turned-around frames to `dst`: to a client of the node, else through the mesh, or nowhere."""
        router = self.router
        chunk = inplace.cut(buffer, start, end)
        target = router.active.get(dst)
        if target is not None:
            target.deliver(self.key, chunk, count, now)
            return
        beside = router.elsewhere.get(dst)
        if beside is not None:
            beside.deliver(self.key, chunk, count, now)
            return
        leads = router.forwarders.get(dst)
        if leads is not None:
            leads[0].forward(self.key, dst, chunk)
            return
        if router.hold(self.key, dst, chunk):
            return
        for packet in packets_of(chunk):
            self.undeliverable(dst, packet, DropReason.UNKNOWN_DEST, now)

    def undeliverable(self, dst: bytes, packet: bytes, reason: DropReason, now: float) -> None:
        """A packet of this client is dropped, as nobody knows `dst`: count it, and answer a disco message."""
        disco = frames.is_disco(packet)
        self.counters.drop(reason, disco, len(packet))
        if not disco:
            return
        if self._gone_bucket is None:
            self._gone_bucket = TokenBucket(_PEER_GONE_RATE, _PEER_GONE_BURST, now)
        if self._gone_bucket.allow(now):
            self.peer_gone(dst, PeerGoneReason.NOT_HERE)

    def _on_send_packet(self, buffer: bytearray, start: int, end: int, now: float) -> None:
        """A packet too short for the hot loop."""
        dst = bytes(buffer[start : start + KEY_LEN])
        inplace.set_head(buffer, start - HEADER_LEN, _RECV_PACKET, end - start, self.key)
        self.counters.packets_received += 1
        self.counters.bytes_received += end - start - KEY_LEN
        self._dispatch(buffer, start - HEADER_LEN, end, dst, 1, now)

    def _forwarded(self, buffer: bytearray, pos: int, end: int, now: float) -> int:
        """The hot loop of a mesh peer: hand the FORWARD_PACKET frames at `pos` to clients here, stop at anything else.

        RECV_PACKET is one key shorter, so each frame's new head goes right in front of its packet.
        """
        view = memoryview(buffer)
        run: list[memoryview] = []
        run_src = run_dst = b""
        total = 0
        while end - pos >= _FORWARD_LEN:
            kind, length, src, dst = inplace.forward_at(buffer, pos)
            after = pos + HEADER_LEN + length
            if kind != _FORWARD_PACKET or after > end or length < 2 * KEY_LEN or length > KEY_LEN + _LONGEST:
                break
            if not inplace.same_key(dst, run_dst) or not inplace.same_key(src, run_src):
                if run:
                    self._arrived(run_src, run_dst, run, now)
                run_src, run_dst, run = inplace.key_of(src), inplace.key_of(dst), []
            head = pos + KEY_LEN
            inplace.set_head(buffer, head, _RECV_PACKET, length - KEY_LEN, run_src)
            run.append(view[head:after])
            total += 1
            pos = after
        if run:
            self._arrived(run_src, run_dst, run, now)
        self.counters.packets_forwarded_in += total
        return pos

    def _arrived(self, src: bytes, dst: bytes, run: list[memoryview], now: float) -> None:
        """RECV_PACKET frames from another relay: for a client of this node, or for nobody."""
        target = self.router.active.get(dst) or self.router.elsewhere.get(dst)
        if target is not None:
            target.deliver(src, b"".join(run), len(run), now)
            return
        if self.router.moves.hold(src, dst, b"".join(run), forwarded=True):
            return
        for frame in run:
            self.undeliverable(dst, bytes(frame[KEYED:]), DropReason.UNKNOWN_DEST_ON_FWD, now)

    def _on_note_preferred(self, buffer: bytearray, start: int, end: int, now: float) -> None:
        preferred = buffer[start] != 0
        if preferred == self.preferred:
            return
        self.preferred = preferred
        counters = self.counters
        counters.current_home_connections += 1 if preferred else -1
        if now - self.connected_at > _HOME_MOVE_AFTER:
            if preferred:
                counters.home_moves_in += 1
            else:
                counters.home_moves_out += 1

    def _on_watch_conns(self, buffer: bytearray, start: int, end: int, now: float) -> None:
        self.router.watch(self)

    def _on_close_peer(self, buffer: bytearray, start: int, end: int, now: float) -> None:
        self.router.close_peer(bytes(buffer[start:end]))

    def _on_ping(self, buffer: bytearray, start: int, end: int, now: float) -> None:
        self.counters.got_ping += 1
        if self._pong_waiting:
            return  # it pings faster than it reads
        self.counters.sent_pong += 1
        self._pong_waiting = self.paused_since is not None
        self.control(frames.pong(bytes(buffer[start : start + PING_LEN])))

    # -- packets out ---------------------------------------------------------------------------------

    def deliver(self, src: bytes, chunk: bytes, count: int, now: float) -> None:
        """Send a run of `count` RECV_PACKET frames, all from `src`, to this client."""
        if self.paused_since is None:
            if src not in self.sources:
                self.router.note_source(self, src)
            self.write(chunk)
            counters = self.counters
            counters.packets_sent += count
            counters.bytes_sent += len(chunk) - count * KEYED
            if count > 1:
                counters.runs.observe(count)
        else:
            self._enqueue(chunk, now)

    def control(self, frame: bytes) -> None:
        """Send a control frame (or several).  It may overtake queued packets."""
        if self.closed or not frame:
            return
        if self.paused_since is None:
            self.counters.control_frames += 1
            self.write(frame)
            return
        self._control.append(frame)
        self._control_size += len(frame)
        if self._control_size > (_MESH_CONTROL_BOUND if self.can_mesh else _CONTROL_BOUND):
            self.sink.abort()

    def peer_gone(self, key: bytes, reason: PeerGoneReason) -> None:
        """Tell the client that `key` is not reachable."""
        if reason is PeerGoneReason.DISCONNECTED:
            self.counters.peer_gone_disconnected_frames += 1
        else:
            self.counters.peer_gone_not_here_frames += 1
        self.control(frames.peer_gone(key, reason))

    def present_frame(self) -> bytes:
        """PEER_PRESENT for this client (derpserver, presentFlags)."""
        flags = 0
        if self.info.is_prober:
            flags |= frames.PeerPresentFlags.PROBER
        if self.can_mesh:
            flags |= frames.PeerPresentFlags.MESH_PEER
        if self.not_ideal:
            flags |= frames.PeerPresentFlags.NOT_IDEAL
        flags = flags or frames.PeerPresentFlags.REGULAR
        return frames.peer_present(self.key, self.remote.ip, self.remote.port, flags)

    def _enqueue(self, chunk: bytes, now: float) -> None:
        for frame in frames_of(chunk):
            disco = frames.is_disco(frame[KEYED:])
            queue = self._queue_for(disco)
            if len(queue) >= QUEUE_DEPTH:
                since, oldest = queue.popleft()
                self.counters.drop(DropReason.QUEUE_HEAD, disco, len(oldest) - KEYED)
                self.counters.queued(now - since, sent=False)
            queue.append((now, frame))

    def _queue_for(self, disco: bool) -> deque[tuple[float, bytes]]:
        if disco:
            if self._disco_queue is None:
                self._disco_queue = deque()
            return self._disco_queue
        if self._queue is None:
            self._queue = deque()
        return self._queue

    @property
    def queued(self) -> int:
        """Packets that wait for the client to read."""
        return len(self._queue or ()) + len(self._disco_queue or ())

    # -- the owner's duties --------------------------------------------------------------------------

    def set_bucket(self, bucket: TokenBucket | None) -> None:
        """Limit the bytes that this client may send; mesh peers are exempt."""
        self._bucket = None if self.can_mesh else bucket
        self.read_limit = 0 if self._bucket is None else self._bucket.slice

    def throttle(self, size: int, now: float) -> float:
        """`size` bytes were read: seconds to stop reading, 0.0 for none."""
        return 0.0 if self._bucket is None else self._bucket.take(size, now)

    def pause(self, now: float) -> None:
        """The socket is full."""
        self.paused_since = now

    def resume(self, now: float) -> None:
        """The socket has room again: send what waited, control frames first."""
        self.paused_since = None
        self._pong_waiting = False
        waiting = self._control
        self.counters.control_frames += len(waiting)
        self._control, self._control_size = [], 0
        for queue in (self._disco_queue, self._queue):
            while queue:
                since, frame = queue.popleft()
                source = frame[HEADER_LEN:KEYED]
                if source not in self.sources:
                    self.router.note_source(self, source)
                self.counters.queued(now - since, sent=True)
                self.counters.packets_sent += 1
                self.counters.bytes_sent += len(frame) - KEYED
                waiting.append(frame)
        if waiting:
            if len(waiting) > 1:
                self.counters.runs.observe(len(waiting))
            self.write(b"".join(waiting))

    def close(self) -> None:
        """The connection is gone.  Call it once, after `Router.unregister`."""
        self.closed = True
        for queue, disco in ((self._disco_queue, True), (self._queue, False)):
            for _, frame in queue or ():
                self.counters.drop(DropReason.GONE_DISCONNECTED, disco, len(frame) - KEYED)
        self._queue = self._disco_queue = None
        self._control.clear()


_HANDLERS: Final = {
    int(FrameType.SEND_PACKET): Session._on_send_packet,
    int(FrameType.NOTE_PREFERRED): Session._on_note_preferred,
    int(FrameType.WATCH_CONNS): Session._on_watch_conns,
    int(FrameType.CLOSE_PEER): Session._on_close_peer,
    int(FrameType.PING): Session._on_ping,
}

# Shortest and longest payload of each frame that a client may send.
_LENGTHS: Final = {
    int(FrameType.SEND_PACKET): (KEY_LEN, _LONGEST),
    _FORWARD_PACKET: (2 * KEY_LEN, KEY_LEN + _LONGEST),
    int(FrameType.NOTE_PREFERRED): (1, 1),
    int(FrameType.WATCH_CONNS): (0, 0),
    int(FrameType.CLOSE_PEER): (KEY_LEN, KEY_LEN),
    int(FrameType.PING): (PING_LEN, MAX_PING),
}
_ANY_LENGTH: Final = (0, 0xFFFFFFFF)

_MESH_ONLY: Final = {_FORWARD_PACKET, int(FrameType.WATCH_CONNS), int(FrameType.CLOSE_PEER)}
