"""The other workers of this node: which clients they have, and the way there.

A node with several workers is one relay to everybody else.  Each worker has a `Sibling` for each other one; the two
ends exchange frames of their own, in DERP's framing, over a socket that only they have::

    CLIENT   8 claim + a PEER_PRESENT frame    a client logged in here
    ACTIVE   32 key + 8 claim                  of this key's sessions, one here spoke last
    GONE     32 key                            its last session here is gone
    CLOSE    32 key                            end all sessions with this key
    RUN      32 destination + 4 count + RECV_PACKET frames of one source
    SYNCED   empty                             what was here when we met has been told

A run crosses as it is: the sender puts one head in front of it, the receiver takes it off.  What comes from a sibling
is for a session here or for nobody, so no packet goes on from worker to worker.

A key that is connected to several workers belongs to the one with the highest *claim*.  A worker claims a key when a
client logs in with it, and when a session speaks while another worker has it.  Claims are higher than all that the
worker has seen (Lamport's clock, the worker's number decides among equals), so all workers agree as soon as they have
heard the same, without asking, and who comes last wins at once.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from enum import IntEnum
from struct import Struct
from typing import TYPE_CHECKING, Final

from ..wire import frames
from ..wire.errors import ProtocolError
from ..wire.frames import HEADER, HEADER_LEN
from ..wire.keys import KEY_LEN
from .counters import DropReason
from .runs import KEYED, frames_of

if TYPE_CHECKING:
    from .router import Router
    from .session import Session

__all__ = ["MAX_FRAME", "MAX_WORKERS", "Elsewhere", "Node", "Sibling"]

MAX_WORKERS: Final = 256
MAX_FRAME: Final = 256 << 10  #: the longest frame between two workers; longer runs are cut
QUEUE_PACKETS: Final = 1024  #: packets that wait while the socket is full


class _Kind(IntEnum):
    CLIENT = 1
    ACTIVE = 2
    GONE = 3
    CLOSE = 4
    RUN = 5
    SYNCED = 6


_CLIENT: Final = Struct(">BIQ")
_ACTIVE: Final = Struct(">BI32sQ")
_KEYED: Final = Struct(">BI32s")
_RUN: Final = Struct(">BI32sI")
_RUN_KIND: Final = int(_Kind.RUN)
_RUN_MORE: Final = _RUN.size - HEADER_LEN  # bytes that it counts as its own


class Elsewhere:
    """A client of another worker."""

    __slots__ = ("claim", "frame", "key", "sibling")

    def __init__(self, key: bytes, sibling: Sibling, claim: int, frame: bytes) -> None:
        self.key = key
        self.sibling = sibling
        self.claim = claim
        self.frame = frame  #: PEER_PRESENT, as its worker tells it to watchers

    def deliver(self, src: bytes, chunk: bytes, count: int, now: float) -> None:
        """Send a run of `count` RECV_PACKET frames, all from `src`, to this client."""
        self.sibling.pass_on(self.key, chunk, count)


class Node:
    """What a router knows of its siblings.  `number` is this worker's own; alone, a relay has no siblings."""

    def __init__(self, router: Router, number: int = 0) -> None:
        self.number = number
        self.siblings: set[Sibling] = set()
        #: key -> the worker that has its active session, if that is another one.  The hot path reads it directly.
        self.elsewhere: dict[bytes, Elsewhere] = {}
        #: key -> the session here that would be active if the one elsewhere were not
        self.shadowed: dict[bytes, Session] = {}
        self.shared: set[bytes] = set()  #: keys that are connected here and to another worker
        #: told of each mesh peer that logs in elsewhere, by its PEER_PRESENT
        self.mesh_peer_came: Callable[[bytes], None] | None = None
        self._router = router
        self._claims: dict[bytes, int] = {}  # of the keys that are connected here
        self._time = 0  # Lamport's

    # -- what happens here ---------------------------------------------------------------------------

    def arrived(self, session: Session) -> None:
        """A client has logged in here: its key is ours now, whoever had it."""
        if not self.siblings:
            return
        key = session.key
        claim = self._claim(key)
        if self._others(key):
            self._router.counters.total_dup_client_conns += key not in self.shared and not session.is_duplicate
            self.shared.add(key)
            self._mark(key)
        self.elsewhere.pop(key, None)
        self.shadowed.pop(key, None)
        self._tell(_client(claim, session.present_frame()))

    def spoke(self, session: Session) -> None:
        """A session with a shadowed key spoke.  A mesh peer's links do so all the time, and nobody writes to it."""
        key = session.key
        if session.can_mesh:
            self.shadowed[key] = session
            return
        del self.shadowed[key]
        del self.elsewhere[key]
        self._router.active[key] = session
        self._tell(_ACTIVE.pack(_Kind.ACTIVE, KEY_LEN + 8, key, self._claim(key)))

    def left(self, key: bytes) -> bool:
        """The last session here is gone; whether another worker has the key."""
        self._claims.pop(key, None)
        if not self.siblings:
            return False
        self.shadowed.pop(key, None)
        self.shared.discard(key)
        self._tell(_KEYED.pack(_Kind.GONE, KEY_LEN, key))
        best = max(self._others(key), key=_claim_of, default=None)
        if best is not None:
            self.elsewhere[key] = best
        return best is not None

    def close_peer(self, key: bytes) -> None:
        """Let the others end their sessions with this key."""
        self._tell(_KEYED.pack(_Kind.CLOSE, KEY_LEN, key))

    # -- what the siblings say -----------------------------------------------------------------------

    def meet(self, sibling: Sibling) -> None:
        """A new sibling: tell it of every client here."""
        self.siblings.add(sibling)
        present = [_client(self._claim_here(key), session.present_frame()) for key, session in self._here()]
        sibling.write(b"".join([*present, HEADER.pack(_Kind.SYNCED, 0)]))

    def part(self, sibling: Sibling) -> None:
        """The sibling is gone, and all its clients with it."""
        self.siblings.discard(sibling)
        clients, sibling.clients = sibling.clients, {}
        for key in clients:
            self._gone_elsewhere(key)
            if not self._router.leads_to(key):
                self._router.moves.left(key)  # the others of the node are still there

    def came(self, sibling: Sibling, key: bytes, claim: int, frame: bytes) -> None:
        """A client logged in there."""
        sibling.clients[key] = Elsewhere(key, sibling, claim, frame)
        if self._router.here(key) is not None:
            self.shared.add(key)
            self._mark(key)
        self._settle(key, claim)
        self._router.broadcast(frame)
        for held in self._router.moves.found(key):
            sibling.pass_on(key, held.frame, 1)
        if frame[-1] & frames.PeerPresentFlags.MESH_PEER and self.mesh_peer_came is not None:
            self.mesh_peer_came(frame)

    def spoke_there(self, sibling: Sibling, key: bytes, claim: int) -> None:
        """One of the sessions with this key spoke there."""
        known = sibling.clients.get(key)
        if known is not None:
            known.claim = claim
            self._settle(key, claim)

    def went(self, sibling: Sibling, key: bytes) -> None:
        """The last session there is gone."""
        if sibling.clients.pop(key, None) is not None:
            self._gone_elsewhere(key)

    # -- whose a key is ------------------------------------------------------------------------------

    def _claim(self, key: bytes) -> int:
        self._time += 1
        claim = self._claims[key] = self._time * MAX_WORKERS + self.number
        return claim

    def _claim_here(self, key: bytes) -> int:
        return self._claims.get(key, self.number)  # of those that came before there was a sibling

    def _settle(self, key: bytes, claim: int) -> None:
        """`claim` is news of a sibling's: the highest of all decides who has the key."""
        self._time = max(self._time, claim // MAX_WORKERS)
        router = self._router
        best = max(self._others(key), key=_claim_of)
        mine = router.here(key)
        if mine is not None and self._claim_here(key) > best.claim:
            return
        self.elsewhere[key] = best
        if mine is not None:
            self.shadowed[key] = mine
            router.active.pop(key, None)

    def _gone_elsewhere(self, key: bytes) -> None:
        """One sibling less has the key."""
        router = self._router
        best = max(self._others(key), key=_claim_of, default=None)
        mine = router.here(key)
        if best is None and mine is None:
            del self.elsewhere[key]
            router.left_node(key)
            return
        if mine is not None and (best is None or self._claim_here(key) > best.claim):
            self.elsewhere.pop(key, None)
            self.shadowed.pop(key, None)
            router.active[key] = mine
        elif best is not None:
            self.elsewhere[key] = best
        if best is None:
            self.shared.discard(key)
            self._mark(key)

    def _others(self, key: bytes) -> list[Elsewhere]:
        return [sibling.clients[key] for sibling in self.siblings if key in sibling.clients]

    def _mark(self, key: bytes) -> None:
        sessions = self._router.sessions_of(key)
        for session in sessions:
            session.is_duplicate = len(sessions) > 1 or key in self.shared

    def _here(self) -> Iterable[tuple[bytes, Session]]:
        return [*self._router.active.items(), *self.shadowed.items()]

    def _tell(self, frame: bytes) -> None:
        for sibling in self.siblings:
            sibling.write(frame)


class Sibling:
    """The way to one other worker: bytes in by `receive`, bytes out by `write`.

    While the socket is full (`pause`, `resume`), at most `QUEUE_PACKETS` packets wait, the oldest goes first; what is
    no packet is written all the same.  `close` it once, when the connection is gone.
    """

    def __init__(self, router: Router, write: Callable[[bytes], object], synced: Callable[[], None]) -> None:
        self.write = write
        self.clients: dict[bytes, Elsewhere] = {}
        self._router = router
        self._counters = router.counters
        self._synced = synced
        self._paused = False
        self._queue: deque[tuple[bytes, int]] = deque()  # runs, and how many packets each has
        self._waiting = 0

    # -- out -----------------------------------------------------------------------------------------

    def pass_on(self, dst: bytes, chunk: bytes, count: int) -> None:
        """Send a run to `dst`, who is there."""
        size = _RUN_MORE + len(chunk)
        if size > MAX_FRAME:
            self._pass_on_halves(dst, chunk)
        elif not self._paused:
            self._counters.crossed_out += count
            self.write(_RUN.pack(_RUN_KIND, size, dst, count) + chunk)
        else:
            self._enqueue(_RUN.pack(_RUN_KIND, size, dst, count) + chunk, count)

    @property
    def queued(self) -> int:
        """Packets that wait."""
        return self._waiting

    def pause(self) -> None:
        """The socket is full."""
        self._paused = True

    def resume(self) -> None:
        """The socket has room."""
        self._paused = False
        self._counters.crossed_out += self._waiting
        waiting = b"".join(run for run, _ in self._queue)
        self._queue.clear()
        self._waiting = 0
        if waiting:
            self.write(waiting)

    def close(self) -> None:
        """The connection is gone, and with it what waited and the clients there."""
        while self._queue:
            self._drop_oldest(DropReason.GONE_DISCONNECTED)
        self._router.node.part(self)

    def _pass_on_halves(self, dst: bytes, chunk: bytes) -> None:
        singles = frames_of(chunk)
        middle = len(singles) // 2
        for half in (singles[:middle], singles[middle:]):
            self.pass_on(dst, b"".join(half), len(half))

    def _enqueue(self, run: bytes, count: int) -> None:
        while self._queue and self._waiting + count > QUEUE_PACKETS:
            self._drop_oldest(DropReason.QUEUE_HEAD)
        self._queue.append((run, count))
        self._waiting += count

    def _drop_oldest(self, reason: DropReason) -> None:
        run, count = self._queue.popleft()
        self._waiting -= count
        self._drop(run[_RUN.size :], reason)

    def _drop(self, chunk: bytes, reason: DropReason) -> None:
        for frame in frames_of(chunk):
            packet = frame[KEYED:]
            self._counters.drop(reason, frames.is_disco(packet), len(packet))

    # -- in ------------------------------------------------------------------------------------------

    def receive(self, buffer: bytearray, start: int, end: int, now: float) -> int:
        """Handle every whole frame in ``buffer[start:end]``; the offset of the first byte not used.

        Raises `ProtocolError`: the other end is of another version, or something else.
        """
        pos, view, node = start, memoryview(buffer), self._router.node
        while end - pos >= HEADER_LEN:
            kind, length = HEADER.unpack_from(buffer, pos)
            after = pos + HEADER_LEN + length
            if length > MAX_FRAME:
                raise ProtocolError(f"a frame of {length} bytes from a sibling")
            if after > end:
                break
            if kind == _RUN_KIND:
                _, _, dst, count = _RUN.unpack_from(buffer, pos)
                self._run(dst, bytes(view[pos + _RUN.size : after]), count, now)
            else:
                self._note(node, kind, bytes(view[pos + HEADER_LEN : after]))
            pos = after
        return pos

    def _run(self, dst: bytes, chunk: bytes, count: int, now: float) -> None:
        self._counters.crossed_in += count
        target = self._router.here(dst)
        if target is None:  # it has just left
            self._drop(chunk, DropReason.GONE_DISCONNECTED)
        else:
            target.deliver(chunk[HEADER_LEN:KEYED], chunk, count, now)

    def _note(self, node: Node, kind: int, body: bytes) -> None:
        if kind == _Kind.CLIENT:
            frame = body[8:]
            node.came(self, frame[HEADER_LEN : HEADER_LEN + KEY_LEN], int.from_bytes(body[:8], "big"), frame)
        elif kind == _Kind.ACTIVE:
            node.spoke_there(self, body[:KEY_LEN], int.from_bytes(body[KEY_LEN:], "big"))
        elif kind == _Kind.GONE:
            node.went(self, body)
        elif kind == _Kind.CLOSE:
            self._router.end_sessions(body)
        elif kind == _Kind.SYNCED:
            self._synced()
        else:
            raise ProtocolError(f"frame type {kind:#x} from a sibling")


def _client(claim: int, frame: bytes) -> bytes:
    return _CLIENT.pack(_Kind.CLIENT, 8 + len(frame), claim) + frame


def _claim_of(client: Elsewhere) -> int:
    return client.claim
