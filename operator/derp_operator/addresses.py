"""Under which address and ports clients reach a pod.  Pure: API objects in, an endpoint or a reason out."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from . import conditions
from .conditions import Finding
from .spec import AddressType, Region


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


def endpoint(
    region: Region,
    pod_name: str,
    service: Mapping[str, Any] | None,
    pod: Mapping[str, Any] | None,
    node: Mapping[str, Any] | None,
) -> Endpoint | Finding:
    """The endpoint of a pod, or what is in the way.  `node` is the Node that the pod runs on, None if not readable."""
    exposure = region.exposure
    if exposure.type == "HostPort":
        ports = _host_ports(pod)  # the spec may have others, which this pod gets when it is replaced
        if not {"derp", "stun"} <= ports.keys():
            return _pending(f"Pod {pod_name} has no host ports yet.")
        return _on_node(region, pod_name, pod, node, ports["derp"], ports["stun"])
    if service is None:
        return _pending(f"Service {pod_name} is not there yet.")
    served = {port["name"]: port for port in service["spec"].get("ports", ())}
    if not {"derp", "stun"} <= served.keys():
        return _pending(f"Service {pod_name} has no ports yet.")
    if exposure.type == "NodePort":
        derp, stun = (served[name].get("nodePort") for name in ("derp", "stun"))
        if not derp or not stun:
            return _pending(f"Service {pod_name} has no node ports yet.")
        return _on_node(region, pod_name, pod, node, derp, stun)
    derp, stun = served["derp"]["port"], served["stun"]["port"]
    if exposure.type == "ClusterIP":
        found = [ip for ip in service["spec"].get("clusterIPs", ()) if ip != "None"]
        return _endpoint(found, derp, stun) or _pending(f"Service {pod_name} has no cluster address yet.")
    return _at_load_balancer(region, pod_name, service, derp, stun)


def node_addresses(node: Mapping[str, Any], kind: str) -> list[str]:
    """The addresses of one kind (ExternalIP, InternalIP) that a Node names."""
    addresses = node.get("status", {}).get("addresses", ())
    return [item["address"] for item in addresses if item["type"] == kind]


def _host_ports(pod: Mapping[str, Any] | None) -> dict[str, int]:
    """The ports by which a pod is reached on its Node, by name."""
    containers = pod["spec"].get("containers", ()) if pod else ()
    ports = (port for container in containers for port in container.get("ports", ()))
    return {port["name"]: port["hostPort"] for port in ports if "name" in port and "hostPort" in port}


def _on_node(
    region: Region,
    pod_name: str,
    pod: Mapping[str, Any] | None,
    node: Mapping[str, Any] | None,
    derp: int,
    stun: int,
) -> Endpoint | Finding:
    if pod is None or not pod["spec"].get("nodeName"):
        return _pending(f"Pod {pod_name} runs on no node yet.")
    kind: AddressType = region.exposure.address_type
    external = node_addresses(node, "ExternalIP") if node and kind != "InternalIP" else []
    internal = [item["ip"] for item in pod.get("status", {}).get("hostIPs", ())]
    if kind == "ExternalIP" and not external:
        name = pod["spec"]["nodeName"]
        why = "has no ExternalIP" if node else "cannot be read by the operator (it needs the right to get nodes)"
        return Finding(
            conditions.ADDRESS_UNUSABLE,
            f"Node {name} {why}: give it one, or set addressType: InternalIP.",
            blocked=True,
        )
    return _endpoint(external or internal, derp, stun) or _pending(f"Pod {pod_name} has no node address yet.")


def _at_load_balancer(
    region: Region, pod_name: str, service: Mapping[str, Any], derp: int, stun: int
) -> Endpoint | Finding:
    ingress = service.get("status", {}).get("loadBalancer", {}).get("ingress") or []
    found = _endpoint([item["ip"] for item in ingress if item.get("ip")], derp, stun)
    if found:
        return found
    names = [item["hostname"] for item in ingress if item.get("hostname")]
    if not names:
        return _pending(f"Service {pod_name} has no load balancer address yet.")
    if region.tls.host_name == "Template":
        return Endpoint("", "", derp, stun)
    return Finding(
        conditions.ADDRESS_UNUSABLE,
        f"The load balancer of Service {pod_name} has no IP address, only the name {names[0]}: set tls.hostName: "
        "Template with names that lead there.",
        blocked=True,
    )


def _endpoint(addresses: Iterable[str], derp: int, stun: int) -> Endpoint | None:
    """The first address of each family; None if there is no address at all."""
    first: dict[int, str] = {}
    for text in addresses:
        try:
            address = ipaddress.ip_address(text)
        except ValueError:
            continue
        first.setdefault(address.version, str(address))
    return Endpoint(first.get(4, "none"), first.get(6, "none"), derp, stun) if first else None


def _pending(message: str) -> Finding:
    return Finding(conditions.ADDRESS_PENDING, message)
