"""Flags: stock derper's, in Go's spelling, and one sentence for each mistake."""

from __future__ import annotations

import contextlib
import math
import re
from datetime import UTC, datetime
from ipaddress import ip_network
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from derper import cli
from derper.config import Config, HelpWanted, MeshHost, UsageError, VersionWanted, parse_flags, usage
from derper.state import RelayState

KEY = ("-c", "/tmp/derper.key")
MANUAL = (*KEY, "-certmode", "manual")


def parse(*arguments: str, is_root: bool = False, **environ: str) -> Config:
    return parse_flags(arguments, {"HOME": "/home/x", **environ}, is_root=is_root)


def test_defaults() -> None:
    config = parse(*MANUAL)
    assert config == Config(
        key_path="/tmp/derper.key", cert_mode="manual", cert_dir="/home/x/.cache/tailscale/derper-certs"
    )
    assert (config.listen_host, config.listen_port, config.http_port, config.stun_port) == ("", 443, 80, 3478)
    assert config.tls


def test_roots_key_and_the_cache_directory() -> None:
    config = parse("-certmode=manual", is_root=True, XDG_CACHE_HOME="/cache")
    assert config.key_path == "/var/lib/derper/derper.key"
    assert config.cert_dir == "/cache/tailscale/derper-certs"


@pytest.mark.parametrize(
    "spelling", [("-stun-port", "1234"), ("--stun-port", "1234"), ("-stun-port=1234",), ("--stun-port=1234",)]
)
def test_spellings_of_a_flag(spelling: tuple[str, ...]) -> None:
    assert parse(*MANUAL, *spelling).stun_port == 1234


@pytest.mark.parametrize(
    ("spelling", "value"),
    [
        (("-stun",), True),
        (("--stun",), True),
        (("-stun=false",), False),
        (("-stun=0",), False),
        (("-stun=F",), False),
        (("-stun=true",), True),
        (("-stun=false", "-stun"), True),
    ],
)
def test_spellings_of_a_switch(spelling: tuple[str, ...], value: bool) -> None:
    assert parse(*MANUAL, *spelling).stun is value


