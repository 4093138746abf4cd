"""What must hold of every history of a region, and what two worlds are compared by."""

from __future__ import annotations

import base64
import functools
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any, Final

import pytest
from derp_operator import names, publish
from derp_operator.kube import Object
from derp_operator.observe import content
from hypothesis import HealthCheck, Phase, settings

from derper import certs
from derper.derpmap import DERPMap, MapError, from_json, from_yaml

from .fakeapi import Store
from .fakeworld import NAME, SPACE, World

TIMES: Final = int(os.environ.get("PROOF", "1"))
"""How many times as many examples: `PROOF=50` for a night; random ones then, else the same each time."""
_VOLATILE: Final = frozenset(
    {"uid", "resourceVersion", "creationTimestamp", "generation", "observedGeneration", "lastTransitionTime",
     "publishedAt", "certNotAfter", "currentRevision"}
)  # fmt: skip
_OWN: Final = re.compile("[0-9a-f]{64}|[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9:]{8}Z")
_LEFT_OUT: Final = frozenset({"Event", "Node"})
Fingerprint = dict[str, Any]


def examples(count: int) -> settings:
    """The profile of a property.  Failures are shown as found: making them smaller would take minutes."""
    return settings(
        max_examples=count * TIMES,
        deadline=None,
        derandomize=TIMES == 1,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example],
    )


@pytest.fixture(autouse=True, scope="module")
def quick_yaml() -> Iterator[None]:
    """Reading maps again and again would be most of the time here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(publish, "from_yaml", functools.cache(from_yaml))
        yield


def fingerprint(place: World) -> Fingerprint:
    """All that a region amounts to, without what differs between any two: keys, pins, times, numbers."""
    return {
        f"{kind} {name}": _shown(kind, item)
        for (kind, space, name), item in sorted(place.api.store.items())
        if kind not in _LEFT_OUT and item["metadata"].get("labels", {}).get(names.REGION_LABEL) == NAME
    } | {"region": _masked(place.api.store[names.KIND, SPACE, NAME].get("status", {}))}


def same(one: Fingerprint, other: Fingerprint, *, whole: bool = True) -> str:
    """The first difference, empty if there is none.

    The Secret of `other` may hold more: nothing is ever taken out of it.  Without `whole` neither map nor status are
    compared: while a region is not ready they say what was before.
    """
    for key in sorted(one.keys() | other.keys()):
        if not whole and (key == "region" or key.startswith(("ConfigMap berlin-derpmap", "Pod "))):
            continue
        here, there = one.get(key), other.get(key)
        if key == f"Secret {names.keys_secret(NAME)}" and here and there:
            there = {**there, "data": [entry for entry in there["data"] if entry in here["data"]]}
        if here != there:
            return _difference(here, there, key)
    return ""


def _difference(here: Any, there: Any, where: str) -> str:
    if isinstance(here, dict) and isinstance(there, dict):
        key = next(key for key in sorted(here.keys() | there.keys()) if here.get(key) != there.get(key))
        return _difference(here.get(key), there.get(key), f"{where}, {key}")
    return f"{where}: {here} is not {there}"


def wrongs(place: World) -> Iterator[str]:
    """What was promised and not kept at any moment of a world's history."""
    for old, new in zip(place.api.history, place.api.history[1:], strict=False):
        yield from _wrong_keys(old, new)
        yield from _wrong_map(old, new)
        yield from _wrong_deletion(old, new)


def published(store: Store) -> list[DERPMap]:
    """The plain map in both forms; empty if there is none."""
    item = store.get(("ConfigMap", SPACE, names.derp_map(NAME)))
    data = content(item, "ConfigMap") if item else {}
    forms = ((names.MAP_JSON, from_json), (names.MAP_YAML, from_yaml))
    return [parse(data[key].decode()) for key, parse in forms if key in data]


