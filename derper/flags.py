"""The flags of the relay, and what their values may be: stock derper's (cmd/derper/derper.go), and some of ours."""

from __future__ import annotations

import re
import socket
from collections.abc import Callable
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Any, Final

from . import goflag
from .relay import proxies
from .relay.proxies import Network
from .relay.siblings import MAX_WORKERS

__all__ = ["FLAGS", "Flag", "MeshHost", "Network", "Value", "networks", "usage"]


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


_SERVICES: Final = {"http": 80, "https": 443}  # not every system has a list of them
_DNS_NAME: Final = re.compile(
    r"(?=.{1,253}\.?$)([A-Za-z0-9_]([A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?\.)*[A-Za-z0-9_-]{1,63}\.?"
)


def _seconds(value: float) -> float:
    if value < 0:
        raise ValueError("a duration that is not negative")
    return value


def _port_or_none(value: int) -> int:
    if value > 65535:
        raise ValueError("a port from 0 to 65535, or -1 for none")
    return max(value, -1)


def _not_negative(value: float) -> float:
    if not value >= 0:  # NaN neither
        raise ValueError("a number that is not negative")
    return value


def _workers(value: int) -> int:
    if not 0 <= value <= MAX_WORKERS:
        raise ValueError(f"a number from 0 to {MAX_WORKERS}")
    return value


def _port(text: str) -> int:
    """A number, nothing for any port, or the name of a service."""
    if re.fullmatch("[0-9]{0,5}", text) and int(text or 0) <= 65535:
        return int(text or 0)
    try:
        return _SERVICES.get(text) or socket.getservbyname(text, "tcp")
    except (OSError, UnicodeError, ValueError):
        raise ValueError("an address with a port from 0 to 65535") from None


def _address(text: str) -> tuple[str, int]:
    """As net.SplitHostPort."""
    match = re.fullmatch(r"(?:\[([^\[\]]*)\]|([^:\[\]]*)):([^:\[\]]*)", text)
    if match is None:
        raise ValueError('an address such as ":443", "127.0.0.1:443" or "[::1]:443"')
    return match[1] or match[2] or "", _port(match[3])


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


def _key_lists(text: str) -> tuple[str, ...]:
    if not (found := _words(text)):  # an unset variable must not open the relay
        raise ValueError("one or more files, separated by commas")
    return found


def networks(text: str) -> tuple[Network, ...]:
    """Addresses and networks, separated by commas.  Raises ValueError with a noun for what they should be."""
    try:
        return proxies.networks(_words(text))
    except ValueError as error:
        raise ValueError(f"{error}, separated by commas") from None


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


def _same(value: Any) -> Any:
    return value


@dataclass(frozen=True, slots=True)
class Value:
    """A kind of value: how Go's flag package reads it, and what is made of it."""

    kind: goflag.Kind
    check: Callable[[Any], Any] = _same  #: raises ValueError with a noun for what it should be


_TEXT: Final = Value(goflag.text)
_SWITCH: Final = Value(goflag.boolean)
_DURATION: Final = Value(goflag.duration, _seconds)
_ANY_DURATION: Final = Value(goflag.duration)
_PORT: Final = Value(goflag.integer, _port_or_none)
_NUMBER: Final = Value(goflag.floating, _not_negative)
_COUNT: Final = Value(goflag.integer, _not_negative)
_WORKERS: Final = Value(goflag.integer, _workers)
_ADDRESS: Final = Value(goflag.text, _address)
_HOST_NAME: Final = Value(goflag.text, _host_name)
_HOME: Final = Value(goflag.text, _home)
_URLS: Final = Value(goflag.text, _urls)
_WORDS: Final = Value(goflag.text, _words)
_KEY_LISTS: Final = Value(goflag.text, _key_lists)
_NETWORKS: Final = Value(goflag.text, networks)
_MESH_WITH: Final = Value(goflag.text, _mesh_with)


@dataclass(frozen=True, slots=True)
class Flag:
    """One flag.  A `field` of the configuration, or two for an address: FIELD_host and FIELD_port."""

    name: str
    field: str
    value: Value
    help: str
    instead: str = ""  #: why the flag is refused, and what to use

    def fields(self, given: Any) -> dict[str, Any]:
        """What a value sets.  Raises ValueError."""
        value = self.value.check(given)
        if self.value is _ADDRESS:
            return {f"{self.field}_host": value[0], f"{self.field}_port": value[1]}
        return {self.field: value} if self.field else {}


