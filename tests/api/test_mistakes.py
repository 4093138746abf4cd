"""For every field that can be wrong although the schema lets it in: what the status says, that running relays and the
map are left alone, and that the region is well again as soon as the field is.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from typing import Any, NamedTuple

import pytest

from tests.unit.crdschema import schema
from tests.unit.test_crd import leaves

from .controlplane import ControlPlane
from .world import Recorder, World, condition, world


class Mistake(NamedTuple):
    """A value that the schema lets in, the reason that the status gives, and words of its sentence."""

    spec: dict[str, Any]
    reason: str
    words: str


def exposed(kind: str, **options: Any) -> dict[str, Any]:
    return {"exposure": {"type": kind, kind[0].lower() + kind[1:]: options}}


def templated(**tls: Any) -> dict[str, Any]:
    certificates = {"certificates": [{"secretName": "none"}]}
    return {"tls": {"hostName": "Template", "hostNameTemplate": "{pod}.example.com", **certificates, **tls}}


def keys(kind: str) -> dict[str, Any]:
    return {"clients": {"keysFrom": {f"{kind}KeyRef": {"name": "none", "key": "keys"}}}}


INVALID, REFUSED = "InvalidSpec", "ChildRefused"
LONG = "{pod}." + ".".join(["a" * 60] * 4) + ".com"
TERM = {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": [{"matchExpressions": [
    {"key": "a", "operator": "Exists", "values": ["b"]}]}]}}  # fmt: skip
SPREAD = {"maxSkew": 1, "topologyKey": "zone", "whenUnsatisfiable": "ScheduleAnyway", "minDomains": 2}

MISTAKES: Mapping[str, Mistake] = {
    "exposure.ipFamilies": Mistake(
        {"exposure": {"type": "NodePort", "ipFamilies": ["IPv6"]}}, REFUSED, "spec.clusterIPs[0]: Invalid value"
    ),
    "exposure.loadBalancer.loadBalancerClass": Mistake(
        exposed("LoadBalancer", loadBalancerClass="a b"), REFUSED, "spec.loadBalancerClass: Invalid value"
    ),
    "exposure.loadBalancer.annotations": Mistake(
        exposed("LoadBalancer", annotations={"a b": "c"}), REFUSED, "metadata.annotations: Invalid value"
    ),
    "exposure.nodePort.annotations": Mistake(
        exposed("NodePort", annotations={"a b": "c"}), REFUSED, "metadata.annotations: Invalid value"
    ),
    "exposure.clusterIP.annotations": Mistake(
        exposed("ClusterIP", annotations={"a b": "c"}), REFUSED, "metadata.annotations: Invalid value"
    ),
    "exposure.nodePort.addressType": Mistake(
        exposed("NodePort", addressType="ExternalIP"), "AddressUnusable", "has no ExternalIP"
    ),
    "exposure.nodePort.addressLabel": Mistake(
        exposed("NodePort", addressLabel="none"), "AddressUnusable", "has no label or annotation none"
    ),
    "exposure.hostPort.addressType": Mistake(
        exposed("HostPort", addressType="ExternalIP"), "AddressUnusable", "has no ExternalIP"
    ),
    "exposure.hostPort.addressLabel": Mistake(
        exposed("HostPort", addressLabel="none"), "AddressUnusable", "has no label or annotation none"
    ),
    "exposure.nodePort.derpPortBase": Mistake(
        exposed("NodePort", derpPortBase=80), REFUSED, "provided port is not in the valid range"
    ),
    "exposure.nodePort.stunPortBase": Mistake(
        exposed("NodePort", stunPortBase=80), REFUSED, "provided port is not in the valid range"
    ),
    "tls.hostNameTemplate": Mistake(templated(hostNameTemplate=LONG), INVALID, "which is not a DNS name"),
    "tls.certificates[].secretName": Mistake(templated(), "SecretNotFound", "Secret none, which spec.tls"),
    "clients.keysFrom.configMapKeyRef.name": Mistake(keys("configMap"), "ConfigMapNotFound", "ConfigMap none"),
    "clients.keysFrom.secretKeyRef.name": Mistake(keys("secret"), "SecretNotFound", "Secret none"),
    "nodes[].hostName": Mistake(
        templated() | {"nodes": [{"ordinal": 0, "hostName": "berlin-1.example.com"}]}, INVALID, "needs its own name"
    ),
    "nodes[].annotations": Mistake(
        {"nodes": [{"ordinal": 0, "annotations": {"a b": "c"}}]}, REFUSED, "metadata.annotations: Invalid value"
    ),
    "nodes[].derpNodePort": Mistake(
        {"nodes": [{"ordinal": 0, "derpNodePort": 30001}, {"ordinal": 1, "derpNodePort": 30001}]},
        INVALID,
        "node port 30001 is for derp of berlin-0 and for derp of berlin-1",
    ),
    "nodes[].stunNodePort": Mistake(
        {"nodes": [{"ordinal": 0, "stunNodePort": 80}]}, REFUSED, "provided port is not in the valid range"
    ),
    "nodes[].ipv4": Mistake(
        {"nodes": [{"ordinal": 0, "ipv4": "192.0.2.1"}, {"ordinal": 1, "ipv4": "192.0.2.1"}]},
        INVALID,
        "have the same address 192.0.2.1 and port",
    ),
    "nodes[].ipv6": Mistake(
        {"nodes": [{"ordinal": 0, "ipv6": "2001:db8::1"}, {"ordinal": 1, "ipv6": "2001:DB8::1"}]},
        INVALID,
        "have the same address 2001:db8::1 and port",
    ),
    "pod.resources": Mistake(
        {"pod": {"resources": {"requests": {"memory": "2Gi"}, "limits": {"memory": "1Gi"}}}},
        REFUSED,
        "must be less than or equal to memory limit",
    ),
    "pod.nodeSelector": Mistake({"pod": {"nodeSelector": {"a": "b c"}}}, REFUSED, "nodeSelector: Invalid value"),
    "pod.tolerations": Mistake(
        {"pod": {"tolerations": [{"operator": "Exists", "value": "a"}]}}, REFUSED, "tolerations[0].operator: Invalid"
    ),
    "pod.affinity": Mistake({"pod": {"affinity": {"nodeAffinity": TERM}}}, REFUSED, "may not be specified when"),
    "pod.priorityClassName": Mistake({"pod": {"priorityClassName": "a b"}}, REFUSED, "priorityClassName"),
    "pod.topologySpreadConstraints": Mistake(
        {"pod": {"topologySpreadConstraints": [SPREAD]}}, REFUSED, "topologySpreadConstraints[0].minDomains"
    ),
    "pod.runtimeClassName": Mistake({"pod": {"runtimeClassName": "a b"}}, REFUSED, "runtimeClassName: Invalid value"),
    "pod.env[].name": Mistake({"pod": {"env": [{"name": "a=b", "value": "c"}]}}, REFUSED, "env[1].name: Invalid value"),
    "pod.serviceAccountAnnotations": Mistake(
        {"pod": {"serviceAccountAnnotations": {"a b": "c"}}}, REFUSED, "metadata.annotations: Invalid value"
    ),
    "pod.annotations": Mistake(
        {"pod": {"annotations": {"a b": "c"}}}, REFUSED, "spec.template.annotations: Invalid value"
    ),
    "pod.labels": Mistake({"pod": {"labels": {"a": "b c"}}}, REFUSED, "spec.template.labels: Invalid value"),
    "override.statefulSet": Mistake({"override": {"statefulSet": {"spec": None}}}, INVALID, "sets spec.replicas"),
    "override.service": Mistake({"override": {"service": {"spec": {"type": "x"}}}}, INVALID, "sets spec.type"),
}

NEVER_WRONG = {
    "regionID", "regionCode", "regionName", "replicas", "paused", "imagePullPolicy", "imagePullSecrets",
    "imagePullSecrets[].name", "exposure", "exposure.type", "exposure.loadBalancer", "exposure.loadBalancer.derpPort",
    "exposure.loadBalancer.stunPort", "exposure.loadBalancer.externalTrafficPolicy",
    "exposure.loadBalancer.sourceRanges", "exposure.nodePort", "exposure.nodePort.externalTrafficPolicy",
    "exposure.hostPort", "exposure.hostPort.derpPort", "exposure.hostPort.stunPort", "exposure.clusterIP",
    "exposure.clusterIP.derpPort", "exposure.clusterIP.stunPort", "tls", "tls.hostName", "tls.certificates", "tls.pin",
    "clients", "clients.open", "clients.keysFrom", "clients.keysFrom.configMapKeyRef",
    "clients.keysFrom.secretKeyRef", "clients.failOpen", "nodes", "nodes[].ordinal", "nodes[].loadBalancerIP",
    "nodes[].derpPort", "nodes[].stunPort", "limits", "limits.acceptConnectionsPerSecond", "limits.acceptBurst",
    "limits.clientBytesPerSecond", "limits.clientBurstBytes", "map", "map.layout", "map.firstRegionID",
    "map.nodeOrder", "map.consumers", "map.consumers[].name", "map.consumers[].layout", "map.consumers[].nodeOrder",
    "map.latitude", "map.longitude", "map.noMeasureNoHome", "pod", "pod.workers", "pod.schedulerName",
    "mesh", "mesh.rotate", "tls.lifetime", "tls.renewBefore", "tls.retireAfter", "tls.rotate",
    "map.spread", "rebalance", "rebalance.clientsPerMinute",
    "pod.terminationGracePeriodSeconds", "pod.env", "pod.env[].value", "override",
}  # fmt: skip
"""Fields all of whose values that the schema lets in can be carried out, or have a row of their own above."""

ELSEWHERE = {
    "image": "tests/e2e/test_repair.py: a bad image",
    "map.mergeInto": "tests/api/test_maps.py",
    "map.consumers[].mergeInto": "the same",
    "clients.verifyURLs": "asked by the relays alone: tests/unit/test_admission_sources.py",
    "clients.keysFrom.configMapKeyRef.key": "tests/api/test_operator.py: a missing ConfigMap is named and heals",
    "clients.keysFrom.secretKeyRef.key": "the same",
}


def test_the_table_is_whole() -> None:
    fields = {path.lstrip(".") for path in leaves(schema()["properties"]["spec"], "")}
    assert MISTAKES.keys() | NEVER_WRONG | ELSEWHERE.keys() == fields
    assert not MISTAKES.keys() & NEVER_WRONG


@pytest.fixture
async def berlin(api: ControlPlane) -> AsyncIterator[World]:
    async with world(api) as found:
        yield found


async def rest(place: World) -> None:
    """Passes until the status rests; the operator may well try on."""
    for _ in range(20):
        before = await place.region()
        await place.reconcile()
        if not await place.play() and await place.region() == before:
            return
    raise AssertionError(f"never comes to rest: {await place.region()}")


@pytest.mark.parametrize("field", MISTAKES)
async def test_a_mistake_is_told_and_heals(berlin: World, field: str) -> None:
    mistake = MISTAKES[field]
    await berlin.create()
    assert condition(await berlin.settle())["status"] == "True"
    derpmap = await berlin.data("ConfigMap", "berlin-derpmap")
    await berlin.replace(**mistake.spec)
    await rest(berlin)
    region = await berlin.region()
    ready = condition(region)
    assert (ready["status"], ready["reason"]) == ("False", mistake.reason), ready
    assert mistake.words in ready["message"]
    assert ready["observedGeneration"] == region["metadata"]["generation"]
    assert await berlin.data("ConfigMap", "berlin-derpmap") == derpmap
    assert len(await berlin.pods()) == 3
    await berlin.replace()
    assert condition(await berlin.settle())["status"] == "True"
    recorder = Recorder(berlin.kube)
    await berlin.reconcile(recorder)
    assert recorder.writes == []
