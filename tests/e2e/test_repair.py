"""What hands do to a region's objects, and what a spec names that is not there: it says so, and heals."""

from __future__ import annotations

import base64
import json
from collections.abc import AsyncIterator
from datetime import UTC, datetime

import pytest_asyncio

from derper import certs

from . import relays
from .clients import Where
from .kube import Change, Journal, Kube, Object, condition, is_true, region

NODE_PORTS = {"type": "NodePort", "nodePort": {"derpPortBase": 31443, "stunPortBase": 31478}}
KINDS = ("Service", "ConfigMap", "PodDisruptionBudget", "StatefulSet", "DerpRegion")


@pytest_asyncio.fixture(loop_scope="session")
async def where(kube: Kube) -> AsyncIterator[Where]:
    """A region that is Ready."""
    async with kube.namespace("e2e-repair") as namespace:
        await kube.apply(region("yard", namespace, 905, exposure=NODE_PORTS))
        await kube.ready("yard", namespace)
        yield Where("yard", namespace)


def content(item: Object) -> Object:
    """What an object says, without what the cluster notes about it and the defaults of a status."""
    return {key: value for key, value in item.items() if key in ("data", "spec")}


async def identities(kube: Kube, where: Where) -> dict[str, str]:
    return {name: pod["metadata"]["uid"] for name, pod in (await relays.pods(kube, where)).items()}


async def test_children_come_back(kube: Kube, where: Where) -> None:
    """Deleted or edited, each is what it was, and neither map nor pods notice."""
    derp_map = await kube.get("configmap", "yard-derpmap", where.namespace)
    pods = await identities(kube, where)
    async with Journal(kube, where.namespace, *KINDS) as journal:
        for kind, name in (
            ("Service", "yard-1"),
            ("PodDisruptionBudget", "yard"),
            ("ConfigMap", "yard-settings"),
            ("ConfigMap", "yard-derpmap"),
        ):
            await deleted_comes_back(kube, journal, where, kind, name)
        for kind, name, patch in (
            ("Service", "yard-1", {"spec": {"externalTrafficPolicy": "Cluster"}}),
            ("PodDisruptionBudget", "yard", {"spec": {"maxUnavailable": 3}}),
            ("ConfigMap", "yard-settings", {"data": {"settings.json": "{}"}}),
            ("ConfigMap", "yard-derpmap", {"data": {"derpmap.json": "{}", "derpmap.yaml": "{}"}}),
            ("StatefulSet", "yard", {"spec": {"replicas": 4}}),
        ):
            await edited_comes_back(kube, journal, where, kind, name, patch)
    await kube.ready(where.name, where.namespace)
    assert await identities(kube, where) == pods
    assert (await kube.get("configmap", "yard-derpmap", where.namespace))["data"] == derp_map["data"]
    assert (await kube.probe(where.name, where.namespace)).status == 0


async def deleted_comes_back(kube: Kube, journal: Journal, where: Where, kind: str, name: str) -> None:
    old = await kube.get(kind, name, where.namespace)
    start = journal.mark()
    await kube.run("delete", kind, name, f"--namespace={where.namespace}", "--wait=false")

    def back(change: Change) -> bool:
        return (change.kind, change.name, change.type) == (kind, name, "ADDED")

    new = (await journal.until(back, f"{kind} {name} is made again", since=start)).object
    assert new["metadata"]["uid"] != old["metadata"]["uid"]
    assert new["metadata"]["labels"] == old["metadata"]["labels"]
    if kind != "Service":  # the cluster gives it another address
        assert content(new) == content(old)


async def edited_comes_back(kube: Kube, journal: Journal, where: Where, kind: str, name: str, patch: Object) -> None:
    old = content(await kube.get(kind, name, where.namespace))
    start = journal.mark()
    what = [kind, name, f"--namespace={where.namespace}"]
    await kube.run("patch", *what, "--type=merge", f"--patch={json.dumps(patch)}")

    def changed(change: Change) -> bool:
        return (change.kind, change.name) == (kind, name) and content(change.object) != old

    def back(change: Change) -> bool:
        return (change.kind, change.name) == (kind, name) and content(change.object) == old

    edit = await journal.until(changed, f"{kind} {name} is edited", since=start)
    await journal.until(back, f"{kind} {name} is as it was", since=journal.changes.index(edit))


