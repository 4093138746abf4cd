"""The region's key material, as it stands in the Secret `<region>-keys`.

Created once and never silently regenerated: an entry is made only for a node that no one has heard of yet.  What is
damaged or gone for a known node is a problem that a human must solve, because new keys mean new pins in every client's
DERP map.  Entries of removed nodes stay, so that scaling back up gives the same pins.

    mesh.key                        64 hex digits: the current mesh key; further lines are accepted from peers too
    <pod>.derper.key                the relay's private key, in stock derper's JSON
    <pod>.g<n>.crt, .key            the certificate of generation n, for the name <pod>-g<n>.derp.internal
    <pod>.ip-<address>.crt, .key    in mode Address: the certificate for an IP address (":" written as "_")
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Final

from derper import certs
from derper.wire.keys import KEY_LEN, KeyFormatError, MeshKey, NodePrivate

from . import names

DOMAIN: Final = "derp.internal"
_GENERATION: Final = re.compile(r"\.g([1-9][0-9]*)\.crt")


@dataclass(frozen=True, slots=True)
class Certificate:
    """A certificate of a node.  `stem` is its entry in the Secret without .crt or .key; `pin` is `sha256-raw:<hex>`."""

    stem: str
    host_name: str
    pin: str
    not_after: datetime


@dataclass(frozen=True, slots=True)
class NodeKeys:
    """What a node is known by.  `mesh` is its certificate for mesh peers, `address` the one for its IP address."""

    server_key: str
    mesh: Certificate
    older: tuple[Certificate, ...] = ()
    address: Certificate | None = None


@dataclass(frozen=True, slots=True)
class Problem:
    """Key material that a human must look at.  `lost` if it is gone, else damaged."""

    sentence: str
    lost: bool
    pod: str | None = None


@dataclass(frozen=True, slots=True)
class KeyRing:
    """The Secret's entries with additions, and what they mean."""

    data: Mapping[str, bytes]
    nodes: Mapping[str, NodeKeys]
    problems: tuple[Problem, ...] = ()


@dataclass(frozen=True, slots=True)
class Maker:
    """Where new keys come from; tests inject their own."""

    node_key: Callable[[], str]
    mesh_key: Callable[[], str]
    certificate: Callable[[Sequence[str], datetime], tuple[bytes, bytes]]


def system_maker() -> Maker:
    """Keys from the operating system's randomness."""

    def certificate(hosts: Sequence[str], now: datetime) -> tuple[bytes, bytes]:
        pair = certs.self_signed(hosts, now=now)
        return pair.cert_pem, pair.key_pem

    return Maker(
        node_key=lambda: NodePrivate.generate().to_config(),
        mesh_key=lambda: MeshKey(secrets.token_bytes(KEY_LEN)).secret_text() + "\n",
        certificate=certificate,
    )


class _Damaged(ValueError):  # noqa: N818 - never leaves this module
    pass


def extend(
    secret: str,
    live: Mapping[str, bytes] | None,
    pods: Sequence[str],
    known: Collection[str],
    addresses: Mapping[str, str],
    now: datetime,
    maker: Maker,
) -> KeyRing:
    """The key ring for `pods`: what the Secret holds, and new entries for pods that are neither in it nor `known`.

    `live` is the Secret's data, None if there is no such Secret; `known` are the pods that have been told to their
    peers or clients; `addresses` are the IP addresses that need a certificate of their own, by pod.
    """
    ring = _Builder(secret, dict(live or {}), frozenset(known), now, maker)
    ring.mesh()
    nodes = {pod: keys for pod in pods if (keys := ring.node(pod, addresses.get(pod)))}
    return KeyRing(ring.data, nodes, tuple(ring.problems))