@pytest.mark.parametrize(
    ("arguments", "changes"),
    [
        (("-a", "127.0.0.1:8443"), {"listen_host": "127.0.0.1", "listen_port": 8443}),
        (("-a", "[::1]:8443"), {"listen_host": "::1", "listen_port": 8443}),
        (("-a", ":0"), {"listen_host": "", "listen_port": 0}),
        (("-a", ":"), {"listen_host": "", "listen_port": 0}),
        (("-a", "localhost:https"), {"listen_host": "localhost", "listen_port": 443}),
        (("-a", "[fe80::1%eth0]:8443"), {"listen_host": "fe80::1%eth0", "listen_port": 8443}),
        (("-http-port", "0x50"), {"http_port": 80}),
        (("-stun-port", "-7"), {"stun_port": -1}),
        (("-tcp-keepalive-time", "0"), {"tcp_keep_alive": 0.0}),
        (("-tcp-keepalive-time", "-1s"), {"tcp_keep_alive": -1.0}),
        (("-metrics-addr", "127.0.0.1:0"), {"metrics_host": "127.0.0.1", "metrics_port": 0}),
        (("-stun", "--"), {}),
        (("-http-port", "-1"), {"http_port": -1}),
        (("-certdir", "/certs"), {"cert_dir": "/certs"}),
        (("-hostname", "derp.example.com"), {"hostname": "derp.example.com"}),
        (("-hostname", "192.0.2.1"), {"hostname": "192.0.2.1"}),
        (("-hostname", "2001:DB8::1"), {"hostname": "2001:db8::1"}),
        (("-derp=false",), {"derp": False}),
        (("-home", "blank"), {"home": "blank"}),
        (("-home", "https://example.com"), {"home": "https://example.com"}),
        (("-mesh-psk-file", "/mesh"), {"mesh_key_path": "/mesh"}),
        (("-verify-client-url", "https://x/verify"), {"verify_urls": ("https://x/verify",)}),
        (("-verify-client-url-fail-open",), {"verify_fail_open": True}),
        (("-accept-connection-limit", "+Inf"), {"accept_per_second": math.inf}),
        (("-accept-connection-limit", "2.5"), {"accept_per_second": 2.5}),
        (("-accept-connection-burst", "10"), {"accept_burst": 10}),
        (("-rate-config", "/rate"), {"rate_config": "/rate"}),
        (("-tcp-keepalive-time", "10m"), {"tcp_keep_alive": 600.0}),
        (("-tcp-user-timeout", "1m30s"), {"tcp_user_timeout": 90.0}),
        (("-tcp-write-timeout", "1.5s"), {"write_timeout": 1.5}),
        (("-tcp-write-timeout", "250ms"), {"write_timeout": 0.25}),
        (("-tcp-write-timeout", "0"), {"write_timeout": 0.0}),
        (("-metrics-addr", ":9090"), {"metrics_host": "", "metrics_port": 9090}),
        (
            ("-verify-client-url", "https://x/a,b,http://y/"),
            {"verify_urls": ("https://x/a,b", "http://y/")},
        ),
        (("-admission-keys", "/a, /b"), {"admission_keys": ("/a", "/b")}),
        (("-verify-clients=false",), {}),
        (("-verify-clients", "-socket", "/s"), {"verify_clients": True, "tailscaled_socket": "/s"}),
        (("-bootstrap-dns-names", "a.example,b.example"), {"bootstrap_dns": ("a.example", "b.example")}),
        (("-unpublished-bootstrap-dns-names", "a.example/t"), {"unpublished_dns": ("a.example/t",)}),
        (("-status-socket", "/run/s"), {"status_socket": "/run/s"}),
        (
            ("-trusted-proxies", "198.51.100.7,2001:db8::/32", "-proxy-protocol"),
            {"trusted_proxies": (ip_network("198.51.100.7"), ip_network("2001:db8::/32")), "proxy_protocol": True},
        ),
        (("-acme-email", "a@example.com", "-secrets-cache-dir", "/x", "-acme-ip-certs=false"), {}),
    ],
)
def test_values(arguments: tuple[str, ...], changes: dict[str, Any]) -> None:
    config, plain = parse(*MANUAL, *arguments), parse(*MANUAL)
    assert {name: getattr(config, name) for name in Config.__slots__} == {
        **{name: getattr(plain, name) for name in Config.__slots__},
        **changes,
    }


def test_mesh_hosts() -> None:
    config = parse(
        *MANUAL,
        "-mesh-psk-file",
        "/mesh",
        "-mesh-with",
        "a.example.com, b.example.com/10.0.0.2,c:8443,[::1]:1,,c:8443/[::2],::3",
    )
    assert config.mesh_with == (
        MeshHost("a.example.com", 443, "a.example.com"),
        MeshHost("b.example.com", 443, "10.0.0.2"),
        MeshHost("c", 8443, "c"),
        MeshHost("::1", 1, "::1"),
        MeshHost("c", 8443, "::2"),
        MeshHost("::3", 443, "::3"),
    )
    names = ["a.example.com", "b.example.com/10.0.0.2", "c:8443", "[::1]:1", "c:8443/::2", "[::3]"]
    assert [entry.name for entry in config.mesh_with] == names


def test_the_mesh_key_of_a_development_relay() -> None:
    """From the environment and nowhere else, as with stock derper."""
    key = "ab" * 32
    config = parse("-dev", "-mesh-psk-file", "/mesh", "-mesh-with", "a", TAILSCALE_DERPER_MESH_KEY=key)
    assert (config.mesh_key, config.mesh_key_path) == (key, "")
    assert key not in repr(config)
    assert parse(*MANUAL, TAILSCALE_DERPER_MESH_KEY=key).mesh_key == ""
    with pytest.raises(UsageError, match=r"^-mesh-with requires TAILSCALE_DERPER_MESH_KEY$"):
        parse("-dev", "-mesh-psk-file", "/mesh", "-mesh-with", "a")


