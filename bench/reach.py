"""How long it takes until a client that has just logged in can be reached from every other node of a region."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass

from bench.errors import BenchError
from bench.region import ADDRESS, Region
from bench.relays import Relay
from derper.client import Client, Endpoint, Options, dial_endpoint
from derper.dial import DialError
from derper.net.sockets import tcp_info
from derper.wire.client import PeerPresent, ReceivedPacket
from derper.wire.keys import MeshKey, NodePrivate

EVERY = 0.001
LIMIT = 30.0


@dataclass(frozen=True)
class Reached:
    """Seconds from each new client's login until a packet from every other node had come; what a peer was told."""

    seconds: list[float]
    snapshot_clients: int
    snapshot_seconds: float
    snapshot_bytes: int
    changes: int
    change_bytes: int

    def quantile(self, share: float) -> float:
        """The time within which this share of the clients was reached, in seconds."""
        ordered = sorted(self.seconds)
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def measure(region: Region, count: int) -> Reached:
    """One new client after another, on one node after another. Raises BenchError if one is not reached at all."""
    return asyncio.run(_measure(region, count))


async def _measure(region: Region, count: int) -> Reached:
    nodes = dict(region.nodes)
    watched = min(nodes)
    async with AsyncExitStack() as stack:
        senders = {number: await stack.enter_async_context(_client(node)) for number, node in nodes.items()}
        started = time.monotonic()
        peer = await stack.enter_async_context(_client(nodes[watched], MeshKey(bytes.fromhex(region.mesh_key))))
        snapshot, ended = await _presents(peer)
        took, first_bytes = ended - started, _received(peer)
        numbers = sorted(nodes)
        seconds = [await _reach(nodes, senders, numbers[turn % len(nodes)]) for turn in range(count)]
        changes = 2 * sum(numbers[turn % len(nodes)] == watched for turn in range(count))  # each comes and goes
        await asyncio.sleep(LIMIT / 100)
        return Reached(seconds, snapshot, took, first_bytes, changes, _received(peer) - first_bytes)


async def _reach(nodes: Mapping[int, Relay], senders: Mapping[int, Client], home: int) -> float:
    missing = {number: sender for number, sender in senders.items() if number != home}
    async with _client(nodes[home]) as fresh:
        started = time.monotonic()
        sending = asyncio.ensure_future(_send_to(fresh.public_key, missing))
        try:
            async with asyncio.timeout(LIMIT):
                while missing:
                    event = await fresh.receive()
                    if isinstance(event, ReceivedPacket):
                        missing.pop(event.data[0], None)
        except TimeoutError:
            raise BenchError(f"a client of node {home} was not reached from {sorted(missing)}") from None
        finally:
            sending.cancel()
        return time.monotonic() - started


async def _send_to(receiver: bytes, senders: Mapping[int, Client]) -> None:
    while True:
        for number, sender in senders.items():
            sender.send(receiver, bytes([number]))
        await asyncio.sleep(EVERY)


async def _presents(peer: Client) -> tuple[int, float]:
    """How many clients a mesh peer is told of at once, those of before it came, and when it knew the last."""
    count, last = 0, 0.0
    try:
        while True:
            async with asyncio.timeout(LIMIT / 100 if count else LIMIT):
                if isinstance(await peer.receive(), PeerPresent):
                    count, last = count + 1, time.monotonic()
    except TimeoutError:
        return count, last


def _received(client: Client) -> int:
    info = tcp_info(client._transport)
    if info is None:
        raise BenchError("the system does not tell how many bytes a connection has received (Linux 4.19 does)")
    return info.received


@asynccontextmanager
async def _client(node: Relay, mesh_key: MeshKey | None = None) -> AsyncIterator[Client]:
    endpoint = Endpoint((ADDRESS,), node.port, ADDRESS, insecure=True)
    options = Options(mesh_key=mesh_key, watch=mesh_key is not None)
    try:
        client = await dial_endpoint(endpoint, NodePrivate(secrets.token_bytes(32)), options)
    except DialError as error:
        raise BenchError(f"a client cannot log in: {error}") from error
    try:
        yield client
    finally:
        await client.close()
