"""The server's TLS contexts: one per certificate, chosen by the name the client asks for (SNI).

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

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from .. import certs
from ..certs import CertificatePair

__all__ = ["ServedCertificate", "ServerTLS", "check_usable", "utc_now"]


@dataclass(frozen=True, slots=True)
class ServedCertificate:
    """A certificate that is being served."""

    names: tuple[str, ...]
    pin: str
    not_after: datetime
    context: ssl.SSLContext


class ServerTLS:
    """Answers SNI.  `context` is what new connections start with; `load` replaces the certificates.

    A client without SNI gets the first certificate.  One that asks for an unknown name gets it too if that
    certificate is for an IP address (as stock derper), otherwise the handshake is refused.
    """

    def __init__(self, server_key_hex: str) -> None:
        self._server_key_hex = server_key_hex
        self._by_name: dict[str, ssl.SSLContext] = {}
        self._serve_unknown = False
        self.certificates: tuple[ServedCertificate, ...] = ()
        self.meta_expires: datetime | None = None

    @property
    def context(self) -> ssl.SSLContext | None:
        """The context to accept with; None while there is no certificate."""
        return self.certificates[0].context if self.certificates else None

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
        context.set_alpn_protocols(["http/1.1"])
        # As Go's servers: the client knows whether it has AES in hardware, and which suite is fast for it.
        context.options &= ~ssl.OP_CIPHER_SERVER_PREFERENCE
        context.num_tickets = 0  # clients do not resume, and a ticket costs each connection a write
        context.sni_callback = self._choose
        chain = pair.cert_pem.rstrip() + b"\n" + meta.public_bytes(Encoding.PEM)
        _load_chain(context, chain, pair.key_pem, "the certificate")
        leaf = pair.leaf
        return ServedCertificate(certs.names(leaf), certs.pin(leaf), leaf.not_valid_after_utc, context)

    def _choose(self, connection: ssl.SSLObject, name: str | None, _context: ssl.SSLContext) -> int | None:
        if name is None:
            return None
        wanted = name.lower().rstrip(".")
        context = self._by_name.get(wanted) or self._by_name.get("*." + wanted.partition(".")[2])
        if context is not None:
            connection.context = context
            return None
        return None if self._serve_unknown else ssl.AlertDescription.ALERT_DESCRIPTION_UNRECOGNIZED_NAME


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
