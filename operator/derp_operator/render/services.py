"""Services: one headless for the mesh, and one for each pod, because clients must reach each relay by itself.

A shared address in front of several relays splits the region, and a balancer that accepts TCP for a dead relay blacks
it out: clients try the next node only when the TCP dial fails.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .. import names
from ..spec import Exposure, Region
from .meta import child, without_empty

_POD_NAME_LABEL = "statefulset.kubernetes.io/pod-name"


def mesh_service(region: Region) -> dict[str, Any]:
    """Gives each pod a DNS name, also before it is ready: relays become ready through their mesh."""
    return child(region, "v1", "Service", names.mesh_service(region.name)) | {
        "spec": {
            "type": "ClusterIP",
            "clusterIP": "None",
            "ipFamilyPolicy": "PreferDualStack",
            "publishNotReadyAddresses": True,
            "selector": names.selector(region.name),
            "ports": [
                {"name": "derp", "protocol": "TCP", "port": names.DERP_PORT, "targetPort": "derp"},
                {"name": "metrics", "protocol": "TCP", "port": names.METRICS_PORT, "targetPort": "metrics"},
            ],
        }
    }


def pod_service(region: Region, pod: str) -> dict[str, Any]:
    """The way of clients to one pod.  Not for HostPort, where the node's own ports lead to it."""
    exposure = region.exposure
    manifest = child(region, "v1", "Service", pod, pod)
    own = region.node(pod)
    annotations = dict(exposure.annotations) | dict(own.annotations)
    if annotations:
        values = region.variables(pod)
        manifest["metadata"]["annotations"] = {key: _filled(text, values) for key, text in annotations.items()}
    manifest["spec"] = {
        "type": exposure.type,
        **_families(exposure),
        "publishNotReadyAddresses": True,
        "selector": {_POD_NAME_LABEL: pod},
        "ports": _ports(region, pod),
    } | _external(exposure)
    if own.load_balancer_ip:
        manifest["spec"]["loadBalancerIP"] = own.load_balancer_ip
    return manifest


def _filled(text: str, values: Mapping[str, str]) -> str:
    """Braces may well mean something else to whom the annotation is for."""
    for name, value in values.items():
        text = text.replace(f"{{{name}}}", value)
    return text


def _families(exposure: Exposure) -> dict[str, Any]:
    """Of one or two given families the cluster must have all, or it says so; else what the cluster has."""
    if not exposure.families:
        return {"ipFamilyPolicy": "PreferDualStack"}
    policy = "SingleStack" if len(exposure.families) == 1 else "RequireDualStack"
    return {"ipFamilyPolicy": policy, "ipFamilies": list(exposure.families)}


def _external(exposure: Exposure) -> dict[str, Any]:
    if exposure.type not in ("LoadBalancer", "NodePort"):
        return {}
    return without_empty(
        {
            "externalTrafficPolicy": exposure.traffic_policy,
            "loadBalancerClass": exposure.load_balancer_class,
            "loadBalancerSourceRanges": list(exposure.source_ranges),
        }
    )


def _ports(region: Region, pod: str) -> list[dict[str, Any]]:
    exposure, node_ports = region.exposure, region.node_ports(pod)
    ports: list[dict[str, Any]] = [
        {"name": "derp", "protocol": "TCP", "port": exposure.derp_port, "targetPort": "derp"},
        {"name": "stun", "protocol": "UDP", "port": exposure.stun_port, "targetPort": "stun"},
    ]
    return [port | without_empty({"nodePort": node_ports[port["name"]]}) for port in ports]
