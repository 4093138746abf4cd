"""From what was seen to what is wanted: keys, mesh membership, map entries.  Pure.

`prepare` makes the keys and says whom to ask what; with the answers, `plan` takes the next step.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

from derper import certs
from derper.derpmap import DERPMap, DERPNode

from . import conditions, names, references
from .addresses import Endpoint, Place, endpoint
from .conditions import Finding
from .keyring import Generation, KeyRing, Known, Maker, Record, Wishes, extend
from .observe import Seen, address, recorded_nodes
from .probe import Answer, Target
from .publish import nodes_of, read
from .references import HostName
from .render.config import SettingsNode, settings_node
from .rotation import Relays, Turn, mesh_keys, retired, turn, without
from .spec import Region


@dataclass(frozen=True, slots=True)
class Node:
    """A wanted node: its name in the map, its entry there as it would be now (None: not known yet), and its certificate
    for clients.
    """

    name: str
    pod: str
    entry: DERPNode | None
    host: HostName | None


@dataclass(frozen=True, slots=True)
class Draft:
    """What follows from one look at the cluster alone.  `published` are the nodes of the map that stands, by name,
    `known` what has been told of each pod, and `hosts` the names for clients as things stand.
    """

    region: Region
    seen: Seen
    members: list[str]
    ring: KeyRing
    recorded: Mapping[str, Any]
    published: Mapping[str, DERPNode]
    known: Mapping[str, Known]
    found: Mapping[str, Endpoint | Finding]
    hosts: Mapping[str, HostName]

    @property
    def targets(self) -> list[Target]:
        """Whom to ask: every relay that runs and has a name.

        A pod of an older template may lack the files for a new identity: what counts is the one that clients know.
        """
        found, promised, older = [], self.published_pods, self.seen.older(self.region)
        for pod in self.region.pods:
            running = self.seen.pods.get(pod)
            ip = address(running) if running else None
            host, old = self.hosts.get(pod), promised.get(pod)
            if ip and old and (host is None or pod in older):
                found.append(self._target(pod, ip, old.host_name, old.cert_name))
            elif ip and host:
                found.append(self._target(pod, ip, host.name, host.pin))
        return found

    def _target(self, pod: str, ip: str, host: str, pin: str) -> Target:
        keys = self.ring.nodes.get(pod)
        also, earlier = set(), set()
        if keys and (keys.newest != keys.current or self.region.tls.host_name == "Generated"):
            also = {keys.newest.mesh.host_name, keys.current.mesh.host_name} - {host}
        if keys and self.region.tls.host_name == "Address":
            earlier = {item.address.pin for item in keys.generations if item.address}
        by_name = certs.ip_address_of(host) is None
        return Target(pod, ip, host, pin, by_name, tuple(sorted(also)), frozenset(earlier))

    @property
    def published_pods(self) -> dict[str, DERPNode]:
        """The nodes of the map that stands, by pod."""
        return _by_pod(self.region, self.published)


@dataclass(frozen=True, slots=True)
class Plan:
    """`keys` are the Secret's entries, `settings` the members of the mesh by pod, `published` the nodes of the map that
    stands, by name.  `rotated` is what has been rotated to the end.
    """

    members: list[str]
    ring: KeyRing
    keys: Mapping[str, bytes]
    settings: Mapping[str, SettingsNode]
    nodes: list[Node]
    published: Mapping[str, DERPNode]
    findings: list[Finding]
    relays: Relays
    turn: Turn
    rotated: Record


def prepare(region: Region, seen: Seen, now: datetime, maker: Maker) -> Draft:
    """What follows from one look at the cluster, before anybody was asked."""
    members = seen.members(region)
    published = nodes_of(region, published_map(region, seen))
    recorded = recorded_nodes(seen, region)
    found = {pod: _endpoint(region, seen, pod, published) for pod in region.pods}
    endpoints = {pod: item for pod, item in found.items() if isinstance(item, Endpoint)}
    known = _known(region, recorded, published)
    ring = extend(
        names.keys_secret(region.name),
        seen.data("Secret", names.keys_secret(region.name)),
        members,
        known,
        _addresses(region, endpoints, _by_pod(region, published)),
        now,
        maker,
        Wishes(region.tls.rotate, region.mesh.rotate, region.tls.lifetime, region.tls.renew_before),
    )
    current = {pod: keys.current for pod, keys in ring.nodes.items()}
    hosts, _ = _host_names(region, seen, current, now)
    return Draft(region, seen, members, ring, recorded, published, known, found, hosts)


def plan(draft: Draft, answers: Mapping[str, Answer], now: datetime) -> Plan:
    """What is wanted now, given what the relays say."""
    region, seen, ring, published = draft.region, draft.seen, draft.ring, draft.published_pods
    relays = Relays(seen.pods, answers, _digest(region, seen), now)
    taken = turn(region, ring, relays, draft.known, published, seen.pinned_since(region))
    endpoints = {pod: item for pod, item in draft.found.items() if isinstance(item, Endpoint)}
    hosts, findings = _host_names(region, seen, taken.current, now)
    data, record, waits = mesh_keys(ring, draft.members, relays)
    return Plan(
        members=draft.members,
        ring=ring,
        keys=without(data, retired(ring, taken, relays, draft.known, published)),
        settings=_settings(region, draft.members, ring, taken, draft.recorded),
        nodes=[_node(region, pod, hosts.get(pod), endpoints.get(pod), published.get(pod)) for pod in region.pods],
        published=draft.published,
        findings=[
            *_key_findings(ring),
            *findings,
            *_address_findings(region, seen, draft.found, draft.published),
            *taken.findings,
            *waits,
        ],
        relays=relays,
        turn=taken,
        rotated=Record(
            "" if any(keys.newest != taken.current[pod] for pod, keys in ring.nodes.items()) else record.certificates,
            "" if record.mesh_key else record.mesh,
        ),
    )


def _digest(region: Region, seen: Seen) -> str:
    """What a relay reports that has read the settings as they stand."""
    text = (seen.data("ConfigMap", names.settings_map(region.name)) or {}).get(names.SETTINGS_FILE, b"")
    return hashlib.sha256(text).hexdigest()


def published_map(region: Region, seen: Seen) -> DERPMap | None:
    """The map that stands in the cluster, None if there is none."""
    data = seen.data("ConfigMap", names.derp_map(region.name))
    return read(region, {key: value.decode() for key, value in data.items()} if data else None)


def _by_pod(region: Region, published: Mapping[str, DERPNode]) -> dict[str, DERPNode]:
    numbered = {names.node_name(region.region_id, number): pod for number, pod in enumerate(region.pods)}
    return {numbered[name]: node for name, node in published.items()}


def _addresses(region: Region, endpoints: Mapping[str, Endpoint], published: Mapping[str, DERPNode]) -> dict[str, str]:
    """In mode Address, what each node's certificate is for: the address that clients know while none is known here."""
    if region.tls.host_name != "Address":
        return {}
    last = {pod: node.host_name for pod, node in published.items() if certs.ip_address_of(node.host_name)}
    return last | {pod: item.host for pod, item in endpoints.items()}


