"""The region's key material, as it stands in the Secret `<region>-keys`.

Created once and never silently regenerated: an entry is made for a node that no one has heard of yet, or because the
spec asks for it (another `rotate`), or because a certificate nears its end; then beside the one before.  What is
damaged or gone for a known node is a problem that a human must solve, because new keys mean new pins in every client's
DERP map.  Server keys of removed nodes stay, and their certificates until they are to be renewed, so that scaling back
up gives the same pins.

    mesh.key                            64 hex digits: the current mesh key; further lines are accepted from peers too
    rotations.json                      what has been rotated, see `Record`
    <pod>.derper.key                    the relay's private key, in stock derper's JSON
    <pod>.g<n>.crt, .key                the certificate of generation n, for the name <pod>-g<n>.derp.internal
    <pod>.ip-<address>[.g<n>].crt, .key in mode Address: that for an IP address (":" as "_"), with a number from g2 on
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timedelta
from typing import Final

from derper import certs
from derper.wire.keys import KEY_LEN, KeyFormatError, MeshKey, NodePrivate

from . import names

DOMAIN: Final = "derp.internal"
_GENERATION: Final = re.compile(r"\.g([1-9][0-9]*)\.crt")
_HOST_NAME: Final = re.compile(rf"(.+)-g([1-9][0-9]*)\.{re.escape(DOMAIN)}")
_CERTIFICATE: Final = re.compile(r"([^.]+)\.(?:g[1-9][0-9]*|ip-.+)\.(?:crt|key)")
_RECORD: Final = "rotations.json"


@dataclass(frozen=True, slots=True)
class Certificate:
    """A certificate of a node.  `stem` is its entry in the Secret without .crt or .key; `pin` is `sha256-raw:<hex>`."""

    stem: str
    host_name: str
    pin: str
    not_before: datetime
    not_after: datetime

    def valid(self, now: datetime) -> bool:
        return self.not_before <= now <= self.not_after


@dataclass(frozen=True, slots=True)
class Generation:
    """What was made together: the certificate for mesh peers and generated names, and that for the node's address."""

    number: int
    mesh: Certificate
    address: Certificate | None = None

    @property
    def not_after(self) -> datetime:
        return min(item.not_after for item in (self.mesh, self.address) if item)


@dataclass(frozen=True, slots=True)
class NodeKeys:
    """What a node is known by.  `generations` are those in the Secret, the newest first; `current` is the one that
    peers and clients have been told of.
    """

    server_key: str
    generations: tuple[Generation, ...]
    current: Generation

    @property
    def newest(self) -> Generation:
        return self.generations[0]


@dataclass(frozen=True, slots=True)
class Known:
    """What others have been told of a node: the host name for its peers, and the certificates that it serves (stems;
    None if that is not known)."""

    host_name: str = ""
    stems: frozenset[str] | None = None


@dataclass(frozen=True, slots=True)
class Wishes:
    """What the spec says of keys.  `certificates` and `mesh` are the two `rotate`."""

    certificates: str = ""
    mesh: str = ""
    lifetime: timedelta = certs.YEAR
    renew_before: timedelta = certs.YEAR / 3


@dataclass(frozen=True, slots=True)
class Record:
    """The two `rotate` that have been begun, and the fingerprint of the mesh key on its way to be the only one."""

    certificates: str = ""
    mesh: str = ""
    mesh_key: str = ""


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
    record: Record = field(default_factory=Record)
    problems: tuple[Problem, ...] = ()


@dataclass(frozen=True, slots=True)
class Maker:
    """Where new keys come from; tests inject their own."""

    node_key: Callable[[], str]
    mesh_key: Callable[[], str]
    certificate: Callable[[Sequence[str], datetime, timedelta], tuple[bytes, bytes]]


def system_maker() -> Maker:
    """Keys from the operating system's randomness."""

    def certificate(hosts: Sequence[str], now: datetime, lifetime: timedelta) -> tuple[bytes, bytes]:
        pair = certs.self_signed(hosts, now=now, lifetime=lifetime)
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
    known: Mapping[str, Known],
    addresses: Mapping[str, str],
    now: datetime,
    maker: Maker,
    wishes: Wishes = Wishes(),
) -> KeyRing:
    """The key ring for `pods`: what the Secret holds, and new entries for pods that are neither in it nor `known`, or
    that `wishes` ask for.

    `live` is the Secret's data, None if there is no such Secret; `known` are the pods that have been told to their
    peers or clients; `addresses` are the IP addresses that need a certificate of their own, by pod.
    """
    ring = _Builder(secret, dict(live or {}), known, addresses, now, maker, wishes)
    record = ring.record(new=not live)
    ring.mesh()
    nodes = ring.nodes(pods)
    if ring.asked(record, nodes) or ring.due(nodes):
        ring.next_generation(pods, nodes)
        record = replace(record, certificates=wishes.certificates or record.certificates)
        nodes = ring.nodes(pods)
    record = ring.next_mesh_key(record)
    return KeyRing(with_record(ring.data, record), nodes, record, tuple(ring.problems))