def _wrong_keys(old: Store, new: Store) -> Iterator[str]:
    key = ("Secret", SPACE, names.keys_secret(NAME))
    if old.get(key) is new.get(key) or key not in old:
        return
    before, after = old[key]["data"], new.get(key, {"data": {}})["data"]
    pins = {node.cert_name for found in published(old) for each in found.regions.values() for node in each.nodes}
    for entry in before:
        if ".ip-" in entry and entry not in after and _pin(before, entry) not in pins:
            continue  # for an address that no client knows any more
        if before[entry] != after.get(entry):
            yield f"the Secret's entry {entry} has {'changed' if entry in after else 'gone'}"


def _pin(data: Mapping[str, str], entry: str) -> str:
    stem = entry.rpartition(".")[0]
    return certs.pin(certs.load_pair(*(base64.b64decode(data[f"{stem}.{end}"]) for end in ("crt", "key"))).leaf)


def _wrong_map(old: Store, new: Store) -> Iterator[str]:
    key = ("ConfigMap", SPACE, names.derp_map(NAME))
    if old.get(key) is new.get(key):
        return
    try:
        before, after = _nodes(old), _nodes(new)
    except MapError as error:
        yield f"the map cannot be read: {error}"
        return
    number = new[names.KIND, SPACE, NAME]["spec"]["regionID"]
    wanted = {names.node_name(number, ordinal) for ordinal in range(_replicas(new))}
    if not before and after and not wanted <= after:
        yield f"the first map is partial: {sorted(after)}"
    if (before - after) & wanted:
        yield f"the map has lost {sorted((before - after) & wanted)}"
    if before and not after:
        yield "the map has become empty"


def _nodes(store: Store) -> set[str]:
    forms = [{node.name for each in found.regions.values() for node in each.nodes} for found in published(store)]
    return set.intersection(*forms) if forms else set()


def _wrong_deletion(old: Store, new: Store) -> Iterator[str]:
    if len(new) >= len(old) or (names.KIND, SPACE, NAME) not in new:
        return
    wanted = {names.pod_name(NAME, ordinal) for ordinal in range(_replicas(new))}
    exposure = new[names.KIND, SPACE, NAME]["spec"]["exposure"]["type"]
    for kind, space, name in old.keys() - new.keys():
        item = old[kind, space, name]
        if kind == "Service" and name in wanted and exposure != "HostPort":
            yield f"Service {name} of a wanted node was deleted"
        elif kind in ("StatefulSet", "ServiceAccount", "Secret", "NetworkPolicy", "PodDisruptionBudget"):
            yield f"{kind} {name} was deleted"
        elif kind == "Pod" and name in wanted and not _outdated(item, old):
            yield f"pod {name} of a wanted node was stopped"


def _outdated(pod: Object, store: Store) -> bool:
    """Whether a pod is from another template than that of its StatefulSet when it went or was asked to go."""
    owner = store.get(("StatefulSet", SPACE, NAME), {})
    newest = owner.get("status", {}).get("updateRevision")
    return bool(pod["metadata"]["labels"].get("controller-revision-hash") != newest)


def _replicas(store: Store) -> int:
    return int(store[names.KIND, SPACE, NAME]["spec"]["replicas"])


def _shown(kind: str, item: Object) -> Object:
    found: Object = _masked({key: value for key, value in item.items() if key != "metadata"})
    meta = item["metadata"]
    found["owned"] = _masked(
        [
            each["fieldsV1"]
            for each in meta["managedFields"]
            if each["manager"] == names.MANAGER and not each.get("subresource")
        ]
    )
    found["meta"] = _masked({key: meta[key] for key in ("labels", "annotations") if key in meta and kind != "Pod"})
    if kind == "Secret":
        found |= {"data": sorted(item["data"]), "owned": ""}
    return found


def _masked(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _masked(item) for key, item in value.items() if key not in _VOLATILE}
    if isinstance(value, list):
        return [_masked(item) for item in value]
    return _OWN.sub("#", value) if isinstance(value, str) else value
