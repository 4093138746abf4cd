"""Command lines, arguments separated by line breaks."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from derper.config import UsageError, VersionWanted, parse_flags
from derper.goflag import HelpWanted

from ..target import Target


def run(data: bytes) -> None:
    """A configuration or a sentence; the same with one dash or two."""
    arguments = data.decode("utf-8", "surrogateescape").split("\n")
    with contextlib.suppress(UsageError, HelpWanted, VersionWanted):
        config = parse_flags(arguments, {"HOME": "/nowhere"}, is_root=True)
        assert 0 <= config.listen_port <= 65535
        assert -1 <= config.http_port <= 65535
        for seconds in (config.tcp_keep_alive, config.tcp_user_timeout, config.write_timeout):
            assert seconds >= 0
        assert config.accept_per_second >= 0
        assert all(0 <= host.port <= 65535 for host in config.mesh_with)
        assert not config.proxy_protocol or config.trusted_proxies


def seeds() -> Iterator[bytes]:
    lines = [
        "-a=:443\n-certmode=manual\n-hostname=example.com",
        "--dev",
        "-a\n[::1]:3340\n-http-port\n-1\n-stun=false",
        "-dev\n-tcp-keepalive-time=1h2m3.5s\n-tcp-write-timeout=0\n-tcp-user-timeout=1us",
        "-dev\n-mesh-psk-file=/k\n-mesh-with=a.example.com,b.example.com/10.0.0.1,[::1]:8443",
        "-dev\n-verify-client-url=https://a/b,https://c\n-verify-client-url-fail-open",
        "-dev\n-accept-connection-limit=+Inf\n-accept-connection-burst=10",
        "-dev\n-accept-connection-limit=nan",
        "-settings=/s\n-node=a\n-metrics-addr=:9090",
        "-dev\n-trusted-proxies=10.0.0.0/8,::1\n-proxy-protocol",
        "-dev\n-home=https://example.com/",
        "-acme-email=a@example.com\n-ace=false",
        "-dev\n-bootstrap-dns-names=a,b\n-unpublished-bootstrap-dns-names=c/50",
    ]
    for line in lines:
        yield line.encode()
    yield b"-a=\xff:1"
    yield b"-dev\n-h"
    yield b"-version"


TARGET = Target(run, seeds, longest=512)
