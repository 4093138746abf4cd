"""Conditions and their reasons: the words in which a region explains itself.  docs/operations lists them for users."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

READY: Final = "Ready"
"""True: every node answers, the published map is the wanted one, nothing is left over."""
PROGRESSING: Final = "Progressing"
"""True: the operator is on its way to what the spec wants and waits for nothing but the cluster."""
DEGRADED: Final = "Degraded"
"""True: something that worked, or that the user promised, is broken."""
STALLED: Final = "Stalled"
"""Present and True (kstatus): nothing more happens until a human changes something."""

# Ready=True, Progressing=False, Degraded=False
ALL_NODES_READY: Final = "AllNodesReady"
COMPLETE: Final = "Complete"
AS_EXPECTED: Final = "AsExpected"
PAUSED: Final = "Paused"
BLOCKED: Final = "Blocked"

# What must be changed by hand
INVALID_SPEC: Final = "InvalidSpec"
NAME_TAKEN: Final = "NameTaken"
CHILD_REFUSED: Final = "ChildRefused"
KEYS_LOST: Final = "KeysLost"
KEYS_DAMAGED: Final = "KeysDamaged"
SECRET_NOT_FOUND: Final = "SecretNotFound"
CONFIG_MAP_NOT_FOUND: Final = "ConfigMapNotFound"
CERTIFICATE_INVALID: Final = "CertificateInvalid"
ADDRESS_UNUSABLE: Final = "AddressUnusable"
REGION_ID_TAKEN: Final = "RegionIDTaken"

# What comes with time
ADDRESS_PENDING: Final = "AddressPending"
PODS_PENDING: Final = "PodsPending"
NODES_NOT_READY: Final = "NodesNotReady"
NODE_UNREACHABLE: Final = "NodeUnreachable"
MESH_INCOMPLETE: Final = "MeshIncomplete"
SETTINGS_PENDING: Final = "SettingsPending"
ROTATING_CERTIFICATES: Final = "RotatingCertificates"
ROTATING_MESH_KEY: Final = "RotatingMeshKey"
CERTIFICATE_EXPIRING: Final = "CertificateExpiring"
MAP_PENDING: Final = "MapPending"
SCALING_DOWN: Final = "ScalingDown"
ROLLING_OUT: Final = "RollingOut"

_MAX_MESSAGE: Final = 1024


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that keeps the region from being as wanted.

    `blocked`: only a human can solve it.  `degraded`: something is broken rather than not there yet.  `note`: the
    region is as wanted all the same, and people should know.
    """

    reason: str
    message: str
    blocked: bool = False
    degraded: bool = False
    note: bool = False


def conditions(
    findings: Iterable[Finding], generation: int, previous: Iterable[Mapping[str, Any]], now: datetime
) -> list[dict[str, Any]]:
    """The conditions that `findings` amount to, the most important finding first.

    `previous` are the conditions in the status: the time of a transition changes only with the condition's status.
    """
    told = list(findings)
    found = [finding for finding in told if not finding.note]
    working = [finding for finding in found if not finding.blocked]
    broken = [finding for finding in told if finding.degraded]
    wanted = [
        _condition(READY, not found, told, ALL_NODES_READY, "All nodes answer and the DERP map is published."),
        _condition(
            PROGRESSING,
            bool(working),
            working,
            BLOCKED if found else COMPLETE,
            "Waiting for a change by hand, see Ready." if found else "The region is as its spec wants it.",
        ),
        _condition(DEGRADED, bool(broken), broken, AS_EXPECTED, "Nothing is broken."),
    ]
    if found and not working:
        wanted.append(_condition(STALLED, True, found, "", ""))
    times = {item["type"]: (item["status"], item.get("lastTransitionTime")) for item in previous}
    for condition in wanted:
        status, since = times.get(condition["type"], ("", None))
        condition["observedGeneration"] = generation
        condition["lastTransitionTime"] = since if since and status == condition["status"] else timestamp(now)
    return wanted


def _condition(kind: str, true: bool, found: list[Finding], reason: str, message: str) -> dict[str, Any]:
    if found:
        reason = found[0].reason
        message = " ".join(dict.fromkeys(finding.message for finding in found))
    if len(message) > _MAX_MESSAGE:
        message = message[: _MAX_MESSAGE - 2] + " …"
    return {"type": kind, "status": "True" if true else "False", "reason": reason, "message": message}


def timestamp(when: datetime) -> str:
    """RFC 3339 in whole seconds, as Kubernetes writes times.  `when` must be in UTC."""
    return when.strftime("%Y-%m-%dT%H:%M:%SZ")


def noted_time(item: Mapping[str, Any] | None, annotation: str) -> datetime | None:
    """The time that an annotation of an object says, None if it says none: people may edit it."""
    text = ((item or {}).get("metadata", {}).get("annotations") or {}).get(annotation, "")
    try:
        found = datetime.fromisoformat(text)
    except ValueError:
        return None
    return found if found.tzinfo else None
