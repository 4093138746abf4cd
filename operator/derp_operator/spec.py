"""The spec of a region as frozen values.

The CRD's schema rejects most mistakes at the API server.  `parse` repeats the rules that would break a region, for
objects that were stored under an older schema: it raises `InvalidSpec` with one sentence per mistake.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal, cast

from . import names

ExposureType = Literal["LoadBalancer", "NodePort", "HostPort", "ClusterIP"]
AddressType = Literal["Auto", "ExternalIP", "InternalIP"]
HostNameMode = Literal["Generated", "Address", "Template"]

MIN_REPLICAS: Final = 3
MAX_REPLICAS: Final = 64
MAX_NAME: Final = 40
_DNS_LABEL: Final = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
_DNS_NAME: Final = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)+")
_OPTIONS: Final[Mapping[str, str]] = {
    "LoadBalancer": "loadBalancer",
    "NodePort": "nodePort",
    "HostPort": "hostPort",
    "ClusterIP": "clusterIP",
}


class InvalidSpec(ValueError):  # noqa: N818 - it says what it is
    """The spec cannot be carried out.  `problems` are sentences for the user; nothing is retried until it changes."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__(" ".join(problems))
        self.problems = tuple(problems)


@dataclass(frozen=True, slots=True)
class Exposure:
    """How clients reach a pod.  With bases for `NodePort`, ordinal i gets base + i; else the API server chooses."""

    type: ExposureType = "LoadBalancer"
    derp_port: int = 443
    stun_port: int = 3478
    derp_port_base: int | None = None
    stun_port_base: int | None = None
    address_type: AddressType = "Auto"
    load_balancer_class: str | None = None
    annotations: Mapping[str, str] = field(default_factory=dict)
    source_ranges: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Tls:
    host_name: HostNameMode = "Generated"
    template: str | None = None
    certificates: tuple[str, ...] = ()
    pin: Literal["Auto", "Always", "Never"] = "Auto"


@dataclass(frozen=True, slots=True)
class KeySource:
    """Where the list of admitted clients stands."""

    kind: Literal["ConfigMap", "Secret"]
    name: str
    key: str


@dataclass(frozen=True, slots=True)
class Clients:
    open: bool = False
    verify_urls: tuple[str, ...] = ()
    keys_from: KeySource | None = None
    fail_open: bool = False


@dataclass(frozen=True, slots=True)
class Limits:
    """0 means no limit."""

    accept_per_second: float = 0
    accept_burst: int = 0
    client_bytes_per_second: int = 0
    client_burst_bytes: int = 0


@dataclass(frozen=True, slots=True)
class MapOptions:
    latitude: float | None = None
    longitude: float | None = None
    no_measure_no_home: bool = False


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
    image: str | None = None
    image_pull_policy: str | None = None
    image_pull_secrets: tuple[str, ...] = ()
    exposure: Exposure = field(default_factory=Exposure)
    tls: Tls = field(default_factory=Tls)
    limits: Limits = field(default_factory=Limits)
    map: MapOptions = field(default_factory=MapOptions)
    pod: PodOptions = field(default_factory=PodOptions)

    @property
    def pods(self) -> tuple[str, ...]:
        """The names of the wanted pods, by ordinal."""
        return tuple(names.pod_name(self.name, ordinal) for ordinal in range(self.replicas))

    def host_name(self, pod: str) -> str:
        """The name that `tls.hostNameTemplate` gives to a pod.  Only for mode Template."""
        ordinal = pod.rpartition("-")[2]
        values = {"pod": pod, "ordinal": ordinal, "region": self.name, "namespace": self.namespace}
        return _expand(self.tls.template or "", values)


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
        clients=_clients(spec.get("clients") or {}),
        image=spec.get("image"),
        image_pull_policy=spec.get("imagePullPolicy"),
        image_pull_secrets=tuple(item["name"] for item in spec.get("imagePullSecrets") or ()),
        exposure=_exposure(spec.get("exposure") or {}, problems),
        tls=_tls(spec.get("tls") or {}),
        limits=_limits(spec.get("limits") or {}),
        map=_map(spec.get("map") or {}),
        pod=_pod(spec.get("pod") or {}),
    )
    for rule in _RULES:
        problems.extend(rule(region))
    if problems:
        raise InvalidSpec(problems)
    return region


def _exposure(spec: Mapping[str, Any], problems: list[str]) -> Exposure:
    kind = spec.get("type", "LoadBalancer")
    if kind not in _OPTIONS:
        problems.append(f"spec.exposure.type is {kind!r}: it must be one of {', '.join(_OPTIONS)}.")
        return Exposure()
    for other, option in _OPTIONS.items():
        if other != kind and spec.get(option):
            problems.append(f"spec.exposure.{option} does not apply to type {kind}: remove it, or set type: {other}.")
    options = spec.get(_OPTIONS[kind]) or {}
    return Exposure(
        type=kind,
        derp_port=int(options.get("derpPort", 443)),
        stun_port=int(options.get("stunPort", 3478)),
        derp_port_base=options.get("derpPortBase"),
        stun_port_base=options.get("stunPortBase"),
        address_type=options.get("addressType", "Auto"),
        load_balancer_class=options.get("loadBalancerClass"),
        annotations=dict(options.get("annotations") or {}),
        source_ranges=tuple(options.get("sourceRanges") or ()),
    )


