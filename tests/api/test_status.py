"""Does the status tell the truth, also in the pass that changes something and in the one that may not?"""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator

import pytest
from derp_operator import names
from derp_operator.kube import ApiError, Object

from derper.derpmap import from_json

from .controlplane import ControlPlane
from .world import HANG, Recorder, World, condition, world


@pytest.fixture
async def berlin(api: ControlPlane) -> AsyncIterator[World]:
    async with world(api) as found:
        yield found


async def test_a_region_is_not_ready_before_its_pods_are_the_wanted_ones(berlin: World) -> None:
    await berlin.create()
    await berlin.settle()
    await berlin.change(image="localhost/other:1")
    await berlin.reconcile()  # the StatefulSet controller has seen nothing yet
    region = await berlin.region()
    ready = condition(region)
    assert ready["observedGeneration"] == region["metadata"]["generation"]
    assert (ready["status"], ready["reason"]) == ("False", "RollingOut")
    assert condition(await berlin.settle())["status"] == "True"


async def test_a_region_is_not_ready_before_its_relays_run_with_the_wanted_settings(berlin: World) -> None:
    async def settings() -> str:
        return hashlib.sha256((await berlin.data("ConfigMap", "berlin-settings"))[names.SETTINGS_FILE]).hexdigest()

    await berlin.create()
    await berlin.settle()
    berlin.relays.settings = await settings()
    assert condition(await berlin.settle())["status"] == "True"
    await berlin.change(clients={"open": None, "verifyURLs": ["https://headscale.example.com/verify"]})
    region = await berlin.settle()
    assert (condition(region)["status"], condition(region)["reason"]) == ("False", "SettingsPending")
    assert "berlin-0, berlin-1, berlin-2" in condition(region)["message"]
    assert region["status"]["inMap"] == "3/3"
    berlin.relays.settings = await settings()
    assert condition(await berlin.settle())["status"] == "True"


async def test_the_status_shows_the_map_that_stands(berlin: World) -> None:
    await berlin.create()
    await berlin.settle()
    lost = {"data": {names.MESH_KEY: None}}  # nothing is written without it, not even a new address
    await berlin.kube.merge("Secret", berlin.namespace, "berlin-keys", lost)
    await berlin.pod_status("berlin-1", hostIP="198.18.255.99", hostIPs=[{"ip": "198.18.255.99"}])
    status = (await berlin.settle())["status"]
    text = (await berlin.data("ConfigMap", "berlin-derpmap"))[names.MAP_JSON]
    assert status["map"]["hash"] == hashlib.sha256(text).hexdigest()
    published = [node.ipv4 for node in from_json(text).regions[900].nodes]
    assert [node["ipv4"] for node in status["nodes"]] == published


async def test_a_region_is_not_ready_before_its_addresses_are_the_wanted_ones(berlin: World) -> None:
    await berlin.create()
    await berlin.settle()
    before = await berlin.data("ConfigMap", "berlin-derpmap")
    await berlin.change(exposure={"type": "LoadBalancer"})
    region = await berlin.settle()
    assert (condition(region)["status"], condition(region)["reason"]) == ("False", "AddressPending")
    assert "Service berlin-0 has no load balancer address" in condition(region)["message"]
    assert await berlin.data("ConfigMap", "berlin-derpmap") == before
    for number in range(3):
        ingress = [{"ip": f"192.0.2.{number}"}]
        await berlin.patch_status("Service", f"berlin-{number}", {"loadBalancer": {"ingress": ingress}})
    assert condition(await berlin.settle())["status"] == "True"
    await berlin.patch_status("Service", "berlin-1", {"loadBalancer": {"ingress": None}})
    assert condition(await berlin.settle())["reason"] == "AddressPending"


async def test_a_node_that_is_gone_does_not_change_the_address_of_its_pod(berlin: World) -> None:
    await berlin.create()
    await berlin.settle()
    for number in range(3):
        await berlin.node_addresses(number, f"203.0.113.{number}")
    await berlin.settle()
    before = await berlin.data("ConfigMap", "berlin-derpmap")
    assert b"203.0.113.1" in before[names.MAP_JSON]
    await berlin.lose_node(1)
    region = await berlin.settle()
    assert await berlin.data("ConfigMap", "berlin-derpmap") == before
    assert condition(region)["status"] == "False"
    assert "which pod berlin-1 was on, has gone" in condition(region)["message"]


