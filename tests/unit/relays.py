"""Whole relays on loopback, by flags or as the pods of a region that read their files."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import aiohttp

from derper import certs
from derper.certs import CertificatePair
from derper.client import Client, Endpoint, Options, dial_endpoint
from derper.config import parse_flags
from derper.server import Relay, Timings
from derper.wire import stun
from derper.wire.keys import MeshKey, NodePrivate

from .loopback import PATIENCE, free_port, pair_for, private

ALICE, BOB, CAROL = private(1), private(2), private(3)
MESH_KEY, OTHER_KEY = MeshKey(b"\xab" * 32), MeshKey(b"\xcd" * 32)
NOW = datetime.now(UTC)
HOST = "127.0.0.1"
MANUAL = ("-certmode", "manual", "-a", "127.0.0.1:0")
FAST = Timings(poll=0.01, settle=0.01, drain_step=0.01)


def replace_file(path: Path, data: bytes | str) -> None:
    new = path.with_name(path.name + ".new")
    new.write_bytes(data.encode() if isinstance(data, str) else data)
    new.replace(path)


async def get(port: int, path: str) -> tuple[int, str]:
    async with aiohttp.ClientSession() as http, http.get(f"http://127.0.0.1:{port}{path}") as response:
        return response.status, await response.text()


async def ask_stun(port: int) -> bytes:
    """The answer of a STUN server."""
    loop = asyncio.get_running_loop()
    answers: asyncio.Queue[bytes] = asyncio.Queue()

    class Asker(asyncio.DatagramProtocol):
        def datagram_received(self, data: bytes, addr: object) -> None:
            answers.put_nowait(data)

    transport, _ = await loop.create_datagram_endpoint(Asker, remote_addr=("127.0.0.1", port))
    transport.sendto(stun.request(b"123456789012"))
    try:
        async with asyncio.timeout(PATIENCE):
            return await answers.get()
    finally:
        transport.close()


async def knock(port: int) -> None:
    """Connect, say nothing and go."""
    _, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.close()
    await writer.wait_closed()


class Node:
    """One pod of a region: its files, and the relay that reads them."""

    def __init__(self, root: Path, number: int) -> None:
        self.root = root
        self.number = number
        self.name = f"r-{number}"
        self.port, self.metrics_port = free_port(), free_port()
        self.private_key = private(0xF0 + number)
        self.pair = pair_for(f"{self.name}.internal")
        flags = ["-settings", str(root / "settings.json"), "-node", self.name, "-stun-port", "0", "-http-port", "-1"]
        flags += ["-c", str(root / f"{self.name}.derper.key"), "-mesh-psk-file", str(root / "mesh.key")]
        flags += ["-a", f"127.0.0.1:{self.port}", "-metrics-addr", f"127.0.0.1:{self.metrics_port}"]
        self.flags = flags
        self.relay = Relay(parse_flags(flags, {}, is_root=False), rng=random.Random(number), timings=FAST)

    @property
    def entry(self) -> dict[str, Any]:
        return {
            "serverKey": str(self.private_key.public),
            "hostName": f"{self.name}.internal",
            "certName": certs.pin(self.pair.leaf),
            "dial": f"127.0.0.1:{self.port}",
            "certificates": [str(self.root / self.name)],
            "mapName": f"900{'abcdefgh'[self.number]}",
        }

    @property
    def endpoint(self) -> Endpoint:
        return Endpoint(("127.0.0.1",), self.port, f"{self.name}.internal", certs.pin(self.pair.leaf))

    def write_secret(self, pair: CertificatePair | None = None) -> None:
        pair = pair or self.pair
        replace_file(self.root / f"{self.name}.derper.key", self.private_key.to_config())
        replace_file(self.root / f"{self.name}.crt", pair.cert_pem)
        replace_file(self.root / f"{self.name}.key", pair.key_pem)

    async def ready(self) -> tuple[int, str]:
        return await get(self.metrics_port, "/readyz")

    async def status(self) -> Any:
        return json.loads((await get(self.metrics_port, "/status"))[1])

    async def dial(self, key: NodePrivate) -> Client:
        return await dial_endpoint(self.endpoint, key)

    def meshed(self, *others: Node) -> bool:
        status = self.relay.mesh.status() if self.relay.mesh is not None else {}
        return set(status) == {other.name for other in others} and all(link.connected for link in status.values())


class Region:
    """Nodes that share a folder, as pods share a Secret and a ConfigMap."""

    def __init__(self, root: Path, count: int) -> None:
        self.root = root
        self.nodes = [Node(root, number) for number in range(count)]

    def write(self, *nodes: Node, **changes: Any) -> None:
        replace_file(self.root / "mesh.key", MESH_KEY.secret_text() + "\n")
        for node in nodes:
            node.write_secret()
        self.settings(*nodes, **changes)

    def settings(self, *nodes: Node, **changes: Any) -> None:
        body = {"region": "r", "nodes": {node.name: node.entry for node in nodes}, "admission": {"open": True}}
        replace_file(self.root / "settings.json", json.dumps({**body, **changes}))


@asynccontextmanager
async def running(*relays: Relay) -> AsyncIterator[Relay]:
    """Started; at the end closed, without a failed callback.  Yields the first one."""
    problems: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: problems.append(context))
    async with AsyncExitStack() as stack:
        for relay in relays:
            stack.push_async_callback(relay.close)
            await relay.start()
        yield relays[0]
    for relay in relays:
        if relay.hub is not None:
            await relay.hub.closed(tuple(relay.hub.links), PATIENCE)
            assert not relay.hub.router.active
    assert not problems, problems


async def by_flags(tmp_path: Path, *flags: str) -> Relay:
    base = ["-c", str(tmp_path / "derper.key"), "-certdir", str(tmp_path), "-http-port", "-1", "-stun=false"]
    return Relay(parse_flags([*base, *flags], {}, is_root=False), rng=random.Random(1), timings=FAST)


def relay_in(folder: Path, *more: str) -> Relay:
    """A relay by flags on free ports, with a certificate for its address that is made only once."""
    pair = pair_for(HOST)
    (folder / f"{HOST}.crt").write_bytes(pair.cert_pem)
    (folder / f"{HOST}.key").write_bytes(pair.key_pem)
    flags = [f"-a={HOST}:0", "-http-port=-1", "-stun-port=0", f"-c={folder / 'derper.key'}", "-certmode=manual"]
    flags += [f"-certdir={folder}", f"-hostname={HOST}", *more]
    return Relay(parse_flags(flags, {}, is_root=False), rng=random.Random(1))


async def dial(relay: Relay, number: int, **options: Any) -> Client:
    """A client of a relay that `relay_in` made."""
    assert relay.listener is not None
    endpoint = Endpoint((HOST,), relay.listener.port, HOST, certs.pin(pair_for(HOST).leaf))
    return await dial_endpoint(endpoint, private(number), Options(**options))
