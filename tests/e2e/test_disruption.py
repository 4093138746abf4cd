"""Pods are deleted, evicted and replaced, machines drained, the operator comes and goes, and the traffic goes on."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from aiohttp import web

from dev.cluster import network, state
from tests.interop.gobuild import Peers
from tests.interop.peers import GoClients
from tests.interop.processes import PeerError

from . import relays
from .clients import DEMO, OPERATOR, Clients
from .conftest import Record
from .kube import Kube, Object

CHILDREN = "statefulset,service,secret,configmap,poddisruptionbudget,networkpolicy,serviceaccount,pod"


async def versions(kube: Kube) -> dict[tuple[str, str], str]:
    """The resourceVersion of everything that belongs to the demo's region: any write changes it."""
    found = await kube.list(CHILDREN, DEMO.namespace, f"--selector=derp.network/region={DEMO.name}")
    return {(item["kind"], item["metadata"]["name"]): item["metadata"]["resourceVersion"] for item in found}


@pytest.mark.parametrize(
    ("what", "how"),
    [
        ("pod deleted", []),
        ("pod deleted by force", ["--force", "--grace-period=0"]),
    ],
)
async def test_a_pod_is_deleted(kube: Kube, clients: Clients, record: Record, what: str, how: list[str]) -> None:
    published = await kube.get("configmap", "demo-derpmap", DEMO.namespace)
    key = await relays.server_key(kube, "demo-0", DEMO.namespace)
    async with clients.notice() as seen, clients.made_anew("demo-0"):
        await kube.run("delete", "pod", "demo-0", f"--namespace={DEMO.namespace}", "--wait=false", *how)
    record(what, seen)
    seen.only_what_was_forced()
    await kube.ready(DEMO.name, DEMO.namespace)
    assert await relays.server_key(kube, "demo-0", DEMO.namespace) == key
    assert (await kube.get("configmap", "demo-derpmap", DEMO.namespace)) == published, "the map is not even written"
    assert (await kube.probe(DEMO.name, DEMO.namespace)).status == 0


async def test_the_operator_is_restarted(kube: Kube, clients: Clients, record: Record) -> None:
    async with clients.notice() as seen:
        before = await versions(kube)
        await relays.restart_operator(kube)
        await relays.operator_passes(kube, DEMO, 3)
        assert await versions(kube) == before
    record("operator restarted", seen)
    seen.nothing()


@pytest.mark.usefixtures("operator_afterwards")
async def test_the_operator_is_down_and_a_relay_is_lost(kube: Kube, clients: Clients, record: Record) -> None:
    """What needs no change goes on without it: a pod that is lost comes back and finds its keys and its peers."""
    async with clients.notice() as seen:
        await relays.scale_operator(kube, 0)
        before = await versions(kube)
        async with clients.made_anew("demo-1"):
            await kube.run("delete", "pod", "demo-1", f"--namespace={DEMO.namespace}")
        assert (await kube.probe(DEMO.name, DEMO.namespace)).status == 0
    record("pod deleted with the operator down", seen)
    seen.only_what_was_forced()
    counting = {("Pod", "demo-1"), ("StatefulSet", "demo"), ("PodDisruptionBudget", "demo")}
    quiet = {key: version for key, version in before.items() if key not in counting}
    assert (await versions(kube)).items() >= quiet.items()

    await relays.scale_operator(kube, 1)
    await kube.ready(DEMO.name, DEMO.namespace)
    await relays.operator_passes(kube, DEMO, 3)
    assert (await versions(kube)).items() >= quiet.items(), "nothing to do, and nothing was written"


@pytest.mark.usefixtures("operator_afterwards")
async def test_the_operator_is_down_while_the_region_is_to_grow(kube: Kube, clients: Clients, record: Record) -> None:
    """Nothing happens; the next operator does it all."""
    before = await kube.derp_map(DEMO.name, DEMO.namespace)
    try:
        await relays.scale_operator(kube, 0)
        async with clients.notice() as seen:
            await kube.run("scale", "derpregion", DEMO.name, "--replicas=4", f"--namespace={DEMO.namespace}")
        seen.nothing()
        async with clients.notice() as seen:
            await relays.scale_operator(kube, 1)
            await kube.ready(DEMO.name, DEMO.namespace)
            await clients.has_map(await kube.derp_map(DEMO.name, DEMO.namespace))
        record("scale 3 to 4, ordered while the operator was down", seen)
        seen.only_what_was_forced()
        assert seen.maps == 1
    finally:
        await relays.scale_operator(kube, 1)
        await kube.run("scale", "derpregion", DEMO.name, "--replicas=3", f"--namespace={DEMO.namespace}")
        await kube.ready(DEMO.name, DEMO.namespace)
    assert await kube.derp_map(DEMO.name, DEMO.namespace) == before