async def stuck(place: World) -> Object:
    """Reconcile and play pods until nothing changes any more, though the operator tries on; returns the region."""
    for _ in range(HANG):
        before = await place.region()
        await place.reconcile()
        if not await place.play() and await place.region() == before:
            return before
    raise AssertionError(f"never comes to rest: {await place.region()}")


async def quota(place: World, **hard: str) -> None:
    """Limits for the namespace.  Nobody counts what is there: there are no controllers."""
    path = f"api/v1/namespaces/{place.namespace}/resourcequotas"
    await place.kube._request("POST", path, {}, {"metadata": {"name": "few"}, "spec": {"hard": hard}})
    status = {"status": {"hard": hard, "used": dict.fromkeys(hard, "0")}}
    await place.kube._request("PATCH", f"{path}/few/status", {}, status, "application/merge-patch+json")


def ports(base: int) -> dict[str, object]:
    """The API server leaves the ports below 30086 to those who ask for them."""
    return {"type": "NodePort", "nodePort": {"derpPortBase": base, "stunPortBase": base + 10}}


async def test_a_node_port_that_is_taken_is_told_and_stops_nothing_else(api: ControlPlane, berlin: World) -> None:
    async with world(api) as other:
        meta = {"name": "taker", "namespace": other.namespace}
        spec = {"type": "NodePort", "ports": [{"port": 80, "nodePort": 30001}]}
        await other.kube.create({"apiVersion": "v1", "kind": "Service", "metadata": meta, "spec": spec})
        await berlin.create(exposure=ports(30000))
        region = await stuck(berlin)
        ready = condition(region)
        assert (ready["status"], ready["reason"]) == ("False", "ChildRefused")
        assert "Service berlin-1: " in ready["message"]
        assert "30001: provided port is already allocated" in ready["message"]
        assert "PATCH" not in ready["message"]
        assert ready["observedGeneration"] == region["metadata"]["generation"]
        assert ("Warning", "ChildRefused") in await berlin.events()
        assert len(await berlin.pods()) == 3
        await other.remove("Service", "taker")
        assert condition(await berlin.settle())["status"] == "True"


@pytest.mark.parametrize(("old", "base"), [(30020, 30021), (30041, 30040)])
async def test_node_ports_move_along(berlin: World, old: int, base: int) -> None:
    await berlin.create(exposure=ports(old))
    await berlin.settle()
    await berlin.change(exposure=ports(base))
    assert condition(await berlin.settle())["status"] == "True"
    found = from_json((await berlin.data("ConfigMap", "berlin-derpmap"))[names.MAP_JSON])
    assert [node.derp_port for node in found.regions[900].nodes] == [base, base + 1, base + 2]


async def test_a_secret_over_quota_stops_what_relies_on_it(berlin: World) -> None:
    await quota(berlin, secrets="0")
    await berlin.create()
    region = await stuck(berlin)
    assert condition(region)["reason"] == "ChildRefused"
    assert "Secret berlin-keys: " in condition(region)["message"]
    assert "exceeded quota: few" in condition(region)["message"]
    assert await berlin.kube.get("ConfigMap", berlin.namespace, "berlin-settings") is None
    assert await berlin.kube.get("StatefulSet", berlin.namespace, "berlin") is None
    path = f"api/v1/namespaces/{berlin.namespace}/resourcequotas/few"
    await berlin.kube._request("DELETE", path)
    assert condition(await berlin.settle())["status"] == "True"


async def test_a_value_that_only_the_api_server_knows_is_wrong_is_told_and_heals(berlin: World) -> None:
    await berlin.create()
    await berlin.settle()
    await berlin.change(pod={"resources": {"requests": {"memory": "2Gi"}, "limits": {"memory": "1Gi"}}})
    region = await stuck(berlin)
    assert condition(region)["reason"] == "ChildRefused"
    assert "StatefulSet berlin: " in condition(region)["message"]
    assert "must be less than or equal to memory limit" in condition(region)["message"]
    await berlin.change(pod=None)
    assert condition(await berlin.settle())["status"] == "True"


async def test_a_rule_against_changes_of_pods_hides_nothing(berlin: World) -> None:
    class Strict(Recorder):
        async def merge(self, kind: str, namespace: str, name: str, patch: Object) -> Object:
            raise ApiError(403, "Forbidden", "pods are as they are")

    await berlin.create()
    await berlin.settle()
    await berlin.change(limits={"clientBytesPerSecond": 100000})
    await berlin.reconcile(Strict(berlin.kube))
    region = await berlin.region()
    assert region["status"]["observedGeneration"] == region["metadata"]["generation"]
    assert condition(region)["status"] == "True"
