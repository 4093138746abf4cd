"""Certificates: ours pass what clients check, and bad ones are named in one sentence."""

import ipaddress
import ssl
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import dsa, ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from hypothesis import given
from hypothesis import strategies as st

from derper import certs
from derper.certs import CertificateError, CertificatePair

NOW = datetime(2026, 11, 22, 12, 0, 0, 123456, tzinfo=UTC)
NAME = "berlin-0-g1.derp.internal"
SERVER_KEY = "5a" * 32
META = x509.load_der_x509_certificate(certs.meta_certificate(SERVER_KEY, NOW))


@pytest.fixture(scope="module")
def pair() -> CertificatePair:
    return certs.self_signed([NAME, "198.18.0.7", "2001:db8::7"], now=NOW)


def issued(common_name: str, issuer: str, *, san: list[x509.GeneralName] | None = None) -> CertificatePair:
    """A certificate that no function of ours makes: another issuer's, or without names."""
    key = ec.generate_private_key(ec.SECP256R1())
    builder = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)]))
        .issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, issuer)]))
        .public_key(key.public_key())
        .serial_number(7)
        .not_valid_before(NOW - timedelta(days=1))
        .not_valid_after(NOW + timedelta(days=1))
    )
    if san:
        builder = builder.add_extension(x509.SubjectAlternativeName(san), critical=False)
    certificate = builder.sign(key, hashes.SHA256())
    return CertificatePair(
        certificate.public_bytes(serialization.Encoding.PEM),
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()),
    )


def test_self_signed_is_what_stock_derper_makes(pair: CertificatePair) -> None:
    leaf = pair.leaf
    public_key = leaf.public_key()
    assert isinstance(public_key, ec.EllipticCurvePublicKey)
    assert public_key.curve.name == "secp256r1"
    assert leaf.subject == leaf.issuer == x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, NAME)])
    assert leaf.not_valid_before_utc == datetime(2026, 11, 22, 11, tzinfo=UTC)
    assert leaf.not_valid_after_utc == datetime(2027, 11, 22, 12, tzinfo=UTC)
    assert not leaf.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    usage = leaf.extensions.get_extension_for_class(x509.KeyUsage).value
    assert usage.digital_signature
    assert usage.key_encipherment
    assert not usage.key_cert_sign
    purposes = leaf.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert list(purposes) == [ExtendedKeyUsageOID.SERVER_AUTH]
    assert certs.names(leaf) == (NAME, "198.18.0.7", "2001:db8::7")
    assert certs.is_self_signed(leaf)
    assert b"BEGIN EC PRIVATE KEY" in pair.key_pem
    leaf.verify_directly_issued_by(leaf)


def test_addresses_are_ip_names(pair: CertificatePair) -> None:
    san = pair.leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert san.get_values_for_type(x509.IPAddress) == [
        ipaddress.ip_address("198.18.0.7"),
        ipaddress.ip_address("2001:db8::7"),
    ]


def test_openssl_takes_the_pair(pair: CertificatePair, tmp_path: Path) -> None:
    (tmp_path / "c.crt").write_bytes(pair.cert_pem)
    (tmp_path / "c.key").write_bytes(pair.key_pem)
    ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(tmp_path / "c.crt", tmp_path / "c.key")


def test_lifetime_and_serial_numbers_differ_as_asked() -> None:
    one, two = (certs.self_signed(["a.example"], now=NOW, lifetime=timedelta(days=d)).leaf for d in (1, 90))
    assert one.not_valid_after_utc == datetime(2026, 11, 23, 12, tzinfo=UTC)
    assert two.not_valid_after_utc == datetime(2027, 2, 20, 12, tzinfo=UTC)
    assert one.serial_number != two.serial_number


@pytest.mark.parametrize("name", ["derpkeys-0-g1.derp.internal", "x" * 60 + ".example"])
def test_common_names_that_clients_or_x509_would_not_take(name: str) -> None:
    leaf = certs.self_signed([name], now=NOW).leaf
    assert certs.names(leaf) == (name,)
    assert not certs.is_meta(leaf)
    certs.verify_pin([leaf, META], certs.pin(leaf), server_name=name, now=NOW)


@pytest.mark.parametrize(
    "name", ["", "a b", "derp.example.com:443", "-a.example", "a..b", "münchen.example", "fe80::1%eth0"]
)
def test_what_is_no_name(name: str) -> None:
    with pytest.raises(CertificateError, match="neither a DNS name nor an IP address"):
        certs.self_signed([name], now=NOW)


def test_no_names() -> None:
    with pytest.raises(CertificateError, match="at least one"):
        certs.self_signed([], now=NOW)


