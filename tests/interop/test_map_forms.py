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
from .region import Node, Region, meshed
from .relays import DERPMap


@pytest.fixture
async def region(addresses: Iterator[str], tmp_path: Path) -> AsyncIterator[Region]:
    async with meshed(Region(addresses, tmp_path / "region", 3)) as region:
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


async def forwarded(node: Node) -> int:
    """Packets that it sent to other nodes."""
    lines = (await node.metrics_get("/metrics")).splitlines()
    (value,) = (line.split()[1] for line in lines if line.startswith("derp_packets_forwarded_out "))
    return int(value)


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
        assert (await net.status("a"))["home"] == "r900-0"
        assert (await net.status("b"))["home"] == "r900-1"
        for node in region.nodes:
            assert await forwarded(node) == 0


@pytest.mark.parametrize("in_map", [True, False], ids=["killed", "out of the map and stopped"])
async def test_a_home_of_one_node_goes(region: Region, peers: Peers, tmp_path: Path, in_map: bool) -> None:
    """Clients choose another one, which takes them more than the 0.2 s within a region; docs/operations.md says it."""
    (plain,) = forms(region, layout="RegionPerNode")
    async with TailnetHarness(peers.peers, plain, tmp_path / "net", own={"b": home(plain, 901)}) as net:
        await net.set_map(plain, "b")
        traffic = await net.start_traffic("a", "b", timeout=60)
        await traffic.next_ok(10)
        if in_map:
            await region.nodes[1].stop(signal.SIGKILL)
        else:
            await net.set_map({"Regions": {key: item for key, item in plain["Regions"].items() if key != "901"}})
            await traffic.next_ok(100)
            await region.nodes[1].stop()
        await traffic.next_ok(100)
        summary = await traffic.stop()
        print(summary)
        assert summary.failed == 0, summary.errors


async def test_tailnets_spread_over_nodes_and_each_stays_together(region: Region, peers: Peers, tmp_path: Path) -> None:
    """Two tailnets on one region: each is on the first node of its map, and nothing goes through the mesh."""
    _, one, two = forms(region, consumers=[{"name": "tailnet-a"}, {"name": "tailnet-b"}])
    first = [each["Regions"]["900"]["Nodes"][0]["Name"] for each in (one, two)]
    assert first[0] != first[1], "choose other names"
    async with AsyncExitStack() as stack:
        nets = [
            await stack.enter_async_context(TailnetHarness(peers.peers, each, tmp_path / f"net-{number}"))
            for number, each in enumerate((one, two))
        ]
        for net, node in zip(nets, first, strict=True):
            assert {await net.connected(name) for name in net.nodes} == {node}
            summary = await net.http("a", "b", count=50, size=20_000, interval=0)
            assert (summary.ok, summary.failed) == (50, 0), summary.errors
        for node in region.nodes:
            assert await forwarded(node) == 0