def with_record(data: Mapping[str, bytes], record: Record) -> dict[str, bytes]:
    """The entries with this record; there is none as long as there is nothing to record."""
    rest = {entry: value for entry, value in data.items() if entry != _RECORD}
    if record == Record():
        return rest
    text = json.dumps({name: value for name, value in asdict(record).items() if value}, indent=2, ensure_ascii=False)
    return rest | {_RECORD: f"{text}\n".encode()}


def mesh_key_lines(data: Mapping[str, bytes]) -> list[str]:
    """The mesh keys in the Secret, the current one first; none if the entry is missing or broken."""
    lines = data.get(names.MESH_KEY, b"").decode(errors="replace").split()
    try:
        return [MeshKey.parse(line).secret_text() for line in lines]
    except KeyFormatError:
        return []


def fingerprint(line: str) -> str:
    """What a relay reports of the mesh key on this line."""
    return MeshKey.parse(line).fingerprint()


def address_stem(pod: str, address: str, generation: int) -> str:
    """The name of the certificate for an address: that of the first generation has no number."""
    number = f".g{generation}" if generation > 1 else ""
    return f"{pod}.ip-{address.replace(':', '_')}{number}"


def host_name(pod: str, generation: int) -> str:
    """The generated host name of a node.  It changes with the certificate, never with an address."""
    return f"{pod}-g{generation}.{DOMAIN}"