@pytest.mark.filterwarnings("ignore:Attribute's length")  # the first look at the name, whichever test takes it
def test_meta_certificate_is_derpservers() -> None:
    assert META.serial_number == 2
    assert META.subject.rfc4514_string() == f"CN=derpkey{SERVER_KEY}"
    assert META.not_valid_before_utc == datetime(2026, 10, 23, 12, tzinfo=UTC)
    assert META.not_valid_after_utc == datetime(2026, 12, 22, 12, tzinfo=UTC)
    assert META.signature_algorithm_oid.dotted_string == "1.3.101.112"
    assert not META.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    META.verify_directly_issued_by(META)
    assert certs.is_meta(META)
    assert certs.meta_key(META) == (SERVER_KEY, 2)


def test_other_certificates_are_not_meta(pair: CertificatePair) -> None:
    assert not certs.is_meta(pair.leaf)
    assert certs.meta_key(pair.leaf) is None
    damaged = issued("derpkey0123", "x").leaf
    assert certs.is_meta(damaged)
    assert certs.meta_key(damaged) is None


def test_of_several_common_names_the_last_counts_as_in_go() -> None:
    names = [x509.NameAttribute(NameOID.COMMON_NAME, name) for name in ("a.example", "derpkey.example")]
    key = ec.generate_private_key(ec.SECP256R1())
    builder = x509.CertificateBuilder(subject_name=x509.Name(names), issuer_name=x509.Name(names[:1]), serial_number=7)
    builder = builder.public_key(key.public_key()).not_valid_before(NOW).not_valid_after(NOW + timedelta(days=1))
    assert certs.is_meta(builder.sign(key, hashes.SHA256()))


def test_pin_is_of_the_whole_certificate(pair: CertificatePair) -> None:
    want = "sha256-raw:" + pair.leaf.fingerprint(hashes.SHA256()).hex()
    assert certs.pin(pair.leaf) == want


def test_load_pair_returns_what_it_was_given(pair: CertificatePair) -> None:
    assert certs.load_pair(pair.cert_pem, pair.key_pem) == pair
    assert "PRIVATE" not in repr(pair)


def test_load_pair_takes_a_chain_with_the_leaf_first(pair: CertificatePair) -> None:
    other = certs.self_signed(["ca.example"], now=NOW)
    loaded = certs.load_pair(pair.cert_pem + other.cert_pem, pair.key_pem)
    assert loaded.chain == (pair.leaf, other.leaf)
    with pytest.raises(CertificateError, match=r"tls.crt must start with the certificate of tls.key"):
        certs.load_pair(other.cert_pem + pair.cert_pem, pair.key_pem)


def encrypted(pair: CertificatePair) -> bytes:
    key = serialization.load_pem_private_key(pair.key_pem, None)
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.BestAvailableEncryption(b"x")
    )


def unusual(pair: CertificatePair) -> bytes:
    return dsa.generate_private_key(1024).private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


@pytest.mark.parametrize(
    ("cert_pem", "key_pem", "sentence"),
    [
        (lambda p: b"", lambda p: p.key_pem, "c.pem holds no certificate in PEM"),
        (lambda p: p.key_pem, lambda p: p.key_pem, "c.pem holds no certificate in PEM"),
        (lambda p: p.cert_pem[:100], lambda p: p.key_pem, "c.pem holds no certificate in PEM"),
        (lambda p: p.cert_pem.replace(b"MII", b"AAA", 1), lambda p: p.key_pem, "c.pem holds no certificate in PEM"),
        (lambda p: p.cert_pem, lambda p: b"", "k.pem holds no private key in PEM"),
        (lambda p: p.cert_pem, lambda p: p.cert_pem, "k.pem holds no private key in PEM"),
        (lambda p: p.cert_pem, encrypted, "k.pem is encrypted"),
        (lambda p: p.cert_pem, unusual, "k.pem is a key of a kind that TLS clients do not take"),
        (lambda p: p.cert_pem, lambda p: issued("a", "b").key_pem, "k.pem is not the key of the certificate in c.pem"),
    ],
)
def test_load_pair_says_what_is_wrong(
    pair: CertificatePair,
    cert_pem: Callable[[CertificatePair], bytes],
    key_pem: Callable[[CertificatePair], bytes],
    sentence: str,
) -> None:
    with pytest.raises(CertificateError) as error:
        certs.load_pair(cert_pem(pair), key_pem(pair), cert="c.pem", key="k.pem")
    assert str(error.value).startswith(sentence)


def test_load_pair_refuses_a_leaf_that_clients_skip() -> None:
    bad = issued("derpkey.example", "x")
    with pytest.raises(CertificateError, match='starts with "derpkey"'):
        certs.load_pair(bad.cert_pem, bad.key_pem)


def test_read_pair(pair: CertificatePair, tmp_path: Path) -> None:
    cert, key = tmp_path / "a.crt", tmp_path / "a.key"
    cert.write_bytes(pair.cert_pem)
    with pytest.raises(CertificateError) as error:
        certs.read_pair(cert, key)
    assert str(error.value) == f"{key} cannot be read: No such file or directory."
    key.write_bytes(pair.key_pem)
    assert certs.read_pair(cert, key) == pair


