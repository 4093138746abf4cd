"""Certificates: self-signing, pins, what may go wrong with a PEM pair, and what clients check.

A DERP client with a pin accepts exactly one certificate (besides the meta certificate, below), so our own are
self-signed leaves without a chain. The meta certificate is no certificate in earnest: it carries the relay's public
key in the TLS handshake, which saves clients a round trip.
Sources: tailscale.com cmd/derper/cert.go, net/tlsdial/tlsdial.go, derp/derpserver/derpserver.go (initMetacert).
"""

import hashlib
import ipaddress
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

PIN_PREFIX = "sha256-raw:"
"""Start of a CertName that pins a certificate (tailcfg.DERPNode.CertName)."""
META_PREFIX = "derpkey"
"""Start of a meta certificate's common name (derpconst.MetaCertCommonNamePrefix); clients skip such certificates."""
PROTOCOL_VERSION = 2
"""The DERP protocol version, which the meta certificate carries as its serial number (derp.ProtocolVersion)."""

CLOCK_SKEW = timedelta(hours=1)
"""How far a client's clock may be behind ours."""
YEAR = timedelta(days=365)

_COMMON_NAME_LIMIT = 64  # X.520
_LABEL = r"[A-Za-z0-9_]([A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?"
_DNS_NAME = re.compile(rf"(?=.{{1,253}}$)(\*\.)?{_LABEL}(\.{_LABEL})*")


class CertificateError(ValueError):
    """A certificate or its key cannot be used. The message is one sentence: which one, what is wrong, what to do."""


@dataclass(frozen=True, slots=True)
class CertificatePair:
    """A certificate (with its chain, leaf first) and its private key, in PEM; they belong together."""

    cert_pem: bytes
    key_pem: bytes = field(repr=False)

    @property
    def chain(self) -> tuple[x509.Certificate, ...]:
        return tuple(x509.load_pem_x509_certificates(self.cert_pem))

    @property
    def leaf(self) -> x509.Certificate:
        return self.chain[0]


def self_signed(names: Sequence[str], *, now: datetime, lifetime: timedelta = YEAR) -> CertificatePair:
    """Make a key and a certificate for `names` (DNS names, IP addresses), as stock derper does for an IP address.

    ECDSA P-256; valid from an hour before `now` (aware) until `lifetime` after it. macOS refuses more than a year.
    Raises CertificateError for something that is no name.
    """
    if not names:
        raise CertificateError("A certificate needs at least one DNS name or IP address.")
    alternatives = [_general_name(name) for name in dict.fromkeys(names)]
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, _common_name(names[0]))])
    key = ec.generate_private_key(ec.SECP256R1())
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - CLOCK_SKEW)
        .not_valid_after(now + lifetime)
        .add_extension(_KEY_USAGE, critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName(alternatives), critical=False)
        .sign(key, hashes.SHA256())
    )
    return CertificatePair(
        cert_pem=certificate.public_bytes(serialization.Encoding.PEM),
        key_pem=key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.TraditionalOpenSSL, serialization.NoEncryption()
        ),
    )


def meta_certificate(server_key: str, now: datetime) -> bytes:
    """The meta certificate (DER) of a relay with the public key `server_key`, 64 hex digits. Good for 30 days.

    To be sent after the leaf and its chain. `now` must be aware.
    """
    with warnings.catch_warnings():  # cryptography minds that the name is longer than X.520 allows; it has to be
        warnings.simplefilter("ignore")
        common_name = x509.NameAttribute(NameOID.COMMON_NAME, META_PREFIX + server_key, _validate=False)
    subject = x509.Name([common_name])
    key = ed25519.Ed25519PrivateKey.generate()
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(PROTOCOL_VERSION)
        .not_valid_before(now - timedelta(days=30))
        .not_valid_after(now + timedelta(days=30))
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .sign(key, algorithm=None)
    )
    return certificate.public_bytes(serialization.Encoding.DER)


def pin(certificate: x509.Certificate) -> str:
    """The CertName that makes clients accept this certificate and no other."""
    return PIN_PREFIX + hashlib.sha256(certificate.public_bytes(serialization.Encoding.DER)).hexdigest()


def names(certificate: x509.Certificate) -> tuple[str, ...]:
    """The DNS names and IP addresses it is for: its subject alternative names. Clients ignore the common name.

    Raises CertificateError if they cannot be read.
    """
    try:
        extension = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName)
    except x509.ExtensionNotFound:
        return ()
    except ValueError as error:
        raise CertificateError(f"The certificate's subject alternative names cannot be read: {error}.") from None
    return tuple(str(name.value) for name in extension.value if isinstance(name, x509.DNSName | x509.IPAddress))


def matches(certificate: x509.Certificate, name: str) -> bool:
    """Whether the certificate is for `name`, as Go's x509.VerifyHostname sees it: `*` stands for one first label."""
    address = ip_address_of(name)
    if address is not None:
        return any(ip_address_of(own) == address for own in names(certificate))
    labels = name.lower().removesuffix(".").split(".")
    return any(_matches_labels(own.lower().split("."), labels) for own in names(certificate))


