"""What `make demo` leaves: a region that is what it says, that real clients use, and that may do little else."""

from __future__ import annotations

import json

from derper import derpmap

from .clients import DEMO, OPERATOR, Clients
from .conftest import Report
from .kube import Kube


async def test_columns_tell_that_it_is_ready(kube: Kube) -> None:
    out = await kube.run("get", "derpregion", DEMO.name, f"--namespace={DEMO.namespace}", "--output=wide")
    head, row = (line.split() for line in out.splitlines())
    shown = dict(zip(head, row, strict=False))
    assert shown["ID"] == "900"
    assert (shown["DESIRED"], shown["READY"], shown["IN-MAP"]) == ("3", "3", "3/3")
    assert (shown["STATUS"], shown["EXPOSURE"]) == ("AllNodesReady", "NodePort")


async def test_map_is_whole_in_both_forms(kube: Kube) -> None:
    data = (await kube.get("configmap", "demo-derpmap", DEMO.namespace))["data"]
    found = derpmap.from_json(data["derpmap.json"])
    assert derpmap.from_yaml(data["derpmap.yaml"]) == found
    assert derpmap.lint(found) == []
    assert [node.name for node in found.regions[900].nodes] == ["900a", "900b", "900c"]


async def test_probe_finds_no_fault(kube: Kube) -> None:
    done = await kube.probe(DEMO.name, DEMO.namespace)
    assert done.status == 0, done.out + done.err
    assert all(name in done.out for name in ("900a", "900b", "900c"))


async def test_relays_are_on_different_machines(kube: Kube) -> None:
    pods = await kube.list("pods", DEMO.namespace, "--selector=derp.network/region=demo")
    assert len({pod["spec"]["nodeName"] for pod in pods}) == 3


async def test_real_clients_talk_on_one_relay_and_through_the_mesh(clients: Clients, report: Report) -> None:
    async with clients.notice() as seen:
        assert [await clients.net.relay_of(name) for name in "abcdef"] == ["900a", "900b", "900c"] * 2
        summaries = [await clients.net.http("a", peer, count=100, size=20_000, interval=0) for peer in "db"]
        report("; ".join(map(str, summaries)))
        assert [(summary.ok, summary.failed) for summary in summaries] == [(100, 0)] * 2
        status = await clients.net.status("a")
        assert status["peers"]["b"] == {"relay": "demo", "direct": ""}
    report(str(seen))
    seen.nothing()


async def test_pods_are_restricted(kube: Kube) -> None:
    """The namespaces enforce it; a change of the version makes the API server judge the pods that are there."""
    version = "pod-security.kubernetes.io/enforce-version=v1.34"
    for where in (DEMO, OPERATOR):
        labels = json.loads(await kube.run("get", "namespace", where.namespace, "--output=json"))["metadata"]["labels"]
        assert labels["pod-security.kubernetes.io/enforce"] == "restricted"
        dry = ["label", "--dry-run=server", "--overwrite", "namespace", where.namespace, version]
        done = await kube.command(kube.kubectl, *dry)
        assert done.status == 0, done.err
        assert "violat" not in done.err


async def test_relays_have_no_identity_in_the_cluster(kube: Kube) -> None:
    for pod in await kube.list("pods", DEMO.namespace, "--selector=derp.network/region=demo"):
        spec = pod["spec"]
        assert spec["automountServiceAccountToken"] is False
        assert not [volume for volume in spec["volumes"] if "projected" in volume]
        assert spec["containers"][0]["securityContext"]["readOnlyRootFilesystem"] is True


async def test_chart_passes_its_own_test(kube: Kube) -> None:
    done = await kube.command(kube.helm, "test", OPERATOR.name, f"--namespace={OPERATOR.namespace}")
    assert done.status == 0, done.out + done.err
