"""Certificates and the mesh key are changed while clients talk; no pod is restarted."""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio

from tests.interop.processes import HANG

from . import relays
from .clients import DEMO, Clients
from .conftest import Record
from .kube import Kube

NO_ROTATION = {"tls": {"lifetime": None, "renewBefore": None, "retireAfter": None}}


@pytest_asyncio.fixture(loop_scope="session", autouse=True)
async def pods_stay(kube: Kube) -> AsyncIterator[None]:
    before = await identities(kube)
    yield
    assert await identities(kube) == before


async def identities(kube: Kube) -> set[str]:
    return {pod["metadata"]["uid"] for pod in (await relays.pods(kube, DEMO)).values()}


async def patch(kube: Kube, **spec: Any) -> None:
    text = json.dumps({"spec": spec})
    await kube.run("patch", "derpregion", DEMO.name, f"--namespace={DEMO.namespace}", "--type=merge", f"--patch={text}")


async def rotated(kube: Kube, what: str, ask: str) -> None:
    await kube.wait("derpregion/demo", f"jsonpath={{.status.rotation.{what}}}={ask}", DEMO.namespace)


async def test_certificates_are_rotated(kube: Kube, clients: Clients, record: Record) -> None:
    """Both generations are served; the map changes once; what was before goes, and nobody sees that."""
    ask = secrets.token_hex(4)
    old = await kube.derp_map(DEMO.name, DEMO.namespace)
    async with clients.notice() as seen:
        await patch(kube, tls={"rotate": ask, "retireAfter": "20s"})
        await rotated(kube, "certificates", ask)
        await clients.has_another_map_than(old)
        await kube.ready(DEMO.name, DEMO.namespace)
    record("certificates rotated", seen)
    seen.only_what_was_forced()
    assert seen.maps == 1
    async with clients.notice() as seen:
        async with asyncio.timeout(3 * HANG):
            while "retireAt" in (await kube.get("derpregion", DEMO.name, DEMO.namespace))["status"]["rotation"]:  # noqa: ASYNC110
                await asyncio.sleep(1)
    record("certificates before retired", seen)
    seen.nothing()
    assert (await kube.probe(DEMO.name, DEMO.namespace)).status == 0


@pytest.mark.faults
async def test_certificates_are_renewed_by_themselves(kube: Kube, clients: Clients, record: Record) -> None:
    """They are made for ten minutes and due after one half; then for a year again."""
    first = await kube.derp_map(DEMO.name, DEMO.namespace)
    try:
        async with clients.notice() as seen:
            tls = {"rotate": secrets.token_hex(4), "lifetime": "10m", "renewBefore": "9m30s", "retireAfter": "5s"}
            await patch(kube, tls=tls)
            second = await clients.has_another_map_than(first)
            await clients.has_another_map_than(second)
    finally:
        await patch(kube, **NO_ROTATION)
        await kube.ready(DEMO.name, DEMO.namespace)
    record("certificates rotated, then renewed by themselves", seen)
    seen.only_what_was_forced()
    assert seen.maps == 2


async def test_the_mesh_key_is_rotated(kube: Kube, clients: Clients, record: Record) -> None:
    ask = secrets.token_hex(4)
    async with clients.notice() as seen:
        await patch(kube, mesh={"rotate": ask})
        await rotated(kube, "meshKey", ask)
        await kube.ready(DEMO.name, DEMO.namespace)
    record("mesh key rotated", seen)
    seen.nothing()
    assert (await kube.probe(DEMO.name, DEMO.namespace)).status == 0
