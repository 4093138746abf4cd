"""Clients that have stopped reading.

Stock derper gives each of its writes, of some 2 KiB, two seconds (derpserver, setWriteDeadline).  Here the loop's
transports take what the socket does not, so that nobody sees a write take long.  Instead the hub looks from time to
time: a client for which bytes wait has stalled when it has acknowledged too little of what the system has for it.

This costs no packet anything.  Of each link only the first write after a look is noted, see `Link.write`.
"""

from __future__ import annotations

import select
from collections.abc import Iterable
from itertools import islice
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from .link import Link

__all__ = ["Stalls"]

_LEAST: Final = 2 << 10  # bytes; who acknowledges so many within its time has not stalled
_AT_ONCE: Final = 500  # links to look at; it takes a microsecond each, and the loop waits


class Stalls:
    """Knows for how long each client has taken nothing of what waits for it."""

    def __init__(self) -> None:
        self._written: dict[Link, None] = {}  # who was written to and not looked at since, in order
        self._since: dict[Link, tuple[float, int]] = {}  # full link -> when it last took something, all it had then

    def note_write(self, link: Link) -> None:
        """The link was written to.  Until its `note_next_write` is called there is no need to say so again."""
        self._written[link] = None

    def forget(self, link: Link) -> None:
        """It is closed."""
        self._written.pop(link, None)
        self._since.pop(link, None)

    def look(self, paused: Iterable[Link], now: float) -> list[tuple[Link, float]]:
        """The links whose sockets are full, and for how many seconds each has taken nothing.

        `paused` are those of which the loop has said so.  Call it often within the shortest time-out: each call looks
        at a part of the links.
        """
        looked_at = {*islice(self._written, _AT_ONCE), *self._since}
        full = set(paused)
        full |= _full(looked_at - full)
        for link in looked_at:
            self._written.pop(link, None)
            if link not in full:
                link.note_next_write()
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
