"""An API server in memory, as far as the operator relies on one.

Objects are replaced, never changed in place: a snapshot of the store stays what it was.  tests/api/test_fakeapi.py
holds it against a real API server.
"""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
import marshal
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import datetime, timedelta
from decimal import Decimal
from typing import Any, Final

from derp_operator import names
from derp_operator.conditions import timestamp
from derp_operator.kube import ApiError, Object

from . import crdschema
from .fieldsets import Fields, changes, manifest_fields, merged, subtract, union, without

Key = tuple[str, str, str]
"""Kind, namespace (empty for none), name."""
Store = dict[Key, Object]

NODE_PORTS: Final = range(30000, 32768)
_IMMUTABLE: Final[Mapping[str, tuple[str, ...]]] = {
    "StatefulSet": ("selector", "serviceName", "podManagementPolicy", "volumeClaimTemplates"),
}
_COUNTED: Final = frozenset({names.KIND, "StatefulSet", "PodDisruptionBudget", "NetworkPolicy"})


class FakeApi:
    """`now` gives UTC.  `history` has the store as it was after each write."""

    def __init__(self, now: Callable[[], datetime]) -> None:
        self.now = now
        self.store: Store = {}
        self.history: list[Store] = [{}]
        self._revision = itertools.count(2)
        self._uids = itertools.count(1)
        self._schema = crdschema.schema()

    def fork(self, now: Callable[[], datetime]) -> FakeApi:
        """Another one with the same objects and no history."""
        other = copy.copy(self)
        other.now, other.history = now, [self.store]
        other._revision, other._uids = copy.copy(self._revision), copy.copy(self._uids)
        return other

    # -- reading

    async def get(self, kind: str, namespace: str | None, name: str) -> Object | None:
        return read(self.store, kind, namespace, name)

    async def list(self, kind: str, namespace: str | None, labels: Mapping[str, str]) -> list[Object]:
        return listed(self.store, kind, namespace, labels)

    # -- writing

    async def apply(self, manifest: Object, subresource: str = "", manager: str = names.MANAGER) -> Object:
        """Server-side apply with force."""
        manifest = clone(manifest)
        key, meta = _key(manifest), manifest["metadata"]
        old = self.store.get(key)
        _check_pins(meta, old)
        if subresource:
            if old is None:
                raise ApiError(404, "NotFound", f"{key} not found")
            manifest = {
                **{part: manifest[part] for part in ("apiVersion", "kind", "metadata")},
                subresource: manifest[subresource],
            }
        else:
            manifest.pop("status", None)
        return self._put(key, self._applied(manifest, old, subresource, manager), old)

    async def merge(
        self, kind: str, namespace: str | None, name: str, patch: Object, manager: str = names.MANAGER
    ) -> Object:
        """JSON merge patch; also of a status."""
        old = self._existing(kind, namespace, name)
        new = _patched(old, clone(patch))
        return self._put((kind, namespace or "", name), self._owned(old, new, manager), old)

    async def create(self, manifest: Object, manager: str = names.MANAGER) -> Object:
        new = clone(manifest)
        meta = new["metadata"]
        if "name" not in meta:
            meta["name"] = f"{meta['generateName']}{next(self._uids):05}"
        key = _key(new)
        if key in self.store:
            raise ApiError(409, "AlreadyExists", f"{key} already exists")
        return self._put(key, self._owned({"kind": new["kind"], "metadata": {}}, new, manager), None)

    async def replace(self, manifest: Object, manager: str = names.MANAGER) -> Object:
        new = clone(manifest)
        old = self._existing(*_key(new))
        if new["metadata"].get("resourceVersion", old["metadata"]["resourceVersion"]) != _version(old):
            raise _conflict("the object has been modified")
        return self._put(_key(new), self._owned(old, new, manager), old)

    async def delete(self, kind: str, namespace: str | None, name: str, uid: str = "") -> None:
        """A pod gets its time to stop: the world takes it away."""
        old = self.store.get((kind, namespace or "", name))
        if old is None or (uid and old["metadata"]["uid"] != uid):
            return
        if kind == "Pod" and "deletionTimestamp" not in old["metadata"]:
            gone = {
                **old,
                "metadata": {**old["metadata"], "deletionTimestamp": timestamp(self.now() + timedelta(seconds=30))},
            }
            self._put((kind, namespace or "", name), gone, old)
        elif kind != "Pod":
            self.remove((kind, namespace or "", name))

    async def evict(self, namespace: str, name: str, uid: str, version: str) -> None:
        """As the real one: 429 while the disruption budget allows none."""
        old = self._existing("Pod", namespace, name)
        if old["metadata"]["uid"] != uid or _version(old) != version:
            raise _conflict("the pod is another one by now")
        ready = _is_ready(old)
        for budget in listed(self.store, "PodDisruptionBudget", namespace, {}):
            selector = budget["spec"]["selector"]["matchLabels"]
            if ready and _selected(old, selector):
                if budget.get("status", {}).get("disruptionsAllowed", 0) < 1:
                    words = "Cannot evict pod as it would violate the pod's disruption budget."
                    raise ApiError(429, "TooManyRequests", words)
                await self.merge(
                    "PodDisruptionBudget",
                    namespace,
                    budget["metadata"]["name"],
                    {"status": {"disruptionsAllowed": 0}},
                    "disruption",
                )
        await self.delete("Pod", namespace, name, uid)

    def remove(self, key: Key) -> None:
        """Gone at once."""
        self.store = {other: item for other, item in self.store.items() if other != key}
        self.history.append(self.store)

    # -- what a write amounts to

    def _applied(self, manifest: Object, old: Object | None, subresource: str, manager: str) -> Object:
        kind = manifest["kind"]
        live: Object = old or {"apiVersion": manifest["apiVersion"], "kind": kind, "metadata": {}}
        ours, others = _records(live, manager, "Apply", subresource)
        wanted = manifest_fields(manifest)
        path = (kind,)
        if subresource:  # the operator alone writes it, and writes the whole
            new = {**live, subresource: manifest[subresource]}
        else:
            body = {
                **manifest,
                "metadata": {k: v for k, v in manifest["metadata"].items() if k not in ("uid", "resourceVersion")},
            }
            new = merged(without(live, ours, wanted, [item["fieldsV1"] for item in others], path), body, path)
            lost = changes(live, new, path)
            others = [item | {"fieldsV1": subtract(item["fieldsV1"], lost)} for item in others]
        record = _record(manager, "Apply", wanted, subresource)
        return _with_records(new, [record, *(item for item in others if item["fieldsV1"])])

    def _owned(self, old: Object, new: Object, manager: str) -> Object:
        """`new` with the record that `manager` has changed what differs."""
        changed = changes(_plain(old), _plain(new), (new["kind"],))
        changed = {
            label: below for label, below in changed.items() if label in ("f:metadata", "f:spec", "f:data", "f:status")
        }
        ours, others = _records(new, manager, "Update", "")
        rest = [item | {"fieldsV1": subtract(item["fieldsV1"], changed)} for item in others]
        mine = union(ours, changed)
        records = [item for item in rest if item["fieldsV1"]] + ([_record(manager, "Update", mine, "")] if mine else [])
        return _with_records(new, records)

    def _put(self, key: Key, new: Object, old: Object | None) -> Object:
        new = self._defaulted(key, new, old)
        meta = dict(new["metadata"])
        if old is None:
            meta |= {"uid": f"uid-{next(self._uids)}", "creationTimestamp": timestamp(self.now())}
            if key[0] in _COUNTED:
                meta["generation"] = 1
        else:
            meta |= {name: old["metadata"][name] for name in ("uid", "creationTimestamp")}
            if key[0] in _COUNTED:
                meta["generation"] = old["metadata"]["generation"] + (old.get("spec") != new.get("spec"))
            if _same(old, {**new, "metadata": meta}):
                return copied(old)
        meta["resourceVersion"] = str(next(self._revision))
        stored = {**new, "metadata": meta}
        self.store = {**self.store, key: stored}
        self.history.append(self.store)
        return copied(stored)

    def _defaulted(self, key: Key, new: Object, old: Object | None) -> Object:
        kind = key[0]
        if kind == names.KIND:
            self._check_region(new, old)
            return {**new, "spec": defaulted(new["spec"], self._schema["properties"]["spec"])}
        if old is not None:
            for field in _IMMUTABLE.get(kind, ()):
                if new["spec"].get(field) != old["spec"].get(field):
                    raise _invalid(f"{kind} {key[2]}: spec: Forbidden: updates to {field} are forbidden")
        if kind == "Service":
            return {"status": {"loadBalancer": {}}, **new, "spec": self._service(key, new["spec"], old)}
        if kind == "StatefulSet":
            return {"status": {"replicas": 0}, **new, "spec": _stateful_set(new["spec"])}
        return new

    def _check_region(self, new: Object, old: Object | None) -> None:
        spec = {key: value for key, value in new["spec"].items() if value is not None}
        wrong = [*crdschema.problems(spec, self._schema["properties"]["spec"], "spec")]
        if old is not None and spec.get("regionID") != old["spec"]["regionID"]:
            wrong.append("spec.regionID cannot change")
        if wrong:
            raise _invalid("; ".join(wrong))

    def _service(self, key: Key, spec: Object, old: Object | None) -> Object:
        found = dict(spec)
        was = old["spec"] if old else {}
        kind = found.setdefault("type", "ClusterIP")
        if was.get("type") == kind == "LoadBalancer" and was.get("loadBalancerClass") != found.get("loadBalancerClass"):
            raise _invalid(f"Service {key[2]}: spec.loadBalancerClass: may not change once set")
        families = found.get("ipFamilies") or was.get("ipFamilies") or ["IPv4"]
        if was and was["ipFamilies"][0] != families[0]:
            raise _invalid(f"Service {key[2]}: spec.ipFamilies[0]: may not change once set")
        if found.get("ipFamilyPolicy") == "SingleStack":
            families = families[:1]
        elif len(families) == 1:
            families = [families[0], "IPv6" if families[0] == "IPv4" else "IPv4"]
        found["ipFamilies"] = families
        if found.get("clusterIP") != "None":
            found["clusterIPs"] = [_cluster_address(key, family) for family in families]
            found["clusterIP"] = found["clusterIPs"][0]
        else:
            found["clusterIPs"] = ["None"]
        if kind in ("NodePort", "LoadBalancer"):
            found.setdefault("externalTrafficPolicy", "Cluster")
            found["ports"] = list(self._node_ports(key, found["ports"]))
        else:
            found.pop("externalTrafficPolicy", None)
            found["ports"] = [{k: v for k, v in port.items() if k != "nodePort"} for port in found["ports"]]
        return found

    def _node_ports(self, key: Key, ports: Iterable[Object]) -> Iterator[Object]:
        taken = {
            (port["nodePort"], port["protocol"])
            for (kind, *_), item in self.store.items()
            if kind == "Service" and _key(item | {"kind": kind}) != key
            for port in item["spec"]["ports"]
            if "nodePort" in port
        }
        for port in ports:
            protocol = port["protocol"]
            if "nodePort" not in port:
                start = int(hashlib.sha256(f"{key}{port['name']}".encode()).hexdigest(), 16)
                tries = (NODE_PORTS[(start + step) % len(NODE_PORTS)] for step in range(len(NODE_PORTS)))
                yield {**port, "nodePort": next(number for number in tries if (number, protocol) not in taken)}
                continue
            if port["nodePort"] not in NODE_PORTS:
                raise _invalid(f"Service {key[2]}: provided port is not in the valid range")
            if (port["nodePort"], protocol) in taken:
                raise _invalid(f"Service {key[2]}: provided port is already allocated")
            yield port

    def _existing(self, kind: str, namespace: str | None, name: str) -> Object:
        found = self.store.get((kind, namespace or "", name))
        if found is None:
            raise ApiError(404, "NotFound", f"{kind} {name} not found")
        return found


