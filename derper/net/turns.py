"""Things that come up again and again, each once in the same time, such as keep-alives."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import Generic, TypeVar

__all__ = ["Turns"]

_T = TypeVar("_T")


class Turns(Generic[_T]):
    """Each item's turn comes `interval` after it was added, or had its last turn.

    Time is any number that never goes back.  It costs an item 50 bytes or so.
    """

    __slots__ = ("_interval", "_since")

    def __init__(self, interval: float) -> None:
        self._interval = interval
        self._since: dict[_T, float] = {}  # item -> its last turn; who waits longest is in front

    def __len__(self) -> int:
        return len(self._since)

    def add(self, item: _T, now: float) -> None:
        """It was not there before."""
        self._since[item] = now

    def remove(self, item: _T) -> None:
        """Its turn comes no more; nothing if it is not there."""
        self._since.pop(item, None)

    def due(self, now: float, most: int | None = None) -> Sequence[_T]:
        """Those whose turn it is, the first ones first and at most so many; they begin to wait again."""
        found: list[_T] = []
        for item, since in islice(self._since.items(), most):
            if now - since < self._interval:
                break
            found.append(item)
        for item in found:
            del self._since[item]
            self._since[item] = now
        return found
