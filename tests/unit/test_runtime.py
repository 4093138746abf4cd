"""The process around a relay."""

from __future__ import annotations

import resource
import ssl
import sys
from datetime import UTC, datetime
from struct import pack
from types import SimpleNamespace
from typing import Any

import pytest

from derper import runtime
from derper.net.tls import ServerTLS

from .loopback import HOST_NAME, pair_for


def client_hello(name: bytes) -> bytes:
    """TLS 1.3, x25519, ecdsa_secp256r1_sha256, and whatever name."""
    extensions = (
        pack(">HHHBH", 0, len(name) + 5, len(name) + 3, 0, len(name))
        + name
        + bytes.fromhex("000a00040002001d 000d000400020403 002b0003020304 003300260024001d0020")
        + bytes(range(32))
    )
    body = b"\3\3" + bytes(33) + b"\0\2\x13\1\1\0" + pack(">H", len(extensions)) + extensions
    return b"\x16\3\1" + pack(">HBBH", len(body) + 4, 1, 0, len(body)) + body


@pytest.mark.parametrize("name", [b"\xff\xfe.example", b"caf\xc3\xa9.example"])
def test_a_name_that_is_not_ascii_is_no_traceback(name: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Any] = []
    monkeypatch.setattr(sys, "unraisablehook", runtime.report_unraisable)
    monkeypatch.setattr(sys, "__unraisablehook__", told.append)
    tls = ServerTLS("00" * 32)
    tls.load([pair_for(HOST_NAME)], datetime.now(UTC))
    assert tls.context is not None
    sent = ssl.MemoryBIO()
    sent.write(client_hello(name))
    with pytest.raises(ssl.SSLError):
        tls.context.wrap_bio(sent, ssl.MemoryBIO(), server_side=True).do_handshake()
    assert not told


def test_what_else_cannot_be_raised_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Any] = []
    monkeypatch.setattr(sys, "__unraisablehook__", told.append)
    problem: Any = SimpleNamespace(exc_value=ValueError("from a destructor"), object=object())
    runtime.report_unraisable(problem)
    assert told == [problem]


def test_as_many_files_as_allowed() -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(1024, before[1]), before[1]))
        runtime.raise_file_limit()
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (before[1], before[1])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
