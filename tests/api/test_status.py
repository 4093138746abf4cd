"""Does the status tell the truth, also in the pass that changes something and in the one that may not?"""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator

import pytest
from derp_operator import names

from derper.derpmap import from_json

from .controlplane import ControlPlane
from .world import World, condition, world


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
