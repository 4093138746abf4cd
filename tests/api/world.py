"""A cluster without kubelets: the API server is real, pods and relays are played by the test."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager, contextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

import kopf
from derp_operator import names
from derp_operator.counting import CountingCluster, Watches
from derp_operator.keyring import Maker, system_maker
from derp_operator.kube import ApiError, Cluster, Kube, Object
from derp_operator.merge import merge
from derp_operator.observe import content, is_ready
from derp_operator.probe import Answer, Target
from derp_operator.reconcile import Reconciler
from derp_operator.resolve import Resolution

from derper.derpmap import DERPNode
from tests.files import Files

from .controlplane import ControlPlane

_numbers = itertools.count(1)
HANG = 40
"""Passes after which a region is taken to never settle."""


class Relays:
    """What relays would answer.  All is well but for what a test breaks.

    With `reading`, they serve what `World.play` has given them to read, but for those that are `stuck`.
    """

    def __init__(self, now: Callable[[], datetime]) -> None:
        self.now = now
        self.reading = False
        self.stuck: set[str] = set()
        self.files: dict[str, Files] = {}
        self.faults: dict[str, str] = {}
        self.cut: set[str] = set()
        self.asked: dict[str, Target] = {}
        self.known: set[str] = set()
        self.settings = ""

    async def reach(self, node: DERPNode) -> bool:
        return node.name not in self.cut

    async def ask(self, target: Target) -> Answer:
        self.asked[target.pod] = target
        fault = self.faults.get(target.pod)
        peers = self.known - {target.pod} - set(self.faults)
        if fault:
            return Answer((fault,))
        if target.pod in self.files:
            return self.files[target.pod].answer(target, peers, self.now())
        shown = {target.host_name: target.pin}
        return Answer(mesh=dict.fromkeys(peers, True), settings=self.settings, shown=shown)


class World:
    """One region in a namespace of its own, and the means to play the rest of the cluster."""

    def __init__(self, kube: Kube, namespace: str, name: str = "berlin") -> None:
        self.kube, self.namespace, self.name = kube, namespace, name
        self.relays = Relays(self.now)
        self.dns: dict[str, Resolution] = {}
        self.bad_images: set[str] = set()
        self.writes: Counter[str] = Counter()
        self.skew = timedelta()
        self.maker: Maker = system_maker()

    def now(self) -> datetime:
        return datetime.now(UTC) + self.skew

    def reconciler(self, cluster: Cluster | None = None) -> Reconciler:
        """A fresh one: it knows nothing."""
        counting = CountingCluster(cluster or self.kube, self.writes, Watches(lambda: 0.0))
        relays, image = self.relays, "localhost/derper:dev"
        return Reconciler(counting, relays.ask, self.resolve, self.maker, image, self.now, reach=relays.reach)

    async def resolve(self, name: str) -> Resolution:
        return self.dns.get(name, Resolution(fault="Name or service not known"))

    async def reconcile(self, cluster: Cluster | None = None) -> float | None:
        return await self.reconciler(cluster).reconcile(self.namespace, self.name)

    async def merge(self, cluster: Cluster | None = None) -> float | None:
        """The pass over the merged maps of the namespace."""
        counting = CountingCluster(cluster or self.kube, self.writes, Watches(lambda: 0.0))
        return await merge(counting, self.namespace)

    async def create(self, **spec: Any) -> Object:
        """The region, as a user would apply it."""
        return await self.kube.create(self.manifest(spec))

    async def change(self, **spec: Any) -> None:
        """Change fields of the spec; None removes one."""
        await self.kube.merge(names.KIND, self.namespace, self.name, {"spec": spec})

    async def replace(self, **spec: Any) -> None:
        """Replace the whole spec."""
        old = await self.region()
        await self.kube.replace(old | {"spec": self.manifest(spec)["spec"]})

    async def settle(self) -> Object:
        """Reconcile and play pods until a pass writes nothing; returns the region."""
        for _ in range(HANG):
            before = self.writes.total()
            await self.reconcile()
            moved = await self.play()
            if self.writes.total() == before and not moved:
                return await self.region()
        raise AssertionError(f"never settles: {await self.region()}")

    async def play(self) -> bool:
        """One round of StatefulSet and disruption controller and kubelets; returns whether they did anything."""
        owner = await self.kube.get("StatefulSet", self.namespace, self.name)
        if owner is None:
            return False
        if self.relays.reading:
            await self.read_files()
        pods = {pod["metadata"]["name"]: pod for pod in await self.pods()}
        wanted = {names.pod_name(self.name, number) for number in range(owner["spec"]["replicas"])}
        leaving = {name for name, pod in pods.items() if name not in wanted or "deletionTimestamp" in pod["metadata"]}
        for pod in leaving:
            await self.stop(pod)
        for pod in sorted(wanted - set(pods)):
            await self.start(owner, pod)
        moved = bool(leaving) or not wanted <= set(pods)
        moved |= await self._status("StatefulSet", owner, await self._statefulset_status(owner))
        return await self._play_budget() or moved

    async def read_files(self) -> None:
        """The kubelets bring the files up to date, and the relays read them."""
        text = (await self.data("ConfigMap", names.settings_map(self.name)))[names.SETTINGS_FILE].decode()
        found = Files(await self.data("Secret", names.keys_secret(self.name)), text)
        for pod in await self.pods():
            if pod["metadata"]["name"] not in self.relays.stuck:
                self.relays.files[pod["metadata"]["name"]] = found

    async def start(self, owner: Object, pod: str) -> None:
        """A pod that runs and is ready, but for a bad image."""
        number = int(pod.rpartition("-")[2])
        node = f"{self.namespace}-node-{number}"
        if await self.kube.get("Node", None, node) is None:
            body: Object = {"metadata": {"name": node}}
            await self.kube._request("POST", "api/v1/nodes", {}, body)
        template = owner["spec"]["template"]
        await self.kube.create(
            {
                "apiVersion": "v1",
                "kind": "Pod",
                "metadata": {
                    "name": pod,
                    "namespace": self.namespace,
                    "labels": template["metadata"]["labels"]
                    | {"statefulset.kubernetes.io/pod-name": pod, "controller-revision-hash": revision(owner)},
                    "annotations": template["metadata"].get("annotations", {}),
                },
                "spec": template["spec"] | {"nodeName": node},
            }
        )
        bad = template["spec"]["containers"][0]["image"] in self.bad_images
        waiting = {"name": "derper", "state": {"waiting": {"reason": "ImagePullBackOff", "message": "no such image"}}}
        await self.pod_status(
            pod,
            phase="Pending" if bad else "Running",
            podIP=None if bad else f"198.18.{number}.9",
            hostIP=f"198.18.255.{11 + number}",
            hostIPs=[{"ip": f"198.18.255.{11 + number}"}],
            conditions=[{"type": "Ready", "status": str(not bad)}],
            containerStatuses=[waiting] if bad else None,
        )
        if not bad:
            self.relays.known.add(pod)

    async def stop(self, pod: str) -> None:
        """A pod that is gone at once."""
        path = f"api/v1/namespaces/{self.namespace}/pods/{pod}"
        await self.kube._request("DELETE", path, {"gracePeriodSeconds": "0"})
        self.relays.known.discard(pod)

    async def node_addresses(self, number: int, *external: str) -> None:
        """What a cloud provider writes to the Node of a pod."""
        addresses = [{"type": "ExternalIP", "address": ip} for ip in external]
        path = f"api/v1/nodes/{self.namespace}-node-{number}/status"
        await self.kube._request(
            "PATCH", path, {}, {"status": {"addresses": addresses}}, "application/merge-patch+json"
        )

    async def node_meta(self, number: int, **meta: Mapping[str, str | None]) -> None:
        """Labels and annotations of the Node of a pod; None removes one."""
        path = f"api/v1/nodes/{self.namespace}-node-{number}"
        await self.kube._request("PATCH", path, {}, {"metadata": meta}, "application/merge-patch+json")

    async def lose_node(self, number: int) -> None:
        """A Node goes; its pod is still named, and will be for a while."""
        await self.kube._request("DELETE", f"api/v1/nodes/{self.namespace}-node-{number}")

    async def pod_status(self, pod: str, **status: Any) -> None:
        path = f"api/v1/namespaces/{self.namespace}/pods/{pod}/status"
        await self.kube._request("PATCH", path, {}, {"status": status}, "application/merge-patch+json")

    async def patch_status(self, kind: str, name: str, status: Object) -> None:
        """Write a status as a controller of the cluster would."""
        paths = {"Service": "api/v1/{}/services", "StatefulSet": "apis/apps/v1/{}/statefulsets"}
        paths["PodDisruptionBudget"] = "apis/policy/v1/{}/poddisruptionbudgets"
        path = f"{paths[kind].format(f'namespaces/{self.namespace}')}/{name}/status"
        await self.kube._request("PATCH", path, {}, {"status": status}, "application/merge-patch+json")

    async def _statefulset_status(self, owner: Object) -> Object:
        pods = await self.pods()
        fresh = [pod for pod in pods if pod["metadata"]["labels"]["controller-revision-hash"] == revision(owner)]
        return {
            "observedGeneration": owner["metadata"]["generation"],
            "replicas": len(pods),
            "updatedReplicas": len(fresh),
            "currentRevision": owner.get("status", {}).get("currentRevision") or revision(owner),  # OnDelete: for ever
            "updateRevision": revision(owner),
        }

    async def _play_budget(self) -> bool:
        budget = await self.kube.get("PodDisruptionBudget", self.namespace, self.name)
        owner = await self.get("StatefulSet", self.name)
        if budget is None:
            return False
        expected, healthy = owner["spec"]["replicas"], sum(is_ready(pod) for pod in await self.pods())
        status = {
            "observedGeneration": budget["metadata"]["generation"],
            "expectedPods": expected,
            "desiredHealthy": expected - 1,
            "currentHealthy": healthy,
            "disruptionsAllowed": max(0, healthy - expected + 1),
            "disruptedPods": None,
        }
        return await self._status("PodDisruptionBudget", budget, status)

    async def _status(self, kind: str, item: Object, status: Object) -> bool:
        """Write a status that is not as it should be; returns whether it was not."""
        if all((item.get("status", {}).get(key) or 0) == (value or 0) for key, value in status.items()):
            return False
        await self.patch_status(kind, self.name, status)
        return True

    async def region(self) -> Object:
        found = await self.kube.get(names.KIND, self.namespace, self.name)
        assert found
        return found

    async def get(self, kind: str, name: str) -> Object:
        found = await self.kube.get(kind, self.namespace, name)
        assert found, f"there is no {kind} {name}"
        return found

    async def pods(self) -> list[Object]:
        return await self.kube.list("Pod", self.namespace, names.labels(self.name))

    async def data(self, kind: str, name: str) -> dict[str, bytes]:
        return content(await self.get(kind, name), kind)

    async def remove(self, kind: str, name: str) -> None:
        found = await self.get(kind, name)
        await self.kube.delete(kind, self.namespace, name, found["metadata"]["uid"])

    async def events(self) -> list[tuple[str, str]]:
        found = await self.kube.list("Event", self.namespace, {})
        return [(item["type"], item["reason"]) for item in found]

    def manifest(self, spec: Mapping[str, Any]) -> Object:
        """The region with fields of its spec replaced; None leaves one out."""
        whole: Object = {"regionID": 900, "clients": {"open": True}, "exposure": {"type": "NodePort"}}
        whole |= {"map": {"spread": "0s"}, **spec}  # by default nobody waits
        return {
            "apiVersion": f"{names.GROUP}/{names.VERSION}",
            "kind": names.KIND,
            "metadata": {"name": self.name, "namespace": self.namespace},
            "spec": {key: value for key, value in whole.items() if value is not None},
        }


def revision(owner: Object) -> str:
    """The name of a StatefulSet's template."""
    return hashlib.sha256(json.dumps(owner["spec"]["template"], sort_keys=True).encode()).hexdigest()[:10]