def read(store: Store, kind: str, namespace: str | None, name: str) -> Object | None:
    found = store.get((kind, namespace or "", name))
    return clone(found) if found else None


def listed(store: Store, kind: str, namespace: str | None, labels: Mapping[str, str]) -> list[Object]:
    """The API omits kind and version in lists."""
    found = (
        item
        for (its_kind, space, _), item in sorted(store.items())
        if its_kind == kind and namespace in (None, space) and _selected(item, labels)
    )
    return [{key: value for key, value in clone(item).items() if key not in ("kind", "apiVersion")} for item in found]


def clone(item: Any) -> Any:
    """A deep copy of what JSON can say; examples spend most of their time here."""
    return marshal.loads(marshal.dumps(item))


def copied(item: Object) -> Object:
    found: Object = clone(item)
    return found


def defaulted(value: Any, schema: Mapping[str, Any]) -> Any:
    """`value` with the defaults of a structural schema; null where there is one counts as left out."""
    if isinstance(value, dict) and "properties" in schema:
        known = schema["properties"]
        given = {name: item for name, item in value.items() if item is not None}
        missing = {
            name: clone(part["default"]) for name, part in known.items() if "default" in part and name not in given
        }
        return {name: defaulted(item, known.get(name, {})) for name, item in (given | missing).items()}
    if isinstance(value, list) and "items" in schema:
        return [defaulted(item, schema["items"]) for item in value]
    return value


