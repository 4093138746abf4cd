"""The server's TLS contexts: one per certificate, chosen by the name the client asks for (SNI) before TLS starts.

Each certificate is followed by the meta certificate, which carries the relay's public key: clients that see
it skip a round trip (fast start).  Connections made before a reload keep the certificate they began with.
"""

from __future__ import annotations

import os
import ssl
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from .. import certs
from ..certs import CertificatePair
from ..wire.clienthello import ClientHello, check_offer, refused_name

__all__ = ["ServedCertificate", "ServerTLS", "check_usable", "utc_now"]

_ALPN: Final = (b"http/1.1",)


@dataclass(frozen=True, slots=True)
class ServedCertificate:
    """A certificate that is being served."""

    names: tuple[str, ...]
    pin: str
    not_after: datetime
    context: ssl.SSLContext


class ServerTLS:
    """The certificates in force: `choose` takes one for a new connection, `load` replaces them.

    A client without SNI gets the first certificate, unless `names_only` says that it must name one, as stock derper
    with a host name wants it.  One that asks for an unknown name gets the first certificate too if that is for an IP
    address (as stock derper), otherwise it is refused.
    """

    def __init__(self, server_key_hex: str, *, names_only: bool = False) -> None:
        self._server_key_hex = server_key_hex
        self._names_only = names_only
        self._by_name: dict[str, ssl.SSLContext] = {}
        self._serve_unknown = False
        self.certificates: tuple[ServedCertificate, ...] = ()
        self.meta_expires: datetime | None = None

    def choose(self, hello: ClientHello) -> ssl.SSLContext:
        """The context for the client that sent `hello`.  Raises `clienthello.HelloError`."""
        check_offer(hello, _ALPN)
        name = hello.server_name.lower()
        context = self._by_name.get(name) or self._by_name.get("*." + name.partition(".")[2])
        if context is not None:
            return context
        if self.certificates and (self._serve_unknown or not (name or self._names_only)):
            return self.certificates[0].context
        raise refused_name(hello)

    def load(self, pairs: Sequence[CertificatePair], now: datetime) -> None:
        """Serve these certificates from now on, the first one by default.

        Raises `certs.CertificateError` and keeps the old ones.
        """
        meta_der = certs.meta_certificate(self._server_key_hex, now)
        meta = x509.load_der_x509_certificate(meta_der)
        served = tuple(self._serve(pair, meta) for pair in pairs)
        by_name: dict[str, ssl.SSLContext] = {}
        for certificate in served:
            for name in certificate.names:
                by_name.setdefault(name.lower(), certificate.context)
        self._by_name = by_name
        self._serve_unknown = bool(served) and any(certs.ip_address_of(name) for name in served[0].names)
        self.certificates = served
        self.meta_expires = meta.not_valid_after_utc

    def valid(self, now: datetime) -> bool:
        """Whether there is a default certificate, and it has not expired."""
        return bool(self.certificates) and now < self.certificates[0].not_after

    def _serve(self, pair: CertificatePair, meta: x509.Certificate) -> ServedCertificate:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.set_alpn_protocols([protocol.decode() for protocol in _ALPN])
        # As Go's servers: the client knows whether it has AES in hardware, and which suite is fast for it.
        context.options &= ~ssl.OP_CIPHER_SERVER_PREFERENCE
        context.num_tickets = 0  # clients do not resume, and a ticket costs each connection a write
        chain = pair.cert_pem.rstrip() + b"\n" + meta.public_bytes(Encoding.PEM)
        _load_chain(context, chain, pair.key_pem, "the certificate")
        leaf = pair.leaf
        return ServedCertificate(certs.names(leaf), certs.pin(leaf), leaf.not_valid_after_utc, context)


def check_usable(pair: CertificatePair, source: str) -> None:
    """Whether OpenSSL would serve the pair: it refuses small keys and old hashes.  `source` names it in errors.

    Raises `certs.CertificateError`.
    """
    _load_chain(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), pair.cert_pem, pair.key_pem, source)


def _load_chain(context: ssl.SSLContext, chain: bytes, key: bytes, source: str) -> None:
    with _as_file(chain) as cert_path, _as_file(key) as key_path:
        try:
            context.load_cert_chain(cert_path, key_path)
        except ssl.SSLError as error:
            raise certs.CertificateError(f"OpenSSL refuses {source}: {error.reason or error}.") from None


@contextmanager
def _as_file(data: bytes) -> Iterator[str]:
    """A path for functions that only read files; in memory where there are memory files (Linux)."""
    if hasattr(os, "memfd_create"):
        descriptor = os.memfd_create("derper")
        try:
            os.write(descriptor, data)
            yield f"/proc/self/fd/{descriptor}"
        finally:
            os.close(descriptor)
    else:
        with tempfile.NamedTemporaryFile() as file:
            file.write(data)
            file.flush()
            yield file.name


def utc_now() -> datetime:
    """The wall clock, for certificates."""
    return datetime.now(UTC)
