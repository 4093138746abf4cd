"""Manifests: what may roll the pods, what protects them, and that the same input gives the same bytes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from derp_operator import names
from derp_operator.render import config_hash, identities
from derp_operator.render.statefulset import ARGS

from .crdschema import schema
from .operatorkit import find, manifests, region, resource
from .test_crd import leaves

Spec = dict[str, Any]

BASE: Spec = {"exposure": {"type": "NodePort"}}
# What reaches running relays through files, Services or the map must leave their pods alone ..
KEEPS: list[Spec] = [
    {"replicas": 5},
    {"replicas": 64},
    {"regionCode": "ber", "regionName": "Berlin"},
    {"exposure": {"type": "ClusterIP"}},
    {"exposure": {"type": "LoadBalancer", "loadBalancer": {"derpPort": 8443, "sourceRanges": ["192.0.2.0/24"]}}},
    {"exposure": {"type": "NodePort", "nodePort": {"derpPortBase": 30443, "stunPortBase": 30478}}},
    {"exposure": {"type": "NodePort", "nodePort": {"addressLabel": "a", "externalTrafficPolicy": "Cluster"}}},
    {"exposure": {"type": "NodePort", "nodePort": {"annotations": {"a": "{pod}"}}, "ipFamilies": ["IPv4"]}},
    {"tls": {"hostName": "Address"}},
    {"clients": {"verifyURLs": ["https://headscale.example.com/verify"], "failOpen": True}},
    {"limits": {"acceptConnectionsPerSecond": 10, "clientBytesPerSecond": 1}},
    {"map": {"spread": "5m"}},
    {"map": {"latitude": 1.0, "longitude": 2.0, "noMeasureNoHome": True}},
    {"paused": True},
    {"exposure": {"type": "NodePort", "nodePort": {"addressType": "InternalIP"}}},
    {"exposure": {"type": "ClusterIP", "clusterIP": {"derpPort": 1, "stunPort": 2, "annotations": {"a": "b"}}}},
    {
        "exposure": {
            "type": "LoadBalancer",
            "loadBalancer": {
                "stunPort": 1,
                "loadBalancerClass": "example.com/a",
                "annotations": {"a": "b"},
                "externalTrafficPolicy": "Cluster",
            },
        }
    },
    {"tls": {"lifetime": "48h", "renewBefore": "1h", "retireAfter": "2h", "rotate": "now"}},
    {"mesh": {"rotate": "now"}},
    {"rebalance": {"clientsPerMinute": 6}},
    {"limits": {"acceptConnectionsPerSecond": 1, "acceptBurst": 2, "clientBytesPerSecond": 3, "clientBurstBytes": 4}},
    {"map": {"layout": "RegionPerNode", "firstRegionID": 910, "nodeOrder": "Rotated", "mergeInto": "all"}},
    {"map": {"consumers": [{"name": "a", "layout": "RegionPerNode", "nodeOrder": "ByOrdinal", "mergeInto": "all"}]}},
    {"pod": {"serviceAccountAnnotations": {"a": "b"}}},
    {"override": {"service": {"spec": {"sessionAffinity": "ClientIP"}}}},
    {"override": {"statefulSet": {"metadata": {"annotations": {"a": "b"}}}}},
    {
        "nodes": [
            {"ordinal": 0, "annotations": {"a": "b"}, "derpNodePort": 30001, "stunNodePort": 30002},
            {"ordinal": 1, "ipv4": "192.0.2.1", "ipv6": "none", "derpPort": 443, "stunPort": 3478},
        ]
    },
    {"exposure": {"type": "LoadBalancer"}, "nodes": [{"ordinal": 0, "loadBalancerIP": "192.0.2.1"}]},
]
ZONES = {"maxSkew": 1, "topologyKey": "topology.kubernetes.io/zone", "whenUnsatisfiable": "DoNotSchedule"}
HOST_PORT: Spec = {"exposure": {"type": "HostPort"}}
TEMPLATE: Spec = {
    "tls": {"hostName": "Template", "hostNameTemplate": "{pod}.example.com", "certificates": [{"secretName": "a"}]}
}
KEEPS_ON: list[tuple[Spec, Spec]] = [
    (HOST_PORT, {"exposure": {"type": "HostPort", "hostPort": {"addressType": "ExternalIP"}}}),
    (HOST_PORT, {"exposure": {"type": "HostPort", "hostPort": {"addressLabel": "example.com/ip"}}}),
    (TEMPLATE, {"tls": TEMPLATE["tls"] | {"hostNameTemplate": "{pod}.example.org", "pin": "Always"}}),
    (TEMPLATE, {"nodes": [{"ordinal": 0, "hostName": "relay.example.com"}]}),
]
# .. and these are in the pods themselves.
ROLLS: list[Spec] = [
    {"image": "derper:2"},
    {"imagePullPolicy": "Always"},
    {"imagePullSecrets": [{"name": "pull"}]},
    {"exposure": {"type": "HostPort"}},
    {"tls": {"hostName": "Template", "hostNameTemplate": "{pod}.example.com", "certificates": [{"secretName": "a"}]}},
    {"clients": {"keysFrom": {"configMapKeyRef": {"name": "clients", "key": "keys"}}}},
    {"clients": {"keysFrom": {"secretKeyRef": {"name": "clients", "key": "keys"}}}},
    {"exposure": {"type": "HostPort", "hostPort": {"derpPort": 8443, "stunPort": 3479}}},
    {"pod": {"resources": {"limits": {"memory": "1Gi"}}}},
    {"pod": {"nodeSelector": {"a": "b"}}},
    {"pod": {"tolerations": [{"operator": "Exists"}]}},
    {"pod": {"priorityClassName": "high"}},
    {"pod": {"annotations": {"a": "b"}}},
    {"pod": {"labels": {"a": "b"}}},
    {"pod": {"affinity": {"nodeAffinity": {}}}},
    {"pod": {"workers": 2}},
    {"pod": {"topologySpreadConstraints": [ZONES]}},
    {"pod": {"runtimeClassName": "gvisor"}},
    {"pod": {"schedulerName": "other"}},
    {"pod": {"terminationGracePeriodSeconds": 90}},
    {"pod": {"env": [{"name": "A", "value": "b"}]}},
    {"override": {"statefulSet": {"spec": {"template": {"spec": {"dnsPolicy": "Default"}}}}}},
]


def template(**spec: Any) -> Any:
    return find(manifests(region(**(BASE | spec))), "StatefulSet", "berlin")["spec"]["template"]


def rest(**spec: Any) -> Any:
    """The StatefulSet without the two fields that may change."""
    found = find(manifests(region(**(BASE | spec))), "StatefulSet", "berlin")["spec"]
    return {key: value for key, value in found.items() if key not in ("replicas", "template")}


def container(**spec: Any) -> Any:
    return template(**spec)["spec"]["containers"][0]


@pytest.mark.parametrize("change", KEEPS, ids=str)
def test_changes_that_leave_running_pods_alone(change: Spec) -> None:
    assert template(**change) == template()


@pytest.mark.parametrize(("base", "change"), KEEPS_ON, ids=str)
def test_changes_of_other_regions_that_leave_running_pods_alone(base: Spec, change: Spec) -> None:
    assert template(**base | change) == template(**base)


@pytest.mark.parametrize("change", ROLLS, ids=str)
def test_changes_that_replace_the_pods(change: Spec) -> None:
    assert template(**change) != template()


@pytest.mark.parametrize("change", KEEPS + ROLLS, ids=str)
def test_the_rest_of_a_stateful_set_never_changes(change: Spec) -> None:
    assert rest(**change) == rest()


def fields(value: Any, path: str = "") -> Iterator[str]:
    """The paths in a spec, as `leaves` gives those of the schema."""
    if path:
        yield path
    if isinstance(value, dict):
        for key, item in value.items():
            yield from fields(item, f"{path}.{key}")
    elif isinstance(value, list):
        for item in value:
            yield from (below for below in fields(item, f"{path}[]") if below != f"{path}[]")


def test_the_matrix_has_every_field() -> None:
    """A new field must say whether it restarts relays."""
    known = {
        path
        for change in [BASE, resource()["spec"], *KEEPS, *ROLLS, *(change for _, change in KEEPS_ON)]
        for path in fields(change)
    }
    assert set(leaves(schema()["properties"]["spec"], "")) - known == set()


def test_members_and_keys_leave_the_template_alone() -> None:
    wanted = region(**BASE)
    more = manifests(wanted, members=(*wanted.pods, "berlin-3", "berlin-7"))
    assert find(more, "StatefulSet", "berlin") == find(manifests(wanted), "StatefulSet", "berlin")


def test_the_same_input_gives_the_same_bytes() -> None:
    first, second = (json.dumps(manifests(region(replicas=12, **BASE))) for _ in range(2))
    assert first == second


def test_settings_are_in_the_order_of_ordinals() -> None:
    settings = find(manifests(region(replicas=12)), "ConfigMap", "berlin-settings")["data"]["settings.json"]
    assert list(json.loads(settings)["nodes"]) == [f"berlin-{number}" for number in range(12)]


def test_children_are_those_that_names_are_reserved_for() -> None:
    for exposure in ("NodePort", "HostPort"):
        wanted = region(exposure={"type": exposure})
        rendered = [(item["kind"], item["metadata"]["name"]) for item in manifests(wanted)]
        reserved = identities(wanted, wanted.pods)
        assert rendered == [item for item in reserved if item != ("ConfigMap", "berlin-derpmap")]


def test_no_manifest_has_an_empty_value() -> None:
    """The API server drops them, and the comparison with what it recorded would never end."""

    def empty(value: object, path: str) -> list[str]:
        if isinstance(value, dict):
            nested = [hit for key, item in value.items() for hit in empty(item, f"{path}.{key}")]
            return nested or ([path] if not value else [])
        if isinstance(value, list):
            return [hit for item in value for hit in empty(item, path + "[]")] or ([path] if not value else [])
        return [path] if value in (None, "", 0) and value is not False else []

    allowed = {".spec.ingress[].from[].namespaceSelector"}  # an empty selector means all
    found = {hit for item in manifests(region(exposure={"type": "HostPort"})) for hit in empty(item, "")}
    assert found <= allowed


def test_every_child_belongs_to_the_region() -> None:
    for item in manifests(region()):
        meta = item["metadata"]
        assert meta["namespace"] == "derp"
        assert meta["labels"]["app.kubernetes.io/managed-by"] == "derp-operator"
        assert [(owner["uid"], owner["controller"]) for owner in meta["ownerReferences"]] == [("uid-1", True)]


def test_the_relay_starts_with_constant_arguments() -> None:
    assert container()["args"] == list(ARGS)
    assert container()["env"][0]["valueFrom"]["fieldRef"]["fieldPath"] == "metadata.name"
    assert not any("berlin" in argument for argument in ARGS)


@pytest.mark.parametrize("count", [0, 2])
def test_workers_are_asked_for(count: int) -> None:
    assert container(pod={"workers": count})["args"] == [*ARGS, "-workers", str(count)]


@pytest.mark.parametrize("exposure", ["LoadBalancer", "NodePort", "HostPort", "ClusterIP"])
def test_pods_keep_to_the_restricted_profile(exposure: str) -> None:
    pod = template(exposure={"type": exposure})["spec"]
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert pod["automountServiceAccountToken"] is False
    assert not {"hostNetwork", "hostPID", "hostIPC"} & pod.keys()
    security = pod["containers"][0]["securityContext"]
    assert security["allowPrivilegeEscalation"] is False
    assert security["capabilities"] == {"drop": ["ALL"]}
    assert security["readOnlyRootFilesystem"] is True
    assert {next(iter(volume.keys() - {"name"})) for volume in pod["volumes"]} <= {"secret", "configMap"}
    ports = [port.get("hostPort") for port in pod["containers"][0]["ports"]]
    assert ports == ([443, 3478, None] if exposure == "HostPort" else [None] * 3)


def test_a_relay_that_hangs_is_not_given_time_to_drain() -> None:
    probe = container()["livenessProbe"]
    assert probe["terminationGracePeriodSeconds"] == 1
    assert template()["spec"]["terminationGracePeriodSeconds"] == 60


def test_host_ports_need_nodes_of_their_own_and_keep_the_users_affinity() -> None:
    term = "requiredDuringSchedulingIgnoredDuringExecution"
    user = {"podAntiAffinity": {term: [{"topologyKey": "zone"}]}, "nodeAffinity": {term: {"nodeSelectorTerms": []}}}
    found = template(exposure={"type": "HostPort"}, pod={"affinity": user})["spec"]["affinity"]
    assert [item["topologyKey"] for item in found["podAntiAffinity"][term]] == ["zone", "kubernetes.io/hostname"]
    assert found["nodeAffinity"] == user["nodeAffinity"]


def test_a_cluster_without_zones_still_spreads_pods_over_nodes() -> None:
    """The scheduler ranks no node that lacks the label of any soft spread constraint: zones must not be one."""
    found = template()["spec"]
    assert [item["topologyKey"] for item in found["topologySpreadConstraints"]] == ["kubernetes.io/hostname"]
    zones = found["affinity"]["podAntiAffinity"]["preferredDuringSchedulingIgnoredDuringExecution"]
    assert [item["podAffinityTerm"]["topologyKey"] for item in zones] == ["topology.kubernetes.io/zone"]


def test_the_users_spread_replaces_ours_and_selects_the_regions_pods() -> None:
    (found,) = template(pod={"topologySpreadConstraints": [ZONES]})["spec"]["topologySpreadConstraints"]
    assert found == ZONES | {"labelSelector": {"matchLabels": names.selector("berlin")}}


def test_the_service_account_may_be_annotated() -> None:
    found = manifests(region(pod={"serviceAccountAnnotations": {"a": "b"}}))
    assert find(found, "ServiceAccount", "berlin")["metadata"]["annotations"] == {"a": "b"}


def test_services_keep_the_clients_address_and_serve_before_readiness() -> None:
    for kind, policy in (("LoadBalancer", "Local"), ("NodePort", "Local"), ("ClusterIP", None)):
        service = find(manifests(region(exposure={"type": kind})), "Service", "berlin-1")
        spec = service["spec"]
        assert spec["selector"] == {"statefulset.kubernetes.io/pod-name": "berlin-1"}
        assert spec.get("externalTrafficPolicy") == policy
        assert spec["publishNotReadyAddresses"] is True
        assert [port["protocol"] for port in spec["ports"]] == ["TCP", "UDP"]


def test_a_traffic_policy_and_families_are_as_given() -> None:
    node_port = {"externalTrafficPolicy": "Cluster"}
    for families, policy in ((["IPv6"], "SingleStack"), (["IPv6", "IPv4"], "RequireDualStack")):
        exposure = {"type": "NodePort", "nodePort": node_port, "ipFamilies": families}
        spec = find(manifests(region(exposure=exposure)), "Service", "berlin-1")["spec"]
        assert (spec["externalTrafficPolicy"], spec["ipFamilyPolicy"], spec["ipFamilies"]) == (
            "Cluster",
            policy,
            families,
        )


@pytest.mark.parametrize("kind", ["LoadBalancer", "NodePort", "ClusterIP"])
def test_annotations_may_name_the_pod(kind: str) -> None:
    key = "clusterIP" if kind == "ClusterIP" else kind[0].lower() + kind[1:]
    annotations = {"hostname": "{pod}.{region}.example.com", "json": '{"a": {"b": "{ordinal}"}}'}
    found = manifests(region(exposure={"type": kind, key: {"annotations": annotations}}))
    expected = {"hostname": "berlin-1.berlin.example.com", "json": '{"a": {"b": "1"}}'}
    assert find(found, "Service", "berlin-1")["metadata"]["annotations"] == expected


def test_node_ports_count_up_from_their_base() -> None:
    found = manifests(region(exposure={"type": "NodePort", "nodePort": {"derpPortBase": 30443}}))
    ports = [find(found, "Service", f"berlin-{number}")["spec"]["ports"] for number in range(3)]
    assert [item[0]["nodePort"] for item in ports] == [30443, 30444, 30445]
    assert "nodePort" not in ports[0][1]


def test_a_node_may_differ_from_the_others() -> None:
    exposure = {"type": "LoadBalancer", "loadBalancer": {"annotations": {"a": "all", "b": "all"}}}
    own = {
        "ordinal": 1,
        "annotations": {"b": "{pod}"},
        "loadBalancerIP": "192.0.2.1",
        "derpNodePort": 30001,
        "stunNodePort": 30002,
    }
    found = manifests(region(exposure=exposure, nodes=[own]))
    other, service = (find(found, "Service", f"berlin-{number}") for number in range(2))
    assert service["metadata"]["annotations"] == {"a": "all", "b": "berlin-1"}
    assert service["spec"]["loadBalancerIP"] == "192.0.2.1"
    assert [port["nodePort"] for port in service["spec"]["ports"]] == [30001, 30002]
    assert other["metadata"]["annotations"] == {"a": "all", "b": "all"}
    assert "loadBalancerIP" not in other["spec"]
    assert not any("nodePort" in port for port in other["spec"]["ports"])


def test_the_hash_follows_what_pods_re_read() -> None:
    wanted = region()
    before = config_hash(manifests(wanted), wanted, [None])
    assert config_hash(manifests(wanted, image="derper:9"), wanted, [None]) == before
    assert config_hash(manifests(wanted, members=(*wanted.pods, "berlin-3")), wanted, [None]) != before
    assert config_hash(manifests(wanted), wanted, [{}]) != before, "what the user provides has come"
    assert config_hash(manifests(wanted), wanted, [{"tls.crt": b"a"}]) != config_hash(manifests(wanted), wanted, [{}])


def test_what_users_name_may_come_later() -> None:
    tls = {"hostName": "Template", "hostNameTemplate": "{pod}.a.example", "certificates": [{"secretName": "a.b"}]}
    clients = {"keysFrom": {"secretKeyRef": {"name": "clients", "key": "keys"}}}
    pod = template(tls=tls, clients=clients)["spec"]
    mounts = {mount["mountPath"]: mount["name"] for mount in pod["containers"][0]["volumeMounts"]}
    volumes = {volume["name"]: volume["secret"] for volume in pod["volumes"] if "secret" in volume}
    assert volumes[mounts["/etc/derper/tls/a.b"]] == {"secretName": "a.b", "defaultMode": 0o440, "optional": True}
    assert volumes[mounts["/etc/derper/clients"]]["optional"] is True


def test_the_order_of_children_carries_scaling() -> None:
    kinds = [item["kind"] for item in manifests(region())]
    assert kinds[-1] == "StatefulSet"
