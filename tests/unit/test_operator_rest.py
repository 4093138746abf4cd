"""A region at rest costs no request, and what is remembered is only ever a reason to do nothing."""

from __future__ import annotations

from typing import Any

from derp_operator import names
from derp_operator.counting import Watches
from derp_operator.kube import Cluster
from derp_operator.rest import LONGEST, Rest
from hypothesis import given

from .fakeworld import NAME, SPACE, START, Tap, World
from .proof import examples, fingerprint, quick_yaml, same, wrongs
from .specs import BASE, Spec, specs

__all__ = ["quick_yaml"]
KEY = (SPACE, NAME)


class Requests(Tap):
    """Counts reads, too."""

    def __init__(self, place: World) -> None:
        super().__init__(place.api, place.writes)
        self.count = 0

    async def request(self, verb: str, kind: str, name: str) -> None:
        self.count += 1


class Resting(World):
    """Its operator rests when it can.  Events come after each round, unless it is `deaf`."""

    def __init__(self) -> None:
        super().__init__()
        self.deaf = False
        self.requests = Requests(self)
        self.watches = Watches(self.seconds)
        self.rest = Rest(self.requests, self.watches.told, self.seconds)
        self._told = self.api.store

    def seconds(self) -> float:
        return (self.time - START).total_seconds()

    async def reconcile(self, cluster: Cluster | None = None) -> float | None:
        self.report()
        return await self.rest.run(KEY, lambda through: self.reconciler(through).reconcile(SPACE, NAME))

    def report(self) -> None:
        """What the watches tell: all that has changed since the last time."""
        if self.deaf:
            return
        old, self._told = self._told, self.api.store
        for key in old.keys() | self._told.keys():
            if old.get(key) is not self._told.get(key):
                item = self._told.get(key, old.get(key)) or {}
                if key[0] == names.KIND or names.REGION_LABEL in item["metadata"].get("labels", {}):
                    self.watches.event(item, deleted=key not in self._told)
                    self.rest.changed(KEY)

    async def look(self) -> int:
        """One pass; returns its requests."""
        before = self.requests.count
        await self.reconcile()
        return self.requests.count - before


async def at_rest(spec: Spec = BASE) -> Resting:
    place = Resting()
    await place.want(spec)
    await place.settle()
    assert await place.look() == 0
    return place


async def test_a_pass_over_what_has_not_changed_requests_nothing() -> None:
    place = await at_rest()
    for _ in range(5):
        assert await place.look() == 0


async def test_a_change_is_read_anew() -> None:
    place = await at_rest()
    await place.api.merge("Pod", SPACE, "berlin-1", {"metadata": {"annotations": {"a": "b"}}}, "somebody")
    assert await place.look() > 5
    assert await place.look() == 0


async def test_what_the_relays_say_is_heard_and_written() -> None:
    place = await at_rest()
    place.sick.add("berlin-1")
    place.writes.clear()
    assert await place.look() > 5
    assert place.writes["status", names.KIND] == 1
    assert (await place.ready())["status"] == "False"


async def test_what_no_watch_has_told_is_not_remembered() -> None:
    place = await at_rest()
    place.rest.changed(KEY)
    place.deaf = True
    await place.api.merge("Pod", SPACE, "berlin-1", {"metadata": {"annotations": {"a": "b"}}}, "somebody")
    assert await place.look() > 5
    assert await place.look() > 5, "the watches keep something to themselves: that shows only in reads"


async def test_a_change_that_no_watch_tells_is_found_in_the_end() -> None:
    place = await at_rest()
    place.deaf = True
    await place.api.delete("Service", SPACE, "berlin-1")
    assert await place.look() == 0
    assert await place.api.get("Service", SPACE, "berlin-1") is None
    place.time = START.fromtimestamp(place.time.timestamp() + LONGEST, START.tzinfo)
    assert await place.look() > 5
    assert await place.api.get("Service", SPACE, "berlin-1")


async def test_a_report_during_a_pass_spoils_what_it_reads() -> None:
    place = await at_rest()
    place.rest.changed(KEY)

    async def work(through: Cluster) -> float | None:
        again = await place.reconciler(through).reconcile(SPACE, NAME)
        place.rest.changed(KEY)
        return again

    await place.rest.run(KEY, work)
    assert await place.look() > 5


async def test_what_the_user_provides_is_asked_for_each_time() -> None:
    spec = {**BASE, "clients": {"keysFrom": {"configMapKeyRef": {"name": "people", "key": "keys"}}}}
    place = Resting()
    await place.want(spec)
    await place.settle()
    assert await place.look() == 1
    await place.api.merge("ConfigMap", SPACE, "people", {"data": {"keys": "nodekey:00"}}, "user")
    place.writes.clear()
    assert await place.look() > 5
    assert place.writes["merge", "Pod"] == 3, "the pods are told"


@given(first=specs(), second=specs())
@examples(4)
async def test_resting_changes_nothing(first: Spec, second: Spec) -> None:
    worlds: list[Any] = [World(), Resting()]
    for place in worlds:
        for spec in (first, second):
            await place.want(spec)
            await place.settle()
    assert same(*map(fingerprint, worlds)) == ""
    assert [*wrongs(worlds[1])] == []
