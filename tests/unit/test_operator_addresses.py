"""Which address of which object leads clients to a pod."""

from __future__ import annotations

from typing import Any

import pytest
from derp_operator.addresses import Endpoint, endpoint
from derp_operator.conditions import Finding

from .operatorkit import region

Object = dict[str, Any]
TEMPLATE = {"hostName": "Template", "hostNameTemplate": "{pod}.a.example", "certificates": [{"secretName": "a"}]}


def service(ports: bool = True, node_ports: bool = True, **fields: Any) -> Object:
    found: list[Object] = [{"name": "derp", "port": 443}, {"name": "stun", "port": 3478}]
    if node_ports:
        found[0]["nodePort"], found[1]["nodePort"] = 30443, 30478
    return {"spec": {"ports": found if ports else []} | fields.pop("spec", {}), **fields}


def pod(*ips: str, node: str = "node1", ports: tuple[int, int] = (443, 3478)) -> Object:
    named = [{"name": name, "hostPort": port} for name, port in zip(("derp", "stun"), ports, strict=True) if port]
    spec: Object = {"containers": [{"ports": [*named, {"name": "metrics"}]}]} | ({"nodeName": node} if node else {})
    return {"spec": spec, "status": {"hostIPs": [{"ip": ip} for ip in ips]}}


def node(*external: str) -> Object:
    addresses = [{"type": "InternalIP", "address": "198.51.100.1"}]
    return {"status": {"addresses": addresses + [{"type": "ExternalIP", "address": ip} for ip in external]}}


def find(kind: str, found_service: Object | None, found_pod: Object | None = None, found_node: Object | None = None,
         **options: Any) -> Endpoint | Finding:  # fmt: skip
    tls = options.pop("tls", {})
    key = kind[0].lower() + kind[1:]
    exposure = {"type": kind} | ({key: options} if options else {})
    return endpoint(region(exposure=exposure, tls=tls), "berlin-0", found_service, found_pod, found_node)


@pytest.mark.parametrize(
    ("ips", "ipv4", "ipv6"),
    [
        (["198.18.0.1"], "198.18.0.1", "none"),
        (["198.18.0.1", "2001:db8::1"], "198.18.0.1", "2001:db8::1"),
        (["2001:DB8::1", "198.18.0.1", "198.18.0.2"], "198.18.0.1", "2001:db8::1"),
        (["2001:db8::1"], "none", "2001:db8::1"),
    ],
)
def test_families(ips: list[str], ipv4: str, ipv6: str) -> None:
    assert find("NodePort", service(), pod(*ips)) == Endpoint(ipv4, ipv6, 30443, 30478)
    assert find("HostPort", None, pod(*ips)) == Endpoint(ipv4, ipv6, 443, 3478)
    assert find("ClusterIP", service(spec={"clusterIPs": ips})) == Endpoint(ipv4, ipv6, 443, 3478)
    ingress = [{"ip": ip} for ip in ips]
    balanced = service(status={"loadBalancer": {"ingress": ingress}})
    assert find("LoadBalancer", balanced) == Endpoint(ipv4, ipv6, 443, 3478)


def test_host_ports_are_those_of_the_pod() -> None:
    """A pod of before a change of the spec is still where it was."""
    assert find("HostPort", None, pod("198.18.0.1"), derpPort=8443) == Endpoint("198.18.0.1", "none", 443, 3478)


@pytest.mark.parametrize(
    ("kind", "external", "expected"),
    [
        ("Auto", ["203.0.113.1"], "203.0.113.1"),
        ("Auto", [], "198.18.0.1"),
        ("ExternalIP", ["203.0.113.1"], "203.0.113.1"),
        ("InternalIP", ["203.0.113.1"], "198.18.0.1"),
    ],
)
def test_address_types(kind: str, external: list[str], expected: str) -> None:
    found = find("NodePort", service(), pod("198.18.0.1"), node(*external), addressType=kind)
    assert isinstance(found, Endpoint)
    assert found.ipv4 == expected
    assert found.host == expected


def test_an_external_address_that_is_not_there_is_told() -> None:
    for readable, words in ((node(), "has no ExternalIP"), (None, "cannot be read")):
        found = find("NodePort", service(), pod("198.18.0.1"), readable, addressType="ExternalIP")
        assert isinstance(found, Finding)
        assert found.blocked
        assert words in found.message


@pytest.mark.parametrize(
    "found",
    [
        find("NodePort", None),
        find("NodePort", service(ports=False), pod("198.18.0.1")),
        find("NodePort", service(node_ports=False), pod("198.18.0.1")),
        find("NodePort", service(), None),
        find("NodePort", service(), pod("198.18.0.1", node="")),
        find("NodePort", service(), pod()),
        find("HostPort", None, None),
        find("HostPort", None, pod("198.18.0.1", node="")),
        find("HostPort", None, pod("198.18.0.1", ports=(0, 0))),
        find("ClusterIP", service()),
        find("ClusterIP", service(spec={"clusterIPs": ["None"]})),
        find("LoadBalancer", service()),
        find("LoadBalancer", service(status={"loadBalancer": {"ingress": [{"ip": "none of these"}]}})),
    ],
)
def test_what_is_not_there_yet_is_waited_for(found: Endpoint | Finding) -> None:
    assert isinstance(found, Finding)
    assert (found.reason, found.blocked) == ("AddressPending", False)
    assert "berlin-0" in found.message


def test_a_balancer_with_a_name_only_needs_names_for_clients() -> None:
    named = service(status={"loadBalancer": {"ingress": [{"hostname": "lb.example.net"}]}})
    found = find("LoadBalancer", named)
    assert isinstance(found, Finding)
    assert (found.reason, found.blocked) == ("AddressUnusable", True)
    assert "lb.example.net" in found.message
    assert find("LoadBalancer", named, tls=TEMPLATE) == Endpoint("", "", 443, 3478)
