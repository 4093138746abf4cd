"""The region's status: what the relays and the cluster say, in the words of `conditions`.  Pure."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Final

from derper.derpmap import DERPMap, DERPNode

from . import conditions, merge, names
from .apply import Identity
from .conditions import Finding, noted_time, timestamp
from .layout import region_id
from .observe import Seen, is_ready
from .plan import Node, Plan
from .probe import Answer
from .publish import Candidate, identity, nodes_of
from .spec import Region

YOUNG: Final = timedelta(seconds=60)
"""How long a new pod may take before others stop waiting for it."""

READING: Final = timedelta(seconds=15)
"""How long a relay may take to read new files before others stop waiting for it."""

Status = dict[str, Any]
_BAD_WAITS: Final = frozenset(
    {"ErrImagePull", "ImagePullBackOff", "InvalidImageName", "CrashLoopBackOff", "CreateContainerConfigError",
     "CreateContainerError", "RunContainerError", "ErrImageNeverPull"}
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Health:
    """One wanted node as it is: its links to the other nodes, and why it is not fine (None: it is).

    `settings` is the hash of those that it runs with, empty if not known; `clients` are those connected.  `shown`: it
    has the certificate of its entry in the map.  `told`: it has been told of new files a moment ago.
    """

    node: Node
    links: int
    peers: int
    ready: bool
    young: bool
    finding: Finding | None
    settings: str
    clients: int
    shown: bool = False
    told: bool = False

    @property
    def candidate(self) -> Candidate:
        fine = self.finding is None and self.node.entry is not None and self.shown
        return Candidate(
            self.node.name,
            self.node.entry,
            answers=fine,
            arriving=not fine and self.young,
            shows=self.shown,
            late=not self.shown and self.ready and self.told,
            away=not self.ready,
        )


def health(plan: Plan, seen: Seen, answers: Mapping[str, Answer], now: datetime) -> list[Health]:
    """Judge every wanted node.  One that does not answer at all is its own fault, not a missing link of the others."""
    alive = [node.pod for node in plan.nodes if node.pod in answers and not answers[node.pod].faults]
    return [_health(node, plan, seen, answers, alive, now) for node in plan.nodes]


def _health(
    node: Node, plan: Plan, seen: Seen, answers: Mapping[str, Answer], alive: Sequence[str], now: datetime
) -> Health:
    pod = seen.pods.get(node.pod)
    answer = answers.get(node.pod)
    others = [peer.pod for peer in plan.nodes if peer.pod != node.pod]
    linked = [peer for peer in others if answer and answer.mesh.get(peer) and _links(answers, peer, node.pod)]
    young = pod is not None and now - _created(pod) < YOUNG
    worked = node.name in plan.published and not young
    missing = [peer for peer in alive if peer != node.pod and peer not in linked]
    return Health(
        node=node,
        links=len(linked),
        peers=len(others),
        ready=pod is not None and is_ready(pod),
        young=young,
        finding=_finding(node, pod, answer, missing, degraded=worked),
        settings=answer.settings if answer else "",
        clients=answer.clients if answer else 0,
        shown=answer is not None and _shows(answer, node),
        told=pod is not None and _told(pod, now),
    )


def _shows(answer: Answer, node: Node) -> bool:
    """Whether a relay has shown the certificate of its entry in the map; one of an authority is no matter of pins."""
    host = node.host
    return host is not None and host.name in answer.shown and host.pin in ("", answer.shown[host.name])


def _told(pod: Mapping[str, Any], now: datetime) -> bool:
    since = noted_time(pod, names.CONFIG_SINCE)
    return since is not None and now - since < READING


def _finding(
    node: Node, pod: Mapping[str, Any] | None, answer: Answer | None, missing: Sequence[str], *, degraded: bool
) -> Finding | None:
    if pod is None:
        owner = node.pod.rpartition("-")[0]
        text = f"Pod {node.pod} is not there (if it does not come, see the Events of StatefulSet {owner})."
        return Finding(conditions.PODS_PENDING, text, degraded=degraded)
    waiting = _waiting(pod)
    if waiting:
        return Finding(conditions.PODS_PENDING, f"Pod {node.pod} does not run: {waiting}.", degraded=degraded)
    if not is_ready(pod):
        why = (
            "; ".join(reason.rstrip(".") for reason in answer.reasons)
            if answer and answer.reasons
            else "starting or stopping"
        )
        return Finding(conditions.NODES_NOT_READY, f"Node {node.pod} is not ready: {why}.", degraded=degraded)
    if answer is None:
        return Finding(conditions.NODES_NOT_READY, f"Node {node.pod} was not asked yet.", degraded=degraded)
    if answer.faults:
        return Finding(conditions.NODE_UNREACHABLE, f"Node {node.pod}: {'; '.join(answer.faults)}.", degraded=degraded)
    if missing:
        text = f"Node {node.pod} has no mesh link with {', '.join(missing)}."
        return Finding(conditions.MESH_INCOMPLETE, text, degraded=degraded)
    return None


def _waiting(pod: Mapping[str, Any]) -> str | None:
    """Why a pod does not run, if the cluster says so."""
    status = pod.get("status", {})
    for condition in status.get("conditions", ()):
        if condition["type"] == "PodScheduled" and condition["status"] == "False":
            return f"{condition.get('reason', 'Unschedulable')}: {_line(condition.get('message', 'no node takes it'))}"
    for container in status.get("containerStatuses", ()):
        waiting = container.get("state", {}).get("waiting") or {}
        if waiting.get("reason") == "CrashLoopBackOff":
            return f"it ends again and again, {_end(container)}"
        if waiting.get("reason") in _BAD_WAITS:
            return f"{waiting['reason']}: {_line(waiting.get('message', 'see kubectl describe pod'))}"
    return None


def _end(container: Mapping[str, Any]) -> str:
    """How a container ended; not the kubelet's own words, which change with every try."""
    last = container.get("lastState", {}).get("terminated") or {}
    words = _line(last.get("message") or last.get("reason") or "see kubectl logs")
    return f"last with status {last.get('exitCode', '?')}: {words}"


