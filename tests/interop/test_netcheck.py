"""What Tailscale's own command line says of stock derper and of ours: `tailscale netcheck`, `tailscale debug derp`."""

from __future__ import annotations

import asyncio
import json
import os
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from .conftest import Both, Relays
from .daemon import Tailscaled
from .gobuild import Peers
from .processes import HANG, LineProcess
from .region import Region
from .relays import DERPMap, Relay, RelayOptions, derp_map

# `debug derp` asks for /generate_204 on port 80, which not everybody may listen on; without it both get a warning.
PORT_80 = ("-http-port=80",) if os.geteuid() == 0 else ()
on_both = pytest.mark.parametrize("both", [RelayOptions(flags=("-home=blank", *PORT_80))], indirect=True, ids=[""])

NETCHECK = ("netcheck", "--bind-address=127.0.0.1")  # else the socket is bound to the interface of the default route


@dataclass
class Tailnet:
    """A control server, and a daemon that is logged in there."""

    control: LineProcess
    daemon: Tailscaled

    async def set_map(self, derp_map: DERPMap) -> None:
        """Hand out a new DERP map; returns when the daemon has it."""
        await self.control.command("set_map", map=derp_map, node="")
        async with asyncio.timeout(HANG):
            while hosts(json.loads(await self.daemon.cli("debug", "derp-map"))) != hosts(derp_map):  # noqa: ASYNC110
                await asyncio.sleep(0.05)  # nothing tells of it


def hosts(derp_map: DERPMap) -> list[str]:
    return sorted(node["HostName"] for region in derp_map["Regions"].values() for node in region["Nodes"])


Start = Callable[[DERPMap], Awaitable[Tailnet]]


@pytest.fixture
async def tailnet(peers: Peers, tailscaled: Path, tmp_path: Path) -> AsyncIterator[Start]:
    """`await tailnet(map)` is a tailnet whose nodes have this DERP map."""
    async with AsyncExitStack() as stack:

        async def start(derp_map: DERPMap) -> Tailnet:
            (tmp_path / "derpmap.json").write_text(json.dumps(derp_map))
            argv: list[str | Path] = [peers.peers, "control", f"-map={tmp_path / 'derpmap.json'}"]
            control = await stack.enter_async_context(LineProcess(argv, tmp_path / "control.log"))
            url = (await control.events.expect("ready"))["url"]
            daemon = Tailscaled(tailscaled, url, tmp_path / "tailscaled", tmp_path / "tailscaled.sock")
            return Tailnet(control, await stack.enter_async_context(daemon))

        yield start


def entry(relay: Relay, region: int) -> dict[str, Any]:
    """A relay in the map.  With IPv6 "none", `debug derp` would look that name up in DNS."""
    return relay.node(f"{region}a", region, IPv6="")


def plain(text: str, relay: Relay) -> str:
    """A report without what differs from run to run: addresses, ports, times."""
    text = text.replace(relay.address, "NODE")
    text = re.sub(r"127\.0\.0\.1:\d+", "OURSELVES", text)
    text = re.sub(r"\* Time: .*", "* Time", text)
    return re.sub(r"\d+(\.\d+)?(µs|ms) *", "LATENCY ", text)


@on_both
async def test_netcheck_measures_both(both: Both, tailnet: Start) -> None:
    net = await tailnet(derp_map([entry(both.stock, 900), entry(both.ours, 901)]))
    report = json.loads(await net.daemon.cli(*NETCHECK, "--format=json"))
    assert {name: report[name] for name in ("UDP", "IPv4", "IPv4CanSend", "MappingVariesByDestIP")} == {
        "UDP": True,
        "IPv4": True,
        "IPv4CanSend": True,
        "MappingVariesByDestIP": False,
    }
    assert report["RegionLatency"].keys() == report["RegionV4Latency"].keys() == {"900", "901"}
    assert report["GlobalV4"].startswith("127.0.0.1:")
    assert len(report["GlobalV4Counters"]) == 1  # both saw the same address and port


@on_both
async def test_netcheck_prints_the_same(both: Both, tailnet: Start) -> None:
    """Each alone in the region's place: the report, and that the client makes it its home."""
    said = []
    net = await tailnet(derp_map([entry(both.stock, 900)]))
    for relay in (both.stock, both.ours):
        await net.set_map(derp_map([entry(relay, 900)]))
        said.append(plain(await net.daemon.cli(*NETCHECK), relay))
        status = json.loads(await net.daemon.cli("status", "--json"))
        assert status["Self"]["Relay"] == "r900"
    assert said[0] == said[1]
    assert "Nearest DERP: Region 900" in said[0]
    assert "- r900: LATENCY" in said[0]


@on_both
async def test_debug_derp_prints_the_same(both: Both, tailnet: Start) -> None:
    """Addresses, TLS with the pin, /generate_204, five logins that must meet the same key, STUN."""
    said = []
    net = await tailnet(derp_map([entry(both.stock, 900), entry(both.ours, 901)]))
    for relay, region in ((both.stock, "900"), (both.ours, "901")):
        said.append(plain(await net.daemon.cli("debug", "derp", region), relay).replace(region, "REGION"))
    assert said[0] == said[1]
    report = json.loads(said[1])
    assert report["Info"] == [
        'Region REGION == "rREGION"',
        'Successfully established a DERP connection with node "NODE"',
        'Node "NODE" returned IPv4 STUN response: OURSELVES',
    ]
    assert (report["Warnings"] is None) == bool(PORT_80)
    (error,) = report["Errors"]  # the relay has an address of one family only
    assert "over IPv6" in error


async def test_a_region_of_ours(addresses: Iterator[str], relays: Relays, tailnet: Start, tmp_path: Path) -> None:
    """Three pinned nodes with generated names: every one is in order, and none is behind a load balancer."""
    region = Region(addresses, tmp_path / "region", 3)
    for node in region.nodes:
        await relays.start(node)
    nodes = [node.node(f"900{letter}", IPv6="::1") for node, letter in zip(region.nodes, "abc", strict=True)]
    net = await tailnet(derp_map(nodes))
    report = json.loads(await net.daemon.cli("debug", "derp", "r900"))
    for node in region.nodes:
        assert f'Successfully established a DERP connection with node "{node.host_name}"' in report["Info"]
        assert any(f'Node "{node.host_name}" returned IPv4 STUN' in line for line in report["Info"])
    assert all("over IPv6" in error for error in report["Errors"])
