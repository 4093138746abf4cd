"""Finding the highest rate that a relay carries, on a lattice of rates."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")

FAR = 8


@dataclass(frozen=True)
class Lattice:
    """Rates `base * step ** k` for k = 0 .. top, the same for every relay, so that equal relays get equal answers."""

    base: float
    step: float
    limit: float

    @property
    def top(self) -> int:
        """The index of the highest rate."""
        return int(math.log(self.limit / self.base, self.step))

    def rate(self, k: int) -> float:
        """Packets per second at index k."""
        return self.base * self.step**k


@dataclass(frozen=True)
class Found(Generic[T]):
    """The highest index that passed with its result, and what the next one above gave; None where there is none."""

    best: int | None
    passed: T | None
    failed: T | None


@dataclass(frozen=True)
class Search(Generic[T]):
    """How results are judged: `passes` is the aim, `hopeless` is so far from it that no higher rate is worth trying.

    Between the two lies a band in which a relay loses a little at one rate and nothing at a higher one. So the search
    goes up, in long steps and then by halves, to the lowest hopeless rate, and from there down, step by step, to the
    first rate that passes. A rate has `tries` attempts, since a disturbance from outside can only make a result worse.
    """

    attempt: Callable[[int], T]
    passes: Callable[[T], bool]
    hopeless: Callable[[T], bool]
    tries: int = 3

    def highest(self, top: int, start: int) -> Found[T]:
        """The highest of 0 .. top that passes; `start` is a guess at it."""
        above = None
        for k in range(self._lowest_hopeless(top, start), -1, -1):
            for _ in range(self.tries):
                result = self.attempt(k)
                if self.passes(result):
                    return Found(k, result, above)
                if self.hopeless(result):
                    break
            above = result
        return Found(None, None, above)

    def _lowest_hopeless(self, top: int, start: int) -> int:
        """The lowest hopeless index, or `top` if there is none."""
        low, high, stride = -1, top + 1, 1
        k = min(max(start, 0), top)
        while high - low > 1:
            if self._all_hopeless(k):
                high = k
            else:
                low = k
            if low < 0:
                k = max(high - stride, 0)
            elif high > top:
                k = min(low + stride, top)
            else:
                k = (low + high) // 2
            stride = min(stride * 2, FAR)
        return min(high, top)

    def _all_hopeless(self, k: int) -> bool:
        return all(self.hopeless(self.attempt(k)) for _ in range(2))
