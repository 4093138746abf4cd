"""What the API server accepts as a DerpRegion, and the sentences with which it refuses the rest."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from .controlplane import ControlPlane

Object = dict[str, Any]

CERTIFICATES = [{"secretName": "derp-tls"}]
TEMPLATE = {"hostName": "Template", "hostNameTemplate": "{pod}.derp.example.com", "certificates": CERTIFICATES}


def region(name: str = "berlin", **spec: Any) -> Object:
    """The smallest region, with fields of its spec replaced; None leaves one out."""
    whole = {"regionID": 900, "clients": {"open": True}, **spec}
    return {
        "apiVersion": "derp.network/v1alpha1",
        "kind": "DerpRegion",
        "metadata": {"name": name, "namespace": "default"},
        "spec": {key: value for key, value in whole.items() if value is not None},
    }


def created(api: ControlPlane, manifest: Object) -> Object:
    """The object as it would be stored."""
    done = api.kubectl("create", "--dry-run=server", "--output=json", "--filename=-", manifest=manifest)
    assert done.returncode == 0, done.stderr
    result: Object = json.loads(done.stdout)
    return result


def refusal(api: ControlPlane, manifest: Object) -> str:
    """Why the object is refused."""
    done = api.kubectl("create", "--dry-run=server", "--filename=-", manifest=manifest)
    assert done.returncode != 0, "it was accepted"
    return done.stderr


def exposed(kind: str, **options: Any) -> Object:
    return {"exposure": {"type": kind, kind[0].lower() + kind[1:]: options}}


def keys(**reference: Any) -> Object:
    return {"clients": {"keysFrom": reference}}


def test_defaults(api: ControlPlane) -> None:
    assert created(api, region())["spec"] == {
        "regionID": 900,
        "replicas": 3,
        "paused": False,
        "imagePullPolicy": "IfNotPresent",
        "exposure": {"type": "LoadBalancer"},
        "tls": {"hostName": "Generated", "pin": "Auto", "lifetime": "8760h", "retireAfter": "24h"},
        "clients": {"open": True, "failOpen": False},
    }
    hosted = created(api, region(exposure={"type": "HostPort", "hostPort": {}}, tls={}))
    assert hosted["spec"]["exposure"]["hostPort"] == {"addressType": "Auto", "derpPort": 443, "stunPort": 3478}
    assert hosted["spec"]["tls"] == {"hostName": "Generated", "pin": "Auto", "lifetime": "8760h", "retireAfter": "24h"}


NODE_AFFINITY = {
    "requiredDuringSchedulingIgnoredDuringExecution": {
        "nodeSelectorTerms": [{"matchExpressions": [{"key": "zone", "operator": "In", "values": ["a"]}]}]
    }
}
SPREAD = {"maxSkew": 1, "topologyKey": "topology.kubernetes.io/zone", "whenUnsatisfiable": "DoNotSchedule"}
POD_TERM = {"topologyKey": "kubernetes.io/hostname", "labelSelector": {"matchLabels": {"app": "noisy"}}}


@pytest.mark.parametrize(
    "spec",
    [
        {"regionID": 999, "replicas": 64, "regionCode": "ber-1", "regionName": "Berlin – Süd"},
        exposed(
            "LoadBalancer", derpPort=8443, sourceRanges=["192.0.2.0/24", "2001:db8::/32"], annotations={"a/b": "c"}
        ),
        exposed("NodePort", addressType="ExternalIP", derpPortBase=65533, stunPortBase=30000),
        exposed("NodePort", derpPortBase=30001, stunPortBase=30004),
        exposed("NodePort", addressLabel="example.com/public-ip", externalTrafficPolicy="Cluster"),
        exposed("HostPort", addressLabel="example.com/public-ip"),
        exposed("LoadBalancer")
        | {
            "nodes": [
                {"ordinal": 0, "annotations": {"a/b": "c"}, "loadBalancerIP": "192.0.2.1", "derpNodePort": 30001},
                {"ordinal": 63, "ipv4": "192.0.2.1", "ipv6": "2001:db8::1", "derpPort": 443, "stunPort": 3478},
                {"ordinal": 2, "ipv4": "none", "ipv6": "2001:db8::1", "stunNodePort": 30002},
            ]
        },
        {"tls": TEMPLATE, "nodes": [{"ordinal": 0, "hostName": "relay1.example.com"}]},
        {"pod": {"topologySpreadConstraints": [SPREAD], "runtimeClassName": "gvisor", "schedulerName": "other"}},
        {"pod": {"env": [{"name": "HTTPS_PROXY", "value": ""}], "serviceAccountAnnotations": {"a/b": "c"}}},
        {"exposure": {"ipFamilies": ["IPv6", "IPv4"], "loadBalancer": {"externalTrafficPolicy": "Cluster"}}},
        exposed("HostPort", derpPort=1, stunPort=65535),
        {"exposure": {"type": "ClusterIP", "clusterIP": {"derpPort": 8443}}},
        {"tls": TEMPLATE | {"pin": "Always"}},
        {"tls": TEMPLATE | {"hostNameTemplate": "derp{ordinal}-{region}.{namespace}.example.com"}},
        {"clients": {"verifyURLs": ["https://headscale.example.com/verify", "http://[2001:db8::1]:8080/"]}},
        {"clients": {"verifyURLs": ["https://a.example/verify"], "failOpen": True}},
        keys(configMapKeyRef={"name": "clients.v1", "key": "keys_1.txt"}),
        keys(secretKeyRef={"name": "clients", "key": ".keys"}),
        {"limits": {"acceptConnectionsPerSecond": 10, "acceptBurst": 5, "clientBytesPerSecond": 10**10}},
        {"map": {"latitude": -52.5, "longitude": 13, "noMeasureNoHome": True}},
        {"map": {"spread": "1m30s"}},
        {"regionID": 997, "map": {"layout": "RegionPerNode"}},
        {"map": {"nodeOrder": [2, 0], "consumers": [{"name": "tailnet-a", "nodeOrder": [1]}, {"name": "b"}]}},
        {"map": {"mergeInto": "derpmap", "consumers": [{"name": "a", "mergeInto": "all-of-a"}]}},
        {"map": {"firstRegionID": 910, "consumers": [{"name": "a", "layout": "RegionPerNode"}]}},
        {"map": {"layout": "RegionPerNode", "consumers": [{"name": "a", "layout": "Region", "nodeOrder": [1]}]}},
        {"regionID": 999, "replicas": 64, "map": {"layout": "RegionPerNode", "firstRegionID": 936}},
        {"pod": {"resources": {"requests": {"cpu": 1, "memory": "64Mi"}, "limits": {"memory": "1e9"}}}},
        {"pod": {"labels": {"team": "net"}, "annotations": {"example.com/x": "y"}, "nodeSelector": {"zone": "a"}}},
        {"pod": {"tolerations": [{"key": "edge", "operator": "Exists", "effect": "NoSchedule"}]}},
        {"pod": {"affinity": {"nodeAffinity": NODE_AFFINITY}}},
        {
            "pod": {
                "affinity": {
                    "podAntiAffinity": {
                        "preferredDuringSchedulingIgnoredDuringExecution": [{"weight": 9, "podAffinityTerm": POD_TERM}]
                    }
                }
            }
        },
        {"image": "derper@sha256:" + "0" * 64, "imagePullPolicy": "Always", "imagePullSecrets": [{"name": "pull"}]},
    ],
)
def test_good_specs_are_stored_as_they_are(api: ControlPlane, spec: Object) -> None:
    stored = created(api, region(**spec))["spec"]
    for field, value in spec.items():
        assert includes(stored[field], value)


def includes(whole: Any, part: Any) -> bool:
    if isinstance(part, dict):
        return isinstance(whole, dict) and all(key in whole and includes(whole[key], part[key]) for key in part)
    return bool(whole == part)


@pytest.mark.parametrize(
    ("spec", "sentence"),
    [
        ({"replicas": 2}, "spec.replicas: Invalid value: 2: a region needs at least 3 relays"),
        ({"replicas": 65}, "spec.replicas: Invalid value: 65: a region has at most 64 relays"),
        ({"regionID": 5}, "spec.regionID: Invalid value: 5: choose an id from 900 to 999"),
        ({"regionID": 1000}, "spec.regionID: Invalid value: 1000: choose an id from 900 to 999"),
        ({"regionID": "900"}, "spec.regionID in body must be of type integer"),
        ({"regionID": None}, "spec.regionID: Required value"),
        ({"replcas": 3}, 'unknown field "spec.replcas"'),
        ({"regionCode": "a b"}, 'Invalid value: "a b": a region code is made of letters, digits and dashes'),
        ({"regionCode": ""}, "a region code is made of letters, digits and dashes"),
        ({"regionName": "a\nb"}, "a region name is one line of text"),
        ({"image": "derper 1.0"}, "an image reference has no spaces"),
        (
            {"exposure": {"type": "Nodeport"}},
            'Unsupported value: "Nodeport": supported values: "LoadBalancer", "NodePort"',
        ),
        ({"exposure": {"nodePort": {}}}, 'nodePort" has the options of type NodePort, but the type is LoadBalancer'),
        (
            {"exposure": {"type": "NodePort", "hostPort": {}}},
            'hostPort" has the options of type HostPort, but the type is N',
        ),
        ({"exposure": {"type": "HostPort", "clusterIP": {}}}, 'clusterIP" has the options of type ClusterIP'),
        ({"exposure": {"type": "HostPort", "loadBalancer": {}}}, 'loadBalancer" has the options of type LoadBalancer'),
        (
            exposed("LoadBalancer", derpPort=70000),
            "spec.exposure.loadBalancer.derpPort in body should be less than or equal",
        ),
        (
            exposed("HostPort", stunPort=0),
            "spec.exposure.hostPort.stunPort in body should be greater than or equal to 1",
        ),
        (exposed("NodePort", derpPortBase=65534), "derpPortBase + replicas - 1 is the port of the last relay"),
        (exposed("NodePort", derpPortBase=30001, stunPortBase=30001), "must be at least as far apart as there are"),
        (exposed("NodePort", derpPortBase=30003, stunPortBase=30001), "must be at least as far apart as there are"),
        (exposed("NodePort", stunPortBase=65534), "stunPortBase + replicas - 1 is the port of the last relay"),
        (
            exposed("NodePort", addressLabel="a", addressType="InternalIP"),
            "addressLabel says which address it is; remove addressType",
        ),
        (exposed("HostPort", addressLabel="a", addressType="ExternalIP"), "addressLabel says which address it is"),
        (exposed("HostPort") | {"nodes": [{"ordinal": 0, "annotations": {}}]}, "exposure HostPort has none; remove"),
        (
            exposed("NodePort") | {"nodes": [{"ordinal": 0, "loadBalancerIP": "192.0.2.1"}]},
            "loadBalancerIP is only for exposure LoadBalancer",
        ),
        (
            exposed("HostPort") | {"nodes": [{"ordinal": 0, "derpNodePort": 3}]},
            "are only for exposure LoadBalancer and",
        ),
        ({"nodes": [{"ordinal": 0, "hostName": "a.b"}]}, "hostName of a node is only for tls.hostName: Template"),
        ({"tls": TEMPLATE, "nodes": [{"ordinal": 0, "hostName": "A"}]}, '"A" is not a lower-case DNS name like relay1'),
        ({"nodes": [{"ordinal": 0, "loadBalancerIP": "a"}]}, '"a" is not an IP address'),
        ({"nodes": [{"ordinal": 0, "ipv4": "2001:db8::1"}]}, '"2001:db8::1" is not an IPv4 address like 192.0.2.1'),
        ({"nodes": [{"ordinal": 0, "ipv6": "192.0.2.1"}]}, '"192.0.2.1" is not an IPv6 address like 2001:db8::1'),
        ({"nodes": [{"ordinal": 0, "ipv4": "none"}]}, "ipv4 and ipv6 leave no address"),
        ({"nodes": [{"ordinal": 0, "derpNodePort": 30001, "stunNodePort": 30001}]}, "must differ, because a node port"),
        ({"nodes": [{"ordinal": 0}, {"ordinal": 0}]}, "spec.nodes[1]: Duplicate value"),
        ({"nodes": [{"ordinal": 64}]}, "spec.nodes[0].ordinal in body should be less than or equal to 63"),
        ({"nodes": [{}]}, "spec.nodes[0].ordinal: Required value"),
        (
            {"pod": {"env": [{"name": "POD_NAME", "value": "a"}]}},
            "POD_NAME is set by the operator; choose another name",
        ),
        ({"pod": {"terminationGracePeriodSeconds": 5}}, "in body should be greater than or equal to 30"),
        ({"exposure": {"ipFamilies": ["IPv4", "IPv4"]}}, 'spec.exposure.ipFamilies[1]: Duplicate value: "IPv4"'),
        ({"exposure": {"ipFamilies": ["ipv4"]}}, 'Unsupported value: "ipv4": supported values: "IPv4", "IPv6"'),
        ({"exposure": {"ipFamilies": []}}, "spec.exposure.ipFamilies in body should have at least 1 items"),
        (exposed("LoadBalancer", sourceRanges=["192.0.2.1"]), '"192.0.2.1" is not a network like 192.0.2.0/24'),
        (exposed("LoadBalancer", sourceRanges=["192.0.2.1/24"]), '"192.0.2.1/24" is not a network like 192.0.2.0/24'),
        (
            {"tls": {"hostName": "Template", "certificates": CERTIFICATES}},
            "Template needs hostNameTemplate, for example",
        ),
        ({"tls": TEMPLATE | {"certificates": []}}, "Template needs certificates: name at least one Secret"),
        (
            {"tls": {"certificates": CERTIFICATES}},
            "certificates are only for hostName: Template; with Generated the operator",
        ),
        (
            {"tls": {"hostNameTemplate": "{pod}.x.y"}},
            "hostNameTemplate is only for hostName: Template, but hostName is G",
        ),
        ({"tls": {"pin": "Never"}}, "pin is only for hostName: Template"),
        ({"tls": TEMPLATE | {"hostNameTemplate": "derp.example.com"}}, "every relay needs a name of its own"),
        ({"tls": TEMPLATE | {"hostNameTemplate": "{pod}.{node}.com"}}, "does not give lower-case DNS names"),
        ({"tls": TEMPLATE | {"hostNameTemplate": "{pod}"}}, "does not give lower-case DNS names"),
        ({"tls": TEMPLATE | {"certificates": [{"secretName": "A"}]}}, "a Secret's name is made of lower-case letters"),
        (
            {"clients": None},
            "say whom the relays serve: set clients.verifyURLs or clients.keysFrom, or clients.open: true",
        ),
        ({"clients": {}}, "say whom the relays serve: set verifyURLs or keysFrom, or open: true"),
        ({"clients": {"verifyURLs": []}}, "say whom the relays serve"),
        ({"clients": {"open": True, "verifyURLs": ["https://a.example/"]}}, "open: true lets everybody in"),
        ({"clients": {"verifyURLs": ["ftp://a.example/"]}}, '"ftp://a.example/" is not a URL like https://headscale'),
        ({"clients": {"verifyURLs": ["headscale"]}}, '"headscale" is not a URL like https://headscale'),
        ({"clients": {"open": True, "failOpen": True}}, "failOpen is about verifyURLs that do not answer"),
        (keys(), "set exactly one of configMapKeyRef and secretKeyRef"),
        (
            keys(configMapKeyRef={"name": "a", "key": "b"}, secretKeyRef={"name": "a", "key": "b"}),
            "set exactly one of configMapKeyRef and secretKeyRef",
        ),
        (keys(configMapKeyRef={"name": "a", "key": "../b"}), "an entry's name is made of letters, digits"),
        (keys(configMapKeyRef={"name": "a", "key": "..b"}), "an entry's name is made of letters, digits"),
        (keys(secretKeyRef={"name": "A_", "key": "b"}), "an object's name is made of lower-case letters"),
        ({"limits": {"acceptBurst": 1}}, "acceptBurst has an effect only together with acceptConnectionsPerSecond"),
        ({"limits": {"clientBurstBytes": 1}}, "clientBurstBytes has an effect only together with clientBytesPerSecond"),
        ({"map": {"spread": "2h"}}, 'spread is "2h": write a duration of at most 1h, like 30s or 5m'),
        ({"map": {"spread": "soon"}}, 'spread is "soon": write a duration of at most 1h'),
        ({"map": {"latitude": 52.5}}, "latitude and longitude belong together"),
        ({"map": {"firstRegionID": 910}}, "firstRegionID is only for layout RegionPerNode"),
        (
            {"map": {"layout": "RegionPerNode", "nodeOrder": [1]}},
            "nodeOrder is only for layout Region, as with RegionPerNode no region has several nodes",
        ),
        (
            {"map": {"layout": "RegionPerNode", "consumers": [{"name": "a", "nodeOrder": [1]}]}},
            "nodeOrder of a consumer is only for layout Region",
        ),
        ({"map": {"mergeInto": "All"}}, "a merged map is made of lower-case letters, digits and dashes, like derpmap"),
        ({"map": {"nodeOrder": [1, 1]}}, "spec.map.nodeOrder[1]: Duplicate value: 1"),
        ({"map": {"consumers": [{"name": "a"}, {"name": "a"}]}}, "spec.map.consumers[1]: Duplicate value"),
        (
            {"map": {"consumers": [{"name": "Tailnet A"}]}},
            "lower-case letters, digits and dashes, like tailnet-a",
        ),
        (
            {"regionID": 998, "map": {"consumers": [{"name": "a", "layout": "RegionPerNode"}]}},
            "and the last one would be above 999",
        ),
        ({"regionID": 998, "map": {"layout": "RegionPerNode"}}, "and the last one would be above 999"),
        (
            {"replicas": 5, "map": {"layout": "RegionPerNode", "firstRegionID": 996}},
            "set map.firstRegionID to a lower id, or replicas to fewer",
        ),
        ({"map": {"latitude": 95, "longitude": 0}}, "spec.map.latitude in body should be less than or equal to 90"),
        ({"pod": {"labels": {"app.kubernetes.io/name": "x"}}}, "are the operator's own; choose another key"),
        ({"pod": {"annotations": {"derp.network/config-hash": "x"}}}, "are the operator's own; choose another key"),
        ({"pod": {"resources": {"limits": {"cpu": "5x"}}}}, "spec.pod.resources.limits.cpu in body should match"),
    ],
)
def test_bad_specs_are_refused_in_words_that_help(api: ControlPlane, spec: Object, sentence: str) -> None:
    assert sentence in refusal(api, region(**spec))


@pytest.mark.parametrize("name", ["a" * 41, "1a", "a.b", "a-" * 20 + "b"])
def test_bad_names_are_refused(api: ControlPlane, name: str) -> None:
    assert f'metadata.name: Invalid value: "{name}" cannot name a region: use at most 40' in refusal(api, region(name))


def test_names_of_40_characters_are_fine(api: ControlPlane) -> None:
    created(api, region("a" * 40))
    created(api, region("b"))


@pytest.fixture
def stored(api: ControlPlane) -> Iterator[Object]:
    """A stored region."""
    manifest = region("stored", exposure={"type": "NodePort", "nodePort": {"derpPortBase": 65500}})
    done = api.kubectl("create", "--output=json", "--filename=-", manifest=manifest)
    assert done.returncode == 0, done.stderr
    yield json.loads(done.stdout)
    assert api.kubectl("delete", "derpregion/stored").returncode == 0


@pytest.mark.parametrize(
    ("replicas", "sentence"),
    [
        (2, "a region needs at least 3 relays"),
        (0, "a region needs at least 3 relays"),
        (65, "a region has at most 64 relays"),
        (40, "derpPortBase + replicas - 1 is the port of the last relay"),
    ],
)
def test_scale_obeys_the_same_rules(api: ControlPlane, stored: Object, replicas: int, sentence: str) -> None:
    done = api.kubectl("scale", "derpregion/stored", f"--replicas={replicas}")
    assert done.returncode != 0
    assert sentence in done.stderr


def test_scale_up_and_down(api: ControlPlane, stored: Object) -> None:
    for replicas in (5, 3):
        assert api.kubectl("scale", "derpregion/stored", f"--replicas={replicas}").returncode == 0
        scale = json.loads(api.kubectl("get", "--raw", scale_path("stored")).stdout)
        assert scale["spec"]["replicas"] == replicas


def scale_path(name: str) -> str:
    return f"/apis/derp.network/v1alpha1/namespaces/default/derpregions/{name}/scale"


def test_the_region_id_cannot_change(api: ControlPlane, stored: Object) -> None:
    done = api.kubectl("patch", "derpregion/stored", "--type=merge", '--patch={"spec":{"regionID":901}}')
    assert "the id of a region cannot change, because clients remember it" in done.stderr
    assert (
        api.kubectl("patch", "derpregion/stored", "--type=merge", '--patch={"spec":{"regionName":"B"}}').returncode == 0
    )


STATUS: Object = {
    "observedGeneration": 1,
    "replicas": 3,
    "readyReplicas": 2,
    "selector": "derp.network/region=stored",
    "inMap": "3/3",
    "certNotAfter": "2027-11-22T00:00:00Z",
    "nodes": [
        {
            "name": "900a",
            "pod": "stored-0",
            "hostName": "stored-0-g1.derp.internal",
            "certName": "sha256-raw:" + "0" * 64,
            "certNotAfter": "2027-11-22T00:00:00Z",
            "ipv4": "198.18.0.1",
            "ipv6": "none",
            "derpPort": 30443,
            "stunPort": 30478,
            "mesh": "1/2",
            "ready": False,
            "inMap": True,
            "message": "Node stored-0 has no mesh link with stored-2.",
        }
    ],
    "map": {"configMap": "stored-derpmap", "hash": "0" * 64, "publishedAt": "2026-11-22T00:00:00Z"},
    "conditions": [
        {
            "type": "Ready",
            "status": "False",
            "observedGeneration": 1,
            "lastTransitionTime": "2026-11-22T00:00:00Z",
            "reason": "MeshIncomplete",
            "message": "Node stored-0 has no mesh link with stored-2.",
        }
    ],
}


def test_status_is_kept_whole_and_answers_the_question_of_the_person_on_call(api: ControlPlane, stored: Object) -> None:
    patch = f"--patch={json.dumps({'status': STATUS})}"
    done = api.kubectl("patch", "derpregion/stored", "--subresource=status", "--type=merge", "--output=json", patch)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["status"] == STATUS

    header, row = api.kubectl("get", "derp", "stored").stdout.splitlines()
    assert header.split() == ["NAME", "ID", "DESIRED", "READY", "IN-MAP", "STATUS", "AGE"]
    assert row.split()[:-1] == ["stored", "900", "3", "2", "3/3", "MeshIncomplete"]
    header, row = api.kubectl("get", "derpr", "stored", "--output=wide").stdout.splitlines()
    assert header.split()[6:] == ["EXPOSURE", "CERT-EXPIRY", "MESSAGE", "AGE"]
    assert "NodePort   2027-11-22T00:00:00Z   Node stored-0 has no mesh link with stored-2." in row

    scale = json.loads(api.kubectl("get", "--raw", scale_path("stored")).stdout)
    assert scale["status"] == {"replicas": 3, "selector": "derp.network/region=stored"}
    assert (
        "stored" in api.kubectl("get", "derp", "--output=name").stdout
    )  # the category and the short name are one word


def test_status_of_an_unknown_shape_is_refused(api: ControlPlane, stored: Object) -> None:
    patch = json.dumps({"status": {"nodes": [{"pod": "x"}], "conditions": [{"type": "Ready", "status": "true"}]}})
    done = api.kubectl("patch", "derpregion/stored", "--subresource=status", "--type=merge", f"--patch={patch}")
    assert "status.nodes[0].name: Required value" in done.stderr
    assert 'Unsupported value: "true"' in done.stderr


def test_every_field_is_explained(api: ControlPlane) -> None:
    text = api.kubectl("explain", "derpregion", "--recursive", "--api-version=derp.network/v1alpha1").stdout
    assert "verifyURLs" in text
    schema = json.loads(api.kubectl("get", "crd", "derpregions.derp.network", "--output=json").stdout)
    whole = schema["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
    assert list(unexplained(whole, "")) == []


def unexplained(schema: Object, path: str) -> Iterator[str]:
    for name, field in schema.get("properties", {}).items():
        if "description" not in field and path + name not in ("metadata", "metadata.name"):
            yield path + name
        yield from unexplained(field.get("items", field), f"{path}{name}.")
