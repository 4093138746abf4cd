"""An image that does not exist costs the region one relay, whatever else happens, and heals when it is corrected."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator

import pytest_asyncio

from . import relays
from .clients import DEMO, Clients
from .conftest import Record
from .kube import Journal, Kube, condition, is_true

PATIENCE = 120.0


@pytest_asyncio.fixture(loop_scope="session", autouse=True)
async def image_as_before(kube: Kube) -> AsyncIterator[None]:
    yield
    await set_image(kube, None)
    await kube.ready(DEMO.name, DEMO.namespace)


async def set_image(kube: Kube, image: str | None) -> None:
    patch = f"--patch={json.dumps({'spec': {'image': image}})}"
    await kube.run("patch", "derpregion", DEMO.name, "--type=merge", patch, f"--namespace={DEMO.namespace}")


async def uids(kube: Kube) -> dict[str, str]:
    return {name: pod["metadata"]["uid"] for name, pod in (await relays.pods(kube, DEMO)).items()}


async def evict(kube: Kube, pod: str) -> str:
    """What `kubectl drain` asks for; returns what is said against it."""
    meta = {"name": pod, "namespace": DEMO.namespace}
    path = f"/api/v1/namespaces/{DEMO.namespace}/pods/{pod}/eviction"
    manifest = {"apiVersion": "policy/v1", "kind": "Eviction", "metadata": meta}
    return await kube.refusal("create", f"--raw={path}", "--filename=-", manifest=manifest)


def away(journal: Journal) -> int:
    """How many pods were not ready or not there at a time, at most."""
    pods = journal.ordered(lambda c: c.kind == "Pod")
    ready: dict[str, bool] = dict.fromkeys({change.name for change in pods}, True)
    most = 0
    for change in pods:
        ready[change.name] = not change.leaving and is_true(change.object, "Ready")
        most = max(most, len(ready) - sum(ready.values()))
    return most


async def test_an_image_that_does_not_exist(kube: Kube, clients: Clients, record: Record) -> None:
    before = await uids(kube)
    async with Journal(kube, DEMO.namespace, "Pod", "DerpRegion") as journal:
        async with clients.notice(PATIENCE) as seen:
            start = journal.mark()
            await set_image(kube, "localhost/no-such-image:1")
            stopped = await journal.until(
                lambda c: "does not run" in condition(c.object, "Ready").get("message", ""), "it stops", since=start
            )
            [bad] = {name for name, uid in (await uids(kube)).items() if before[name] != uid}
            message = condition(stopped.object, "Ready")["message"]
            assert f"Pod {bad} does not run" in message
            assert f"when {bad} is well" in message
            for pod in before.keys() - {bad}:
                assert "disruption budget" in await evict(kube, pod), "one is away already"
            await relays.restart_operator(kube)
            await set_image(kube, None)
            await kube.ready(DEMO.name, DEMO.namespace)
        record("image that does not exist, then corrected", seen)
        seen.only_what_was_forced()
        assert away(journal) == 1
    after = await uids(kube)
    assert {name for name in before if before[name] != after[name]} == {bad}
