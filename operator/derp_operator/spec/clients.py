"""`spec.clients`: whom the relays admit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, cast

if TYPE_CHECKING:
    from .region import Region


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


def parse(spec: Mapping[str, Any]) -> Clients:
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


def check(region: Region) -> list[str]:
    clients = region.clients
    if clients.open and (clients.verify_urls or clients.keys_from):
        return ["spec.clients.open lets everybody in: remove it, or remove verifyURLs and keysFrom."]
    if clients.open or clients.verify_urls or clients.keys_from:
        return []
    return ["spec.clients names nobody: set verifyURLs or keysFrom, or open: true for a relay that serves everybody."]
