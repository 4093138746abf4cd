"""`spec.pod`: what the user adds to the pod template."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from .. import names

if TYPE_CHECKING:
    from .region import Region


@dataclass(frozen=True, slots=True)
class PodOptions:
    """What the user adds to the pod template, as Kubernetes writes it."""

    resources: Mapping[str, Any] = field(default_factory=dict)
    node_selector: Mapping[str, str] = field(default_factory=dict)
    tolerations: tuple[Mapping[str, Any], ...] = ()
    affinity: Mapping[str, Any] = field(default_factory=dict)
    workers: int | None = None  #: processes of each relay; None: as the relay does without a word
    priority_class: str | None = None
    annotations: Mapping[str, str] = field(default_factory=dict)
    labels: Mapping[str, str] = field(default_factory=dict)
    spread: tuple[Mapping[str, Any], ...] = ()
    runtime_class: str | None = None
    scheduler: str | None = None
    grace_seconds: int = 60
    env: Mapping[str, str] = field(default_factory=dict)
    service_account_annotations: Mapping[str, str] = field(default_factory=dict)


def parse(spec: Mapping[str, Any]) -> PodOptions:
    return PodOptions(
        resources=spec.get("resources") or {},
        node_selector=dict(spec.get("nodeSelector") or {}),
        tolerations=tuple(spec.get("tolerations") or ()),
        affinity=spec.get("affinity") or {},
        workers=spec.get("workers"),
        priority_class=spec.get("priorityClassName"),
        annotations=dict(spec.get("annotations") or {}),
        labels=dict(spec.get("labels") or {}),
        spread=tuple(spec.get("topologySpreadConstraints") or ()),
        runtime_class=spec.get("runtimeClassName"),
        scheduler=spec.get("schedulerName"),
        grace_seconds=int(spec.get("terminationGracePeriodSeconds", 60)),
        env={item["name"]: item["value"] for item in spec.get("env") or ()},
        service_account_annotations=dict(spec.get("serviceAccountAnnotations") or {}),
    )


def check(region: Region) -> list[str]:
    pod = region.pod
    taken = sorted(names.reserved(pod.labels) | names.reserved(pod.annotations))
    found = [f"spec.pod has {', '.join(taken)}: the operator's own; choose another key."] if taken else []
    if "POD_NAME" in pod.env:
        found.append("spec.pod.env has POD_NAME, which the operator sets: choose another name.")
    if pod.grace_seconds < 30:
        found.append(
            f"spec.pod.terminationGracePeriodSeconds is {pod.grace_seconds}: "
            "a relay needs at least 30 to move its clients."
        )
    return found
