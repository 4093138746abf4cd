"""What a relay should be, read from its files and flags: key, certificates, mesh, admission, limits.

`RelayState` is the one place where configuration becomes facts; `server.Relay` puts them into force.
"""

from __future__ import annotations

import hashlib
import logging
import math
import os
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any, Final

from . import files
from .certs import CertificateError, CertificatePair, check, pin
from .client import Endpoint
from .config import Config
from .files import FileError, PartlyUsable, Watched
from .net.mesh import Peer
from .net.rebalance import Rebalancing
from .net.tailscaled import default_socket
from .net.tls import check_usable
from .relay.admission import AdmissionPolicy, KeyListError, parse_key_list
from .relay.limits import Limits, RateConfigError, parse_rate_config
from .relay.proxies import Proxies
from .settings import NodeSettings, Settings, parse_settings
from .wire.keys import MeshKeys, NodePrivate

__all__ = ["RelayState"]

log = logging.getLogger("derper")

_UNSAFE_IN_NAME: Final = re.compile(r"[^a-zA-Z0-9-.]")  # cmd/derper/cert.go, unsafeHostnameCharacters


class RelayState:
    """The newest good version of everything.  Call `poll` about once a second, and soon again while it is `settling`.

    With flags alone every file must be good at the start (`load_all`).  With a settings file anything may be
    missing at first: the relay runs, is not ready, and says why.  `private_key` is used where no file has one.
    """

    def __init__(self, config: Config, now: Callable[[], datetime], private_key: NodePrivate | None = None) -> None:
        self.config = config
        self._now = now
        self.private_key = None if config.key_path else private_key or NodePrivate.generate()
        self.mesh_keys: MeshKeys | None = None
        self.pairs: tuple[CertificatePair, ...] = ()
        self.settings: Settings | None = None
        self.listed_keys: frozenset[bytes] = frozenset()
        self.limits = _flag_limits(config)
        self._versioned: object = None  # what `_version` is the digest of
        self._version = b""
        self.watched: list[Watched[Any]] = list(self._watch())

    def load_all(self) -> None:
        """Load everything for the first time; make a missing key and IP certificate, as stock derper does.

        Raises `FileError`.
        """
        if not self.config.settings:
            if self.config.key_path:
                files.make_key(Path(self.config.key_path))
            if self.config.mesh_key:
                self.mesh_keys = files.parse_mesh_keys(self.config.mesh_key, "the mesh key of the environment")
            if self.config.tls:
                files.make_ip_certificate(self._flag_stem(), self.config.hostname, self._now())
        for watched in self.watched:
            watched.poll()
            if watched.problem is not None:
                if not self.config.settings:
                    raise FileError(watched.problem)
                log.warning("%s; waiting for it", watched.problem)

    def poll(self, *, at_once: bool = False) -> list[str]:
        """Read what changed, or `at_once` everything; the names of what is new.  Each problem is logged once."""
        new = []
        for watched in self.watched:
            if not watched.poll(at_once=at_once):
                continue
            if watched.problem is None:
                log.info("%s: read", watched.what)
            elif watched.partly:
                log.warning("%s; the others are in force", watched.problem.rstrip("."))
            else:
                log.warning(
                    "%s; %s",
                    watched.problem.rstrip("."),
                    "the old one stays in force" if watched.loads else "waiting for it",
                )
                continue
            new.append(watched.what)
        return new

    @property
    def settling(self) -> bool:
        """Some files are just being changed: poll again soon."""
        return any(watched.settling for watched in self.watched)

    @property
    def problems(self) -> list[str]:
        """What is on disk and cannot be used, one sentence each."""
        return [watched.problem for watched in self.watched if watched.problem is not None]

    @property
    def missing(self) -> list[str]:
        """Why the relay cannot serve, as far as its files go."""
        reasons = []
        if self.private_key is None:
            reasons.append("there is no server key yet")
        if self.config.settings and (self.settings is None or self.config.node not in self.settings.nodes):
            reasons.append(f"node {self.config.node!r} is not in the settings")
        elif self.config.tls and not self.pairs:
            reasons.append("there is no certificate yet")
        if self.mesh_keys is None and self.peers():
            reasons.append("there is no mesh key yet")
        return reasons

    def version(self) -> bytes:
        """A digest of all that is in force: processes with the same one have read the same files."""
        facts = (self.settings, self.private_key, self.mesh_keys, self.pairs, self.listed_keys, self.limits)
        if facts != self._versioned:
            self._versioned, self._version = facts, self._digest()
        return self._version

    def _digest(self) -> bytes:
        mesh_keys = self.mesh_keys.accepted if self.mesh_keys is not None else ()
        facts = (
            self.settings.digest if self.settings is not None else "",
            self.private_key.public.hex() if self.private_key is not None else "",
            [key.secret_text() for key in mesh_keys],
            [pin(pair.leaf) for pair in self.pairs],
            sorted(self.listed_keys),
            self.limits,
        )
        return hashlib.sha256(repr(facts).encode()).digest()

    def peers(self) -> dict[str, Peer]:
        """The other relays of the region."""
        if self.settings is None:
            return {
                entry.name: Peer(entry.name, Endpoint((entry.dial_host,), entry.port, entry.host))
                for entry in self.config.mesh_with
            }
        others = {name: node for name, node in self.settings.nodes.items() if name != self.config.node}
        return {name: Peer(name, _endpoint(node), node.server_key) for name, node in others.items()}

    def rebalancing(self) -> Rebalancing:
        """Which clients to send to another node, and how fast."""
        if self.settings is None:
            return Rebalancing()
        nodes = {node.map_name: name for name, node in self.settings.nodes.items() if node.map_name}
        return Rebalancing(self.settings.rebalance_per_minute, nodes)

    def proxies(self) -> Proxies:
        """Whose word on a client's address is believed."""
        if self.settings is not None and self.settings.proxies is not None:
            return self.settings.proxies
        return Proxies(self.config.trusted_proxies, self.config.proxy_protocol)

    def policy(self) -> AdmissionPolicy:
        """Who is admitted."""
        keys = self.listed_keys if self._key_list_paths() else None
        if not self.config.settings:
            policy = AdmissionPolicy(
                urls=self.config.verify_urls,
                keys=keys,
                tailscaled=self._flag_socket(),
                fail_open=self.config.verify_fail_open,
            )
            return replace(policy, is_open=not policy.asks and keys is None)
        if self.settings is None:
            return AdmissionPolicy()
        admission = self.settings.admission
        return AdmissionPolicy(
            is_open=admission.is_open,
            urls=admission.urls,
            keys=keys,
            tailscaled=admission.tailscaled,
            fail_open=admission.fail_open,
            cache=admission.cache,
        )

    def _flag_socket(self) -> str:
        if not self.config.verify_clients:
            return ""
        return self.config.tailscaled_socket or default_socket()

    # -- the files ---------------------------------------------------------------------------------------

    def _watch(self) -> list[Watched[Any]]:
        config = self.config
        watched: list[Watched[Any]] = []
        if config.settings:
            path = Path(config.settings)
            watched.append(Watched("settings", lambda: [path], lambda: self._read_settings(path), self._set_settings))
        watched.append(Watched("key list", self._key_list_paths, self._read_key_list, self._set_keys))
        if config.key_path:
            key_path = Path(config.key_path)
            watched.append(Watched("server key", lambda: [key_path], lambda: files.load_key(key_path), self._set_key))
        if config.mesh_key_path:
            mesh_path = Path(config.mesh_key_path)
            watched.append(
                Watched("mesh key", lambda: [mesh_path], lambda: files.load_mesh_keys(mesh_path), self._set_mesh_keys)
            )
        if config.tls:
            watched.append(Watched("certificates", self._pair_paths, self._read_pairs, self._set_pairs))
        if config.rate_config:
            rate_path = Path(config.rate_config)
            watched.append(
                Watched("rate limits", lambda: [rate_path], lambda: self._read_limits(rate_path), self._set_limits)
            )
        return watched

    def _flag_stem(self) -> Path:
        """As stock derper names the files: an IPv6 address without its colons."""
        return Path(self.config.cert_dir) / _UNSAFE_IN_NAME.sub("", self.config.hostname)

    def _stems(self) -> tuple[str, ...]:
        if not self.config.settings:
            return (str(self._flag_stem()),)
        node = self.settings.nodes.get(self.config.node) if self.settings is not None else None
        return node.certificates if node is not None else ()

    def _pair_paths(self) -> list[Path]:
        return [Path(stem + suffix) for stem in self._stems() for suffix in (".crt", ".key")]

    def _read_pairs(self) -> tuple[CertificatePair, ...]:
        try:
            pairs = files.load_pairs(self._stems())
        except CertificateError as error:
            if self.config.settings or self.pairs or os.path.lexists(self._pair_paths()[0]):
                raise
            host = self.config.hostname
            raise FileError(
                f"there is none for {host}: put {host}.crt and {host}.key into -certdir {self.config.cert_dir},"
                " or use an IP address as -hostname, for which a self-signed one is made"
            ) from error
        for stem, pair in zip(self._stems(), pairs, strict=True):
            if not self.config.settings:
                check(pair.leaf, now=self._now(), name=self.config.hostname, source=f"{stem}.crt")
            check_usable(pair, f"{stem}.crt")
        return pairs

    def _read_settings(self, path: Path) -> Settings:
        try:
            return parse_settings(files.read_file(path))
        except ValueError as error:
            raise FileError(f"{path}: {error}") from None

    def _key_list_paths(self) -> list[Path]:
        if not self.config.settings:
            return [Path(name) for name in self.config.admission_keys]
        return [Path(name) for name in self.settings.admission.key_files] if self.settings is not None else []

    def _read_key_list(self) -> frozenset[bytes]:
        keys: frozenset[bytes] = frozenset()
        for path in self._key_list_paths():
            try:
                keys |= parse_key_list(files.read_text(path))
            except KeyListError as error:
                raise FileError(f"{path}, {error}") from None
        return keys

    def _read_limits(self, path: Path) -> Limits:
        """Stock derper's rate config."""
        try:
            rate, burst = parse_rate_config(files.read_file(path))
        except RateConfigError as error:
            raise FileError(f"{path}: {error}") from None
        return replace(self.limits, client_bytes_per_second=rate, client_burst_bytes=burst)

    # -- what they say -------------------------------------------------------------------------------------

    def _set_settings(self, settings: Settings) -> None:
        self.settings = settings
        limits, flags = settings.limits, _flag_limits(self.config)
        if math.isinf(limits.accept_per_second):  # they say nothing of it
            limits = replace(limits, accept_per_second=flags.accept_per_second, accept_burst=flags.accept_burst)
        self.limits = replace(limits, write_timeout=flags.write_timeout)

    def _set_keys(self, keys: frozenset[bytes]) -> None:
        self.listed_keys = keys

    def _set_key(self, key: NodePrivate) -> None:
        if self.private_key is not None and self.private_key.public != key.public:
            raise FileError(f"{self.config.key_path}: the server key cannot change while the relay runs; restart it")
        self.private_key = key

    def _set_mesh_keys(self, keys: MeshKeys) -> None:
        self.mesh_keys = keys

    def _set_pairs(self, pairs: tuple[CertificatePair, ...]) -> None:
        if not pairs and self.pairs:
            raise CertificateError("the settings name no certificate for this node")
        problems, valid = [], []
        for stem, pair in zip(self._stems(), pairs, strict=True):
            try:
                check(pair.leaf, now=self._now(), source=f"{stem}.crt")
            except CertificateError as error:
                problems.append(error)
            else:
                valid.append(pair)
        if problems and not valid:
            raise problems[0]
        self.pairs = tuple(valid)
        if problems:  # an old one that expires beside its successor must not keep that from being served
            raise PartlyUsable(str(problems[0]))

    def _set_limits(self, limits: Limits) -> None:
        self.limits = limits
        log.info(
            "rate config applied: client-rate=%d bytes/sec, client-burst=%d bytes",  # as stock derper says it
            limits.client_bytes_per_second,
            limits.client_burst_bytes,
        )


def _endpoint(node: NodeSettings) -> Endpoint:
    """A node of the region is known by its pin and its key: a clock that is wrong does not end the mesh."""
    return Endpoint((node.dial_host,), node.dial_port, node.host_name, node.cert_name, timeless=True)


def _flag_limits(config: Config) -> Limits:
    accept_per_second, accept_burst = config.accept_per_second, config.accept_burst
    if accept_burst == sys.maxsize:  # whoever may come all at once has no limit
        accept_per_second, accept_burst = math.inf, 1
    return Limits(
        accept_per_second=accept_per_second,
        accept_burst=accept_burst,
        write_timeout=config.write_timeout,
    )
