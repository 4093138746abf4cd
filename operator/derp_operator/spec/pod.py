"""`spec.pod`: what the user adds to the pod template."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


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
    )
