"""Under which address and ports clients reach a pod.  Pure: API objects in, an endpoint or a reason out."""

from __future__ import annotations

import ipaddress
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from . import conditions
from .conditions import Finding
from .resolve import Resolution
from .spec import Region

_UNREADABLE: Final = "cannot be read by the operator (it needs the right to get nodes)"


@dataclass(frozen=True, slots=True)
class Endpoint:
    """An empty address means that clients ask DNS for the host name; "none" that there is none of this family."""

    ipv4: str
    ipv6: str
    derp_port: int
    stun_port: int

    @property
    def host(self) -> str:
        """The address that stands for the endpoint where only one can: IPv4 if there is one."""
        return self.ipv4 if self.ipv4 not in ("", "none") else self.ipv6


@dataclass(frozen=True, slots=True)
class Place:
    """What tells where a pod is reached: its Service, itself, the Node that it runs on (None if not readable).

    `resolved` is what DNS says about names of load balancers; `known` are the addresses that clients have now.
    """

    service: Mapping[str, Any] | None = None
    pod: Mapping[str, Any] | None = None
    node: Mapping[str, Any] | None = None
    resolved: Mapping[str, Resolution] = field(default_factory=dict)
    known: Collection[str] = ()


def endpoint(region: Region, name: str, place: Place) -> Endpoint | Finding:
    """The endpoint of the pod `name`, or what is in the way."""
    kind = region.exposure.type
    if kind == "HostPort":
        ports = host_ports(place.pod)  # the spec may have others, which this pod gets when it is replaced
        if not {"derp", "stun"} <= ports.keys():
            return _pending(f"Pod {name} has no host ports yet.")
        return _reached(region, name, _on_node(region, name, place), ports["derp"], ports["stun"])
    if place.service is None:
        return _pending(f"Service {name} is not there yet.")
    if place.service["spec"].get("type", kind) != kind:
        return _pending(f"Service {name} is not of type {kind} yet.")
    served = {port["name"]: port for port in place.service["spec"].get("ports", ())}
    if not {"derp", "stun"} <= served.keys():
        return _pending(f"Service {name} has no ports yet.")
    if kind == "NodePort":
        derp, stun = (served[port].get("nodePort") for port in ("derp", "stun"))
        if not derp or not stun:
            return _pending(f"Service {name} has no node ports yet.")
        return _reached(region, name, _on_node(region, name, place), derp, stun)
    derp, stun = served["derp"]["port"], served["stun"]["port"]
    if kind == "ClusterIP":
        found = [ip for ip in place.service["spec"].get("clusterIPs", ()) if ip != "None"]
        return _reached(region, name, found or _pending(f"Service {name} has no cluster address yet."), derp, stun)
    return _reached(region, name, _at_load_balancer(region, name, place), derp, stun)


def node_addresses(node: Mapping[str, Any], kind: str) -> list[str]:
    """The addresses of one kind (ExternalIP, InternalIP) that a Node names."""
    addresses = node.get("status", {}).get("addresses", ())
    return [item["address"] for item in addresses if item["type"] == kind]


def host_ports(pod: Mapping[str, Any] | None) -> dict[str, int]:
    """The ports by which a pod is reached on its Node, by name."""
    containers = pod["spec"].get("containers", ()) if pod else ()
    ports = (port for container in containers for port in container.get("ports", ()))
    return {port["name"]: port["hostPort"] for port in ports if "name" in port and "hostPort" in port}


def _on_node(region: Region, name: str, place: Place) -> list[str] | Finding:
    if place.pod is None or not place.pod["spec"].get("nodeName"):
        return _pending(f"Pod {name} runs on no node yet.")
    exposure, node = region.exposure, place.pod["spec"]["nodeName"]
    if exposure.address_label:
        return _labelled(exposure.address_label, node, place.node)
    external = node_addresses(place.node, "ExternalIP") if place.node and exposure.address_type != "InternalIP" else []
    if exposure.address_type == "ExternalIP" and not external:
        why = "has no ExternalIP" if place.node else _UNREADABLE
        return _unusable(f"Node {node} {why}: give it one, or set addressType: InternalIP.")
    internal = [item["ip"] for item in place.pod.get("status", {}).get("hostIPs", ())]
    return external or internal or _pending(f"Pod {name} has no node address yet.")


def _labelled(label: str, name: str, node: Mapping[str, Any] | None) -> list[str] | Finding:
    if node is None:
        return _unusable(f"Node {name} {_UNREADABLE}: spec.exposure's addressLabel needs it.")
    meta = node["metadata"]
    text = (meta.get("labels") or {}).get(label) or (meta.get("annotations") or {}).get(label)
    if not text:
        return _unusable(f"Node {name} has no label or annotation {label}: set it to the node's public address.")
    found = [part.strip() for part in text.split(",")]
    if not all(map(_is_address, found)):
        return _unusable(f"Node {name} has {text!r} in {label}: write an IP address, or several with commas between.")
    return found


def _at_load_balancer(region: Region, name: str, place: Place) -> list[str] | Finding:
    """No address at all means that clients ask DNS for the relay's own name."""
    ingress = (place.service or {}).get("status", {}).get("loadBalancer", {}).get("ingress") or []
    addresses = [item["ip"] for item in ingress if _is_address(item.get("ip") or "")]
    hosts = [item["hostname"] for item in ingress if item.get("hostname")]
    if addresses:
        return addresses
    if not hosts:
        return _pending(f"Service {name} has no load balancer address yet.")
    if region.tls.host_name == "Template":
        return []
    found = place.resolved.get(hosts[0], Resolution(fault="not asked yet"))
    if not found.addresses:
        return _pending(
            f"The load balancer of Service {name} has no address but the name {hosts[0]}, for which DNS has none "
            f"({found.fault}): the last known address stays."
        )
    # Several addresses come in any order: the one that clients have is as good as another.
    return sorted(found.addresses, key=lambda ip: ip not in place.known)


def _reached(region: Region, name: str, found: list[str] | Finding, derp: int, stun: int) -> Endpoint | Finding:
    """The first address of each family that clients are to have; what the spec says of this node goes before all."""
    own = region.node(name)
    derp, stun = own.derp_port or derp, own.stun_port or stun
    if own.ipv4 or own.ipv6:
        return Endpoint(own.ipv4 or "none", own.ipv6 or "none", derp, stun)
    if isinstance(found, Finding):
        return found
    if not found:
        return Endpoint("", "", derp, stun)
    first: dict[str, str] = {}
    for address in map(ipaddress.ip_address, filter(_is_address, found)):
        family = f"IPv{address.version}"
        if not region.exposure.families or family in region.exposure.families:
            first.setdefault(family, str(address))
    if not first:
        wanted = " or ".join(region.exposure.families) or "IP"
        return _pending(f"Pod {name} is reached under no {wanted} address yet.")
    return Endpoint(first.get("IPv4", "none"), first.get("IPv6", "none"), derp, stun)


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def _unusable(message: str) -> Finding:
    return Finding(conditions.ADDRESS_UNUSABLE, message, blocked=True)


def _pending(message: str) -> Finding:
    return Finding(conditions.ADDRESS_PENDING, message)
