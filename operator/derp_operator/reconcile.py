"""One pass over one region: read, plan, ask, apply, write the status.

Level-triggered: the pass looks at what is, never at what changed, keeps nothing between passes, and may stop at any
write; the next one goes on from whatever stands.  Nothing here sleeps: whoever calls comes back after the seconds that
the pass returns, or when the cluster reports a change.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any, Final

from derper.derpmap import DERPMap

from . import events, names
from .addresses import host_ports
from .apply import INDEPENDENT, REFUSALS, Applied, Identity, apply, identity, pending, prune
from .conditions import READY, Finding, timestamp
from .departures import departures, refusal, replicas
from .keyring import Maker
from .kube import ApiError, Cluster, Object
from .observe import Seen, answers, look
from .plan import Plan, plan, prepare, published_map
from .probe import Prober, Reach, reach
from .publish import nodes_of, pinned_since, publish
from .render import Inputs, children, config_hash, map_identities
from .resolve import Resolver
from .spec import InvalidSpec, Region, parse
from .status import Health, Status, blocked, findings, health, is_fresh, paused, rejected, status

RESYNC: Final = 60.0
"""Seconds until the next look at a region that is fine: relays that stop answering send no event."""
SOON: Final = 1.0
LATER: Final = 10.0
_PATIENCE: Final = 120.0

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Reconciler:
    """What a pass needs from outside.  `image` is the relay's, for regions that name none; `now` gives UTC; `told` is
    called with namespace, name and status of each region that was looked at, None for one that has gone.
    """

    cluster: Cluster
    prober: Prober
    resolver: Resolver
    maker: Maker
    image: str
    now: Callable[[], datetime] = lambda: datetime.now(UTC)
    told: Callable[[str, str, Status | None], None] = lambda *_: None
    reach: Reach = reach

    async def reconcile(self, namespace: str, name: str) -> float | None:
        """Bring one region closer to its spec.

        Returns the seconds until the next look, None if there is nothing to look at.  Raises `ApiError` when the API
        server fails; the caller repeats the pass with growing delays.
        """
        resource = await self.cluster.get(names.KIND, namespace, name)
        if resource is None or resource["metadata"].get("deletionTimestamp"):
            self.told(namespace, name, None)
            return None  # the garbage collector takes the children
        try:
            region = parse(resource)
        except InvalidSpec as error:
            generation = resource["metadata"].get("generation", 0)
            await self._write(resource, rejected(error.problems, generation, _status(resource), self.now()))
            return RESYNC
        new = await self._pass(region, _status(resource))
        await self._write(resource, new)
        return self._next_look(new)

    async def _pass(self, region: Region, previous: Mapping[str, Any]) -> Status:
        seen = await look(self.cluster, region, self.resolver)
        if any(kind not in INDEPENDENT for kind, _ in seen.foreign):
            return blocked(seen.foreign.values(), region.generation, previous, self.now())
        draft = prepare(region, seen, self.now(), self.maker)
        replies = await answers(self.prober, draft.targets)
        planned = plan(draft, replies, self.now())
        nodes = health(planned, seen, replies, self.now())
        derpmap = publish(region, planned.published, [item.candidate for item in nodes])
        count = replicas(region, seen, previous.get("map") or {}, self.now())
        manifests = children(region, self._inputs(region, seen, planned, derpmap, count))
        refused: Sequence[Finding] = [*seen.foreign.values()]
        if region.paused:
            waiting = pending(region, manifests, seen.live, _kept(region, seen)) if _writable(planned) else ()
            refused = [*refused, *paused(waiting)]
        elif _writable(planned):
            applied = await self._change(region, seen, manifests)
            refused = list(applied.refused.values())
            if ("Secret", names.keys_secret(region.name)) not in applied.live:
                return blocked(refused, region.generation, previous, self.now())  # the rest relies on keys that are not
            seen = replace(seen, live={**seen.live, **applied.live})  # the status is about what stands now
        stands = published_map(region, seen)
        leaving = departures(region, seen, nodes)
        if leaving.now:
            leaving = departures(region, seen, nodes, await self._unreached(region, seen, nodes, stands))
        if _writable(planned):
            refused = [*refused, *await self._evict(region, leaving.now)]
        found = findings(region, planned, seen, nodes, stands, refused, leaving.findings)
        return status(region, seen, nodes, planned, stands, found, previous, self.now())

    def _inputs(self, region: Region, seen: Seen, planned: Plan, derpmap: DERPMap | None, count: int) -> Inputs:
        since = pinned_since(planned.published, nodes_of(region, derpmap), seen.pinned_since(region), self.now())
        return Inputs(self.image, planned.members, planned.keys, planned.settings, derpmap, count, since)

    async def _change(self, region: Region, seen: Seen, manifests: Sequence[Object]) -> Applied:
        applied = await apply(self.cluster, region, manifests, seen.live, seen.foreign)
        if applied.whole:
            await prune(self.cluster, region, [*map(identity, manifests), *_kept(region, seen)], seen.live)
            await self._touch(region, seen, config_hash(manifests, region, seen.given))
        return applied

    async def _unreached(
        self, region: Region, seen: Seen, nodes: Sequence[Health], derpmap: DERPMap | None
    ) -> set[str]:
        """The new pods to which no way leads yet from outside: balancers take their time to find them.

        Only if some other node is reached: the operator's place in the network may be one from where none is.
        """
        entries = nodes_of(region, derpmap)
        asked = [item.node for item in nodes if item.node.name in entries and item.ready]
        fresh = {node.pod for node in asked if is_fresh(seen.pods[node.pod], self.now())}
        if not fresh:
            return set()
        reached = await asyncio.gather(*(self.reach(entries[node.name]) for node in asked))
        missed = fresh - {node.pod for node, found in zip(asked, reached, strict=True) if found}
        return missed if any(reached) else set()

    async def _evict(self, region: Region, pods: Iterable[Object]) -> list[Finding]:
        """Ask for the pods to go; returns what the API server has against it."""
        found = []
        for pod in pods:
            meta = pod["metadata"]
            try:
                await self.cluster.evict(region.namespace, meta["name"], meta["uid"], meta["resourceVersion"])
            except ApiError as error:
                found += refusal(meta["name"], error)
            else:
                log.info("%s/%s: pod %s goes: its template is older", region.namespace, region.name, meta["name"])
        return found

    async def _touch(self, region: Region, seen: Seen, digest: str) -> None:
        """Write the hash of keys and settings to the pods: the kubelet then refreshes their volumes at once."""
        stale = [
            pod
            for pod, item in sorted(seen.pods.items())
            if item["metadata"].get("annotations", {}).get(names.CONFIG_HASH) != digest
            and not item["metadata"].get("deletionTimestamp")
        ]
        since = timestamp(self.now())
        patch = {"metadata": {"annotations": {names.CONFIG_HASH: digest, names.CONFIG_SINCE: since}}}
        await asyncio.gather(*(self._touch_one(region, pod, patch) for pod in stale))

    async def _touch_one(self, region: Region, pod: str, patch: Object) -> None:
        try:
            await self.cluster.merge("Pod", region.namespace, pod, patch)
        except ApiError as error:
            if error.status in REFUSALS:  # a rule of the cluster; the kubelet refreshes within a minute or so anyway
                log.warning("%s/%s: pod %s is not told of new files: %s", region.namespace, region.name, pod, error)
            elif error.status != 404:  # it has just gone
                raise

    async def _write(self, resource: Object, new: Status) -> None:
        """Write the status if it differs, then tell the transitions.  The status is the record of what was told."""
        old, meta = _status(resource), resource["metadata"]
        self.told(meta["namespace"], meta["name"], new)
        if new == old:
            return
        manifest = {
            "apiVersion": resource["apiVersion"],
            "kind": resource["kind"],
            "metadata": {"name": meta["name"], "namespace": meta["namespace"], "uid": meta["uid"]},
            "status": new,
        }
        await self.cluster.apply(manifest, "status")
        for kind, reason, message in events.transitions(old, new):
            log.info("%s/%s: %s: %s", meta["namespace"], meta["name"], reason, message)
            try:
                await self.cluster.create(events.event(resource, kind, reason, message, self.now()))
            except ApiError as error:
                log.warning("%s/%s: Event %s not recorded: %s", meta["namespace"], meta["name"], reason, error)

    def _next_look(self, new: Status) -> float:
        """Relays answer and mesh without any event, so look often while that is to be expected, and seldom after."""
        conditions = {item["type"]: item for item in new["conditions"]}
        ready = conditions[READY]
        if ready["status"] == "True":
            rotation = new.get("rotation") or {}
            due = (datetime.fromisoformat(rotation[name]) for name in ("renewAt", "retireAt") if name in rotation)
            return min([RESYNC, *(left for when in due if (left := (when - self.now()).total_seconds()) > 0)])
        since = (self.now() - datetime.fromisoformat(ready["lastTransitionTime"])).total_seconds()
        return SOON if conditions["Progressing"]["status"] == "True" and since < _PATIENCE else LATER


def _kept(region: Region, seen: Seen) -> list[Identity]:
    """What stays though it is not rendered now: maps until there are newer ones, and with HostPort the Services of pods
    of before, which clients reach no other way.
    """
    hosted = region.exposure.type == "HostPort"
    services = [("Service", name) for name, pod in seen.pods.items() if hosted and not host_ports(pod)]
    return [*map_identities(region), *services]


def _writable(planned: Plan) -> bool:
    """Without a whole Secret there is nothing to apply that would not make things worse."""
    return not any(problem.lost and problem.pod is None for problem in planned.ring.problems)


def _status(resource: Mapping[str, Any]) -> Status:
    return dict(resource.get("status") or {})


__all__ = ["Finding", "Reconciler"]
