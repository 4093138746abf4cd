"""Pods are deleted, the operator comes and goes, and the clients' traffic and their map stay."""

from __future__ import annotations

import pytest

from . import relays
from .clients import DEMO, Clients
from .conftest import Record
from .kube import Kube

CHILDREN = "statefulset,service,secret,configmap,poddisruptionbudget,networkpolicy,serviceaccount,pod"


async def versions(kube: Kube) -> dict[tuple[str, str], str]:
    """The resourceVersion of everything that belongs to the demo's region: any write changes it."""
    found = await kube.list(CHILDREN, DEMO.namespace, f"--selector=derp.network/region={DEMO.name}")
    return {(item["kind"], item["metadata"]["name"]): item["metadata"]["resourceVersion"] for item in found}


@pytest.mark.parametrize(
    ("what", "how"),
    [
        ("pod deleted", []),
        ("pod deleted by force", ["--force", "--grace-period=0"]),
    ],
)
async def test_a_pod_is_deleted(kube: Kube, clients: Clients, record: Record, what: str, how: list[str]) -> None:
    published = await kube.get("configmap", "demo-derpmap", DEMO.namespace)
    key = await relays.server_key(kube, "demo-0", DEMO.namespace)
    async with clients.notice() as seen, clients.made_anew("demo-0"):
        await kube.run("delete", "pod", "demo-0", f"--namespace={DEMO.namespace}", "--wait=false", *how)
    record(what, seen)
    seen.only_what_was_forced()
    await kube.ready(DEMO.name, DEMO.namespace)
    assert await relays.server_key(kube, "demo-0", DEMO.namespace) == key
    assert (await kube.get("configmap", "demo-derpmap", DEMO.namespace)) == published, "the map is not even written"
    assert (await kube.probe(DEMO.name, DEMO.namespace)).status == 0


async def test_the_operator_is_restarted(kube: Kube, clients: Clients, record: Record) -> None:
    async with clients.notice() as seen:
        before = await versions(kube)
        await relays.restart_operator(kube)
        await relays.operator_passes(kube, DEMO, 3)
        assert await versions(kube) == before
    record("operator restarted", seen)
    seen.nothing()


@pytest.mark.usefixtures("operator_afterwards")
async def test_the_operator_is_down_and_a_relay_is_lost(kube: Kube, clients: Clients, record: Record) -> None:
    """What needs no change goes on without it: a pod that is lost comes back and finds its keys and its peers."""
    async with clients.notice() as seen:
        await relays.scale_operator(kube, 0)
        before = await versions(kube)
        async with clients.made_anew("demo-1"):
            await kube.run("delete", "pod", "demo-1", f"--namespace={DEMO.namespace}")
        assert (await kube.probe(DEMO.name, DEMO.namespace)).status == 0
    record("pod deleted with the operator down", seen)
    seen.only_what_was_forced()
    counting = {("Pod", "demo-1"), ("StatefulSet", "demo"), ("PodDisruptionBudget", "demo")}
    quiet = {key: version for key, version in before.items() if key not in counting}
    assert (await versions(kube)).items() >= quiet.items()

    await relays.scale_operator(kube, 1)
    await kube.ready(DEMO.name, DEMO.namespace)
    await relays.operator_passes(kube, DEMO, 3)
    assert (await versions(kube)).items() >= quiet.items(), "nothing to do, and nothing was written"
