"""The operator's passes against a real API server; pods and relays are played by the test."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from datetime import timedelta
from typing import Any

import pytest
from derp_operator import names

from derper.derpmap import from_json, from_yaml, lint

from .controlplane import ControlPlane
from .world import Recorder, World, condition, world

CHILDREN = [
    ("ServiceAccount", "berlin"),
    ("NetworkPolicy", "berlin"),
    ("PodDisruptionBudget", "berlin"),
    ("Secret", "berlin-keys"),
    ("ConfigMap", "berlin-settings"),
    ("Service", "berlin-mesh"),
    ("Service", "berlin-0"),
    ("Service", "berlin-1"),
    ("Service", "berlin-2"),
    ("ConfigMap", "berlin-derpmap"),
    ("StatefulSet", "berlin"),
]


@pytest.fixture
async def berlin(api: ControlPlane) -> AsyncIterator[World]:
    async with world(api) as found:
        yield found


async def test_a_region_becomes_ready(berlin: World) -> None:
    await berlin.create(replicas=3)
    region = await berlin.settle()
    status = region["status"]
    assert condition(region)["status"] == "True", status
    assert condition(region, "Progressing")["status"] == "False"
    assert condition(region, "Degraded")["status"] == "False"
    assert status["observedGeneration"] == region["metadata"]["generation"]
    assert (status["replicas"], status["readyReplicas"], status["inMap"]) == (3, 3, "3/3")
    assert [node["mesh"] for node in status["nodes"]] == ["2/2"] * 3
    for kind, name in CHILDREN:
        child = await berlin.get(kind, name)
        assert child["metadata"]["ownerReferences"][0]["uid"] == region["metadata"]["uid"]
    assert "finalizers" not in region["metadata"]
    assert "annotations" not in region["metadata"]


async def test_the_map_is_whole_in_both_forms(berlin: World) -> None:
    await berlin.create(regionName="Berlin", regionCode="ber", map={"latitude": 52.5, "longitude": 13.4})
    await berlin.settle()
    data = await berlin.data("ConfigMap", "berlin-derpmap")
    derpmap = from_json(data[names.MAP_JSON])
    assert derpmap == from_yaml(data[names.MAP_YAML])
    assert lint(derpmap) == []
    nodes = derpmap.regions[900].nodes
    assert [node.name for node in nodes] == ["900a", "900b", "900c"]
    assert [node.ipv4 for node in nodes] == ["198.18.255.11", "198.18.255.12", "198.18.255.13"]
    for number, node in enumerate(nodes):
        service = await berlin.get("Service", f"berlin-{number}")
        ports = {port["name"]: port["nodePort"] for port in service["spec"]["ports"]}
        assert (node.derp_port, node.stun_port) == (ports["derp"], ports["stun"])
        target = berlin.relays.asked[f"berlin-{number}"]
        assert (target.host_name, target.pin) == (node.host_name, node.cert_name)


async def test_a_second_pass_writes_nothing(berlin: World) -> None:
    spread = {"maxSkew": 1, "topologyKey": "topology.kubernetes.io/zone", "whenUnsatisfiable": "ScheduleAnyway"}
    pod = {
        "resources": {"requests": {"cpu": "1000m"}, "limits": {"memory": "1024Mi"}},
        "topologySpreadConstraints": [spread],
        "schedulerName": "other",
        "terminationGracePeriodSeconds": 90,
        "env": [{"name": "HTTPS_PROXY", "value": "http://proxy.example.com"}, {"name": "EMPTY", "value": ""}],
        "serviceAccountAnnotations": {"example.com/a": "b"},
    }
    await berlin.create(pod=pod)
    await berlin.settle()
    recorder = Recorder(berlin.kube)
    await berlin.reconcile(recorder)
    assert recorder.writes == []


@pytest.mark.parametrize("exposure", ["LoadBalancer", "NodePort", "HostPort", "ClusterIP"])
async def test_every_exposure_settles(berlin: World, exposure: str) -> None:
    await berlin.create(exposure={"type": exposure})
    region = await berlin.settle()
    if exposure == "LoadBalancer":
        assert condition(region)["reason"] == "AddressPending"
        for number in range(3):
            ingress = [{"ip": f"198.18.9.{number}", "ipMode": "VIP"}]
            await berlin.patch_status("Service", f"berlin-{number}", {"loadBalancer": {"ingress": ingress}})
        region = await berlin.settle()
    assert condition(region)["status"] == "True", condition(region)
    derpmap = from_json((await berlin.data("ConfigMap", "berlin-derpmap"))[names.MAP_JSON])
    assert lint(derpmap) == []
    assert len(derpmap.regions[900].nodes) == 3


@pytest.mark.parametrize("child", [item for item in CHILDREN if item[0] != "Secret"])
async def test_a_deleted_child_comes_back(berlin: World, child: tuple[str, str]) -> None:
    await berlin.create()
    await berlin.settle()
    before = from_json((await berlin.data("ConfigMap", "berlin-derpmap"))[names.MAP_JSON])
    await berlin.remove(*child)
    region = await berlin.settle()
    await berlin.get(*child)
    assert condition(region)["status"] == "True", condition(region)
    after = from_json((await berlin.data("ConfigMap", "berlin-derpmap"))[names.MAP_JSON])
    pins = [[node.cert_name for node in each.regions[900].nodes] for each in (before, after)]
    assert pins[0] == pins[1]


async def test_edited_children_are_repaired_and_foreign_fields_stay(berlin: World) -> None:
    await berlin.create()
    await berlin.settle()
    kube, space = berlin.kube, berlin.namespace
    edits: dict[tuple[str, str], dict[str, Any]] = {
        ("Service", "berlin-0"): {"spec": {"publishNotReadyAddresses": False}},
        ("PodDisruptionBudget", "berlin"): {"spec": {"maxUnavailable": 3}},
        ("ConfigMap", "berlin-settings"): {"data": {"settings.json": "{}", "mine": "kept"}},
        ("ConfigMap", "berlin-derpmap"): {"data": {"derpmap.yaml": "regions: {}"}},
        ("NetworkPolicy", "berlin"): {"spec": {"ingress": []}},
        ("StatefulSet", "berlin"): {"metadata": {"labels": {"app.kubernetes.io/managed-by": "somebody"}}},
    }
    before = {key: await berlin.get(*key) for key in edits}
    for (kind, name), patch in edits.items():
        await kube._request(  # as another manager: a field that two managers own is not ours to remove
            "PATCH",
            f"{_path(kind)}/namespaces/{space}/{_plural(kind)}/{name}",
            {"fieldManager": "kubectl-edit"},
            patch,
            "application/merge-patch+json",
        )
    await berlin.settle()
    for key in edits:
        after = await berlin.get(*key)
        for part in ("spec", "data"):
            ours = {k: v for k, v in after.get(part, {}).items() if k != "mine"}
            assert ours == before[key].get(part, {}), key
        assert after["metadata"]["labels"] == before[key]["metadata"]["labels"]
    assert (await berlin.data("ConfigMap", "berlin-settings"))["mine"] == b"kept"


def _path(kind: str) -> str:
    groups = {"PodDisruptionBudget": "policy", "NetworkPolicy": "networking.k8s.io", "StatefulSet": "apps"}
    return f"apis/{groups[kind]}/v1" if kind in groups else "api/v1"


def _plural(kind: str) -> str:
    return {"NetworkPolicy": "networkpolicies"}.get(kind, kind.lower() + "s")


@pytest.mark.parametrize(
    "child", [("ConfigMap", "berlin-derpmap"), ("Secret", "berlin-keys"), ("ServiceAccount", "berlin")]
)
async def test_a_namesake_is_never_taken_over(berlin: World, child: tuple[str, str]) -> None:
    kind, name = child
    labels = names.labels("berlin") if kind == "ConfigMap" else {}  # labels do not make it ours
    foreign = {
        "apiVersion": "v1",
        "kind": kind,
        "metadata": {"name": name, "namespace": berlin.namespace, "labels": labels},
    }
    before = await berlin.kube.create(foreign)
    await berlin.create()
    region = await berlin.settle()
    assert condition(region)["reason"] == "NameTaken"
    assert f"{kind} {name}" in condition(region)["message"]
    assert condition(region, "Stalled")["status"] == "True"
    after = await berlin.get(kind, name)
    assert after == before
    assert await berlin.kube.get("StatefulSet", berlin.namespace, "berlin") is None
    await berlin.remove(kind, name)
    assert condition(await berlin.settle())["status"] == "True"


@pytest.mark.parametrize(
    ("kind", "group", "name", "spec"),
    [
        ("Service", "v1", "berlin-1", {"type": "NodePort", "ports": [{"port": 443, "name": "derp"}]}),
        ("Service", "v1", "berlin-3", {"type": "NodePort", "ports": [{"port": 443, "name": "derp"}]}),
        ("PodDisruptionBudget", "policy/v1", "berlin", {"maxUnavailable": 2}),
        ("NetworkPolicy", "networking.k8s.io/v1", "berlin", {"podSelector": {}}),
    ],
)
async def test_a_namesake_on_which_nothing_relies_stops_nothing_else(
    berlin: World, kind: str, group: str, name: str, spec: dict[str, Any]
) -> None:
    await berlin.create()
    await berlin.settle()
    if await berlin.kube.get(kind, berlin.namespace, name):
        await berlin.remove(kind, name)
    meta = {"name": name, "namespace": berlin.namespace}
    before = await berlin.kube.create({"apiVersion": group, "kind": kind, "metadata": meta, "spec": spec})
    derpmap = from_json((await berlin.data("ConfigMap", "berlin-derpmap"))[names.MAP_JSON])
    await berlin.change(replicas=4)
    region = await berlin.settle()
    assert (condition(region)["status"], condition(region)["reason"]) == ("False", "NameTaken")
    assert f"{kind} {name} exists and does not belong to this region" in condition(region)["message"]
    assert condition(region, "Stalled")["status"] == "True"
    assert region["status"]["inMap"] == ("3/4" if name == "berlin-3" else "4/4")
    after = from_json((await berlin.data("ConfigMap", "berlin-derpmap"))[names.MAP_JSON])
    assert after.regions[900].nodes[:3] == derpmap.regions[900].nodes
    found = await berlin.get(kind, name)
    assert (found["spec"], found["metadata"].get("labels")) == (before["spec"], None)
    await berlin.remove(kind, name)
    region = await berlin.settle()
    assert (condition(region)["status"], region["status"]["inMap"]) == ("True", "4/4")


async def test_scaling_writes_in_the_order_that_clients_need(berlin: World) -> None:
    await berlin.create(replicas=3)
    before = await berlin.settle()
    template = (await berlin.get("StatefulSet", "berlin"))["spec"]["template"]
    await berlin.change(replicas=5)
    up = Recorder(berlin.kube)
    await berlin.reconcile(up)
    applied = [(kind, name) for verb, kind, name in up.writes if verb == "apply"]
    assert applied == [
        ("Secret", "berlin-keys"),
        ("ConfigMap", "berlin-settings"),
        ("Service", "berlin-3"),
        ("Service", "berlin-4"),
        ("StatefulSet", "berlin"),
    ]
    region = await berlin.settle()
    assert region["status"]["inMap"] == "5/5"
    pins = [node["certName"] for node in region["status"]["nodes"]]
    assert pins[:3] == [node["certName"] for node in before["status"]["nodes"]]

    await berlin.change(replicas=3)
    down = Recorder(berlin.kube)
    await berlin.reconcile(down)
    await berlin.reconcile(down)
    applied = [(kind, name) for verb, kind, name in down.writes if verb in ("apply", "delete")]
    assert applied == [("ConfigMap", "berlin-derpmap"), ("StatefulSet", "berlin")]
    settings = json.loads((await berlin.data("ConfigMap", "berlin-settings"))[names.SETTINGS_FILE])
    assert len(settings["nodes"]) == 5, "peers keep a node as long as its pod runs"
    region = await berlin.settle()
    assert condition(region)["status"] == "True"
    assert await berlin.kube.get("Service", berlin.namespace, "berlin-3") is None
    settings = json.loads((await berlin.data("ConfigMap", "berlin-settings"))[names.SETTINGS_FILE])
    assert len(settings["nodes"]) == 3

    await berlin.change(replicas=5)
    region = await berlin.settle()
    assert [node["certName"] for node in region["status"]["nodes"]] == pins, "keys of removed nodes are kept"
    assert (await berlin.get("StatefulSet", "berlin"))["spec"]["template"] == template


async def test_a_node_enters_the_map_when_it_answers(berlin: World) -> None:
    await berlin.create()
    await berlin.settle()
    berlin.relays.faults["berlin-3"] = "STUN on port 3478 does not answer"
    await berlin.change(replicas=4)
    region = await berlin.settle()
    assert region["status"]["inMap"] == "3/4"
    assert condition(region)["reason"] == "NodeUnreachable"
    assert "berlin-3: STUN" in condition(region)["message"]
    del berlin.relays.faults["berlin-3"]
    assert (await berlin.settle())["status"]["inMap"] == "4/4"


async def test_a_node_that_stops_answering_stays_in_the_map(berlin: World) -> None:
    await berlin.create()
    await berlin.settle()
    before = await berlin.data("ConfigMap", "berlin-derpmap")
    berlin.relays.faults["berlin-1"] = "TLS on port 8443 does not answer"
    berlin.skew += timedelta(minutes=5)
    region = await berlin.settle()
    assert condition(region, "Degraded")["status"] == "True"
    await berlin.stop("berlin-1")
    await berlin.reconcile()
    assert await berlin.data("ConfigMap", "berlin-derpmap") == before


async def test_no_map_before_all_nodes_answer(berlin: World) -> None:
    berlin.relays.faults["berlin-2"] = "TLS on port 8443 does not answer"
    await berlin.create()
    region = await berlin.settle()
    assert region["status"]["inMap"] == "0/3"
    assert await berlin.kube.get("ConfigMap", berlin.namespace, "berlin-derpmap") is None


@pytest.mark.parametrize("kept", [["labels", "ownerReferences"], ["labels"]], ids=["whole", "of-another-cluster"])
async def test_a_lost_secret_is_told_and_not_replaced(berlin: World, kept: list[str]) -> None:
    await berlin.create()
    await berlin.settle()
    secret = await berlin.get("Secret", "berlin-keys")
    before = await berlin.data("ConfigMap", "berlin-derpmap")
    await berlin.remove("Secret", "berlin-keys")
    region = await berlin.settle()
    assert condition(region)["reason"] == "KeysLost"
    assert condition(region, "Degraded")["status"] == "True"
    assert await berlin.kube.get("Secret", berlin.namespace, "berlin-keys") is None
    assert await berlin.data("ConfigMap", "berlin-derpmap") == before
    meta = {key: secret["metadata"][key] for key in ("name", "namespace", *kept)}
    await berlin.kube.create({"apiVersion": "v1", "kind": "Secret", "metadata": meta, "data": secret["data"]})
    assert condition(await berlin.settle())["status"] == "True"
    assert await berlin.data("ConfigMap", "berlin-derpmap") == before
    owners = (await berlin.get("Secret", "berlin-keys"))["metadata"]["ownerReferences"]
    assert owners == secret["metadata"]["ownerReferences"]


async def test_new_keys_are_made_for_those_who_ask_by_name(berlin: World) -> None:
    await berlin.create()
    await berlin.settle()
    before = await berlin.data("ConfigMap", "berlin-derpmap")
    for kind, name in (("Secret", "berlin-keys"), ("ConfigMap", "berlin-settings"), ("ConfigMap", "berlin-derpmap")):
        region = await berlin.settle()
        assert condition(region)["reason"] in ("AllNodesReady", "KeysLost")
        await berlin.remove(kind, name)
    assert condition(await berlin.settle())["status"] == "True"
    assert await berlin.data("ConfigMap", "berlin-derpmap") != before


@pytest.mark.parametrize(
    ("entry", "value", "words"),
    [
        ("mesh.key", "YWJj", "mesh.key: line 1"),
        ("berlin-1.derper.key", "e30=", "berlin-1.derper.key"),
        ("berlin-1.g1.crt", "YWJj", "berlin-1.g1.crt"),
        ("berlin-1.g1.key", None, "has lost berlin-1.g1.key"),
    ],
)
async def test_damaged_keys_are_told_and_not_replaced(berlin: World, entry: str, value: str | None, words: str) -> None:
    await berlin.create()
    await berlin.settle()
    settings = await berlin.data("ConfigMap", "berlin-settings")
    derpmap = await berlin.data("ConfigMap", "berlin-derpmap")
    await berlin.kube.merge("Secret", berlin.namespace, "berlin-keys", {"data": {entry: value}})
    damaged = await berlin.data("Secret", "berlin-keys")
    region = await berlin.settle()
    assert condition(region)["status"] == "False"
    assert words in condition(region)["message"]
    assert await berlin.data("Secret", "berlin-keys") == damaged
    assert await berlin.data("ConfigMap", "berlin-settings") == settings
    assert await berlin.data("ConfigMap", "berlin-derpmap") == derpmap


async def test_a_missing_config_map_is_named_and_heals(berlin: World) -> None:
    source = {"configMapKeyRef": {"name": "clients", "key": "keys"}}
    await berlin.create(clients={"keysFrom": source})
    region = await berlin.settle()
    assert condition(region)["reason"] == "ConfigMapNotFound"
    assert "clients" in condition(region)["message"]
    meta = {"name": "clients", "namespace": berlin.namespace}
    await berlin.kube.create({"apiVersion": "v1", "kind": "ConfigMap", "metadata": meta, "data": {"other": ""}})
    assert "has no key keys" in condition(await berlin.settle())["message"]
    before = (await berlin.pods())[0]["metadata"]["annotations"][names.CONFIG_HASH]
    await berlin.kube.merge("ConfigMap", berlin.namespace, "clients", {"data": {"keys": ""}})
    assert condition(await berlin.settle())["status"] == "True"
    after = (await berlin.pods())[0]["metadata"]["annotations"][names.CONFIG_HASH]
    assert after != before, "the kubelet must look at its files at once"


async def test_events_tell_transitions_once(berlin: World) -> None:
    await berlin.create()
    await berlin.settle()
    events = await berlin.events()
    assert ("Normal", "MapPublished") in events
    assert ("Normal", "AllNodesReady") in events
    for _ in range(3):
        await berlin.reconcile()
    assert await berlin.events() == events


async def test_a_deleted_region_is_left_to_the_garbage_collector(berlin: World) -> None:
    await berlin.create()
    await berlin.settle()
    await berlin.remove(names.KIND, "berlin")
    recorder = Recorder(berlin.kube)
    assert await berlin.reconcile(recorder) is None
    assert recorder.writes == []
    await berlin.create()  # before the collector came
    region = await berlin.settle()
    assert condition(region)["reason"] == "NameTaken"
    assert "previous region" in condition(region)["message"]
    assert condition(region, "Progressing")["status"] == "True"
