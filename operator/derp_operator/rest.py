"""Regions at rest: a pass over one of which nothing has changed asks its relays, and the API server nothing.

A pass that wrote nothing leaves the API server's answers behind.  The next one is carried out with them as long as the
watches have told of every object in them and of no change since; and as soon as it would write anything, it is given up
and done anew with requests.  So what is remembered can only ever be a reason to do nothing.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Final

from . import names
from .kube import Cluster, Object

LONGEST: Final = 1800.0
"""Seconds after which a region is read anew whatever the watches say."""

Key = tuple[str, str]
Request = tuple[str, str, str]
"""Kind, namespace, and a name or (of a list) the label selector."""
Pass = Callable[[Cluster], Awaitable[float | None]]


class Rest:
    """What was read of which region.

    `told` says whether the watches have reported this very version of an object; `changed` must be called with each of
    their reports.  `clock` is monotonic, in seconds.
    """

    def __init__(self, cluster: Cluster, told: Callable[[Object], bool], clock: Callable[[], float]) -> None:
        self._cluster, self._told, self._clock = cluster, told, clock
        self._memories: dict[Key, _Memory] = {}
        self._running: dict[Key, _Recording] = {}

    def changed(self, key: Key) -> None:
        """A watch has reported something of the region."""
        self._memories.pop(key, None)
        if key in self._running:
            self._running[key].spoilt = True

    async def run(self, key: Key, work: Pass) -> float | None:
        """Run a pass over the region `key`, from memory if that is as good; never two of one region at a time."""
        memory = self._memories.get(key)
        if memory and self._clock() < memory.until:
            try:
                return await work(_Replay(self._cluster, memory.answers()))
            except _AwakeError:
                pass
        self._memories.pop(key, None)
        recording = self._running[key] = _Recording(self._cluster, self._told, key)
        try:
            again = await work(recording)
        finally:
            del self._running[key]
        if again is not None and not recording.spoilt:
            self._memories[key] = _Memory(recording.answers, self._clock() + LONGEST)
        return again


class _AwakeError(Exception):
    """The pass has something to do."""


class _Memory:
    """Answers, a tenth as large as they are when they are used."""

    def __init__(self, answers: Mapping[Request, Any], until: float) -> None:
        self.until = until
        self._packed = zlib.compress(json.dumps(list(answers.items())).encode(), 1)

    def answers(self) -> dict[Request, Any]:
        return {
            (kind, namespace, name): answer
            for (kind, namespace, name), answer in json.loads(zlib.decompress(self._packed))
        }


class _Recording:
    """Passes everything on, and keeps the answers that the watches keep up to date.

    `spoilt`: something was written, or the watches have told of a change meanwhile, or not yet of what was read.
    """

    def __init__(self, cluster: Cluster, told: Callable[[Object], bool], key: Key) -> None:
        self._cluster, self._told, self._key = cluster, told, key
        self.answers: dict[Request, Any] = {}
        self.spoilt = False

    async def get(self, kind: str, namespace: str | None, name: str) -> Object | None:
        item = await self._cluster.get(kind, namespace, name)
        if item and namespace == self._key[0] and _belongs(kind, item, self._key[1]):
            self.spoilt |= not self._told(item)
            self.answers[kind, namespace or "", name] = item
        return item

    async def list(self, kind: str, namespace: str | None, labels: Mapping[str, str]) -> list[Object]:
        items = await self._cluster.list(kind, namespace, labels)
        if (namespace, labels.get(names.REGION_LABEL)) == self._key:  # of others this region would not be told
            self.spoilt |= not all(map(self._told, items))
            self.answers[kind, namespace or "", names.label_selector(dict(labels))] = items
        return items

    async def apply(self, manifest: Object, subresource: str = "") -> Object:
        self.spoilt = True
        return await self._cluster.apply(manifest, subresource)

    async def merge(self, kind: str, namespace: str, name: str, patch: Object) -> Object:
        self.spoilt = True
        return await self._cluster.merge(kind, namespace, name, patch)

    async def create(self, manifest: Object) -> Object:
        self.spoilt = True
        return await self._cluster.create(manifest)

    async def delete(self, kind: str, namespace: str, name: str, uid: str) -> None:
        self.spoilt = True
        await self._cluster.delete(kind, namespace, name, uid)

    async def evict(self, namespace: str, name: str, uid: str, version: str) -> None:
        self.spoilt = True
        await self._cluster.evict(namespace, name, uid, version)


class _Replay:
    """Gives the answers again; asks only for what is not watched: Nodes, and what the user provides."""

    def __init__(self, cluster: Cluster, answers: Mapping[Request, Any]) -> None:
        self._cluster, self._answers = cluster, answers

    async def get(self, kind: str, namespace: str | None, name: str) -> Object | None:
        found: Object | None = self._answers.get((kind, namespace or "", name))
        return found or await self._cluster.get(kind, namespace, name)

    async def list(self, kind: str, namespace: str | None, labels: Mapping[str, str]) -> list[Object]:
        found: list[Object] | None = self._answers.get((kind, namespace or "", names.label_selector(dict(labels))))
        return await self._cluster.list(kind, namespace, labels) if found is None else found

    async def apply(self, manifest: Object, subresource: str = "") -> Object:
        raise _AwakeError

    async def merge(self, kind: str, namespace: str, name: str, patch: Object) -> Object:
        raise _AwakeError

    async def create(self, manifest: Object) -> Object:
        raise _AwakeError

    async def delete(self, kind: str, namespace: str, name: str, uid: str) -> None:
        raise _AwakeError

    async def evict(self, namespace: str, name: str, uid: str, version: str) -> None:
        raise _AwakeError


def _belongs(kind: str, item: Mapping[str, Any], region: str) -> bool:
    """Whether the watches report a change of an object as one of this region."""
    meta = item["metadata"]
    if kind == names.KIND:
        return bool(meta["name"] == region)
    return names.labels(region).items() <= (meta.get("labels") or {}).items()
