"""The settings file: what an operator tells a relay about its region, while it runs.

One JSON object, see `docs/architecture.md`::

    {"region": "berlin",
     "nodes": {"berlin-0": {"serverKey": "nodekey:<hex>", "hostName": "berlin-0-g1.derp.internal",
                            "certName": "sha256-raw:<hex>", "dial": "berlin-0.berlin-mesh.derp.svc:8443",
                            "certificates": ["/etc/derper/secret/berlin-0.g1"], "mapName": "900a"}},
     "admission": {"open": true, "urls": [], "keyFiles": [], "tailscaled": null, "failOpen": false,
                   "cache": {"freshSeconds": 30, "staleSeconds": 3600}},
     "limits": {"acceptPerSecond": 0, "acceptBurst": 0, "clientBytesPerSecond": 0, "clientBurstBytes": 0},
     "proxies": {"trusted": ["198.51.100.0/24"], "protocol": false},
     "rebalance": {"clientsPerMinute": 0}}

A certificate is named by its path without ``.crt`` and ``.key``.  Every node but oneself is a mesh peer.
A ``keyFile`` is one more of the ``keyFiles``; ``tailscaled`` is the path of a socket.  A limit of 0 is none.
Clients that would rather be on another node, by its ``mapName``, are sent there at the rate of ``rebalance``.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar

from .relay.admission import CacheTimes
from .relay.limits import Limits
from .relay.proxies import Proxies, networks
from .wire.keys import KeyFormatError, NodePublic

__all__ = ["AdmissionSettings", "NodeSettings", "Settings", "SettingsError", "parse_settings"]

_T = TypeVar("_T")


class SettingsError(ValueError):
    """The settings cannot be used; the message is one sentence."""


@dataclass(frozen=True, slots=True)
class NodeSettings:
    """One relay of the region."""

    server_key: NodePublic
    host_name: str  #: SNI for those who dial it
    cert_name: str  #: pin for those who dial it
    dial_host: str
    dial_port: int
    certificates: tuple[str, ...]  #: path stems; the first is for clients without SNI
    map_name: str = ""  #: how clients call it: its name in the DERP map


@dataclass(frozen=True, slots=True)
class AdmissionSettings:
    """Who may use the relay, see `relay.admission`."""

    is_open: bool = False
    urls: tuple[str, ...] = ()
    key_files: tuple[str, ...] = ()
    tailscaled: str = ""
    fail_open: bool = False
    cache: CacheTimes = field(default_factory=CacheTimes)


@dataclass(frozen=True, slots=True)
class Settings:
    """The whole file.  `digest` is the SHA-256 of its bytes."""

    region: str = ""
    nodes: Mapping[str, NodeSettings] = field(default_factory=dict)
    admission: AdmissionSettings = field(default_factory=AdmissionSettings)
    limits: Limits = field(default_factory=Limits)
    proxies: Proxies | None = None  #: None: as the flags say
    rebalance_per_minute: float = 0.0  #: clients to send to their ideal node
    digest: str = ""


def parse_settings(data: bytes) -> Settings:
    """Read a settings file.  Unknown keys are ignored, so that an older relay runs with a newer operator's file.

    Raises `SettingsError`.
    """
    try:
        body = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise SettingsError(f"not JSON: {error}") from None
    top = _Object(body, "the settings")
    nodes = top.child("nodes")
    return Settings(
        region=top.get("region", str, ""),
        nodes={name: _node(_Object(value, f"nodes.{name}")) for name, value in nodes.items()},
        admission=_admission(top.child("admission")),
        limits=_limits(top.child("limits")),
        proxies=_proxies(top.child("proxies")) if top.has("proxies") else None,
        rebalance_per_minute=top.child("rebalance").number("clientsPerMinute"),
        digest=hashlib.sha256(data).hexdigest(),
    )


class _Object:
    """A JSON object that knows where it stands."""

    def __init__(self, value: Any, where: str) -> None:
        if not isinstance(value, dict):
            raise SettingsError(f"{where} must be a JSON object")
        self._value = value
        self._where = where

    def get(self, key: str, kind: type[_T], default: _T | None = None) -> _T:
        value = self._value.get(key)
        if value is None and default is not None:
            return default
        if type(value) is not kind:
            raise SettingsError(f"{self._where}.{key} must be {_KINDS[kind]}")
        return value

    def has(self, key: str) -> bool:
        return self._value.get(key) is not None

    def strings(self, key: str) -> tuple[str, ...]:
        value = self._value.get(key) or []
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise SettingsError(f"{self._where}.{key} must be a list of strings")
        return tuple(value)

    def number(self, key: str, default: float = 0) -> float:
        value = self._value.get(key)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < _TOO_MANY:
            raise SettingsError(f"{self._where}.{key} must be a number that is not negative")
        return float(value)

    def child(self, key: str) -> _Object:
        value = self._value.get(key)
        return _Object({} if value is None else value, f"{self._where}.{key}")

    def items(self) -> list[tuple[str, Any]]:
        return sorted(self._value.items())


_KINDS: Mapping[type, str] = {str: "a string", bool: "true or false", int: "a whole number"}
_TOO_MANY: Final = 1 << 63  # also keeps out Infinity and NaN, which Python reads in JSON


def _node(node: _Object) -> NodeSettings:
    try:
        server_key = NodePublic.parse(node.get("serverKey", str))
    except KeyFormatError as error:
        raise SettingsError(f"{node._where}.serverKey: {error}") from None
    dial = node.get("dial", str)
    host, _, port = dial.rpartition(":")
    host = host.strip("[]")
    if not host or not re.fullmatch("[0-9]{1,5}", port) or not 0 < int(port) < 65536:
        raise SettingsError(f"{node._where}.dial must be HOST:PORT, not {dial!r}")
    return NodeSettings(
        server_key=server_key,
        host_name=node.get("hostName", str),
        cert_name=node.get("certName", str, ""),
        dial_host=host,
        dial_port=int(port),
        certificates=node.strings("certificates"),
        map_name=node.get("mapName", str, ""),
    )


def _admission(admission: _Object) -> AdmissionSettings:
    key_file = admission.get("keyFile", str, "")
    cache, usual = admission.child("cache"), CacheTimes()
    return AdmissionSettings(
        is_open=admission.get("open", bool, False),
        urls=admission.strings("urls"),
        key_files=((key_file,) if key_file else ()) + admission.strings("keyFiles"),
        tailscaled=admission.get("tailscaled", str, ""),
        fail_open=admission.get("failOpen", bool, False),
        cache=CacheTimes(cache.number("freshSeconds", usual.fresh), cache.number("staleSeconds", usual.stale)),
    )


def _limits(limits: _Object) -> Limits:
    return Limits(
        client_bytes_per_second=int(limits.number("clientBytesPerSecond")),
        client_burst_bytes=int(limits.number("clientBurstBytes")),
        accept_per_second=limits.number("acceptPerSecond") or math.inf,
        accept_burst=max(int(limits.number("acceptBurst")), 1),
    )


def _proxies(proxies: _Object) -> Proxies:
    try:
        trusted = networks(proxies.strings("trusted"))
    except SettingsError:
        raise
    except ValueError as error:
        raise SettingsError(f"{proxies._where}.trusted must be a list of {error}") from None
    protocol = proxies.get("protocol", bool, False)
    if protocol and not trusted:
        raise SettingsError(f"{proxies._where}.protocol needs proxies.trusted: anybody else could claim any address")
    return Proxies(trusted, protocol)
