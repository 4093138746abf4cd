"""Events for `kubectl describe`: one for each transition that the status shows, none for what stays as it is."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any

from . import conditions, names
from .conditions import timestamp

_MAX_MESSAGE = 1024


def transitions(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """(type, reason, message) of every Event that the change from `old` to `new` status is worth."""
    before, after = _by_type(old), _by_type(new)
    found = []
    for kind in (conditions.READY, conditions.DEGRADED):
        was, now = before.get(kind, {}), after[kind]
        if (was.get("status"), was.get("reason")) == (now["status"], now["reason"]):
            continue
        if kind == conditions.DEGRADED and now["status"] == "False":
            if was.get("status") == "True":
                found.append(("Normal", "Recovered", "Nothing is broken any more."))
            continue
        good = kind == conditions.READY and (now["status"] == "True" or now["reason"] not in _WARNINGS)
        if kind == conditions.DEGRADED and after[conditions.READY]["reason"] == now["reason"]:
            continue  # the Event about Ready said it
        found.append(("Normal" if good else "Warning", now["reason"], now["message"]))
    return found + _map_events(old, new) + _rotation_events(old, new)


_WARNINGS = frozenset(
    {
        conditions.INVALID_SPEC,
        conditions.NAME_TAKEN,
        conditions.CHILD_REFUSED,
        conditions.KEYS_LOST,
        conditions.KEYS_DAMAGED,
        conditions.SECRET_NOT_FOUND,
        conditions.CONFIG_MAP_NOT_FOUND,
        conditions.CERTIFICATE_INVALID,
        conditions.ADDRESS_UNUSABLE,
        conditions.REGION_ID_TAKEN,
        conditions.NODE_UNREACHABLE,
    }
)


def event(region: Mapping[str, Any], kind: str, reason: str, message: str, now: datetime) -> dict[str, Any]:
    """An Event about a region, as the API wants it."""
    meta = region["metadata"]
    return {
        "apiVersion": "v1",
        "kind": "Event",
        "metadata": {"generateName": f"{meta['name']}.", "namespace": meta["namespace"]},
        "type": kind,
        "reason": reason,
        "message": message[:_MAX_MESSAGE],
        "involvedObject": {
            "apiVersion": f"{names.GROUP}/{names.VERSION}",
            "kind": names.KIND,
            "name": meta["name"],
            "namespace": meta["namespace"],
            "uid": meta["uid"],
            "resourceVersion": meta["resourceVersion"],
        },
        "source": {"component": names.MANAGER},
        "reportingComponent": names.MANAGER,
        "firstTimestamp": timestamp(now),
        "lastTimestamp": timestamp(now),
        "count": 1,
    }


def _map_events(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    was, now = old.get("map") or {}, new.get("map") or {}
    if not now or was.get("hash") == now["hash"]:
        return []
    inside = [node["pod"] for node in new.get("nodes", ()) if node["inMap"]]
    return [("Normal", "MapPublished", f"ConfigMap {now['configMap']} holds the nodes {', '.join(inside)}.")]


def _rotation_events(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    was = {node["pod"]: node.get("certName") for node in old.get("nodes", ()) if node["inMap"]}
    renewed = [
        node["pod"]
        for node in new.get("nodes", ())
        if node["inMap"] and was.get(node["pod"]) and was[node["pod"]] != node.get("certName")
    ]
    before, after = old.get("rotation") or {}, new.get("rotation") or {}
    found = []
    if renewed:
        until = f"; the ones before are served until {after['retireAt']}" if "retireAt" in after else ""
        text = f"The DERP map has new certificates of {', '.join(renewed)}{until}."
        found.append(("Normal", "CertificatesRenewed", text))
    if before and before.get("meshKey") != after.get("meshKey"):
        found.append(("Normal", "MeshKeyRotated", "All relays use the new mesh key and accept no other."))
    return found


def _by_type(status: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    return {item["type"]: item for item in status.get("conditions", ())}