class _Builder:
    """Collects entries and problems for one call of `extend`."""

    def __init__(self, secret: str, data: dict[str, bytes], known: frozenset[str], now: datetime, maker: Maker) -> None:
        self.secret, self.data, self.known, self.now, self.maker = secret, data, known, now, maker
        self.problems: list[Problem] = []

    def mesh(self) -> None:
        text = self.data.get(names.MESH_KEY)
        if text is None:
            if self.known:
                self._lost(names.MESH_KEY, None)
            else:
                self.data[names.MESH_KEY] = self.maker.mesh_key().encode()
            return
        lines = text.decode(errors="replace").split("\n")
        for number, line in enumerate(lines, 1):
            if not line.strip() and number > 1:
                continue
            try:
                MeshKey.parse(line)
            except KeyFormatError as error:
                self._damaged(names.MESH_KEY, None, f"line {number}: {error}")
                return

    def node(self, pod: str, address: str | None) -> NodeKeys | None:
        generations = self._generations(pod)
        entries = [f"{pod}.derper.key"] + [f"{pod}.g{number}.{end}" for number in generations for end in ("crt", "key")]
        missing = [entry for entry in entries if entry not in self.data]
        if missing and (pod in self.known or len(missing) < len(entries)):
            for entry in missing:
                self._lost(entry, pod)
            return None
        if missing:
            self._create(pod)
        try:
            own = [self._certificate(f"{pod}.g{number}", host_name(pod, number)) for number in reversed(generations)]
            at = self._address(pod, address) if address else None
            return NodeKeys(self._server_key(pod), own[0], tuple(own[1:]), at)
        except _Damaged as damage:
            entry, reason = damage.args
            self._damaged(entry, pod, reason)
            return None

    def _generations(self, pod: str) -> list[int]:
        matches = (_GENERATION.fullmatch(entry.removeprefix(pod)) for entry in self.data if entry.startswith(pod + "."))
        return sorted(int(match[1]) for match in matches if match) or [1]

    def _create(self, pod: str) -> None:
        self.data[f"{pod}.derper.key"] = self.maker.node_key().encode()
        self._make_certificate(f"{pod}.g1", host_name(pod, 1))

    def _make_certificate(self, stem: str, host: str) -> None:
        self.data[f"{stem}.crt"], self.data[f"{stem}.key"] = self.maker.certificate([host], self.now)

    def _address(self, pod: str, address: str) -> Certificate:
        stem = f"{pod}.ip-{address.replace(':', '_')}"
        if f"{stem}.crt" not in self.data and f"{stem}.key" not in self.data:
            self._make_certificate(stem, address)
        return self._certificate(stem, address)

    def _server_key(self, pod: str) -> str:
        entry = f"{pod}.derper.key"
        try:
            return str(NodePrivate.from_config(self.data[entry].decode()).public)
        except (KeyFormatError, UnicodeDecodeError) as error:
            raise _Damaged(entry, str(error)) from None

    def _certificate(self, stem: str, host: str) -> Certificate:
        for end in ("crt", "key"):
            if f"{stem}.{end}" not in self.data:
                raise _Damaged(f"{stem}.{end}", "it is missing")
        cert, key = f"{stem}.crt", f"{stem}.key"
        try:
            leaf = certs.load_pair(self.data[cert], self.data[key], cert=cert, key=key).leaf
            certs.check(leaf, now=self.now, name=host, source="the certificate")
        except certs.CertificateError as error:
            raise _Damaged(cert, str(error)) from None
        return Certificate(stem, host, certs.pin(leaf), leaf.not_valid_after_utc)

    def _lost(self, entry: str, pod: str | None) -> None:
        region = self.secret.removesuffix("-keys")
        sentence = (
            f"Secret {self.secret} has lost {entry}: restore it from a backup. New keys would change what clients have "
            f"pinned, so none are made; if you want that, delete the Secret, then the ConfigMaps {region}-settings and "
            f"{region}-derpmap."
        )
        self.problems.append(Problem(sentence, lost=True, pod=pod))

    def _damaged(self, entry: str, pod: str | None, reason: str) -> None:
        self.problems.append(
            Problem(f"Secret {self.secret}, entry {entry}: {reason.rstrip('.')}. Restore it from a backup.", False, pod)
        )


def host_name(pod: str, generation: int) -> str:
    """The generated host name of a node.  It changes with the certificate, never with an address."""
    return f"{pod}-g{generation}.{DOMAIN}"
