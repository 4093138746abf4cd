"""The examples, and what the chart installs, before a real API server."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import kopf
import pytest
import yaml
from derp_operator.handlers import watch
from derp_operator.kube import Kube
from derp_operator.leader import Leadership

from .controlplane import HANG, ControlPlane
from .world import Recorder, World, condition, connection, world

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted((ROOT / "examples").glob("*.yaml"))
CHART = ROOT / "charts" / "derp-operator"
CRD = "crd/derpregions.derp.network"


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_examples_are_accepted(api: ControlPlane, path: Path) -> None:
    documents = list(yaml.safe_load_all(path.read_text()))
    namespaces = {item["metadata"].get("namespace", "default") for item in documents if item["kind"] != "Namespace"}
    existing = api.kubectl("get", "namespaces", "--output=name").stdout
    for namespace in namespaces:
        if f"namespace/{namespace}\n" not in existing:
            assert api.kubectl("create", "namespace", namespace).returncode == 0
    for document in documents:
        done = api.kubectl("apply", "--server-side", "--dry-run=server", "--filename=-", manifest=document)
        assert done.returncode == 0, done.stderr
        assert "Warning" not in done.stderr


class Release:
    """A release of the chart called `derp-operator` in the namespace `system`; nothing waits, as nothing runs pods."""

    def __init__(self, api: ControlPlane, helm: Path) -> None:
        self._api, self._helm = api, helm

    def __call__(self, *args: str) -> subprocess.CompletedProcess[str]:
        argv: list[str | Path] = [self._helm, *args, "--namespace=system", f"--kubeconfig={self._api.kubeconfig}"]
        return subprocess.run(argv, capture_output=True, text=True, timeout=HANG)

    def install(self, *args: str) -> None:
        # The session's CRD came by kubectl; a release has to be told to make it its own.
        done = self("install", "derp-operator", str(CHART), "--create-namespace", "--take-ownership", *args)
        assert done.returncode == 0, done.stderr


@pytest.fixture
def release(api: ControlPlane, helm: Path) -> Iterator[Release]:
    found = Release(api, helm)
    yield found
    found("uninstall", "derp-operator", "--ignore-not-found")


def allowed(api: ControlPlane, verb: str, resource: str, namespace: str, subresource: str = "") -> bool:
    account = "--as=system:serviceaccount:system:derp-operator"
    options = [account, f"--namespace={namespace}", f"--subresource={subresource}"]
    done = api.kubectl("auth", "can-i", verb, resource, *options)
    return done.stdout.strip() == "yes"


def test_the_chart_installs_upgrades_and_leaves_the_regions(api: ControlPlane, release: Release) -> None:
    release.install()
    labels = json.loads(api.kubectl("get", CRD, "--output=json").stdout)["metadata"]["labels"]
    assert labels["app.kubernetes.io/managed-by"] == "Helm"
    region = {
        "apiVersion": "derp.network/v1alpha1",
        "kind": "DerpRegion",
        "metadata": {"name": "kept", "namespace": "default"},
        "spec": {"regionID": 950, "clients": {"open": True}},
    }
    assert api.kubectl("apply", "--server-side", "--filename=-", manifest=region).returncode == 0
    done = release("upgrade", "derp-operator", str(CHART), "--set=replicas=2")
    assert done.returncode == 0, done.stderr
    assert api.kubectl("get", "poddisruptionbudget/derp-operator", "--namespace=system").returncode == 0
    assert release("uninstall", "derp-operator").returncode == 0
    assert api.kubectl("get", "derpregion/kept").returncode == 0
    release.install()
    assert api.kubectl("delete", "derpregion/kept").returncode == 0


def test_an_upgrade_brings_the_crd_up_to_date(api: ControlPlane, release: Release) -> None:
    release.install()
    column = [{"op": "remove", "path": "/spec/versions/0/additionalPrinterColumns/0"}]
    assert api.kubectl("patch", CRD, "--type=json", f"--patch={json.dumps(column)}").returncode == 0
    done = release("upgrade", "derp-operator", str(CHART), "--force-conflicts")
    assert done.returncode == 0, done.stderr
    crd = json.loads(api.kubectl("get", CRD, "--output=json").stdout)
    assert crd["spec"]["versions"][0]["additionalPrinterColumns"][0]["name"] == "ID"


def test_rights_in_the_whole_cluster(api: ControlPlane, release: Release) -> None:
    release.install()
    for verb, resource in (
        ("list", "derpregions.derp.network"),
        ("patch", "statefulsets.apps"),
        ("create", "secrets"),
        ("patch", "pods"),
        ("create", "events"),
        ("get", "nodes"),
    ):
        assert allowed(api, verb, resource, "default"), f"{verb} {resource}"
    for verb, resource in (
        ("patch", "derpregions.derp.network"),
        ("delete", "derpregions.derp.network"),
        ("create", "pods"),
        ("delete", "pods"),
        ("list", "nodes"),
        ("list", "namespaces"),
        ("create", "rolebindings.rbac.authorization.k8s.io"),
        ("get", "leases.coordination.k8s.io/derp-operator"),
    ):
        assert not allowed(api, verb, resource, "default"), f"{verb} {resource}"
    assert allowed(api, "patch", "derpregions.derp.network", "default", "status")
    assert not allowed(api, "patch", "derpregions.derp.network", "default", "scale")
    assert allowed(api, "create", "leases.coordination.k8s.io", "system")
    assert allowed(api, "update", "leases.coordination.k8s.io/derp-operator", "system")
    assert not allowed(api, "update", "leases.coordination.k8s.io/other", "system")


def test_rights_in_one_namespace(api: ControlPlane, release: Release) -> None:
    release.install("--set=watchNamespaces={default}", "--set=rbac.nodes=false")
    assert allowed(api, "list", "secrets", "default")
    assert allowed(api, "watch", "derpregions.derp.network", "default")
    for namespace in ("system", "kube-system"):
        assert not allowed(api, "get", "secrets", namespace)
        assert not allowed(api, "list", "derpregions.derp.network", namespace)
    assert not allowed(api, "get", "nodes", "default")


def account(api: ControlPlane) -> kopf.ConnectionInfo:
    """The operator's own credentials."""
    token = api.kubectl("create", "token", "derp-operator", "--namespace=system").stdout.strip()
    return dataclasses.replace(connection(api), token=token, certificate_data=None, private_key_data=None)


