"""Stock clients with the forms of the map that the operator publishes."""

from __future__ import annotations

import copy
import json
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
from derp_operator.layout import lay_out
from derp_operator.spec import parse

from derper.derpmap import from_json

from .gobuild import Peers
from .peers import GoClients, TailnetHarness
from .region import Region
from .relays import DERPMap


@pytest.fixture
async def region(addresses: Iterator[str], tmp_path: Path) -> AsyncIterator[Region]:
    """Three relays that are meshed."""
    region = Region(addresses, tmp_path / "region", 3)
    async with AsyncExitStack() as stack:
        for node in region.nodes:
            await stack.enter_async_context(node)
        for node in region.nodes:
            await node.until(lambda status: all(link["connected"] for link in status["mesh"].values()))
        yield region


def forms(region: Region, **options: Any) -> list[DERPMap]:
    """What the operator makes of the region's map with these options in `spec.map`, the plain form first."""
    meta = {"name": "t", "namespace": "derp", "uid": "uid-1"}
    spec = {"regionID": 900, "replicas": len(region.nodes), "clients": {"open": True}, "map": options}
    wanted = parse({"metadata": meta, "spec": spec})
    derpmap = from_json(json.dumps(region.map()))
    return [json.loads(lay_out(wanted, form, derpmap).to_json()) for form in wanted.map.forms]


def home(derp_map: DERPMap, region_id: int) -> DERPMap:
    """The map for a client that has its home there, however near the other regions are."""
    changed = copy.deepcopy(derp_map)
    for key, item in changed["Regions"].items():
        if int(key) != region_id:
            item["NoMeasureNoHome"] = True
    return changed


async def test_no_measure_no_home_is_what_tailcfg_says(region: Region, clients: GoClients) -> None:
    (plain,) = forms(region, layout="RegionPerNode")
    report = await clients.netcheck(plain)
    assert report["latency_ms"].keys() == {"900", "901", "902"}
    report = await clients.netcheck(home(plain, 901))
    assert report["latency_ms"].keys() == {"901"}
    assert report["preferred"] == 901


async def test_clients_with_homes_on_different_nodes(region: Region, peers: Peers, tmp_path: Path) -> None:
    """Each reaches the other by dialing the region that is its home; the mesh carries nothing."""
    (plain,) = forms(region, layout="RegionPerNode")
    homes = {"a": home(plain, 900), "b": home(plain, 901)}
    async with TailnetHarness(peers.peers, plain, tmp_path / "net", own=homes) as net:
        for source, target in (("a", "b"), ("b", "a")):
            summary = await net.http(source, target, count=50, size=20_000, interval=0)
            assert (summary.ok, summary.failed) == (50, 0), summary.errors
        assert (await net.status("a"))["home"] == "t-0"
        assert (await net.status("b"))["home"] == "t-1"
        print(await net.status("a"), await net.relay_of("a"), await net.relay_of("b"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=["stopped", "killed"])
async def test_a_home_of_one_node_is_lost(region: Region, peers: Peers, tmp_path: Path, number: int) -> None:
    (plain,) = forms(region, layout="RegionPerNode")
    async with TailnetHarness(peers.peers, plain, tmp_path / "net") as net:
        at = {name: await net.connected(name) for name in ("a", "b")}
        print(at)
        traffic = await net.start_traffic("a", "b", timeout=60)
        await traffic.next_ok(10)
        lost = at["b"].split(",")[0]
        await region.nodes["abc".index(lost[-1])].stop(number)
        await traffic.next_ok(200)
        summary = await traffic.stop()
        print(summary)
        assert summary.failed == 0, summary.errors
