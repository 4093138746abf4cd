"""Which pods go now: those that have left the DERP map, and those of an older template, one after the other.  Pure.

The StatefulSet controller knows of a pod no more than its readiness, and replaces from the highest ordinal down though
a lower one is away.  So its strategy is OnDelete, and this decides; the eviction itself asks the disruption budget,
which holds when somebody drains a Kubernetes node, or another operator works, at the same moment.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from derper.derpmap import MapError, from_json

from . import conditions, names
from .apply import REFUSALS
from .conditions import Finding
from .kube import ApiError, Object
from .merge import has_node
from .observe import Seen
from .plan import published_map
from .render import map_identities
from .spec import Region
from .status import Health, behind, map_hash


def replicas(region: Region, seen: Seen, shown: Mapping[str, Any], now: datetime) -> int:
    """How many pods the StatefulSet is to have: those that leave stay until the map without them has spread.

    `shown` is the status of the map: it says since when the one that stands has been published.
    """
    leaving = [ordinal for ordinal in seen.ordinals(region) if ordinal >= region.replicas]
    derpmap = published_map(region, seen)
    if not leaving or derpmap is None:
        return region.replicas
    gone = shown.get("hash") == map_hash(derpmap) and not _mapped(region, seen, leaving)
    if gone and now - datetime.fromisoformat(shown["publishedAt"]) >= region.map.spread:
        return region.replicas
    return max(leaving) + 1


def _mapped(region: Region, seen: Seen, ordinals: Iterable[int]) -> bool:
    """Whether one of the nodes is still in one of the maps."""
    wanted = {names.node_name(region.region_id, ordinal) for ordinal in ordinals}
    for kind, name in map_identities(region):
        try:
            derpmap = from_json((seen.data(kind, name) or {}).get(names.MAP_JSON, b"").decode())
        except MapError:  # edited by hand, and repaired in this pass
            continue
        if wanted & {node.name for item in derpmap.regions.values() for node in item.nodes}:
            return True
    return any(has_node(item, region, wanted) for item in seen.merged.values())


@dataclass(frozen=True, slots=True)
class Departures:
    """The pods to evict, as they were seen, and what is to be said of those that wait."""

    now: Sequence[Object] = ()
    findings: Sequence[Finding] = ()


def departures(
    region: Region, seen: Seen, nodes: Iterable[Health], unreached: Collection[str] = frozenset()
) -> Departures:
    """The pods to replace now; `unreached` are those to which no way leads yet from outside.

    * Pods that never started serve nobody: all of them at once, also while others are away.
    * Of the others one, when every other node is well: it answers as the map says, meshes with all, and, if it is new,
      runs with current settings.
    * That one is first a pod that is not ready, for it is away already; then the one with the fewest clients: those may
      move once more, to a node that is still to be replaced, while those of the last one move once.
    """
    owner = seen.live.get(("StatefulSet", region.name))
    if owner is None:
        return Departures(findings=[Finding(conditions.PODS_PENDING, f"StatefulSet {region.name} is being created.")])
    status = owner.get("status", {})
    if status.get("observedGeneration", 0) < owner["metadata"].get("generation", 0):
        text = f"StatefulSet {region.name} is about to follow the spec."
        return Departures(findings=[Finding(conditions.ROLLING_OUT, text)])
    judged = list(nodes)
    older = seen.older(region)
    rest = [item for item in judged if item.node.pod in older]
    if not rest:
        return Departures()
    pending = [item for item in rest if seen.pods[item.node.pod].get("status", {}).get("phase") == "Pending"]
    away = [item for item in rest if not item.ready]
    unwell = {item.node.pod for item in judged if item.finding} | set(unreached)
    unwell |= set(behind(region, seen, judged)) - older  # what is new in the settings may be too new for them
    wait_for = [item.node.pod for item in judged if item.node.pod in unwell and item not in away]
    now = pending
    if not pending and not wait_for:
        now = [min(reversed(away or rest), key=lambda item: item.clients)]
    if region.paused:
        now = []
    going = [item.node.pod for item in now]
    later = [item.node.pod for item in rest if item not in now]
    text = _sentence(f"{region.replicas - len(rest)} of {region.replicas} are done", going, later, wait_for)
    return Departures([seen.pods[pod] for pod in going], [Finding(conditions.ROLLING_OUT, text)])


def _sentence(done: str, going: Sequence[str], later: Sequence[str], wait_for: Sequence[str]) -> str:
    parts = [f"{', '.join(going)} now"] if going else []
    if later:
        verb = "is" if len(wait_for) == 1 else "are"
        when = f" when {', '.join(wait_for)} {verb} well" if wait_for else " later"
        parts.append(f"{', '.join(later)}{when}")
    return f"Pods are being replaced, {done}: {', '.join(parts)}."


def refusal(pod: str, error: ApiError) -> list[Finding]:
    """What is to be said of an eviction that the API server did not carry out.  Raises what only time can heal."""
    if error.status in (404, 409):  # it went, or changed, a moment ago: the next look knows more
        return []
    words = error.words.rstrip(".")
    if error.status == 429:
        return [Finding(conditions.ROLLING_OUT, f"Pod {pod} waits to be replaced: {words}.")]
    if error.status in REFUSALS or "more than one PodDisruptionBudget" in words:
        return [Finding(conditions.CHILD_REFUSED, f"The API server does not evict pod {pod}: {words}.", blocked=True)]
    raise error
