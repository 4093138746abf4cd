"""Two workers are one relay to stock clients and stock relays, and each may die without the other."""

from __future__ import annotations

import asyncio
import os
import secrets
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import aiohttp
import pytest

from derper.wire import frames
from derper.wire.frames import FrameType
from derper.wire.keys import NodePrivate

from .conftest import MakeMember, Relays
from .metrics import counted
from .peers import GoClients, StockClient, deliver
from .processes import HANG, ProcessEndedError
from .raw import RawClients
from .relays import Relay, RelayOptions

DISCO = "TS💬".encode() + bytes(80)
CROWD = 24  # more than twice what one worker may be ahead of the other: both have some
PAGES = 9090


class Workers:
    """A relay of two workers."""

    def __init__(self, relay: Relay) -> None:
        self.relay = relay

    async def status(self) -> dict[str, Any]:
        url = f"http://{self.relay.address}:{PAGES}/status"
        async with aiohttp.ClientSession() as http, http.get(url) as answer:
            found: dict[str, Any] = await answer.json()
            return found

    async def until(self, condition: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """Wait for a status."""
        async with asyncio.timeout(HANG):
            while not condition(found := await self.status()):  # noqa: ASYNC110 -- no event tells it
                await asyncio.sleep(0.05)
        return found


@pytest.fixture
async def node(relays: Relays, addresses: Iterator[str]) -> Workers:
    address = next(addresses)
    flags = ("-workers=2", f"-metrics-addr={address}:{PAGES}")
    return Workers(await relays.start(relays.make("ours", RelayOptions(flags=flags), address=address)))


def alive(pid: int) -> bool:
    with suppress(ProcessLookupError):
        os.kill(pid, 0)
        return True
    return False


async def crowd(clients: GoClients, relay: Relay) -> list[StockClient]:
    return [await clients.dial_relay(relay, reconnect=True) for _ in range(CROWD)]


async def ring(crowd: list[StockClient], text: bytes) -> None:
    """Everybody writes to the next but one, as soon as all know each other."""
    for source, target in zip(crowd, crowd[2:] + crowd[:2], strict=True):
        await deliver(source, target, text)


async def test_all_reach_all_and_are_counted_once(node: Workers, clients: GoClients) -> None:
    all_clients = await crowd(clients, node.relay)
    await ring(all_clients, b"hello")
    found = await node.until(lambda found: sum(row["connections"] for row in found["workers"]) == CROWD)
    assert all(row["connections"] for row in found["workers"])
    assert found["clients"] == CROWD
    assert found["ready"] is True
    numbers = await counted(node.relay)
    assert numbers["derp_clients_local"] == numbers["derp_clients_total"] == CROWD
    assert numbers["derp_clients_remote"] == 0
    assert numbers["derp_current_connections"] == CROWD
    assert numbers["derp_packets_received"] == numbers["derp_packets_sent"] + sum(
        value for name, value in numbers.items() if name.startswith("derp_packets_dropped")
    )
    assert numbers["derp_packets_forwarded_out"] == numbers["derp_packets_forwarded_in"] == 0
    assert numbers["derper_worker_crossed_in"] == numbers["derper_worker_crossed_out"] > 0
    assert {numbers[f'derper_worker_up{{worker="{n}"}}'] for n in range(2)} == {1}


async def test_who_comes_last_has_the_key(node: Workers, raw: RawClients) -> None:
    """Wherever it comes: a client whose network changed is not kept waiting for its old connection's end."""
    sender, key = await raw.login(node.relay), NodePrivate.generate()
    group = []
    for number in range(CROWD):
        group.append(await raw.login(node.relay, key))
        text = number.to_bytes(8, "big")
        arrival = asyncio.create_task(group[-1].expect(FrameType.RECV_PACKET, sender.key + text))
        while not arrival.done():
            sender.write(frames.send_packet(key.public, text))
            await asyncio.wait((arrival,), timeout=0.25)
    numbers = await counted(node.relay)
    assert (numbers["derp_current_dup_client_keys"], numbers["derp_current_dup_client_conns"]) == (1, CROWD)
    assert (numbers["derp_clients_local"], numbers["derp_total_dup_client_conns"]) == (2, CROWD - 1)


async def test_a_killed_worker_takes_only_its_own_clients(node: Workers, clients: GoClients) -> None:
    all_clients = await crowd(clients, node.relay)
    await ring(all_clients, b"before")
    before = await node.until(lambda found: sum(row["connections"] for row in found["workers"]) == CROWD)
    seen = await counted(node.relay)
    os.kill(before["workers"][0]["pid"], signal.SIGKILL)
    lost = [asyncio.ensure_future(client.expect("disconnected")) for client in all_clients]
    async with asyncio.timeout(HANG):
        while sum(task.done() for task in lost) < before["workers"][0]["connections"]:
            await asyncio.wait(lost, return_when=asyncio.FIRST_COMPLETED, timeout=0.05)
            await asyncio.sleep(0.01)
    await ring(all_clients, b"after")  # those that lost it have come back
    after = await node.until(lambda found: all(row["ready"] for row in found["workers"]))
    assert sum(task.done() for task in lost) == before["workers"][0]["connections"]
    for task in lost:
        task.cancel()
    assert [row["restarts"] for row in after["workers"]] == [1, 0]
    assert after["workers"][0]["pid"] != before["workers"][0]["pid"]
    assert after["workers"][1]["pid"] == before["workers"][1]["pid"]
    numbers = await counted(node.relay)
    for name in ("derp_packets_received", "derp_packets_sent", "derp_accepts", "derper_worker_crossed_out"):
        assert numbers[name] >= seen[name] > 0, f"{name} never goes back"


async def test_a_drain_sends_all_away(node: Workers, clients: GoClients) -> None:
    all_clients = await crowd(clients, node.relay)
    before = await node.status()
    ending = asyncio.ensure_future(node.relay.stop())
    await asyncio.gather(*(client.expect("restarting") for client in all_clients))
    assert await ending == 0
    assert not any(alive(row["pid"]) for row in before["workers"])


async def test_a_port_that_is_taken_is_told_once(relays: Relays, addresses: Iterator[str], node: Workers) -> None:
    options = RelayOptions(flags=("-workers=2",), stun_port=3479)
    second = relays.make("ours", options, address=node.relay.address)
    with pytest.raises(ProcessEndedError, match="ended with status 1"):
        await second.start()
    assert second.log_text().count("address already in use; stop what uses it or choose another with -a") == 1
    assert (await node.status())["ready"] is True


@pytest.fixture
def mesh_key() -> str:
    return secrets.token_hex(32)


async def test_in_a_mesh_with_stock_derper(
    relays: Relays, member: MakeMember, clients: GoClients, mesh_key: str
) -> None:
    """Stock derper has one link to the node, to any worker, and reaches the clients of both; and they reach its."""
    stock = member("stock", "stock.test", mesh_key)
    ours = member("ours", "ours.test", mesh_key, flags=["-workers=2"])
    stock.mesh_with([ours])
    ours.mesh_with([stock])
    for relay in (ours, stock):
        await relays.start(relay)
    here = await crowd(clients, ours)
    there = await clients.dial_relay(stock)
    for client in here:
        await deliver(there, client, DISCO + b"from stock")
        await deliver(client, there, DISCO + b"to stock")
    watcher = await clients.dial_relay(ours, mesh_key=mesh_key, watch=True)
    heard = Counter[str]()
    while len(heard) < CROWD + 1:
        event = await watcher.expect("peer_present")
        if event["key"] not in (stock.key, ours.key, watcher.key):
            heard[event["key"]] += 1
        if not {client.key for client in here} - heard.keys():
            break
    assert set(heard.values()) == {1}
    await here[0].close()
    for told in (there, watcher):
        gone = await told.expect("peer_gone", lambda event: event["key"] == here[0].key)
        assert gone["reason"] == 0
    assert watcher.events.take("peer_gone") is None
