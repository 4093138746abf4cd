"""A work queue by key: what is asked for twice is done once, and one key is never worked on twice at a time.

`Schedule` decides and does no I/O; `WorkQueue` runs what it says.  As in controller-runtime, with one difference: a
pass says itself when the next look at its key is due.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Hashable
from typing import Final, Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)

FIRST_DELAY: Final = 0.5
LAST_DELAY: Final = 60.0
JITTER: Final = 0.2

log = logging.getLogger(__name__)


class Schedule(Generic[Key]):
    """When to work on which key.  Times are seconds of any clock that the caller passes in; `random` gives 0 to 1."""

    def __init__(self, random: Callable[[], float]) -> None:
        self._random = random
        self._due: dict[Key, float] = {}
        self._running: dict[Key, float] = {}
        self._failures: dict[Key, int] = {}

    def add(self, key: Key, due: float) -> None:
        """Ask for work on `key` at `due`, or earlier if that was asked for."""
        self._due[key] = min(due, self._due.get(key, due))

    def take(self, now: float) -> Key | None:
        """The key that has been due for longest and is not being worked on; `done` or `failed` must follow."""
        ready = [(due, number) for number, (key, due) in enumerate(self._due.items()) if self._free(key, now)]
        if not ready:
            return None
        key = list(self._due)[min(ready)[1]]
        del self._due[key]
        self._running[key] = now
        return key

    def done(self, key: Key, now: float, again: float | None) -> None:
        """Work on `key` succeeded; it is due again after `again` seconds, more or less, if not None."""
        del self._running[key]
        self._failures.pop(key, None)
        if again is not None:
            self.add(key, now + self._spread(again))

    def failed(self, key: Key, now: float) -> float:
        """Work on `key` failed.  Returns the seconds until it is due again: twice as many after each failure."""
        del self._running[key]
        failures = self._failures[key] = self._failures.get(key, 0) + 1
        delay = self._spread(min(LAST_DELAY, FIRST_DELAY * 2.0 ** min(failures - 1, 16)))
        self.add(key, now + delay)
        return delay

    def next_due(self) -> float | None:
        """When `take` may give a key at the earliest, None if nothing waits."""
        return min((due for key, due in self._due.items() if key not in self._running), default=None)

    def depth(self, now: float) -> int:
        """How many keys are due and wait."""
        return sum(due <= now for due in self._due.values())

    def stuck(self, now: float) -> float:
        """For how many seconds the longest waiting or running key has been at it."""
        waiting = (now - due for key, due in self._due.items() if key not in self._running)
        return max(0.0, *waiting, *(now - since for since in self._running.values()), 0.0)

    def _free(self, key: Key, now: float) -> bool:
        return self._due[key] <= now and key not in self._running

    def _spread(self, delay: float) -> float:
        """Some randomness, so that many regions do not come due at once for ever."""
        return delay * (1 + JITTER * (2 * self._random() - 1))


class WorkQueue(Generic[Key]):
    """Runs `work(key)` for keys that are due, at most `workers` at a time.

    `work` returns the seconds until the next look (None: never, unless somebody adds the key) and may raise: the key
    is then repeated with growing delays.  `clock` is in seconds.
    """

    def __init__(
        self,
        work: Callable[[Key], Awaitable[float | None]],
        *,
        clock: Callable[[], float],
        random: Callable[[], float],
        workers: int = 4,
    ) -> None:
        self._work, self._clock, self._workers = work, clock, workers
        self._schedule: Schedule[Key] = Schedule(random)
        self._wake = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()

    def add(self, key: Key, delay: float = 0.0) -> None:
        """Ask for work on `key` now, or after some seconds, in which more may come together.  Never blocks."""
        self._schedule.add(key, self._clock() + delay)
        self._wake.set()

    def depth(self) -> int:
        return self._schedule.depth(self._clock())

    def stuck(self) -> float:
        """For how many seconds the longest waiting or running key has been at it; below a minute in good health."""
        return self._schedule.stuck(self._clock())

    async def run(self) -> None:
        """Work until cancelled.  What runs then is finished first: a pass takes a second or two."""
        try:
            while True:
                self._wake.clear()
                self._start_due()
                await self._until_next()
        finally:
            if self._tasks:
                await asyncio.wait(self._tasks)

    def _start_due(self) -> None:
        while len(self._tasks) < self._workers:
            key = self._schedule.take(self._clock())
            if key is None:
                return
            task = asyncio.create_task(self._do(key))
            self._tasks.add(task)
            task.add_done_callback(self._finished)

    def _finished(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        self._wake.set()

    async def _until_next(self) -> None:
        due = self._schedule.next_due() if len(self._tasks) < self._workers else None
        timeout = None if due is None else max(0.0, due - self._clock())
        try:
            async with asyncio.timeout(timeout):
                await self._wake.wait()
        except TimeoutError:
            pass

    async def _do(self, key: Key) -> None:
        try:
            again = await self._work(key)
        except Exception as error:  # whatever it was, the key is tried again
            delay = self._schedule.failed(key, self._clock())
            known = isinstance(error, OSError | TimeoutError) or hasattr(error, "reason")
            log.warning("%s: %s; next try in %.1f s", key, error or type(error).__name__, delay, exc_info=not known)
        else:
            self._schedule.done(key, self._clock(), again)
