"""Stock derpprobe on a meshed region, with every class of its probes, and its status page, JSON and metrics.

derpprobe's TLS probe knows authorities only, no pins, and looks the host name up, so there all relays are `localhost`.
"""

from __future__ import annotations

import asyncio
import json
import re
import secrets
from collections.abc import Awaitable, Callable, Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from .conftest import Relays
from .gobuild import Peers
from .peers import GoClients
from .pki import Authority, self_signed
from .processes import HANG, Child, Event
from .region import Region
from .relays import Relay, RelayOptions, accepts, derp_map, free_port

NAMES = ("900a", "900b", "900c")
PAIRS = list(product(NAMES, NAMES))
SINGLE = {f"derp/r900/{name}/{name}/qd" for name in NAMES}
HOST = "127.0.0.1"
SIZE = 1 << 20  # of a bandwidth probe, in bytes
LISTEN_PORT = 8030


class Prober(Child):
    """A running derpprobe that probes all that it can."""

    def __init__(self, binary: Path, address: str, map_file: Path, env: dict[str, str]) -> None:
        self.address = address
        argv: list[str | Path] = [binary, f"-listen={address}:{LISTEN_PORT}", f"-derp-map=file://{map_file}"]
        argv += ["-spread=false", "-interval=1s", "-mesh-interval=60s", "-stun-interval=60s", "-tls-interval=60s"]
        argv += ["-bw-interval=60s", f"-bw-probe-size-bytes={SIZE}", "-qd-packets-per-second=50"]
        super().__init__(argv, map_file.with_suffix(".log"), env)

    async def start(self) -> None:
        await super().start()
        async with asyncio.timeout(HANG):
            while not await accepts(self.address, LISTEN_PORT):
                assert self.running, self.log_text()
                await asyncio.sleep(0.02)

    async def get(self, path: str) -> tuple[int, str]:
        url, timeout = f"http://{self.address}:{LISTEN_PORT}{path}", aiohttp.ClientTimeout(2 * HANG)
        async with aiohttp.ClientSession(timeout=timeout) as http, http.get(url) as answer:
            return answer.status, await answer.text()

    async def probe_all(self) -> tuple[int, dict[str, Any]]:
        """Run every probe that ends by itself, and wait for them: the status, and the results by name."""
        status, text = await self.get("/debug/probe-all")
        return status, {name: result["ProbeInfo"] for name, result in json.loads(text)["Results"].items()}

    async def metrics(self, name: str) -> dict[str, float]:
        """Samples of a metric by the name of the probe."""
        _, text = await self.get("/debug/varz")
        found = re.findall(rf'^derpprobe_{name}{{.*\bname="([^"]+)".*}} (\S+)$', text, re.MULTILINE)
        return {probe: float(value) for probe, value in found}


async def start_region(
    makes: Sequence[str], relays: Relays, authority: Authority, mesh_key: str, env: dict[str, str]
) -> list[Relay]:
    """Relays of these makes that mesh by flag."""
    nodes = []
    for make in makes:
        options = RelayOptions(
            certificate=authority.issue("localhost"),
            host_name="localhost",
            private_key=f"privkey:{secrets.token_hex(32)}",
            mesh_key=mesh_key,
            derp_port=free_port(HOST),
            stun_port=free_port(HOST),
            env=env,
        )
        nodes.append(relays.make(make, options, address=HOST))
    for node in nodes:
        node.mesh_with([other for other in nodes if other is not node])
    for node in nodes:
        await relays.start(node)
    return nodes


def write_map(nodes: Sequence[Relay], path: Path) -> Path:
    """It takes "none" for an address, so IPv6 is left empty."""
    entries = [node.node(name, CertName="", IPv6="") for node, name in zip(nodes, NAMES, strict=True)]
    path.write_text(json.dumps(derp_map(entries)))
    return path


async def all_green(prober: Prober) -> None:
    """Every probe of every class succeeds; those of the mesh as soon as the relays have found each other."""
    classes = {
        **{f"derp/r900/{name}/tls": "tls" for name in NAMES},
        **{f"derp/r900/{name}/udp": "derp_udp" for name in NAMES},
        **{f"derp/r900/{start}/{end}/mesh": "derp_mesh" for start, end in PAIRS},
        **{f"derp/r900/{start}/{end}/bw": "derp_bw" for start, end in PAIRS},
        "derpmap-probe": "derp_map",
    }
    results: dict[str, Any] = {}
    async with asyncio.timeout(2 * HANG):
        while set(results) != set(classes):  # the first pass may only find the map
            status, results = await prober.probe_all()
    bad = {name: info["Error"] for name, info in results.items() if info["Status"] != "succeeded"}
    assert (status, bad) == (200, {})
    assert {name: info["Class"] for name, info in results.items()} == classes

    assert set((await prober.metrics("result")).items()) >= {(name, 1.0) for name in classes}
    assert await prober.metrics("derp_bw_probe_size_bytes") == {
        f"derp/r900/{start}/{end}/bw": float(SIZE) for start, end in PAIRS
    }
    status, page = await prober.get("/")
    assert status == 200
    assert all(name in page for name in classes)