def _line(text: str) -> str:
    """The last line of a text, without its full stop: that is where programs say what is wrong."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1].rstrip(".")[:300] if lines else "no message"


def _links(answers: Mapping[str, Answer], peer: str, pod: str) -> bool:
    """Packets go both ways only if both dial each other."""
    return peer in answers and bool(answers[peer].mesh.get(pod))


def is_fresh(pod: Mapping[str, Any], now: datetime) -> bool:
    """Whether a pod became ready, by its kubelet's clock, so lately that balancers may not have found it yet."""
    found = (item for item in pod.get("status", {}).get("conditions", ()) if item["type"] == "Ready")
    since = next((item.get("lastTransitionTime") for item in found), None)
    return abs(now - (datetime.fromisoformat(since) if since else _created(pod))) < YOUNG


def _created(pod: Mapping[str, Any]) -> datetime:
    return datetime.fromisoformat(pod["metadata"]["creationTimestamp"])


def findings(
    region: Region,
    plan: Plan,
    seen: Seen,
    nodes: Iterable[Health],
    derpmap: DERPMap | None,
    refused: Iterable[Finding] = (),
    going: Iterable[Finding] = (),
) -> list[Finding]:
    """All that keeps the region from being as wanted, the most important first.

    `refused` is what the API server did not let the operator write, `going` what is said of pods that go.
    """
    judged = list(nodes)
    merging = merge.findings(region, seen.merged) if derpmap else []
    found = [*refused, *plan.findings, *(item.finding for item in judged if item.finding), *merging]
    found.sort(key=lambda finding: (not finding.blocked, not finding.degraded))
    inside = nodes_of(region, derpmap)
    outside = [item.node.pod for item in judged if item.node.name not in inside]
    former = [item.node.pod for item in judged if item.node.name in inside and _is_former(inside[item.node.name], item)]
    if former and not found:
        text = f"The DERP map will follow when these relays serve their new certificates: {', '.join(former)}."
        found.append(Finding(conditions.MAP_PENDING, text))
    if outside and not found:
        waits = f"Node {', '.join(outside)} will enter the DERP map" if inside else "The DERP map will be published"
        found.append(Finding(conditions.MAP_PENDING, f"{waits} at the next look."))
    leftover = [pod for pod in plan.members if pod not in region.pods]
    if leftover:
        found.append(Finding(conditions.SCALING_DOWN, _leaving(region, seen, leftover)))
    notes = _expiring(region, judged, plan.relays.now)
    return [*found, *_outdated(region, seen, judged), *going, *notes]


