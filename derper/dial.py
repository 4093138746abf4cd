"""Reaching a node of a DERP map: its addresses, TCP, TLS, and whether it is the one that the map means.

(derp/derphttp, dialNode; net/tlsdial)
"""

from __future__ import annotations

import asyncio
import os
import socket
import ssl
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from ipaddress import ip_address
from typing import Any, Final

from aiohappyeyeballs import AddrInfoType, start_connection
from cryptography import x509

from . import certs
from .derpmap import DERPNode
from .wire.keys import NodePublic

__all__ = [
    "DialError",
    "Endpoint",
    "Secure",
    "check_peer",
    "client_context",
    "connect",
    "endpoint_of",
    "presented_certificates",
    "reason",
    "start_tls",
    "verify",
]

_NEXT_ADDRESS: Final = 0.25  # seconds; when to try the next one as well (RFC 8305, section 5)


class DialError(Exception):
    """A node cannot be used; the message is one sentence.  `stage` says how far it got: tcp, tls, http or derp."""

    def __init__(self, stage: str, message: str) -> None:
        super().__init__(message)
        self.stage = stage


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where to dial and whom to expect there."""

    addresses: tuple[str, ...]  #: IP addresses or DNS names; names are asked for when no IP address answers
    port: int
    host_name: str  #: sent as SNI unless it is an IP address, and as HTTP host
    cert_name: str = ""  #: ``sha256-raw:<hex>``, or a name that the certificate must carry, or empty: `host_name`
    insecure: bool = False
    timeless: bool = False  #: take the pinned certificate whatever its dates are
    roots: ssl.SSLContext | None = None  #: trust these authorities and not the system's

    def __str__(self) -> str:
        return f"{self.host_name} ({', '.join(self.addresses)} port {self.port})"


def endpoint_of(node: DERPNode, roots: ssl.SSLContext | None = None) -> Endpoint:
    """Where a node of the map is.  An empty IPv4 or IPv6 means to ask DNS, "none" not to use the family."""
    addresses = [address for address in (node.ipv4, node.ipv6) if address and address != "none"]
    if "" in (node.ipv4, node.ipv6) and node.host_name not in addresses:
        addresses.append(node.host_name)
    return Endpoint(
        addresses=tuple(addresses),
        port=node.derp_port or 443,
        host_name=node.host_name,
        cert_name=node.cert_name,
        insecure=node.insecure_for_tests,
        roots=roots,
    )


Secure = Callable[[socket.socket, ssl.SSLContext, str, asyncio.Protocol], Awaitable[asyncio.Transport]]
"""Starts TLS as a client: on a connected socket, which it closes if it fails, with a context, the server's name or "",
and the protocol.  Raises OSError, as ssl does."""


class _Idle(asyncio.Protocol):
    """Stands in until TLS is up."""


async def connect(
    endpoint: Endpoint, seconds: float, prepare: Callable[[socket.socket], None] | None = None
) -> socket.socket:
    """Connect TCP to the first address that answers, IP addresses before names, each kind within so many seconds.

    `prepare` sets options of the connected socket.  Raises `DialError`.
    """
    literals = [address for address in endpoint.addresses if _is_ip(address)]
    names = [address for address in endpoint.addresses if not _is_ip(address)]
    problem: Exception | None = None
    for addresses in (literals, names):
        try:
            if addresses:
                async with asyncio.timeout(seconds):
                    return await _race(addresses, endpoint.port, prepare)
        except TimeoutError:
            problem = problem or TimeoutError(f"no answer within {seconds:g} s")
        except OSError as error:
            problem = problem or error
    raise DialError("tcp", f"cannot reach {endpoint}: {reason(problem)}")


async def _race(addresses: Sequence[str], port: int, prepare: Callable[[socket.socket], None] | None) -> socket.socket:
    """Connect to whichever address is faster; families alternate, each a little later (RFC 8305)."""
    loop = asyncio.get_running_loop()
    found: list[AddrInfoType] = []
    problem: OSError | None = None
    for address in addresses:
        try:
            found += await loop.getaddrinfo(address, port, type=socket.SOCK_STREAM)
        except UnicodeError:  # Python encodes names itself
            problem = problem or OSError(f"{address!r} is not a host name")
        except OSError as error:
            problem = problem or error
    if not found:
        raise problem or OSError("it has no address")
    sock = await start_connection(found, happy_eyeballs_delay=_NEXT_ADDRESS)
    try:
        if prepare is not None:
            prepare(sock)
    except BaseException:
        sock.close()
        raise
    return sock


def _is_ip(address: str) -> bool:
    try:
        ip_address(address)
    except ValueError:
        return False
    return True


def client_context(endpoint: Endpoint) -> ssl.SSLContext:
    """A context that checks the chain only where a name is expected; `check_peer` does the rest."""
    if endpoint.insecure or endpoint.cert_name.startswith(certs.PIN_PREFIX):
        # Not the default context: to read the system's authorities takes 20 ms, in which the loop stands still.
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    else:
        context = endpoint.roots or ssl.create_default_context()
        context.check_hostname = False
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    return context


def check_peer(endpoint: Endpoint, presented: Sequence[x509.Certificate], now: datetime) -> None:
    """Check what the server presented, as tlsdial does.  Raises `certs.CertificateError`."""
    if endpoint.insecure:
        return
    server_name = "" if certs.ip_address_of(endpoint.host_name) else endpoint.host_name
    if endpoint.cert_name.startswith(certs.PIN_PREFIX):
        when = None if endpoint.timeless else now
        certs.verify_pin(presented, endpoint.cert_name, server_name=server_name, now=when)
    else:
        certs.check(presented[0], now=now, name=endpoint.cert_name or endpoint.host_name, source="The certificate")


def presented_certificates(connection: Any) -> list[x509.Certificate]:
    """The certificates that the peer sent, leaf first."""
    public = getattr(connection, "get_unverified_chain", None)  # Python 3.13
    if public is not None:
        return [x509.load_der_x509_certificate(der) for der in public()]
    private = connection._sslobj.get_unverified_chain()
    return [x509.load_pem_x509_certificate(item.public_bytes().encode()) for item in private]


async def start_tls(
    sock: socket.socket, endpoint: Endpoint, protocol: asyncio.Protocol, secure: Secure | None = None
) -> asyncio.Transport:
    """The connection with TLS, for `protocol`.  Nobody is trusted yet: `verify` it.

    Raises OSError, as ssl does; then the socket is closed.
    """
    name = endpoint.host_name or endpoint.addresses[0]
    try:
        context = client_context(endpoint)
        server_name = "" if _is_ip(name) else name.encode("idna").decode()
    except BaseException:
        sock.close()
        raise
    if secure is not None and not context.keylog_filename:  # SSLKEYLOGFILE: only Python's ssl writes it
        return await secure(sock, context, server_name, protocol)
    loop = asyncio.get_running_loop()
    transport, _ = await loop.create_connection(_Idle, sock=sock)
    try:
        secured = await loop.start_tls(transport, protocol, context, server_hostname=name)
        if secured is None:
            raise ConnectionResetError("the connection closed during the TLS handshake")
    except BaseException:
        transport.abort()
        raise
    return secured


def verify(transport: asyncio.Transport, endpoint: Endpoint) -> NodePublic | None:
    """Check whom the connection reached; the server's key if a meta certificate tells it.

    Raises `certs.CertificateError`.
    """
    connection = transport.get_extra_info("ssl_object")
    chain = presented_certificates(connection)
    check_peer(endpoint, chain, datetime.now(UTC))
    if connection.version() != "TLSv1.3":
        return None
    for certificate in chain:
        key = certs.meta_key(certificate)
        if key is not None:
            return NodePublic(bytes.fromhex(key[0]))
    return None


def reason(error: BaseException | None) -> str:
    """What went wrong on a connection, as a part of a sentence."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"the certificate is not trusted: {error.verify_message}"
    if isinstance(error, ssl.SSLError | socket.gaierror):  # their numbers are not the system's
        return error.strerror or str(error)
    if isinstance(error, OSError) and error.errno:  # asyncio puts the address into the text
        return os.strerror(error.errno).lower()
    if isinstance(error, ConnectionError) and not str(error):
        return "the server closed the connection"
    return str(error) or type(error).__name__
