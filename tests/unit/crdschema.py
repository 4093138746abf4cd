"""As much of structural schemas as the CRD uses, so that manifests can be checked without an API server.

CEL rules are left out: tests/api has the real thing.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
CRD = ROOT / "crds" / "derp.network_derpregions.yaml"

_TYPES: Mapping[str, type | tuple[type, ...]] = {
    "object": dict,
    "array": list,
    "string": str,
    "integer": int,
    "number": (int, float),
    "boolean": bool,
}


def load_crd() -> dict[str, Any]:
    crd: dict[str, Any] = yaml.safe_load(CRD.read_text())
    return crd


@functools.cache
def schema() -> dict[str, Any]:
    """The schema of a DerpRegion."""
    root: dict[str, Any] = load_crd()["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
    return root


def problems(value: Any, against: Mapping[str, Any], path: str = "") -> Iterator[str]:
    """What the schema forbids in a value, unknown fields included."""
    if against.get("x-kubernetes-int-or-string"):
        if isinstance(value, bool) or not isinstance(value, int | str):
            yield f"{path} is neither a number nor a string"
        elif not re.search(against.get("pattern", ""), str(value)):
            yield f"{path}: {value!r} does not match"
        return
    kind = against["type"]
    if not isinstance(value, _TYPES[kind]) or (isinstance(value, bool) and kind != "boolean"):
        yield f"{path} is not of type {kind}"
        return
    yield from _bounds(value, against, path)
    if isinstance(value, list):
        for index, item in enumerate(value):
            yield from problems(item, against["items"], f"{path}[{index}]")
    elif isinstance(value, dict):
        yield from _fields(value, against, path)


def _bounds(value: Any, against: Mapping[str, Any], path: str) -> Iterator[str]:
    size = len(value) if isinstance(value, str | list | dict) else value
    for low, high in (
        ("minimum", "maximum"),
        ("minLength", "maxLength"),
        ("minItems", "maxItems"),
        ("minProperties", "maxProperties"),
    ):
        if not against.get(low, size) <= size <= against.get(high, size):
            yield f"{path}: {value!r} is out of bounds"
    if "enum" in against and value not in against["enum"]:
        yield f"{path}: {value!r} is not one of {against['enum']}"


def _fields(value: Mapping[str, Any], against: Mapping[str, Any], path: str) -> Iterator[str]:
    if "additionalProperties" in against:
        for key, item in value.items():
            yield from problems(item, against["additionalProperties"], f"{path}.{key}")
        return
    if path == ".metadata" or against.get("x-kubernetes-preserve-unknown-fields"):
        return
    for key in against.get("required", ()):
        if key not in value:
            yield f"{path}.{key} is missing"
    for key, item in value.items():
        if key in against["properties"]:
            yield from problems(item, against["properties"][key], f"{path}.{key}")
        else:
            yield f"{path}.{key} is unknown"
