"""The DERP map is a promise: never empty, never partial, and changed as rarely as possible.

Every difference in a region makes all its clients reconnect, and a node that vanishes from the map because its pod
restarts would cost more than the restart.  So the map follows the spec and known addresses, not readiness:

* the first map comes when all wanted nodes answer;
* a node that is in the map stays while the spec wants it, at its last known address;
* a node enters when it answers; it waits for others that are about to, so that one change carries them all;
* a node leaves as soon as the spec no longer wants it, before its pod stops;
* new host names and certificates come for all nodes at once, when those that are up serve them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from derper.derpmap import DERPMap, DERPNode, DERPRegion, MapError, from_json, from_yaml

from . import names
from .spec import Region


@dataclass(frozen=True, slots=True)
class Candidate:
    """A wanted node.  `node` is its entry as it would be now, None while its address or keys are unknown.

    `answers`: it serves exactly that entry: TLS with the pin, STUN, the mesh.  `arriving`: it does not answer yet, but
    its pod is so young that it is worth waiting for.  `shows`: TLS has the pin, whatever else is missing.  `late`: it
    has been told of new files a moment ago, and TLS shows another pin.  `away`: nobody is served there now.
    """

    name: str
    node: DERPNode | None
    answers: bool
    arriving: bool = False
    shows: bool = False
    late: bool = False
    away: bool = False


def publish(region: Region, published: Mapping[str, DERPNode], candidates: Sequence[Candidate]) -> DERPMap | None:
    """The map to publish: `published` (its nodes by name) brought up to date, or None as long as there is none to give.

    `candidates` are the nodes that the spec wants, by ordinal.  The map is one region with its nodes in this order;
    `layout` makes of it what each ConfigMap holds.
    """
    if not any(candidate.name in published for candidate in candidates):
        complete = all(candidate.answers for candidate in candidates)
        nodes = [candidate.node for candidate in candidates if candidate.node]
        return _map(region, nodes) if complete and len(nodes) == len(candidates) else None
    wait = any(candidate.arriving and candidate.name not in published for candidate in candidates)
    turns = _turns(published, candidates)
    entries = []
    for candidate in candidates:
        old = published.get(candidate.name)
        if old:
            entries.append(_renewed(old, candidate, turns))
        elif candidate.node and candidate.answers and not wait:
            entries.append(candidate.node)
    return _map(region, entries)


def identity(node: DERPNode) -> tuple[str, str]:
    """What clients verify a node by."""
    return node.host_name, node.cert_name


def _turns(published: Mapping[str, DERPNode], candidates: Sequence[Candidate]) -> bool:
    """Whether new identities are published now: some are served, and no relay is just about to."""
    changing = [
        candidate
        for candidate in candidates
        if candidate.node
        and candidate.name in published
        and identity(candidate.node) != identity(published[candidate.name])
    ]
    return any(item.answers or item.shows for item in changing) and not any(item.late for item in changing)


def _renewed(old: DERPNode, candidate: Candidate, turns: bool) -> DERPNode:
    """A new identity must be served before it is published, but where nothing is served it goes along with the others;
    a new address holds at once, the old one leads nowhere.
    """
    new = candidate.node
    if new is None:
        return old
    if identity(old) == identity(new) or (turns and (candidate.answers or candidate.shows or candidate.away)):
        return new
    if old.host_name in (old.ipv4, old.ipv6):
        return old  # host name and address are one thing here
    return dataclasses.replace(old, ipv4=new.ipv4, ipv6=new.ipv6, derp_port=new.derp_port, stun_port=new.stun_port)


def pinned_since(
    old: Mapping[str, DERPNode], new: Mapping[str, DERPNode], since: datetime | None, now: datetime
) -> datetime:
    """When the identities of the nodes (by name) in the new map were published, those in the old one `since` then."""
    same = all(identity(node) == identity(old[name]) for name, node in new.items() if name in old)
    return since if since and same else now


def read(region: Region, data: Mapping[str, str] | None) -> DERPMap | None:
    """The map in a ConfigMap's data, from the form with more of the region's nodes; None if neither has any.

    The two differ only if somebody edited one: what was taken out there is still promised to clients.
    """
    forms = []
    for key, parse in ((names.MAP_JSON, from_json), (names.MAP_YAML, from_yaml)):
        try:
            forms.append(parse((data or {})[key]))
        except (KeyError, MapError):
            continue
    best = max(forms, key=lambda form: len(nodes_of(region, form)), default=None)
    return best if nodes_of(region, best) else None


def nodes_of(region: Region, derpmap: DERPMap | None) -> dict[str, DERPNode]:
    """The nodes of this region in a published map of any layout, by name, as nodes of one region."""
    own = (names.node_name(region.region_id, ordinal) for ordinal in range(region.replicas))
    wanted = frozenset(own)
    nodes = (node for item in (derpmap.regions.values() if derpmap else ()) for node in item.nodes)
    return {node.name: dataclasses.replace(node, region_id=region.region_id) for node in nodes if node.name in wanted}


def _map(region: Region, nodes: Sequence[DERPNode]) -> DERPMap:
    options = region.map
    whole = DERPRegion(
        region_id=region.region_id,
        region_code=region.code,
        region_name=region.title,
        latitude=options.latitude or 0.0,
        longitude=options.longitude or 0.0,
        no_measure_no_home=options.no_measure_no_home,
        nodes=tuple(nodes),
    )
    return DERPMap(regions={whole.region_id: whole})
