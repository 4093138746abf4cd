"""What there is: the region's children and pods, what the spec refers to, and what the relays answer."""

from __future__ import annotations

import asyncio
import base64
import binascii
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any, Final

from . import names
from .apply import Identity, find_unlabelled, read_children, taken
from .conditions import Finding, noted_time
from .kube import ApiError, Cluster, Object
from .probe import Answer, Prober, Target
from .references import Data
from .render import identities
from .resolve import Resolution, Resolver
from .spec import Region

_REVISION: Final = "controller-revision-hash"


@dataclass(frozen=True, slots=True)
class Seen:
    """One look at the cluster.  `pods` by name, `secrets` those of the user.

    `nodes` by name: only readable ones, and None for those that a pod still names but that have gone.  `resolved` is
    what DNS says about the names of load balancers, `merged` the merged maps that the spec names, `foreign` the names
    of children that somebody else has: their objects are not in `live`.
    """

    live: Mapping[Identity, Object]
    pods: Mapping[str, Object]
    nodes: Mapping[str, Object | None]
    secrets: Mapping[str, Data]
    clients: Data
    resolved: Mapping[str, Resolution] = field(default_factory=dict)
    merged: Mapping[str, Object | None] = field(default_factory=dict)
    foreign: Mapping[Identity, Finding] = field(default_factory=dict)

    @property
    def given(self) -> list[Data]:
        """What the user provides to the pods, in a fixed order."""
        return [*(self.secrets[name] for name in sorted(self.secrets)), self.clients]

    def members(self, region: Region) -> list[str]:
        """The pods of the mesh: the wanted ones, and those that still run; by ordinal."""
        there = {number for pod in self.pods if (number := names.ordinal_of(region.name, pod)) is not None}
        return [names.pod_name(region.name, number) for number in sorted(there | set(range(region.replicas)))]

    def ordinals(self, region: Region) -> list[int]:
        """The pods that are there and that nobody has asked to stop."""
        staying = (name for name, pod in self.pods.items() if not pod["metadata"].get("deletionTimestamp"))
        return [number for name in staying if (number := names.ordinal_of(region.name, name)) is not None]

    def older(self, region: Region) -> set[str]:
        """The wanted pods of an older template than the StatefulSet's, but for those that are about to go."""
        owner = self.live.get(("StatefulSet", region.name), {})
        newest = owner.get("status", {}).get("updateRevision")
        return {name for name in region.pods if newest and _revision(self.pods.get(name), newest) != newest}

    def pinned_since(self, region: Region) -> datetime | None:
        """When the pins in the map were published, None if that is not known."""
        return noted_time(self.live.get(("ConfigMap", names.derp_map(region.name))), names.PINNED_SINCE)

    def data(self, kind: str, name: str) -> dict[str, bytes] | None:
        """The content of a child, None if it does not exist."""
        item = self.live.get((kind, name))
        return None if item is None else content(item, kind)


async def look(cluster: Cluster, region: Region, resolver: Resolver) -> Seen:
    """Read everything that a pass over the region depends on, straight from the API server: no cache, no stale view."""
    live, pods, secrets, clients, merged = await asyncio.gather(
        read_children(cluster, region),
        cluster.list("Pod", region.namespace, names.labels(region.name)),
        _secrets(cluster, region),
        _clients(cluster, region),
        _merged(cluster, region),
    )
    seen = Seen(
        live=live,
        pods={pod["metadata"]["name"]: pod for pod in pods},
        nodes=await _nodes(cluster, region, pods),
        secrets=secrets,
        clients=clients,
        resolved=await _resolved(region, live, resolver),
        merged=merged,
    )
    wanted = identities(region, seen.members(region))
    live.update(await find_unlabelled(cluster, region, wanted, live))
    foreign = taken(region, wanted, live)
    return replace(seen, live={key: item for key, item in live.items() if key not in foreign}, foreign=foreign)


async def answers(prober: Prober, targets: Iterable[Target]) -> dict[str, Answer]:
    """Ask all relays at once."""
    asked = list(targets)
    return dict(zip((target.pod for target in asked), await asyncio.gather(*map(prober, asked)), strict=True))


