"""Makes the cluster hold a region's children, and nothing else of ours: one write per difference, none otherwise."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

from . import conditions, names
from .conditions import Finding
from .diff import in_force
from .kube import Cluster, Object
from .spec import Region

Identity = tuple[str, str]
"""Kind and name: the namespace is the region's."""
Live = Mapping[Identity, Object]

KINDS: Final = (
    "ServiceAccount", "NetworkPolicy", "PodDisruptionBudget", "Secret", "ConfigMap", "Service", "StatefulSet",
)  # fmt: skip


def identity(manifest: Mapping[str, Any]) -> Identity:
    return manifest["kind"], manifest["metadata"]["name"]


def owned(region: Region, live: Mapping[str, Any]) -> bool:
    """Whether the region controls an object.  Labels do not tell: anybody may set them."""
    references = live["metadata"].get("ownerReferences", ())
    return any(reference.get("controller") and reference["uid"] == region.uid for reference in references)


async def read_children(cluster: Cluster, region: Region) -> dict[Identity, Object]:
    """All objects with the region's labels, owned or not."""
    labels = names.labels(region.name)
    lists = await asyncio.gather(*(cluster.list(kind, region.namespace, labels) for kind in KINDS))
    return {(kind, item["metadata"]["name"]): item for kind, items in zip(KINDS, lists, strict=True) for item in items}


async def find_unlabelled(
    cluster: Cluster, region: Region, wanted: Iterable[Identity], live: Live
) -> dict[Identity, Object]:
    """The wanted objects that exist but lost (or never had) the region's labels."""
    missing = [key for key in wanted if key not in live]
    found = await asyncio.gather(*(cluster.get(kind, region.namespace, name) for kind, name in missing))
    return {key: item for key, item in zip(missing, found, strict=True) if item}


def taken(region: Region, wanted: Iterable[Identity], live: Live) -> list[Finding]:
    """A finding for every name that a child needs and an object of somebody else has."""
    return [_taken(region, key, live[key]) for key in wanted if key in live and not owned(region, live[key])]


def _taken(region: Region, key: Identity, item: Mapping[str, Any]) -> Finding:
    kind, name = key
    references = item["metadata"].get("ownerReferences", ())
    if any(reference["kind"] == names.KIND and reference["name"] == region.name for reference in references):
        # The garbage collector is on its way: a region of this name was deleted a moment ago.
        return Finding(conditions.NAME_TAKEN, f"{kind} {name} still belongs to the previous region of this name.")
    return Finding(
        conditions.NAME_TAKEN,
        f"{kind} {name} exists and does not belong to this region: delete it, or give the region another name.",
        blocked=True,
    )


async def apply(cluster: Cluster, region: Region, manifests: Sequence[Object], live: Live) -> dict[Identity, Object]:
    """Apply in order what differs; returns the objects as they are then.  Leaves alone what the region does not own.

    Each write names the object it was computed for, so that one that was replaced meanwhile is not touched.
    """
    result: dict[Identity, Object] = {}
    for manifest in manifests:
        key = identity(manifest)
        current = live.get(key)
        if current is None:
            result[key] = await cluster.apply(manifest)
        elif owned(region, current) and not in_force(manifest, current, names.MANAGER):
            result[key] = await cluster.apply(_pinned(manifest, current))
        else:
            result[key] = current
    return result


async def prune(cluster: Cluster, region: Region, wanted: Iterable[Identity], live: Live) -> None:
    """Delete what the region owns and no longer wants: another exposure, a smaller region, an older release."""
    keep = frozenset(wanted)
    for (kind, name), item in sorted(live.items()):
        if (kind, name) not in keep and owned(region, item) and not item["metadata"].get("deletionTimestamp"):
            await cluster.delete(kind, region.namespace, name, item["metadata"]["uid"])


def _pinned(manifest: Object, live: Mapping[str, Any]) -> Object:
    """`manifest` for this very object.  Keys must not be written over a newer version of the Secret."""
    guard = {"uid": live["metadata"]["uid"]}
    if manifest["kind"] == "Secret":
        guard["resourceVersion"] = live["metadata"]["resourceVersion"]
    return manifest | {"metadata": manifest["metadata"] | guard}
