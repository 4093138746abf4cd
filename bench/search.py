"""Finding the highest rate that a relay carries, on a lattice of rates."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")

FAR = 8
"""The longest step up or down the lattice, once the direction is clear."""


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

    def index(self, rate: float) -> int:
        """The index whose rate is next to this one."""
        return round(math.log(rate / self.base, self.step))


@dataclass(frozen=True)
class Found(Generic[T]):
    """The highest index that passed with its result, and what the next one above gave; None where there is none.

    `edge` is the lowest hopeless index: the best start for the same search another time.
    """

    edge: int
    best: int | None
    passed: T | None
    failed: T | None


class Search(Generic[T]):
    """How results are judged: `passes` is the aim, `hopeless` is so far from it that no higher rate is worth trying.

    Between the two lies a band in which a relay loses a little at one rate and nothing at a higher one. So the search
    goes up, in long steps, then by halves, to the lowest hopeless rate, and from there down, two by two, to the first
    rate that passes. A rate has `tries` attempts, since a disturbance from outside can only make a result worse.
    """

    def __init__(
        self, attempt: Callable[[int], T], passes: Callable[[T], bool], hopeless: Callable[[T], bool], tries: int = 2
    ) -> None:
        self._attempt = attempt
        self._passes = passes
        self._hopeless = hopeless
        self._tries = tries
        self._results: dict[int, list[T]] = {}

    def highest(self, top: int, start: int) -> Found[T]:
        """The highest of 0 .. top that passes; `start` is a guess at the lowest that is hopeless."""
        edge = self._lowest_hopeless(top, start)
        for even in [*range(edge, 0, -2), 0]:
            if self._passing(even) is None:
                continue
            k = even + 1 if even < edge and self._passing(even + 1) is not None else even
            return Found(edge, k, self._passing(k), self._last(k + 1))
        return Found(edge, None, None, self._last(0))

    def _lowest_hopeless(self, top: int, start: int) -> int:
        """The lowest index that was hopeless twice, or `top` if there is none."""
        low, high, stride = -1, top + 1, 1
        k = min(max(start, 0), top)
        while high - low > 1:
            if self._hopeless(self._measure(k)) and self._hopeless(self._measure(k)):
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

    def _passing(self, k: int) -> T | None:
        for result in self._results.get(k, ()):
            if self._passes(result):
                return result
        while len(self._results.get(k, ())) < self._tries:
            result = self._measure(k)
            if self._passes(result):
                return result
        return None

    def _measure(self, k: int) -> T:
        result = self._attempt(k)
        self._results.setdefault(k, []).append(result)
        return result

    def _last(self, k: int) -> T | None:
        return self._results[k][-1] if k in self._results else None
