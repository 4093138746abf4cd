"""What relays would answer that have read these files: for tests of the operator without relays."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime

from derp_operator import names
from derp_operator.keyring import fingerprint, mesh_key_lines
from derp_operator.probe import Answer, ReportedKeys, Target

from derper import certs


@dataclass(frozen=True)
class Files:
    """The volumes of a pod: the Secret's entries, and the settings."""

    secret: Mapping[str, bytes]
    settings: str

    def answer(self, target: Target, peers: Iterable[str], now: datetime) -> Answer:
        """What the relay of a pod says, and what TLS shows for the names that it is asked for."""
        served = self._served(target.pod, now)
        hosts = {target.host_name: target.host_name if target.sni else "", **{name: name for name in target.also}}
        shown = {host: pin for host, name in hosts.items() if (pin := _chosen(served, name))}
        lines = mesh_key_lines(self.secret)
        marks = [fingerprint(line) for line in lines]
        fits = shown.get(target.host_name) in {target.pin, *target.earlier}
        return Answer(
            () if fits else (f"TLS shows another certificate for {target.host_name} than the pinned one",),
            mesh=dict.fromkeys(peers, True),
            settings=hashlib.sha256(self.settings.encode()).hexdigest(),
            shown=shown,
            certificates=frozenset(pin for _, pin in served),
            mesh_keys=ReportedKeys(marks[0], frozenset(marks)),
        )

    def _served(self, pod: str, now: datetime) -> list[tuple[tuple[str, ...], str]]:
        """Names and pins of the certificates that are valid, in the order of the settings."""
        found = []
        for path in json.loads(self.settings)["nodes"][pod]["certificates"]:
            stem = path.removeprefix(f"{names.SECRET_DIR}/")
            leaf = certs.load_pair(self.secret[f"{stem}.crt"], self.secret[f"{stem}.key"]).leaf
            if leaf.not_valid_before_utc <= now <= leaf.not_valid_after_utc:
                found.append((certs.names(leaf), certs.pin(leaf)))
        return found


def _chosen(served: list[tuple[tuple[str, ...], str]], name: str) -> str | None:
    if not name:
        return served[0][1] if served else None
    return next((pin for hosts, pin in served if name in hosts), None)