def condition(region: Object, kind: str = "Ready") -> Object:
    """A condition of a region."""
    found: Object = next(item for item in region["status"]["conditions"] if item["type"] == kind)
    return found


class Recorder:
    """A cluster that notes each write, in order, and can fail one of them.

    `fail_at` counts from 1; `lost` is whether the request was carried out although its answer was lost.
    """

    def __init__(self, cluster: Cluster, fail_at: int = 0, *, status: int = 500, lost: bool = False) -> None:
        self._cluster, self._fail_at, self._status, self._lost = cluster, fail_at, status, lost
        self.writes: list[tuple[str, str, str]] = []

    async def get(self, kind: str, namespace: str | None, name: str) -> Object | None:
        return await self._cluster.get(kind, namespace, name)

    async def list(self, kind: str, namespace: str | None, labels: Mapping[str, str]) -> list[Object]:
        return await self._cluster.list(kind, namespace, labels)

    async def apply(self, manifest: Object, subresource: str = "") -> Object:
        verb = "status" if subresource else "apply"
        async with self._write(verb, manifest["kind"], manifest["metadata"]["name"]):
            return await self._cluster.apply(manifest, subresource)

    async def merge(self, kind: str, namespace: str, name: str, patch: Object) -> Object:
        async with self._write("merge", kind, name):
            return await self._cluster.merge(kind, namespace, name, patch)

    async def create(self, manifest: Object) -> Object:
        async with self._write("create", manifest["kind"], manifest["metadata"].get("name", "")):
            return await self._cluster.create(manifest)

    async def delete(self, kind: str, namespace: str, name: str, uid: str) -> None:
        async with self._write("delete", kind, name):
            await self._cluster.delete(kind, namespace, name, uid)

    async def evict(self, namespace: str, name: str, uid: str, version: str) -> None:
        async with self._write("evict", "Pod", name):
            await self._cluster.evict(namespace, name, uid, version)

    @asynccontextmanager
    async def _write(self, verb: str, kind: str, name: str) -> AsyncIterator[None]:
        self.writes.append((verb, kind, name))
        fails = len(self.writes) == self._fail_at
        if fails and not self._lost:
            raise ApiError(self._status, "Injected", "an injected fault")
        yield
        if fails:
            raise ApiError(0, "Injected", "the answer was lost")


@asynccontextmanager
async def world(api: ControlPlane) -> AsyncIterator[World]:
    """A fresh namespace.  Nothing removes it: without controllers that would not end."""
    kube = Kube(lambda: connection(api))
    namespace = f"test-{next(_numbers)}"
    try:
        await kube._request("POST", "api/v1/namespaces", {}, {"metadata": {"name": namespace}})
        yield World(kube, namespace)
    finally:
        await kube.close()


def connection(api: ControlPlane) -> kopf.ConnectionInfo:
    """The administrator's credentials."""
    with _environment(KUBECONFIG=str(api.kubeconfig)):
        found = kopf.login_with_kubeconfig(settings=kopf.OperatorSettings())
    assert found
    return found


@contextmanager
def _environment(**values: str) -> Any:
    old = {key: os.environ.get(key) for key in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for key, value in old.items():
            if value is None:
                del os.environ[key]
            else:
                os.environ[key] = value
