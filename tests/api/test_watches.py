"""Kopf's part: every change of a region and its children is reported, and nothing else is."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

import kopf
import pytest
from derp_operator import names
from derp_operator.handlers import Login, WatchError, watch

from .controlplane import ControlPlane
from .world import World, connection, world

HANG = 60.0
Change = tuple[str, bool]
"""Name of an object and whether it was deleted."""


class Reports:
    """What the watches have reported so far."""

    def __init__(self) -> None:
        self.changes: list[Change] = []
        self.keys: set[tuple[str, str]] = set()
        self._came = asyncio.Event()

    def __call__(self, item: Mapping[str, Any], deleted: bool, key: tuple[str, str]) -> None:
        self.changes.append((item["metadata"]["name"], deleted))
        self.keys.add(key)
        self._came.set()

    async def until(self, change: Change) -> None:
        async with asyncio.timeout(HANG):
            while change not in self.changes:
                self._came.clear()
                await self._came.wait()


@asynccontextmanager
async def watching(login: Login, namespaces: list[str]) -> AsyncIterator[Reports]:
    reports, ready = Reports(), asyncio.Event()
    task = asyncio.create_task(watch(login, namespaces, reports, ready.set))
    try:
        async with asyncio.timeout(HANG):
            await ready.wait()
        yield reports
    finally:
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task


@pytest.fixture
async def berlin(api: ControlPlane) -> AsyncIterator[World]:
    async with world(api) as found:
        yield found


async def test_every_kind_is_watched(api: ControlPlane, berlin: World) -> None:
    async with watching(lambda: connection(api), [berlin.namespace]) as reports:
        await berlin.create()
        await berlin.settle()
        children = [
            ("Pod", "berlin-2"),
            ("Service", "berlin-mesh"),
            ("Secret", "berlin-keys"),
            ("ConfigMap", "berlin-settings"),
            ("ConfigMap", "berlin-derpmap"),
        ]
        for _, name in children:
            await reports.until((name, False))
        for kind, name in children:
            await (berlin.stop(name) if kind == "Pod" else berlin.remove(kind, name))
            await reports.until((name, True))
        for kind in ("ServiceAccount", "PodDisruptionBudget", "NetworkPolicy", "StatefulSet", names.KIND):
            reports.changes.clear()  # all of one name: one at a time
            await berlin.remove(kind, "berlin")
            await reports.until(("berlin", True))
        assert reports.keys == {(berlin.namespace, "berlin")}


async def test_what_others_own_is_not_even_sent(api: ControlPlane, berlin: World) -> None:
    async with watching(lambda: connection(api), [berlin.namespace]) as reports:
        meta = {"namespace": berlin.namespace, "name": "foreign", "labels": {names.REGION_LABEL: "berlin"}}
        await berlin.kube.create({"apiVersion": "v1", "kind": "Secret", "metadata": meta})
        await berlin.create()
        await berlin.settle()
        await reports.until(("berlin-keys", False))
        assert ("foreign", False) not in reports.changes


async def test_a_user_without_a_name_is_fine(api: ControlPlane, berlin: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def nameless() -> str:
        raise KeyError("getpwuid(): uid not found: 65532")  # as in a pod

    monkeypatch.setattr("getpass.getuser", nameless)
    async with watching(lambda: connection(api), [berlin.namespace]) as reports:
        await berlin.create()
        await reports.until(("berlin", False))


def nobody(api: ControlPlane) -> kopf.ConnectionInfo:
    """Credentials that are refused."""
    return dataclasses.replace(connection(api), token="nobody's", certificate_data=None, private_key_data=None)


async def test_credentials_that_are_refused_end_the_watch(api: ControlPlane) -> None:
    async with asyncio.timeout(HANG):
        with pytest.raises(WatchError, match="Ran out of valid credentials"):
            await watch(lambda: nobody(api), ["default"], lambda *_: None, lambda: None)


async def test_credentials_that_have_been_renewed_are_taken(api: ControlPlane, berlin: World) -> None:
    logins = iter([nobody(api)])
    async with watching(lambda: next(logins, connection(api)), [berlin.namespace]) as reports:
        await berlin.create()
        await reports.until(("berlin", False))
