"""Real Tailscale clients in a region of three of our relays, forced through it, while relays go away."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from .gobuild import Peers
from .peers import TailnetHarness
from .region import Region, meshed


@pytest.fixture
async def region(addresses: Iterator[str], tmp_path: Path) -> AsyncIterator[Region]:
    async with meshed(Region(addresses, tmp_path / "region", 3)) as region:
        yield region


@pytest.fixture
async def net(region: Region, peers: Peers, tmp_path: Path) -> AsyncIterator[TailnetHarness]:
    """Clients a and b with the region's map: both are on its first node."""
    async with TailnetHarness(peers.peers, region.map(), tmp_path / "net") as net:
        yield net


async def apart(net: TailnetHarness, region: Region) -> None:
    """Move b to the second node, so that all that it exchanges with a goes through the mesh."""
    await net.set_map(region.map([1, 2, 0]), "b")
    await net.connected("b", "900b")
    assert await net.connected("a") == "900a"


async def test_clients_talk_through_one_relay(net: TailnetHarness) -> None:
    assert await net.connected("a") == await net.connected("b") == "900a"
    summary = await net.http("a", "b", count=50, size=20_000, interval=0)
    assert (summary.ok, summary.failed) == (50, 0), summary.errors
    for name, other in (("a", "b"), ("b", "a")):
        status = await net.status(name)
        assert status["home"] == "r900"
        assert status["peers"][other] == {"relay": "r900", "direct": ""}


async def test_clients_talk_through_the_mesh(net: TailnetHarness, region: Region) -> None:
    await apart(net, region)
    for source, target in (("a", "b"), ("b", "a")):
        summary = await net.http(source, target, count=50, size=20_000, interval=0)
        assert (summary.ok, summary.failed) == (50, 0), summary.errors


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=["stopped", "killed"])
async def test_both_lose_the_relay_that_they_are_on(net: TailnetHarness, region: Region, number: int) -> None:
    traffic = await net.start_traffic("a", "b")
    await traffic.next_ok(10)
    await region.nodes[0].stop(number)
    await asyncio.gather(net.connected("a", "900b"), net.connected("b", "900b"))
    await traffic.next_ok(10)
    summary = await traffic.stop()
    print(summary)
    assert summary.failed == 0, summary.errors


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=["stopped", "killed"])
async def test_one_loses_its_relay_and_reaches_the_other_through_the_mesh(
    net: TailnetHarness, region: Region, number: int
) -> None:
    await apart(net, region)
    await net.set_map(region.map([0, 2, 1]), "a")  # so that a falls back to the third node, not to b's
    traffic = await net.start_traffic("a", "b")
    await traffic.next_ok(10)
    await region.nodes[0].stop(number)
    await net.connected("a", "900c")
    await traffic.next_ok(10)
    assert await net.relay_of("b") == "900b"
    summary = await traffic.stop()
    print(summary)
    assert summary.failed == 0, summary.errors


async def test_relays_restart_one_after_the_other(net: TailnetHarness, region: Region) -> None:
    """As in a rolling update: no request fails, whoever is on the relay that goes."""
    traffic = await net.start_traffic("a", "b")
    await traffic.next_ok(10)
    for node in region.nodes:
        await node.stop()
        await node.start()
        for other in region.nodes:
            await other.until_meshed()
        await traffic.next_ok(10)
    summary = await traffic.stop()
    print(summary)
    assert summary.failed == 0, summary.errors
