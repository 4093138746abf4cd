"""The command line of the relay: stock derper's flags (cmd/derper/derper.go), and some of ours.

`goflag` reads them as Go's flag package does; here is what they mean.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from . import goflag
from .flags import FLAGS, MeshHost, Network, networks, usage
from .goflag import FlagError, HelpWanted

__all__ = ["Config", "HelpWanted", "MeshHost", "UsageError", "VersionWanted", "parse_flags", "usage"]


class UsageError(Exception):
    """The command line cannot be used.  The message is one sentence for the user.

    `status` is the exit status: 2 where Go's flag package gives up, 1 for what stock derper finds later.
    """

    def __init__(self, message: str, status: int = 1) -> None:
        super().__init__(message)
        self.status = status


class VersionWanted(Exception):  # noqa: N818 - no error
    """-version was given."""


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
    metrics_port: int | None = None
    status_socket: str = ""
    trusted_proxies: tuple[Network, ...] = ()
    proxy_protocol: bool = False
    dev: bool = False
    debug_key_path: str = ""
    debug_ip: str = ""
    debug_networks: tuple[Network, ...] = ()
    round_trips: bool = True
    workers: int = 1  #: 0: one for each CPU

    @property
    def tls(self) -> bool:
        """TLS, or plain HTTP as stock derper serves behind other ports without ``-certmode manual``."""
        return bool(self.settings) or self.listen_port == 443 or self.cert_mode == "manual"


_DEV_MESH_KEY: Final = "TAILSCALE_DERPER_MESH_KEY"  # an environment variable (cmd/derper, meshKeyEnvVar)


def parse_flags(arguments: Sequence[str], environ: Mapping[str, str], *, is_root: bool) -> Config:
    """The configuration of a relay.  Raises `UsageError`, and `HelpWanted` or `VersionWanted` as Go's flag package."""
    try:
        given = goflag.parse(arguments, {flag.name: flag.value.kind for flag in FLAGS})
    except FlagError as error:
        raise UsageError(str(error), status=2) from None
    if given.pop("version", False):
        raise VersionWanted
    values = _values(given)
    if values.get("dev"):
        values |= {"listen_host": "", "listen_port": 3340, "key_path": "", "mesh_key_path": ""}
    elif not values.get("key_path"):
        values.pop("key_path", None)
    config = Config(**(_defaults(values, environ, is_root) | values | _environment(environ)))
    _check(config)
    _check_proxies(config)
    return config


def _values(given: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of the configuration that the flags set."""
    values: dict[str, Any] = {}
    for flag in FLAGS:
        if flag.name not in given:
            continue
        if flag.instead and given[flag.name]:
            raise UsageError(f"-{flag.name} is not supported: {flag.instead}")
        try:
            values |= flag.fields(given[flag.name])
        except ValueError as error:
            raise UsageError(f"-{flag.name} must be {error}, not {str(given[flag.name])!r}") from None
    return values


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
    if config.tls and config.cert_mode == "manual" and not config.cert_dir:
        raise UsageError("-certdir is missing: name the folder for the certificate")
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
        ("TS_DEBUG_TRUSTED_CIDRS", "debug_networks", networks),
        ("TS_DERP_DISABLE_RTT_STATS", "round_trips", lambda text: not goflag.boolean(text)),
    )
    values = {}
    for name, attribute, parse in variables:
        if text := environ.get(name, ""):
            try:
                values[attribute] = parse(text)
            except ValueError as error:
                raise UsageError(f"the environment variable {name} must be {error}, not {text!r}") from None
    return values


def _defaults(values: Mapping[str, Any], environ: Mapping[str, str], is_root: bool) -> dict[str, Any]:
    """What is set where no flag is, from the environment."""
    defaults: dict[str, Any] = {"cert_dir": _cache_folder(environ)}
    if values.get("dev"):  # as stock derper: no file is looked at
        return defaults | {"mesh_key": environ.get(_DEV_MESH_KEY, "")}
    if not values.get("key_path"):
        if not is_root:
            raise UsageError("-c is missing: name the file for the server's private key")
        defaults["key_path"] = "/var/lib/derper/derper.key"
    if not values.get("settings"):
        defaults["mesh_key_path"] = _usual_mesh_key(environ)
    return defaults


def _cache_folder(environ: Mapping[str, str]) -> str:
    """tsweb.DefaultCertDir; empty if the environment names no folder."""
    home = environ.get("HOME", "")
    cache = environ.get("XDG_CACHE_HOME", "") or (os.path.join(home, ".cache") if home else "")
    return str(Path(cache) / "tailscale" / "derper-certs") if os.path.isabs(cache) else ""


def _usual_mesh_key(environ: Mapping[str, str]) -> str:
    """The first of the files in which stock derper looks for the mesh key by itself (defaultMeshPSKFile)."""
    usual = ("/home/derp/keys/derp-mesh.key", os.path.join(environ.get("HOME", ""), "keys", "derp-mesh.key"))
    return next((path for path in usual if os.path.exists(path)), "")
