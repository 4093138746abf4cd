"""The address of a node changes: the map is written once, and says the old one while the new one is not known."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
from derp_operator import names

from derper.derpmap import from_json

from .controlplane import ControlPlane
from .world import HANG, Recorder, World, condition, world

MAP = ("apply", "ConfigMap", "berlin-derpmap")


@pytest.fixture
async def berlin(api: ControlPlane) -> AsyncIterator[World]:
    async with world(api) as found:
        yield found


async def passes(place: World, recorder: Recorder) -> None:
    """Reconcile through `recorder` and play pods until nothing moves."""
    for _ in range(HANG):
        before = len(recorder.writes)
        await place.reconcile(recorder)
        if not await place.play() and len(recorder.writes) == before:
            return
    raise AssertionError("never comes to rest")


async def addresses(place: World) -> list[str]:
    derpmap = from_json((await place.data("ConfigMap", "berlin-derpmap"))[names.MAP_JSON])
    return [node.ipv4 for node in derpmap.regions[900].nodes]


async def test_a_service_is_made_anew(berlin: World) -> None:
    await berlin.create(exposure={"type": "LoadBalancer"})
    await berlin.settle()
    for number in range(3):
        await berlin.patch_status(
            "Service", f"berlin-{number}", {"loadBalancer": {"ingress": [{"ip": f"192.0.2.{number}"}]}}
        )
    await berlin.settle()
    recorder = Recorder(berlin.kube)
    await berlin.remove("Service", "berlin-1")
    await passes(berlin, recorder)
    assert await addresses(berlin) == ["192.0.2.0", "192.0.2.1", "192.0.2.2"]
    assert MAP not in recorder.writes
    assert condition(await berlin.region())["reason"] == "AddressPending"
    await berlin.patch_status("Service", "berlin-1", {"loadBalancer": {"ingress": [{"ip": "192.0.2.9"}]}})
    await passes(berlin, recorder)
    assert await addresses(berlin) == ["192.0.2.0", "192.0.2.9", "192.0.2.2"]
    assert recorder.writes.count(MAP) == 1
    assert condition(await berlin.region())["status"] == "True"


async def test_a_kubernetes_node_is_replaced(berlin: World) -> None:
    """The pod is on none, then on one that has not said its address, then it starts there."""
    await berlin.create()
    await berlin.settle()
    old = await addresses(berlin)
    recorder = Recorder(berlin.kube)
    await berlin.stop("berlin-1")
    await berlin.reconcile(recorder)
    await berlin.play()
    await berlin.pod_status("berlin-1", phase="Pending", podIP=None, hostIP=None, hostIPs=None, conditions=None)
    await passes(berlin, recorder)
    assert await addresses(berlin) == old
    assert MAP not in recorder.writes
    new = {"hostIP": "198.18.255.99", "hostIPs": [{"ip": "198.18.255.99"}]}
    await berlin.pod_status("berlin-1", **new)
    await passes(berlin, recorder)
    ready = [{"type": "Ready", "status": "True"}]
    await berlin.pod_status("berlin-1", phase="Running", podIP="198.18.1.9", conditions=ready)
    await passes(berlin, recorder)
    assert await addresses(berlin) == [old[0], "198.18.255.99", old[2]]
    assert recorder.writes.count(MAP) == 1
    assert condition(await berlin.region())["status"] == "True"
