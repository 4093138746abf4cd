"""Makes the cluster hold a region's children, and nothing else of ours: one write per difference, none otherwise."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from . import conditions, names
from .conditions import Finding
from .diff import in_force
from .kube import ApiError, Cluster, Object
from .spec import Region

Identity = tuple[str, str]
"""Kind and name: the namespace is the region's."""
Live = Mapping[Identity, Object]

KINDS: Final = (
    "ServiceAccount", "NetworkPolicy", "PodDisruptionBudget", "Secret", "ConfigMap", "Service", "StatefulSet",
)  # fmt: skip

REFUSALS: Final = frozenset({400, 403, 413, 422})
"""HTTP statuses that the same request meets again: what the user can do something about, not the operator."""
INDEPENDENT: Final = frozenset({"Service", "PodDisruptionBudget", "NetworkPolicy"})
"""Kinds on which no other child relies."""
_GUARDED: Final = frozenset({"Secret", "ConfigMap", "StatefulSet"})
_NO_VERSION: Final = "1"
"""The resourceVersion of no object (etcd's first revision is that of an empty store): with it server-side apply
creates, and conflicts with whatever came into being meanwhile: a delayed request of our own with other keys, another
operator's, somebody else's object.
"""


def identity(manifest: Mapping[str, Any]) -> Identity:
    return manifest["kind"], manifest["metadata"]["name"]


def owned(region: Region, kind: str, live: Mapping[str, Any]) -> bool:
    """Whether the region controls an object.  Labels do not tell: anybody may set them.

    But keys from a backup have nothing else: a Secret with the region's labels that nobody owns is the region's.
    """
    meta = live["metadata"]
    references = meta.get("ownerReferences", ())
    if kind == "Secret" and not references:
        labels: Mapping[str, str] = meta.get("labels", {})
        return names.labels(region.name).items() <= labels.items()
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


def taken(region: Region, wanted: Iterable[Identity], live: Live) -> dict[Identity, Finding]:
    """A finding for every name that a child needs and an object of somebody else has."""
    foreign = (key for key in wanted if key in live and not owned(region, key[0], live[key]))
    return {key: _taken(region, key, live[key]) for key in foreign}


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


@dataclass(frozen=True, slots=True)
class Applied:
    """The objects as they are then, and what the API server refused for good: a quota, a port that is taken, a rule."""

    live: Live
    refused: Mapping[Identity, Finding]

    @property
    def whole(self) -> bool:
        """Whether nothing was left out that something else relies on."""
        return all(kind in INDEPENDENT for kind, _ in self.refused)


async def apply(
    cluster: Cluster, region: Region, manifests: Sequence[Object], live: Live, foreign: Mapping[Identity, Finding]
) -> Applied:
    """Apply in order what differs.  Leaves alone what the region does not own.

    Each write names the object it was computed for, so that one that was replaced meanwhile is not touched.  Stops at
    a refusal, as what follows relies on what came before; but nothing relies on what is independent, and ports that
    move from one Service to the next get free only by going on.  `foreign` are the names that somebody else has.
    """
    result: dict[Identity, Object] = {}
    refused = dict(foreign)
    for manifest in manifests:
        key = identity(manifest)
        if key in foreign:
            continue
        try:
            result[key] = await _apply_one(cluster, region, manifest, live.get(key))
        except ApiError as error:
            if error.status not in REFUSALS or _is_another(error):
                raise
            refused[key] = _refused(key, error)
            if manifest["kind"] not in INDEPENDENT:
                break
    return Applied(result, refused)


async def _apply_one(cluster: Cluster, region: Region, manifest: Object, current: Object | None) -> Object:
    if current is None:
        return await cluster.apply(manifest | {"metadata": manifest["metadata"] | {"resourceVersion": _NO_VERSION}})
    if not _differs(region, manifest, current):
        return current
    if _other_strategy(manifest, current):
        current = await _set_strategy(cluster, region, manifest, current)
    return await cluster.apply(_pinned(manifest, current))


def _other_strategy(manifest: Object, live: Object) -> bool:
    wanted = manifest["spec"].get("updateStrategy") if manifest["kind"] == "StatefulSet" else None
    return wanted is not None and bool(wanted["type"] != live["spec"]["updateStrategy"]["type"])


async def _set_strategy(cluster: Cluster, region: Region, manifest: Object, live: Object) -> Object:
    """The API server has given the other strategy (of an older release, or by hand) a default that goes with no other
    one, and that server-side apply leaves where it is, as nobody set it.
    """
    strategy = manifest["spec"]["updateStrategy"] | {"rollingUpdate": None}
    patch = {"metadata": {"uid": live["metadata"]["uid"]}, "spec": {"updateStrategy": strategy}}
    return await cluster.merge("StatefulSet", region.namespace, region.name, patch)


def _differs(region: Region, manifest: Object, current: Object) -> bool:
    return owned(region, manifest["kind"], current) and not in_force(manifest, current, names.MANAGER)


def _is_another(error: ApiError) -> bool:
    """Whether the object was replaced meanwhile: to the API server its uid is a field like any that must not change."""
    return "metadata.uid" in error.words


def _refused(key: Identity, error: ApiError) -> Finding:
    text = f"The API server refuses {' '.join(key)}: {error.words.rstrip('.')}."
    return Finding(conditions.CHILD_REFUSED, text, blocked=True)


async def prune(cluster: Cluster, region: Region, wanted: Iterable[Identity], live: Live) -> None:
    """Delete what the region owns and no longer wants: another exposure, a smaller region, an older release."""
    for kind, name in _left_over(region, wanted, live):
        await cluster.delete(kind, region.namespace, name, live[kind, name]["metadata"]["uid"])


def _left_over(region: Region, wanted: Iterable[Identity], live: Live) -> list[Identity]:
    keep = frozenset(wanted)
    return [
        key
        for key, item in sorted(live.items())
        if key not in keep and owned(region, key[0], item) and not item["metadata"].get("deletionTimestamp")
    ]


def pending(region: Region, manifests: Sequence[Object], live: Live, kept: Iterable[Identity] = ()) -> list[Identity]:
    """What `apply` and `prune` would write now; `kept` is what stays besides `manifests`."""
    wanted = {identity(manifest): manifest for manifest in manifests}
    differ = [key for key, manifest in wanted.items() if key not in live or _differs(region, manifest, live[key])]
    return differ + _left_over(region, [*wanted, *kept], live)


def _pinned(manifest: Object, live: Mapping[str, Any]) -> Object:
    """`manifest` for this very object; keys, maps and the number of pods for the version that they were made from."""
    guard = {"uid": live["metadata"]["uid"]}
    if manifest["kind"] in _GUARDED:
        guard["resourceVersion"] = live["metadata"]["resourceVersion"]
    return manifest | {"metadata": manifest["metadata"] | guard}
