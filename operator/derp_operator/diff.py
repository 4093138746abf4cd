"""Would server-side apply change anything?  Answered from the live object alone: an idle operator sends nothing.

The API server records in `metadata.managedFields` which fields each manager owns.  A manifest is in force if and only
if our record names exactly the manifest's fields and the live object has the manifest's values: then nobody changed
them, and there is nothing that we once set and no longer want.  Fields of others (defaults, other managers) are none
of our business and are not looked at.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from decimal import Decimal, InvalidOperation
from typing import Any, Final

_IDENTITY: Final = frozenset({"apiVersion", "kind"})
_META_IDENTITY: Final = frozenset({"name", "namespace", "uid", "resourceVersion"})
_SUFFIXES: Final = {
    "n": Decimal("1e-9"), "u": Decimal("1e-6"), "m": Decimal("1e-3"), "": Decimal(1),
    "k": Decimal(10**3), "M": Decimal(10**6), "G": Decimal(10**9), "T": Decimal(10**12), "P": Decimal(10**15),
    "E": Decimal(10**18), "Ki": Decimal(2**10), "Mi": Decimal(2**20), "Gi": Decimal(2**30), "Ti": Decimal(2**40),
    "Pi": Decimal(2**50), "Ei": Decimal(2**60),
}  # fmt: skip
_AMOUNTS: Final = frozenset({"requests", "limits"})
_AMOUNT: Final = frozenset({"sizeLimit", "divisor"})
_ABSENT: Final = object()


def in_force(manifest: Mapping[str, Any], live: Mapping[str, Any], manager: str) -> bool:
    """Whether applying `manifest` as `manager` would leave `live` as it is."""
    record = _record(live, manager)
    if record is None:
        return False
    wanted = {key: value for key, value in manifest.items() if key not in _IDENTITY}
    wanted["metadata"] = {key: value for key, value in manifest["metadata"].items() if key not in _META_IDENTITY}
    return _matches(wanted, live, record)


def owns(live: Mapping[str, Any], manager: str, *path: str) -> bool:
    """Whether a field is as `manager` applied it: a change by anybody else takes it from the record."""
    record = _record(live, manager)
    for name in path:
        record = None if record is None else record.get(f"f:{name}")
    return record is not None


def _record(live: Mapping[str, Any], manager: str) -> Mapping[str, Any] | None:
    for entry in live["metadata"].get("managedFields", ()):
        if entry.get("manager") == manager and entry.get("operation") == "Apply" and not entry.get("subresource"):
            fields: Mapping[str, Any] = entry["fieldsV1"]
            return fields
    return None


def _matches(wanted: Any, live: Any, record: Mapping[str, Any], key: str = "") -> bool:
    """`record` is the fieldsV1 below this point; empty for a scalar, and for lists and maps that are owned whole.

    `key` is the name of the field.
    """
    parts = {part: below for part, below in record.items() if part != "."}
    if not parts:
        return _contains(wanted, live) or (key in _AMOUNT and _same_quantity(wanted, live))
    if isinstance(wanted, Mapping) and isinstance(live, Mapping):
        if {f"f:{name}" for name in wanted} != parts.keys():
            return False
        if key in _AMOUNTS:
            return all(_same_quantity(value, live.get(name)) for name, value in wanted.items())
        return all(_matches(value, live.get(name, _ABSENT), parts[f"f:{name}"], name) for name, value in wanted.items())
    if isinstance(wanted, list) and isinstance(live, list):
        if len(wanted) != len(parts):
            return False
        return all(_item_matches(part, wanted, live, below) for part, below in parts.items())
    return False


def _item_matches(key: str, wanted: list[Any], live: list[Any], record: Mapping[str, Any]) -> bool:
    """One item of a list that is merged by key (`k:`) or of a set (`v:`)."""
    kind, _, text = key.partition(":")
    value = json.loads(text)
    if kind == "v":
        return value in wanted and value in live
    here, there = _keyed(wanted, value), _keyed(live, value)
    return here is not None and there is not None and _matches(here, there, record)


def _keyed(items: list[Any], key: Mapping[str, Any]) -> Any | None:
    return next((item for item in items if all(item.get(name) == value for name, value in key.items())), None)


def _contains(wanted: Any, live: Any) -> bool:
    """`live` has all that `wanted` has; what it has besides are the server's defaults, as we own the whole."""
    if live is _ABSENT:
        return not wanted  # the server leaves empty values out
    if isinstance(wanted, Mapping):
        if not isinstance(live, Mapping):
            return False
        return all(_contains(value, live.get(name, _ABSENT)) for name, value in wanted.items())
    if isinstance(wanted, list):
        return isinstance(live, list) and len(wanted) == len(live) and all(map(_contains, wanted, live))
    return bool(wanted == live)


def _same_quantity(wanted: Any, live: Any) -> bool:
    """The server writes quantities its own way: 1000m of CPU comes back as "1"."""
    left, right = _quantity(str(wanted)), _quantity(str(live))
    return left is not None and left == right


def _quantity(text: str) -> Decimal | None:
    number = text.rstrip("numkMGTPEi")
    scale = _SUFFIXES.get(text[len(number) :])
    try:
        return Decimal(number) * scale if scale is not None else None
    except InvalidOperation:
        return None
