"""Pods are deleted, the operator comes and goes, and the clients' traffic and their map stay."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.interop.gobuild import Peers

from . import relays
from .conftest import Report
from .kube import Journal, Kube, is_true
from .tailnet import DEMO, ENOUGH, tailnet, told

CHILDREN = "statefulset,service,secret,configmap,poddisruptionbudget,networkpolicy,serviceaccount,pod"


async def versions(kube: Kube) -> dict[tuple[str, str], str]:
    """The resourceVersion of everything that belongs to the demo's region: any write changes it."""
    found = await kube.list(CHILDREN, DEMO.namespace, f"--selector=derp.network/region={DEMO.name}")
    return {(item["kind"], item["metadata"]["name"]): item["metadata"]["resourceVersion"] for item in found}


@pytest.mark.parametrize("how", [[], ["--force", "--grace-period=0"]], ids=["politely", "by-force"])
async def test_a_pod_is_deleted_with_both_clients_on_it(
    kube: Kube, peers: Peers, report: Report, tmp_path: Path, how: list[str]
) -> None:
    published = await kube.get("configmap", "demo-derpmap", DEMO.namespace)
    key = await relays.server_key(kube, "demo-0", DEMO.namespace)
    async with (
        Journal(kube, DEMO.namespace, "Pod") as journal,
        tailnet(peers, await kube.derp_map(DEMO.name, DEMO.namespace), tmp_path, apart=False) as net,
    ):
        assert await net.connected("a") == await net.connected("b") == "900a"
        traffic = await net.start_traffic("a", "b")
        await traffic.next_ok(ENOUGH)
        old = (await kube.get("pod", "demo-0", DEMO.namespace))["metadata"]["uid"]
        start = journal.mark()
        await kube.run("delete", "pod", "demo-0", f"--namespace={DEMO.namespace}", "--wait=false", *how)
        await net.connected("a", "900b")
        await net.connected("b", "900b")
        await traffic.next_ok(ENOUGH)
        back = await journal.until(
            lambda c: c.name == "demo-0" and c.object["metadata"]["uid"] != old and is_true(c.object, "Ready"),
            "a new pod demo-0 is Ready",
            since=start,
        )
        await traffic.next_ok(ENOUGH)
        summary = await traffic.stop()
    report(f"{told(summary)}; a new pod was Ready after {back.at - journal.changes[start].at:.1f} s")
    await kube.ready(DEMO.name, DEMO.namespace)
    assert await relays.server_key(kube, "demo-0", DEMO.namespace) == key
    assert (await kube.get("configmap", "demo-derpmap", DEMO.namespace)) == published, "the map is not even written"
    assert (await kube.probe(DEMO.name, DEMO.namespace)).status == 0


async def test_the_operator_is_restarted(kube: Kube, peers: Peers, report: Report, tmp_path: Path) -> None:
    async with tailnet(peers, await kube.derp_map(DEMO.name, DEMO.namespace), tmp_path, apart=True) as net:
        traffic = await net.start_traffic("a", "b")
        await traffic.next_ok(ENOUGH)
        before = await versions(kube)
        await relays.restart_operator(kube)
        await relays.operator_passes(kube, DEMO, 3)
        assert await versions(kube) == before
        await traffic.next_ok(ENOUGH)
        summary = await traffic.stop()
    report(told(summary))
    assert summary.failed == 0, summary.errors


@pytest.mark.usefixtures("operator_afterwards")
async def test_the_operator_is_down_and_a_relay_is_lost(
    kube: Kube, peers: Peers, report: Report, tmp_path: Path
) -> None:
    """What needs no change goes on without it: a pod that is lost comes back and finds its keys and its peers."""
    async with tailnet(peers, await kube.derp_map(DEMO.name, DEMO.namespace), tmp_path, apart=True) as net:
        traffic = await net.start_traffic("a", "b")
        await traffic.next_ok(ENOUGH)
        await relays.scale_operator(kube, 0)
        before = await versions(kube)
        await kube.run("delete", "pod", "demo-1", f"--namespace={DEMO.namespace}")
        await kube.wait("pod/demo-1", "condition=Ready", DEMO.namespace)
        assert (await kube.probe(DEMO.name, DEMO.namespace)).status == 0
        await traffic.next_ok(ENOUGH)
        summary = await traffic.stop()
    report(told(summary))
    assert summary.failed == 0, summary.errors
    counting = {("Pod", "demo-1"), ("StatefulSet", "demo"), ("PodDisruptionBudget", "demo")}
    quiet = {key: version for key, version in before.items() if key not in counting}
    assert (await versions(kube)).items() >= quiet.items()

    await relays.scale_operator(kube, 1)
    await kube.ready(DEMO.name, DEMO.namespace)
    await relays.operator_passes(kube, DEMO, 3)
    assert (await versions(kube)).items() >= quiet.items(), "nothing to do, and nothing was written"
