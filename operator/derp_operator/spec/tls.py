"""`spec.tls`: host names, certificates and pins."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Final, Literal

from . import durations

if TYPE_CHECKING:
    from .region import Region

HostNameMode = Literal["Generated", "Address", "Template"]

_DNS_NAME: Final = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)+")


LIFETIME: Final = timedelta(days=365)
"""macOS refuses certificates that are valid for longer."""
MIN_LIFETIME: Final = timedelta(minutes=10)
RETIRE_AFTER: Final = timedelta(hours=24)


@dataclass(frozen=True, slots=True)
class Tls:
    """`lifetime` to `retire_after` are about certificates that the operator makes: how long one is valid, how long
    before its end it is renewed, and for how long the one before is still served then.  Another `rotate` asks for new
    ones now.
    """

    host_name: HostNameMode = "Generated"
    template: str | None = None
    certificates: tuple[str, ...] = ()
    pin: Literal["Auto", "Always", "Never"] = "Auto"
    lifetime: timedelta = LIFETIME
    renew_before: timedelta = LIFETIME / 3
    retire_after: timedelta = RETIRE_AFTER
    rotate: str = ""


def parse(spec: Mapping[str, Any], problems: list[str]) -> Tls:
    lifetime = _duration(spec, "lifetime", LIFETIME, problems)
    return Tls(
        host_name=spec.get("hostName", "Generated"),
        template=spec.get("hostNameTemplate"),
        certificates=tuple(item["secretName"] for item in spec.get("certificates") or ()),
        pin=spec.get("pin", "Auto"),
        lifetime=lifetime,
        renew_before=_duration(spec, "renewBefore", lifetime / 3, problems),
        retire_after=_duration(spec, "retireAfter", RETIRE_AFTER, problems),
        rotate=spec.get("rotate", ""),
    )


def _duration(spec: Mapping[str, Any], name: str, default: timedelta, problems: list[str]) -> timedelta:
    text = spec.get(name)
    if text is None:
        return default
    found = durations.parse(text)
    if found is None:
        problems.append(
            f"spec.tls.{name} is {text!r}: write a duration in hours, minutes and seconds, like 24h or 1h30m."
        )
    return default if found is None else found


def check(region: Region) -> list[str]:
    return _check_names(region) + _check_times(region.tls)


def _check_times(tls: Tls) -> list[str]:
    found = []
    if not MIN_LIFETIME <= tls.lifetime <= LIFETIME:
        found.append(
            f"spec.tls.lifetime is {durations.write(tls.lifetime)}: it must be {durations.write(MIN_LIFETIME)} to "
            f"{durations.write(LIFETIME)}, which is the most that macOS takes."
        )
    if not timedelta(0) < tls.renew_before < tls.lifetime:
        found.append(
            f"spec.tls.renewBefore is {durations.write(tls.renew_before)}: it must be more than nothing and less than "
            f"spec.tls.lifetime, which is {durations.write(tls.lifetime)}."
        )
    return found


def _check_names(region: Region) -> list[str]:
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
