"""Patches over manifests: what they do, and what they must leave alone."""

from __future__ import annotations

from typing import Any

import pytest
from derp_operator.render.override import patched
from derp_operator.spec import InvalidSpec

from .operatorkit import find, manifests, region

Patch = dict[str, Any]
GONE = {"$patch": "delete"}


def of_pod(**fields: Any) -> Patch:
    return {"spec": {"template": {"spec": fields}}}


def of_relay(**fields: Any) -> Patch:
    return of_pod(containers=[{"name": "derper", **fields}])


def pod(patch: Patch) -> Any:
    found = manifests(region(override={"statefulSet": patch}))
    return find(found, "StatefulSet", "berlin")["spec"]["template"]["spec"]


def test_maps_are_merged_and_null_removes() -> None:
    base = {"a": {"b": 1, "c": {"d": 2}}, "e": [1], "f": 3}
    patch = {"a": {"c": {"d": None, "g": 4}}, "e": [2], "f": None, "h": {"i": None, "j": 5}}
    assert patched(base, patch) == {"a": {"b": 1, "c": {"g": 4}}, "e": [2], "h": {"j": 5}}
    assert base == {"a": {"b": 1, "c": {"d": 2}}, "e": [1], "f": 3}


def test_lists_of_named_things_are_merged_by_name() -> None:
    sidecar = {"name": "sidecar", "image": "sidecar:1"}
    found = pod(of_pod(containers=[sidecar, {"name": "derper", "tty": True}], volumes=[{"name": "x", "emptyDir": {}}]))
    relay, other = found["containers"]
    assert (relay["name"], relay["tty"], relay["image"]) == ("derper", True, "derper:1")
    assert other == sidecar
    assert [volume["name"] for volume in found["volumes"]] == ["keys", "settings", "x"]
    mounted = pod(of_relay(volumeMounts=[{"name": "x", "mountPath": "/x"}], env=[{"name": "A", "value": "b"}]))
    (relay,) = mounted["containers"]
    assert [mount["mountPath"] for mount in relay["volumeMounts"]] == [
        "/etc/derper/secret",
        "/etc/derper/config",
        "/x",
    ]
    assert [item["name"] for item in relay["env"]] == ["POD_NAME", "A"]


def test_what_the_operator_sets_may_be_taken_away() -> None:
    found = pod(of_pod(securityContext={"runAsUser": None, "runAsGroup": GONE}, affinity=GONE))
    assert found["securityContext"].keys() == {"runAsNonRoot", "fsGroup", "seccompProfile"}
    assert "affinity" not in found
    assert patched({"volumes": [{"name": "a"}, {"name": "b"}]}, {"volumes": [{"name": "a"} | GONE]}) == {
        "volumes": [{"name": "b"}]
    }


def test_the_services_of_all_relays_are_patched_and_no_other() -> None:
    found = manifests(region(override={"service": {"spec": {"sessionAffinity": "ClientIP"}}}))
    for name, affinity in (("berlin-0", "ClientIP"), ("berlin-2", "ClientIP"), ("berlin-mesh", None)):
        assert find(found, "Service", name)["spec"].get("sessionAffinity") == affinity


@pytest.mark.parametrize(
    ("patch", "words"),
    [
        ({"kind": "Deployment"}, "has kind: only metadata and spec can be patched."),
        ({"spec": None}, "sets spec.replicas"),
        ({"spec": {"replicas": 1}}, "sets spec.replicas"),
        ({"spec": GONE}, "sets spec.replicas"),
        ({"spec": {"template": {"metadata": {"labels": GONE}}}}, "has no map in spec.template.metadata.labels"),
        ({"spec": {"template": {"metadata": GONE}}}, "sets spec.template.metadata.$patch"),
        (of_pod(containers=[{"name": "derper"} | GONE]), "sets spec.template.spec.containers[derper].image"),
        (of_pod(volumes=[{"name": "keys"} | GONE]), "sets spec.template.spec.volumes[keys]"),
        ({"spec": {"selector": {"matchLabels": {}}}}, "sets spec.selector"),
        ({"spec": {"updateStrategy": {"type": "OnDelete"}}}, "sets spec.updateStrategy"),
        ({"spec": {"template": None}}, "removes spec.template.metadata"),
        ({"metadata": {"name": "x"}}, "sets metadata.name: only labels and annotations"),
        ({"metadata": {"finalizers": ["x"]}}, "sets metadata.finalizers"),
        ({"metadata": {"labels": {"derp.network/region": "x"}}}, "sets metadata.labels.derp.network/region"),
        ({"metadata": {"labels": None}}, "has no map in metadata.labels"),
        (
            {"spec": {"template": {"metadata": {"labels": {"app.kubernetes.io/name": None}}}}},
            "sets spec.template.metadata.labels.app.kubernetes.io/name",
        ),
        (of_pod(containers=None), "sets spec.template.spec.containers[derper].image"),
        (of_relay(args=["-x"]), "sets spec.template.spec.containers[derper].args"),
        (of_relay(ports=[]), "sets spec.template.spec.containers[derper].ports"),
        (
            of_relay(env=[{"name": "POD_NAME", "value": "x"}]),
            "sets spec.template.spec.containers[derper].env[POD_NAME]",
        ),
        (of_relay(env=None), "sets spec.template.spec.containers[derper].env[POD_NAME]"),
        (
            of_relay(volumeMounts=[{"mountPath": "/etc/derper/secret", "name": "x"}]),
            "derper].volumeMounts[/etc/derper/secret]",
        ),
        (of_pod(volumes=[{"name": "keys", "emptyDir": {}}]), "sets spec.template.spec.volumes[keys]"),
        (of_pod(containers=[{"image": "x"}]), "has no name in spec.template.spec.containers[0]"),
        (of_pod(containers=["x"]), "has no name in spec.template.spec.containers[0]"),
    ],
)
def test_what_the_operator_relies_on_stays(patch: Patch, words: str) -> None:
    with pytest.raises(InvalidSpec) as caught:
        region(override={"statefulSet": patch})
    assert "spec.override.statefulSet " in str(caught.value)
    assert words in str(caught.value)
    assert all(problem.endswith(".") for problem in caught.value.problems)


@pytest.mark.parametrize("field", ["type", "selector", "ports", "publishNotReadyAddresses"])
def test_what_the_operator_relies_on_in_services_stays(field: str) -> None:
    with pytest.raises(InvalidSpec, match=f"sets spec.{field}, which the operator needs as it is"):
        region(override={"service": {"spec": {field: None}}})


def test_volumes_of_certificates_stay() -> None:
    tls = {"hostName": "Template", "hostNameTemplate": "{pod}.example.com", "certificates": [{"secretName": "a"}]}
    patch = of_pod(volumes=[{"name": "tls-0", "emptyDir": {}}])
    with pytest.raises(InvalidSpec, match="sets the volume tls-0"):
        region(tls=tls, override={"statefulSet": patch})
    region(override={"statefulSet": patch})
