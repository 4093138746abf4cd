"""``derper region``: a meshed, pinned region on this machine, for those who want to try it without a cluster.

Every node is a relay process of its own, started as in a pod: a settings file, a key, a pinned certificate and
the mesh key, on ports of their own.  The command prints the DERP map once all nodes serve and all links of the
mesh are up, and runs until Ctrl-C.  A node may be killed by hand to see the clients move.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import secrets
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from ipaddress import ip_address
from pathlib import Path
from typing import Final

import aiohttp

from .. import certs
from ..derpmap import DERPMap, DERPNode, DERPRegion
from ..runtime import run, stop_signals
from ..text import host_port, reason
from ..wire.keys import NodePrivate

__all__ = ["main"]

_START_SECONDS: Final = 60.0
_STOP_SECONDS: Final = 15.0
_POLL_SECONDS: Final = 0.05


@dataclass(frozen=True, slots=True)
class _Ports:
    derp: int
    stun: int
    metrics: int


@dataclass(frozen=True, slots=True)
class _Node:
    """What one relay needs, and what clients need to know of it."""

    name: str
    host: str
    ports: _Ports
    key: NodePrivate
    certificate: certs.CertificatePair

    @property
    def host_name(self) -> str:
        return f"{self.name}-g1.derp.internal"


class RegionError(Exception):
    """The region cannot run.  The message is one sentence."""


def main(arguments: Sequence[str]) -> int:
    """Entry point of ``derper region``."""
    options = _parse(arguments)
    try:
        run(lambda: _run(options))
    except RegionError as error:
        print(f"derper region: {error}", file=sys.stderr)
        return 1
    return 0


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="derper region", description="Run a meshed region on this machine.")
    parser.add_argument("--nodes", type=_count, default=3, metavar="N", help="number of relays, 1 to 26 (3)")
    parser.add_argument("--host", type=_host, default="127.0.0.1", help="address to listen on (127.0.0.1)")
    parser.add_argument("--region-id", type=_region_id, default=900, metavar="ID", help="900 to 999 (900)")
    parser.add_argument("--region-code", default="local", metavar="CODE", help="short name of the region (local)")
    parser.add_argument("--map", type=Path, metavar="FILE", help="write the map to this file, too")
    parser.add_argument("--verbose", action="store_true", help="show what the relays log")
    return parser.parse_args(arguments)


def _count(text: str) -> int:
    if not text.isdigit() or not 1 <= int(text) <= 26:
        raise argparse.ArgumentTypeError(f"must be a number from 1 to 26, not {text!r}")
    return int(text)


def _region_id(text: str) -> int:
    if not text.isdigit() or not 900 <= int(text) <= 999:
        raise argparse.ArgumentTypeError(f"must be a number from 900 to 999, not {text!r}")
    return int(text)


def _host(text: str) -> str:
    try:
        return str(ip_address(text))
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be an IP address of this machine, not {text!r}") from None


async def _run(options: argparse.Namespace) -> None:
    stop = stop_signals()
    nodes = _make_nodes(options)
    with tempfile.TemporaryDirectory(prefix="derper-region-") as folder:
        _write_files(Path(folder), options.region_code, nodes)
        processes = [_spawn(Path(folder), node, options.verbose) for node in nodes]
        try:
            await _until(stop, _meshed(nodes, processes))
            if not stop.is_set():
                _publish(_map(options, nodes).to_json(), options.map)
                names = ", ".join(f"{node.name} (process {p.pid})" for node, p in zip(nodes, processes, strict=True))
                print(f"{names} serve and mesh; Ctrl-C ends them.", file=sys.stderr)
                await _until(stop, _all_ended(nodes, processes))
        finally:
            await _stop(processes)
    if not stop.is_set():
        raise RegionError("all nodes have ended")


async def _until(stop: asyncio.Event, work: object) -> None:
    """Run `work` to its end, or until `stop` is set."""
    task = asyncio.ensure_future(work)  # type: ignore[call-overload]
    waiter = asyncio.ensure_future(stop.wait())
    await asyncio.wait((task, waiter), return_when=asyncio.FIRST_COMPLETED)
    waiter.cancel()
    if task.done():
        task.result()
    else:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def _make_nodes(options: argparse.Namespace) -> list[_Node]:
    now = datetime.now(UTC)
    nodes = []
    for index, ports in enumerate(_free_ports(options.host, options.nodes)):
        name = f"{options.region_code}-{index}"
        certificate = certs.self_signed([f"{name}-g1.derp.internal"], now=now)
        nodes.append(_Node(name, options.host, ports, NodePrivate.generate(), certificate))
    return nodes


def _free_ports(host: str, count: int) -> list[_Ports]:
    """Ports that are free now; all are held until all are known, so that no two are the same."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with ExitStack() as stack:

        def port(kind: socket.SocketKind) -> int:
            sock = stack.enter_context(socket.socket(family, kind))
            try:
                sock.bind((host, 0))
            except OSError as error:
                raise RegionError(f"cannot listen on {host}: {reason(error)}") from None
            return int(sock.getsockname()[1])

        tcp, udp = socket.SOCK_STREAM, socket.SOCK_DGRAM
        return [_Ports(derp=port(tcp), stun=port(udp), metrics=port(tcp)) for _ in range(count)]


