"""As much of the Kubernetes API as the operator uses: plain dicts over HTTP, a time limit on every request."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any, Final, Protocol

import aiohttp

from . import names
from .session import Connection, Session

Object = dict[str, Any]
Query = dict[str, str]

_PATHS: Final[Mapping[str, tuple[str, str]]] = {
    names.KIND: (f"apis/{names.GROUP}/{names.VERSION}", names.PLURAL),
    "StatefulSet": ("apis/apps/v1", "statefulsets"),
    "PodDisruptionBudget": ("apis/policy/v1", "poddisruptionbudgets"),
    "NetworkPolicy": ("apis/networking.k8s.io/v1", "networkpolicies"),
    "Lease": ("apis/coordination.k8s.io/v1", "leases"),
    "Service": ("api/v1", "services"),
    "Secret": ("api/v1", "secrets"),
    "ConfigMap": ("api/v1", "configmaps"),
    "ServiceAccount": ("api/v1", "serviceaccounts"),
    "Pod": ("api/v1", "pods"),
    "Node": ("api/v1", "nodes"),
    "Event": ("api/v1", "events"),
}

_MISFIT: Final = "failed to create typed patch object"
"""The API server's words for a manifest with a field that its kind does not have, or of another type."""


class ApiError(Exception):
    """The API server refused or could not be reached.  `status` is the HTTP status, 0 if there was no answer.

    `words` are the server's own, without the request.
    """

    def __init__(self, status: int, reason: str, message: str, words: str = "") -> None:
        super().__init__(message)
        self.status, self.reason, self.words = status, reason, words or message


class Cluster(Protocol):
    """What the reconciler needs; tests put faults and counters between it and the real one.

    All raise `ApiError`, but `get` and `delete` take a missing object as an answer.
    """

    async def get(self, kind: str, namespace: str | None, name: str) -> Object | None: ...

    async def list(self, kind: str, namespace: str | None, labels: Mapping[str, str]) -> list[Object]: ...

    async def apply(self, manifest: Object, subresource: str = "") -> Object: ...

    async def merge(self, kind: str, namespace: str, name: str, patch: Object) -> Object: ...

    async def create(self, manifest: Object) -> Object: ...

    async def delete(self, kind: str, namespace: str, name: str, uid: str) -> None: ...

    async def evict(self, namespace: str, name: str, uid: str, version: str) -> None: ...