def _known(region: Region, recorded: Mapping[str, Any], published: Mapping[str, DERPNode]) -> dict[str, Known]:
    """Pods whose keys others rely on: peers through the settings, clients through the map."""
    found = {}
    for number, pod in enumerate(region.pods):
        entry = published.get(names.node_name(region.region_id, number))
        if entry:
            found[pod] = Known(entry.host_name)
    prefix = f"{names.SECRET_DIR}/"
    for pod, node in recorded.items():
        listed = node.get("certificates") or ()
        found[pod] = Known(str(node.get("hostName")), frozenset(str(stem).removeprefix(prefix) for stem in listed))
    return found


def _endpoint(region: Region, seen: Seen, pod: str, published: Mapping[str, DERPNode]) -> Endpoint | Finding:
    taken = seen.foreign.get(("Service", pod))
    if taken:
        return taken
    running = seen.pods.get(pod)
    name = running["spec"].get("nodeName", "") if running else ""
    node = seen.nodes.get(name)
    if name in seen.nodes and node is None:  # without the Node its ExternalIP would look like none
        return Finding(conditions.ADDRESS_PENDING, f"Node {name}, which pod {pod} was on, has gone.")
    old = published.get(names.node_name(region.region_id, int(pod.rpartition("-")[2])))
    known = (old.ipv4, old.ipv6) if old else ()
    return endpoint(region, pod, Place(seen.live.get(("Service", pod)), running, node, seen.resolved, known))


def _host_names(
    region: Region, seen: Seen, current: Mapping[str, Generation], now: datetime
) -> tuple[Mapping[str, HostName], list[Finding]]:
    findings = []
    clients = references.clients_finding(region, seen.clients)
    if clients:
        findings.append(clients)
    if region.tls.host_name == "Template":
        hosts, wrong = references.host_names(region, seen.secrets, now)
        return hosts, findings + wrong
    if region.tls.host_name == "Address":
        served = {pod: keys.address for pod, keys in current.items() if keys.address}
    else:
        served = {pod: keys.mesh for pod, keys in current.items()}
    return {
        pod: HostName(item.host_name, item.pin, item.not_before, item.not_after) for pod, item in served.items()
    }, findings


def _settings(
    region: Region, members: list[str], ring: KeyRing, taken: Turn, recorded: Mapping[str, Any]
) -> dict[str, SettingsNode]:
    """A node whose keys are damaged stays as its peers know it: it may well still run with the old ones."""
    users = [references.stem(secret) for secret in region.tls.certificates]  # the first is for clients without SNI
    nodes = {}
    for pod in members:
        keys = ring.nodes.get(pod)
        if keys:
            nodes[pod] = settings_node(
                region,
                pod,
                server_key=keys.server_key,
                host_name=taken.current[pod].mesh.host_name,
                pin=taken.current[pod].mesh.pin,
                certificates=users + [f"{names.SECRET_DIR}/{item.stem}" for item in taken.served[pod]],
            )
        elif pod in recorded:
            nodes[pod] = recorded[pod]
    return nodes


def _node(region: Region, pod: str, host: HostName | None, where: Endpoint | None, published: DERPNode | None) -> Node:
    """While its address is not known, a node stays at its last one."""
    name = names.node_name(region.region_id, int(pod.rpartition("-")[2]))
    entry = None
    if host and where:
        entry = _entry(region, name, host, where)
    elif host and published:
        entry = replace(published, host_name=host.name, cert_name=host.pin)
    return Node(name, pod, entry, host)


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
