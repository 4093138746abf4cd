"""Real Tailscale clients in a region of the cluster, and a control server that hands them the published maps."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.interop.gobuild import Peers
from tests.interop.peers import Summary, TailnetHarness

from .kube import Change, Journal, Object, map_in

ENOUGH = 25
"""Requests that show that traffic flows, at one each 20 ms."""
WARM_UP = 5


@dataclass(frozen=True)
class Where:
    """A region in the cluster."""

    name: str
    namespace: str


DEMO = Where("demo", "derp-demo")
OPERATOR = Where("derp-operator", "derp-operator")


def backwards(derp_map: Object) -> Object:
    """The same map, for clients that are to prefer the last node of each region."""
    turned = copy.deepcopy(derp_map)
    for region in turned["Regions"].values():
        region["Nodes"].reverse()
    return turned


def is_map(where: Where, change: Change) -> bool:
    return change.kind == "ConfigMap" and change.name == f"{where.name}-derpmap" and change.type != "DELETED"


@asynccontextmanager
async def tailnet(peers: Peers, derp_map: Object, workdir: Path, *, apart: bool) -> AsyncIterator[TailnetHarness]:
    """Clients a and b, on the first node of the map; `apart`: b is on the last, so that they talk through the mesh."""
    async with TailnetHarness(peers.peers, derp_map, workdir) as net:
        if apart:
            last = next(iter(derp_map["Regions"].values()))["Nodes"][-1]["Name"]
            await net.set_map(backwards(derp_map), "b")
            await net.connected("b", last)
        await net.http("a", "b", count=WARM_UP)  # their first handshake may be lost: WireGuard repeats it after 5 s
        yield net


@asynccontextmanager
async def control(net: TailnetHarness, journal: Journal, where: Where) -> AsyncIterator[None]:
    """Hand every new map to the clients, as a control server does: to a as it is, to b backwards."""
    task = asyncio.create_task(_follow(net, journal, where))
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait([task])
        if not task.cancelled():
            task.result()


async def _follow(net: TailnetHarness, journal: Journal, where: Where) -> None:
    mark = journal.mark()
    while True:
        change = await journal.until(lambda c: is_map(where, c), "a new map", since=mark, patience=3600)
        mark = journal.changes.index(change) + 1
        derp_map = map_in(change.object)
        await asyncio.gather(net.set_map(derp_map, "a"), net.set_map(backwards(derp_map), "b"))


def told(summary: Summary) -> str:
    """A stream of requests, for a report."""
    return (
        f"{summary.ok} requests answered, {summary.failed} failed, median {summary.median_ms:.1f} ms, "
        f"longest stall {summary.longest_stall_ms:.0f} ms"
    )
