"""The cluster's certificates. They live as long as the cluster does, so nothing here renews anything."""

from __future__ import annotations

import base64
import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

import yaml
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

LIFETIME = timedelta(days=365)


@dataclass(frozen=True)
class Pair:
    """A certificate and its private key, both as PEM."""

    certificate: bytes
    key: bytes

    def write(self, stem: Path) -> None:
        """Write STEM.crt and STEM.key."""
        stem.parent.mkdir(parents=True, exist_ok=True)
        stem.with_suffix(".crt").write_bytes(self.certificate)
        write_private(stem.with_suffix(".key"), self.key)


def write_private(path: Path, content: bytes) -> None:
    path.touch(mode=0o600)
    path.write_bytes(content)


def private_key() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP256R1())


def key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.TraditionalOpenSSL, serialization.NoEncryption()
    )


def public_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)


def _general_name(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


class Authority:
    """A certificate authority that is made, used and forgotten: only its certificate is kept."""

    def __init__(self, name: str, now: datetime) -> None:
        self._now = now
        self._key = private_key()
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        builder = self._builder(self._name, self._key.public_key()).add_extension(
            x509.BasicConstraints(ca=True, path_length=None), critical=True
        )
        self.certificate = builder.sign(self._key, hashes.SHA256())

    @property
    def pem(self) -> bytes:
        return self.certificate.public_bytes(serialization.Encoding.PEM)

    def issue(self, user: str, *, groups: Sequence[str] = (), names: Sequence[str] = ()) -> Pair:
        """A certificate for the user (Kubernetes: CN is the user, O its groups), serving the names if there are any."""
        key = private_key()
        subject = [x509.NameAttribute(NameOID.ORGANIZATION_NAME, group) for group in groups]
        subject.append(x509.NameAttribute(NameOID.COMMON_NAME, user))
        usages = [ExtendedKeyUsageOID.CLIENT_AUTH] + ([ExtendedKeyUsageOID.SERVER_AUTH] if names else [])
        builder = self._builder(x509.Name(subject), key.public_key()).add_extension(
            x509.ExtendedKeyUsage(usages), critical=False
        )
        if names:
            builder = builder.add_extension(
                x509.SubjectAlternativeName([_general_name(name) for name in names]), critical=False
            )
        certificate = builder.sign(self._key, hashes.SHA256())
        return Pair(certificate.public_bytes(serialization.Encoding.PEM), key_pem(key))

    def _builder(self, subject: x509.Name, key: ec.EllipticCurvePublicKey) -> x509.CertificateBuilder:
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(self._now - timedelta(minutes=5))  # clocks of clients may lag
            .not_valid_after(self._now + LIFETIME)
        )


def kubeconfig(server: str, authority_pem: bytes, user: Pair) -> str:
    """A kubeconfig that stands alone: certificates and key are inside of it."""

    def data(content: bytes) -> str:
        return base64.b64encode(content).decode()

    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [
            {"name": "derp", "cluster": {"server": server, "certificate-authority-data": data(authority_pem)}},
        ],
        "users": [
            {
                "name": "derp",
                "user": {"client-certificate-data": data(user.certificate), "client-key-data": data(user.key)},
            },
        ],
        "contexts": [{"name": "derp", "context": {"cluster": "derp", "user": "derp"}}],
        "current-context": "derp",
    }
    return yaml.safe_dump(config, sort_keys=False)
