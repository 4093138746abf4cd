"""From what was seen to what is wanted: keys, mesh membership, map entries.  Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from derper.derpmap import DERPMap, DERPNode

from . import conditions, names, references
from .addresses import Endpoint, Place, endpoint
from .conditions import Finding
from .keyring import KeyRing, Maker, NodeKeys, extend
from .observe import Seen, address, recorded_nodes
from .probe import Target
from .publish import nodes_of, read
from .references import HostName
from .render.config import SettingsNode, settings_node
from .spec import Region


@dataclass(frozen=True, slots=True)
class Node:
    """A wanted node: its name in the map, its entry there as it would be now (None: not known yet), whom to ask, and
    when its certificate expires.
    """

    name: str
    pod: str
    entry: DERPNode | None
    target: Target | None
    not_after: datetime | None


@dataclass(frozen=True, slots=True)
class Plan:
    """`settings` are the members of the mesh by pod, `published` the nodes of the map that stands, by name."""

    members: list[str]
    ring: KeyRing
    settings: Mapping[str, SettingsNode]
    nodes: list[Node]
    published: Mapping[str, DERPNode]
    findings: list[Finding]


def plan(region: Region, seen: Seen, now: datetime, maker: Maker) -> Plan:
    """What follows from one look at the cluster."""
    members = seen.members(region)
    published = nodes_of(region, published_map(region, seen))
    recorded = recorded_nodes(seen, region)
    found = {pod: _endpoint(region, seen, pod, published) for pod in region.pods}
    endpoints = {pod: item for pod, item in found.items() if isinstance(item, Endpoint)}
    by_address = region.tls.host_name == "Address"
    ring = extend(
        names.keys_secret(region.name),
        seen.data("Secret", names.keys_secret(region.name)),
        members,
        _known(region, recorded, published),
        {pod: item.host for pod, item in endpoints.items()} if by_address else {},
        now,
        maker,
    )
    hosts, findings = _host_names(region, seen, ring, endpoints, now)
    return Plan(
        members=members,
        ring=ring,
        settings=_settings(region, members, ring, recorded),
        nodes=[_node(region, pod, hosts.get(pod), endpoints.get(pod), seen, published) for pod in region.pods],
        published=published,
        findings=[
            *_key_findings(ring),
            *findings,
            *_address_findings(region, seen, found, published),
        ],
    )


def published_map(region: Region, seen: Seen) -> DERPMap | None:
    """The map that stands in the cluster, None if there is none."""
    data = seen.data("ConfigMap", names.derp_map(region.name))
    return read(region, {key: value.decode() for key, value in data.items()} if data else None)


def _known(region: Region, recorded: Mapping[str, Any], published: Mapping[str, DERPNode]) -> set[str]:
    """Pods whose keys others rely on: peers through the settings, clients through the map."""
    numbered = {names.node_name(region.region_id, number): pod for number, pod in enumerate(region.pods)}
    return set(recorded) | {numbered[name] for name in published}


def _endpoint(region: Region, seen: Seen, pod: str, published: Mapping[str, DERPNode]) -> Endpoint | Finding:
    running = seen.pods.get(pod)
    name = running["spec"].get("nodeName", "") if running else ""
    node = seen.nodes.get(name)
    if name in seen.nodes and node is None:  # without the Node its ExternalIP would look like none
        return Finding(conditions.ADDRESS_PENDING, f"Node {name}, which pod {pod} was on, has gone.")
    old = published.get(names.node_name(region.region_id, int(pod.rpartition("-")[2])))
    known = (old.ipv4, old.ipv6) if old else ()
    return endpoint(region, pod, Place(seen.live.get(("Service", pod)), running, node, seen.resolved, known))


def _host_names(
    region: Region, seen: Seen, ring: KeyRing, endpoints: Mapping[str, Endpoint], now: datetime
) -> tuple[Mapping[str, HostName], list[Finding]]:
    findings = []
    clients = references.clients_finding(region, seen.clients)
    if clients:
        findings.append(clients)
    if region.tls.host_name == "Template":
        hosts, wrong = references.host_names(region, seen.secrets, now)
        return hosts, findings + wrong
    if region.tls.host_name == "Address":
        served = {pod: keys.address for pod, keys in ring.nodes.items() if pod in endpoints and keys.address}
    else:
        served = {pod: keys.mesh for pod, keys in ring.nodes.items()}
    return {pod: HostName(item.host_name, item.pin, item.not_after) for pod, item in served.items()}, findings


def _settings(
    region: Region, members: list[str], ring: KeyRing, recorded: Mapping[str, Any]
) -> dict[str, SettingsNode]:
    """A node whose keys are damaged stays as its peers know it: it may well still run with the old ones."""
    nodes = {}
    for pod in members:
        keys = ring.nodes.get(pod)
        if keys:
            nodes[pod] = settings_node(
                region,
                pod,
                server_key=keys.server_key,
                host_name=keys.mesh.host_name,
                pin=keys.mesh.pin,
                certificates=_stems(region, keys),
            )
        elif pod in recorded:
            nodes[pod] = recorded[pod]
    return nodes


def _stems(region: Region, keys: NodeKeys) -> list[str]:
    """The first certificate is for clients that send no SNI.  Peers always use the generated one."""
    users = [references.stem(secret) for secret in region.tls.certificates]
    at_address = [keys.address] if keys.address else []
    own = [f"{names.SECRET_DIR}/{item.stem}" for item in (*at_address, keys.mesh, *keys.older)]
    return users + own


def _node(
    region: Region,
    pod: str,
    host: HostName | None,
    where: Endpoint | None,
    seen: Seen,
    published: Mapping[str, DERPNode],
) -> Node:
    name = names.node_name(region.region_id, int(pod.rpartition("-")[2]))
    entry = _entry(region, name, host, where) if host and where else None
    target = _target(region, pod, host, seen, published.get(name))
    return Node(name, pod, entry, target, host.not_after if host else None)


def _target(region: Region, pod: str, host: HostName | None, seen: Seen, promised: DERPNode | None) -> Target | None:
    """A pod of an older template may lack the files for a new identity: what counts is the one that clients know."""
    running = seen.pods.get(pod)
    ip = address(running) if running else None
    if ip and promised and (host is None or pod in seen.older(region)):
        sni = promised.host_name not in (promised.ipv4, promised.ipv6)
        return Target(pod, ip, promised.host_name, promised.cert_name, sni)
    return Target(pod, ip, host.name, host.pin, region.tls.host_name != "Address") if host and ip else None


def _entry(region: Region, name: str, host: HostName, where: Endpoint) -> DERPNode:
    return DERPNode(
        name=name,
        region_id=region.region_id,
        host_name=host.name,
        cert_name=host.pin,
        ipv4=where.ipv4,
        ipv6=where.ipv6,
        stun_port=where.stun_port,
        derp_port=where.derp_port,
    )


def _key_findings(ring: KeyRing) -> list[Finding]:
    return [
        Finding(
            conditions.KEYS_LOST if problem.lost else conditions.KEYS_DAMAGED,
            problem.sentence,
            blocked=True,
            degraded=True,
        )
        for problem in ring.problems
    ]


def _address_findings(
    region: Region, seen: Seen, found: Mapping[str, Endpoint | Finding], published: Mapping[str, DERPNode]
) -> list[Finding]:
    """What keeps pods without an address.  In the map the last known one holds, and is fine while a pod restarts."""
    return [
        item
        for number, (pod, item) in enumerate(found.items())
        if isinstance(item, Finding)
        and pod in seen.pods
        and (item.blocked or address(seen.pods[pod]) or names.node_name(region.region_id, number) not in published)
    ]