@given(st.binary(max_size=200), st.binary(max_size=200))
def test_rubbish_raises_nothing_but_certificate_errors(cert_pem: bytes, key_pem: bytes) -> None:
    with pytest.raises(CertificateError):
        certs.load_pair(b"-----BEGIN CERTIFICATE-----\n" + cert_pem + b"\n-----END CERTIFICATE-----\n", key_pem)


def test_check_says_when_and_for_what(pair: CertificatePair) -> None:
    leaf = pair.leaf
    certs.check(leaf, now=NOW)
    certs.check(leaf, now=NOW - timedelta(minutes=59), name=NAME)
    with pytest.raises(CertificateError) as error:
        certs.check(leaf, now=NOW + timedelta(days=366), source="a.crt")
    assert str(error.value) == "a.crt expired on 2027-11-22 12:00 UTC; renew it."
    with pytest.raises(CertificateError) as error:
        certs.check(leaf, now=NOW - timedelta(hours=2), source="a.crt")
    assert str(error.value) == "a.crt is not valid before 2026-11-22 11:00 UTC; is the clock right?"
    with pytest.raises(CertificateError) as error:
        certs.check(leaf, now=NOW, name="other.example", source="a.crt")
    assert str(error.value) == f"a.crt is not for other.example; it is for {NAME}, 198.18.0.7, 2001:db8::7."
    with pytest.raises(CertificateError, match="it is for no name at all"):
        certs.check(issued("plain.example", "x").leaf, now=NOW, name="plain.example")


@pytest.mark.parametrize(
    ("pattern", "name", "expected"),
    [
        ("derp.example", "derp.example", True),
        ("derp.example", "DERP.Example", True),
        ("derp.example", "derp.example.", True),
        ("derp.example", "a.derp.example", False),
        ("*.derp.example", "a.derp.example", True),
        ("*.derp.example", "a.b.derp.example", False),
        ("*.derp.example", "derp.example", False),
        ("198.18.0.7", "198.18.0.7", True),
        ("198.18.0.7", "198.18.0.8", False),
        ("2001:db8::7", "2001:db8:0::7", True),
    ],
)
def test_names_match_as_in_go(pattern: str, name: str, expected: bool) -> None:
    assert certs.matches(certs.self_signed([pattern], now=NOW).leaf, name) is expected


def test_is_self_signed_compares_subject_and_issuer() -> None:
    assert not certs.is_self_signed(issued("a.example", "an authority").leaf)
    assert certs.is_self_signed(META)


def test_verify_pin_accepts_what_clients_accept(pair: CertificatePair) -> None:
    leaf, want = pair.leaf, certs.pin(pair.leaf)
    for presented in ([leaf], [leaf, META], [META, leaf]):
        certs.verify_pin(presented, want, server_name=NAME, now=NOW)
        certs.verify_pin(presented, want.removeprefix("sha256-raw:"), server_name="", now=NOW)
    certs.verify_pin([leaf], want, server_name="198.18.0.7", now=NOW)


def test_verify_pin_without_a_time_takes_any_dates(pair: CertificatePair) -> None:
    leaf = pair.leaf
    for now in (leaf.not_valid_before_utc - certs.YEAR, leaf.not_valid_after_utc + certs.YEAR):
        with pytest.raises(CertificateError):
            certs.verify_pin([leaf], certs.pin(leaf), server_name=NAME, now=now)
    certs.verify_pin([leaf], certs.pin(leaf), server_name=NAME, now=None)


def test_verify_pin_refuses_what_clients_refuse(pair: CertificatePair) -> None:
    leaf, want = pair.leaf, certs.pin(pair.leaf)
    other = certs.self_signed([NAME], now=NOW).leaf

    def refused(presented: list[x509.Certificate], pin: str = want, name: str = NAME, now: datetime = NOW) -> str:
        with pytest.raises(CertificateError) as error:
            certs.verify_pin(presented, pin, server_name=name, now=now)
        return str(error.value)

    assert refused([]) == refused([META]) == "The server presented no certificate."
    assert refused([leaf, other]) == "The server presented 2 certificates; a pin allows exactly one."
    assert refused([other]) == f"The server's certificate is {certs.pin(other)}, not {want}."
    assert "not sha256-raw:0" in refused([leaf], pin="sha256-raw:" + "0" * 64)
    digits = want.removeprefix("sha256-raw:")
    assert "not sha256-raw:" + digits.upper() in refused([leaf], pin="sha256-raw:" + digits.upper())
    assert "is not for elsewhere.example" in refused([leaf], name="elsewhere.example")
    assert "expired" in refused([leaf], now=NOW + timedelta(days=400))
    assert "not valid before" in refused([leaf], now=NOW - timedelta(days=1))