FLAGS: Final = (
    Flag("a", "listen", _ADDRESS, 'listen address; HTTPS if the port is 443 or -certmode is manual (":443")'),
    Flag("http-port", "http_port", _PORT, "port for HTTP on the same address, -1 for none (80)"),
    Flag("stun", "stun", _SWITCH, "answer STUN (true)"),
    Flag("stun-port", "stun_port", _PORT, "UDP port for STUN on the same address, -1 for none (3478)"),
    Flag("c", "key_path", _TEXT, "file with the server's private key; made if it does not exist"),
    Flag("certmode", "cert_mode", _TEXT, "where certificates come from; manual: files in -certdir (letsencrypt)"),
    Flag("certdir", "cert_dir", _TEXT, "folder with HOSTNAME.crt and HOSTNAME.key"),
    Flag("hostname", "hostname", _HOST_NAME, "DNS name or IP address of this server"),
    Flag("derp", "derp", _SWITCH, "relay packets (true)"),
    Flag(
        "home",
        "home",
        _HOME,
        'page at /: "blank", a URL to redirect to, or empty: about DERP; blank with -settings',
    ),
    Flag(
        "mesh-psk-file",
        "mesh_key_path",
        _TEXT,
        "file with the mesh key, 64 hexadecimal digits; more lines: also accepted",
    ),
    Flag("mesh-with", "mesh_with", _MESH_WITH, "comma-separated hosts to mesh with, each HOST or HOST/DIAL-HOST"),
    Flag("bootstrap-dns-names", "bootstrap_dns", _WORDS, "comma-separated names to publish at /bootstrap-dns"),
    Flag(
        "unpublished-bootstrap-dns-names",
        "unpublished_dns",
        _WORDS,
        "names that /bootstrap-dns answers without listing them, each NAME or NAME/TXT-RECORD-WITH-PERCENTAGE",
    ),
    Flag("verify-clients", "verify_clients", _SWITCH, "refuse clients that the local tailscaled does not know (false)"),
    Flag("socket", "tailscaled_socket", _TEXT, "socket of that tailscaled (/var/run/tailscale/tailscaled.sock)"),
    Flag(
        "verify-client-url",
        "verify_urls",
        _URLS,
        "admission controllers to ask about each client, separated by commas; one must allow it",
    ),
    Flag("verify-client-url-fail-open", "verify_fail_open", _SWITCH, "admit clients while none can be asked (false)"),
    Flag(
        "admission-keys",
        "admission_keys",
        _KEY_LISTS,
        "files with keys of clients that are always admitted, one nodekey:<hex> per line",
    ),
    Flag("accept-connection-limit", "accept_per_second", _NUMBER, "new connections per second (+Inf: no limit)"),
    Flag(
        "accept-connection-burst",
        "accept_burst",
        _COUNT,
        "new connections at once; -accept-connection-limit means nothing without it",
    ),
    Flag("rate-config", "rate_config", _TEXT, "JSON file with rate limits, read again when it changes"),
    Flag("tcp-keepalive-time", "tcp_keep_alive", _ANY_DURATION, "TCP keep-alive; 0: 15s, negative: none (10m)"),
    Flag("tcp-user-timeout", "tcp_user_timeout", _DURATION, "TCP user time-out (15s)"),
    Flag("tcp-write-timeout", "write_timeout", _DURATION, "how long a client may not read, 0 for ever (2s)"),
    Flag("version", "", _SWITCH, "print the version"),
    Flag("dev", "dev", _SWITCH, "development: a new key, plain HTTP on :3340"),
    Flag("settings", "settings", _TEXT, "settings file of a region, read again when it changes"),
    Flag("node", "node", _TEXT, "this relay's name in the settings"),
    Flag("metrics-addr", "metrics", _ADDRESS, "address for /healthz, /readyz, /metrics and /status; port 0: any"),
    Flag("status-socket", "status_socket", _TEXT, "Unix socket for derper status"),
    Flag("workers", "workers", _WORKERS, "processes that share the work, 0: one per CPU (1)"),
    Flag("trusted-proxies", "trusted_proxies", _NETWORKS, "proxies whose word on a client's address is believed"),
    Flag("proxy-protocol", "proxy_protocol", _SWITCH, "trusted proxies begin with a PROXY protocol v2 header (false)"),
    Flag("acme-ip-certs", "", _SWITCH, "", "use -certmode manual, which makes a self-signed certificate for an IP"),
    Flag("secrets-url", "", _TEXT, "", "put the mesh key into a file and name it in -mesh-psk-file"),
    # As with stock derper, these mean nothing without the flags above.
    Flag("acme-eab-kid", "", _TEXT, ""),
    Flag("acme-eab-key", "", _TEXT, ""),
    Flag("acme-email", "", _TEXT, ""),
    Flag("secrets-path-prefix", "", _TEXT, ""),
    Flag("secrets-cache-dir", "", _TEXT, ""),
    Flag("ace", "", _SWITCH, "", "this version has no ACE server"),
)


def usage() -> str:
    """The list of flags."""
    known = [flag for flag in FLAGS if flag.help]
    return "\n".join(f"  -{flag.name:<30} {flag.help}" for flag in known)
