"""The settings file of a region."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator

from derper.settings import Settings, SettingsError, parse_settings

from ..target import Target, outcome_of

NODE = {
    "serverKey": "nodekey:" + "ab" * 32,
    "hostName": "berlin-0-g1.derp.internal",
    "certName": "sha256-raw:" + "0" * 64,
    "dial": "[::1]:8443",
    "certificates": ["/etc/derper/secret/berlin-0.g1"],
}
EXAMPLE = {
    "region": "berlin",
    "nodes": {"berlin-0": NODE},
    "admission": {"open": False, "urls": ["https://example.com/verify"], "keyFile": "/keys", "failOpen": True},
    "limits": {"acceptPerSecond": 1.5, "acceptBurst": 3, "clientBytesPerSecond": 1000, "clientBurstBytes": 2000},
}


def run(data: bytes) -> None:
    """Settings or one sentence; numbers that are usable; the same bytes mean the same."""
    found = outcome_of(lambda: parse_settings(data), SettingsError)
    if not isinstance(found, Settings):
        return
    assert found == parse_settings(data)
    assert found.digest == hashlib.sha256(data).hexdigest()
    for node in found.nodes.values():
        assert 0 < node.dial_port < 65536
        assert node.dial_host
    limits = found.limits
    assert limits.client_bucket(0.0) is None or limits.client_bytes_per_second > 0
    assert limits.accept_per_second >= 0


def seeds() -> Iterator[bytes]:
    yield json.dumps(EXAMPLE).encode()
    for text in (
        "{}",
        "[]",
        '{"nodes":{"a":{}}}',
        '{"limits":{"acceptPerSecond":1e400}}',
        '{"limits":{"acceptBurst":NaN}}',
    ):
        yield text.encode()
    for dial in ("x", "x:0", "x:65536", ":1", "[::1]:1", "x:१"):
        yield json.dumps({"nodes": {"a": NODE | {"dial": dial}}}).encode()
    yield b"[" * 3000


TARGET = Target(run, seeds)
