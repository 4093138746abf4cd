"""Clients that connect anew, here or at another node of the region, and the packets that come for them meanwhile.

When a node drains or dies, its clients log in elsewhere within milliseconds, and the mesh tells where; when the DERP
map changes, all clients of the region connect anew.  Stock derper drops what comes in between; the senders' TCP repeats
it after 200 ms or more.  Here some packets wait instead, for a short time, and follow the client when it is found.

A client that leaves a node for good looks the same, so what waits for it is dropped a little later than otherwise.
"""

from __future__ import annotations

from collections import deque
from typing import Final, NamedTuple

from ..wire import frames
from .counters import Counters, DropReason
from .limits import QUEUE_DEPTH
from .runs import KEYED, frames_of

__all__ = ["PATIENCE", "Held", "Moves"]

PATIENCE: Final = 10  #: turns that a client may take to come back; the hub makes one each 0.1 s
_MOST_HELD: Final = 4096  # packets in all, some 6 MB


class Held(NamedTuple):
    """A packet that waits: a RECV_PACKET frame from `source`."""

    source: bytes
    frame: bytes


class Moves:
    """The keys that left less than `PATIENCE` turns ago.  Of packets for one key the oldest goes first."""

    def __init__(self, counters: Counters) -> None:
        self._counters = counters
        self._turn = 0
        self._left: dict[bytes, int] = {}  # key -> the turn in which it left, the first one first
        self._left_here: set[bytes] = set()  # those of them that were on this node
        self._waiting: dict[bytes, deque[Held]] = {}
        self.held = 0  #: packets that wait

    def __bool__(self) -> bool:
        """Whether anybody may still come back."""
        return bool(self._left)

    def left(self, key: bytes, *, here: bool = False) -> None:
        """No node has this client any more; `here`: this node had it."""
        self._forget(key)
        self._left[key] = self._turn
        if here:
            self._left_here.add(key)

    def expect(self, key: bytes) -> None:
        """This client may be about to come: another worker may have let it in a moment ago."""
        if self.held < _MOST_HELD:
            self._left.setdefault(key, self._turn)

    def hold(self, source: bytes, dst: bytes, run: bytes, *, forwarded: bool = False) -> bool:
        """Keep a run of RECV_PACKET frames for `dst`; false if it is not known to move, or there is no room.

        What was `forwarded` by another node waits for those who were here: its sender was right a moment ago.
        """
        if dst not in self._left or self.held >= _MOST_HELD or (forwarded and dst not in self._left_here):
            return False
        waiting = self._waiting.setdefault(dst, deque())
        for frame in frames_of(run):
            if len(waiting) >= QUEUE_DEPTH:
                self._drop(waiting.popleft())
            waiting.append(Held(source, frame))
            self.held += 1
        return True

    def found(self, key: bytes) -> list[Held]:
        """The client is somewhere again: what waited for it, to be sent there."""
        if not self._forget(key):
            return []
        packets = self._take(key)
        self._counters.moved += len(packets)
        return packets

    def turn(self) -> list[tuple[bytes, Held]]:
        """Time has passed.  The packets, and to whom, that need not wait any longer: their clients do not come back."""
        self._turn += 1
        late = []
        for key, since in self._left.items():
            if self._turn - since < PATIENCE:
                break
            late.append(key)
        for key in late:
            self._forget(key)
        return [(key, packet) for key in late for packet in self._take(key)]

    def _forget(self, key: bytes) -> bool:
        self._left_here.discard(key)
        return self._left.pop(key, None) is not None

    def _take(self, key: bytes) -> list[Held]:
        packets = list(self._waiting.pop(key, ()))
        self.held -= len(packets)
        return packets

    def _drop(self, oldest: Held) -> None:
        packet = oldest.frame[KEYED:]
        self.held -= 1
        self._counters.drop(DropReason.QUEUE_HEAD, frames.is_disco(packet), len(packet))
