"""The forms of one map: which region each node stands in, and in which order.  Pure.

A node keeps its name in all of them, so that the map that stands can be read back whatever layout it has.
"""

from __future__ import annotations

import dataclasses

from derper.derpmap import DERPMap, DERPNode, DERPRegion

from . import names
from .spec import MapForm, Region


def lay_out(region: Region, form: MapForm, derpmap: DERPMap) -> DERPMap:
    """`derpmap`, as `publish` gives it, in one of its forms."""
    if form.layout == "Region":
        return derpmap
    whole = derpmap.regions[region.region_id]
    ordinals = {names.node_name(region.region_id, ordinal): ordinal for ordinal in range(region.replicas)}
    alone = [_alone(region, whole, node, ordinals[node.name]) for node in whole.nodes]
    return DERPMap(regions={item.region_id: item for item in alone})


def region_id(region: Region, form: MapForm, ordinal: int) -> int:
    """The region that a node stands in."""
    return region.first_id + ordinal if form.layout == "RegionPerNode" else region.region_id


def _alone(region: Region, whole: DERPRegion, node: DERPNode, ordinal: int) -> DERPRegion:
    own = region.first_id + ordinal
    return dataclasses.replace(
        whole,
        region_id=own,
        region_code=f"{whole.region_code}-{ordinal}",
        region_name=f"{whole.region_name} {ordinal}",
        nodes=(dataclasses.replace(node, region_id=own),),
    )
