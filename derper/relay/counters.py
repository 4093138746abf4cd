"""Plain integers that the relay counts; `derper.metrics` gives them their exported names."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Final

__all__ = ["Counters", "DropReason", "Histogram"]

_RUN_BOUNDS: Final = (*range(11), 15, 20, 25, 50, 100)
_QUEUE_DECAY: Final = 0.9  # derpserver, recordQueueTime


class DropReason(Enum):
    """Why a packet was dropped (derpserver.go, dropReason)."""

    UNKNOWN_DEST = "unknown_dest"
    UNKNOWN_DEST_ON_FWD = "unknown_dest_on_fwd"
    GONE_DISCONNECTED = "gone_disconnected"
    QUEUE_HEAD = "queue_head"
    QUEUE_TAIL = "queue_tail"
    WRITE_ERROR = "write_error"
    DUP_CLIENT = "dup_client"


@dataclass
class Histogram:
    """How often values of each size came (metrics.Histogram)."""

    bounds: Sequence[int]  #: the upper bounds of the buckets, sorted
    counts: list[int] = field(init=False)  #: one for each bucket, and one for what is greater
    sum: int = 0

    def __post_init__(self) -> None:
        self.counts = [0] * (len(self.bounds) + 1)

    def __reduce__(self) -> tuple[Callable[..., Histogram], tuple[object, ...]]:
        """Workers send it to each other; compiled, it has no other way."""
        return _histogram, (self.bounds, self.counts, self.sum)

    def observe(self, value: int, times: int = 1) -> None:
        """The value came, so many times."""
        self.counts[bisect_left(self.bounds, value)] += times
        self.sum += value * times

    @property
    def count(self) -> int:
        """All values."""
        return sum(self.counts)

    def cumulative(self) -> Iterator[tuple[str, int]]:
        """For each bound, the last one infinite, how many values were not greater."""
        total = 0
        for bound, count in zip((*map(str, self.bounds), "+Inf"), self.counts, strict=True):
            total += count
            yield bound, total


def _histogram(bounds: Sequence[int], counts: list[int], total: int) -> Histogram:
    found = Histogram(bounds, total)
    found.counts = counts
    return found


def _by_reason() -> dict[tuple[DropReason, bool], int]:
    return {(reason, disco): 0 for reason in DropReason for disco in (True, False)}


@dataclass
class Counters:
    """Everything counted since the start, and a few gauges; attribute names follow derpserver.go."""

    accepts: int = 0
    packets_received: int = 0
    packets_received_disco: int = 0
    bytes_received: int = 0
    packets_sent: int = 0
    bytes_sent: int = 0
    packets_forwarded_in: int = 0
    packets_forwarded_out: int = 0
    crossed_in: int = 0  #: packets from other workers of this node
    crossed_out: int = 0  #: packets to them
    moved: int = 0  #: packets that waited for a client on its way to another node, and followed it
    sent_back: int = 0  #: clients closed so that they go to their ideal node
    unknown_frames: int = 0
    protocol_errors: int = 0
    got_ping: int = 0
    sent_pong: int = 0
    peer_gone_disconnected_frames: int = 0
    peer_gone_not_here_frames: int = 0
    home_moves_in: int = 0
    home_moves_out: int = 0
    write_timeouts: int = 0
    rate_limit_waits: int = 0
    total_dup_client_conns: int = 0
    multiforwarder_created: int = 0
    multiforwarder_deleted: int = 0
    packet_forwarder_delete_other_value: int = 0
    current_connections: int = 0
    current_home_connections: int = 0
    current_notideal_connections: int = 0
    http_in_progress: Counter[str] = field(default_factory=Counter)  #: requests by TLS version
    http_requests: Counter[str] = field(default_factory=Counter)  #: the same, and the upgrades to DERP, since the start
    tcp_rtt: Counter[str] = field(default_factory=Counter)  #: samples of clients' round-trip times, by upper bound
    websocket_accepts: int = 0
    mesh_update_batch_size: Histogram = field(
        default_factory=lambda: Histogram((0, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000))
    )
    mesh_update_loop_count: Histogram = field(default_factory=lambda: Histogram((0, 1, 2, 5, 10, 20, 50, 100)))
    runs: Histogram = field(default_factory=lambda: Histogram(_RUN_BOUNDS))  #: frames of writes with more than one
    control_frames: int = 0  #: written, beside packets
    #: (reason, is disco) -> packets, and -> bytes
    packets_dropped: dict[tuple[DropReason, bool], int] = field(default_factory=_by_reason)
    bytes_dropped: dict[tuple[DropReason, bool], int] = field(default_factory=_by_reason)
    _average_queue_ms: float = 0.0
    _averaged: int = 0  # packets sent when it was computed

    def drop(self, reason: DropReason, disco: bool, size: int) -> None:
        """One packet of `size` bytes was dropped."""
        self.packets_dropped[reason, disco] += 1
        self.bytes_dropped[reason, disco] += size

    def queued(self, seconds: float, *, sent: bool) -> None:
        """A packet left a queue after so long, `sent` or dropped.  Call it before the packet is counted as sent."""
        self._average_queue_ms = _QUEUE_DECAY * self.average_queue_duration + (1 - _QUEUE_DECAY) * int(seconds * 1000)
        self._averaged = self.packets_sent + sent

    @property
    def average_queue_duration(self) -> float:
        """Milliseconds, a moving average over all packets.  Those that waited for nothing are counted here, late, so
        that their way costs nothing."""
        return self._average_queue_ms * _QUEUE_DECAY ** (self.packets_sent - self._averaged)

    def buffered_write_frames(self) -> Histogram:
        """How many frames were written at once.  Single ones are all the others, so that their way costs nothing."""
        found = Histogram(_RUN_BOUNDS)
        found.counts[:] = self.runs.counts
        found.sum = self.runs.sum
        found.observe(1, times=self.packets_sent + self.control_frames - self.runs.sum)
        return found
