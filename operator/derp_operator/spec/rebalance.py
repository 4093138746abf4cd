"""`spec.rebalance`: clients that sit on another node than the first one that they could be on are sent back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Rebalance:
    clients_per_minute: int = 0  #: of each relay; 0: never


def parse(spec: Mapping[str, Any]) -> Rebalance:
    return Rebalance(clients_per_minute=int(spec.get("clientsPerMinute", 0)))
