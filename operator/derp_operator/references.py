"""What the spec names and the user provides: certificates and the list of admitted clients.  Pure checks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime

from cryptography import x509

from derper import certs

from . import conditions, names
from .conditions import Finding
from .spec import Region

Data = Mapping[str, bytes] | None
"""The data of a Secret or ConfigMap; None if there is no such object."""


@dataclass(frozen=True, slots=True)
class HostName:
    """The name and the pin (empty: verified through an authority) under which clients know a node."""

    name: str
    pin: str
    not_before: datetime
    not_after: datetime


def clients_finding(region: Region, data: Data) -> Finding | None:
    """What is wrong with `clients.keysFrom`, or None."""
    source = region.clients.keys_from
    if source is None:
        return None
    reason = conditions.SECRET_NOT_FOUND if source.kind == "Secret" else conditions.CONFIG_MAP_NOT_FOUND
    if data is None:
        return Finding(
            reason,
            f"{source.kind} {source.name}, which spec.clients.keysFrom names, does not exist: create it with the key "
            f"{source.key}. No client is admitted through it until then.",
            blocked=True,
        )
    if source.key not in data:
        return Finding(
            reason,
            f"{source.kind} {source.name} has no key {source.key}, which spec.clients.keysFrom names: add it.",
            blocked=True,
        )
    return None


def host_names(region: Region, secrets: Mapping[str, Data], now: datetime) -> tuple[dict[str, HostName], list[Finding]]:
    """In mode Template: which pods have a certificate, and why others have none.  `secrets` by name."""
    leaves: dict[str, x509.Certificate] = {}
    findings = []
    for name in region.tls.certificates:
        leaf = _leaf(region, name, secrets.get(name), now)
        if isinstance(leaf, Finding):
            findings.append(leaf)
        else:
            leaves[name] = leaf
    found = {}
    uncovered = []
    for pod in region.pods:
        host = region.host_name(pod)
        match = next((leaf for leaf in leaves.values() if certs.matches(leaf, host)), None)
        if match:
            found[pod] = HostName(host, _pin(region, match), match.not_valid_before_utc, match.not_valid_after_utc)
        else:
            uncovered.append(host)
    if uncovered and leaves:
        findings.append(_uncovered(leaves, uncovered))
    return found, findings


def stem(secret: str) -> str:
    """Where a relay finds the certificate of a user's Secret, without .crt or .key."""
    return f"{names.TLS_DIR}/{secret}/tls"


def _leaf(region: Region, secret: str, data: Data, now: datetime) -> x509.Certificate | Finding:
    if data is None:
        return Finding(
            conditions.SECRET_NOT_FOUND,
            f"Secret {secret}, which spec.tls.certificates names, does not exist: create it with tls.crt and tls.key.",
            blocked=True,
        )
    try:
        leaf, *others = certs.load_pair(data.get("tls.crt", b""), data.get("tls.key", b"")).chain
        certs.check(leaf, now=now)
        certs.names(leaf)
        if others and _pin(region, leaf):
            raise certs.CertificateError(
                f"tls.crt holds {len(others) + 1} certificates, and clients that check a pin take exactly one: "
                "leave only the first one, or set spec.tls.pin: Never if clients trust its authority."
            )
    except certs.CertificateError as error:
        return Finding(conditions.CERTIFICATE_INVALID, f"Secret {secret}: {error}", blocked=True, degraded=True)
    return leaf


def _uncovered(leaves: Mapping[str, x509.Certificate], hosts: list[str]) -> Finding:
    own = {name: ", ".join(certs.names(leaf)) or "no name" for name, leaf in leaves.items()}
    have = "; ".join(f"Secret {name} is for {text}" for name, text in own.items())
    return Finding(
        conditions.CERTIFICATE_INVALID,
        f"No certificate of spec.tls.certificates is for {', '.join(hosts)} ({have}): "
        "add these names to one, or change spec.tls.hostNameTemplate.",
        blocked=True,
        degraded=True,
    )


def _pin(region: Region, leaf: x509.Certificate) -> str:
    pinned = region.tls.pin == "Always" or (region.tls.pin == "Auto" and certs.is_self_signed(leaf))
    return certs.pin(leaf) if pinned else ""
