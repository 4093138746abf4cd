"""`spec.override`: patches for what the API does not name, and what they must leave alone."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from .. import names

if TYPE_CHECKING:
    from .region import Region

Patch = Mapping[str, Any]

LIST_KEYS: Final[Mapping[str, str]] = {
    "containers": "name",
    "initContainers": "name",
    "volumes": "name",
    "env": "name",
    "imagePullSecrets": "name",
    "volumeMounts": "mountPath",
}
"""Lists that are merged by a key of their items, as in `kubectl patch`; others are replaced as a whole."""

_RELAY: Final = "spec.template.spec.containers[derper]"
_KEPT: Final[Mapping[str, tuple[str, ...]]] = {
    "statefulSet": (
        "spec.replicas",
        "spec.selector",
        "spec.serviceName",
        "spec.podManagementPolicy",
        "spec.updateStrategy",
        "spec.volumeClaimTemplates",
        *(f"{_RELAY}.{name}" for name in ("image", "command", "args", "ports", "env[POD_NAME]")),
        *(f"{_RELAY}.volumeMounts[{path}]" for path in (names.SECRET_DIR, names.CONFIG_DIR, names.CLIENTS_DIR)),
        *(f"spec.template.spec.volumes[{name}]" for name in ("keys", "settings", "clients")),
    ),
    "service": ("spec.type", "spec.selector", "spec.ports", "spec.publishNotReadyAddresses"),
}


@dataclass(frozen=True, slots=True)
class Override:
    """Patches for the StatefulSet and for the Service of each relay."""

    stateful_set: Patch = field(default_factory=dict)
    service: Patch = field(default_factory=dict)


def parse(spec: Mapping[str, Any]) -> Override:
    return Override(stateful_set=spec.get("statefulSet") or {}, service=spec.get("service") or {})


def check(region: Region) -> list[str]:
    found = []
    for name, patch in (("statefulSet", region.override.stateful_set), ("service", region.override.service)):
        found += [f"spec.override.{name} {problem}" for problem in _problems(patch, _KEPT[name])]
    if found:
        return found
    for number in range(len(region.tls.certificates)):
        if _sets(region.override.stateful_set, f"spec.template.spec.volumes[tls-{number}]"):
            found.append(
                f"spec.override.statefulSet sets the volume tls-{number}, which the operator needs: rename it."
            )
    return found


def deletes(value: Any) -> bool:
    """Whether a value in a patch means that there should be none.  A null gets lost in merge patches of `kubectl`."""
    return value is None or (isinstance(value, Mapping) and value.get("$patch") == "delete")


def _problems(patch: Patch, kept: tuple[str, ...]) -> Iterator[str]:
    yield from (f"has {part}: only metadata and spec can be patched." for part in patch.keys() - {"metadata", "spec"})
    unnamed = list(_lists(patch, ""))
    if unnamed:
        yield from unnamed  # the rest relies on the shape
        return
    for path in kept:
        if _sets(patch, path):
            yield f"sets {path}, which the operator needs as it is: remove it."
    for path in ("metadata", "spec.template.metadata"):
        meta = _at(patch, path)
        if not isinstance(meta, Mapping):
            yield f"removes {path}, which the operator needs: remove that."
            continue
        for part in sorted(meta.keys() - {"labels", "annotations"}):
            yield f"sets {path}.{part}: only labels and annotations can be patched there."
        for part in ("labels", "annotations"):
            keys = meta.get(part, {})
            if not isinstance(keys, Mapping) or deletes(keys):
                yield f"has no map in {path}.{part}: write keys with values."
                continue
            for key in sorted(names.reserved(keys)):
                yield f"sets {path}.{part}.{key}, which is the operator's own: choose another key."


def _lists(patch: Any, path: str) -> Iterator[str]:
    """Items of keyed lists that do not say which they are."""
    for name, value in patch.items() if isinstance(patch, Mapping) else ():
        where = f"{path}.{name}".lstrip(".")
        if name in LIST_KEYS and isinstance(value, list):
            key = LIST_KEYS[name]
            for number, item in enumerate(value):
                if not isinstance(item, Mapping) or not isinstance(item.get(key), str):
                    yield f"has no {key} in {where}[{number}]: say which item it is."
                else:
                    yield from _lists(item, f"{where}[{number}]")
        else:
            yield from _lists(value, where)


def _at(patch: Patch, path: str) -> Any:
    """What stands at a path of names; an empty map if the patch does not go there."""
    found: Any = patch
    for part in path.split("."):
        if not isinstance(found, Mapping):
            return found
        found = found.get(part, {})
    return found


def _sets(patch: Patch, path: str) -> bool:
    """Whether a patch changes what stands at a path, or anything above it as a whole."""
    found: Any = patch
    for part, key in re.findall(r"([^.\[]+)(?:\[([^]]+)\])?", path):
        if not isinstance(found, Mapping) or deletes(found):
            return True
        if part not in found:
            return False
        found = found[part]
        if key:
            if not isinstance(found, list):
                return True
            items = [item for item in found if item.get(LIST_KEYS[part]) == key]
            if not items:
                return False
            found = items[0]
    return True