async def delays_measured(prober: Prober) -> None:
    """Queueing-delay probes run for ever, but each starts only when derpprobe's semaphore lets it by chance, once in
    10 s; so some must do, through one relay and through two."""
    found: set[bool] = set()
    async with asyncio.timeout(4 * HANG):
        while found != {True, False}:
            counts = await prober.metrics("derp_qd_probe_delays_seconds_count")
            found = {name in SINGLE for name, count in counts.items() if count >= 50}
            await asyncio.sleep(0.1)
    dropped = await prober.metrics("derp_qd_probe_dropped_packets")
    assert dropped == {f"derp/r900/{start}/{end}/qd": 0.0 for start, end in PAIRS}


def about(key: str) -> Callable[[Event], bool]:
    """Events about this client."""
    return lambda event: event["key"] == key


async def meshed(nodes: Sequence[Relay], mesh_key: str, clients: GoClients) -> None:
    """Wait until every relay watches every other: until then packets between them are lost."""
    for node in nodes:
        options = {"map": derp_map([node.node("900a")]), "region": 900, "mesh_key": mesh_key, "watch": True}
        watcher = await clients.dial(**options)
        for other in nodes:
            if other is not node:
                await watcher.expect("peer_present", about(other.key))
        await watcher.close()


@pytest.fixture
async def green(
    peers: Peers,
    relays: Relays,
    clients: GoClients,
    addresses: Iterator[str],
    authority: Authority,
    ca_file: Path,
    tmp_path: Path,
) -> Callable[[Sequence[str]], Awaitable[None]]:
    """Check that every probe is good on a region of relays of these makes."""
    env = {"SSL_CERT_FILE": str(ca_file)}

    async def check(makes: Sequence[str]) -> None:
        mesh_key = secrets.token_hex(32)
        nodes = await start_region(makes, relays, authority, mesh_key, env)
        await meshed(nodes, mesh_key, clients)
        path = write_map(nodes, tmp_path / "map.json")
        async with Prober(peers.derpprobe, next(addresses), path, env) as prober:
            await all_green(prober)
            await delays_measured(prober)

    return check


async def test_every_probe_is_good(make: str, green: Callable[[Sequence[str]], Awaitable[None]]) -> None:
    await green([make] * 3)


async def test_every_probe_is_good_on_a_mix(green: Callable[[Sequence[str]], Awaitable[None]]) -> None:
    await green(["ours", "stock", "ours"])


async def probed_once(binary: Path, map_file: Path, *flags: str) -> tuple[int | None, set[str], str]:
    """`derpprobe -once` without the TLS probe: its exit status, the probes that are good, and all that it says."""
    argv = [str(binary), "-once", "-spread=false", f"-derp-map=file://{map_file}", "-tls-interval=0", *flags]
    process = await asyncio.create_subprocess_exec(
        *argv,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    async with asyncio.timeout(2 * HANG):
        output = (await process.communicate())[0].decode()
    good = {line.partition("good: ")[2].partition(":")[0] for line in output.splitlines() if "good: " in line}
    return process.returncode, good, output


async def test_a_pinned_region(peers: Peers, relays: Relays, addresses: Iterator[str], tmp_path: Path) -> None:
    """As the operator makes them: self-signed, pinned, with a settings file."""
    region = Region(addresses, tmp_path / "region", 3)
    for node in region.nodes:
        await relays.start(node)
    for node in region.nodes:
        await node.until_meshed()
    nodes = [node.node(name, IPv6="") for node, name in zip(region.nodes, NAMES, strict=True)]
    (tmp_path / "map.json").write_text(json.dumps(derp_map(nodes)))
    status, good, output = await probed_once(peers.derpprobe, tmp_path / "map.json")
    assert status == 0, output
    crossed = {f"derp/r900/{start}/{end}/mesh" for start, end in PAIRS}
    assert good >= crossed | {f"derp/r900/{name}/udp" for name in NAMES}


async def test_the_mesh_key_is_admission(make: str, peers: Peers, relays: Relays, tmp_path: Path) -> None:
    """Where only known clients come in, the prober does with the mesh key, and does not without."""
    flags = ("-verify-client-url=http://127.0.0.1:1/verify", "-verify-client-url-fail-open=false")
    options = RelayOptions(
        certificate=self_signed("node.test"), host_name="node.test", mesh_key=secrets.token_hex(32), flags=flags
    )
    relay = await relays.start(relays.make(make, options))
    (tmp_path / "map.json").write_text(json.dumps(derp_map([relay.node("900a", IPv6="")])))
    key = f"-mesh-psk-file={relay.workdir / 'mesh.key'}"
    status, good, output = await probed_once(peers.derpprobe, tmp_path / "map.json", key)
    assert status == 0, output
    assert "derp/r900/900a/900a/mesh" in good
    status, good, _ = await probed_once(peers.derpprobe, tmp_path / "map.json")
    assert (status, good) == (1, {"derp/r900/900a/udp", "derpmap-probe"})