def _tls(spec: Mapping[str, Any]) -> Tls:
    return Tls(
        host_name=spec.get("hostName", "Generated"),
        template=spec.get("hostNameTemplate"),
        certificates=tuple(item["secretName"] for item in spec.get("certificates") or ()),
        pin=spec.get("pin", "Auto"),
    )


def _clients(spec: Mapping[str, Any]) -> Clients:
    source = spec.get("keysFrom") or {}
    found = None
    for kind, option in (("ConfigMap", "configMapKeyRef"), ("Secret", "secretKeyRef")):
        if option in source:
            name, key = source[option]["name"], source[option]["key"]
            found = KeySource(cast(Literal["ConfigMap", "Secret"], kind), name, key)
    return Clients(
        open=bool(spec.get("open", False)),
        verify_urls=tuple(spec.get("verifyURLs") or ()),
        keys_from=found,
        fail_open=bool(spec.get("failOpen", False)),
    )


def _limits(spec: Mapping[str, Any]) -> Limits:
    return Limits(
        accept_per_second=spec.get("acceptConnectionsPerSecond", 0),
        accept_burst=int(spec.get("acceptBurst", 0)),
        client_bytes_per_second=int(spec.get("clientBytesPerSecond", 0)),
        client_burst_bytes=int(spec.get("clientBurstBytes", 0)),
    )


def _map(spec: Mapping[str, Any]) -> MapOptions:
    return MapOptions(
        latitude=_degrees(spec.get("latitude")),
        longitude=_degrees(spec.get("longitude")),
        no_measure_no_home=bool(spec.get("noMeasureNoHome", False)),
    )


def _degrees(value: object) -> float | None:
    return float(value) if isinstance(value, int | float | str) else None


def _pod(spec: Mapping[str, Any]) -> PodOptions:
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
    bases = {"derpPortBase": region.exposure.derp_port_base, "stunPortBase": region.exposure.stun_port_base}
    for option, base in bases.items():
        if base is not None and base + region.replicas - 1 > 65535:
            found.append(f"spec.exposure.nodePort.{option} is {base}: the last relay's port would be above 65535.")
    derp, stun = bases.values()
    if derp is not None and stun is not None and abs(derp - stun) < region.replicas:
        found.append(
            f"spec.exposure.nodePort has derpPortBase {derp} and stunPortBase {stun}: a port is either TCP or UDP, "
            f"so with {region.replicas} replicas they must be at least {region.replicas} apart."
        )
    return found


def _check_tls(region: Region) -> list[str]:
    tls = region.tls
    if tls.host_name == "Template":
        if not tls.template:
            return ["spec.tls.hostNameTemplate is missing: hostName Template needs it, like '{pod}.derp.example.com'."]
        if not tls.certificates:
            return ["spec.tls.certificates is empty: hostName Template needs a Secret of type kubernetes.io/tls."]
        return _check_template(region)
    if tls.certificates or tls.template:
        return [
            f"spec.tls.certificates and hostNameTemplate do not apply to hostName {tls.host_name}: "
            "remove them, or set hostName: Template."
        ]
    return []


def _check_template(region: Region) -> list[str]:
    try:
        hosts = [region.host_name(pod) for pod in region.pods]
    except (KeyError, ValueError, IndexError):
        return [
            f"spec.tls.hostNameTemplate is {region.tls.template!r}: "
            "its variables are {pod}, {ordinal}, {region} and {namespace}."
        ]
    if len(set(hosts)) < len(hosts):
        return [f"spec.tls.hostNameTemplate is {region.tls.template!r}: use {{pod}}, every pod needs its own name."]
    for host in hosts:
        if len(host) > 253 or not _DNS_NAME.fullmatch(host):
            return [f"spec.tls.hostNameTemplate gives {host!r}, which is not a DNS name."]
    return []


def _check_clients(region: Region) -> list[str]:
    clients = region.clients
    if clients.open and (clients.verify_urls or clients.keys_from):
        return ["spec.clients.open lets everybody in: remove it, or remove verifyURLs and keysFrom."]
    if clients.open or clients.verify_urls or clients.keys_from:
        return []
    return ["spec.clients names nobody: set verifyURLs or keysFrom, or open: true for a relay that serves everybody."]


def _check_ranges(region: Region) -> list[str]:
    found = []
    for text in region.exposure.source_ranges:
        try:
            ipaddress.ip_network(text)
        except ValueError:
            found.append(f"spec.exposure.loadBalancer.sourceRanges has {text!r}: a network is like 192.0.2.0/24.")
    return found


_RULES: Final[tuple[Callable[[Region], list[str]], ...]] = (
    _check_name,
    _check_numbers,
    _check_tls,
    _check_clients,
    _check_ranges,
)


def _expand(template: str, values: Mapping[str, str]) -> str:
    """`str.format_map` without attribute or index access: the template comes from a user."""
    text = re.sub(r"\{([^{}]*)\}", lambda match: values[match[1]], template)
    if "{" in text or "}" in text:
        raise ValueError("unbalanced braces")
    return text
