"""Samples of the clients' TCP round-trip times, one of each client every ten seconds (derpserver_linux.go)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from ..relay.counters import Counters
from .turns import Turns

if TYPE_CHECKING:
    from .link import Link

__all__ = ["RoundTrips"]

_INTERVAL: Final = 10.0  # seconds
_AT_ONCE: Final = 100
_SHARE: Final = 8  # of all clients at once: more than a tenth, so that the interval is kept
_BOUNDS: Final = {
    0.010: "10ms",
    0.020: "20ms",
    0.050: "50ms",
    0.100: "100ms",
    0.150: "150ms",
    0.250: "250ms",
    0.5: "500ms",
}


class RoundTrips:
    """Counts into `Counters.tcp_rtt`.  `enabled` may be set to false at the start."""

    def __init__(self, counters: Counters) -> None:
        self.enabled = True
        self._counters = counters
        self._turns: Turns[Link] = Turns(_INTERVAL)

    def follow(self, link: Link, now: float) -> None:
        """A client logged in."""
        if not self.enabled:
            return
        if link.is_websocket or link.tcp_descriptor is None:  # as stock derper, which does not look through a WebSocket
            self._counters.tcp_rtt["non-tcp"] += 1
        else:
            self._turns.add(link, now)

    @property
    def followed(self) -> int:
        """How many clients are measured."""
        return len(self._turns)

    def forget(self, link: Link) -> None:
        """It is closed."""
        self._turns.remove(link)

    def sample(self, now: float) -> None:
        """Measure those whose turn it is.  Call it every second.

        Clients that came all at once are spread over the interval, so that no packet waits for all of them.
        """
        for link in self._turns.due(now, max(_AT_ONCE, len(self._turns) // _SHARE)):
            info = link.tcp_info()
            if info is None:
                self._turns.remove(link)
            else:
                self._counters.tcp_rtt[_label(info.round_trip)] += 1


def _label(seconds: float) -> str:
    return next((label for bound, label in _BOUNDS.items() if seconds <= bound), "inf")
