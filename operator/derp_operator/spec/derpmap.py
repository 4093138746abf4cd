"""`spec.map`: in which forms the DERP map is published, and what it says of the region besides its nodes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Final, Literal

from . import durations

if TYPE_CHECKING:
    from .region import Region

Layout = Literal["Region", "RegionPerNode"]

LAST_ID: Final = 999
SPREAD: Final = timedelta(seconds=30)
MAX_SPREAD: Final = timedelta(hours=1)


@dataclass(frozen=True, slots=True)
class MapForm:
    """One of the ConfigMaps that hold the map: all have the same nodes.

    `layout`: all nodes in one region, in order of preference, or a region for each.  `consumer`: the tailnet that it
    is for, empty for the plain map.  `node_order`: the ordinals that come first.  `merge_into`: the merged map that it
    is a part of, empty for none.
    """

    consumer: str = ""
    layout: Layout = "Region"
    node_order: tuple[int, ...] = ()
    merge_into: str = ""


@dataclass(frozen=True, slots=True)
class MapOptions:
    """`first_region_id` is that of ordinal 0 in layout `RegionPerNode`; None: the region's own.  `spread` is how long a
    new map may take until all clients have it.
    """

    latitude: float | None = None
    longitude: float | None = None
    no_measure_no_home: bool = False
    first_region_id: int | None = None
    forms: tuple[MapForm, ...] = (MapForm(),)
    spread: timedelta = SPREAD


def parse(spec: Mapping[str, Any], problems: list[str]) -> MapOptions:
    layout: Layout = spec.get("layout", "Region")
    return MapOptions(
        latitude=_degrees(spec.get("latitude")),
        longitude=_degrees(spec.get("longitude")),
        no_measure_no_home=bool(spec.get("noMeasureNoHome", False)),
        first_region_id=spec.get("firstRegionID"),
        forms=(_form(spec, "", layout), *(_form(item, item["name"], layout) for item in spec.get("consumers") or ())),
        spread=_spread(spec.get("spread"), problems),
    )


def _spread(text: str | None, problems: list[str]) -> timedelta:
    found = SPREAD if text is None else durations.parse(text)
    if found is None or found > MAX_SPREAD:
        problems.append(f"spec.map.spread is {text!r}: write a duration of at most 1h, like 30s or 5m.")
        return SPREAD
    return found


def _form(spec: Mapping[str, Any], consumer: str, layout: Layout) -> MapForm:
    return MapForm(
        consumer=consumer,
        layout=spec.get("layout", layout),
        node_order=tuple(spec.get("nodeOrder") or ()),
        merge_into=spec.get("mergeInto", ""),
    )


def merge_targets(spec: Mapping[str, Any]) -> list[str]:
    """The merged maps that `spec.map` names, whether or not the rest of the spec is valid."""
    named = (item.get("mergeInto") for item in (spec, *(spec.get("consumers") or ())))
    return [name for name in named if name]


def check(region: Region) -> list[str]:
    return [*_check_ids(region), *_check_merging(region)]


def _check_merging(region: Region) -> list[str]:
    targets = Counter(form.merge_into for form in region.map.forms if form.merge_into)
    return [
        f"spec.map merges several maps of this region into {name}: they have the same nodes; merge only one of them."
        for name, count in targets.items()
        if count > 1
    ]


def _check_ids(region: Region) -> list[str]:
    if all(form.layout == "Region" for form in region.map.forms):
        return []
    last = region.first_id + region.replicas - 1
    if last <= LAST_ID:
        return []
    return [
        f"spec.map.layout is RegionPerNode: the last of the {region.replicas} relays would have the region id {last}, "
        f"and the highest is {LAST_ID}; set spec.map.firstRegionID to a lower id, or replicas to fewer."
    ]


def _degrees(value: object) -> float | None:
    return float(value) if isinstance(value, int | float | str) else None
