"""All children of a region, in the order in which they are applied."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from derper.derpmap import DERPMap

from .. import names
from ..spec import Region
from .config import SettingsNode, derp_maps, keys_secret, settings_map
from .override import patched
from .policy import disruption_budget, network_policy, service_account
from .services import mesh_service, pod_service
from .statefulset import stateful_set

Data = Mapping[str, bytes] | None
"""The data of a Secret or ConfigMap; None if there is no such object."""


@dataclass(frozen=True, slots=True)
class Inputs:
    """What the children depend on besides the spec.

    `members` are the pods of the mesh: the wanted ones, and those that still run.  `derpmap` is None until the first
    map may be published; `pinned_since` is when its pins were.  `replicas` is how many pods are to run now: leaving
    ones keep running for a while.
    """

    image: str
    members: Sequence[str]
    keys: Mapping[str, bytes]
    settings: Mapping[str, SettingsNode]
    derpmap: DERPMap | None
    replicas: int
    pinned_since: datetime | None = None


def identities(region: Region, members: Sequence[str]) -> list[tuple[str, str]]:
    """Kind and name of every child that the region has sooner or later."""
    pods = () if region.exposure.type == "HostPort" else members
    return [
        ("ServiceAccount", region.name),
        ("NetworkPolicy", region.name),
        ("PodDisruptionBudget", region.name),
        ("Secret", names.keys_secret(region.name)),
        ("ConfigMap", names.settings_map(region.name)),
        ("Service", names.mesh_service(region.name)),
        *(("Service", pod) for pod in pods),
        *map_identities(region),
        ("StatefulSet", region.name),
    ]


def map_identities(region: Region) -> list[tuple[str, str]]:
    """Kind and name of the ConfigMaps that hold the DERP map."""
    return [("ConfigMap", names.derp_map(region.name, form.consumer)) for form in region.map.forms]


def children(region: Region, inputs: Inputs) -> list[dict[str, Any]]:
    """The order carries both directions of scaling: keys, settings and Services stand before a new pod starts, and a
    node leaves the DERP map before the StatefulSet stops its pod.
    """
    return [
        service_account(region),
        network_policy(region),
        disruption_budget(region),
        keys_secret(region, inputs.keys),
        settings_map(region, inputs.settings),
        mesh_service(region),
        *_pod_services(region, inputs.members),
        *(derp_maps(region, inputs.derpmap, inputs.pinned_since) if inputs.derpmap else []),
        patched(stateful_set(region, inputs.image, inputs.replicas), region.override.stateful_set),
    ]


def _pod_services(region: Region, members: Sequence[str]) -> list[dict[str, Any]]:
    if region.exposure.type == "HostPort":
        return []
    return [patched(pod_service(region, pod), region.override.service) for pod in members]


def config_hash(manifests: Sequence[Mapping[str, Any]], region: Region, given: Sequence[Data]) -> str:
    """Changes with the files that pods re-read; written to the pods, it makes the kubelet refresh them at once.

    `given` is what the user provides besides: it may come later than the pods.
    """
    wanted = {("Secret", names.keys_secret(region.name)), ("ConfigMap", names.settings_map(region.name))}
    digest = hashlib.sha256()
    for item in manifests:
        if (item["kind"], item["metadata"]["name"]) in wanted:
            digest.update(json.dumps(item["data"], sort_keys=True).encode())
    for data in given:
        digest.update(repr(sorted(data.items()) if data is not None else None).encode())
    return digest.hexdigest()[:16]
