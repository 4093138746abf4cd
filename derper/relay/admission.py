"""Who may use the relay.

A client proves its key in the login; admission decides whether that key is welcome: one that is on a list is; any
other must be known to the local tailscaled, if the policy names one, *and* allowed by one of the admission
controllers, if the policy names any (derpserver.verifyClient).  A source that cannot answer admits nobody, unless it
admitted the same key a while ago, or the policy says to fail open.

Here is only the policy and its memory; `derper.net.admission` asks.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from dataclasses import dataclass
from typing import Final

from ..wire.keys import KeyFormatError, NodePublic

__all__ = ["AdmissionPolicy", "CacheTimes", "DecisionCache", "KeyListError", "NoAnswerError", "parse_key_list"]

_COMMENT: Final = re.compile(r"#.*")


class KeyListError(ValueError):
    """A key list is malformed; the message says which line."""


class NoAnswerError(Exception):
    """A source gave no decision; the message says why.

    `reached`: it answered, but not with a decision.  `late`: the time was over.
    """

    def __init__(self, message: str, *, reached: bool = False, late: bool = False) -> None:
        super().__init__(message)
        self.reached = reached
        self.late = late


@dataclass(frozen=True, slots=True)
class CacheTimes:
    """For how many seconds a source's yes is used without asking again, and while the source does not answer."""

    fresh: float = 30.0
    stale: float = 3600.0


@dataclass(frozen=True, slots=True)
class AdmissionPolicy:
    """Who is admitted.  With neither `is_open` nor a source, nobody is: an empty policy fails closed."""

    is_open: bool = False
    urls: tuple[str, ...] = ()  #: admission controllers (tailcfg.DERPAdmitClientRequest); one must allow the client
    keys: frozenset[bytes] | None = None  #: who is admitted without a question; None: there is no list
    tailscaled: str = ""  #: socket of a tailscaled that must know the client; empty: none is asked
    fail_open: bool = False  #: admit clients while no controller can be asked
    cache: CacheTimes = CacheTimes()

    def admits_at_once(self, key: bytes) -> bool:
        """Whether nobody needs to be asked."""
        return self.is_open or (self.keys is not None and key in self.keys)

    @property
    def asks(self) -> bool:
        """Whether there is anybody to ask."""
        return bool(self.urls or self.tailscaled)


class DecisionCache:
    """Remembers whom each source admitted, so that a short outage of it costs no client its relay.

    A source's later no ends what it said before; what others say does not.
    """

    def __init__(self, times: CacheTimes = CacheTimes(), size: int = 100_000) -> None:
        self.times = times
        self._size = size
        self._admitted: OrderedDict[tuple[str, bytes], float] = OrderedDict()

    def fresh(self, source: str, key: bytes, now: float) -> bool:
        """Whether the source admitted the key a moment ago."""
        stamp = self._admitted.get((source, key))
        return stamp is not None and now - stamp < self.times.fresh

    def stale(self, source: str, key: bytes, now: float) -> bool:
        """Whether the source admitted the key recently enough for that to stand in for an answer."""
        stamp = self._admitted.get((source, key))
        return stamp is not None and now - stamp < self.times.stale

    def admit(self, source: str, key: bytes, now: float) -> None:
        """The source admitted the key."""
        self._admitted[source, key] = now
        self._admitted.move_to_end((source, key))
        if len(self._admitted) > self._size:
            self._admitted.popitem(last=False)

    def refuse(self, source: str, key: bytes) -> None:
        """The source refused the key."""
        self._admitted.pop((source, key), None)


def parse_key_list(text: str) -> frozenset[bytes]:
    """Keys, one ``nodekey:<64 hex>`` per line; ``#`` starts a comment.  Raises `KeyListError`."""
    keys = set()
    for number, line in enumerate(text.splitlines(), 1):
        entry = _COMMENT.sub("", line).strip()
        if not entry:
            continue
        try:
            keys.add(bytes(NodePublic.parse(entry)))
        except KeyFormatError as error:
            raise KeyListError(f"line {number}: {error}") from None
    return frozenset(keys)
