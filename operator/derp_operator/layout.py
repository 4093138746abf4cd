"""The forms of one map: which region each node stands in, and in which order.  Pure.

A node keeps its name in all of them, so that the map that stands can be read back whatever layout it has.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable

from derper.derpmap import DERPMap, DERPNode, DERPRegion

from . import names
from .spec import MapForm, Region


def lay_out(region: Region, form: MapForm, derpmap: DERPMap) -> DERPMap:
    """`derpmap`, as `publish` gives it, in one of its forms."""
    whole = derpmap.regions[region.region_id]
    if form.layout == "Region":
        ordered = dataclasses.replace(whole, nodes=tuple(_ordered(region, form, whole.nodes)))
        return dataclasses.replace(derpmap, regions={region.region_id: ordered})
    ordinals = {names.node_name(region.region_id, ordinal): ordinal for ordinal in range(region.replicas)}
    alone = [_alone(region, whole, node, ordinals[node.name]) for node in whole.nodes]
    return DERPMap(regions={item.region_id: item for item in alone})


def region_id(region: Region, form: MapForm, ordinal: int) -> int:
    """The region that a node stands in."""
    return region.first_id + ordinal if form.layout == "RegionPerNode" else region.region_id


def _ordered(region: Region, form: MapForm, nodes: Iterable[DERPNode]) -> list[DERPNode]:
    """The listed ones first, the others by ordinal, or for a consumer by rendezvous hashing.

    So consumers spread over the nodes, and a node that comes or goes moves only those whose first node it is.
    """
    listed = {names.node_name(region.region_id, ordinal): place for place, ordinal in enumerate(form.node_order)}
    by_hash = sorted(nodes, key=lambda node: _weight(form.consumer, node)) if form.consumer else nodes
    return sorted(by_hash, key=lambda node: listed.get(node.name, len(listed)))


def _weight(consumer: str, node: DERPNode) -> bytes:
    return hashlib.sha256(f"{consumer}/{node.name}".encode()).digest()


def _alone(region: Region, whole: DERPRegion, node: DERPNode, ordinal: int) -> DERPRegion:
    own = region.first_id + ordinal
    return dataclasses.replace(
        whole,
        region_id=own,
        region_code=f"{whole.region_code}-{ordinal}",
        region_name=f"{whole.region_name} {ordinal}",
        nodes=(dataclasses.replace(node, region_id=own),),
    )
