"""The spec as the operator reads it, and the sentences for what an older schema may have let in."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
from derp_operator.names import node_name, ordinal_of
from derp_operator.spec import InvalidSpec, KeySource, durations, parse

from .operatorkit import region, resource

TEMPLATE = {"hostName": "Template", "hostNameTemplate": "{pod}.{region}.{namespace}.example.com"}
CERTIFICATES = {"certificates": [{"secretName": "a"}]}
HOST_PORT = {"exposure": {"type": "HostPort"}}
NODE_PORT = {"exposure": {"type": "NodePort"}}


def test_defaults() -> None:
    found = region("berlin")
    assert (found.code, found.title, found.replicas) == ("berlin", "berlin", 3)
    assert found.exposure.type == "LoadBalancer"
    assert (found.exposure.derp_port, found.exposure.stun_port) == (443, 3478)
    assert found.tls.host_name == "Generated"
    assert found.pods == ("berlin-0", "berlin-1", "berlin-2")
    assert region(regionCode="ber").title == "ber"


def test_sources_of_keys() -> None:
    for kind, option in (("ConfigMap", "configMapKeyRef"), ("Secret", "secretKeyRef")):
        found = region(clients={"keysFrom": {option: {"name": "a", "key": "b"}}})
        assert found.clients.keys_from == KeySource(kind, "a", "b")  # type: ignore[arg-type]


def test_templates() -> None:
    found = region(tls=TEMPLATE | CERTIFICATES)
    assert found.host_name("berlin-1") == "berlin-1.berlin.derp.example.com"
    ordinal = region(tls=TEMPLATE | CERTIFICATES | {"hostNameTemplate": "relay{ordinal}.example.com"})
    assert ordinal.host_name("berlin-1") == "relay1.example.com"


def test_a_node_may_have_a_name_of_its_own() -> None:
    found = region(tls=TEMPLATE | CERTIFICATES, nodes=[{"ordinal": 1, "hostName": "relay.example.com"}])
    assert [found.host_name(pod) for pod in found.pods][:2] == ["berlin-0.berlin.derp.example.com", "relay.example.com"]


def test_a_node_may_have_ports_of_its_own() -> None:
    exposure = {"type": "NodePort", "nodePort": {"derpPortBase": 30000}}
    found = region(exposure=exposure, nodes=[{"ordinal": 1, "derpNodePort": 31000, "stunNodePort": 31001}])
    assert found.node_ports("berlin-0") == {"derp": 30000, "stun": None}
    assert found.node_ports("berlin-1") == {"derp": 31000, "stun": 31001}


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ({"replicas": 2}, "spec.replicas is 2: a region has 3 to 64 relays."),
        ({"regionID": 5}, "spec.regionID is 5: regions of your own have ids from 900 to 999."),
        ({"clients": {}}, "spec.clients names nobody"),
        ({"clients": {"open": True, "verifyURLs": ["https://a"]}}, "spec.clients.open lets everybody in"),
        ({"exposure": {"type": "Ingress"}}, "spec.exposure.type is 'Ingress'"),
        ({"exposure": {"type": "NodePort", "hostPort": {"derpPort": 1}}}, "spec.exposure.hostPort does not apply"),
        ({"exposure": {"type": "NodePort", "nodePort": {"derpPortBase": 65534}}}, "derpPortBase is 65534"),
        ({"exposure": {"type": "NodePort", "nodePort": {"derpPortBase": 30000, "stunPortBase": 30002}}}, "3 apart"),
        ({"exposure": {"loadBalancer": {"sourceRanges": ["here"]}}}, "sourceRanges has 'here'"),
        (
            {"exposure": {"ipFamilies": ["IPv4", "IPv4"]}},
            "spec.exposure.ipFamilies is IPv4, IPv4: it is IPv4, IPv6, or",
        ),
        (
            {"exposure": {"type": "NodePort", "nodePort": {"addressLabel": "a", "addressType": "InternalIP"}}},
            "addressLabel and addressType InternalIP",
        ),
        (HOST_PORT | {"nodes": [{"ordinal": 1, "annotations": {"a": "b"}}]}, "ordinal 1: annotations are for the"),
        (NODE_PORT | {"nodes": [{"ordinal": 1, "loadBalancerIP": "192.0.2.1"}]}, "does not apply to exposure NodePort"),
        (HOST_PORT | {"nodes": [{"ordinal": 1, "derpNodePort": 30001}]}, "do not apply to exposure HostPort"),
        ({"nodes": [{"ordinal": 1, "hostName": "a.b"}]}, "hostName does not apply to tls.hostName Generated"),
        ({"nodes": [{"ordinal": 1, "loadBalancerIP": "a"}]}, "loadBalancerIP is 'a': write an IP address."),
        ({"nodes": [{"ordinal": 1, "ipv4": "2001:db8::1"}]}, "ipv4 is '2001:db8::1': write an IPv4 address, or none."),
        ({"nodes": [{"ordinal": 1, "ipv6": "a"}]}, "ipv6 is 'a': write an IPv6 address, or none."),
        ({"nodes": [{"ordinal": 1, "ipv6": "none"}]}, "ipv4 and ipv6 leave no address"),
        (
            NODE_PORT | {"nodes": [{"ordinal": 0, "derpNodePort": 30001}, {"ordinal": 2, "stunNodePort": 30001}]},
            "node port 30001 is for derp of berlin-0 and for stun of berlin-2",
        ),
        (
            {"exposure": {"type": "NodePort", "nodePort": {"derpPortBase": 30000}}}
            | {"nodes": [{"ordinal": 0, "derpNodePort": 30001}]},
            "node port 30001 is for derp of berlin-0 and for derp of berlin-1",
        ),
        (
            {"nodes": [{"ordinal": 0, "ipv4": "192.0.2.1"}, {"ordinal": 2, "ipv4": "192.0.2.1"}]},
            "ordinals 0 and 2 have the same address 192.0.2.1 and port",
        ),
        (
            {"tls": TEMPLATE | CERTIFICATES, "nodes": [{"ordinal": 0, "hostName": "berlin-1.berlin.derp.example.com"}]},
            "every pod needs its own name",
        ),
        ({"pod": {"labels": {"derp.network/x": "a"}}}, "spec.pod has derp.network/x: the operator's own"),
        ({"pod": {"env": [{"name": "POD_NAME", "value": "a"}]}}, "spec.pod.env has POD_NAME"),
        (
            {"pod": {"terminationGracePeriodSeconds": 5}},
            "terminationGracePeriodSeconds is 5: a relay needs at least 30",
        ),
        ({"tls": {"hostName": "Template"}}, "spec.tls.hostNameTemplate is missing"),
        ({"tls": TEMPLATE}, "spec.tls.certificates is empty"),
        ({"tls": CERTIFICATES}, "do not apply to hostName Generated"),
        ({"tls": TEMPLATE | CERTIFICATES | {"hostNameTemplate": "a.example.com"}}, "every pod needs its own name"),
        ({"tls": TEMPLATE | CERTIFICATES | {"hostNameTemplate": "{node}.example.com"}}, "its variables are {pod}"),
        ({"tls": TEMPLATE | CERTIFICATES | {"hostNameTemplate": "{pod.__class__}"}}, "its variables are {pod}"),
        ({"tls": TEMPLATE | CERTIFICATES | {"hostNameTemplate": "{pod"}}, "its variables are {pod}"),
        ({"tls": TEMPLATE | CERTIFICATES | {"hostNameTemplate": "{pod}_x.example.com"}}, "which is not a DNS name"),
        ({"tls": {"lifetime": "9m"}}, "spec.tls.lifetime is 9m: it must be 10m to 8760h"),
        ({"tls": {"lifetime": "8760h1s"}}, "spec.tls.lifetime is 8760h1s: it must be 10m to 8760h"),
        ({"tls": {"lifetime": "1 year"}}, "spec.tls.lifetime is '1 year': write a duration"),
        ({"tls": {"renewBefore": ""}}, "spec.tls.renewBefore is '': write a duration"),
        ({"tls": {"renewBefore": "0s"}}, "spec.tls.renewBefore is 0s: it must be more than nothing"),
        ({"tls": {"lifetime": "1h", "renewBefore": "60m"}}, "less than spec.tls.lifetime, which is 1h"),
        ({"tls": {"retireAfter": "-1h"}}, "spec.tls.retireAfter is '-1h': write a duration"),
    ],
)
def test_mistakes_are_sentences(spec: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidSpec) as caught:
        region(**spec)
    assert words in str(caught.value)
    assert all(problem.endswith(".") for problem in caught.value.problems)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("24h", 86400), ("1h30m", 5400), ("90s", 90), ("1h1m1s", 3661), ("0s", 0), (f"{'9' * 9}h", 999_999_999 * 3600)],
)
def test_durations(text: str, seconds: int) -> None:
    assert durations.parse(text) == timedelta(seconds=seconds)
    assert durations.write(timedelta(seconds=seconds)) == text.replace("90s", "1m30s")


@pytest.mark.parametrize("text", ["", "1d", "1m1h", "1 h", "h", "-1h", "1.5h", "1h\n", "١h", "9" * 9999 + "h"])
def test_what_is_no_duration(text: str) -> None:
    assert durations.parse(text) is None


def test_times_of_certificates() -> None:
    found = region(tls={"lifetime": "24h"}).tls
    assert (found.renew_before, found.retire_after) == (timedelta(hours=8), timedelta(hours=24))
    assert region().tls.renew_before == timedelta(days=365) / 3


@pytest.mark.parametrize("name", ["a" * 41, "0a", "a.b", "A", "a-"])
def test_names_that_pods_cannot_carry(name: str) -> None:
    with pytest.raises(InvalidSpec, match=r"metadata\.name"):
        parse(resource(name))


def test_all_mistakes_are_told_at_once() -> None:
    with pytest.raises(InvalidSpec) as caught:
        region(replicas=2, regionID=5)
    assert len(caught.value.problems) == 2


def test_node_names_count_like_columns() -> None:
    assert [node_name(900, number) for number in (0, 25, 26, 63)] == ["900a", "900z", "900aa", "900bl"]
    assert len({node_name(900, number) for number in range(2000)}) == 2000


@pytest.mark.parametrize(
    ("pod", "ordinal"),
    [
        ("a-0", 0),
        ("a-12", 12),
        ("a-01", None),
        ("b-0", None),
        ("a-", None),
        ("a", None),
        ("a-b-0", None),
        ("a-²", None),
    ],
)
def test_ordinals(pod: str, ordinal: int | None) -> None:
    assert ordinal_of("a", pod) == ordinal
