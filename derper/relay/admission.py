"""Who may use the relay.

A client proves its key in the login; admission decides whether that key is welcome.  Any of the sources
may admit it: a list of keys, or URLs that answer ``tailcfg.DERPAdmitClientRequest`` (Headscale's
``/verify``).  A source that cannot answer admits nobody, unless the policy says to fail open.

Here is only the policy and its memory; `derper.net.admission` asks the URLs.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from dataclasses import dataclass
from typing import Final

from ..wire.keys import KeyFormatError, NodePublic

__all__ = ["AdmissionPolicy", "DecisionCache", "KeyListError", "parse_key_list"]

_COMMENT: Final = re.compile(r"#.*")


class KeyListError(ValueError):
    """A key list is malformed; the message says which line."""


@dataclass(frozen=True, slots=True)
class AdmissionPolicy:
    """Who is admitted.  With neither `is_open` nor a source, nobody is: an empty policy fails closed."""

    is_open: bool = False
    urls: tuple[str, ...] = ()
    keys: frozenset[bytes] = frozenset()
    fail_open: bool = False  #: admit clients while no URL can be asked

    def admits_at_once(self, key: bytes) -> bool:
        """Whether no URL needs to be asked."""
        return self.is_open or key in self.keys


class DecisionCache:
    """Remembers what the URLs said, so that a short outage of theirs disconnects nobody.

    A positive answer is used without asking for `fresh` seconds, and for `stale` seconds where nobody answers.
    """

    def __init__(self, fresh: float = 30.0, stale: float = 3600.0, size: int = 100_000) -> None:
        self._fresh = fresh
        self._stale = stale
        self._size = size
        self._admitted: OrderedDict[bytes, float] = OrderedDict()

    def fresh(self, key: bytes, now: float) -> bool:
        """Whether the key was admitted a moment ago."""
        stamp = self._admitted.get(key)
        return stamp is not None and now - stamp < self._fresh

    def stale(self, key: bytes, now: float) -> bool:
        """Whether the key was admitted recently enough to stand in for a source that does not answer."""
        stamp = self._admitted.get(key)
        return stamp is not None and now - stamp < self._stale

    def admit(self, key: bytes, now: float) -> None:
        """A source admitted the key."""
        self._admitted[key] = now
        self._admitted.move_to_end(key)
        if len(self._admitted) > self._size:
            self._admitted.popitem(last=False)

    def refuse(self, key: bytes) -> None:
        """Every source refused the key."""
        self._admitted.pop(key, None)


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
