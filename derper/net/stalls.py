"""Clients that have stopped reading.

Stock derper gives each of its writes, of some 2 KiB, two seconds (derpserver, setWriteDeadline).  Here the loop's
transports take what the socket does not, so that nobody sees a write take long.  Instead the hub looks from time to
time: a client for which bytes wait has stalled when it has acknowledged too little of what the system has for it.

This costs no packet anything.  Of each link only the first write after a look is noted, see `Link.write`.
"""

from __future__ import annotations

import select
from collections.abc import Iterable
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from .link import Link

__all__ = ["Stalls"]

_LEAST: Final = 2 << 10  # bytes; who acknowledges so many within its time has not stalled


class Stalls:
    """Knows for how long each client has taken nothing of what waits for it."""

    def __init__(self) -> None:
        self.written: set[Link] = set()  #: links that were written to since they were last found empty
        self._since: dict[Link, tuple[float, int]] = {}  # link -> when it last took something, all it had taken then

    def forget(self, link: Link) -> None:
        """It is closed."""
        self.written.discard(link)
        self._since.pop(link, None)

    def look(self, paused: Iterable[Link], now: float) -> list[tuple[Link, float]]:
        """The links whose sockets are full, and for how many seconds each has taken nothing.

        `paused` are those of which the loop has said so.  Call it several times within the shortest time-out.
        """
        full = set(paused)
        full |= _full(self.written - full)
        for link in self.written - full:
            link.note_next_write()
        self.written &= full
        self._since = {link: self._taken(link, now) for link in full}
        return [(link, now - since) for link, (since, _) in self._since.items()]

    def _taken(self, link: Link, now: float) -> tuple[float, int]:
        acknowledged = link.acknowledged
        known = self._since.get(link)
        if known is None:
            return link.paused_since or now, acknowledged
        return known if acknowledged - known[1] < _LEAST else (now, acknowledged)


def _full(links: Iterable[Link]) -> set[Link]:
    """Those whose TCP socket takes nothing now."""
    descriptors = {descriptor: link for link in links if (descriptor := link.tcp_descriptor) is not None}
    poll = select.poll()
    for descriptor in descriptors:
        poll.register(descriptor, select.POLLOUT)
    for descriptor, _ in poll.poll(0):
        del descriptors[descriptor]
    return set(descriptors.values())