def is_self_signed(certificate: x509.Certificate) -> bool:
    """Whether it names itself as its issuer, which is how clients tell (tlsdial.certIsSelfSigned)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return certificate.subject == certificate.issuer


def is_meta(certificate: x509.Certificate) -> bool:
    """Whether clients take it for a meta certificate: by its common name alone."""
    return _common_name_of(certificate).startswith(META_PREFIX)


def meta_key(certificate: x509.Certificate) -> tuple[str, int] | None:
    """What a meta certificate says: the relay's public key (64 hex digits) and its protocol version.

    None for any other certificate. Source: derphttp.parseMetaCert.
    """
    match = re.fullmatch(META_PREFIX + "([0-9a-fA-F]{64})", _common_name_of(certificate))
    if match is None or certificate.serial_number > 255:
        return None
    return match[1].lower(), certificate.serial_number


def load_pair(cert_pem: bytes, key_pem: bytes, *, cert: str = "tls.crt", key: str = "tls.key") -> CertificatePair:
    """Check that the two texts are a certificate (chain) and its key. `cert` and `key` name them in errors.

    Raises CertificateError.
    """
    try:
        chain = x509.load_pem_x509_certificates(cert_pem)
        leaf_key = chain[0].public_key()
    except ValueError:
        raise CertificateError(f"{cert} holds no certificate in PEM (-----BEGIN CERTIFICATE-----).") from None
    private_key = _private_key(key_pem, key)
    if private_key.public_key() != leaf_key:
        if any(private_key.public_key() == other.public_key() for other in chain[1:]):
            raise CertificateError(f"{cert} must start with the certificate of {key}; it comes later in the file.")
        raise CertificateError(f"{key} is not the key of the certificate in {cert}; they must be made together.")
    if is_meta(chain[0]):
        raise CertificateError(f'{cert} has a common name that starts with "{META_PREFIX}"; clients skip such ones.')
    return CertificatePair(cert_pem, key_pem)


def read_pair(cert_path: Path, key_path: Path) -> CertificatePair:
    """`load_pair` from two files. Raises CertificateError, also for files that cannot be read."""
    return load_pair(_read(cert_path), _read(key_path), cert=str(cert_path), key=str(key_path))


def check(
    certificate: x509.Certificate, *, now: datetime | None, name: str = "", source: str = "The certificate"
) -> None:
    """Check the validity at `now` unless that is None, and that the certificate is for `name` unless that is empty.

    `source` names it in errors. Raises CertificateError.
    """
    if now is not None and now > certificate.not_valid_after_utc:
        raise CertificateError(f"{source} expired on {_shown(certificate.not_valid_after_utc)}; renew it.")
    if now is not None and now < certificate.not_valid_before_utc:
        begin = _shown(certificate.not_valid_before_utc)
        raise CertificateError(f"{source} is not valid before {begin}; is the clock right?")
    if name and not matches(certificate, name):
        own = ", ".join(names(certificate)) or "no name at all (a common name does not count)"
        raise CertificateError(f"{source} is not for {name}; it is for {own}.")


def verify_pin(presented: Sequence[x509.Certificate], want: str, *, server_name: str, now: datetime | None) -> None:
    """Check what a server presented against a pin, as clients do (tlsdial.SetConfigExpectedCertHash).

    `want` is the CertName or its hex digits; their case matters. `server_name` is the SNI sent, empty if none was;
    `now` is None if the certificate's dates do not matter.
    Raises CertificateError.
    """
    digits = want.removeprefix(PIN_PREFIX)
    certificates = [certificate for certificate in presented if not is_meta(certificate)]
    if not certificates:
        raise CertificateError("The server presented no certificate.")
    if pin(certificates[0]) != PIN_PREFIX + digits:
        raise CertificateError(f"The server's certificate is {pin(certificates[0])}, not {PIN_PREFIX}{digits}.")
    check(certificates[0], now=now, name=server_name, source="The server's certificate")
    if len(certificates) > 1:
        raise CertificateError(f"The server presented {len(certificates)} certificates; a pin allows exactly one.")


_KEY_USAGE = x509.KeyUsage(
    digital_signature=True,
    key_encipherment=True,
    content_commitment=False,
    data_encipherment=False,
    key_agreement=False,
    key_cert_sign=False,
    crl_sign=False,
    encipher_only=False,
    decipher_only=False,
)


def _private_key(pem: bytes, source: str) -> PrivateKeyTypes:
    try:
        key = serialization.load_pem_private_key(pem, password=None)
    except TypeError:
        raise CertificateError(f"{source} is encrypted; a relay needs the key without a passphrase.") from None
    except (ValueError, UnsupportedAlgorithm):
        raise CertificateError(f"{source} holds no private key in PEM (-----BEGIN PRIVATE KEY-----).") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey | ed25519.Ed25519PrivateKey):
        raise CertificateError(f"{source} is a key of a kind that TLS clients do not take; use ECDSA P-256.")
    return key


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise CertificateError(f"{path} cannot be read: {error.strerror}.") from None


def _common_name(name: str) -> str:
    # Nobody reads it, but a name of up to 64 characters is the custom, and `derpkey...` would make clients skip the
    # certificate as a meta certificate (a region may well be called derpkeys).
    return name if len(name) <= _COMMON_NAME_LIMIT and not name.startswith(META_PREFIX) else "derper"


def _common_name_of(certificate: x509.Certificate) -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        attributes = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    return str(attributes[-1].value) if attributes else ""  # the last one counts, as in Go's pkix.Name


def _general_name(name: str) -> x509.GeneralName:
    address = ip_address_of(name)
    if address is not None:
        return x509.IPAddress(address)
    if not _DNS_NAME.fullmatch(name):
        raise CertificateError(f"{name!r} is neither a DNS name nor an IP address, so no certificate can be for it.")
    return x509.DNSName(name)


def ip_address_of(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """The IP address that `text` is; None for a name, and for an address with a zone, which no certificate can hold."""
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return None
    return None if getattr(address, "scope_id", None) else address


def _matches_labels(pattern: list[str], labels: list[str]) -> bool:
    if len(pattern) != len(labels):
        return False
    return pattern[1:] == labels[1:] and pattern[0] in ("*", labels[0])


def _shown(moment: datetime) -> str:
    return moment.astimezone(UTC).strftime("%Y-%m-%d %H:%M UTC")