def _stateful_set(spec: Object) -> Object:
    template = spec["template"]
    containers = [
        {**item, "resources": {key: _amounts(value) for key, value in item.get("resources", {}).items()}}
        for item in template["spec"]["containers"]
    ]
    return {**spec, "template": {**template, "spec": {**template["spec"], "containers": containers}}}


def _amounts(amounts: Any) -> Any:
    return {name: _quantity(str(value)) for name, value in amounts.items()} if isinstance(amounts, dict) else amounts


def _quantity(text: str) -> str:
    """The commonest of the ways in which the server rewrites quantities."""
    if text.endswith("m") and Decimal(text[:-1]) % 1000 == 0:
        return str(int(text[:-1]) // 1000)
    if text.endswith("Mi") and Decimal(text[:-2]) % 1024 == 0:
        return f"{int(text[:-2]) // 1024}Gi"
    return text


def _cluster_address(key: Key, family: str) -> str:
    digest = hashlib.sha256(repr(key).encode()).digest()
    return f"198.19.{digest[0]}.{digest[1]}" if family == "IPv4" else f"fd00:198:19::{digest[0]:x}{digest[1]:02x}"


def _patched(item: Any, patch: Any) -> Any:
    """RFC 7386."""
    if not isinstance(patch, dict):
        return patch
    old = item if isinstance(item, dict) else {}
    kept = {key: value for key, value in old.items() if key not in patch}
    return kept | {key: _patched(old.get(key), value) for key, value in patch.items() if value is not None}


def _records(item: Object, manager: str, operation: str, subresource: str) -> tuple[Fields, list[Object]]:
    """What a manager owns, and the records of all others."""
    ours: Fields = {}
    others = []
    for record in item["metadata"].get("managedFields", ()):
        if (record["manager"], record["operation"], record.get("subresource", "")) == (manager, operation, subresource):
            ours = record["fieldsV1"]
        else:
            others.append(record)
    return ours, others


def _record(manager: str, operation: str, owned: Fields, subresource: str) -> Object:
    found: Object = {"manager": manager, "operation": operation, "fieldsType": "FieldsV1", "fieldsV1": owned}
    return found | ({"subresource": subresource} if subresource else {})


def _with_records(item: Object, records: list[Object]) -> Object:
    ordered = sorted(records, key=lambda record: json.dumps(record, sort_keys=True))
    return {**item, "metadata": {**item["metadata"], "managedFields": ordered}}


def _plain(item: Object) -> Object:
    meta = item["metadata"]
    kept = {key: meta[key] for key in ("labels", "annotations", "ownerReferences") if key in meta}
    return {**item, "metadata": kept}


def _check_pins(meta: Mapping[str, Any], old: Object | None) -> None:
    """The preconditions that a manifest carries."""
    if old is None:
        if "uid" in meta:
            raise _conflict("uid mismatch: no existing object was found")
        return
    if meta.get("uid", old["metadata"]["uid"]) != old["metadata"]["uid"]:
        raise _invalid("metadata.uid: Invalid value: field is immutable")
    if meta.get("resourceVersion", _version(old)) != _version(old):
        raise _conflict("the object has been modified")


def _same(old: Object, new: Object) -> bool:
    def shown(item: Object) -> Object:
        return {**item, "metadata": {k: v for k, v in item["metadata"].items() if k != "resourceVersion"}}

    return shown(old) == shown(new)


def _selected(item: Mapping[str, Any], labels: Mapping[str, str]) -> bool:
    own = item["metadata"].get("labels", {})
    return all(own.get(key) == value for key, value in labels.items())


def _is_ready(pod: Mapping[str, Any]) -> bool:
    found = pod.get("status", {}).get("conditions", ())
    return any(item["type"] == "Ready" and item["status"] == "True" for item in found)


def _key(manifest: Mapping[str, Any]) -> Key:
    meta = manifest["metadata"]
    return manifest["kind"], meta.get("namespace", ""), meta["name"]


def _version(item: Mapping[str, Any]) -> str:
    return str(item["metadata"]["resourceVersion"])


def _conflict(words: str) -> ApiError:
    return ApiError(409, "Conflict", words)


def _invalid(words: str) -> ApiError:
    return ApiError(422, "Invalid", words)
