"""`spec.mesh`: the key that the relays of the region share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Mesh:
    """Another `rotate` asks for a new mesh key."""

    rotate: str = ""


def parse(spec: Mapping[str, Any]) -> Mesh:
    return Mesh(rotate=spec.get("rotate", ""))
