"""Which manager owns which fields, as the API server records it: `fieldsV1` of a manifest, merged, taken away.

As much of structured-merge-diff as server-side apply with force needs; tests/api/test_fakeapi.py compares the result
with a real API server's.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any, Final

Fields = dict[str, Any]
Path = tuple[str, ...]
"""Names of the fields above, kind first; items of a list are in the list's own path."""

_ATOMIC: Final = frozenset(
    {"selector", "labelSelector", "podSelector", "nodeSelector", "fieldRef", "secretKeyRef", "configMapKeyRef",
     "ownerReferences", "imagePullSecrets", "requiredDuringSchedulingIgnoredDuringExecution"}
)  # fmt: skip
_KEYS: Final[Mapping[str, tuple[str, ...]]] = {
    "containers": ("name",), "initContainers": ("name",), "env": ("name",), "volumes": ("name",),
    "volumeMounts": ("mountPath",), "imagePullSecrets": ("name",), "ownerReferences": ("uid",),
    "topologySpreadConstraints": ("topologyKey", "whenUnsatisfiable"),
}  # fmt: skip


def fields(value: Any, path: Path) -> Fields:
    """The fields of `value`; empty for what is owned whole."""
    if isinstance(value, Mapping) and path[-1] not in _ATOMIC:
        return {f"f:{name}": fields(item, (*path, name)) for name, item in value.items()}
    keys = _keys(path) if isinstance(value, list) else ()
    return {_label(item, keys): _item_fields(item, path) for item in value} if keys else {}


def manifest_fields(manifest: Mapping[str, Any]) -> Fields:
    """What somebody who applies `manifest` owns: all but its identity."""
    wanted = {key: value for key, value in manifest.items() if key not in ("apiVersion", "kind")}
    meta = wanted.pop("metadata")
    own = {key: value for key, value in meta.items() if key not in ("name", "namespace", "uid", "resourceVersion")}
    return fields({"metadata": own} | wanted if own else wanted, (manifest["kind"],))


def merged(live: Any, wanted: Any, path: Path) -> Any:
    """`live` with the fields of `wanted`."""
    if isinstance(wanted, Mapping) and isinstance(live, Mapping) and path[-1] not in _ATOMIC:
        return {**live, **{name: merged(live.get(name), item, (*path, name)) for name, item in wanted.items()}}
    keys = _keys(path) if isinstance(wanted, list) and isinstance(live, list) else ()
    if not keys:
        return wanted
    old = {_label(item, keys): item for item in live}
    new = {_label(item, keys): item for item in wanted}
    ours = {label: _merged_item(old[label], item, path) if label in old else item for label, item in new.items()}
    return [*ours.values(), *(item for label, item in old.items() if label not in new)]


def without(live: Any, old: Fields, new: Fields, others: Iterable[Fields], path: Path) -> Any:
    """`live` without what is in `old`, but neither in `new` nor in what others own."""
    theirs = list(others)
    if isinstance(live, Mapping):
        kept = {}
        for name, item in live.items():
            label = f"f:{name}"
            rest = _rest(item, label, old, new, theirs, (*path, name))
            if rest is not _GONE:
                kept[name] = rest
        return kept
    keys = _keys(path) if isinstance(live, list) else ()
    if not keys:
        return live
    rests = (_rest(item, _label(item, keys), old, new, theirs, path, item=True) for item in live)
    return [rest for rest in rests if rest is not _GONE]


_GONE: Final = object()


def _rest(
    live: Any, label: str, old: Fields, new: Fields, others: list[Fields], path: Path, *, item: bool = False
) -> Any:
    if label not in old:
        return live
    theirs = [each[label] for each in others if label in each]
    if label not in new and not theirs:
        return _GONE
    if item and path[-1] in _ATOMIC:
        return live
    return without(live, old[label], new.get(label, {}), theirs, (*path, "") if item else path)


def subtract(owned: Fields, taken: Fields) -> Fields:
    """`owned` without the leaves of `taken`."""
    rest: Fields = {}
    for label, below in owned.items():
        if label not in taken:
            rest[label] = below
        elif below and taken[label]:
            left = subtract(below, taken[label])
            if left:
                rest[label] = left
    return rest


def union(one: Fields, other: Fields) -> Fields:
    return one | {label: union(one.get(label, {}), below) for label, below in other.items()}


def changes(before: Any, after: Any, path: Path) -> Fields:
    """The fields of `after` that differ from `before`."""
    if before == after:
        return {}
    if isinstance(before, Mapping) and isinstance(after, Mapping) and path[-1] not in _ATOMIC:
        return {
            f"f:{name}": changes(before.get(name), item, (*path, name))
            for name, item in after.items()
            if before.get(name) != item
        }
    return fields(after, path)


def _keys(path: Path) -> tuple[str, ...]:
    if path[-1] == "ports":
        if path[-2:] == ("spec", "ports"):
            return ("port", "protocol")
        return ("containerPort", "protocol") if "containers" in path else ()
    return _KEYS.get(path[-1], ())


def _label(item: Mapping[str, Any], keys: Iterable[str]) -> str:
    return "k:" + json.dumps({key: item[key] for key in sorted(keys)}, separators=(",", ":"))


def _item_fields(item: Any, path: Path) -> Fields:
    return {} if path[-1] in _ATOMIC else {".": {}} | fields(item, (*path, ""))


def _merged_item(live: Any, wanted: Any, path: Path) -> Any:
    return wanted if path[-1] in _ATOMIC else merged(live, wanted, (*path, ""))