@pytest.mark.parametrize(
    ("arguments", "tls"),
    [
        (("-a", ":443", "-certmode", "manual"), True),
        (("-a", ":8443", "-certmode", "manual"), True),
        (("-a", ":8080"), False),
        (("-dev",), False),
        (("-settings", "/s", "-node", "n", "-a", ":8443"), True),
    ],
)
def test_when_it_is_tls(arguments: tuple[str, ...], tls: bool) -> None:
    assert parse(*KEY, *arguments).tls is tls


def test_the_mesh_key_where_stock_derper_looks_for_it(tmp_path: Path) -> None:
    usual = tmp_path / "keys" / "derp-mesh.key"
    usual.parent.mkdir()
    usual.write_text("ab" * 32)
    assert parse(*MANUAL, HOME=str(tmp_path)).mesh_key_path == str(usual)
    assert parse(*MANUAL, "-mesh-with", "a.example.com", HOME=str(tmp_path)).mesh_with
    assert parse(*MANUAL, "-mesh-psk-file", "/other", HOME=str(tmp_path)).mesh_key_path == "/other"
    assert parse(*MANUAL, "-mesh-psk-file", "", HOME=str(tmp_path)).mesh_key_path == ""
    assert parse("-dev", HOME=str(tmp_path)).mesh_key_path == ""
    assert parse(*MANUAL, "-settings", "/s", "-node", "n", HOME=str(tmp_path)).mesh_key_path == ""


def test_an_accept_limit_without_a_burst_is_none() -> None:
    """As with stock derper, whose default burst is without bounds."""
    for flags, expected in (((), (math.inf, 1)), (("-accept-connection-burst", "5"), (20.0, 5))):
        config = parse(*MANUAL, "-accept-connection-limit", "20", *flags)
        limits = RelayState(config, lambda: datetime.now(UTC)).limits
        assert (limits.accept_per_second, limits.accept_burst) == expected


def test_dev() -> None:
    """As stock derper: whatever -a and -c say."""
    config = parse("-dev")
    assert (config.listen_port, config.http_port, config.key_path, config.dev) == (3340, 80, "", True)
    assert parse("-dev", "-a", "127.0.0.1:4000", "-c", "/x", "-mesh-psk-file", "/y") == config


