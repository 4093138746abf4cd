"""`spec.tls`: host names, certificates and pins."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal

if TYPE_CHECKING:
    from .region import Region

HostNameMode = Literal["Generated", "Address", "Template"]

_DNS_NAME: Final = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)+")


@dataclass(frozen=True, slots=True)
class Tls:
    host_name: HostNameMode = "Generated"
    template: str | None = None
    certificates: tuple[str, ...] = ()
    pin: Literal["Auto", "Always", "Never"] = "Auto"


def parse(spec: Mapping[str, Any]) -> Tls:
    return Tls(
        host_name=spec.get("hostName", "Generated"),
        template=spec.get("hostNameTemplate"),
        certificates=tuple(item["secretName"] for item in spec.get("certificates") or ()),
        pin=spec.get("pin", "Auto"),
    )


def check(region: Region) -> list[str]:
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


def expand(template: str, values: Mapping[str, str]) -> str:
    """`str.format_map` without attribute or index access: the template comes from a user."""
    text = re.sub(r"\{([^{}]*)\}", lambda match: values[match[1]], template)
    if "{" in text or "}" in text:
        raise ValueError("unbalanced braces")
    return text