def _leaving(region: Region, seen: Seen, pods: Sequence[str]) -> str:
    owner = seen.live.get(("StatefulSet", region.name))
    if owner and owner["spec"]["replicas"] > region.replicas:
        return f"Pods that left the DERP map stop when it has spread (spec.map.spread): {', '.join(pods)}."
    return f"Pods that left the region stop: {', '.join(pods)}."


def behind(region: Region, seen: Seen, nodes: Iterable[Health]) -> list[str]:
    """The pods that run with older settings than those that stand."""
    text = (seen.data("ConfigMap", names.settings_map(region.name)) or {}).get(names.SETTINGS_FILE, b"")
    current = hashlib.sha256(text).hexdigest()
    return [item.node.pod for item in nodes if item.settings not in ("", current)]


def _is_former(published: DERPNode, item: Health) -> bool:
    wanted = item.node.entry
    return wanted is not None and identity(published) != identity(wanted)


def _expiring(region: Region, nodes: Iterable[Health], now: datetime) -> list[Finding]:
    """Certificates for clients that should have been renewed by now: half of the time for that is over."""
    own = region.tls.host_name != "Template"
    ends: dict[datetime, list[str]] = {}
    for host, pod in ((item.node.host, item.node.pod) for item in nodes):
        if host is None:
            continue
        margin = region.tls.renew_before / 2 if own else (host.not_after - host.not_before) / 6
        if host.not_after - now < margin:
            ends.setdefault(host.not_after, []).append(pod)
    advice = "what is in the way of a new one is said besides" if own else "renew it in its Secret, which is read again"
    return [
        Finding(
            conditions.CERTIFICATE_EXPIRING,
            f"The certificate of {', '.join(pods)} expires on {timestamp(end)}: {advice}.",
            degraded=True,
            note=True,
        )
        for end, pods in sorted(ends.items())
    ]


def _outdated(region: Region, seen: Seen, nodes: Iterable[Health]) -> list[Finding]:
    """Who may connect, and how fast, is as the spec says only when the relays have read it."""
    late = behind(region, seen, nodes)
    if not late:
        return []
    message = f"Relays run with older settings: {', '.join(late)} (if this stays, their log says why)."
    return [Finding(conditions.SETTINGS_PENDING, message)]


def status(
    region: Region,
    seen: Seen,
    nodes: Sequence[Health],
    plan: Plan,
    derpmap: DERPMap | None,
    found: Iterable[Finding],
    previous: Mapping[str, Any],
    now: datetime,
) -> Status:
    """The whole status; equal to `previous` if nothing changed."""
    inside = nodes_of(region, derpmap)
    result: Status = {
        "observedGeneration": region.generation,
        "replicas": len(seen.pods),
        "readyReplicas": sum(item.ready for item in nodes),
        "selector": names.label_selector(names.selector(region.name)),
        "inMap": f"{len(inside)}/{region.replicas}",
        "nodes": [_node_status(region, item, inside) for item in nodes],
        "conditions": conditions.conditions(found, region.generation, previous.get("conditions", ()), now),
    }
    expiries = [item.node.host.not_after for item in nodes if item.node.host]
    if expiries:
        result["certNotAfter"] = timestamp(min(expiries))
    rotation = _rotation(region, plan, derpmap, previous.get("rotation") or {})
    if rotation:
        result["rotation"] = rotation
    if derpmap:
        result["map"] = _map_status(region, seen, derpmap, previous.get("map") or {}, now)
    return result


