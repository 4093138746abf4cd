"""`spec.nodes`: what is different about single relays."""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from .region import Region

_NONE: Final = "none"


@dataclass(frozen=True, slots=True)
class NodeOptions:
    """What one relay has of its own.

    `ipv4`, `ipv6`, `derp_port` and `stun_port` go into the map instead of what is found; with one address given, the
    other family is "none" unless it is given, too.
    """

    host_name: str | None = None
    annotations: Mapping[str, str] = field(default_factory=dict)
    load_balancer_ip: str | None = None
    derp_node_port: int | None = None
    stun_node_port: int | None = None
    ipv4: str | None = None
    ipv6: str | None = None
    derp_port: int | None = None
    stun_port: int | None = None


def parse(spec: Sequence[Mapping[str, Any]]) -> dict[int, NodeOptions]:
    return {int(item.get("ordinal", 0)): _node(item) for item in spec}


def _node(spec: Mapping[str, Any]) -> NodeOptions:
    return NodeOptions(
        host_name=spec.get("hostName"),
        annotations=dict(spec.get("annotations") or {}),
        load_balancer_ip=spec.get("loadBalancerIP"),
        derp_node_port=spec.get("derpNodePort"),
        stun_node_port=spec.get("stunNodePort"),
        ipv4=spec.get("ipv4"),
        ipv6=_canonical(spec.get("ipv6")),
        derp_port=spec.get("derpPort"),
        stun_port=spec.get("stunPort"),
    )


def _canonical(text: str | None) -> str | None:
    """An IPv6 address has many forms; what is none stays for `check` to tell."""
    return str(ipaddress.ip_address(text)) if text and _version(text) else text


def check(region: Region) -> list[str]:
    found = []
    for ordinal, node in sorted(region.nodes.items()):
        where = f"spec.nodes, ordinal {ordinal}:"
        found += [f"{where} {problem}" for problem in (*_applicable(region, node), *_addresses(node))]
    return found + _node_ports(region) + _twins(region)


def _applicable(region: Region, node: NodeOptions) -> list[str]:
    kind = region.exposure.type
    found = []
    if node.annotations and kind == "HostPort":
        found.append("annotations are for the relay's Service, and exposure HostPort has none; remove them.")
    if node.load_balancer_ip and kind != "LoadBalancer":
        found.append(f"loadBalancerIP does not apply to exposure {kind}; remove it.")
    if (node.derp_node_port or node.stun_node_port) and kind not in ("LoadBalancer", "NodePort"):
        found.append(f"derpNodePort and stunNodePort do not apply to exposure {kind}; remove them.")
    if node.host_name and region.tls.host_name != "Template":
        found.append(f"hostName does not apply to tls.hostName {region.tls.host_name}; remove it, or set Template.")
    return found


def _addresses(node: NodeOptions) -> list[str]:
    found = []
    for option, text, version in (("ipv4", node.ipv4, 4), ("ipv6", node.ipv6, 6)):
        if text is not None and text != _NONE and _version(text) != version:
            found.append(f"{option} is {text!r}: write an IPv{version} address, or none.")
    if (node.ipv4 or node.ipv6) and {node.ipv4 or _NONE, node.ipv6 or _NONE} == {_NONE}:
        found.append("ipv4 and ipv6 leave no address: give one of them, or remove both.")
    if node.load_balancer_ip and not _version(node.load_balancer_ip):
        found.append(f"loadBalancerIP is {node.load_balancer_ip!r}: write an IP address.")
    return found


def _version(text: str) -> int:
    try:
        return ipaddress.ip_address(text).version
    except ValueError:
        return 0


def _node_ports(region: Region) -> list[str]:
    """Ports of `spec.nodes` beside each other and the counted ones; those among themselves are apart in any case."""
    users: dict[int, str] = {}
    found = []
    for pod in region.pods if region.nodes else ():
        for name, port in region.node_ports(pod).items():
            user = f"{name} of {pod}"
            if port is not None and users.setdefault(port, user) != user:
                found.append(f"spec.nodes: node port {port} is for {users[port]} and for {user}; choose another.")
    return found


def _twins(region: Region) -> list[str]:
    """Relays that share an address and a port cut the region in parts."""
    users: dict[tuple[str, int | None], int] = {}
    found = []
    for ordinal, node in sorted(region.nodes.items()):
        for address in (node.ipv4, node.ipv6):
            if address and address != _NONE and users.setdefault((address, node.derp_port), ordinal) != ordinal:
                found.append(
                    f"spec.nodes: ordinals {users[address, node.derp_port]} and {ordinal} have the same address "
                    f"{address} and port; every relay needs its own."
                )
    return found
