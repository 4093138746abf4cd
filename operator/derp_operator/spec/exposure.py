"""`spec.exposure`: how clients reach a pod."""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Literal

if TYPE_CHECKING:
    from .region import Region

ExposureType = Literal["LoadBalancer", "NodePort", "HostPort", "ClusterIP"]
AddressType = Literal["Auto", "ExternalIP", "InternalIP"]
Family = Literal["IPv4", "IPv6"]

_OPTIONS: Final[Mapping[str, str]] = {
    "LoadBalancer": "loadBalancer",
    "NodePort": "nodePort",
    "HostPort": "hostPort",
    "ClusterIP": "clusterIP",
}


@dataclass(frozen=True, slots=True)
class Exposure:
    """How clients reach a pod.  With bases for `NodePort`, ordinal i gets base + i; else the API server chooses.

    `families` empty: those that the cluster has.  `address_label` names a label, or else annotation, of Nodes.
    """

    type: ExposureType = "LoadBalancer"
    derp_port: int = 443
    stun_port: int = 3478
    derp_port_base: int | None = None
    stun_port_base: int | None = None
    address_type: AddressType = "Auto"
    address_label: str | None = None
    families: tuple[Family, ...] = ()
    traffic_policy: Literal["Local", "Cluster"] = "Local"
    load_balancer_class: str | None = None
    annotations: Mapping[str, str] = field(default_factory=dict)
    source_ranges: tuple[str, ...] = ()


def parse(spec: Mapping[str, Any], problems: list[str]) -> Exposure:
    kind = spec.get("type", "LoadBalancer")
    if kind not in _OPTIONS:
        problems.append(f"spec.exposure.type is {kind!r}: it must be one of {', '.join(_OPTIONS)}.")
        return Exposure()
    for other, option in _OPTIONS.items():
        if other != kind and spec.get(option):
            problems.append(f"spec.exposure.{option} does not apply to type {kind}: remove it, or set type: {other}.")
    options = spec.get(_OPTIONS[kind]) or {}
    return Exposure(
        type=kind,
        derp_port=int(options.get("derpPort", 443)),
        stun_port=int(options.get("stunPort", 3478)),
        derp_port_base=options.get("derpPortBase"),
        stun_port_base=options.get("stunPortBase"),
        address_type=options.get("addressType", "Auto"),
        address_label=options.get("addressLabel"),
        families=tuple(spec.get("ipFamilies") or ()),
        traffic_policy=options.get("externalTrafficPolicy", "Local"),
        load_balancer_class=options.get("loadBalancerClass"),
        annotations=dict(options.get("annotations") or {}),
        source_ranges=tuple(options.get("sourceRanges") or ()),
    )


def check(region: Region) -> list[str]:
    return [*_check_bases(region), *_check_ranges(region.exposure), *_check_addresses(region.exposure)]


def _check_bases(region: Region) -> list[str]:
    found = []
    bases = {"derpPortBase": region.exposure.derp_port_base, "stunPortBase": region.exposure.stun_port_base}
    for option, base in bases.items():
        if base is not None and base + region.replicas - 1 > 65535:
            found.append(f"spec.exposure.nodePort.{option} is {base}: the last relay's port would be above 65535.")
    derp, stun = bases.values()
    if derp is not None and stun is not None and abs(derp - stun) < region.replicas:
        found.append(
            f"spec.exposure.nodePort has derpPortBase {derp} and stunPortBase {stun}: a port is either TCP or UDP, "
            f"so with {region.replicas} replicas they must be at least {region.replicas} apart."
        )
    return found


def _check_addresses(exposure: Exposure) -> list[str]:
    found = []
    if len(set(exposure.families)) < len(exposure.families) or not {"IPv4", "IPv6"}.issuperset(exposure.families):
        found.append(f"spec.exposure.ipFamilies is {', '.join(exposure.families)}: it is IPv4, IPv6, or one of each.")
    if exposure.address_label and exposure.address_type != "Auto":
        found.append(
            f"spec.exposure has addressLabel and addressType {exposure.address_type}: the label says which address it "
            "is, so remove addressType."
        )
    return found


def _check_ranges(exposure: Exposure) -> list[str]:
    found = []
    for text in exposure.source_ranges:
        try:
            ipaddress.ip_network(text)
        except ValueError:
            found.append(f"spec.exposure.loadBalancer.sourceRanges has {text!r}: a network is like 192.0.2.0/24.")
    return found
