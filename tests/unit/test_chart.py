"""The chart: what Helm makes of it with different values."""

from __future__ import annotations

import functools
import itertools
import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from derp_operator.__main__ import options

import derper
from tests.unit.crdschema import ROOT, problems, schema

CHART = ROOT / "charts" / "derp-operator"
DIGEST = "sha256:" + "0a" * 32
CLUSTER_WIDE = {"ClusterRole", "ClusterRoleBinding", "CustomResourceDefinition", "Namespace"}

Object = dict[str, Any]
Render = Callable[..., list[Object]]


def run(helm: Path, *args: str, values: Object | None = None) -> subprocess.CompletedProcess[str]:
    argv: list[str | Path] = [helm, *args, *([] if values is None else ["--values=-"])]
    return subprocess.run(argv, input=json.dumps(values or {}), capture_output=True, text=True)


@pytest.fixture(scope="module")
def render(helm: Path) -> Render:
    """`helm template` for a release `derp-operator` in the namespace `system`, as objects."""

    @functools.cache
    def text(values: str) -> str:
        done = run(helm, "template", "derp-operator", str(CHART), "--namespace=system", values=json.loads(values))
        assert done.returncode == 0, done.stderr
        return done.stdout

    def rendered(**values: Any) -> list[Object]:
        documents = yaml.load_all(text(json.dumps(values)), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        return [document for document in documents if document]

    return rendered


def of_kind(objects: list[Object], kind: str) -> list[Object]:
    return [item for item in objects if item["kind"] == kind]


def one(objects: list[Object], kind: str) -> Object:
    (item,) = of_kind(objects, kind)
    return item


def container(objects: list[Object]) -> Object:
    found: Object = one(objects, "Deployment")["spec"]["template"]["spec"]["containers"][0]
    return found


def environment(objects: list[Object]) -> dict[str, str]:
    return {item["name"]: item.get("value", "from the pod") for item in container(objects)["env"]}


def test_lint_is_clean(helm: Path) -> None:
    done = run(helm, "lint", "--strict", str(CHART))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "[WARNING]" not in done.stdout + done.stderr


def test_versions_agree() -> None:
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert chart["version"] == chart["appVersion"] == derper.__version__


def test_nothing_names_a_registry() -> None:
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    assert values["image"]["registry"] == values["relayImage"]["registry"] == ""


def test_every_value_has_a_place_in_the_schema() -> None:
    def walk(values: Object, against: Object, path: str) -> None:
        for key, value in values.items():
            assert key in against["properties"], f"{path}{key}"
            below = against["properties"][key]
            below = whole["$defs"][below["$ref"].rpartition("/")[2]] if "$ref" in below else below
            if isinstance(value, dict) and "properties" in below:
                walk(value, below, f"{path}{key}.")

    whole = json.loads((CHART / "values.schema.json").read_text())
    walk(yaml.safe_load((CHART / "values.yaml").read_text()), whole, "")


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        ({"imge": {}}, "additional properties 'imge' not allowed"),
        ({"image": {"tga": "x"}}, "additional properties 'tga' not allowed"),
        ({"image": {"digest": "0a0a"}}, "/image/digest"),
        ({"image": {"pullPolicy": "Sometimes"}}, "/image/pullPolicy"),
        ({"replicas": "2"}, "/replicas"),
        ({"watchNamespaces": "derp"}, "/watchNamespaces"),
        ({"watchNamespaces": ["Derp"]}, "/watchNamespaces/0"),
        ({"operator": {"port": 80}}, "/operator/port"),
        ({"operator": {"logLevel": "loud"}}, "/operator/logLevel"),
        ({"fullnameOverride": "Derp_Operator"}, "/fullnameOverride"),
        ({"nameOverride": "derp.operator"}, "/nameOverride"),
        ({"serviceAccount": {"create": False}}, "/serviceAccount/name"),
        ({"podLabels": {"app.kubernetes.io/name": "other"}}, "/podLabels"),
    ],
)
def test_wrong_values_are_refused(helm: Path, values: Object, complaint: str) -> None:
    done = run(helm, "template", "x", str(CHART), values=values)
    assert done.returncode != 0
    assert complaint in done.stderr