def content(item: Mapping[str, Any], kind: str) -> dict[str, bytes]:
    """The data of a Secret or a ConfigMap as bytes."""
    if kind == "ConfigMap":
        return {key: str(value).encode() for key, value in (item.get("data") or {}).items()}
    decoded = {}
    for key, value in (item.get("data") or {}).items():
        try:
            decoded[key] = base64.b64decode(value)
        except binascii.Error:  # the API server lets no such Secret in
            decoded[key] = b""
    return decoded


def recorded_nodes(seen: Seen, region: Region) -> dict[str, Any]:
    """The nodes that the relays have been told of, from the settings that stand in the cluster."""
    data = seen.data("ConfigMap", names.settings_map(region.name)) or {}
    try:
        nodes = json.loads(data.get(names.SETTINGS_FILE, b"{}")).get("nodes", {})
    except (ValueError, AttributeError):  # edited by hand; the next apply repairs it
        return {}
    return {pod: node for pod, node in nodes.items() if isinstance(node, dict)} if isinstance(nodes, dict) else {}


def _revision(pod: Mapping[str, Any] | None, newest: str) -> str:
    """The name of the template that a pod was made from; the newest, too, where there is nothing to replace."""
    if pod is None or pod["metadata"].get("deletionTimestamp"):
        return newest
    return str(pod["metadata"].get("labels", {}).get(_REVISION, newest))


def is_ready(pod: Mapping[str, Any]) -> bool:
    """Whether the kubelet finds the pod ready and nobody has asked it to stop."""
    if pod["metadata"].get("deletionTimestamp"):
        return False
    found = pod.get("status", {}).get("conditions", ())
    return any(item["type"] == "Ready" and item["status"] == "True" for item in found)


def address(pod: Mapping[str, Any]) -> str | None:
    """The pod's own address, if something may answer there."""
    status = pod.get("status", {})
    running = status.get("phase") == "Running" and not pod["metadata"].get("deletionTimestamp")
    return status.get("podIP") if running else None


async def _secrets(cluster: Cluster, region: Region) -> dict[str, Data]:
    wanted = region.tls.certificates
    found = await asyncio.gather(*(cluster.get("Secret", region.namespace, name) for name in wanted))
    return {name: None if item is None else content(item, "Secret") for name, item in zip(wanted, found, strict=True)}


async def _clients(cluster: Cluster, region: Region) -> Data:
    source = region.clients.keys_from
    item = await cluster.get(source.kind, region.namespace, source.name) if source else None
    return content(item, source.kind) if source and item else None


async def _resolved(region: Region, live: Mapping[Identity, Object], resolver: Resolver) -> dict[str, Resolution]:
    """The names of load balancers; in mode Template, clients ask DNS themselves."""
    if region.exposure.type != "LoadBalancer" or region.tls.host_name == "Template":
        return {}
    services = (item for (kind, _), item in live.items() if kind == "Service")
    ingress = (entry for item in services for entry in item["status"].get("loadBalancer", {}).get("ingress") or ())
    wanted = sorted({entry["hostname"] for entry in ingress if entry.get("hostname") and not entry.get("ip")})
    return dict(zip(wanted, await asyncio.gather(*map(resolver, wanted)), strict=True))


async def _merged(cluster: Cluster, region: Region) -> dict[str, Object | None]:
    wanted = [form.merge_into for form in region.map.forms if form.merge_into]
    found = await asyncio.gather(*(cluster.get("ConfigMap", region.namespace, name) for name in wanted))
    return dict(zip(wanted, found, strict=True))


async def _nodes(cluster: Cluster, region: Region, pods: Iterable[Object]) -> dict[str, Object | None]:
    """The Nodes that may have an ExternalIP for us.  Without the right to read Nodes there are none."""
    exposure = region.exposure
    if exposure.type not in ("NodePort", "HostPort") or exposure.address_type == "InternalIP":
        return {}
    wanted = sorted({pod["spec"]["nodeName"] for pod in pods if pod["spec"].get("nodeName")})
    try:
        found = await asyncio.gather(*(cluster.get("Node", None, name) for name in wanted))
    except ApiError as error:
        if error.status == 403:
            return {}
        raise
    return dict(zip(wanted, found, strict=True))