@pytest.mark.parametrize("mode", ["whole cluster", "one namespace"])
async def test_the_rights_are_enough(api: ControlPlane, release: Release, mode: str) -> None:
    """Watches, leader election, and the life of a region, with nothing but what the chart grants."""
    async with world(api) as found:
        scope = [] if mode == "whole cluster" else [found.namespace]
        release.install(*(f"--set=watchNamespaces={{{namespace}}}" for namespace in scope))
        credentials = account(api)
        kube = Kube(lambda: credentials)
        lease = Leadership(kube, "system", "derp-operator", "test", time.monotonic)
        up, seen = asyncio.Event(), asyncio.Event()
        watches = asyncio.create_task(watch(lambda: credentials, scope, lambda *_: seen.set(), up.set))
        try:
            async with asyncio.timeout(HANG):
                await lease.acquire()
                await asyncio.wait([asyncio.ensure_future(up.wait()), watches], return_when=asyncio.FIRST_COMPLETED)
                assert not watches.done(), watches.exception()
                await found.create(exposure={"type": "NodePort", "nodePort": {"addressType": "Auto"}})
                await seen.wait()
                for replicas in (3, 5, 3):
                    await found.change(replicas=replicas)
                    await live(found, kube)
                await found.change(exposure={"type": "HostPort", "nodePort": None})
                await live(found, kube)
            assert not watches.done(), watches.exception()
            assert ("Normal", "MapPublished") in await found.events()
        finally:
            watches.cancel()
            await asyncio.gather(watches, return_exceptions=True)
            await lease.release()
            await kube.close()
        holder = "--output=jsonpath={.spec.holderIdentity}"
        assert api.kubectl("get", "lease/derp-operator", "--namespace=system", holder).stdout == ""


async def live(found: World, kube: Kube) -> None:
    """Passes of an operator with these rights until one writes nothing."""
    while True:
        recorder = Recorder(kube)
        await found.reconcile(recorder)
        if not await found.play() and not recorder.writes:
            break
    ready = condition(await found.region())
    assert ready["status"] == "True", ready