@pytest.mark.parametrize(
    ("image", "reference"),
    [
        ({}, "derp-operator:" + derper.__version__),
        ({"tag": "dev"}, "derp-operator:dev"),
        ({"registry": "localhost", "tag": "dev"}, "localhost/derp-operator:dev"),
        (
            {"registry": "registry.example:5000/team", "repository": "x/y", "tag": "1"},
            "registry.example:5000/team/x/y:1",
        ),
        ({"digest": DIGEST}, f"derp-operator@{DIGEST}"),
        ({"registry": "localhost", "tag": "dev", "digest": DIGEST}, f"localhost/derp-operator@{DIGEST}"),
    ],
)
def test_images(render: Render, image: Object, reference: str) -> None:
    objects = render(image=image, relayImage=image)
    assert container(objects)["image"] == reference
    relay = reference if "repository" in image else reference.replace("derp-operator", "derper")
    assert environment(objects)["RELAY_IMAGE"] == relay
    assert one(objects, "Pod")["spec"]["containers"][0]["image"] == reference


COMBINATIONS: dict[str, Object] = {
    "defaults": {},
    "several replicas": {"replicas": 3},
    "everything on": {
        "replicas": 2,
        "networkPolicy": {"enabled": True, "from": [{"namespaceSelector": {}}]},
        "monitoring": {
            "operator": {"enabled": True, "labels": {"a": "b"}},
            "relays": {"enabled": True},
            "alerts": {"enabled": True, "labels": {"a": "b"}},
        },
        "imagePullSecrets": [{"name": "pull"}],
        "podAnnotations": {"a": "b"},
        "podLabels": {"c": "d"},
        "nodeSelector": {"e": "f"},
        "tolerations": [{"operator": "Exists"}],
        "affinity": {"nodeAffinity": {}},
        "topologySpreadConstraints": [{"maxSkew": 1}],
        "priorityClassName": "high",
        "serviceAccount": {"name": "other", "annotations": {"g": "h"}},
    },
    "everything off": {
        "crds": {"install": False},
        "rbac": {"create": False, "aggregate": False},
        "serviceAccount": {"create": False, "name": "given"},
    },
    "two namespaces": {"watchNamespaces": ["derp-a", "derp-b"]},
    "long name": {"fullnameOverride": "a" * 63, "nameOverride": "b" * 63},
}


@pytest.mark.parametrize("values", COMBINATIONS.values(), ids=COMBINATIONS)
def test_every_combination_is_sound(render: Render, values: Object) -> None:
    objects = render(**values)
    keys = [(item["kind"], item["metadata"].get("namespace"), item["metadata"]["name"]) for item in objects]
    assert len(set(keys)) == len(keys)
    for item in objects:
        assert ("namespace" in item["metadata"]) == (item["kind"] not in CLUSTER_WIDE)
        if item["kind"] == "Service":
            assert len(item["metadata"]["name"]) <= 63
    pods = [one(objects, "Deployment")["spec"]["template"]["spec"], one(objects, "Pod")["spec"]]
    for pod in pods:
        assert_restricted(pod)
    selector = one(objects, "Deployment")["spec"]["selector"]["matchLabels"]
    for labels in (one(objects, "Deployment")["spec"]["template"]["metadata"]["labels"],):
        assert selector.items() <= labels.items()
    assert one(objects, "Service")["spec"]["selector"] == selector
    assert not selector.items() <= one(objects, "Pod")["metadata"]["labels"].items()