async def test_a_statefulset_is_deleted_and_its_pods_go_on(kube: Kube, where: Where) -> None:
    pods = await identities(kube, where)
    old = await kube.get("statefulset", where.name, where.namespace)
    what = ["statefulset", where.name, f"--namespace={where.namespace}"]
    async with Journal(kube, where.namespace, "StatefulSet") as journal:
        await kube.run("delete", *what, "--cascade=orphan")
        new = await journal.until(
            lambda c: (
                c.object["metadata"]["uid"] != old["metadata"]["uid"] and c.object["status"].get("readyReplicas") == 3
            ),
            "a new StatefulSet has taken the pods over",
        )
    assert new.object["spec"]["template"] == old["spec"]["template"]
    await kube.ready(where.name, where.namespace)
    assert await identities(kube, where) == pods


async def test_a_name_that_somebody_else_has(kube: Kube) -> None:
    async with kube.namespace("e2e-taken") as namespace, Journal(kube, namespace, "DerpRegion") as journal:
        foreign = {
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": {"name": "yard-derpmap", "namespace": namespace},
            "data": {"mine": "not yours"},
        }
        await kube.apply(foreign)
        before = await kube.get("configmap", "yard-derpmap", namespace)
        await kube.apply(region("yard", namespace, 906, exposure={"type": "ClusterIP"}))
        sentence = "ConfigMap yard-derpmap exists and does not belong to this region"
        told = await says(journal, "NameTaken")
        assert sentence in condition(told, "Ready")["message"]
        assert is_true(told, "Stalled")
        assert await kube.get("configmap", "yard-derpmap", namespace) == before
        await kube.run("delete", "configmap", "yard-derpmap", f"--namespace={namespace}")
        await kube.ready("yard", namespace)


async def says(journal: Journal, reason: str) -> Object:
    """Wait until the region is not Ready for this reason; returns it."""
    return (await journal.until(lambda c: condition(c.object, "Ready").get("reason") == reason, reason)).object


def certificate(namespace: str, *names: str) -> Object:
    """A Secret with a self-signed certificate."""
    pair = certs.self_signed(names, now=datetime.now(UTC))
    encoded = {"tls.crt": pair.cert_pem, "tls.key": pair.key_pem}
    return {
        "apiVersion": "v1",
        "kind": "Secret",
        "type": "kubernetes.io/tls",
        "metadata": {"name": "yard-tls", "namespace": namespace},
        "data": {key: base64.b64encode(value).decode() for key, value in encoded.items()},
    }


async def test_certificates_that_come_late_and_wrong(kube: Kube) -> None:
    tls = {
        "hostName": "Template",
        "hostNameTemplate": "{pod}.relays.example",
        "certificates": [{"secretName": "yard-tls"}],
    }
    async with kube.namespace("e2e-certificates") as namespace, Journal(kube, namespace, "DerpRegion") as journal:
        await kube.apply(region("yard", namespace, 907, exposure={"type": "ClusterIP"}, tls=tls))
        missing = await says(journal, "SecretNotFound")
        assert "Secret yard-tls" in condition(missing, "Ready")["message"]

        await kube.apply(certificate(namespace, "elsewhere.example"))
        wrong = condition(await says(journal, "CertificateInvalid"), "Ready")["message"]
        assert "yard-0.relays.example" in wrong
        assert "elsewhere.example" in wrong

        await kube.apply(certificate(namespace, *(f"yard-{number}.relays.example" for number in range(3))))
        await kube.ready("yard", namespace)
        found = await kube.derp_map("yard", namespace)
        assert [node["HostName"] for node in found["Regions"]["907"]["Nodes"]] == [
            f"yard-{number}.relays.example" for number in range(3)
        ]
        assert (await kube.probe("yard", namespace)).status == 0
