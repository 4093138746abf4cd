"""``derper probe``: does every node of a DERP map work, and every way through its mesh?

For each node: TCP, TLS with the pin or name of the map, the DERP login, and STUN.  Then, for every ordered pair
of nodes of a region, a packet from a client on the one to a client on the other.  The exit status is 0 if all
is well, 1 if something is not, and 2 if there is no map to check.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from ipaddress import ip_address
from pathlib import Path
from typing import Any, Final

from .. import stun_client
from ..client import Client, DialError, Options, dial_node
from ..derpmap import DERPNode, DERPRegion
from ..text import milliseconds, table
from ..wire.client import ReceivedPacket
from ..wire.keys import MeshKey, NodePrivate
from . import map_source
from .map_source import MapSourceError

__all__ = ["NodeReport", "RegionReport", "main", "probe_map"]

_MESH_SECONDS: Final = 5.0
_MESH_ASK_SECONDS: Final = 0.1


@dataclass(slots=True)
class NodeReport:
    """What one node said; times are seconds, None where it failed or was not tried."""

    node: DERPNode
    tcp: float | None = None
    derp: float | None = None  #: TCP, TLS with the pin, HTTP and DERP login together
    stun: float | None = None
    errors: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not self.errors


@dataclass(slots=True)
class RegionReport:
    """The nodes of a region, and the time of a packet from each to each other."""

    region: DERPRegion
    nodes: list[NodeReport]
    mesh: dict[tuple[str, str], float | str]  #: seconds, or what went wrong

    @property
    def ok(self) -> bool:
        return all(node.ok for node in self.nodes) and not any(isinstance(way, str) for way in self.mesh.values())


def main(arguments: Sequence[str]) -> int:
    """Entry point of ``derper probe``."""
    options = parse_options(arguments)
    try:
        return asyncio.run(_run(options))
    except MapSourceError as error:
        print(f"derper probe: {error}", file=sys.stderr)
        return 2


def parse_options(arguments: Sequence[str]) -> argparse.Namespace:
    """The options of ``derper probe``; argparse ends the process for wrong ones."""
    parser = argparse.ArgumentParser(prog="derper probe", description="Check every node of a DERP map and its mesh.")
    map_source.add_options(parser)
    parser.add_argument(
        *("--mesh-psk-file", "--mesh-key-file"),
        type=Path,
        metavar="FILE",
        help="prove the mesh key, for regions that admit only known clients",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    return parser.parse_args(arguments)


async def _run(options: argparse.Namespace) -> int:
    regions = map_source.regions_of(await map_source.read_map(options), options)
    reports = await probe_map(regions, map_source.read_mesh_key(options.mesh_psk_file))
    if options.json:
        print(json.dumps([_as_json(report) for report in reports], indent=2))
    else:
        print("\n\n".join(_as_text(report) for report in reports))
    return 0 if all(report.ok for report in reports) else 1


# -- probing ------------------------------------------------------------------------------------------------


async def probe_map(regions: Sequence[DERPRegion], mesh_key: MeshKey | None = None) -> list[RegionReport]:
    """Probe every node of every region, and every mesh."""
    return [await _probe_region(region, mesh_key) for region in regions]


async def _probe_region(region: DERPRegion, mesh_key: MeshKey | None) -> RegionReport:
    results = await asyncio.gather(*(_probe_node(node, mesh_key) for node in region.nodes))
    clients = {report.node.name: client for report, client in results if client is not None}
    mesh: dict[tuple[str, str], float | str] = {}
    try:
        for start in clients:
            for end in clients:
                if start != end:
                    mesh[start, end] = await _cross(clients[start], clients[end])
    finally:
        await asyncio.gather(*(client.close() for client in clients.values()))
    return RegionReport(region, [report for report, _ in results], mesh)


async def _probe_node(node: DERPNode, mesh_key: MeshKey | None) -> tuple[NodeReport, Client | None]:
    report = NodeReport(node)
    client = None
    if not node.stun_only:
        start = time.perf_counter()
        options = Options(mesh_key=mesh_key, is_prober=True, connected=lambda: _stamp(report, start))
        try:
            client = await dial_node(node, NodePrivate.generate(), options)
            report.derp = time.perf_counter() - start
        except DialError as error:
            report.errors.append(f"{error.stage.upper()}: {error}")
    if node.stun_port >= 0:
        try:
            report.stun = await _probe_stun(node)
        except OSError as error:
            report.errors.append(f"STUN: {error or 'no answer'}")
    return report, client


def _stamp(report: NodeReport, start: float) -> None:
    report.tcp = time.perf_counter() - start


def _host(node: DERPNode) -> str:
    return next((address for address in (node.ipv4, node.ipv6) if address not in ("", "none")), node.host_name)


async def _probe_stun(node: DERPNode) -> float:
    return (await stun_client.ask(_host(node), node.stun_port or 3478)).seconds


async def _cross(sender: Client, receiver: Client) -> float | str:
    """Seconds of a packet from one client to the other, or what went wrong.

    The sender's node hears of the receiver through the mesh, a moment after it came: ask until it is there.
    """
    try:
        async with asyncio.timeout(_MESH_SECONDS):
            arrived = asyncio.ensure_future(_arrival(sender, receiver))
            try:
                while not arrived.done():
                    sender.send(receiver.public_key, _stamped())
                    await asyncio.wait((arrived,), timeout=_MESH_ASK_SECONDS)
                return arrived.result()
            finally:
                arrived.cancel()
    except TimeoutError:
        return f"no packet arrived within {_MESH_SECONDS:.0f} s"
    except ConnectionError as error:
        return str(error)


def _stamped() -> bytes:
    return time.perf_counter_ns().to_bytes(8, "big")


async def _arrival(sender: Client, receiver: Client) -> float:
    while True:
        event = await receiver.receive()
        if isinstance(event, ReceivedPacket) and event.source == sender.public_key and len(event.data) == 8:
            return (time.perf_counter_ns() - int.from_bytes(event.data, "big")) / 1e9


# -- the report ---------------------------------------------------------------------------------------------


def _as_text(report: RegionReport) -> str:
    region = report.region
    rows = [["NODE", "ADDRESS", "TCP", "DERP", "STUN", "RESULT"]]
    for entry in report.nodes:
        result = "ok" if entry.ok else "; ".join(entry.errors)
        rows.append(
            [entry.node.name, _where(entry.node), *map(milliseconds, (entry.tcp, entry.derp, entry.stun)), result]
        )
    parts = [f"Region {region.region_id} ({region.region_code})", table(rows)]
    if len(report.nodes) > 1:
        parts += ["Packets through the mesh", _mesh_table(report)]
    problems = [f"{start} -> {end}: {way}" for (start, end), way in report.mesh.items() if isinstance(way, str)]
    verdict = "All is well." if report.ok else "Something is wrong."
    return "\n\n".join([*parts, *problems, verdict])


def _mesh_table(report: RegionReport) -> str:
    names = [entry.node.name for entry in report.nodes]
    return table([["FROM \\ TO", *names], *([start, *(_way(report, start, end) for end in names)] for start in names)])


def _where(node: DERPNode) -> str:
    host = _host(node)
    try:
        shown = f"[{host}]" if ip_address(host).version == 6 else host
    except ValueError:
        shown = host
    return f"{shown}:{node.derp_port or 443}"


def _way(report: RegionReport, start: str, end: str) -> str:
    if start == end:
        return "."
    way = report.mesh.get((start, end))
    return "failed" if isinstance(way, str) else milliseconds(way)


def _as_json(report: RegionReport) -> dict[str, Any]:
    return {
        "regionID": report.region.region_id,
        "ok": report.ok,
        "nodes": [
            {
                "name": entry.node.name,
                "ok": entry.ok,
                "tcpSeconds": entry.tcp,
                "derpSeconds": entry.derp,
                "stunSeconds": entry.stun,
                "errors": entry.errors,
            }
            for entry in report.nodes
        ],
        "mesh": [
            {"from": start, "to": end, **({"error": way} if isinstance(way, str) else {"seconds": way})}
            for (start, end), way in report.mesh.items()
        ],
    }
