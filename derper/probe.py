"""``derper probe``: does every node of a DERP map work, and every way through its mesh?

For each node: TCP, TLS with the pin or name of the map, the DERP login, and STUN.  Then, for every ordered pair
of nodes of a region, a packet from a client on the one to a client on the other.  The exit status is 0 if all
is well, 1 if something is not, and 2 if there is no map to check.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from ipaddress import ip_address
from pathlib import Path
from typing import Any, Final

import aiohttp

from . import derpmap, stun_client
from .client import Client, DialError, Options, dial_node
from .derpmap import DERPMap, DERPNode, DERPRegion, MapError
from .files import FileError, load_mesh_keys, read_file
from .text import milliseconds, table
from .wire.client import ReceivedPacket
from .wire.keys import MeshKey, NodePrivate

__all__ = ["NodeReport", "RegionReport", "main", "probe_map"]

_MESH_SECONDS: Final = 5.0
_MESH_ASK_SECONDS: Final = 0.1
_FETCH_SECONDS: Final = 10.0


class ProbeError(Exception):
    """There is nothing to probe.  The message is one sentence."""


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
    except ProbeError as error:
        print(f"derper probe: {error}", file=sys.stderr)
        return 2


def parse_options(arguments: Sequence[str]) -> argparse.Namespace:
    """The options of ``derper probe``; argparse ends the process for wrong ones."""
    parser = argparse.ArgumentParser(prog="derper probe", description="Check every node of a DERP map and its mesh.")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--map", type=Path, metavar="FILE", help="a map in JSON, or YAML as Headscale reads it")
    source.add_argument("--url", help="where the map is served as JSON")
    source.add_argument("--configmap", metavar="NAMESPACE/NAME", help="a map in the cluster, read with kubectl")
    parser.add_argument("--region", type=int, metavar="ID", help="only this region")
    parser.add_argument(
        "--mesh-key-file",
        type=Path,
        metavar="FILE",
        help="prove the mesh key, for regions that admit only known clients",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    return parser.parse_args(arguments)


async def _run(options: argparse.Namespace) -> int:
    found = await _read_map(options)
    regions = [region for _, region in sorted(found.regions.items()) if options.region in (None, region.region_id)]
    if not any(region.nodes for region in regions):
        which = "" if options.region is None else f" {options.region}"
        raise ProbeError(f"the map has no region{which} with nodes; there is nothing to probe")
    reports = await probe_map(regions, _mesh_key(options.mesh_key_file))
    if options.json:
        print(json.dumps([_as_json(report) for report in reports], indent=2))
    else:
        print("\n\n".join(_as_text(report) for report in reports))
    return 0 if all(report.ok for report in reports) else 1


# -- the map ------------------------------------------------------------------------------------------------


async def _read_map(options: argparse.Namespace) -> DERPMap:
    text: bytes | str
    if options.map is not None:
        what = str(options.map)
        try:
            text = read_file(options.map)
        except FileError as error:
            raise ProbeError(str(error)) from None
        is_yaml = options.map.suffix in (".yaml", ".yml")
    elif options.url is not None:
        what, is_yaml = options.url, False
        text = await _fetch(options.url)
    else:
        what, is_yaml = f"ConfigMap {options.configmap}", False
        text = await _from_cluster(options.configmap)
    try:
        return derpmap.from_yaml(text) if is_yaml else derpmap.from_json(text)
    except MapError as error:
        raise ProbeError(f"{what}: {error}") from None


async def _fetch(url: str) -> bytes:
    timeout = aiohttp.ClientTimeout(total=_FETCH_SECONDS)
    try:
        async with aiohttp.ClientSession(timeout=timeout) as http, http.get(url) as response:
            if response.status != 200:
                raise ProbeError(f"{url} answered {response.status}; it must be the URL of a DERP map")
            return await response.read()
    except (aiohttp.ClientError, TimeoutError, ValueError) as error:
        raise ProbeError(f"cannot get {url}: {error or 'no answer in time'}") from None


async def _from_cluster(name: str) -> str:
    namespace, slash, config_map = name.partition("/")
    if not slash or not namespace or not config_map:
        raise ProbeError(f"--configmap must be NAMESPACE/NAME, not {name!r}")
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        raise ProbeError("kubectl is not on the PATH; install it, or save the map to a file and use --map")
    process = await asyncio.create_subprocess_exec(
        *(kubectl, "get", "configmap", "-n", namespace, config_map, "-o", "json"),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, err = await process.communicate()
    if process.returncode:
        raise ProbeError(f"kubectl: {err.decode(errors='replace').strip() or 'failed'}")
    text = json.loads(out).get("data", {}).get("derpmap.json")
    if not isinstance(text, str):
        raise ProbeError(f"ConfigMap {name} has no key derpmap.json; is it the map of a DerpRegion?")
    return text


def _mesh_key(path: Path | None) -> MeshKey | None:
    if path is None:
        return None
    try:
        return load_mesh_keys(path).current
    except FileError as error:
        raise ProbeError(str(error)) from None


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


async def _probe_stun(node: DERPNode) -> float:
    host = next((address for address in (node.ipv4, node.ipv6) if address not in ("", "none")), node.host_name)
    return (await stun_client.ask(host, node.stun_port or 3478)).seconds


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
    names = [entry.node.name for entry in report.nodes]
    mesh = [["FROM \\ TO", *names]]
    for start in names:
        mesh.append([start, *(_way(report, start, end) for end in names)])
    problems = [f"{start} -> {end}: {way}" for (start, end), way in report.mesh.items() if isinstance(way, str)]
    verdict = "All is well." if report.ok else "Something is wrong."
    parts = [
        f"Region {region.region_id} ({region.region_code})",
        table(rows),
        "Packets through the mesh",
        table(mesh),
    ]
    return "\n\n".join([*parts, *problems, verdict])


def _where(node: DERPNode) -> str:
    host = next((address for address in (node.ipv4, node.ipv6) if address not in ("", "none")), node.host_name)
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
