"""The command line of the relay: stock derper's flags (cmd/derper/derper.go), and three of ours.

Flags are written as Go's flag package takes them: one dash or two, ``-flag=value`` or ``-flag value``, and
switches as ``-flag`` or ``-flag=false``.
"""

from __future__ import annotations

import math
import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from ipaddress import IPv4Network, IPv6Network, ip_address, ip_network
from pathlib import Path
from typing import Any, Final

__all__ = ["Config", "MeshHost", "UsageError", "parse_flags", "usage"]


Network = IPv4Network | IPv6Network


class UsageError(Exception):
    """The command line cannot be used.  The message is one sentence for the user."""


@dataclass(frozen=True, slots=True)
class MeshHost:
    """An entry of ``-mesh-with``: a host, and another name to dial it by."""

    host: str
    port: int
    dial_host: str

    @property
    def name(self) -> str:
        """What it is called in logs, status and metrics: the entry itself, as short as it can be."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        port = "" if self.port == 443 else f":{self.port}"
        return host + port + ("" if self.dial_host == self.host else f"/{self.dial_host}")


@dataclass(frozen=True, slots=True)
class Config:
    """What the flags say; durations are seconds, an empty path or URL means none."""

    listen_host: str = ""
    listen_port: int = 443
    http_port: int = 80
    stun: bool = True
    stun_port: int = 3478
    key_path: str = ""
    cert_mode: str = "letsencrypt"
    cert_dir: str = ""
    hostname: str = "derp.tailscale.com"
    derp: bool = True
    home: str = ""
    mesh_key_path: str = ""
    mesh_key: str = field(default="", repr=False)  #: the key itself, with -dev only
    mesh_with: tuple[MeshHost, ...] = ()
    bootstrap_dns: tuple[str, ...] = ()
    unpublished_dns: tuple[str, ...] = ()
    verify_clients: bool = False
    tailscaled_socket: str = ""
    verify_urls: tuple[str, ...] = ()
    verify_fail_open: bool = False
    admission_keys: tuple[str, ...] = ()
    accept_per_second: float = math.inf
    accept_burst: int = sys.maxsize
    rate_config: str = ""
    tcp_keep_alive: float = 600.0
    tcp_user_timeout: float = 15.0
    write_timeout: float = 2.0
    settings: str = ""
    node: str = ""
    metrics_host: str = ""
    metrics_port: int = 0
    status_socket: str = ""
    trusted_proxies: tuple[Network, ...] = ()
    proxy_protocol: bool = False
    dev: bool = False
    debug_key_path: str = ""
    debug_ip: str = ""
    debug_networks: tuple[Network, ...] = ()
    round_trips: bool = True

    @property
    def tls(self) -> bool:
        """TLS, or plain HTTP as stock derper serves behind other ports without ``-certmode manual``."""
        return bool(self.settings) or self.listen_port == 443 or self.cert_mode == "manual"


_DURATION: Final = re.compile(r"(\d+(?:\.\d*)?|\.\d+)(ns|us|µs|ms|s|m|h)")
_DEV_MESH_KEY: Final = "TAILSCALE_DERPER_MESH_KEY"  # an environment variable (cmd/derper, meshKeyEnvVar)
_UNITS: Final = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
_DNS_NAME: Final = re.compile(
    r"(?=.{1,253}\.?$)([A-Za-z0-9_]([A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?\.)*[A-Za-z0-9_-]{1,63}\.?"
)


def _duration(text: str) -> float:
    if text == "0":
        return 0.0
    if not text or _DURATION.sub("", text):
        raise ValueError("a duration such as 15s or 10m")
    return sum(float(number) * _UNITS[unit] for number, unit in _DURATION.findall(text))


def _port(text: str) -> int:
    if not re.fullmatch(r"-1|\d{1,5}", text) or int(text) > 65535:
        raise ValueError("a port from 0 to 65535, or -1 for none")
    return int(text)


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise ValueError("a number") from None
    if not value >= 0:
        raise ValueError("a number that is not negative")
    return value


def _count(text: str) -> int:
    if not text.isascii() or not text.isdigit():
        raise ValueError("a whole number")
    return int(text)


def _switch(text: str) -> bool:
    values = {"1": True, "t": True, "true": True, "0": False, "f": False, "false": False}
    if text.lower() not in values:
        raise ValueError("true or false")
    return values[text.lower()]


def _address(text: str) -> tuple[str, int]:
    host, colon, port = text.rpartition(":")
    if not colon or (":" in host and not host.startswith("[")):
        raise ValueError('an address such as ":443", "127.0.0.1:443" or "[::1]:443"')
    number = _port(port)
    if number < 0:
        raise ValueError("an address with a port from 0 to 65535")
    return host.strip("[]"), number


def _host_name(text: str) -> str:
    try:
        return str(ip_address(text))
    except ValueError:
        pass
    if not _DNS_NAME.fullmatch(text):
        raise ValueError("a DNS name or an IP address")
    return text


def _home(text: str) -> str:
    if text and text != "blank" and not text.startswith(("http://", "https://")):
        raise ValueError('empty, "blank", or a URL that starts with http:// or https://')
    return text


def _urls(text: str) -> tuple[str, ...]:
    urls = tuple(re.split(r",(?=https?://)", text)) if text else ()  # a comma may also be a part of a URL
    if not all(re.fullmatch(r"https?://[^\s/]+(/\S*)?", url) for url in urls):
        raise ValueError("one or more URLs that start with http:// or https://, separated by commas")
    return urls


def _words(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(",") if word.strip())


def _networks(text: str) -> tuple[Network, ...]:
    try:
        return tuple(ip_network(word) for word in _words(text))
    except ValueError:
        raise ValueError("IP addresses or networks such as 198.51.100.0/24, separated by commas") from None


def _mesh_with(text: str) -> tuple[MeshHost, ...]:
    return tuple(_mesh_host(entry.strip()) for entry in text.split(",") if entry.strip())


def _mesh_host(entry: str) -> MeshHost:
    parts = entry.split("/")
    if len(parts) > 2:
        raise ValueError(f"a list of HOST or HOST/DIAL-HOST; {entry!r} has too many parts")
    host, colon, port = parts[0].rpartition(":")
    if not colon or (":" in host and not host.startswith("[")):
        host, port = parts[0], "443"
    number = _port(port)
    if number < 1:
        raise ValueError(f"a list of HOST or HOST/DIAL-HOST; {entry!r} has no port to dial")
    name = _host_name(host.strip("[]"))
    return MeshHost(name, number, _host_name(parts[1].strip("[]")) if len(parts) == 2 else name)


@dataclass(frozen=True, slots=True)
class _Flag:
    name: str
    field: str
    parse: Any
    help: str
    instead: str = ""  #: why the flag is refused, and what to use


_FLAGS: Final = (
    _Flag("a", "listen", _address, 'listen address; HTTPS if the port is 443 or -certmode is manual (":443")'),
    _Flag("http-port", "http_port", _port, "port for HTTP on the same address, -1 for none (80)"),
    _Flag("stun", "stun", _switch, "answer STUN (true)"),
    _Flag("stun-port", "stun_port", _port, "UDP port for STUN on the same address (3478)"),
    _Flag("c", "key_path", str, "file with the server's private key; made if it does not exist"),
    _Flag("certmode", "cert_mode", str, "where certificates come from; manual: files in -certdir (letsencrypt)"),
    _Flag("certdir", "cert_dir", str, "folder with HOSTNAME.crt and HOSTNAME.key"),
    _Flag("hostname", "hostname", _host_name, "DNS name or IP address of this server"),
    _Flag("derp", "derp", _switch, "relay packets (true)"),
    _Flag("home", "home", _home, 'page at /: empty or "blank" for nothing, or a URL to redirect to'),
    _Flag(
        "mesh-psk-file",
        "mesh_key_path",
        str,
        "file with the mesh key, 64 hexadecimal digits; more lines: also accepted",
    ),
    _Flag("mesh-with", "mesh_with", _mesh_with, "comma-separated hosts to mesh with, each HOST or HOST/DIAL-HOST"),
    _Flag("bootstrap-dns-names", "bootstrap_dns", _words, "comma-separated names to publish at /bootstrap-dns"),
    _Flag(
        "unpublished-bootstrap-dns-names",
        "unpublished_dns",
        _words,
        "names that /bootstrap-dns answers without listing them, each NAME or NAME/TXT-RECORD-WITH-PERCENTAGE",
    ),
    _Flag("verify-clients", "verify_clients", _switch, "admit the clients that the local tailscaled knows (false)"),
    _Flag("socket", "tailscaled_socket", str, "socket of that tailscaled (/var/run/tailscale/tailscaled.sock)"),
    _Flag(
        "verify-client-url", "verify_urls", _urls, "admission controllers to ask about each client; one must allow it"
    ),
    _Flag("verify-client-url-fail-open", "verify_fail_open", _switch, "admit clients while none can be asked (false)"),
    _Flag(
        "admission-keys", "admission_keys", _words, "files with keys of clients to admit, one nodekey:<hex> per line"
    ),
    _Flag("accept-connection-limit", "accept_per_second", _number, "new connections per second (+Inf: no limit)"),
    _Flag(
        "accept-connection-burst",
        "accept_burst",
        _count,
        "new connections at once; -accept-connection-limit means nothing without it",
    ),
    _Flag("rate-config", "rate_config", str, "JSON file with rate limits, read again when it changes"),
    _Flag("tcp-keepalive-time", "tcp_keep_alive", _duration, "TCP keep-alive (10m)"),
    _Flag("tcp-user-timeout", "tcp_user_timeout", _duration, "TCP user time-out (15s)"),
    _Flag("tcp-write-timeout", "write_timeout", _duration, "how long a client may not read, 0 for ever (2s)"),
    _Flag("dev", "dev", _switch, "development: a new key, plain HTTP on :3340"),
    _Flag("settings", "settings", str, "settings file of a region, read again when it changes"),
    _Flag("node", "node", str, "this relay's name in the settings"),
    _Flag("metrics-addr", "metrics", _address, "address for /healthz, /readyz, /metrics and /status"),
    _Flag("status-socket", "status_socket", str, "Unix socket for derper status"),
    _Flag("trusted-proxies", "trusted_proxies", _networks, "proxies whose word on a client's address is believed"),
    _Flag("proxy-protocol", "proxy_protocol", _switch, "trusted proxies begin with a PROXY protocol v2 header (false)"),
    _Flag("acme-ip-certs", "", _switch, "", "use -certmode manual, which makes a self-signed certificate for an IP"),
    _Flag("acme-eab-kid", "", str, "", "put certificates into -certdir and use -certmode manual; they are reloaded"),
    _Flag("acme-eab-key", "", str, "", "put certificates into -certdir and use -certmode manual; they are reloaded"),
    _Flag("acme-email", "", str, "", "put certificates into -certdir and use -certmode manual; they are reloaded"),
    _Flag("secrets-url", "", str, "", "put the mesh key into a file and name it in -mesh-psk-file"),
    _Flag("secrets-path-prefix", "", str, "", "put the mesh key into a file and name it in -mesh-psk-file"),
    _Flag("secrets-cache-dir", "", str, "", "put the mesh key into a file and name it in -mesh-psk-file"),
    _Flag("ace", "", _switch, "", "this version has no ACE server"),
)


def usage() -> str:
    """The list of flags."""
    known = [flag for flag in _FLAGS if flag.field]
    return "\n".join(f"  -{flag.name:<30} {flag.help}" for flag in known)


def parse_flags(arguments: Sequence[str], environ: Mapping[str, str], *, is_root: bool) -> Config:
    """The configuration of a relay.  Raises `UsageError`."""
    values = _values(arguments)
    if values.pop("dev", False):
        values = {"listen_port": 3340, "listen_host": "", "http_port": -1, **values, "dev": True}
    config = _with_defaults(Config(**values, **_environment(environ)), environ, is_root)
    _check(config)
    _check_proxies(config)
    return config


def _values(arguments: Sequence[str]) -> dict[str, Any]:
    by_name = {flag.name: flag for flag in _FLAGS}
    values: dict[str, Any] = {}
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        match = re.fullmatch(r"--?([A-Za-z][A-Za-z0-9-]*)(=(.*))?", argument, re.DOTALL)
        flag = by_name.get(match[1]) if match else None
        if match is None or flag is None:
            raise UsageError(f"unknown flag or argument {argument!r}; derper -help lists the flags")
        if match[2] is not None:
            text = match[3]
        elif flag.parse is _switch:
            text = "true"
        elif rest:
            text = rest.pop(0)
        else:
            raise UsageError(f"-{flag.name} needs a value")
        values.update(_value(flag, text))
    return values


def _value(flag: _Flag, text: str) -> dict[str, Any]:
    try:
        value = flag.parse(text)
    except ValueError as error:
        raise UsageError(f"-{flag.name} must be {error}, not {text!r}") from None
    if flag.instead:
        if value in (False, ""):
            return {}
        raise UsageError(f"-{flag.name} is not supported: {flag.instead}")
    if flag.parse is _address:
        return {f"{flag.field}_host": value[0], f"{flag.field}_port": value[1]}
    return {flag.field: value}


def _check(config: Config) -> None:
    if config.settings:
        if not config.node:
            raise UsageError("-settings needs -node, the name of this relay in the settings file")
        admission = config.verify_clients or config.verify_urls or config.admission_keys
        if config.mesh_with or admission or config.rate_config:
            raise UsageError(
                "-settings says what -mesh-with, -verify-clients, -verify-client-url, -admission-keys and -rate-config"
                " say; use one or the other"
            )
        return
    if config.node:
        raise UsageError("-node only goes with -settings")
    if config.mesh_with and not config.mesh_key_path and not config.mesh_key:
        raise UsageError(f"-mesh-with requires {_DEV_MESH_KEY if config.dev else '-mesh-psk-file'}")
    if config.cert_mode not in ("manual", "letsencrypt", "gcp"):
        raise UsageError(f"-certmode must be manual, not {config.cert_mode!r}")
    if config.tls and config.cert_mode != "manual":
        raise UsageError(
            f"-certmode {config.cert_mode} is not supported: use -certmode manual with certificates in -certdir"
            " (from cert-manager, certbot or lego; they are reloaded), or with an IP address as -hostname"
        )


def _check_proxies(config: Config) -> None:
    if config.proxy_protocol and not config.trusted_proxies:
        raise UsageError("-proxy-protocol needs -trusted-proxies: anybody else could claim any address")


def _environment(environ: Mapping[str, str]) -> dict[str, Any]:
    """What stock derper reads from its environment (tsweb.AllowDebugAccess, sclient.run)."""
    variables = (
        ("TS_DEBUG_KEY_PATH", "debug_key_path", str),
        ("TS_ALLOW_DEBUG_IP", "debug_ip", str),
        ("TS_DEBUG_TRUSTED_CIDRS", "debug_networks", _networks),
        ("TS_DERP_DISABLE_RTT_STATS", "round_trips", lambda text: not _switch(text)),
    )
    values = {}
    for name, attribute, parse in variables:
        if text := environ.get(name, ""):
            try:
                values[attribute] = parse(text)
            except ValueError as error:
                raise UsageError(f"the environment variable {name} must be {error}, not {text!r}") from None
    return values


def _with_defaults(config: Config, environ: Mapping[str, str], is_root: bool) -> Config:
    changes: dict[str, str] = {}
    if not config.key_path and not config.dev:
        if not is_root:
            raise UsageError("-c is missing: name the file for the server's private key")
        changes["key_path"] = "/var/lib/derper/derper.key"
    if not config.cert_dir:
        cache = environ.get("XDG_CACHE_HOME") or os.path.join(environ.get("HOME", "."), ".cache")
        changes["cert_dir"] = str(Path(cache) / "tailscale" / "derper-certs")
    if config.dev:  # as stock derper: a file is not looked at
        changes["mesh_key"], changes["mesh_key_path"] = environ.get(_DEV_MESH_KEY, ""), ""
    elif not config.mesh_key_path and not config.settings:
        changes["mesh_key_path"] = _usual_mesh_key(environ)
    return Config(**{item.name: changes.get(item.name, getattr(config, item.name)) for item in fields(Config)})


def _usual_mesh_key(environ: Mapping[str, str]) -> str:
    """The first of the files in which stock derper looks for the mesh key by itself (defaultMeshPSKFile)."""
    usual = ("/home/derp/keys/derp-mesh.key", os.path.join(environ.get("HOME", ""), "keys", "derp-mesh.key"))
    return next((path for path in usual if os.path.exists(path)), "")
