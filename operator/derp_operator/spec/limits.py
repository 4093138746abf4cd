"""`spec.limits`: how much a client, and all newcomers together, may ask of a relay."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Limits:
    """0 means no limit."""

    accept_per_second: float = 0
    accept_burst: int = 0
    client_bytes_per_second: int = 0
    client_burst_bytes: int = 0


def parse(spec: Mapping[str, Any]) -> Limits:
    return Limits(
        accept_per_second=spec.get("acceptConnectionsPerSecond", 0),
        accept_burst=int(spec.get("acceptBurst", 0)),
        client_bytes_per_second=int(spec.get("clientBytesPerSecond", 0)),
        client_burst_bytes=int(spec.get("clientBurstBytes", 0)),
    )
