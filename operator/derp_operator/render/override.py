"""Lays the user's patches over manifests, as `kubectl patch` would.  What they may not touch, the spec's rules say."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..spec.override import LIST_KEYS, Patch, deletes


def patched(manifest: Mapping[str, Any], patch: Patch) -> dict[str, Any]:
    """`manifest` with `patch` over it: null and `$patch: delete` remove, keyed lists are merged, others replaced."""
    result = dict(manifest)
    for name, value in patch.items():
        if deletes(value):
            result.pop(name, None)
        else:
            result[name] = _patched(name, result.get(name), value)
    return result


def _patched(name: str, old: Any, new: Any) -> Any:
    if isinstance(new, Mapping):
        return patched(old if isinstance(old, Mapping) else {}, new)
    if name in LIST_KEYS and isinstance(new, list):
        key = LIST_KEYS[name]
        items = {item[key]: item for item in old or ()}
        items |= {item[key]: patched(items.get(item[key], {}), item) for item in new if not deletes(item)}
        gone = {item[key] for item in new if deletes(item)}
        return [item for name, item in items.items() if name not in gone]
    return new
