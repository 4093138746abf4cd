"""The CRD, what is made from it, and the examples."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from derp_operator.spec import parse

from dev import apidoc, chart
from tests.unit.crdschema import ROOT, load_crd, problems, schema

EXAMPLES = sorted((ROOT / "examples").glob("*.yaml"))
CLUSTER_KINDS = {"Namespace"}


def documents(path: Path) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(path.read_text()))


def regions(path: Path) -> list[dict[str, Any]]:
    return [document for document in documents(path) if document["kind"] == "DerpRegion"]


def test_there_are_examples() -> None:
    names = {path.name for path in EXAMPLES}
    assert {"demo.yaml", "minimal.yaml", "loadbalancer.yaml", "hostport.yaml"} <= names


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_examples_are_regions_that_the_operator_takes(path: Path) -> None:
    assert regions(path)
    for region in regions(path):
        assert list(problems(region, schema())) == []
        meta = {"namespace": "default", "uid": "0", **region["metadata"]}
        assert parse({**region, "metadata": meta}).region_id >= 900


def test_examples_can_be_used_together() -> None:
    """No two have the same id or name, but for the demo, which is a cluster of its own."""
    found = [region for path in EXAMPLES if path.name not in ("demo.yaml", "minimal.yaml") for region in regions(path)]
    ids = [region["spec"]["regionID"] for region in found]
    assert len(set(ids)) == len(ids)


def test_the_demo_is_what_others_rely_on() -> None:
    namespace, region = documents(ROOT / "examples" / "demo.yaml")
    assert namespace["metadata"]["name"] == region["metadata"]["namespace"] == "derp-demo"
    assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    assert region["metadata"]["name"] == "demo"
    assert region["spec"] == {
        "regionID": 900,
        "regionName": "Demo",
        "replicas": 3,
        "exposure": {"type": "NodePort", "nodePort": {"derpPortBase": 30443, "stunPortBase": 30478}},
        "tls": {"hostName": "Generated"},
        "map": {"spread": "5s"},
        "clients": {"open": True},
    }


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"replicas": 2}, ".spec.replicas: 2 is out of bounds"),
        ({"regionID": "900"}, ".spec.regionID is not of type integer"),
        ({"replcas": 3}, ".spec.replcas is unknown"),
        ({"regionID": True}, ".spec.regionID is not of type integer"),
        ({"imagePullPolicy": "Sometimes"}, ".spec.imagePullPolicy: 'Sometimes' is not one of"),
        ({"imagePullSecrets": [{}]}, ".spec.imagePullSecrets[0].name is missing"),
        ({"pod": {"labels": {"a": 1}}}, ".spec.pod.labels.a is not of type string"),
        ({"pod": {"workers": -1}}, ".spec.pod.workers: -1 is out of bounds"),
        ({"pod": {"resources": {"limits": {"cpu": "5x"}}}}, ".spec.pod.resources.limits.cpu: '5x' does not match"),
    ],
)
def test_the_check_of_examples_finds_mistakes(change: dict[str, Any], problem: str) -> None:
    region = {"metadata": {"name": "x"}, "spec": {"regionID": 900, "clients": {"open": True}, **change}}
    assert any(found.startswith(problem) for found in problems(region, schema()))


def test_chart_and_reference_are_made_from_the_crd(capsys: pytest.CaptureFixture[str]) -> None:
    assert chart.main(["check"]) == 0, capsys.readouterr().out
    assert apidoc.main(["check"]) == 0, capsys.readouterr().out


def test_checks_say_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for module, name, command in ((chart, "TEMPLATE", "sync"), (apidoc, "REFERENCE", "write")):
        monkeypatch.setattr(module, "ROOT", tmp_path)
        monkeypatch.setattr(module, name, tmp_path / "copy")
        assert module.main(["check"]) == 1
        assert f"run `python -m {module.__name__} {command}`" in capsys.readouterr().out
        assert module.main([command]) == 0
        assert module.main(["check"]) == 0
        with (tmp_path / "copy").open("a") as copy:
            copy.write("x")
        assert module.main(["check"]) == 1
        assert module.main(["wrong"]) == 2


def test_a_crd_that_helm_would_misread_is_refused() -> None:
    with pytest.raises(ValueError, match=r"contains \{\{"):
        chart.template("apiVersion: v1\ndescription: '{{ x }}'\n")


class Recorder(dict[str, Any]):
    """A part of a spec that notes which fields the operator reads."""

    def __init__(self, content: Mapping[str, Any], path: str, read: set[str]) -> None:
        super().__init__({key: self._wrapped(value, f"{path}.{key}", read) for key, value in content.items()})
        self._path, self._read = path, read

    @staticmethod
    def _wrapped(value: Any, path: str, read: set[str]) -> Any:
        if isinstance(value, dict):
            return Recorder(value, path, read)
        if isinstance(value, list):
            return [Recorder._wrapped(item, f"{path}[]", read) for item in value]
        return value

    def get(self, key: str, default: Any = None) -> Any:
        self._read.add(f"{self._path}.{key}")
        return super().get(key, default)

    def __getitem__(self, key: str) -> Any:
        self._read.add(f"{self._path}.{key}")
        return super().__getitem__(key)


WHOLE: dict[str, Any] = {
    "regionID": 900,
    "exposure": {"loadBalancer": {}, "nodePort": {}, "hostPort": {}, "clusterIP": {}},
    "tls": {"hostName": "Template", "hostNameTemplate": "{pod}.example.com", "certificates": [{"secretName": "a"}]},
    "imagePullSecrets": [{"name": "a"}],
    "rebalance": {"clientsPerMinute": 60},
    "mesh": {"rotate": "a"},
    "limits": {"acceptBurst": 0},
    "map": {"latitude": 1, "consumers": [{"name": "a"}]},
    "pod": {"labels": {}, "env": [{"name": "A", "value": "b"}]},
    "nodes": [{"ordinal": 0}],
    "override": {"statefulSet": {}},
}
OPTIONS = {"LoadBalancer": "loadBalancer", "NodePort": "nodePort", "HostPort": "hostPort", "ClusterIP": "clusterIP"}


def test_the_operator_reads_every_field_and_no_other() -> None:
    read: set[str] = set()
    for kind, options in OPTIONS.items():
        for source in ("configMapKeyRef", "secretKeyRef"):
            clients = {"verifyURLs": ["https://a.example/"], "keysFrom": {source: {"name": "a", "key": "b"}}}
            exposure = {"type": kind, options: WHOLE["exposure"][options] | {"addressType": "Auto"}}
            spec = Recorder({**WHOLE, "exposure": exposure, "clients": clients}, "", read)
            parse({"metadata": {"name": "a", "namespace": "b", "uid": "c"}, "spec": spec})
    defined = set(leaves(schema()["properties"]["spec"], ""))
    assert defined - read == set()
    # The options of all types are read alike, so the parser may ask one type for the options of another.
    assert {path for path in read - defined if not path.startswith(".exposure.")} == set()


def leaves(field: Mapping[str, Any], path: str) -> Iterator[str]:
    """The fields below a field; those "as in a Pod" are passed on whole."""
    whole = "as in a Pod" in field.get("description", "")
    holder, mark = (field["items"], "[]") if field.get("type") == "array" else (field, "")
    if whole or "properties" not in holder:
        if path:
            yield path
        return
    if path:
        yield path
    for name, below in holder["properties"].items():
        yield from leaves(below, f"{path}{mark}.{name}")


def test_names_are_those_of_the_operator() -> None:
    from derp_operator import names

    spec = load_crd()["spec"]
    assert (spec["group"], spec["versions"][0]["name"]) == (names.GROUP, names.VERSION)
    assert (spec["names"]["kind"], spec["names"]["plural"]) == (names.KIND, names.PLURAL)


def test_minimum_and_scale_are_in_the_schema() -> None:
    """The rule that no webhook sees: `kubectl scale` runs against the schema of the spec."""
    version = load_crd()["spec"]["versions"][0]
    replicas = schema()["properties"]["spec"]["properties"]["replicas"]
    assert (replicas["minimum"], replicas["default"]) == (3, 3)
    assert version["subresources"]["scale"]["specReplicasPath"] == ".spec.replicas"


def test_the_schema_is_closed() -> None:
    def walk(field: Any) -> Iterator[Mapping[str, Any]]:
        if isinstance(field, dict):
            yield field
            for value in field.values():
                yield from walk(value)
        elif isinstance(field, list):
            for value in field:
                yield from walk(value)

    override = schema()["properties"]["spec"]["properties"]["override"]["properties"]
    opened = [field for field in walk(schema()) if "x-kubernetes-preserve-unknown-fields" in field]
    assert opened == list(override.values())
    assert all("description" in field for name, field in schema()["properties"].items() if name != "metadata")
