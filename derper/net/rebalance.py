"""Sends clients back to the node that they would rather be on, slowly.

A client takes the first node of its region that it can reach.  When that one was away, it sits on another one, says so
(``Ideal-Node``), and stays as long as the connection lasts; then its packets take a hop more than they need to.
Closing the connection makes it dial again, from the first node on.  ``derper prune`` does this once, by hand.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Final

from ..relay.limits import TokenBucket
from .hub import Hub
from .link import Link
from .mesh import Mesh

__all__ = ["Rebalance", "Rebalancing"]

_STEADY: Final = timedelta(seconds=60)  # for how long the other node must have been there
_ONCE_IN: Final = 3600.0  # seconds: who comes back cannot reach the other node, so it is left alone for so long


@dataclass(frozen=True, slots=True)
class Rebalancing:
    """How many clients to send back in a minute, 0 for none, and which mesh peer each node of the map is."""

    clients_per_minute: float = 0.0
    peers: Mapping[str, str] = field(default_factory=dict)


class Rebalance:
    """Call `look` about once a second.  `options` may be replaced at any time."""

    def __init__(self, hub: Hub, mesh: Mesh, rng: random.Random) -> None:
        self._hub = hub
        self._mesh = mesh
        self._rng = rng
        self._options = Rebalancing()
        self._bucket: TokenBucket | None = None
        self._sent: dict[bytes, float] = {}  # key -> when it was sent away, the first one first

    @property
    def options(self) -> Rebalancing:
        return self._options

    @options.setter
    def options(self, options: Rebalancing) -> None:
        if options.clients_per_minute != self._options.clients_per_minute:
            rate = options.clients_per_minute / 60
            self._bucket = TokenBucket(rate, max(rate, 1.0), self._hub.clock()) if rate else None
        self._options = options

    def look(self, now: datetime) -> None:
        """Close as many connections as it is time for."""
        hub = self._hub
        if self._bucket is None or not hub.counters.current_notideal_connections or hub.draining:
            return
        self._forget()
        strays = self._strays(now)
        self._rng.shuffle(strays)
        while strays and self._bucket.allow(hub.clock()):
            self._send_back(strays.pop())

    def _strays(self, now: datetime) -> list[Link]:
        status = self._mesh.status()
        back = {
            node
            for node, peer in self._options.peers.items()
            if (link := status.get(peer)) is not None and link.since is not None and now - link.since >= _STEADY
        }
        links = self._hub.links if back else ()
        return [
            link for link in links if link.ideal_node in back and link.session and link.session.key not in self._sent
        ]

    def _send_back(self, link: Link) -> None:
        assert link.session is not None
        key = link.session.key
        self._sent[key] = self._hub.clock()
        self._hub.counters.sent_back += 1
        link.close()

    def _forget(self) -> None:
        now = self._hub.clock()
        while self._sent and now - next(iter(self._sent.values())) > _ONCE_IN:
            del self._sent[next(iter(self._sent))]
