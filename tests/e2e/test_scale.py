"""From three relays to five and back, under the traffic of real clients."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator

import pytest_asyncio

from . import relays
from .clients import DEMO, Clients, is_map
from .conftest import Record, Report
from .kube import Change, Journal, Kube, Object, is_true, nodes_in

SLOW = 60.0
"""Seconds that nothing here takes on any machine. What is promised is 10; reported is what it took."""


@pytest_asyncio.fixture(loop_scope="session", autouse=True)
async def three_again(kube: Kube) -> AsyncIterator[None]:
    yield
    await scale(kube, 3)


async def scale(kube: Kube, replicas: int) -> None:
    """As a person does it; returns when the region is Ready again."""
    await kube.run("scale", "derpregion", DEMO.name, f"--replicas={replicas}", f"--namespace={DEMO.namespace}")
    await kube.ready(DEMO.name, DEMO.namespace)


def identity(pod: Object) -> tuple[str, int]:
    """Changes if a pod is made anew or its container restarts."""
    statuses = pod["status"]["containerStatuses"]
    return pod["metadata"]["uid"], sum(status["restartCount"] for status in statuses)


async def running(kube: Kube) -> dict[str, tuple[str, int]]:
    return {name: identity(pod) for name, pod in (await relays.pods(kube, DEMO)).items()}


async def template(kube: Kube) -> str:
    """The pod template, and the hash that the cluster makes of it."""
    item = await kube.get("statefulset", DEMO.name, DEMO.namespace)
    return json.dumps([item["spec"]["template"], item["status"]["updateRevision"]], sort_keys=True)


async def test_from_three_to_five_and_back(kube: Kube, clients: Clients, record: Record, report: Report) -> None:
    derp_map = await kube.derp_map(DEMO.name, DEMO.namespace)
    first, pod_template = await running(kube), await template(kube)
    async with Journal(kube, DEMO.namespace, "Pod", "ConfigMap", "DerpRegion") as journal:
        start = journal.mark()
        async with clients.notice() as seen:
            await scale(kube, 5)
            nodes_came_after_they_answered(journal, start)
            await clients.has_map(await kube.derp_map(DEMO.name, DEMO.namespace))
            await clients.net.connected("e", "900e")
        record("scale 3 to 5", seen)
        seen.only_what_was_forced()
        report(told_by(journal, start))
        assert await running(kube) == first | {f"demo-{n}": await alone(kube, n) for n in (3, 4)}
        assert (await kube.probe(DEMO.name, DEMO.namespace)).status == 0

        start = journal.mark()
        async with clients.notice() as seen:
            await scale(kube, 3)
            nodes_left_before_their_pods(journal, start)
            await clients.net.connected("e", "900b")
        record("scale 5 to 3", seen)
        seen.only_what_was_forced()
        assert await running(kube) == first
    assert await template(kube) == pod_template
    assert await kube.derp_map(DEMO.name, DEMO.namespace) == derp_map


async def alone(kube: Kube, number: int) -> tuple[str, int]:
    """A new pod, which has not restarted either."""
    uid, restarts = identity(await kube.get("pod", f"demo-{number}", DEMO.namespace))
    assert restarts == 0
    return uid, restarts


def pod_ready(journal: Journal, name: str, since: int) -> Change:
    return next(c for c in journal.changes[since:] if (c.kind, c.name) == ("Pod", name) and is_true(c.object, "Ready"))


def meshed(journal: Journal, name: str, since: int) -> Change:
    """When the region's status first shows all links of a pod."""
    wanted = {"pod": name, "mesh": "4/4"}.items()
    regions = (c for c in journal.changes[since:] if c.kind == "DerpRegion")
    return next(c for c in regions if any(wanted <= node.items() for node in c.object["status"]["nodes"]))


def told_by(journal: Journal, since: int) -> str:
    """How long it took from a pod's readiness to all its mesh links, as the region's status shows them."""
    took = {n: meshed(journal, n, since).at - pod_ready(journal, n, since).at for n in ("demo-3", "demo-4")}
    assert max(took.values()) < SLOW
    return "Ready to meshed " + ", ".join(f"{max(seconds, 0):.1f} s ({name})" for name, seconds in took.items())


def nodes_came_after_they_answered(journal: Journal, since: int) -> None:
    maps = [c for c in journal.changes[since:] if is_map(DEMO, c)]
    assert [nodes_in(c.object) for c in maps] == [["900a", "900b", "900c", "900d", "900e"]], "one change, not several"
    for name in ("demo-3", "demo-4"):
        assert pod_ready(journal, name, since).version < maps[0].version


def nodes_left_before_their_pods(journal: Journal, since: int) -> None:
    maps = [c for c in journal.changes[since:] if is_map(DEMO, c)]
    assert [nodes_in(c.object) for c in maps] == [["900a", "900b", "900c"]]
    for name in ("demo-3", "demo-4"):
        end = next(c for c in journal.changes[since:] if (c.kind, c.name) == ("Pod", name) and c.leaving)
        assert maps[0].version < end.version