LETSENCRYPT = (
    "-certmode letsencrypt is not supported: use -certmode manual with certificates in -certdir"
    " (from cert-manager, certbot or lego; they are reloaded), or with an IP address as -hostname"
)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("-hostname", "a b"), "-hostname must be a DNS name or an IP address, not 'a b'"),
        (("--hostname", "a b"), "-hostname must be a DNS name or an IP address, not 'a b'"),
        (("-hostname", ""), "-hostname must be a DNS name or an IP address, not ''"),
        (("-hostname", "x" * 64), f"-hostname must be a DNS name or an IP address, not '{'x' * 64}'"),
        (("-a", "443"), '-a must be an address such as ":443", "127.0.0.1:443" or "[::1]:443", not \'443\''),
        (("-a", "::1:443"), '-a must be an address such as ":443", "127.0.0.1:443" or "[::1]:443", not \'::1:443\''),
        (("-a", ":-1"), "-a must be an address with a port from 0 to 65535, not ':-1'"),
        (("-a", ":65536"), "-a must be an address with a port from 0 to 65535, not ':65536'"),
        (("-a", ":no-such-service"), "-a must be an address with a port from 0 to 65535, not ':no-such-service'"),
        (("-stun-port", "70000"), "-stun-port must be a port from 0 to 65535, or -1 for none, not '70000'"),
        (("-tcp-user-timeout", "-1s"), "-tcp-user-timeout must be a duration that is not negative, not '-1.0'"),
        (("-home", "x"), "-home must be empty, \"blank\", or a URL that starts with http:// or https://, not 'x'"),
        (
            ("-verify-client-url", "x"),
            "-verify-client-url must be one or more URLs that start with http:// or https://, separated by commas,"
            " not 'x'",
        ),
        (
            ("-trusted-proxies", "198.51.100.7/24"),
            "-trusted-proxies must be IP addresses or networks such as 198.51.100.0/24, separated by commas,"
            " not '198.51.100.7/24'",
        ),
        (
            ("-proxy-protocol",),
            "-proxy-protocol needs -trusted-proxies: anybody else could claim any address",
        ),
        (
            ("-accept-connection-limit", "nan"),
            "-accept-connection-limit must be a number that is not negative, not 'nan'",
        ),
        (
            ("-accept-connection-burst", "-1"),
            "-accept-connection-burst must be a number that is not negative, not '-1'",
        ),
        (
            ("-mesh-with", "a/b/c"),
            "-mesh-with must be a list of HOST or HOST/DIAL-HOST; 'a/b/c' has too many parts, not 'a/b/c'",
        ),
        (
            ("-mesh-with", "a:0"),
            "-mesh-with must be a list of HOST or HOST/DIAL-HOST; 'a:0' has no port to dial, not 'a:0'",
        ),
        (("-mesh-with", "a/b:1"), "-mesh-with must be a DNS name or an IP address, not 'a/b:1'"),
        (("-mesh-with", "a b"), "-mesh-with must be a DNS name or an IP address, not 'a b'"),
        (("-mesh-with", "a"), "-mesh-with requires -mesh-psk-file"),
        (("-certmode", "wat"), "-certmode must be manual, not 'wat'"),
        (("-certmode", "letsencrypt"), LETSENCRYPT),
        (("-ace",), "-ace is not supported: this version has no ACE server"),
        (
            ("-secrets-url", "https://x"),
            "-secrets-url is not supported: put the mesh key into a file and name it in -mesh-psk-file",
        ),
        (("-admission-keys", " ,"), "-admission-keys must be one or more files, separated by commas, not ' ,'"),
        (("-admission-keys=",), "-admission-keys must be one or more files, separated by commas, not ''"),
        (("-node", "x"), "-node only goes with -settings"),
        (("-settings", "/s"), "-settings needs -node, the name of this relay in the settings file"),
        (
            ("-settings", "/s", "-node", "n", "-verify-clients"),
            "-settings says what -mesh-with, -verify-clients, -verify-client-url, -admission-keys and -rate-config"
            " say; use one or the other",
        ),
    ],
)
def test_mistakes(arguments: tuple[str, ...], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse(*MANUAL, *arguments)
    assert (str(caught.value), caught.value.status) == (message, 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("-wat",), "flag provided but not defined: -wat; derper -help lists the flags"),
        (("-wat=x",), "flag provided but not defined: -wat; derper -help lists the flags"),
        (("serve",), "unexpected argument 'serve'; derper -help lists the commands and flags"),
        (("-",), "unexpected argument '-'; derper -help lists the commands and flags"),
        (("--", "-a"), "unexpected argument '-a'; derper -help lists the commands and flags"),
        (("-stun", "false"), "unexpected argument 'false': a switch takes its value behind '=', as in -stun=false"),
        (("---a", ":1"), "bad flag syntax: ---a; derper -help lists the flags"),
        (("-=1",), "bad flag syntax: -=1; derper -help lists the flags"),
        (("-a",), "flag needs an argument: -a"),
        (("-stun-port", "x"), 'invalid value "x" for flag -stun-port: it must be a whole number'),
        (("-stun=yes",), 'invalid boolean value "yes" for -stun: it must be true or false'),
        (("-accept-connection-limit", "x"), 'invalid value "x" for flag -accept-connection-limit: it must be a number'),
        (
            ("-tcp-write-timeout", "2"),
            'invalid value "2" for flag -tcp-write-timeout: it must be a duration such as 15s or 10m',
        ),
    ],
)
def test_what_gos_flag_package_refuses(arguments: tuple[str, ...], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse(*MANUAL, *arguments)
    assert (str(caught.value), caught.value.status) == (message, 2)


def test_help_and_version() -> None:
    """In the order of the line, as in Go; the version comes after everything has been read."""
    for arguments in (["-h"], ["-help"], ["--help=1"], ["-h", "-wat"], ["-version", "-h"]):
        with pytest.raises(HelpWanted):
            parse(*arguments)
    for arguments in (["-version"], ["--version=t"], ["-a", "nonsense", "-version"], ["-home", "-h", "-version"]):
        with pytest.raises(VersionWanted):
            parse(*arguments)
    for wrong in (["-wat", "-h"], ["-version", "-wat"], ["-version=false", "-wat"]):
        with pytest.raises(UsageError):
            parse(*wrong)


def test_without_a_home() -> None:
    for environ in ({}, {"XDG_CACHE_HOME": "relative"}):
        with pytest.raises(UsageError, match=r"^-certdir is missing: name the folder for the certificate$"):
            parse_flags(MANUAL, environ, is_root=False)
    with pytest.raises(UsageError, match="-certdir is missing"):
        parse(*MANUAL, "-certdir", "")


def test_an_empty_value_is_none() -> None:
    assert parse("-certmode=manual", "-c", "", is_root=True).key_path == "/var/lib/derper/derper.key"


def test_a_key_file_must_be_named() -> None:
    with pytest.raises(UsageError, match=r"^-c is missing: name the file for the server's private key$"):
        parse("-certmode", "manual")


def test_usage_names_every_flag() -> None:
    text = usage()
    assert "  -a " in text
    assert "-settings" in text
    assert "-acme-email" not in text


FLAGS = st.sampled_from([f"-{name}" for name in re.findall(r"^  -([a-z-]+)", usage(), re.MULTILINE)] + ["-ace"])
VALUES = st.text(max_size=8) | st.sampled_from(
    [":443", "[::1]:1", "1" * 5000, "-1", "manual", "1h", "a/b:1", "http://x", "\u0661", "1e400", ":" + "9" * 5000]
)


@given(st.lists(FLAGS | VALUES | st.tuples(FLAGS, VALUES).map("=".join), max_size=5))
def test_any_command_line_is_a_configuration_or_a_usage_error(arguments: list[str]) -> None:
    with contextlib.suppress(UsageError, HelpWanted, VersionWanted):
        parse(*arguments)


@pytest.mark.parametrize(
    ("arguments", "status", "out", "err"),
    [
        (["--hostname", "a b"], 1, "", "derper: -hostname must be a DNS name or an IP address, not 'a b'\n"),
        (["-stun=maybe"], 2, "", 'derper: invalid boolean value "maybe" for -stun: it must be true or false\n'),
        (["-help"], 0, "Usage: derper [flags]", ""),
        (["-version"], 0, "0.", ""),
        (["-c", "/proc/x/y", "-a", "127.0.0.1:0"], 1, "", "derper: cannot make the key file /proc/x/y: no such file"),
    ],
)
def test_the_command(arguments: list[str], status: int, out: str, err: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(arguments) == status
    printed = capsys.readouterr()
    assert printed.out.startswith(out)
    assert printed.err.startswith(err)
    assert "Traceback" not in printed.err


def test_what_stock_derper_reads_from_its_environment() -> None:
    config = parse(*MANUAL)
    assert (config.debug_key_path, config.debug_ip, config.debug_networks, config.round_trips) == ("", "", (), True)
    config = parse(
        *MANUAL,
        TS_DEBUG_KEY_PATH="/k",
        TS_ALLOW_DEBUG_IP="192.0.2.1",
        TS_DEBUG_TRUSTED_CIDRS="10.0.0.0/8, 2001:db8::/32,",
        TS_DERP_DISABLE_RTT_STATS="true",
    )
    assert (config.debug_key_path, config.debug_ip, config.round_trips) == ("/k", "192.0.2.1", False)
    assert config.debug_networks == (ip_network("10.0.0.0/8"), ip_network("2001:db8::/32"))
    assert parse(*MANUAL, TS_DERP_DISABLE_RTT_STATS="0").round_trips


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("TS_DEBUG_TRUSTED_CIDRS", "10.0.0.0/8,x", "must be IP addresses or networks such as 198.51.100.0/24"),
        ("TS_DERP_DISABLE_RTT_STATS", "perhaps", "must be true or false, not 'perhaps'"),
    ],
)
def test_an_environment_that_cannot_be_used(name: str, text: str, words: str) -> None:
    with pytest.raises(UsageError, match=f"^the environment variable {name} {words}"):
        parse_flags(MANUAL, {"HOME": "/home/x", name: text}, is_root=False)
