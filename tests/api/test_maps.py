"""The ConfigMaps that hold the DERP map, in all their forms, on a real API server."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator

import pytest
from derp_operator import names
from derp_operator.kube import ApiError, Object
from derp_operator.merge import LATER

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


# -- merged maps


@pytest.fixture
async def paris(berlin: World) -> World:
    """Another region in the same namespace."""
    return World(berlin.kube, berlin.namespace, "paris")


async def ready(*regions: World) -> None:
    """Both kinds of passes, until all is well."""
    for each in regions:
        await each.settle()
    await regions[0].merge()
    for each in regions:
        found = await each.settle()
        assert condition(found)["status"] == "True", condition(found)


async def test_regions_are_merged(berlin: World, paris: World) -> None:
    await berlin.create(map={"mergeInto": "all"})
    region = await berlin.settle()
    assert condition(region)["reason"] == "MapPending"
    assert "ConfigMap all will hold this region in a moment" in condition(region)["message"]
    await paris.create(regionID=910, map={"mergeInto": "all", "layout": "RegionPerNode"})
    await ready(berlin, paris)
    assert await order(berlin, "all") == {
        900: ["900a", "900b", "900c"],
        910: ["910a"],
        911: ["910b"],
        912: ["910c"],
    }
    assert (await berlin.region())["status"]["map"]["mergedInto"] == ["all"]
    whole = await berlin.get("ConfigMap", "all")
    owners = whole["metadata"]["ownerReferences"]
    assert [(each["name"], each.get("controller"), each.get("blockOwnerDeletion")) for each in owners] == [
        ("berlin", None, None),
        ("paris", None, None),
    ]
    recorder = Recorder(berlin.kube)
    assert await berlin.merge(recorder)
    assert recorder.writes == [], "a second pass writes nothing"

    await paris.change(map={"mergeInto": None})
    await ready(paris, berlin)
    assert list(await order(berlin, "all")) == [900]
    await berlin.change(map=None)
    await ready(berlin)
    assert await berlin.kube.get("ConfigMap", berlin.namespace, "all") is None
    assert await berlin.merge() is None


async def test_a_pod_goes_when_the_merged_map_is_without_it(berlin: World) -> None:
    await berlin.create(replicas=4, map={"mergeInto": "all", "spread": "0s"})
    await ready(berlin)
    await berlin.change(replicas=3)
    for _ in range(3):
        await berlin.reconcile()
    assert list((await order(berlin, "berlin-derpmap"))[900]) == ["900a", "900b", "900c"]
    assert (await berlin.get("StatefulSet", "berlin"))["spec"]["replicas"] == 4
    await berlin.merge()
    await berlin.reconcile()
    assert (await berlin.get("StatefulSet", "berlin"))["spec"]["replicas"] == 3


async def test_a_region_stays_while_its_spec_is_wrong_or_its_map_is_gone(berlin: World, paris: World) -> None:
    await berlin.create(map={"mergeInto": "all"})
    await paris.create(regionID=901, map={"mergeInto": "all"})
    await ready(berlin, paris)
    before = await berlin.data("ConfigMap", "all")
    berlin.relays.faults["berlin-0"] = "STUN on port 3478 does not answer"
    await berlin.remove("ConfigMap", "berlin-derpmap")
    await berlin.settle()
    recorder = Recorder(berlin.kube)
    await berlin.merge(recorder)
    assert recorder.writes == []
    assert await berlin.data("ConfigMap", "all") == before
    berlin.relays.faults.clear()
    await ready(berlin, paris)
    assert await berlin.data("ConfigMap", "all") == before

    damage = {"data": {names.MAP_JSON: "", names.MAP_YAML: ""}}
    await paris.kube.merge("ConfigMap", paris.namespace, "paris-derpmap", damage)
    await paris.merge()
    assert await berlin.data("ConfigMap", "all") == before

    await paris.remove(names.KIND, "paris")
    await berlin.merge()
    assert list(await order(berlin, "all")) == [900], "a region that is deleted leaves at once"


async def test_of_two_regions_with_one_id_the_first_stays(berlin: World, paris: World) -> None:
    await berlin.create(map={"layout": "RegionPerNode"})
    await paris.create(regionID=902, map={"mergeInto": "all"})
    await ready(berlin, paris)
    await berlin.change(map={"mergeInto": "all"})
    for _ in range(2):
        await berlin.settle()
        await berlin.merge()
    region = await berlin.settle()
    assert condition(region)["reason"] == "RegionIDTaken"
    assert "with DerpRegion paris, which was there before" in condition(region)["message"]
    assert condition(region, "Stalled")["status"] == "True"
    assert list(await order(berlin, "all")) == [902]
    assert condition(await paris.settle())["status"] == "True"
    await berlin.change(map={"firstRegionID": 950})
    await ready(berlin, paris)
    assert list(await order(berlin, "all")) == [902, 950, 951, 952]


@pytest.mark.parametrize("labels", [{}, names.MERGE_LABELS])
async def test_a_config_map_of_somebody_else_is_left_alone(berlin: World, labels: dict[str, str]) -> None:
    meta = {"name": "all", "namespace": berlin.namespace, "labels": labels}
    await berlin.kube.create({"apiVersion": "v1", "kind": "ConfigMap", "metadata": meta, "data": {"theirs": "1"}})
    before = await berlin.get("ConfigMap", "all")
    await berlin.create(map={"mergeInto": "all"})
    await berlin.settle()
    assert await berlin.merge() == LATER
    region = await berlin.settle()
    assert condition(region)["reason"] == "NameTaken"
    assert "ConfigMap all exists and is no merged map" in condition(region)["message"]
    assert await berlin.get("ConfigMap", "all") == before
    await berlin.remove("ConfigMap", "all")
    await ready(berlin)
    assert list(await order(berlin, "all")) == [900]


async def test_a_merged_map_is_repaired(berlin: World) -> None:
    await berlin.create(map={"mergeInto": "all"})
    await ready(berlin)
    before = await berlin.data("ConfigMap", "all")
    for change in (
        {"data": {names.MAP_JSON: "{}"}},
        {"metadata": {"labels": dict.fromkeys(names.MERGE_LABELS)}},
        {"metadata": {"annotations": {names.LEFT_OUT: '{"berlin": "x"}'}}},
    ):
        await berlin.kube.merge("ConfigMap", berlin.namespace, "all", change)
        await berlin.merge()
        whole = await berlin.get("ConfigMap", "all")
        assert await berlin.data("ConfigMap", "all") == before
        assert names.MERGE_LABELS.items() <= whole["metadata"]["labels"].items()
        assert condition(await berlin.settle())["status"] == "True"


async def test_a_late_write_conflicts(berlin: World, paris: World) -> None:
    """Two operators for a moment: the one that looked earlier must not undo what the other one wrote."""
    await berlin.create(map={"mergeInto": "all"})
    await ready(berlin)
    await paris.create(regionID=901, map={"mergeInto": "all"})
    await paris.settle()

    class Late(Recorder):
        async def apply(self, manifest: Object, subresource: str = "") -> Object:
            await paris.merge()
            return await super().apply(manifest, subresource)

    with pytest.raises(ApiError) as caught:
        await berlin.merge(Late(berlin.kube))
    assert caught.value.status == 409
    assert list(await order(berlin, "all")) == [900, 901]
