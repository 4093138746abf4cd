"""Finding the highest rate that a relay carries: steps on a lattice of rates, first far, then near."""

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
    """The highest index that passed with its result, and the lowest that failed; None where there is none."""

    best: int | None
    passed: T | None
    failed: T | None


def highest(top: int, start: int, attempt: Callable[[int], T], passes: Callable[[T], bool], tries: int = 3) -> Found[T]:
    """Searches 0 .. top for the highest index whose attempt passes, assuming that below a passing one all pass.

    `start` is a guess. Each index gets `tries` attempts before it counts as failed: a disturbance from outside can only
    make a result worse, so one success is proof enough.
    """
    results: dict[int, T] = {}

    def ok(k: int) -> bool:
        for _ in range(tries):
            results[k] = attempt(k)
            if passes(results[k]):
                return True
        return False

    low, high, stride = -1, top + 1, 1
    k = min(max(start, 0), top)
    while low < 0 or high > top:
        if ok(k):
            low = k
        else:
            high = k
        if low == top or high == 0:
            break
        k = min(low + stride, top) if high > top else max(high - stride, 0)
        stride = min(stride * 2, FAR)
    while high - low > 1:
        middle = (low + high) // 2
        if ok(middle):
            low = middle
        else:
            high = middle
    best = low if low >= 0 else None
    return Found(best, results.get(low), results.get(high))
