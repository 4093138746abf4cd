"""Plain integers that the relay counts; `derper.metrics` gives them their exported names."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

__all__ = ["Counters", "DropReason"]


class DropReason(Enum):
    """Why a packet was dropped (derpserver.go, dropReason)."""

    UNKNOWN_DEST = "unknown_dest"
    UNKNOWN_DEST_ON_FWD = "unknown_dest_on_fwd"
    GONE_DISCONNECTED = "gone_disconnected"
    QUEUE_HEAD = "queue_head"
    QUEUE_TAIL = "queue_tail"
    WRITE_ERROR = "write_error"
    DUP_CLIENT = "dup_client"


def _by_reason() -> dict[tuple[DropReason, bool], int]:
    return {(reason, disco): 0 for reason in DropReason for disco in (True, False)}


@dataclass(slots=True)
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
    average_queue_duration: float = 0.0  #: milliseconds, moving average over packets that had to queue
    #: (reason, is disco) -> packets, and -> bytes
    packets_dropped: dict[tuple[DropReason, bool], int] = field(default_factory=_by_reason)
    bytes_dropped: dict[tuple[DropReason, bool], int] = field(default_factory=_by_reason)

    def drop(self, reason: DropReason, disco: bool, size: int) -> None:
        """One packet of `size` bytes was dropped."""
        self.packets_dropped[reason, disco] += 1
        self.bytes_dropped[reason, disco] += size

    def queued(self, seconds: float) -> None:
        """A packet left a queue after so long."""
        self.average_queue_duration += 0.1 * (seconds * 1000 - self.average_queue_duration)