class Kube:
    """The API server behind `login`, which is called again when the credentials have expired.

    `timeout` is in seconds, for one request as a whole.  The caller closes it.
    """

    def __init__(self, login: Callable[[], Connection], *, timeout: float = 10.0) -> None:
        self._login, self._timeout = login, timeout
        self._session: Session | None = None

    async def close(self) -> None:
        """Return when every connection is closed."""
        session, self._session = self._session, None
        if session:
            await session.close()

    async def get(self, kind: str, namespace: str | None, name: str) -> Object | None:
        """The object, or None if there is none."""
        try:
            return await self._request("GET", _path(kind, namespace, name))
        except ApiError as error:
            if error.status == 404:
                return None
            raise

    async def list(self, kind: str, namespace: str | None, labels: Mapping[str, str]) -> list[Object]:
        """All objects with these labels, in a namespace or in all.  Items carry no kind: the API omits it in lists."""
        query = {"labelSelector": names.label_selector(dict(labels))} if labels else {}
        answer = await self._request("GET", _path(kind, namespace), query)
        items: list[Object] = answer["items"]
        return items

    async def apply(self, manifest: Object, subresource: str = "") -> Object:
        """Server-side apply with force: the fields of `manifest` become ours, those that we left out go."""
        meta = manifest["metadata"]
        path = _path(manifest["kind"], meta.get("namespace"), meta["name"], subresource)
        query = {"fieldManager": names.MANAGER, "force": "true"}
        try:
            return await self._request("PATCH", path, query, manifest, "application/apply-patch+yaml")
        except ApiError as error:
            if _MISFIT not in error.words:
                raise
            raise ApiError(422, "Invalid", str(error), error.words) from None  # the API server calls it its own fault

    async def merge(self, kind: str, namespace: str, name: str, patch: Object) -> Object:
        """JSON merge patch."""
        query = {"fieldManager": names.MANAGER}
        return await self._request("PATCH", _path(kind, namespace, name), query, patch, "application/merge-patch+json")

    async def create(self, manifest: Object) -> Object:
        """Create, and fail if it exists."""
        path = _path(manifest["kind"], manifest["metadata"]["namespace"])
        return await self._request("POST", path, {"fieldManager": names.MANAGER}, manifest)

    async def replace(self, manifest: Object) -> Object:
        """Replace the version that `metadata.resourceVersion` names; 409 if it is no longer the current one."""
        meta = manifest["metadata"]
        path = _path(manifest["kind"], meta["namespace"], meta["name"])
        return await self._request("PUT", path, {"fieldManager": names.MANAGER}, manifest)

    async def delete(self, kind: str, namespace: str, name: str, uid: str) -> None:
        """Delete exactly this object; one that has gone, or was replaced by another, counts as deleted."""
        options = {"preconditions": {"uid": uid}, "propagationPolicy": "Background"}
        try:
            await self._request("DELETE", _path(kind, namespace, name), {}, options)
        except ApiError as error:
            if error.status not in (404, 409):
                raise

    async def evict(self, namespace: str, name: str, uid: str, version: str) -> None:
        """Delete a pod if its disruption budget allows (429 if not), and if it is as it was seen (409 if not)."""
        preconditions = {"uid": uid, "resourceVersion": version}
        eviction = {
            "apiVersion": "policy/v1",
            "kind": "Eviction",
            "metadata": {"name": name, "namespace": namespace},
            "deleteOptions": {"preconditions": preconditions},
        }
        await self._request("POST", _path("Pod", namespace, name, "eviction"), {}, eviction)

    async def serves_regions(self) -> bool:
        """Whether the API server knows the CRD."""
        try:
            resources = await self._request("GET", f"apis/{names.GROUP}/{names.VERSION}")
        except ApiError as error:
            if error.status == 404:
                return False
            raise
        return any(resource["name"] == names.PLURAL for resource in resources["resources"])

    async def _request(
        self,
        method: str,
        path: str,
        query: Query | None = None,
        body: Object | None = None,
        content_type: str = "application/json",
    ) -> Object:
        try:
            return await self._once(method, path, query, body, content_type)
        except ApiError as error:
            if error.status != 401:
                raise
        await self.close()  # the token has been renewed meanwhile: log in again
        return await self._once(method, path, query, body, content_type)

    async def _once(
        self, method: str, path: str, query: Query | None, body: Object | None, content_type: str
    ) -> Object:
        session = self._session = self._session or Session(self._login(), limit=32, timeout=self._timeout)
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": content_type} if body is not None else {}
        try:
            async with session.http.request(
                method, f"{session.server}/{path}", params=query, data=data, headers=headers
            ) as response:
                text = await response.text()
                status = response.status
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            what = f"no answer within {self._timeout:g} s" if isinstance(error, TimeoutError) else str(error)
            raise ApiError(0, "Unreachable", f"{method} /{path}: {what}") from error
        answer = _json(text)
        if status >= 400:
            message = answer.get("message") or text[:200] or "no message"
            raise ApiError(status, str(answer.get("reason") or status), f"{method} /{path}: {message}", message)
        return answer


def _path(kind: str, namespace: str | None, name: str = "", subresource: str = "") -> str:
    group, plural = _PATHS[kind]
    parts = [group, f"namespaces/{namespace}" if namespace else "", plural, name, subresource]
    return "/".join(part for part in parts if part)


def _json(text: str) -> Object:
    try:
        answer = json.loads(text)
    except ValueError:
        return {}
    return answer if isinstance(answer, dict) else {}
