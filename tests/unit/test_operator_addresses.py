"""Which address of which object leads clients to a pod."""

from __future__ import annotations

from typing import Any

import pytest
from derp_operator.addresses import Endpoint, Place, endpoint
from derp_operator.conditions import Finding
from derp_operator.resolve import Resolution

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
    external_ips = [{"type": "ExternalIP", "address": ip} for ip in external]
    return {"metadata": {}, "status": {"addresses": addresses + external_ips}}


def find(kind: str, found_service: Object | None, found_pod: Object | None = None, found_node: Object | None = None,
         **options: Any) -> Endpoint | Finding:  # fmt: skip
    tls, families = options.pop("tls", {}), options.pop("families", [])
    resolved, known = options.pop("resolved", {}), options.pop("known", ())
    key = kind[0].lower() + kind[1:]
    own = [{"ordinal": 0, **options.pop("own")}] if "own" in options else []
    exposure = {"type": kind, "ipFamilies": families} | ({key: options} if options else {})
    place = Place(found_service, found_pod, found_node, resolved, known)
    return endpoint(region(exposure=exposure, tls=tls, nodes=own), "berlin-0", place)


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
        find("ClusterIP", service(spec={"clusterIPs": ["198.19.0.1"], "type": "NodePort"})),
        find("ClusterIP", service(spec={"clusterIPs": ["None"]})),
        find("LoadBalancer", service()),
        find("LoadBalancer", service(status={"loadBalancer": {"ingress": [{"ip": "none of these"}]}})),
    ],
)
def test_what_is_not_there_yet_is_waited_for(found: Endpoint | Finding) -> None:
    assert isinstance(found, Finding)
    assert (found.reason, found.blocked) == ("AddressPending", False)
    assert "berlin-0" in found.message


def test_families_that_are_not_wanted_stay_out() -> None:
    both = pod("198.18.0.1", "2001:db8::1")
    assert find("NodePort", service(), both, families=["IPv6"]) == Endpoint("none", "2001:db8::1", 30443, 30478)
    assert find("NodePort", service(), both, families=["IPv4"]) == Endpoint("198.18.0.1", "none", 30443, 30478)
    found = find("NodePort", service(), pod("198.18.0.1"), families=["IPv6"])
    assert isinstance(found, Finding)
    assert (found.reason, found.message) == ("AddressPending", "Pod berlin-0 is reached under no IPv6 address yet.")


LABEL = "example.com/public-ip"


@pytest.mark.parametrize(
    ("meta", "expected"),
    [
        ({"labels": {LABEL: "203.0.113.1"}}, ("203.0.113.1", "none")),
        ({"annotations": {LABEL: "2001:DB8::1, 203.0.113.1"}}, ("203.0.113.1", "2001:db8::1")),
        ({"labels": {LABEL: "203.0.113.1"}, "annotations": {LABEL: "203.0.113.2"}}, ("203.0.113.1", "none")),
    ],
)
def test_nodes_may_say_their_address_in_a_label(meta: Object, expected: tuple[str, str]) -> None:
    found = find("NodePort", service(), pod("198.18.0.1"), node("192.0.2.1") | {"metadata": meta}, addressLabel=LABEL)
    assert found == Endpoint(*expected, 30443, 30478)


@pytest.mark.parametrize(
    ("found_node", "words"),
    [
        (None, "cannot be read"),
        (node("192.0.2.1"), f"has no label or annotation {LABEL}"),
        ({"metadata": {"labels": {LABEL: "here"}}}, f"has 'here' in {LABEL}: write an IP address"),
        ({"metadata": {"annotations": {LABEL: "192.0.2.1,"}}}, "write an IP address"),
    ],
)
def test_a_label_without_an_address_is_told(found_node: Object | None, words: str) -> None:
    found = find("HostPort", None, pod("198.18.0.1"), found_node, addressLabel=LABEL)
    assert isinstance(found, Finding)
    assert (found.reason, found.blocked) == ("AddressUnusable", True)
    assert words in found.message


NAMED = service(status={"loadBalancer": {"ingress": [{"hostname": "lb.example.net"}]}})


def test_the_name_of_a_balancer_is_looked_up() -> None:
    resolved = {"lb.example.net": Resolution(("192.0.2.1", "192.0.2.2", "2001:db8::1", "2001:db8::2"))}
    assert find("LoadBalancer", NAMED, resolved=resolved) == Endpoint("192.0.2.1", "2001:db8::1", 443, 3478)
    for known in (("192.0.2.2", "none"), ("192.0.2.2", "2001:db8::2")):
        found = find("LoadBalancer", NAMED, resolved=resolved, known=known)
        assert isinstance(found, Endpoint)
        assert found.ipv4 == "192.0.2.2", "what clients have is as good as another"
        assert found.ipv6 == ("2001:db8::2" if known[1] != "none" else "2001:db8::1")
    gone = find("LoadBalancer", NAMED, resolved=resolved, known=("192.0.2.9", "none"))
    assert gone == Endpoint("192.0.2.1", "2001:db8::1", 443, 3478)


def test_an_address_of_a_balancer_goes_before_its_name() -> None:
    ingress = [{"hostname": "lb.example.net"}, {"ip": "192.0.2.7"}]
    found = find("LoadBalancer", service(status={"loadBalancer": {"ingress": ingress}}))
    assert found == Endpoint("192.0.2.7", "none", 443, 3478)


@pytest.mark.parametrize("resolved", [{}, {"lb.example.net": Resolution(fault="Name or service not known")}])
def test_a_name_without_addresses_is_waited_for(resolved: dict[str, Resolution]) -> None:
    found = find("LoadBalancer", NAMED, resolved=resolved)
    assert isinstance(found, Finding)
    assert (found.reason, found.blocked) == ("AddressPending", False)
    assert "lb.example.net" in found.message


@pytest.mark.parametrize(
    ("own", "expected"),
    [
        ({"ipv4": "203.0.113.1"}, Endpoint("203.0.113.1", "none", 30443, 30478)),
        ({"ipv6": "2001:DB8::1"}, Endpoint("none", "2001:db8::1", 30443, 30478)),
        ({"ipv4": "203.0.113.1", "ipv6": "2001:db8::1"}, Endpoint("203.0.113.1", "2001:db8::1", 30443, 30478)),
        ({"ipv4": "203.0.113.1", "derpPort": 443}, Endpoint("203.0.113.1", "none", 443, 30478)),
        ({"derpPort": 443, "stunPort": 3478}, Endpoint("198.18.0.1", "2001:db8::9", 443, 3478)),
    ],
)
def test_what_the_spec_says_of_a_node_goes_before_what_is_found(own: Object, expected: Endpoint) -> None:
    assert find("NodePort", service(), pod("198.18.0.1", "2001:db8::9"), own=own) == expected


def test_a_node_with_a_given_address_waits_for_none() -> None:
    own = {"ipv4": "203.0.113.1"}
    assert find("LoadBalancer", service(), own=own) == Endpoint("203.0.113.1", "none", 443, 3478)
    assert find("ClusterIP", service(), own=own) == Endpoint("203.0.113.1", "none", 443, 3478)
    found = find("NodePort", service(), pod("198.18.0.1"), node(), own=own, addressType="ExternalIP")
    assert found == Endpoint("203.0.113.1", "none", 30443, 30478)


def test_clients_ask_dns_themselves_for_names_of_their_own() -> None:
    assert find("LoadBalancer", NAMED, tls=TEMPLATE) == Endpoint("", "", 443, 3478)