def assert_restricted(pod: Object) -> None:
    """The Pod Security level "restricted", and a read-only root file system on top."""
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert not {"hostNetwork", "hostPID", "hostIPC", "volumes"} & pod.keys()
    for item in pod["containers"]:
        assert item["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert {"cpu", "memory"} <= item["resources"]["requests"].keys()
        assert "memory" in item["resources"]["limits"]


@pytest.mark.parametrize("values", COMBINATIONS.values(), ids=COMBINATIONS)
def test_the_operator_takes_its_environment(render: Render, values: Object) -> None:
    found = environment(render(**values))
    chosen = options([], found)
    assert chosen.namespace == values.get("watchNamespaces", [])
    assert (chosen.port, chosen.workers, chosen.log_level) == (8080, 4, "info")
    assert chosen.relay_image == found["RELAY_IMAGE"]
    assert chosen.lease_namespace == "from the pod"


def test_operator_settings_reach_it(render: Render) -> None:
    objects = render(operator={"port": 9000, "workers": 2, "logLevel": "debug"}, fullnameOverride="own")
    chosen = options([], environment(objects))
    assert (chosen.port, chosen.workers, chosen.log_level, chosen.lease_name) == (9000, 2, "debug", "own")
    assert container(objects)["ports"] == [{"name": "metrics", "containerPort": 9000, "protocol": "TCP"}]
    assert one(objects, "Service")["spec"]["ports"][0]["port"] == 9000
    assert "http://own.system.svc:9000" in str(one(objects, "Pod"))


def test_probes_ask_what_the_operator_answers(render: Render) -> None:
    probes = container(render())
    paths = {probe: probes[probe]["httpGet"]["path"] for probe in ("startupProbe", "livenessProbe", "readinessProbe")}
    assert paths == {"startupProbe": "/healthz", "livenessProbe": "/healthz", "readinessProbe": "/readyz"}


CHILD = {"get", "list", "watch", "create", "patch", "delete"}
RIGHTS = {
    "derpregions.derp.network": {"get", "list", "watch"},
    "derpregions/status.derp.network": {"patch"},
    "configmaps.": CHILD,
    "secrets.": CHILD,
    "serviceaccounts.": CHILD,
    "services.": CHILD,
    "statefulsets.apps": CHILD,
    "poddisruptionbudgets.policy": CHILD,
    "networkpolicies.networking.k8s.io": CHILD,
    "pods.": {"list", "watch", "patch"},
    "pods/eviction.": {"create"},
    "events.": {"create"},
}


def rights(role: Object) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for rule in role["rules"]:
        for group, resource in itertools.product(rule["apiGroups"], rule["resources"]):
            found.setdefault(f"{resource}.{group}", set()).update(rule["verbs"])
    return found


def test_rights_are_the_least_and_the_same_in_both_modes(render: Render) -> None:
    wide = render()
    roles = {item["metadata"]["name"]: rights(item) for item in of_kind(wide, "ClusterRole")}
    assert roles["system:derp-operator"] == RIGHTS
    assert roles["system:derp-operator:nodes"] == {"nodes.": {"get"}}
    narrow = render(watchNamespaces=["derp-a", "derp-b"])
    own = {item["metadata"]["namespace"]: rights(item) for item in of_kind(narrow, "Role")}
    lease = {"leases.coordination.k8s.io": {"create", "get", "update"}}
    assert own == {"derp-a": RIGHTS, "derp-b": RIGHTS, "system": lease}
    assert "system:derp-operator" not in {item["metadata"]["name"] for item in of_kind(narrow, "ClusterRole")}


@pytest.mark.parametrize("values", COMBINATIONS.values(), ids=COMBINATIONS)
def test_every_binding_leads_from_a_role_to_the_account(render: Render, values: Object) -> None:
    objects = render(**values)
    account = one(objects, "Deployment")["spec"]["template"]["spec"]["serviceAccountName"]
    named = {(item["kind"], item["metadata"].get("namespace"), item["metadata"]["name"]) for item in objects}
    for binding in of_kind(objects, "RoleBinding") + of_kind(objects, "ClusterRoleBinding"):
        reference = binding["roleRef"]
        assert (reference["kind"], binding["metadata"].get("namespace"), reference["name"]) in named
        assert binding["subjects"] == [{"kind": "ServiceAccount", "name": account, "namespace": "system"}]
    if values.get("serviceAccount", {}).get("create", True):
        assert ("ServiceAccount", "system", account) in named


def test_a_release_without_rights_on_the_cluster(render: Render) -> None:
    objects = render(watchNamespaces=["derp"], crds={"install": False}, rbac={"nodes": False, "aggregate": False})
    assert CLUSTER_WIDE.isdisjoint(item["kind"] for item in objects)


def test_roles_of_users_include_regions(render: Render) -> None:
    roles = {
        item["metadata"]["name"].rpartition(":")[2]: item
        for item in of_kind(render(), "ClusterRole")
        if "rbac.authorization.k8s.io/aggregate-to-admin" in item["metadata"]["labels"]
    }
    assert roles.keys() == {"view", "edit"}
    assert "rbac.authorization.k8s.io/aggregate-to-view" not in roles["edit"]["metadata"]["labels"]
    assert rights(roles["view"])["derpregions.derp.network"] == {"get", "list", "watch"}
    writing = {"create", "update", "patch", "delete", "deletecollection"}
    assert rights(roles["edit"])["derpregions.derp.network"] == writing


def test_the_crd_is_the_one_in_crds(render: Render) -> None:
    source = yaml.safe_load((ROOT / "crds" / "derp.network_derpregions.yaml").read_text())
    crd = one(render(), "CustomResourceDefinition")
    assert crd["spec"] == source["spec"]
    assert crd["metadata"]["name"] == source["metadata"]["name"]
    assert crd["metadata"]["annotations"] == {"helm.sh/resource-policy": "keep"}
    assert "annotations" not in one(render(crds={"keep": False}), "CustomResourceDefinition")["metadata"]
    assert of_kind(render(crds={"install": False}), "CustomResourceDefinition") == []


def test_extras_come_when_asked_for(render: Render) -> None:
    kinds = {item["kind"] for item in render()}
    assert kinds.isdisjoint({"PodDisruptionBudget", "NetworkPolicy", "ServiceMonitor", "PodMonitor", "PrometheusRule"})
    objects = render(**COMBINATIONS["everything on"])
    assert one(objects, "PodDisruptionBudget")["spec"]["maxUnavailable"] == 1
    assert one(objects, "NetworkPolicy")["spec"]["ingress"][0]["from"] == [{"namespaceSelector": {}}]
    assert one(objects, "ServiceMonitor")["metadata"]["labels"]["a"] == "b"
    assert one(objects, "PodMonitor")["spec"]["namespaceSelector"] == {"any": True}
    rule = one(objects, "PrometheusRule")
    assert rule["metadata"]["labels"]["a"] == "b"
    operations = (ROOT / "docs" / "operations.md").read_text()
    for alert in rule["spec"]["groups"][0]["rules"]:
        assert f"`{alert['expr']}`" in operations, alert
    narrow = render(watchNamespaces=["derp"], monitoring={"relays": {"enabled": True}})
    assert one(narrow, "PodMonitor")["spec"]["namespaceSelector"] == {"matchNames": ["derp"]}


@pytest.mark.parametrize("values", [{}, {"watchNamespaces": ["derp-a"]}, {"crds": {"keep": False}}])
def test_notes_hold_a_first_region_to_paste(helm: Path, values: Object) -> None:
    done = run(helm, "install", "--dry-run=client", "x", str(CHART), "--output=json", values=values)
    assert done.returncode == 0, done.stderr
    notes = json.loads(done.stdout)["info"]["notes"]
    pasted = re.search(r"<<'END'\n(.*?)\nEND\n", notes, re.DOTALL)
    assert pasted is not None
    *namespaces, region = yaml.safe_load_all(pasted[1])
    assert list(problems(region, schema())) == []
    assert bool(namespaces) == ("watchNamespaces" not in values)
    assert region["metadata"]["namespace"] == ("derp-a" if "watchNamespaces" in values else "derp")
    assert f"configmap {region['metadata']['name']}-derpmap" in notes
    assert ("every region of the cluster" in notes) == ("crds" in values)


def test_the_script_of_helm_test_is_python(render: Render) -> None:
    (script,) = one(render(), "Pod")["spec"]["containers"][0]["args"]
    compile(script, "helm test", "exec")