class _Builder:
    """Collects entries and problems for one call of `extend`."""

    def __init__(
        self,
        secret: str,
        data: dict[str, bytes],
        known: Mapping[str, Known],
        addresses: Mapping[str, str],
        now: datetime,
        maker: Maker,
        wishes: Wishes,
    ) -> None:
        self.secret, self.data, self.known, self.addresses = secret, data, known, addresses
        self.now, self.maker, self.wishes = now, maker, wishes
        self.problems: list[Problem] = []

    # -- the mesh key, and what has been rotated

    def record(self, *, new: bool) -> Record:
        """What has been rotated; a new Secret has all that the spec asks for."""
        if new:
            return Record(self.wishes.certificates, self.wishes.mesh)
        try:
            fields = json.loads(self.data.get(_RECORD, b"{}"))
            return Record(**{name: str(fields[name]) for name in asdict(Record()) if name in fields})
        except (ValueError, TypeError):
            return Record()  # at worst, something is rotated once more

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

    def next_mesh_key(self, record: Record) -> Record:
        """If the spec asks for another mesh key, and none is on its way: accept a new one besides."""
        lines = mesh_key_lines(self.data)
        if not self.wishes.mesh or self.wishes.mesh == record.mesh or record.mesh_key or not lines:
            return record
        new = self.maker.mesh_key().strip()
        self.data[names.MESH_KEY] = "".join(f"{line}\n" for line in (lines[0], new, *lines[1:])).encode()
        return replace(record, mesh=self.wishes.mesh, mesh_key=fingerprint(new))

    # -- new generations

    def asked(self, record: Record, nodes: Mapping[str, NodeKeys]) -> bool:
        """Whether the spec asks for new certificates, and those of the last time are in use."""
        wish = self.wishes.certificates
        return bool(wish) and wish != record.certificates and not self.problems and not _underway(nodes)

    def due(self, nodes: Mapping[str, NodeKeys]) -> bool:
        """Whether a certificate nears its end.

        While the next one is on its way there is nothing to renew, unless that is of no use, because it was so for too
        long, or was made by a clock that was wrong.
        """
        if any(keys.newest.not_after < self.now for keys in nodes.values()):
            return True
        if any(keys.newest != keys.current and not keys.newest.mesh.valid(self.now) for keys in nodes.values()):
            return True
        near = any(keys.newest.not_after - self.wishes.renew_before <= self.now for keys in nodes.values())
        return near and not _underway(nodes)

    def next_generation(self, pods: Sequence[str], nodes: Mapping[str, NodeKeys]) -> None:
        """One more for all: any change of the map makes all clients reconnect, and so all are due together again.

        Nobody has certificates of pods that are not there in use: those go.  They get new ones when they come back.
        """
        for pod, keys in nodes.items():
            self._make_generation(pod, keys.newest.number + 1)
        self._forget({match[1] for entry in self.data if (match := _CERTIFICATE.fullmatch(entry))} - set(pods))

    def _make_generation(self, pod: str, number: int) -> None:
        self._make_certificate(f"{pod}.g{number}", host_name(pod, number))
        if address := self.addresses.get(pod):
            self._make_certificate(address_stem(pod, address, number), address)

    def _make_certificate(self, stem: str, host: str) -> None:
        made = self.maker.certificate([host], self.now, self.wishes.lifetime)
        self.data[f"{stem}.crt"], self.data[f"{stem}.key"] = made

    # -- the nodes

    def nodes(self, pods: Sequence[str]) -> dict[str, NodeKeys]:
        self.problems = [problem for problem in self.problems if problem.pod is None]
        return {pod: keys for pod in pods if (keys := self.node(pod))}

    def node(self, pod: str) -> NodeKeys | None:
        known = self.known.get(pod)
        numbers = self._generations(pod)
        expected = {*(numbers or [1]), *_told(pod, known)}
        entries = [f"{pod}.derper.key", *(f"{pod}.g{n}.{end}" for n in sorted(expected) for end in ("crt", "key"))]
        missing = [entry for entry in entries if entry not in self.data]
        certificates = any(entry in self.data for entry in entries[1:])
        if missing and (known is not None or certificates):
            for entry in missing:
                self._lost(entry, pod)
            return None
        if missing:
            self.data.setdefault(f"{pod}.derper.key", self.maker.node_key().encode())
            self._make_generation(pod, 1)
            numbers = [1]
        try:
            return self._read(pod, known, numbers)
        except _Damaged as damage:
            entry, reason = damage.args
            self._damaged(entry, pod, reason)
            return None

    def _generations(self, pod: str) -> list[int]:
        matches = (_GENERATION.fullmatch(entry.removeprefix(pod)) for entry in self.data if entry.startswith(pod + "."))
        return sorted((int(match[1]) for match in matches if match), reverse=True)

    def _read(self, pod: str, known: Known | None, numbers: Sequence[int]) -> NodeKeys:
        meshes = {number: self._certificate(f"{pod}.g{number}", host_name(pod, number)) for number in numbers}
        current = next((number for number in _told(pod, known) if number in meshes), numbers[0])
        generations = {
            number: Generation(number, item, self._address(pod, number, needed=number in (current, numbers[0])))
            for number, item in meshes.items()
        }
        keys = NodeKeys(self._server_key(pod), tuple(generations.values()), generations[current])
        if known is None and keys.newest.not_after - self.wishes.renew_before <= self.now:
            self._forget({pod})  # nobody has it in use
            self._make_generation(pod, numbers[0] + 1)
            return self._read(pod, None, [numbers[0] + 1])
        return keys

    def _address(self, pod: str, generation: int, *, needed: bool) -> Certificate | None:
        address = self.addresses.get(pod)
        if not address:
            return None
        stem = address_stem(pod, address, generation)
        if f"{stem}.crt" not in self.data and f"{stem}.key" not in self.data:
            if not needed:
                return None
            if stem in self._listed(pod):
                raise _Damaged(f"{stem}.crt", "it is missing")
            self._make_certificate(stem, address)
        return self._certificate(stem, address)

    def _listed(self, pod: str) -> Set[str]:
        known = self.known.get(pod)
        return (known and known.stems) or frozenset()

    def _forget(self, pods: Set[str]) -> None:
        for entry in list(self.data):
            if (match := _CERTIFICATE.fullmatch(entry)) and match[1] in pods:
                del self.data[entry]

    def _server_key(self, pod: str) -> str:
        entry = f"{pod}.derper.key"
        try:
            return str(NodePrivate.from_config(self.data[entry].decode()).public)
        except (KeyFormatError, UnicodeDecodeError) as error:
            raise _Damaged(entry, str(error)) from None

    def _certificate(self, stem: str, host: str) -> Certificate:
        """Its time is not looked at: one that has expired is renewed."""
        for end in ("crt", "key"):
            if f"{stem}.{end}" not in self.data:
                raise _Damaged(f"{stem}.{end}", "it is missing")
        cert, key = f"{stem}.crt", f"{stem}.key"
        try:
            leaf = certs.load_pair(self.data[cert], self.data[key], cert=cert, key=key).leaf
            certs.check(leaf, now=leaf.not_valid_before_utc, name=host, source="the certificate")
        except certs.CertificateError as error:
            raise _Damaged(cert, str(error)) from None
        return Certificate(stem, host, certs.pin(leaf), leaf.not_valid_before_utc, leaf.not_valid_after_utc)

    def _lost(self, entry: str, pod: str | None) -> None:
        region = self.secret.removesuffix("-keys")
        what = f"has lost {entry}" if self.data else "is gone"
        sentence = (
            f"Secret {self.secret} {what}. Relays that run have a copy and go on, so stop none. Restore it from a "
            "backup or from a pod (docs/operations.md, Lost keys). New keys would change what clients have pinned, so "
            f"none are made; if you want that, delete the Secret, the ConfigMaps {region}-settings and "
            f"{region}-derpmap, then the pods."
        )
        self.problems.append(Problem(sentence, lost=True, pod=pod))

    def _damaged(self, entry: str, pod: str | None, reason: str) -> None:
        self.problems.append(
            Problem(f"Secret {self.secret}, entry {entry}: {reason.rstrip('.')}. Restore it from a backup.", False, pod)
        )


def _told(pod: str, known: Known | None) -> list[int]:
    """The generation that others have been told of, if it is one of ours."""
    match = _HOST_NAME.fullmatch(known.host_name) if known else None
    return [int(match[2])] if match and match[1] == pod else []


def _underway(nodes: Mapping[str, NodeKeys]) -> bool:
    """Whether a generation has been made that peers and clients have not been told of."""
    return any(keys.newest != keys.current for keys in nodes.values())
