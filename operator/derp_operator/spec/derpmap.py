"""`spec.map`: what the DERP map says of the region besides its nodes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class MapOptions:
    latitude: float | None = None
    longitude: float | None = None
    no_measure_no_home: bool = False


def parse(spec: Mapping[str, Any]) -> MapOptions:
    return MapOptions(
        latitude=_degrees(spec.get("latitude")),
        longitude=_degrees(spec.get("longitude")),
        no_measure_no_home=bool(spec.get("noMeasureNoHome", False)),
    )


def _degrees(value: object) -> float | None:
    return float(value) if isinstance(value, int | float | str) else None
