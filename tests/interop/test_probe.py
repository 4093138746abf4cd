"""Stock derpprobe on a region of ours: STUN of every node, and a packet through every ordered pair of nodes."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path

from .conftest import Relays
from .gobuild import Peers
from .processes import HANG
from .region import Region
from .relays import derp_map

NAMES = ("900a", "900b", "900c")


async def test_all_probes_are_good(peers: Peers, relays: Relays, addresses: Iterator[str], tmp_path: Path) -> None:
    """Its TLS probe is left out: it knows authorities only, and no pins. And it takes "none" for an IPv6 address."""
    region = Region(addresses, tmp_path / "region", 3)
    for node in region.nodes:
        await relays.start(node)
    for node in region.nodes:
        await node.until(lambda status: all(link["connected"] for link in status["mesh"].values()))
    nodes = [node.node(name, IPv6="") for node, name in zip(region.nodes, NAMES, strict=True)]
    (tmp_path / "map.json").write_text(json.dumps(derp_map(nodes)))
    process = await asyncio.create_subprocess_exec(
        *(peers.derpprobe, "-once", "-spread=false", f"-derp-map=file://{tmp_path / 'map.json'}", "-tls-interval=0"),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    async with asyncio.timeout(2 * HANG):
        output, _ = await process.communicate()
    assert process.returncode == 0, output.decode()
    good = {line.partition("good: ")[2].partition(":")[0] for line in output.decode().splitlines() if "good: " in line}
    meshed = {f"derp/r900/{one}/{other}/mesh" for one in NAMES for other in NAMES}
    assert good >= meshed | {f"derp/r900/{name}/udp" for name in NAMES}
