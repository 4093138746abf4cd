"""A region as its owner wants it: the parts of the spec together."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from .. import names
from . import (
    clients,
    derpmap,
    exposure,
    limits,
    mesh,
    nodes,
    override,
    pod,
    rebalance,
    tls,
)
from .clients import Clients
from .derpmap import MapOptions
from .errors import InvalidSpec
from .exposure import Exposure
from .limits import Limits
from .mesh import Mesh
from .nodes import NodeOptions
from .override import Override
from .pod import PodOptions
from .rebalance import Rebalance
from .tls import Tls

MIN_REPLICAS: Final = 3
MAX_REPLICAS: Final = 64
MAX_NAME: Final = 40
_DNS_LABEL: Final = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")


@dataclass(frozen=True, slots=True)
class Region:
    """One region as its owner wants it."""

    name: str
    namespace: str
    uid: str
    generation: int
    region_id: int
    code: str
    title: str
    replicas: int
    clients: Clients
    paused: bool = False
    image: str | None = None
    image_pull_policy: str | None = None
    image_pull_secrets: tuple[str, ...] = ()
    exposure: Exposure = field(default_factory=Exposure)
    tls: Tls = field(default_factory=Tls)
    mesh: Mesh = field(default_factory=Mesh)
    limits: Limits = field(default_factory=Limits)
    rebalance: Rebalance = field(default_factory=Rebalance)
    map: MapOptions = field(default_factory=MapOptions)
    pod: PodOptions = field(default_factory=PodOptions)
    nodes: Mapping[int, NodeOptions] = field(default_factory=dict)
    override: Override = field(default_factory=Override)

    @property
    def pods(self) -> tuple[str, ...]:
        """The names of the wanted pods, by ordinal."""
        return tuple(names.pod_name(self.name, ordinal) for ordinal in range(self.replicas))

    @property
    def first_id(self) -> int:
        """The region id of ordinal 0 where each node has a region of its own; the others follow."""
        return self.map.first_region_id or self.region_id

    def host_name(self, pod: str) -> str:
        """The name that `nodes` or `tls.hostNameTemplate` gives to a pod.  Only for mode Template."""
        return self.node(pod).host_name or tls.expand(self.tls.template or "", self.variables(pod))

    def node(self, pod: str) -> NodeOptions:
        """What a pod has of its own."""
        return self.nodes.get(int(pod.rpartition("-")[2]), NodeOptions())

    def node_ports(self, pod: str) -> dict[str, int | None]:
        """The node ports of a pod's Service, "derp" and "stun"; None where the API server chooses."""
        own, ordinal = self.node(pod), int(pod.rpartition("-")[2])
        bases = self.exposure.derp_port_base, self.exposure.stun_port_base
        counted = (None if base is None else base + ordinal for base in bases)
        return dict(zip(("derp", "stun"), map(_first, (own.derp_node_port, own.stun_node_port), counted), strict=True))

    def variables(self, pod: str) -> dict[str, str]:
        """What templates may name about a pod."""
        ordinal = pod.rpartition("-")[2]
        return {"pod": pod, "ordinal": ordinal, "region": self.name, "namespace": self.namespace}


def parse(resource: Mapping[str, Any]) -> Region:
    """Read a DerpRegion as the API server returns it.  Raises `InvalidSpec`."""
    meta, spec = resource["metadata"], resource.get("spec") or {}
    problems: list[str] = []
    name = str(meta["name"])
    region = Region(
        name=name,
        namespace=str(meta["namespace"]),
        uid=str(meta["uid"]),
        generation=int(meta.get("generation", 0)),
        region_id=int(spec.get("regionID", 0)),
        code=str(spec.get("regionCode") or name),
        title=str(spec.get("regionName") or spec.get("regionCode") or name),
        replicas=int(spec.get("replicas", MIN_REPLICAS)),
        clients=clients.parse(spec.get("clients") or {}),
        paused=bool(spec.get("paused", False)),
        image=spec.get("image"),
        image_pull_policy=spec.get("imagePullPolicy"),
        image_pull_secrets=tuple(item["name"] for item in spec.get("imagePullSecrets") or ()),
        exposure=exposure.parse(spec.get("exposure") or {}, problems),
        tls=tls.parse(spec.get("tls") or {}, problems),
        mesh=mesh.parse(spec.get("mesh") or {}),
        limits=limits.parse(spec.get("limits") or {}),
        rebalance=rebalance.parse(spec.get("rebalance") or {}),
        map=derpmap.parse(spec.get("map") or {}, problems),
        pod=pod.parse(spec.get("pod") or {}),
        nodes=nodes.parse(spec.get("nodes") or ()),
        override=override.parse(spec.get("override") or {}),
    )
    for rule in _RULES:
        problems.extend(rule(region))
    if problems:
        raise InvalidSpec(problems)
    return region


def _first(own: int | None, common: int | None) -> int | None:
    return common if own is None else own


def _check_name(region: Region) -> list[str]:
    if len(region.name) <= MAX_NAME and _DNS_LABEL.fullmatch(region.name):
        return []
    return [
        f"metadata.name is {region.name!r}: a region's name is at most {MAX_NAME} lower-case letters, digits and '-', "
        "and starts with a letter; create the region under another name."
    ]


def _check_numbers(region: Region) -> list[str]:
    found = []
    if not 900 <= region.region_id <= 999:
        found.append(f"spec.regionID is {region.region_id}: regions of your own have ids from 900 to 999.")
    if not MIN_REPLICAS <= region.replicas <= MAX_REPLICAS:
        found.append(f"spec.replicas is {region.replicas}: a region has {MIN_REPLICAS} to {MAX_REPLICAS} relays.")
    return found


_RULES: Final[tuple[Callable[[Region], list[str]], ...]] = (
    _check_name,
    _check_numbers,
    exposure.check,
    tls.check,
    clients.check,
    derpmap.check,
    nodes.check,
    pod.check,
    override.check,
)
