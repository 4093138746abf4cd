"""`spec.override` before a real API server: it settles, goes away again, and what is refused is told."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest

from .controlplane import ControlPlane
from .world import Recorder, World, condition, world

SPEC: dict[str, Any] = {
    "dnsPolicy": "Default",
    "securityContext": {"runAsGroup": {"$patch": "delete"}, "supplementalGroups": [4]},
    "containers": [
        {"name": "sidecar", "image": "sidecar:1", "resources": {"requests": {"cpu": "1000m"}}},
        {
            "name": "derper",
            "env": [{"name": "SECRET", "valueFrom": {"secretKeyRef": {"name": "a", "key": "b"}}}],
            "volumeMounts": [{"name": "cache", "mountPath": "/cache"}],
            "readinessProbe": {"timeoutSeconds": 5},
        },
    ],
    "volumes": [{"name": "cache", "emptyDir": {"sizeLimit": "1024Mi"}}],
    "hostAliases": [{"ip": "192.0.2.1", "hostnames": ["a.example.com"]}],
}
META = {"labels": {"team": "net"}, "annotations": {"example.com/a": "b"}}
OVERRIDE = {
    "statefulSet": {"metadata": META, "spec": {"template": {"metadata": META, "spec": SPEC}}},
    "service": {"metadata": META, "spec": {"sessionAffinity": "ClientIP", "internalTrafficPolicy": "Local"}},
}


@pytest.fixture
async def berlin(api: ControlPlane) -> AsyncIterator[World]:
    async with world(api) as found:
        yield found


async def writes(place: World) -> list[tuple[str, str, str]]:
    recorder = Recorder(place.kube)
    await place.reconcile(recorder)
    return recorder.writes


async def test_a_patch_comes_and_goes(berlin: World) -> None:
    await berlin.create()
    await berlin.settle()
    before = {kind: await berlin.get(kind, name) for kind, name in (("StatefulSet", "berlin"), ("Service", "berlin-0"))}
    await berlin.change(override=OVERRIDE)
    assert condition(await berlin.settle())["status"] == "True"
    assert await writes(berlin) == []
    stateful_set, service = await berlin.get("StatefulSet", "berlin"), await berlin.get("Service", "berlin-0")
    pod = stateful_set["spec"]["template"]["spec"]
    assert (pod["dnsPolicy"], pod["securityContext"].get("runAsGroup")) == ("Default", None)
    assert [item["name"] for item in pod["containers"]] == ["derper", "sidecar"]
    assert pod["containers"][0]["readinessProbe"]["timeoutSeconds"] == 5
    assert service["spec"]["sessionAffinity"] == "ClientIP"
    for item in (stateful_set, service):
        assert item["metadata"]["labels"]["team"] == "net"
    await berlin.change(override=None)
    assert condition(await berlin.settle())["status"] == "True"
    for kind, item in before.items():
        assert (await berlin.get(kind, item["metadata"]["name"]))["spec"] == item["spec"]
    assert await writes(berlin) == []


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ({"noSuchField": 1}, "noSuchField"),
        ({"dnsPolicy": 5}, "dnsPolicy"),
        ({"dnsPolicy": "Never"}, "Unsupported value"),
        ({"containers": [{"name": "sidecar"}]}, "image: Required value"),
    ],
)
async def test_what_the_api_server_does_not_take_is_told_and_heals(
    berlin: World, spec: dict[str, Any], words: str
) -> None:
    await berlin.create()
    await berlin.settle()
    before = await berlin.get("StatefulSet", "berlin")
    await berlin.change(override={"statefulSet": {"spec": {"template": {"spec": spec}}}})
    for _ in range(3):
        await berlin.reconcile()
    refused = condition(await berlin.region())
    assert refused["reason"] == "ChildRefused"
    assert words in refused["message"]
    assert await berlin.get("StatefulSet", "berlin") == before
    await berlin.change(override=None)
    assert condition(await berlin.settle())["status"] == "True"


async def test_what_the_operator_relies_on_is_told_and_heals(berlin: World) -> None:
    await berlin.create()
    await berlin.settle()
    await berlin.change(override={"service": {"spec": {"selector": {"a": "b"}}}}, replicas=4)
    region = await berlin.settle()
    assert condition(region)["reason"] == "InvalidSpec"
    assert "spec.override.service sets spec.selector" in condition(region)["message"]
    assert (await berlin.get("StatefulSet", "berlin"))["spec"]["replicas"] == 3
    await berlin.change(override=None)
    assert (await berlin.settle())["status"]["inMap"] == "4/4"