@pytest.mark.faults
async def test_the_operator_is_restarted_while_pods_are_replaced(kube: Kube, clients: Clients, record: Record) -> None:
    """The next one goes on where it was."""
    before = set(await running(kube))
    try:
        async with clients.notice() as seen:
            await patch(kube, {"pod": {"resources": {"requests": {"cpu": "51m"}}}})
            await relays.restart_operator(kube)
            await kube.ready(DEMO.name, DEMO.namespace)
        record("operator restarted while pods are replaced", seen)
        seen.only_what_was_forced()
        assert before.isdisjoint(await running(kube))
        assert (seen.maps, seen.lost) == (0, {"900a": 1, "900b": 1, "900c": 1})
    finally:
        await patch(kube, {"pod": None})
        await kube.ready(DEMO.name, DEMO.namespace)


async def running(kube: Kube) -> list[str]:
    return [pod["metadata"]["uid"] for pod in (await relays.pods(kube, DEMO)).values()]


async def patch(kube: Kube, spec: Object) -> None:
    text = json.dumps({"spec": spec})
    await kube.run("patch", "derpregion", DEMO.name, f"--namespace={DEMO.namespace}", "--type=merge", f"--patch={text}")


async def test_a_pod_is_evicted(kube: Kube, clients: Clients, record: Record) -> None:
    """And no other one with it."""
    async with clients.notice() as seen, clients.made_anew("demo-0"):
        await evict(kube, "demo-0")
        refusal = await kube.refusal(*_evict("demo-2"), manifest=_eviction("demo-2"))
        assert "disruption budget" in refusal
    record("pod evicted", seen)
    seen.only_what_was_forced()
    await kube.ready(DEMO.name, DEMO.namespace)


async def evict(kube: Kube, pod: str) -> None:
    await kube.run(*_evict(pod), manifest=_eviction(pod))


def _evict(pod: str) -> tuple[str, ...]:
    return "create", "--raw", f"/api/v1/namespaces/{DEMO.namespace}/pods/{pod}/eviction", "--filename=-"


def _eviction(pod: str) -> Object:
    meta = {"name": pod, "namespace": DEMO.namespace}
    return {"apiVersion": "policy/v1", "kind": "Eviction", "metadata": meta}


async def test_a_machine_is_drained(kube: Kube, clients: Clients, record: Record) -> None:
    """Its relay moves to another machine, and its address in the map with it; then back."""
    before = await kube.derp_map(DEMO.name, DEMO.namespace)
    machine = (await kube.get("pod", "demo-1", DEMO.namespace))["spec"]["nodeName"]
    try:
        async with clients.notice() as seen:
            async with clients.made_anew("demo-1"):
                await kube.run("drain", machine, "--ignore-daemonsets", "--delete-emptydir-data", "--timeout=180s")
            await kube.wait(f"deployment/{OPERATOR.name}", "condition=Available", OPERATOR.namespace)
            await relays.operator_passes(kube, DEMO, 1)
            await kube.ready(DEMO.name, DEMO.namespace)
            await clients.has_map(await kube.derp_map(DEMO.name, DEMO.namespace))
    finally:
        await kube.run("uncordon", machine)
    record("machine drained: its relay gets another address", seen)
    seen.only_what_was_forced()
    assert seen.maps == 1

    async with clients.notice() as seen:
        async with clients.made_anew("demo-1"):
            await kube.run("delete", "pod", "demo-1", f"--namespace={DEMO.namespace}")
        await relays.operator_passes(kube, DEMO, 1)
        await kube.ready(DEMO.name, DEMO.namespace)
        await clients.has_map(before)
    record("pod deleted: its relay comes back elsewhere", seen)
    seen.only_what_was_forced()


