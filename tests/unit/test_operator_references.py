"""What users provide: certificates for their names, and lists of clients."""

from __future__ import annotations

from datetime import datetime, timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from derp_operator.references import clients_finding, host_names
from derp_operator.spec import Region

from derper import certs

from .operatorkit import NOW, region


def wanted(*secrets: str, pin: str = "Auto") -> Region:
    certificates = [{"secretName": name} for name in secrets or ("tls",)]
    template = "{pod}.derp.example.com"
    return region(tls={"hostName": "Template", "hostNameTemplate": template, "certificates": certificates, "pin": pin})


def secret(*hosts: str) -> dict[str, bytes]:
    pair = certs.self_signed(hosts, now=NOW, lifetime=timedelta(days=30))
    return {"tls.crt": pair.cert_pem, "tls.key": pair.key_pem}


def issued(host: str, now: datetime = NOW) -> dict[str, bytes]:
    """A certificate that somebody else signed."""
    key = ec.generate_private_key(ec.SECP256R1())

    def name(text: str) -> x509.Name:
        return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])

    certificate = (
        x509.CertificateBuilder()
        .subject_name(name("leaf"))
        .issuer_name(name("authority"))
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(host)]), critical=False)
        .sign(key, hashes.SHA256())
    )
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return {"tls.crt": certificate.public_bytes(serialization.Encoding.PEM), "tls.key": private}


WILD = "*.derp.example.com"


def test_one_certificate_for_all_or_several() -> None:
    found, problems = host_names(wanted(), {"tls": secret(WILD)}, NOW)
    assert not problems
    assert found["berlin-2"].name == "berlin-2.derp.example.com"
    several = {f"tls{i}": secret(f"berlin-{i}.derp.example.com") for i in range(3)}
    found, problems = host_names(wanted(*several), several, NOW)
    assert not problems
    assert len({item.pin for item in found.values()}) == 3


@pytest.mark.parametrize(
    ("pin", "own", "pinned"),
    [("Auto", True, True), ("Auto", False, False), ("Always", False, True), ("Never", True, False)],
)
def test_pins(pin: str, own: bool, pinned: bool) -> None:
    found, problems = host_names(wanted(pin=pin), {"tls": secret(WILD) if own else issued(WILD)}, NOW)
    assert not problems
    assert bool(found["berlin-0"].pin) == pinned


def test_a_missing_secret_is_named() -> None:
    found, problems = host_names(wanted(), {"tls": None}, NOW)
    assert not found
    assert [(item.reason, item.blocked) for item in problems] == [("SecretNotFound", True)]
    assert "Secret tls, which spec.tls.certificates names, does not exist" in problems[0].message


def test_a_certificate_for_another_name_is_told_with_all_names() -> None:
    found, problems = host_names(wanted(), {"tls": secret("www.example.com", "berlin-1.derp.example.com")}, NOW)
    assert list(found) == ["berlin-1"]
    assert [item.reason for item in problems] == ["CertificateInvalid"]
    message = problems[0].message
    for part in ("Secret tls", "www.example.com", "berlin-0.derp.example.com", "berlin-2.derp.example.com"):
        assert part in message


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({}, "tls.crt holds no certificate"),
        (secret(WILD) | {"tls.key": b"x"}, "tls.key holds no private key"),
        (secret(WILD) | {"tls.key": secret(WILD)["tls.key"]}, "not the key of the certificate"),
        (secret(WILD), "expired"),
    ],
)
def test_a_bad_certificate_is_told(data: dict[str, bytes], words: str) -> None:
    now = NOW + timedelta(days=60) if words == "expired" else NOW
    found, problems = host_names(wanted(), {"tls": data}, now)
    assert not found
    assert [item.reason for item in problems] == ["CertificateInvalid"]
    assert problems[0].message.startswith("Secret tls: ")
    assert words in problems[0].message


@pytest.mark.parametrize(
    ("pin", "own", "good"),
    [("Auto", True, False), ("Auto", False, True), ("Always", False, False), ("Never", True, True)],
)
def test_a_pin_allows_no_chain(pin: str, own: bool, good: bool) -> None:
    data = secret(WILD) if own else issued(WILD)
    data["tls.crt"] += secret("authority.example.com")["tls.crt"]
    found, problems = host_names(wanted(pin=pin), {"tls": data}, NOW)
    assert bool(found) == good
    assert [(item.reason, item.blocked) for item in problems] == ([] if good else [("CertificateInvalid", True)])
    if not good:
        assert "Secret tls: tls.crt holds 2 certificates" in problems[0].message


@pytest.mark.parametrize(
    ("option", "kind", "reason"),
    [("configMapKeyRef", "ConfigMap", "ConfigMapNotFound"), ("secretKeyRef", "Secret", "SecretNotFound")],
)
def test_lists_of_clients(option: str, kind: str, reason: str) -> None:
    asked = region(clients={"keysFrom": {option: {"name": "clients", "key": "keys"}}})
    missing = clients_finding(asked, None)
    assert missing
    assert (missing.reason, missing.blocked) == (reason, True)
    assert f"{kind} clients, which spec.clients.keysFrom names, does not exist" in missing.message
    empty = clients_finding(asked, {"other": b""})
    assert empty
    assert f"{kind} clients has no key keys" in empty.message
    assert clients_finding(asked, {"keys": b""}) is None
    assert clients_finding(region(), None) is None
