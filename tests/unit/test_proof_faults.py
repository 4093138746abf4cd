"""The reconciler's proof, second part: crashes, failing requests, lost events, stale reads, two operators at once."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Iterator, Mapping
from datetime import timedelta
from typing import Any, Final

import pytest
from derp_operator import names
from derp_operator.kube import ApiError, Object
from hypothesis import given
from hypothesis import strategies as st

from . import fakeapi
from .fakeworld import SPACE, Tap, World
from .proof import TIMES, Fingerprint, examples, fingerprint, quick_yaml, same, wrongs
from .specs import BASE, Spec, specs

__all__ = ["quick_yaml"]

SCALED: Final[Spec] = {**BASE, "replicas": 5}
OTHER: Final[Spec] = {**BASE, "image": "derper:2", "regionName": "Elsewhere", "exposure": {"type": "NodePort"}}
HOST_PORT: Final[Spec] = {**BASE, "exposure": {"type": "HostPort"}, "tls": {"hostName": "Address"}}
WALKS: Final = {
    "start": (BASE,),
    "more": (BASE, SCALED),
    "fewer": (SCALED, BASE),
    "other": (BASE, OTHER),
    "ports": (OTHER, HOST_PORT),
    "back": (HOST_PORT, OTHER),
}
CRASHED: Final = ("start", "fewer", "ports") if TIMES == 1 else tuple(WALKS)
MINUTE: Final = timedelta(minutes=1)
FAULTS: Final = (409, 429, 500, 0)
"""HTTP statuses of a request that fails once; 0: no answer in time."""


class Fault(Tap):
    """Request `number` fails with `status`; `late`: after it was carried out.  Without `reads` only writes count."""

    def __init__(
        self, place: World, number: int, status: int = 500, *, late: bool = False, reads: bool = False
    ) -> None:
        super().__init__(place.api, place.writes)
        self._number, self._status, self._late, self._reads = number, status, late, reads
        self.count = 0
        self.failed = ""

    async def request(self, verb: str, kind: str, name: str) -> None:
        if self._reads or verb not in ("get", "list"):
            self.count += 1
            if self.count == self._number and not self._late:
                self._fail(f"{verb} {kind} {name}")

    async def answered(self, verb: str, kind: str, name: str) -> None:
        if (
            self.count == self._number
            and self._late
            and not self.failed
            and (self._reads or verb not in ("get", "list"))
        ):
            self._fail(f"{verb} {kind} {name}")

    def _fail(self, what: str) -> None:
        self.failed = what
        raise ApiError(self._status, "Injected", f"an injected fault at {what}")


async def before(walk: tuple[Spec, ...]) -> World:
    """A world in which all but the last step of a walk has settled, and the last one is wanted."""
    place = World()
    for spec in walk[:-1]:
        await place.want(spec)
        await place.settle()
    await place.want(walk[-1])
    return place


async def calm(place: World, *, reads: bool) -> tuple[Fingerprint, int]:
    """What undisturbed work comes to, and how many writes or requests it takes."""
    quiet = place.fork()
    tap = Fault(quiet, 0, reads=reads)
    await quiet.settle(tap)
    return fingerprint(quiet), tap.count


@pytest.mark.parametrize("late", [False, True], ids=["refused", "lost"])
@pytest.mark.parametrize("walk", [WALKS[name] for name in CRASHED], ids=CRASHED)
async def test_the_operator_may_end_at_any_write(walk: tuple[Spec, ...], late: bool) -> None:
    start = await before(walk)
    wanted, writes = await calm(start, reads=False)
    for number in range(1, writes + 1):
        place = start.fork()
        fault = Fault(place, number, 0, late=late)
        await place.settle(fault)
        assert fault.failed
        assert same(wanted, fingerprint(place)) == "", f"after a fault at write {number}, {fault.failed}"
        assert [*wrongs(place)] == [], f"after a fault at write {number}, {fault.failed}"


@given(
    walk=st.lists(specs(), min_size=1, max_size=2).map(tuple),
    status=st.sampled_from(FAULTS),
    late=st.booleans(),
    at=st.floats(0, 1, exclude_max=True),
)
@examples(8)
async def test_any_request_may_fail_once(walk: tuple[Spec, ...], status: int, late: bool, at: float) -> None:
    place = await before(walk)
    wanted, requests = await calm(place, reads=True)
    await place.settle(Fault(place, 1 + int(at * requests), status, late=late, reads=True))
    assert same(wanted, fingerprint(place)) == ""
    assert [*wrongs(place)] == []


class Replaced(Tap):
    """Somebody makes a Service anew right before it is written."""

    async def request(self, verb: str, kind: str, name: str) -> None:
        key = (kind, SPACE, name)
        if (verb, kind, name) == ("apply", "Service", "berlin-0") and key in self.api.store:
            old = self.api.store[key]
            self.api.remove(key)
            meta = {part: old["metadata"][part] for part in ("name", "namespace", "labels", "ownerReferences")}
            await self.api.create({**old, "metadata": meta}, "somebody")


async def test_an_object_that_was_replaced_meanwhile_is_no_refusal() -> None:
    place = await before((BASE, OTHER))
    with pytest.raises(ApiError):
        await place.reconcile(Replaced(place.api, place.writes))
    await place.settle()
    assert (await place.ready())["status"] == "True"


STEPS: Final = st.sampled_from(["pass", "pass", "play", "wait"])


@given(first=specs(), second=specs(), steps=st.lists(STEPS, max_size=30), change=st.integers(0, 30))
@examples(8)
async def test_events_may_be_lost_doubled_and_reordered(
    first: Spec, second: Spec, steps: list[str], change: int
) -> None:
    fresh = World()
    await fresh.want(first)
    place = World()
    await place.want(first)
    for number, step in enumerate(steps):
        if number == change:
            await place.want(second)
        await _step(place, step)
    await place.want(first)
    for world in (fresh, place):
        await world.settle()
    whole = (await fresh.ready())["status"] == "True"
    assert same(fingerprint(fresh), fingerprint(place), whole=whole) == ""
    assert [*wrongs(place)] == []


async def _step(place: World, step: str) -> None:
    if step == "pass":
        await place.reconcile()
    elif step == "play":
        await place.play()
    else:
        place.time += MINUTE


class Stale(Tap):
    """Reads of `kinds` see the store as it was `lag` writes ago; writes go to the one that is."""

    def __init__(self, place: World, kinds: frozenset[str], lag: int) -> None:
        super().__init__(place.api, place.writes)
        self._kinds = kinds
        self._store = place.api.history[max(0, len(place.api.history) - 1 - lag)]

    async def get(self, kind: str, namespace: str | None, name: str) -> Object | None:
        if kind in self._kinds:
            return fakeapi.read(self._store, kind, namespace, name)
        return await super().get(kind, namespace, name)

    async def list(self, kind: str, namespace: str | None, labels: Mapping[str, str]) -> list[Object]:
        if kind in self._kinds:
            return fakeapi.listed(self._store, kind, namespace, labels)
        return await super().list(kind, namespace, labels)


KINDS: Final = (names.KIND, "ConfigMap", "Secret", "Service", "StatefulSet", "Pod", "PodDisruptionBudget")


@given(
    first=specs(),
    second=specs(),
    looks=st.lists(st.tuples(st.sets(st.sampled_from(KINDS), min_size=1), st.integers(1, 60)), min_size=1, max_size=6),
)
@examples(10)
async def test_stale_reads_do_no_harm(first: Spec, second: Spec, looks: list[tuple[set[str], int]]) -> None:
    place = World()
    for spec in (first, second):
        await place.want(spec)
        await place.settle()
    fresh = fingerprint(place)
    for kinds, lag in looks:
        with contextlib.suppress(ApiError):
            await place.reconcile(Stale(place, frozenset(kinds), lag))
        await place.play()
        place.time += MINUTE
    await place.settle()
    assert [*wrongs(place)] == []
    assert same(fresh, fingerprint(place), whole=(await place.ready())["status"] == "True") == ""


class Gate(Tap):
    """Every request waits until its turn comes."""

    def __init__(self, place: World, waiting: list[tuple[int, asyncio.Future[None]]], number: int) -> None:
        super().__init__(place.api, place.writes)
        self._waiting, self._number = waiting, number

    async def request(self, verb: str, kind: str, name: str) -> None:
        turn = asyncio.get_running_loop().create_future()
        self._waiting.append((self._number, turn))
        await turn


async def interleave(place: World, choices: Iterator[int], between: Callable[[], Awaitable[None]], when: int) -> None:
    """One pass of each of two operators at once, their requests in an order that `choices` gives.

    `between` happens after `when` requests.
    """
    waiting: list[tuple[int, asyncio.Future[None]]] = []
    passes = [asyncio.ensure_future(_one_pass(place, Gate(place, waiting, number))) for number in range(2)]
    done = 0
    while not all(task.done() for task in passes):
        for _ in range(20):  # until every task waits
            await asyncio.sleep(0)
        if waiting:
            _, turn = waiting.pop(next(choices) % len(waiting))
            turn.set_result(None)
            done += 1
            if done == when:
                await between()


async def _one_pass(place: World, gate: Gate) -> None:
    with contextlib.suppress(ApiError):
        await place.reconcile(gate)


@given(
    first=specs(),
    second=specs(),
    rounds=st.integers(1, 4),
    when=st.integers(1, 60),
    random=st.randoms(use_true_random=False),
)
@examples(10)
async def test_two_operators_at_once_do_no_harm(first: Spec, second: Spec, rounds: int, when: int, random: Any) -> None:
    fresh = World()
    for spec in (first, second):
        await fresh.want(spec)
        await fresh.settle()
    place = World()
    await place.want(first)
    await place.settle()
    choices = iter(lambda: random.randrange(1000), -1)

    async def change() -> None:
        await place.want(second)

    for _ in range(rounds):
        await interleave(place, choices, change, when)
        await place.play()
    await place.want(second)
    await place.settle()
    whole = (await fresh.ready())["status"] == "True"
    assert same(fingerprint(fresh), fingerprint(place), whole=whole) == ""
    assert [*wrongs(place)] == []