async def test_a_service_is_made_anew(kube: Kube, clients: Clients, record: Record) -> None:
    async with clients.notice() as seen:
        await kube.run("delete", "service", "demo-1", f"--namespace={DEMO.namespace}")
        await kube.wait("service/demo-1", "create", DEMO.namespace)
        await relays.operator_passes(kube, DEMO, 1)
        await kube.ready(DEMO.name, DEMO.namespace)
    record("Service deleted, made again with its port", seen)
    seen.only_what_was_forced()


async def test_the_admission_source_goes_away(
    kube: Kube, clients: Clients, peers: Peers, record: Record, tmp_path: Path
) -> None:
    """Who is connected stays, who was admitted may come back, who is not known is refused."""
    asked: list[str] = []

    async def verify(request: web.Request) -> web.Response:
        asked.append((await request.json())["NodePublic"])
        return web.json_response({"Allow": True})

    app = web.Application()
    app.router.add_post("/verify", verify)
    runner = web.AppRunner(app)
    await runner.setup()
    try:
        site = web.TCPSite(runner, network.HOST, 0)
        await site.start()
        url = f"http://{network.HOST}:{runner.addresses[0][1]}/verify"
        await patch(kube, {"clients": {"open": False, "verifyURLs": [url]}})
        await kube.ready(DEMO.name, DEMO.namespace)
        for name in clients.net.nodes:
            await clients.reconnect(name)
        assert set(asked) >= {node.key for node in clients.net.nodes.values()}
        async with clients.notice() as seen:
            await site.stop()
            for name in "ab":
                seen.lost[await clients.net.relay_of(name)] += 1
                await clients.reconnect(name)
            async with GoClients(peers.peers, tmp_path) as strangers:
                with pytest.raises(PeerError):
                    await strangers.dial(map=await kube.derp_map(DEMO.name, DEMO.namespace), region=900)
    finally:
        await runner.cleanup()
        await patch(kube, {"clients": {"open": True, "verifyURLs": None}})
        await kube.ready(DEMO.name, DEMO.namespace)
    record("admission source away (two clients reconnect)", seen)
    seen.only_what_was_forced()


async def test_the_chart_is_upgraded(kube: Kube, clients: Clients, record: Record, tmp_path: Path) -> None:
    """From the chart before its last change; the relays' image stays, so their pods do."""
    old = former_chart(tmp_path)
    values = tmp_path / "values.json"
    values.write_text(await helm(kube, "get", "values", OPERATOR.name, "--output=json"))
    current = state.repository() / "charts" / "derp-operator"
    pods = await running(kube)
    try:
        await helm(kube, "upgrade", OPERATOR.name, old, f"--values={values}", "--wait", "--timeout=3m")
        await relays.operator_passes(kube, DEMO, 1)
        async with clients.notice() as seen:
            await helm(kube, "upgrade", OPERATOR.name, current, f"--values={values}", "--wait", "--timeout=3m")
            await relays.operator_passes(kube, DEMO, 1)
            await kube.ready(DEMO.name, DEMO.namespace)
    finally:
        await helm(kube, "upgrade", OPERATOR.name, current, f"--values={values}", "--wait", "--timeout=3m")
    record("chart upgraded", seen)
    seen.nothing()
    assert await running(kube) == pods


def former_chart(directory: Path) -> Path:
    """The chart as it was before the last commit that changed it or the CRD."""
    git = ["git", "-C", str(state.repository())]
    found = subprocess.run([*git, "rev-list", "-1", "HEAD", "--", "charts"], capture_output=True, text=True)
    commit = f"{found.stdout.strip()}~1"
    archive = subprocess.run([*git, "archive", commit, "charts"], capture_output=True)
    if archive.returncode:
        pytest.skip(f"no former chart: {archive.stderr.decode().strip()}")
    subprocess.run(["tar", "-x", "-C", directory], input=archive.stdout, check=True)
    return directory / "charts" / "derp-operator"


async def helm(kube: Kube, *arguments: str | Path) -> str:
    done = await kube.command(kube.helm, *arguments, f"--namespace={OPERATOR.namespace}")
    assert done.status == 0, done.err
    return done.out
