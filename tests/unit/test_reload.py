"""Files that cannot be used now, and later can: the relay waits for them, tries again, and minds everything else."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.x509.oid import NameOID

from derper import certs, files
from derper.config import parse_flags
from derper.files import FileError, Watched
from derper.state import RelayState

HOST = "relay.example"


class Clock:
    def __init__(self) -> None:
        self.now = datetime.now(UTC)

    def __call__(self) -> datetime:
        return self.now


def state_of(folder: Path, clock: Clock, key: Path | None = None) -> RelayState:
    flags = ["-a", ":8443", "-certmode", "manual", "-certdir", str(folder), "-hostname", HOST]
    return RelayState(parse_flags([*flags, "-c", str(key or folder / "derper.key")], {}, is_root=False), clock)


def put(folder: Path, cert_pem: bytes, key_pem: bytes) -> None:
    (folder / f"{HOST}.crt").write_bytes(cert_pem)
    (folder / f"{HOST}.key").write_bytes(key_pem)


def good(folder: Path, now: datetime) -> None:
    pair = certs.self_signed([HOST], now=now)
    put(folder, pair.cert_pem, pair.key_pem)


def small(folder: Path, now: datetime) -> None:
    """A pair that fits, with a key that OpenSSL does not take."""
    key = rsa.generate_private_key(65537, 1024)
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, HOST)])
    builder = x509.CertificateBuilder(name, name, key.public_key(), 1, now, now + timedelta(days=1))
    builder = builder.add_extension(x509.SubjectAlternativeName([x509.DNSName(HOST)]), critical=False)
    put(
        folder,
        builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM),
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()),
    )


def test_a_certificate_becomes_valid(tmp_path: Path) -> None:
    clock = Clock()
    good(tmp_path, clock.now)
    state = state_of(tmp_path, clock)
    state.load_all()
    first = state.pairs
    good(tmp_path, clock.now + timedelta(hours=1, seconds=5))  # from five seconds hence
    assert state.poll() + state.poll() == []
    assert "not valid before" in state.problems[0]
    clock.now += timedelta(seconds=4)
    assert state.poll() == []
    assert state.pairs is first
    clock.now += timedelta(seconds=2)
    assert state.poll() == ["certificates"]
    assert not state.problems
    assert state.pairs is not first


def test_a_certificate_that_openssl_refuses(tmp_path: Path) -> None:
    clock = Clock()
    small(tmp_path, clock.now)
    with pytest.raises(FileError, match=rf"OpenSSL refuses .*{HOST}.crt: EE_KEY_TOO_SMALL"):
        state_of(tmp_path, clock).load_all()
    good(tmp_path, clock.now)
    state = state_of(tmp_path, clock)
    state.load_all()
    first = state.pairs
    small(tmp_path, clock.now)
    assert state.poll() + state.poll() == []
    assert "OpenSSL refuses" in state.problems[0]
    assert state.pairs is first


def test_what_fails_is_tried_again_and_told_once(tmp_path: Path) -> None:
    problems = ["too many open files", "too many open files", "something else", ""]
    applied: list[str] = []

    def load() -> str:
        if problem := problems.pop(0):
            raise FileError(problem)
        return "loaded"

    watched = Watched("thing", lambda: [tmp_path / "thing"], load, applied.append)
    assert [watched.poll() for _ in range(4)] == [True, False, True, True]
    assert watched.failures == 2
    assert applied == ["loaded"]
    assert watched.poll() is False


def test_names_that_are_too_long(tmp_path: Path) -> None:
    """As a folder that is closed to us: not even whether the file exists can be told."""
    name = "x" * 300
    with pytest.raises(FileError, match=r"^cannot make the key file .*: file name too long$"):
        files.make_key(tmp_path / name)
    with pytest.raises(FileError, match=r"^cannot write the certificate .*: file name too long$"):
        files.make_ip_certificate(tmp_path / name / "127.0.0.1", "127.0.0.1", Clock().now)
    with pytest.raises(FileError, match=r"there is none for relay\.example"):
        state_of(tmp_path / name, Clock(), key=tmp_path / "derper.key").load_all()
