"""Does a relay answer?  Asked at the pod's own address, as a client would: TLS with the pin, STUN, and its own report.

Nothing here raises for a relay that does not answer: what is wrong is a sentence in the result.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import ssl
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import aiohttp
from cryptography import x509

from derper import certs, stun_client
from derper.derpmap import DERPNode

from . import names

TIMEOUT: Final = 2.0
_STUN_TRIES: Final = 2
_MAX_STATUS: Final = 1 << 20


@dataclass(frozen=True, slots=True)
class Target:
    """A relay to ask.  `host_name` and `pin` are those of its entry in the map; `pin` is empty for a public CA.

    `also` are further names that it may answer to; `earlier` are pins that are no fault: it may still read its files.
    """

    pod: str
    ip: str
    host_name: str
    pin: str
    sni: bool = True
    also: tuple[str, ...] = ()
    earlier: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class ReportedKeys:
    """Fingerprints of the mesh keys that a relay presents and accepts; nothing if it does not say."""

    current: str = ""
    accepted: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Answer:
    """What a relay said.  `faults` is empty if TLS, STUN and the report are in order; `mesh` are its links by pod.

    `settings` is the hash (SHA-256 in hex) of the settings that it runs with, empty if it does not say; `clients` is
    how many are connected.  `shown` are the pins that TLS showed, by host name; `certificates` the pins of all that it
    serves, as it says.
    """

    faults: tuple[str, ...] = ()
    mesh: Mapping[str, bool] = field(default_factory=dict)
    reasons: tuple[str, ...] = ()
    settings: str = ""
    clients: int = 0
    shown: Mapping[str, str] = field(default_factory=dict)
    certificates: frozenset[str] = frozenset()
    mesh_keys: ReportedKeys = ReportedKeys()


Prober = Callable[[Target], Awaitable[Answer]]
Reach = Callable[[DERPNode], Awaitable[bool]]


async def ask(target: Target) -> Answer:
    """Ask one relay, all ways at once."""
    hosts = (target.host_name, *(name for name in target.also if name != target.host_name))
    leaves, udp, (fault, report) = await asyncio.gather(
        asyncio.gather(
            *(_leaf(target.ip, names.DERP_PORT, host if target.sni or host in target.also else "") for host in hosts)
        ),
        _stun_fault(target.ip, names.STUN_PORT),
        _report(target),
    )
    shown = {host: _pin(leaf) for host, leaf in zip(hosts, leaves, strict=True) if isinstance(leaf, bytes)}
    tls = leaves[0] if isinstance(leaves[0], str) else certificate_fault(target, leaves[0])
    return Answer(tuple(text for text in (tls, udp, fault) if text), shown=shown, **_said(report))


def _said(report: Mapping[str, Any]) -> dict[str, Any]:
    """What a relay says of itself.  It may be of an older release, or say nothing."""
    keys, clients = report.get("meshKeys") or {}, report.get("clients")
    return {
        "mesh": {peer: bool(link.get("connected")) for peer, link in (report.get("mesh") or {}).items()},
        "reasons": tuple(str(reason) for reason in report.get("reasons") or ()),
        "settings": str(report.get("settings") or ""),
        "clients": clients if isinstance(clients, int) else 0,
        "certificates": frozenset(str(item.get("certName")) for item in report.get("certificates") or ()),
        "mesh_keys": ReportedKeys(str(keys.get("current") or ""), frozenset(keys.get("accepted") or ())),
    }


async def reach(node: DERPNode) -> bool:
    """Whether a node answers TLS and STUN where its entry in the map says, as seen from here."""
    host = next((ip for ip in (node.ipv4, node.ipv6) if ip not in ("", "none")), node.host_name)
    target = Target(node.name, host, node.host_name, node.cert_name, node.host_name != host)
    leaf, fault = await asyncio.gather(
        _leaf(host, node.derp_port, node.host_name if target.sni else ""), _stun_fault(host, node.stun_port)
    )
    return isinstance(leaf, bytes) and not certificate_fault(target, leaf) and not fault


async def _leaf(ip: str, port: int, server_name: str) -> bytes | str:
    """The certificate (DER) that a relay shows to who asks for this name, none if it is empty; or what is wrong."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE  # the pin says more than any authority
    try:
        async with asyncio.timeout(TIMEOUT):
            _, writer = await asyncio.open_connection(ip, port, ssl=context, server_hostname=server_name)
    except TimeoutError:
        return f"TLS on port {port} does not answer"
    except (OSError, ssl.SSLError) as error:
        return f"TLS on port {port} fails ({_short(error)})"
    try:
        return writer.get_extra_info("ssl_object").getpeercert(binary_form=True) or b""
    finally:
        writer.transport.abort()


def _pin(leaf: bytes) -> str:
    return f"{certs.PIN_PREFIX}{hashlib.sha256(leaf).hexdigest()}"


def certificate_fault(target: Target, leaf: bytes) -> str | None:
    """What is wrong with the certificate (DER) that a relay presented, or None."""
    if target.pin:
        fits = _pin(leaf) in {target.pin, *target.earlier}
        return None if fits else f"TLS shows another certificate for {target.host_name} than the pinned one"
    try:
        certificate = x509.load_der_x509_certificate(leaf)
    except ValueError:
        return "TLS shows no certificate that can be read"
    fits = certs.matches(certificate, target.host_name)
    return None if fits else f"TLS shows a certificate that is not for {target.host_name}"


async def _stun_fault(host: str, port: int) -> str | None:
    try:
        await stun_client.ask(host, port, tries=_STUN_TRIES, patience=TIMEOUT / _STUN_TRIES)
    except (TimeoutError, ConnectionRefusedError):
        return f"STUN on port {port} does not answer"
    except OSError as error:
        return f"STUN on port {port} fails ({_short(error)})"
    return None


async def _report(target: Target) -> tuple[str | None, dict[str, Any]]:
    host = f"[{target.ip}]" if ":" in target.ip else target.ip
    url = f"http://{host}:{names.METRICS_PORT}/status"
    try:
        timeout = aiohttp.ClientTimeout(total=TIMEOUT)
        async with aiohttp.ClientSession(timeout=timeout) as http, http.get(url, allow_redirects=False) as response:
            body = await response.content.read(_MAX_STATUS)
            report = json.loads(body) if response.status == 200 else None
    except TimeoutError:
        return f"/status on port {names.METRICS_PORT} does not answer", {}
    except (aiohttp.ClientError, OSError, ValueError) as error:
        return f"/status on port {names.METRICS_PORT} fails ({_short(error)})", {}
    if not isinstance(report, dict):
        return f"/status on port {names.METRICS_PORT} gives no report", {}
    if report.get("node") != target.pod:
        return f"{target.ip} is node {report.get('node')!r}, not {target.pod}", {}
    return None, report


def _short(error: BaseException) -> str:
    reason = getattr(error, "reason", None) or getattr(error, "strerror", None) or str(error)
    return " ".join(str(reason or type(error).__name__).split())[:120]
