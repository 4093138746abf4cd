"""Maps over several regions of a namespace: the ConfigMaps that `spec.map.mergeInto` names.

No region owns them alone, so no region's pass writes them.  One pass for a namespace looks at all maps that are to be
merged, in one list with the merged ones themselves: what it writes follows from one moment, and a write that comes too
late conflicts.  It runs when one of these maps changes, which is seldom, and needs two reads however many there are.

A region leaves a merged map when it says so or is deleted.  As long as its own map is missing, or was edited by hand,
what the merged map has of it stays.
"""

from __future__ import annotations

import json
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from derper.derpmap import DERPMap, DERPRegion, MapError, from_json

from . import conditions, names
from .conditions import Finding
from .diff import in_force, owns
from .kube import ApiError, Cluster, Object
from .publish import nodes_of
from .spec import MAX_REPLICAS, Region, merge_targets

RESYNC: Final = 600.0
"""Seconds until the next look at merged maps that are fine: every change of what they are made of is an event."""
LATER: Final = 10.0
"""Seconds until the next look at a name that somebody else has: that is not watched."""
_NO_VERSION: Final = "1"  # see apply


@dataclass(frozen=True, slots=True)
class Member:
    """A DerpRegion in a merged map, and its regions there; none before its first map."""

    name: str
    uid: str
    regions: Sequence[DERPRegion]


@dataclass(frozen=True, slots=True)
class Merged:
    """The map of all members but those that are `left_out`: by name, the one that was there before them."""

    derpmap: DERPMap
    members: Sequence[Member]
    left_out: Mapping[str, str]


async def merge(cluster: Cluster, namespace: str) -> float | None:
    """Bring the merged maps of a namespace up to date.

    Returns the seconds until the next look, None if there are none.  Raises `ApiError`; the caller repeats the pass.
    """
    items = await cluster.list("ConfigMap", namespace, names.MERGE_LABELS)
    if not items:
        return None
    regions = await cluster.list(names.KIND, namespace, {})
    parts = [item for item in items if names.REGION_LABEL in item["metadata"]["labels"]]
    wholes = {item["metadata"]["name"]: item for item in items if item not in parts}
    targets = {_annotation(part, names.MERGE_INTO) for part in parts} - {""} | wholes.keys()
    free = [await _write(cluster, namespace, name, wholes.get(name), regions, parts) for name in sorted(targets)]
    return RESYNC if all(free) else LATER


async def _write(
    cluster: Cluster,
    namespace: str,
    name: str,
    stands: Object | None,
    regions: Sequence[Object],
    parts: Sequence[Object],
) -> bool:
    """Bring one merged map up to date; False if somebody else has its name."""
    if stands and not is_merged(stands):
        return False
    found = members(name, regions, parts, stands)
    if not found:
        if stands:
            await cluster.delete("ConfigMap", namespace, name, stands["metadata"]["uid"])
        return True
    merged = merge_maps(found)
    if not merged.derpmap.regions:
        return True
    manifest = render(namespace, name, merged)
    try:
        if not stands:
            await cluster.apply(_pinned(manifest, resourceVersion=_NO_VERSION))
        elif not in_force(manifest, stands, names.MANAGER):
            meta = stands["metadata"]
            await cluster.apply(_pinned(manifest, uid=meta["uid"], resourceVersion=meta["resourceVersion"]))
    except ApiError as error:
        other = await cluster.get("ConfigMap", namespace, name) if error.status == 409 and not stands else None
        if other is None:
            raise
        return await _write(cluster, namespace, name, other, regions, parts)  # the list did not have it: no labels
    return True


def members(
    name: str, regions: Iterable[Object], parts: Iterable[Object], stands: Object | None = None
) -> list[Member]:
    """Who is to be in the merged map of this name: first those that are, then by age."""
    published = {_owner(part): part for part in parts if _annotation(part, names.MERGE_INTO) == name}
    inside = {owner["uid"] for owner in _owners(stands)}
    found = []
    for region in sorted(regions, key=lambda each: _rank(each["metadata"], inside)):
        meta, spec = region["metadata"], region.get("spec") or {}
        part = published.get(meta["uid"])
        if meta.get("deletionTimestamp") or not (part or name in merge_targets(spec.get("map") or {})):
            continue
        own = _regions(part) if part and owns(part, names.MANAGER, "data", names.MAP_JSON) else []
        if not own and meta["uid"] in inside:
            own = _known(_regions(stands), int(spec.get("regionID", 0)))
        found.append(Member(meta["name"], meta["uid"], own))
    return found


def _rank(meta: Mapping[str, Any], inside: Container[str]) -> tuple[bool, str, str]:
    return meta["uid"] not in inside, str(meta["creationTimestamp"]), meta["name"]


