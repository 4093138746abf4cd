"""`spec.paused`: the status goes on telling the truth, and nothing else is written."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
from derp_operator import names

from .controlplane import ControlPlane
from .world import Recorder, World, condition, world


@pytest.fixture
async def berlin(api: ControlPlane) -> AsyncIterator[World]:
    async with world(api) as found:
        yield found


async def written(place: World) -> set[str]:
    """What a few passes write, by verb."""
    recorder = Recorder(place.kube)
    for _ in range(3):
        await place.reconcile(recorder)
    return {verb for verb, kind, _ in recorder.writes if kind != "Event"}


async def test_a_region_that_is_fine_stays_ready(berlin: World) -> None:
    await berlin.create()
    await berlin.settle()
    await berlin.change(paused=True)
    assert await written(berlin) == {"status"}
    region = await berlin.region()
    assert region["status"]["observedGeneration"] == region["metadata"]["generation"]
    ready = condition(region)
    assert (ready["status"], ready["reason"]) == ("True", "Paused")
    assert "until spec.paused is removed. Nothing waits." in ready["message"]
    assert condition(region, "Progressing")["status"] == "False"
    assert ("Normal", "Paused") in await berlin.events()
    assert await written(berlin) == set()
    await berlin.change(paused=None)
    assert condition(await berlin.settle())["reason"] == "AllNodesReady"


async def test_whatever_happens_is_told_and_left_alone(berlin: World) -> None:
    await berlin.create()
    await berlin.settle()
    derpmap = await berlin.data("ConfigMap", "berlin-derpmap")
    stateful_set = await berlin.get("StatefulSet", "berlin")
    await berlin.change(paused=True, replicas=4, image="localhost/other:1", regionName="Other")
    await berlin.remove("Service", "berlin-1")
    await berlin.remove("PodDisruptionBudget", "berlin")
    await berlin.kube.merge("ConfigMap", berlin.namespace, "berlin-settings", {"data": {"settings.json": "{}"}})
    await berlin.stop("berlin-2")
    assert await written(berlin) == {"status"}
    region = await berlin.region()
    ready = condition(region)
    assert (ready["status"], ready["reason"]) == ("False", "Paused")
    for waits in ("PodDisruptionBudget berlin", "Service berlin-1", "Service berlin-3", "StatefulSet berlin"):
        assert waits in ready["message"]
    assert "Pod berlin-2 is not there" in ready["message"]
    assert region["status"]["inMap"] == "3/4"
    assert await berlin.data("ConfigMap", "berlin-derpmap") == derpmap
    assert await berlin.get("StatefulSet", "berlin") == stateful_set
    await berlin.change(paused=False)
    region = await berlin.settle()
    assert (condition(region)["status"], region["status"]["inMap"]) == ("True", "4/4")


async def test_what_is_no_longer_wanted_stays(berlin: World) -> None:
    await berlin.create()
    await berlin.settle()
    owner = (await berlin.get("Service", "berlin-0"))["metadata"]["ownerReferences"]
    meta = {"name": "berlin-old", "namespace": berlin.namespace, "ownerReferences": owner}
    old = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": meta | {"labels": names.labels("berlin")}}
    await berlin.kube.create(old)
    await berlin.change(paused=True)
    assert await written(berlin) == {"status"}
    assert "Waiting: ConfigMap berlin-old." in condition(await berlin.region())["message"]
    await berlin.get("ConfigMap", "berlin-old")
    await berlin.change(paused=False)
    await berlin.settle()
    assert await berlin.kube.get("ConfigMap", berlin.namespace, "berlin-old") is None


async def test_a_region_may_begin_paused(berlin: World) -> None:
    await berlin.create(paused=True)
    assert await written(berlin) == {"status"}
    region = await berlin.region()
    assert (condition(region)["status"], condition(region)["reason"]) == ("False", "Paused")
    assert await berlin.kube.get("Secret", berlin.namespace, "berlin-keys") is None
    await berlin.change(paused=False)
    assert condition(await berlin.settle())["status"] == "True"


async def test_a_lost_secret_is_told_as_ever(berlin: World) -> None:
    await berlin.create()
    await berlin.settle()
    await berlin.remove("Secret", "berlin-keys")
    await berlin.change(paused=True)
    assert await written(berlin) == {"status"}
    assert "restore" in condition(await berlin.region(), "Degraded")["message"].lower()
