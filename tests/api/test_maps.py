"""The ConfigMaps that hold the DERP map, in all their forms, on a real API server."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator

import pytest
from derp_operator import names

from derper.derpmap import from_json, from_yaml, lint

from .controlplane import ControlPlane
from .world import Recorder, World, condition, world


@pytest.fixture
async def berlin(api: ControlPlane) -> AsyncIterator[World]:
    async with world(api) as found:
        yield found


async def order(world: World, name: str) -> dict[int, list[str]]:
    """The names of the nodes, by region, in one of the ConfigMaps."""
    data = await world.data("ConfigMap", name)
    found = from_json(data[names.MAP_JSON])
    assert found == from_yaml(data[names.MAP_YAML])
    assert lint(found) == []
    return {key: [node.name for node in item.nodes] for key, item in found.regions.items()}


async def test_the_layout_can_change(berlin: World) -> None:
    await berlin.create()
    await berlin.settle()
    assert await order(berlin, "berlin-derpmap") == {900: ["900a", "900b", "900c"]}
    pins = [node["certName"] for node in (await berlin.region())["status"]["nodes"]]
    berlin.relays.faults["berlin-1"] = "STUN on port 3478 does not answer"  # a node that is down is not lost on the way
    await berlin.change(map={"layout": "RegionPerNode", "firstRegionID": 910})
    region = await berlin.settle()
    assert await order(berlin, "berlin-derpmap") == {910: ["900a"], 911: ["900b"], 912: ["900c"]}
    del berlin.relays.faults["berlin-1"]
    await berlin.change(replicas=4)
    region = await berlin.settle()
    assert [node["regionID"] for node in region["status"]["nodes"]] == [910, 911, 912, 913]
    assert [node["certName"] for node in region["status"]["nodes"]][:3] == pins
    assert region["status"]["inMap"] == "4/4"
    await berlin.change(map=None)
    assert condition(await berlin.settle())["status"] == "True"
    assert await order(berlin, "berlin-derpmap") == {900: ["900a", "900b", "900c", "900d"]}


async def test_each_consumer_has_a_map(berlin: World) -> None:
    consumers = [{"name": "a"}, {"name": "b", "nodeOrder": [2, 1]}, {"name": "c", "layout": "RegionPerNode"}]
    await berlin.create(map={"consumers": consumers})
    region = await berlin.settle()
    assert condition(region)["status"] == "True"
    assert await order(berlin, "berlin-derpmap") == {900: ["900a", "900b", "900c"]}
    assert sorted((await order(berlin, "berlin-derpmap-a"))[900]) == ["900a", "900b", "900c"]
    assert await order(berlin, "berlin-derpmap-b") == {900: ["900c", "900b", "900a"]}
    assert await order(berlin, "berlin-derpmap-c") == {900: ["900a"], 901: ["900b"], 902: ["900c"]}
    for item in region["status"]["map"]["consumers"]:
        assert item["configMap"] == f"berlin-derpmap-{item['name']}"
        text = (await berlin.data("ConfigMap", item["configMap"]))[names.MAP_JSON]
        assert item["hash"] == hashlib.sha256(text).hexdigest()
    recorder = Recorder(berlin.kube)
    await berlin.reconcile(recorder)
    assert recorder.writes == []

    await berlin.change(map={"consumers": consumers[:1]})
    region = await berlin.settle()
    assert [item["name"] for item in region["status"]["map"]["consumers"]] == ["a"]
    for gone in ("b", "c"):
        assert await berlin.kube.get("ConfigMap", berlin.namespace, f"berlin-derpmap-{gone}") is None


async def test_all_maps_lose_a_node_before_its_pod_stops(berlin: World) -> None:
    await berlin.create(replicas=4, map={"consumers": [{"name": "a"}]})
    await berlin.settle()
    await berlin.change(replicas=3)
    recorder = Recorder(berlin.kube)
    await berlin.reconcile(recorder)
    applied = [(kind, name) for verb, kind, name in recorder.writes if verb == "apply"]
    assert applied[:2] == [("ConfigMap", "berlin-derpmap"), ("ConfigMap", "berlin-derpmap-a")]
    assert ("StatefulSet", "berlin") not in applied[:2]


async def test_a_map_that_cannot_be_made_anew_yet_takes_no_other_with_it(berlin: World) -> None:
    await berlin.create(map={"consumers": [{"name": "a"}]})
    await berlin.settle()
    before = await berlin.data("ConfigMap", "berlin-derpmap-a")
    berlin.relays.faults["berlin-2"] = "TLS on port 8443 does not answer"
    await berlin.remove("ConfigMap", "berlin-derpmap")
    await berlin.settle()
    assert await berlin.data("ConfigMap", "berlin-derpmap-a") == before
    berlin.relays.faults.clear()
    assert condition(await berlin.settle())["status"] == "True"
    assert await berlin.data("ConfigMap", "berlin-derpmap-a") == before
    assert from_json((await berlin.data("ConfigMap", "berlin-derpmap"))[names.MAP_JSON])