def merge_maps(found: Iterable[Member]) -> Merged:
    """Merge what `found` publish; of those that collide the first one wins, and the other is left out whole."""
    inside, outside = [], []
    taken: dict[int | str, str] = {}
    for member in found:
        claims = _claims(member)
        if taken.keys() & claims:
            outside.append(member)
        elif claims:
            inside.append(member)
            taken |= dict.fromkeys(claims, member.name)
    left_out = {member.name: next(taken[claim] for claim in _claims(member) if claim in taken) for member in outside}
    regions = {each.region_id: each for member in inside for each in member.regions}
    return Merged(DERPMap(regions=regions), inside, left_out)


def _claims(member: Member) -> list[int | str]:
    """What nobody else may have in the same map: region ids and names of nodes."""
    return [
        *(each.region_id for each in member.regions),
        *(node.name for each in member.regions for node in each.nodes),
    ]


def render(namespace: str, name: str, merged: Merged) -> Object:
    """The ConfigMap of a merged map.  It goes with the last of its regions."""
    meta: Object = {
        "name": name,
        "namespace": namespace,
        "labels": {**names.MERGE_LABELS, "app.kubernetes.io/name": "derper"},
        "annotations": {names.LEFT_OUT: json.dumps(merged.left_out, sort_keys=True)},
        "ownerReferences": [
            {"apiVersion": f"{names.GROUP}/{names.VERSION}", "kind": names.KIND, "name": each.name, "uid": each.uid}
            for each in sorted(merged.members, key=lambda member: member.name)
        ],
    }
    data = {names.MAP_JSON: merged.derpmap.to_json(), names.MAP_YAML: merged.derpmap.to_yaml()}
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": meta, "data": data}


def is_merged(item: Mapping[str, Any]) -> bool:
    """Whether a ConfigMap is a merged map: regions own it together, none alone."""
    owners = _owners(item)
    return bool(owners) and all(owner["kind"] == names.KIND and not owner.get("controller") for owner in owners)


def holds(item: Mapping[str, Any] | None, region: Region) -> bool:
    """Whether a merged map has this region."""
    return _owns(region, item) and bool(nodes_of(region, _content(item)))


def has_node(item: Mapping[str, Any] | None, region: Region, wanted: Container[str]) -> bool:
    """Whether a merged map has one of these nodes of the region, by name."""
    return _owns(region, item) and any(node.name in wanted for each in _regions(item) for node in each.nodes)


def _owns(region: Region, item: Mapping[str, Any] | None) -> bool:
    return any(owner["uid"] == region.uid for owner in _owners(item))


def findings(region: Region, merged: Mapping[str, Object | None]) -> list[Finding]:
    """What keeps a region that has a map out of the merged maps that it names."""
    return [found for name, item in merged.items() if (found := _finding(region, name, item))]


def _finding(region: Region, name: str, item: Object | None) -> Finding | None:
    if item and not is_merged(item):
        text = f"ConfigMap {name} exists and is no merged map: delete it, or give spec.map.mergeInto another name."
        return Finding(conditions.NAME_TAKEN, text, blocked=True)
    rival = _left_out(item).get(region.name)
    if rival:
        text = (
            f"ConfigMap {name} leaves this region out: it has a region id in common with DerpRegion {rival}, which was "
            "there before. Merge it into another map, or create it anew with another regionID."
        )
        return Finding(conditions.REGION_ID_TAKEN, text, blocked=True)
    if holds(item, region):
        return None
    return Finding(conditions.MAP_PENDING, f"ConfigMap {name} will hold this region in a moment.")


def _left_out(item: Object | None) -> Mapping[str, str]:
    try:
        found = json.loads(_annotation(item, names.LEFT_OUT) or "{}")
    except ValueError:  # edited by hand; the next merge repairs it
        return {}
    return found if isinstance(found, dict) else {}


def _known(regions: Iterable[DERPRegion], region_id: int) -> list[DERPRegion]:
    """Those of one DerpRegion: its nodes are named after its region id, whatever the layout."""
    own = {names.node_name(region_id, ordinal) for ordinal in range(MAX_REPLICAS)}
    return [each for each in regions if own & {node.name for node in each.nodes}]


def _content(item: Mapping[str, Any] | None) -> DERPMap | None:
    """The map in a ConfigMap.  YAML takes long to read, and says the same."""
    try:
        return from_json((item or {}).get("data", {}).get(names.MAP_JSON, ""))
    except MapError:
        return None


def _regions(item: Mapping[str, Any] | None) -> list[DERPRegion]:
    found = _content(item)
    return list(found.regions.values()) if found else []


def _owners(item: Mapping[str, Any] | None) -> Sequence[Mapping[str, Any]]:
    return item["metadata"].get("ownerReferences") or () if item else ()


def _owner(item: Object) -> str:
    return next((owner["uid"] for owner in _owners(item) if owner.get("controller")), "")


def _annotation(item: Object | None, key: str) -> str:
    return str(((item or {}).get("metadata", {}).get("annotations") or {}).get(key, ""))


def _pinned(manifest: Object, **guard: str) -> Object:
    return manifest | {"metadata": manifest["metadata"] | guard}
