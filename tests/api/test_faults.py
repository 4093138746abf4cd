"""The operator interrupted at every write, and led in circles: the result is the same as from a calm start."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from typing import Any

import pytest
from derp_operator import names
from derp_operator.apply import KINDS
from derp_operator.kube import ApiError, Cluster, Object

from derper.derpmap import from_json

from .controlplane import ControlPlane
from .world import Recorder, World, condition, world

SPEC: dict[str, Any] = {"exposure": {"type": "ClusterIP"}}
VOLATILE = {
    "uid", "resourceVersion", "creationTimestamp", "managedFields", "generation", "namespace", "clusterIP",
    "clusterIPs", "nodePort", "status", names.PINNED_SINCE,
}  # fmt: skip
FAULTS = [(500, False), (0, True)]


@pytest.fixture
async def berlin(api: ControlPlane) -> AsyncIterator[World]:
    async with world(api) as found:
        yield found


async def snapshot(place: World) -> dict[str, Any]:
    """The children without what differs between any two objects; keys, pins and addresses by their presence alone."""
    found = {}
    for kind in KINDS:
        for item in await place.kube.list(kind, place.namespace, names.labels(place.name)):
            shown = _masked(item, place)
            if kind in ("Secret", "ConfigMap"):
                shown["data"] = sorted(shown["data"])
            found[f"{kind} {item['metadata']['name']}"] = shown
    region = await place.region()
    found["region"] = {
        "conditions": [(item["type"], item["status"], item["reason"]) for item in region["status"]["conditions"]],
        "nodes": [(node["name"], node["inMap"], node["mesh"]) for node in region["status"]["nodes"]],
    }
    return found


def _masked(value: Any, place: World) -> Any:
    if isinstance(value, Mapping):
        return {key: _masked(item, place) for key, item in value.items() if key not in VOLATILE}
    return [_masked(item, place) for item in value] if isinstance(value, list) else value


async def writes_of_a_calm_start(api: ControlPlane) -> int:
    async with world(api) as place:
        await place.create(**SPEC)
        recorder = Recorder(place.kube)
        await _settle_through(place, recorder)
        return len(recorder.writes)


async def _settle_through(place: World, recorder: Recorder) -> None:
    """The first passes up to a settled region, through `recorder`."""
    while True:
        before = len(recorder.writes)
        try:
            await place.reconcile(recorder)
        except ApiError:
            continue  # what the queue does, without the wait
        if not await place.play() and len(recorder.writes) == before:
            return


@pytest.mark.parametrize(("status", "lost"), FAULTS)
async def test_a_fault_at_any_write_changes_nothing_in_the_end(
    api: ControlPlane, berlin: World, status: int, lost: bool
) -> None:
    await berlin.create(**SPEC)
    await berlin.settle()
    calm = await snapshot(berlin)
    total = await writes_of_a_calm_start(api)
    assert total > 15
    for number in range(1, total + 1):
        async with world(api) as place:
            await place.create(**SPEC)
            recorder = Recorder(place.kube, fail_at=number, status=status, lost=lost)
            await _settle_through(place, recorder)
            await place.settle()
            assert await snapshot(place) == calm, f"after a fault at write {number}: {recorder.writes[number - 1]}"


class Delayed(Recorder):
    """The first write of the Secret is carried out later than its answer was waited for."""

    def __init__(self, cluster: Cluster) -> None:
        super().__init__(cluster)
        self.delayed: Object | None = None

    async def apply(self, manifest: Object, subresource: str = "") -> Object:
        if manifest["kind"] == "Secret" and self.delayed is None:
            self.delayed = manifest
            raise ApiError(0, "Injected", "no answer in time")
        return await super().apply(manifest, subresource)


async def test_keys_that_come_late_replace_none(berlin: World) -> None:
    await berlin.create(**SPEC)
    slow = Delayed(berlin.kube)
    with pytest.raises(ApiError):
        await berlin.reconcile(slow)
    await berlin.settle()
    keys = await berlin.data("Secret", "berlin-keys")
    assert slow.delayed
    with pytest.raises(ApiError) as refused:
        await berlin.kube.apply(slow.delayed)
    assert refused.value.status == 409
    assert await berlin.data("Secret", "berlin-keys") == keys


async def test_a_namesake_that_comes_in_between_is_not_taken_over(berlin: World) -> None:
    class Late(Recorder):
        async def apply(self, manifest: Object, subresource: str = "") -> Object:
            if manifest["kind"] == "ServiceAccount":
                meta = {key: manifest["metadata"][key] for key in ("name", "namespace")}
                await berlin.kube.create({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": meta})
            return await super().apply(manifest, subresource)

    await berlin.create(**SPEC)
    with pytest.raises(ApiError):
        await berlin.reconcile(Late(berlin.kube))
    assert condition(await berlin.settle())["reason"] == "NameTaken"
    assert "ownerReferences" not in (await berlin.get("ServiceAccount", "berlin"))["metadata"]


OTHERS: list[dict[str, Any]] = [
    {"replicas": 5},
    {"exposure": {"type": "HostPort"}},
    {"exposure": {"type": "LoadBalancer", "loadBalancer": {"sourceRanges": ["192.0.2.0/24"]}}},
    {"exposure": {"type": "NodePort", "nodePort": {"derpPortBase": 30060}}},
    {"tls": {"hostName": "Address"}},
    {"tls": {"hostName": "Template", "hostNameTemplate": "{pod}.example.com", "certificates": [{"secretName": "no"}]}},
    {"clients": {"keysFrom": {"configMapKeyRef": {"name": "no", "key": "keys"}}}},
    {"image": "localhost/other:1", "pod": {"nodeSelector": {"a": "b"}, "tolerations": [{"operator": "Exists"}]}},
    {"limits": {"clientBytesPerSecond": 1000}, "map": {"latitude": 1, "longitude": 2}, "regionName": "Elsewhere"},
]


@pytest.mark.parametrize("other", OTHERS, ids=lambda other: "-".join(other))
async def test_there_and_back_is_as_never_gone(berlin: World, other: dict[str, Any]) -> None:
    await berlin.create(**SPEC)
    await berlin.settle()
    fresh = await snapshot(berlin)
    keys = await berlin.data("Secret", "berlin-keys")
    identities = await _identities(berlin)
    await berlin.replace(**(SPEC | other))
    await berlin.settle()
    await berlin.replace(**SPEC)
    await berlin.settle()
    back = await snapshot(berlin)
    secret = back["Secret berlin-keys"]
    secret["data"] = [entry for entry in secret["data"] if entry in fresh["Secret berlin-keys"]["data"]]
    assert back == fresh
    after = await berlin.data("Secret", "berlin-keys")
    assert {entry: after[entry] for entry in keys} == keys, "keys are kept, whatever the spec says meanwhile"
    assert await _identities(berlin) == identities
    assert condition(await berlin.region())["status"] == "True"


async def _identities(place: World) -> list[tuple[str, str, str]]:
    """What clients know the nodes by.  A Service that was away for a while comes back with another address."""
    derpmap = from_json((await place.data("ConfigMap", "berlin-derpmap"))[names.MAP_JSON])
    return [(node.name, node.host_name, node.cert_name) for node in derpmap.regions[900].nodes]