def rejected(problems: Iterable[str], generation: int, previous: Mapping[str, Any], now: datetime) -> Status:
    """The status of a region whose spec cannot be carried out: all else stays as it was."""
    found = [Finding(conditions.INVALID_SPEC, problem, blocked=True) for problem in problems]
    return blocked(found, generation, previous, now)


def paused(waiting: Sequence[Identity]) -> list[Finding]:
    """That nothing is written, and what would be."""
    text = "The region is paused: the operator changes nothing of it until spec.paused is removed."
    if not waiting:
        return [Finding(conditions.PAUSED, f"{text} Nothing waits.", blocked=True, note=True)]
    return [Finding(conditions.PAUSED, f"{text} Waiting: {', '.join(map(' '.join, waiting))}.", blocked=True)]


def blocked(found: Iterable[Finding], generation: int, previous: Mapping[str, Any], now: datetime) -> Status:
    """The status of a region of which nothing could be carried out."""
    return dict(previous) | {
        "observedGeneration": generation,
        "conditions": conditions.conditions(found, generation, previous.get("conditions", ()), now),
    }


def _node_status(region: Region, item: Health, inside: Mapping[str, Any]) -> dict[str, Any]:
    node = item.node
    result: dict[str, Any] = {
        "name": node.name,
        "pod": node.pod,
        "regionID": region_id(region, region.map.forms[0], int(node.pod.rpartition("-")[2])),
        "ready": item.ready and item.finding is None,
        "mesh": f"{item.links}/{item.peers}",
        "inMap": node.name in inside,
    }
    shown = inside.get(node.name) or node.entry
    if shown:
        result |= {
            "hostName": shown.host_name,
            "certName": shown.cert_name,
            "ipv4": shown.ipv4,
            "ipv6": shown.ipv6,
            "derpPort": shown.derp_port,
            "stunPort": shown.stun_port,
        }
    if node.host:
        result["certNotAfter"] = timestamp(node.host.not_after)
    if item.finding:
        result["message"] = item.finding.message
    return result


def _rotation(region: Region, plan: Plan, derpmap: DERPMap | None, previous: Mapping[str, Any]) -> dict[str, Any]:
    """What has been rotated to the end, and when what comes next is due."""
    inside = nodes_of(region, derpmap)
    wanted = {node.name: node.entry for node in plan.nodes if node.entry and node.name in inside}
    spread = all(identity(inside[name]) == identity(entry) for name, entry in wanted.items())
    found = {
        "certificates": (plan.rotated.certificates if spread else "") or previous.get("certificates"),
        "meshKey": plan.rotated.mesh or previous.get("meshKey"),
    }
    ends = [keys.newest.not_after for keys in plan.ring.nodes.values()]
    if ends:
        found["renewAt"] = timestamp(min(ends) - region.tls.renew_before)
    if plan.turn.retire_at:
        found["retireAt"] = timestamp(plan.turn.retire_at)
    return {name: value for name, value in found.items() if value}


def _map_status(
    region: Region, seen: Seen, derpmap: DERPMap, previous: Mapping[str, Any], now: datetime
) -> dict[str, Any]:
    digest = map_hash(derpmap)
    known = previous.get("hash") == digest and previous.get("publishedAt")
    result: dict[str, Any] = {
        "configMap": names.derp_map(region.name),
        "hash": digest,
        "publishedAt": known or timestamp(now),
    }
    consumers = [_consumer_status(region, seen, form.consumer) for form in region.map.forms if form.consumer]
    merged = [name for name, item in seen.merged.items() if merge.holds(item, region)]
    return result | ({"consumers": consumers} if consumers else {}) | ({"mergedInto": merged} if merged else {})


def map_hash(derpmap: DERPMap) -> str:
    return hashlib.sha256(derpmap.to_json().encode()).hexdigest()


def _consumer_status(region: Region, seen: Seen, consumer: str) -> dict[str, str]:
    name = names.derp_map(region.name, consumer)
    text = (seen.data("ConfigMap", name) or {}).get(names.MAP_JSON, b"")
    return {"name": consumer, "configMap": name, "hash": hashlib.sha256(text).hexdigest() if text else ""}
