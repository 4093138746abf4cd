"""The cluster as the tests use it: kubectl, as a person types it, and a journal of what changes."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.interop.processes import HANG

Object = dict[str, Any]
"""A Kubernetes object."""

LINE_LIMIT = 8 << 20
_PATHS = {
    "ConfigMap": "api/v1/namespaces/{}/configmaps",
    "Pod": "api/v1/namespaces/{}/pods",
    "Service": "api/v1/namespaces/{}/services",
    "StatefulSet": "apis/apps/v1/namespaces/{}/statefulsets",
    "PodDisruptionBudget": "apis/policy/v1/namespaces/{}/poddisruptionbudgets",
    "Event": "api/v1/namespaces/{}/events",
    "DerpRegion": "apis/derp.network/v1alpha1/namespaces/{}/derpregions",
}


class KubectlError(Exception):
    """A command failed; the text is what it printed."""


@dataclass(frozen=True)
class Done:
    """What a command printed, and its status."""

    status: int
    out: str
    err: str


class Kube:
    """One cluster, as its administrator. No method blocks the loop: the traffic of the tests runs in it."""

    def __init__(self, kubectl: Path, helm: Path, kubeconfig: Path) -> None:
        self.kubectl = kubectl
        self.helm = helm
        self.kubeconfig = kubeconfig
        self._environ = os.environ | {
            "KUBECONFIG": str(kubeconfig),
            "PATH": f"{kubectl.parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}",
        }

    async def command(self, *argv: str | Path, stdin: str = "") -> Done:
        """Run a command for which this cluster is the current one."""
        process = await asyncio.create_subprocess_exec(
            *argv,
            env=self._environ,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        try:
            async with asyncio.timeout(4 * HANG):
                out, err = await process.communicate(stdin.encode())
        except BaseException:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()
            raise
        assert process.returncode is not None
        return Done(process.returncode, out.decode(errors="replace"), err.decode(errors="replace"))

    async def run(self, *arguments: str, manifest: Object | None = None) -> str:
        """Run kubectl, with `manifest` as its standard input. Raises KubectlError if it fails."""
        done = await self.command(self.kubectl, *arguments, stdin=json.dumps(manifest) if manifest else "")
        if done.status:
            raise KubectlError(f"kubectl {' '.join(arguments)}: {done.err or done.out}")
        return done.out

    async def refusal(self, *arguments: str, manifest: Object | None = None) -> str:
        """What a person reads when the cluster refuses the command; it must."""
        try:
            out = await self.run(*arguments, manifest=manifest)
        except KubectlError as error:
            return str(error)
        raise AssertionError(f"kubectl {' '.join(arguments)} was not refused: {out}")

    async def apply(self, *manifests: Object) -> None:
        for manifest in manifests:
            await self.run("apply", "--filename=-", manifest=manifest)

    async def get(self, kind: str, name: str, namespace: str) -> Object:
        found: Object = json.loads(await self.run("get", kind, name, f"--namespace={namespace}", "--output=json"))
        return found

    async def list(self, kinds: str, namespace: str, *options: str) -> list[Object]:
        """Objects of one kind, or of several separated by commas."""
        text = await self.run("get", kinds, f"--namespace={namespace}", "--output=json", *options)
        items: list[Object] = json.loads(text)["items"]
        return items

    async def wait(self, what: str, condition: str, namespace: str, *, seconds: float = 3 * HANG) -> None:
        """Wait until the cluster says so: `condition` is what kubectl wait --for takes."""
        arguments = [what, f"--for={condition}", f"--namespace={namespace}", f"--timeout={seconds:.0f}s"]
        await self.run("wait", *arguments)

    async def ready(self, region: str, namespace: str) -> None:
        """Wait until a region is Ready."""
        try:
            await self.wait(f"derpregion/{region}", "condition=Ready", namespace)
        except KubectlError as error:
            seen = await self.get("derpregion", region, namespace)
            raise KubectlError(f"{error}\n{json.dumps(seen.get('status'), indent=1)}") from None

    async def derp_map(self, region: str, namespace: str) -> Object:
        """The published map of a region."""
        return map_in(await self.get("configmap", f"{region}-derpmap", namespace))

    async def probe(self, region: str, namespace: str) -> Done:
        """`derper probe` of the published map, from this host."""
        derper = Path(sys.executable).with_name("derper")
        return await self.command(derper, "probe", "--configmap", f"{namespace}/{region}-derpmap")

    @contextlib.asynccontextmanager
    async def namespace(self, name: str, level: str = "restricted") -> AsyncIterator[str]:
        """A fresh namespace with this level of Pod Security; it is gone after the block."""
        labels = {"pod-security.kubernetes.io/enforce": level, "e2e": "derp-regions"}
        await self._delete_namespace(name)  # of a run that was cut short
        await self.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": labels}})
        try:
            yield name
        finally:
            await self._delete_namespace(name)

    async def _delete_namespace(self, name: str) -> None:
        """The pods first: the cluster looks again at a namespace with pods only after half of their grace period."""
        until = ["--wait", f"--timeout={3 * HANG:.0f}s"]
        for kind in ("derpregion", "statefulset", "pod"):
            await self.run("delete", kind, "--all", f"--namespace={name}", *until)
        await self.run("delete", "namespace", name, "--ignore-not-found", *until)


def region(name: str, namespace: str, region_id: int, **spec: Any) -> Object:
    """A DerpRegion that is open to all clients."""
    return {
        "apiVersion": "derp.network/v1alpha1",
        "kind": "DerpRegion",
        "metadata": {"name": name, "namespace": namespace},
        "spec": {"regionID": region_id, "clients": {"open": True}} | spec,
    }


def map_in(configmap: Object) -> Object:
    """The DERP map in its ConfigMap."""
    found: Object = json.loads(configmap["data"]["derpmap.json"])
    return found


def nodes_in(configmap: Object) -> list[str]:
    """The names of the nodes in a map's ConfigMap."""
    return [node["Name"] for region in map_in(configmap)["Regions"].values() for node in region["Nodes"]]


