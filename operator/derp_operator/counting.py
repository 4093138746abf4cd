"""A cluster that counts writes and notices what the watches fail to report."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, Final

from . import names
from .kube import Cluster, Object

FORGOTTEN_AFTER: Final = 300.0
"""Seconds after which an object that no pass has read again is taken to be gone; passes come more often."""


class Watches:
    """Are the watches alive?  A version of an object that was read must also come as an event, within moments.

    A dead watch looks like a quiet one from outside; the objects that passes read anyway tell them apart.  A read and
    an event may cross, and an object may go meanwhile: what counts is for how long reads find what no event has told.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._seen: dict[str, str] = {}
        self._late: dict[str, tuple[float, float]] = {}  # since when, and until when, reads have found it

    def event(self, item: Mapping[str, Any], *, deleted: bool) -> None:
        """A watch reported `item`."""
        uid, version = _version(item)
        self._late.pop(uid, None)
        if deleted:
            self._seen.pop(uid, None)
        else:
            self._seen[uid] = version

    def read(self, item: Mapping[str, Any]) -> None:
        """A request returned `item`, of a kind and with labels that are watched."""
        uid, version = _version(item)
        if self._seen.get(uid) == version:
            self._late.pop(uid, None)
        else:
            now = self._clock()
            since, _ = self._late.get(uid, (now, now))
            self._late[uid] = since, now

    def told(self, item: Mapping[str, Any]) -> bool:
        """Whether the last event about `item` was about this very version."""
        uid, version = _version(item)
        return self._seen.get(uid) == version

    def lag(self) -> float:
        """For how many seconds the watches have kept something to themselves."""
        recent = self._clock() - FORGOTTEN_AFTER
        self._late = {uid: (since, until) for uid, (since, until) in self._late.items() if until >= recent}
        return max((until - since for since, until in self._late.values()), default=0.0)


class CountingCluster:
    """Passes everything on to `cluster`."""

    def __init__(self, cluster: Cluster, writes: Counter[str], watches: Watches) -> None:
        self._cluster, self._writes, self._watches = cluster, writes, watches

    async def get(self, kind: str, namespace: str | None, name: str) -> Object | None:
        item = await self._cluster.get(kind, namespace, name)
        if item and kind == names.KIND:
            self._watches.read(item)
        return item

    async def list(self, kind: str, namespace: str | None, labels: Mapping[str, str]) -> list[Object]:
        items = await self._cluster.list(kind, namespace, labels)
        for item in items:
            self._watches.read(item)
        return items

    async def apply(self, manifest: Object, subresource: str = "") -> Object:
        self._writes[manifest["kind"] + ("/" + subresource if subresource else "")] += 1
        return await self._cluster.apply(manifest, subresource)

    async def merge(self, kind: str, namespace: str, name: str, patch: Object) -> Object:
        self._writes[kind] += 1
        return await self._cluster.merge(kind, namespace, name, patch)

    async def create(self, manifest: Object) -> Object:
        self._writes[manifest["kind"]] += 1
        return await self._cluster.create(manifest)

    async def delete(self, kind: str, namespace: str, name: str, uid: str) -> None:
        self._writes[kind] += 1
        await self._cluster.delete(kind, namespace, name, uid)

    async def evict(self, namespace: str, name: str, uid: str, version: str) -> None:
        self._writes["Pod/eviction"] += 1
        await self._cluster.evict(namespace, name, uid, version)


def _version(item: Mapping[str, Any]) -> tuple[str, str]:
    meta = item["metadata"]
    return meta["uid"], meta["resourceVersion"]
