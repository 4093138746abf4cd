"""What the pods themselves say: relays and operator, asked at their own addresses, which this host has routes to."""

from __future__ import annotations

import asyncio
import json
import re

import aiohttp

from tests.interop.processes import HANG

from .clients import OPERATOR, Where
from .kube import Kube, Object

RELAY_METRICS = 9090
OPERATOR_METRICS = 8080
LOOK_SECONDS = 0.1
_PASSES = re.compile(r'^derp_operator_reconcile_total\{result="success"\} (\d+)', re.MULTILINE)


async def _get(url: str) -> str:
    timeout = aiohttp.ClientTimeout(total=HANG)
    async with aiohttp.ClientSession(timeout=timeout) as session, session.get(url) as answer:
        return await answer.text()


async def pods(kube: Kube, where: Where) -> dict[str, Object]:
    """A region's pods by name."""
    found = await kube.list("pods", where.namespace, f"--selector=derp.network/region={where.name}")
    return {pod["metadata"]["name"]: pod for pod in found}


async def status(pod: Object) -> Object:
    """What the relay in a pod says of itself."""
    found: Object = json.loads(await _get(f"http://{pod['status']['podIP']}:{RELAY_METRICS}/status"))
    return found


async def server_key(kube: Kube, pod: str, namespace: str) -> str:
    """The public key that a relay shows to its clients."""
    return str((await status(await kube.get("pod", pod, namespace)))["serverKey"])


async def scale_operator(kube: Kube, replicas: int) -> None:
    """Returns when that many operators are at work, or when the last one is gone."""
    deployment = f"deployment/{OPERATOR.name}"
    await kube.run("scale", deployment, f"--replicas={replicas}", f"--namespace={OPERATOR.namespace}")
    await kube.run("rollout", "status", deployment, f"--namespace={OPERATOR.namespace}", f"--timeout={3 * HANG:.0f}s")
    if replicas == 0:
        for pod in await _operators(kube):
            await kube.wait(f"pod/{pod['metadata']['name']}", "delete", OPERATOR.namespace)


async def restart_operator(kube: Kube) -> None:
    """Delete the operator's pod; returns when the next one is ready."""
    for pod in await _operators(kube):
        await kube.run("delete", "pod", pod["metadata"]["name"], f"--namespace={OPERATOR.namespace}", "--wait")
    await kube.wait(f"deployment/{OPERATOR.name}", "condition=Available", OPERATOR.namespace)


async def operator_passes(kube: Kube, where: Where, count: int) -> None:
    """Make the operator look at a region that often. An annotation that means nothing to it wakes it up."""
    before = await _passes(kube)
    for number in range(count):
        wake = f"e2e.test/look={before}-{number}"
        await kube.run("annotate", "derpregion", where.name, wake, "--overwrite", f"--namespace={where.namespace}")
        async with asyncio.timeout(3 * HANG):
            while await _passes(kube) <= before + number:  # noqa: ASYNC110 - nothing tells of a pass
                await asyncio.sleep(LOOK_SECONDS)
    await kube.run("annotate", "derpregion", where.name, "e2e.test/look-", f"--namespace={where.namespace}")


async def _operators(kube: Kube) -> list[Object]:
    return await kube.list("pods", OPERATOR.namespace, f"--selector=app.kubernetes.io/name={OPERATOR.name}")


async def _passes(kube: Kube) -> int:
    """Passes over regions that the operator has finished; 0 while it starts or waits for the lease."""
    [operator] = [pod for pod in await _operators(kube) if "deletionTimestamp" not in pod["metadata"]]
    try:
        found = _PASSES.search(await _get(f"http://{operator['status']['podIP']}:{OPERATOR_METRICS}/metrics"))
    except aiohttp.ClientConnectorError:
        return 0
    return int(found[1]) if found else 0