def condition(item: Object, kind: str) -> Object:
    """A condition of an object, or nothing."""
    found = item.get("status", {}).get("conditions", ())
    return next((entry for entry in found if entry["type"] == kind), {})


def is_true(item: Object, kind: str) -> bool:
    return condition(item, kind).get("status") == "True"


@dataclass(frozen=True)
class Change:
    """One event of a watch: `type` is ADDED, MODIFIED or DELETED, `at` our monotonic clock when we were told.

    The order of changes is that of `version`: all objects here are in one etcd, whose revisions resourceVersions are.
    """

    type: str
    object: Object
    at: float

    @property
    def kind(self) -> str:
        return str(self.object["kind"])

    @property
    def name(self) -> str:
        return str(self.object["metadata"]["name"])

    @property
    def uid(self) -> str:
        return str(self.object["metadata"]["uid"])

    @property
    def version(self) -> int:
        return int(self.object["metadata"]["resourceVersion"])

    @property
    def leaving(self) -> bool:
        """Whether the object is gone or about to go."""
        return self.type == "DELETED" or "deletionTimestamp" in self.object["metadata"]


class Journal:
    """All changes of some kinds of objects in a namespace, from their state at the beginning on.

    `async with Journal(kube, namespace, "Pod", "ConfigMap") as journal` watches until the end of the block. While the
    API server is away nothing is noted; what is different when it is back comes then.
    """

    def __init__(self, kube: Kube, namespace: str, *kinds: str) -> None:
        self.changes: list[Change] = []
        self._kube = kube
        self._paths = [_PATHS[kind].format(namespace) for kind in kinds]
        self._more = asyncio.Event()
        self._readers: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Journal:
        try:
            for path in self._paths:
                version = await self._look(path)
                self._readers.append(asyncio.create_task(self._follow(path, version)))
        except BaseException:
            await self._stop()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stop()

    async def _stop(self) -> None:
        for reader in self._readers:
            reader.cancel()
        await asyncio.gather(*self._readers, return_exceptions=True)

    async def _look(self, path: str) -> str:
        """Note what differs from what is known: all that stands is in `changes` when this returns."""
        listed = json.loads(await self._kube.run("get", "--raw", f"/{path}"))
        kind = listed["kind"].removesuffix("List")
        known = {change.uid: change for change in self.changes if change.kind == kind}
        for item in listed["items"]:
            before = known.pop(item["metadata"]["uid"], None)
            if before is None or before.object["metadata"]["resourceVersion"] != item["metadata"]["resourceVersion"]:
                self._note("MODIFIED" if before else "ADDED", {"kind": kind} | item)
        for gone in known.values():
            if gone.type != "DELETED":
                self._note("DELETED", gone.object)
        return str(listed["metadata"]["resourceVersion"])

    def _note(self, change: str, item: Object) -> None:
        self.changes.append(Change(change, item, time.monotonic()))
        self._more.set()

    async def _follow(self, path: str, version: str) -> None:
        while True:
            await self._watch(path, version)
            while True:
                try:
                    version = await self._look(path)
                    break
                except KubectlError:
                    await asyncio.sleep(1)

    async def _watch(self, path: str, version: str) -> None:
        """Note what changes, until the API server ends the watch or goes away."""
        process = await asyncio.create_subprocess_exec(
            self._kube.kubectl,
            f"--kubeconfig={self._kube.kubeconfig}",
            "get",
            "--raw",
            f"/{path}?watch=1&resourceVersion={version}",
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
            limit=LINE_LIMIT,
        )
        try:
            assert process.stdout is not None
            while line := await process.stdout.readline():
                event = json.loads(line)
                if event["type"] == "ERROR":
                    return
                self._note(event["type"], event["object"])
        finally:
            with contextlib.suppress(ProcessLookupError):
                process.terminate()
            await process.wait()

    def ordered(self, holds: Callable[[Change], bool] = lambda _: True) -> list[Change]:
        """The changes so far that satisfy `holds`, in the cluster's order."""
        return sorted(filter(holds, self.changes), key=lambda change: change.version)

    def mark(self) -> int:
        """Now, for `until`."""
        return len(self.changes)

    async def until(
        self, holds: Callable[[Change], bool], about: str, *, since: int = 0, patience: float = 3 * HANG
    ) -> Change:
        """The first change after the mark `since` that satisfies `holds`; waits for it. `about` says what it is."""
        seen = since
        try:
            async with asyncio.timeout(patience):
                while True:
                    self._more.clear()
                    for change in self.changes[seen:]:
                        if holds(change):
                            return change
                    seen = len(self.changes)
                    await self._more.wait()
        except TimeoutError:
            raise AssertionError(f"not within {patience:g} s: {about}; the last changes: {self._tail()}") from None

    def _tail(self) -> str:
        last = self.changes[-10:]
        return "\n".join(f"{c.type} {c.kind} {c.name} {json.dumps(c.object.get('status', {}))[:1500]}" for c in last)
