"""The work queue: one worker per key, everything asked for is done, failures slow down."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest
from derp_operator.queue import FIRST_DELAY, JITTER, LAST_DELAY, Schedule, WorkQueue
from hypothesis import given
from hypothesis import strategies as st


def schedule(random: Callable[[], float] = lambda: 0.5) -> Schedule[str]:
    return Schedule(random)


def test_what_is_asked_for_twice_is_done_once() -> None:
    queue = schedule()
    queue.add("a", 0)
    queue.add("a", 0)
    assert queue.take(0) == "a"
    queue.done("a", 0, None)
    assert queue.take(100) is None


def test_what_is_asked_for_while_it_runs_is_done_again_after() -> None:
    queue = schedule()
    queue.add("a", 0)
    assert queue.take(0) == "a"
    queue.add("a", 1)
    assert queue.take(1) is None
    assert queue.next_due() is None
    queue.done("a", 2, None)
    assert queue.take(2) == "a"


def test_an_event_brings_a_later_look_forward() -> None:
    queue = schedule()
    queue.add("a", 60)
    assert queue.take(1) is None
    queue.add("a", 1)
    queue.add("a", 60)
    assert queue.take(1) == "a"


def test_the_longest_due_comes_first() -> None:
    queue = schedule()
    for key, due in (("a", 3), ("b", 1), ("c", 2)):
        queue.add(key, due)
    assert [queue.take(5) for _ in range(3)] == ["b", "c", "a"]


def test_failures_double_the_delay_up_to_a_limit_and_success_resets_it() -> None:
    queue, now, delays = schedule(), 0.0, []
    queue.add("a", now)
    for _ in range(12):
        assert queue.take(now) == "a"
        delays.append(queue.failed("a", now))
        now += delays[-1]
    assert delays[:4] == [FIRST_DELAY, 2 * FIRST_DELAY, 4 * FIRST_DELAY, 8 * FIRST_DELAY]
    assert delays[-1] == LAST_DELAY
    assert queue.take(now) == "a"
    queue.done("a", now, 0)
    assert queue.take(now) == "a"
    assert queue.failed("a", now) == FIRST_DELAY


@pytest.mark.parametrize("chance", [0.0, 0.25, 1.0])
def test_looks_are_spread(chance: float) -> None:
    queue = schedule(lambda: chance)
    queue.add("a", 0)
    queue.take(0)
    queue.done("a", 0, 100)
    assert queue.next_due() == pytest.approx(100 * (1 + JITTER * (2 * chance - 1)))


def test_stuck_and_depth_tell_what_waits_and_runs() -> None:
    queue = schedule()
    queue.add("a", 10)
    queue.add("b", 10)
    assert (queue.depth(5), queue.stuck(5)) == (0, 0)
    assert (queue.depth(15), queue.stuck(15)) == (2, 5)
    queue.take(15)
    assert (queue.depth(40), queue.stuck(40)) == (1, 30)


@given(st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from(["add", "take", "done", "fail"]))))
def test_no_key_runs_twice_at_a_time_and_none_is_forgotten(steps: list[tuple[str, str]]) -> None:
    queue, running, wanted, now = schedule(), set[str](), set[str](), 0.0
    for key, step in steps:
        now += 1000
        if step == "add":
            queue.add(key, now)
            wanted.add(key)
        elif step == "take":
            taken = queue.take(now)
            free = wanted - running
            assert (taken in free) if free else taken is None
            if taken:
                running.add(taken)
                wanted.discard(taken)
        elif key in running:
            running.discard(key)
            if step == "done":
                queue.done(key, now, None)
            else:
                queue.failed(key, now)
                wanted.add(key)


class Work:
    """Passes that end when the test says so."""

    def __init__(self) -> None:
        self.started: list[str] = []
        self.running: set[str] = set()
        self.peak = 0
        self.gates: dict[str, asyncio.Event] = {}
        self._came = asyncio.Event()

    async def __call__(self, key: str) -> float | None:
        assert key not in self.running
        self.running.add(key)
        self.started.append(key)
        self.peak = max(self.peak, len(self.running))
        self._came.set()
        try:
            await self.gates.setdefault(key, asyncio.Event()).wait()
        finally:
            self.running.discard(key)
        return None

    async def until(self, count: int) -> None:
        async with asyncio.timeout(30):
            while len(self.started) < count:
                self._came.clear()
                await self._came.wait()


async def test_the_queue_bounds_its_workers_and_finishes_what_runs() -> None:
    work = Work()
    queue: WorkQueue[str] = WorkQueue(work, clock=lambda: 0.0, random=lambda: 0.5, workers=2)
    task = asyncio.create_task(queue.run())
    for key in "abcd":
        queue.add(key)
    await work.until(2)
    assert work.running == {"a", "b"}
    queue.add("a")
    work.gates["b"].set()
    await work.until(3)
    assert (work.started, work.peak) == (["a", "b", "c"], 2)
    task.cancel()
    for _ in range(5):
        await asyncio.sleep(0)
    assert not task.done(), "it waits for what runs"
    for key in "ac":
        work.gates[key].set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not work.running
    assert work.started == ["a", "b", "c"]


def test_what_may_wait_is_done_once_when_its_time_has_come() -> None:
    now = 0.0
    queue: WorkQueue[str] = WorkQueue(Work(), clock=lambda: now, random=lambda: 0.5)
    queue.add("a", 1.0)
    now = 0.9
    queue.add("a", 1.0)
    assert queue.depth() == 0
    now = 1.0
    assert queue.depth() == 1, "more of the same does not put it off"


async def test_a_failing_pass_is_repeated_and_others_go_on() -> None:
    came: list[str] = []
    healed = asyncio.Event()

    async def work(key: str) -> None:
        came.append(key)
        if key == "bad":
            if came.count("bad") == 1:
                raise RuntimeError("broken")
            healed.set()

    queue: WorkQueue[str] = WorkQueue(work, clock=asyncio.get_running_loop().time, random=lambda: 0.5)
    task = asyncio.create_task(queue.run())
    queue.add("bad")
    queue.add("good")
    async with asyncio.timeout(30):
        await healed.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert came == ["bad", "good", "bad"]