def _write_files(folder: Path, region: str, nodes: Sequence[_Node]) -> None:
    (folder / "mesh.key").write_text(secrets.token_hex(32) + "\n")
    for node in nodes:
        (folder / f"{node.name}.derper.key").write_text(node.key.to_config())
        (folder / f"{node.name}.g1.crt").write_bytes(node.certificate.cert_pem)
        (folder / f"{node.name}.g1.key").write_bytes(node.certificate.key_pem)
    settings = {
        "region": region,
        "nodes": {
            node.name: {
                "serverKey": str(node.key.public),
                "hostName": node.host_name,
                "certName": certs.pin(node.certificate.leaf),
                "dial": host_port(node.host, node.ports.derp),
                "certificates": [str(folder / f"{node.name}.g1")],
            }
            for node in nodes
        },
        "admission": {"open": True},
    }
    (folder / "settings.json").write_text(json.dumps(settings, indent=2))


def _spawn(folder: Path, node: _Node, verbose: bool) -> subprocess.Popen[bytes]:
    flags = {
        "a": host_port(node.host, node.ports.derp),
        "http-port": "-1",
        "stun-port": str(node.ports.stun),
        "c": str(folder / f"{node.name}.derper.key"),
        "mesh-psk-file": str(folder / "mesh.key"),
        "settings": str(folder / "settings.json"),
        "node": node.name,
        "metrics-addr": host_port(node.host, node.ports.metrics),
    }
    command = [sys.executable, "-m", "derper", *(f"-{name}={value}" for name, value in flags.items())]
    log = None if verbose else subprocess.DEVNULL
    # A terminal's Ctrl-C reaches the children too; they drain then, and the second signal, ours, ends them at once.
    return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=False)


async def _meshed(nodes: Sequence[_Node], processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Wait until every node serves and has a link to every other.  Raises `RegionError`."""
    try:
        async with aiohttp.ClientSession() as http, asyncio.timeout(_START_SECONDS):
            for node, process in zip(nodes, processes, strict=True):
                while not await _is_up(http, node, len(nodes) - 1):
                    if process.poll() is not None:
                        raise RegionError(f"{node.name} ended with status {process.returncode}; see --verbose")
                    await asyncio.sleep(_POLL_SECONDS)
    except TimeoutError:
        raise RegionError(f"the region was not up within {_START_SECONDS:.0f} s; see --verbose") from None


async def _is_up(http: aiohttp.ClientSession, node: _Node, peers: int) -> bool:
    url = f"http://{host_port(node.host, node.ports.metrics)}/status"
    try:
        async with http.get(url) as response:
            status = await response.json()
    except (aiohttp.ClientError, OSError, ValueError):
        return False
    links = [link for link in status["mesh"].values() if link["connected"]]
    return bool(status["ready"]) and len(links) == peers


async def _all_ended(nodes: Sequence[_Node], processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Wait for the nodes, and say when one ends."""

    async def one(node: _Node, process: subprocess.Popen[bytes]) -> None:
        status = await asyncio.to_thread(process.wait)
        print(f"{node.name} ended with status {status}.", file=sys.stderr)

    await asyncio.gather(*(one(node, process) for node, process in zip(nodes, processes, strict=True)))


async def _stop(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    for process in processes:
        if process.poll() is None:
            process.terminate()
    for process in processes:
        try:
            await asyncio.to_thread(process.wait, _STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _map(options: argparse.Namespace, nodes: Sequence[_Node]) -> DERPMap:
    region_id = options.region_id
    is_v6 = ":" in options.host
    return DERPMap(
        regions={
            region_id: DERPRegion(
                region_id=region_id,
                region_code=options.region_code,
                region_name=options.region_code,
                nodes=tuple(
                    DERPNode(
                        name=f"{region_id}{chr(ord('a') + index)}",
                        region_id=region_id,
                        host_name=node.host_name,
                        cert_name=certs.pin(node.certificate.leaf),
                        ipv4="none" if is_v6 else node.host,
                        ipv6=node.host if is_v6 else "none",
                        derp_port=node.ports.derp,
                        stun_port=node.ports.stun,
                    )
                    for index, node in enumerate(nodes)
                ),
            )
        }
    )


def _publish(text: str, path: Path | None) -> None:
    print(text, end="", flush=True)
    if path is not None:
        try:
            path.write_text(text)
        except OSError as error:
            raise RegionError(f"cannot write {path}: {reason(error)}") from None
