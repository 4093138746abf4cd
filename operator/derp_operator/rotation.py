"""How far a rotation is, and the next step if every relay has taken the last one.  Pure.

What is in the cluster says where it is, so it may be stopped anywhere:

* Certificates.  The Secret gets generation n+1 for all nodes (`keyring`), and the settings name both, n+1 besides n.
  When every relay serves n+1 under its name, the settings name it to peers and the DERP map to clients, for all nodes
  at once.  n is served for `retireAfter` longer, as clients may hold the map that long (since when is an annotation of
  the map); then it leaves the settings, and the Secret when no relay serves it any more.
  In mode Address there is no name to choose by: the certificate for the address is swapped where the settings turn,
  when that of the generated name shows that the files have arrived everywhere, and the map follows within seconds.
* The mesh key.  A second one is accepted (`keyring`); when every relay accepts it, it becomes the current one; when
  every relay presents it, the one before goes.

A relay that runs and does not report holds up the step and is named: published before it serves n+1, its clients would
find nothing else (a wrong certificate is no reason for a client to try the next node).  One that does not run holds up
nothing: when it starts, it reads the files as they stand then.  When half of the time for a renewal is over, the
nodes that serve n+1 go on without the others, if they are the most: what is waited for is about to be worthless.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Any, Final

from derper import certs
from derper.derpmap import DERPNode

from . import conditions, names
from .conditions import Finding, timestamp
from .keyring import Certificate, Generation, KeyRing, Known, NodeKeys, Record, fingerprint, mesh_key_lines, with_record
from .probe import Answer
from .spec import Region

_STARTING: Final = timedelta(seconds=60)
"""How long a pod that was made a moment ago may already have read its files."""
_STEM: Final = re.compile(r"(([^.]+)\.(?:g[1-9][0-9]*|ip-.+))\.crt")


@dataclass(frozen=True, slots=True)
class Relays:
    """The relays as they are: their pods, what they answered, and the SHA-256 of the settings that stand."""

    pods: Mapping[str, Mapping[str, Any]]
    answers: Mapping[str, Answer]
    settings: str
    now: datetime

    def runs(self, pod: str) -> bool:
        """Whether a relay may be running there, with files that it read some time ago."""
        item = self.pods.get(pod)
        if item is None:
            return False
        phase = item.get("status", {}).get("phase", "Pending")
        if phase == "Pending":
            return self.now - datetime.fromisoformat(item["metadata"]["creationTimestamp"]) < _STARTING
        return phase not in ("Failed", "Succeeded")

    def answer(self, pod: str) -> Answer:
        return self.answers.get(pod, Answer())

    def current(self, pods: Iterable[str]) -> bool:
        """Whether all of them that run have read the settings as they stand."""
        return all(self.answer(pod).settings == self.settings for pod in pods if self.runs(pod))

    def serves(self, pod: str, item: Certificate) -> bool:
        """Whether a relay shows the certificate under its name, in all its processes."""
        answer = self.answer(pod)
        shown = answer.shown.get(item.host_name) == item.pin
        return shown and item.pin in answer.certificates and answer.settings == self.settings


@dataclass(frozen=True, slots=True)
class Turn:
    """The certificates from now on: the generation of each node that others are told of, those that it serves, the
    first one to clients that name none, and when the ones before go (None: there are none, or it is not yet known).
    """

    current: Mapping[str, Generation]
    served: Mapping[str, tuple[Certificate, ...]]
    retire_at: datetime | None
    findings: tuple[Finding, ...]


def turn(
    region: Region,
    ring: KeyRing,
    relays: Relays,
    known: Mapping[str, Known],
    published: Mapping[str, DERPNode],
    since: datetime | None,
) -> Turn:
    """The step that may be taken now.  `published` are the nodes in the map, by pod, with these pins since `since`."""
    waiting = {pod: keys for pod, keys in ring.nodes.items() if keys.newest != keys.current}
    asked = [pod for pod in region.pods if pod in waiting and relays.runs(pod)]
    late = [pod for pod in asked if not relays.serves(pod, waiting[pod].newest.mesh)]
    end = min((keys.current.not_after for keys in waiting.values()), default=relays.now)
    urgent = end - relays.now < region.tls.renew_before / 2
    go = not late or (urgent and 2 * len(late) < len(asked))
    current = {pod: keys.newest if go else keys.current for pod, keys in ring.nodes.items()}
    retire_at = None if waiting else _retire_at(region, ring, published, since, relays.now)
    retire = retire_at is not None and retire_at <= relays.now and relays.current(region.pods)
    served = {}
    for pod, keys in ring.nodes.items():
        older = () if retire else _older(keys, known.get(pod, Known()), relays.now)
        found = (current[pod].address, keys.newest.mesh, current[pod].mesh, *older)
        served[pod] = tuple(dict.fromkeys(item for item in found if item))
    more = any(len(served[pod]) > 1 + (current[pod].address is not None) for pod in served)
    findings = () if go else (_late(waiting, late, end, urgent),)
    return Turn(current, served, retire_at if more else None, findings)


def _older(keys: NodeKeys, known: Known, now: datetime) -> Iterator[Certificate]:
    """Earlier generations that are still served.  What has left the settings does not come back."""
    for item in keys.generations[1:]:
        listed = known.stems is None or item.mesh.stem in known.stems
        if listed and item.mesh.valid(now):
            yield item.mesh


def _retire_at(
    region: Region, ring: KeyRing, published: Mapping[str, DERPNode], since: datetime | None, now: datetime
) -> datetime | None:
    """When older generations go: clients get the map some time after it was published, peers the settings at once."""
    if region.tls.host_name != "Generated":
        return now
    told = {pod: keys.current.mesh.pin for pod, keys in ring.nodes.items() if pod in published}
    if since is None or any(pin != published[pod].cert_name for pod, pin in told.items()):
        return None
    return since + region.tls.retire_after


def _late(waiting: Mapping[str, NodeKeys], late: Iterable[str], end: datetime, urgent: bool) -> Finding:
    numbers = sorted({keys.newest.number for keys in waiting.values()})
    text = (
        f"New certificates (generation {', '.join(map(str, numbers))}) are served beside the ones before, which expire "
        f"on {timestamp(end)}. The DERP map will name them when these relays serve them, too: {', '.join(late)} (if "
        "this stays, their log says why; a relay that hangs is started again by deleting its pod)."
    )
    return Finding(conditions.ROTATING_CERTIFICATES, text, degraded=urgent)


def retired(
    ring: KeyRing,
    taken: Turn,
    relays: Relays,
    known: Mapping[str, Known],
    published: Mapping[str, DERPNode],
) -> set[str]:
    """The stems that nobody has a use for: no settings name them, no relay serves them, no client knows them."""
    stems = {match[1]: match[2] for entry in ring.data if (match := _STEM.fullmatch(entry))}
    used = {item.stem for items in taken.served.values() for item in items}
    used |= {item.stem for keys in ring.nodes.values() for item in (keys.newest.mesh, keys.newest.address) if item}
    used |= {stem for item in known.values() for stem in item.stems or ()}
    found = {stem for stem, pod in stems.items() if pod in ring.nodes and stem not in used}
    if not found or not relays.current({*ring.nodes, *relays.pods}):
        return set()
    pins = {pin for answer in relays.answers.values() for pin in answer.certificates}
    pins |= {node.cert_name for node in published.values()}
    return {stem for stem in found if _pin(ring.data[f"{stem}.crt"]) not in pins}


def _pin(pem: bytes) -> str:
    try:
        return certs.pin(certs.CertificatePair(pem, b"").leaf)
    except (ValueError, IndexError):
        return ""


def without(data: Mapping[str, bytes], stems: Iterable[str]) -> dict[str, bytes]:
    """The entries but for these certificates and their keys."""
    gone = {f"{stem}.{end}" for stem in stems for end in ("crt", "key")}
    return {entry: value for entry, value in data.items() if entry not in gone}


def mesh_keys(
    ring: KeyRing, members: Iterable[str], relays: Relays
) -> tuple[Mapping[str, bytes], Record, list[Finding]]:
    """The entries and the record after the step of the mesh key's rotation that may be taken now."""
    lines, target = mesh_key_lines(ring.data), ring.record.mesh_key
    if not target or not lines:
        return ring.data, ring.record, []
    marks = [fingerprint(line) for line in lines]
    if target not in marks or len(lines) == 1:  # it is done, or somebody has edited the Secret
        return _with_keys(ring.data, lines, replace(ring.record, mesh_key=""))
    reports = {pod: relays.answer(pod).mesh_keys for pod in members if relays.runs(pod)}
    if marks[0] != target:
        late = [pod for pod, keys in reports.items() if not set(marks) <= set(keys.accepted)]
        if not late:
            at = marks.index(target)
            return _with_keys(ring.data, [lines[at], *lines[:at], *lines[at + 1 :]], ring.record)
        step = "is accepted beside the one before; it will be used when these relays accept it, too"
    else:
        late = [pod for pod, keys in reports.items() if keys.current != target]
        if not late:
            return _with_keys(ring.data, [lines[0], *lines[2:]], replace(ring.record, mesh_key=""))
        step = "is used; the one before goes when these relays use the new one, too"
    why = "if this stays, their log says why; a relay of an older release does not report its keys"
    text = f"The new mesh key {step}: {', '.join(late)} ({why})."
    return ring.data, ring.record, [Finding(conditions.ROTATING_MESH_KEY, text)]


def _with_keys(
    data: Mapping[str, bytes], lines: Iterable[str], record: Record
) -> tuple[Mapping[str, bytes], Record, list[Finding]]:
    text = "".join(f"{line}\n" for line in lines).encode()
    changed = with_record(data, record) | {names.MESH_KEY: text}
    return changed, record, []
