"""The API server in memory, on which the reconciler's proof stands, does what the real one does."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from datetime import UTC, datetime
from typing import Any

import pytest
from derp_operator import names
from derp_operator.diff import in_force
from derp_operator.kube import ApiError, Object

from tests.unit import fakeworld
from tests.unit.fakeapi import FakeApi
from tests.unit.specs import BASE, Spec

from .controlplane import ControlPlane
from .world import World, world

WALK: list[Spec] = [
    BASE,
    {**BASE, "replicas": 5, "exposure": {"type": "NodePort"}, "pod": {"resources": {"requests": {"cpu": "1000m"}}}},
    {
        **BASE,
        "exposure": {"type": "HostPort"},
        "tls": {"hostName": "Address"},
        "imagePullSecrets": [{"name": "a"}, {"name": "b"}],
        "pod": {"tolerations": [{"operator": "Exists"}], "labels": {"a": "b"}, "nodeSelector": {"a": "b"}},
    },
    {
        **BASE,
        "clients": {"keysFrom": {"configMapKeyRef": {"name": "people", "key": "keys"}}},
        "exposure": {
            "type": "LoadBalancer",
            "loadBalancer": {"annotations": {"a": "b"}, "sourceRanges": ["192.0.2.0/24"]},
        },
        "map": {"consumers": [{"name": "one"}]},
        "imagePullSecrets": [{"name": "b"}],
    },
    BASE,
]


class Capture(fakeworld.Tap):
    """Notes what is applied."""

    def __init__(self, place: fakeworld.World, applied: list[Object]) -> None:
        super().__init__(place.api, place.writes)
        self._applied = applied

    async def apply(self, manifest: Object, subresource: str = "") -> Object:
        if not subresource:
            self._applied.append(manifest)
        return await super().apply(manifest, subresource)


async def applied(walk: list[Spec]) -> list[Object]:
    """All that the operator applies on a walk over specs."""
    found: list[Object] = []
    place = fakeworld.World()
    for spec in walk:
        await place.want(spec)
        await place.settle(Capture(place, found))
    return found


@pytest.fixture
async def berlin(api: ControlPlane) -> AsyncIterator[World]:
    async with world(api) as found:
        yield found


def plain(manifest: Object, namespace: str) -> Object:
    """For any object of this name."""
    meta = {key: value for key, value in manifest["metadata"].items() if key not in ("uid", "resourceVersion")}
    return {**manifest, "metadata": {**meta, "namespace": namespace}}


def owned(item: Object) -> Any:
    """What the operator owns, as the server records it."""
    return [
        record["fieldsV1"]
        for record in item["metadata"]["managedFields"]
        if (record["manager"], record["operation"]) == (names.MANAGER, "Apply")
    ]


async def test_the_same_writes_give_the_same_fields(berlin: World) -> None:
    fake = FakeApi(lambda: datetime.now(UTC))
    manifests = await applied(WALK)
    assert len(manifests) > 40
    for manifest in manifests:
        manifest = plain(manifest, berlin.namespace)
        real, made = await berlin.kube.apply(manifest), await fake.apply(manifest)
        what = manifest["kind"], manifest["metadata"]["name"]
        assert owned(real) == owned(made), what
        assert in_force(manifest, real, names.MANAGER), what
        assert in_force(manifest, made, names.MANAGER), what
        assert _values(manifest, real) == _values(manifest, made), what
        again = await berlin.kube.apply(manifest), await fake.apply(manifest)
        assert [item["metadata"]["resourceVersion"] for item in again] == [
            item["metadata"]["resourceVersion"] for item in (real, made)
        ]


def _values(manifest: Object, item: Object) -> Any:
    """The parts that the operator applies, where nobody chooses for it."""
    found: Object = {key: item.get(key) for key in ("data", "type") if key in manifest}
    if manifest["kind"] == "StatefulSet":
        spec = item["spec"]["template"]["spec"]
        found |= {"mounts": spec["containers"][0]["volumeMounts"], "pull": spec.get("imagePullSecrets")}
        found |= {
            "volumes": [volume["name"] for volume in spec["volumes"]],
            "labels": item["spec"]["template"]["metadata"],
        }
        found["resources"] = spec["containers"][0]["resources"]
    if manifest["kind"] == "Service":
        found |= {key: item["spec"].get(key) for key in manifest["spec"] if key not in ("ports", "clusterIP")}
    return found


async def outcomes(api: Any, namespace: str) -> list[Any]:
    """What an API server says to writes with preconditions: a status for each that is refused."""
    found: list[Any] = []
    meta: Object = {"name": "x", "namespace": namespace, "labels": {"a": "b", "c": "d"}}
    config: Object = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": meta, "data": {"one": "1", "two": "2"}}

    async def tried(name: str, call: Any) -> Object:
        try:
            answer: Object = await call
        except ApiError as error:
            found.append((name, error.status))
            return {}
        found.append((name, answer and answer.get("data")))
        return answer

    def with_meta(**more: Any) -> Object:
        return {**config, "metadata": {**meta, **more}}

    await tried("uid of none", api.apply(with_meta(uid="nobody")))
    made = await tried("create by version", api.apply(with_meta(resourceVersion="1")))
    await tried("exists", api.apply(with_meta(resourceVersion="1")))
    await tried("create", api.create(config))
    await tried("other uid", api.apply(with_meta(uid="11111111-1111-1111-1111-111111111111")))
    await tried("its uid", api.apply(with_meta(uid=made["metadata"]["uid"]) | {"data": {"one": "9"}}))
    await tried("old version", api.apply(with_meta(resourceVersion=made["metadata"]["resourceVersion"])))
    await api.delete("ConfigMap", namespace, "x", "another")
    await tried("edit", api.merge("ConfigMap", namespace, "x", {"data": {"one": "5", "three": "3"}}))
    await tried("force", api.apply(config))
    await tried("less", api.apply(with_meta(labels={"a": "b"}) | {"data": {"two": "2"}}))
    await tried("missing", api.merge("ConfigMap", namespace, "y", {"data": {}}))
    item = await api.get("ConfigMap", namespace, "x")
    found.append(item["metadata"]["labels"])
    await api.delete("ConfigMap", namespace, "x", item["metadata"]["uid"])
    found.append(await api.get("ConfigMap", namespace, "x"))
    return found


async def test_preconditions_and_ownership_are_the_same(berlin: World) -> None:
    fake = FakeApi(lambda: datetime.now(UTC))
    assert await outcomes(fake, berlin.namespace) == await outcomes(berlin.kube, berlin.namespace)


async def test_what_kubernetes_does_not_let_change_is_the_same(berlin: World) -> None:
    manifests = {}
    for manifest in await applied([BASE]):
        manifests[manifest["kind"]] = plain(manifest, berlin.namespace)
    changes: list[tuple[str, Mapping[str, Any]]] = [
        ("StatefulSet", {"serviceName": "other"}),
        ("StatefulSet", {"podManagementPolicy": "OrderedReady"}),
        ("Service", {"loadBalancerClass": "example.com/other"}),
        ("Service", {"ipFamilyPolicy": "SingleStack", "ipFamilies": ["IPv6"]}),
    ]
    for kind, change in changes:
        refused = []
        for api in (berlin.kube, FakeApi(lambda: datetime.now(UTC))):
            await api.apply(manifests[kind])
            with pytest.raises(ApiError) as error:
                await api.apply({**manifests[kind], "spec": {**manifests[kind]["spec"], **change}})
            refused.append(error.value.status)
        assert refused[0] == refused[1], (kind, change)
