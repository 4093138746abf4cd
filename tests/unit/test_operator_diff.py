"""When a write would change nothing.  The records are what a real API server writes (tests/api proves the rest)."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from derp_operator.diff import in_force

Object = dict[str, Any]

MANIFEST: Object = {
    "apiVersion": "v1",
    "kind": "Service",
    "metadata": {"name": "a", "namespace": "b", "labels": {"x": "y"}, "ownerReferences": [{"uid": "u", "name": "n"}]},
    "spec": {
        "selector": {"app": "a"},
        "ports": [{"port": 443, "protocol": "TCP", "targetPort": "derp"}, {"port": 3478, "protocol": "UDP"}],
        "finalizers": ["one"],
        "resources": {"limits": {"cpu": "1000m", "memory": "1024Mi"}},
        "rules": [{"from": [{}], "port": 1}],
    },
}
RECORD: Object = {
    "f:metadata": {
        "f:labels": {"f:x": {}},
        "f:ownerReferences": {'k:{"uid":"u"}': {".": {}, "f:uid": {}, "f:name": {}}},
    },
    "f:spec": {
        "f:selector": {},
        "f:ports": {
            'k:{"port":443,"protocol":"TCP"}': {".": {}, "f:port": {}, "f:protocol": {}, "f:targetPort": {}},
            'k:{"port":3478,"protocol":"UDP"}': {".": {}, "f:port": {}, "f:protocol": {}},
        },
        "f:finalizers": {'v:"one"': {}},
        "f:resources": {"f:limits": {"f:cpu": {}, "f:memory": {}}},
        "f:rules": {},
    },
}


def live(record: Object = RECORD, manager: str = "derp-operator", operation: str = "Apply") -> Object:
    found = copy.deepcopy(MANIFEST)
    found["metadata"] |= {"uid": "1", "resourceVersion": "2", "annotations": {"theirs": "z"}}
    found["metadata"]["managedFields"] = [{"manager": manager, "operation": operation, "fieldsV1": record}]
    found["spec"] |= {"clusterIP": "198.19.0.1"}
    found["spec"]["ports"][0]["nodePort"] = 30443  # a default of the server
    found["spec"]["ports"].reverse()
    found["spec"]["resources"]["limits"] = {"cpu": "1", "memory": "1Gi"}
    found["spec"]["rules"][0]["protocol"] = "TCP"  # a default inside of what we own whole
    return found


def test_defaults_fields_of_others_and_spellings_do_not_count() -> None:
    assert in_force(MANIFEST, live(), "derp-operator")


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m["metadata"]["labels"].update(x="z"),
        lambda m: m["metadata"]["labels"].update(new="z"),
        lambda m: m["metadata"]["labels"].pop("x"),
        lambda m: m["metadata"].pop("ownerReferences"),
        lambda m: m["spec"]["selector"].update(app="b"),
        lambda m: m["spec"]["ports"].pop(),
        lambda m: m["spec"]["ports"][0].update(targetPort="other"),
        lambda m: m["spec"]["ports"][0].update(nodePort=30444),
        lambda m: m["spec"]["ports"][0].update(protocol="UDP"),
        lambda m: m["spec"].pop("finalizers"),
        lambda m: m["spec"].update(finalizers=["two"]),
        lambda m: m["spec"]["resources"]["limits"].update(cpu="2"),
        lambda m: m["spec"]["resources"]["limits"].pop("cpu"),
        lambda m: m["spec"]["rules"].append({"port": 2}),
        lambda m: m["spec"]["rules"][0].update(port=2),
        lambda m: m["spec"].update(more=1),
    ],
)
def test_any_other_manifest_needs_a_write(change: Any) -> None:
    manifest = copy.deepcopy(MANIFEST)
    change(manifest)
    assert not in_force(manifest, live(), "derp-operator")


@pytest.mark.parametrize(
    "edit",
    [
        lambda o: o["metadata"]["labels"].update(x="z"),
        lambda o: o["spec"]["ports"].pop(),
        lambda o: o["spec"].update(selector={"app": "b"}),
        lambda o: o["spec"].pop("resources"),
        lambda o: o["spec"]["rules"].clear(),
        lambda o: o["spec"]["finalizers"].clear(),
    ],
)
def test_what_somebody_edited_needs_a_write(edit: Any) -> None:
    found = live()
    edit(found)
    assert not in_force(MANIFEST, found, "derp-operator")


def test_only_our_own_apply_record_counts() -> None:
    assert not in_force(MANIFEST, live(manager="kubectl"), "derp-operator")
    assert not in_force(MANIFEST, live(operation="Update"), "derp-operator")
    status = live()
    status["metadata"]["managedFields"][0]["subresource"] = "status"
    assert not in_force(MANIFEST, status, "derp-operator")


def test_an_amount_is_no_text() -> None:
    """Only resources are amounts: a label "1000m" is not a label "1"."""
    manifest = copy.deepcopy(MANIFEST)
    manifest["metadata"]["labels"]["x"] = "1000m"
    found = live()
    found["metadata"]["labels"]["x"] = "1"
    assert not in_force(manifest, found, "derp-operator")
