"""A mesh of one stock relay and two of ours: one of ours by stock's flags, the other by a settings file."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest

from derper.wire.keys import MeshKey

from .conftest import MakeMember, Relays
from .metrics import counted
from .peers import GoClients, StockClient
from .pki import Authority
from .processes import HANG, Event
from .region import Node, Region
from .relays import Relay, derp_map

DISCONNECTED, NOT_HERE = 0, 1
DISCO = "TS💬".encode() + bytes(80)
WRONG_PIN = f"sha256-raw:{'00' * 32}"
STRANGER = f"nodekey:{'17' * 32}"


@dataclass
class Mesh:
    """Relays that are meshed with each other, and how to reach each."""

    relays: dict[str, Relay]
    mesh_key: str

    def dial_options(self, name: str) -> dict[str, Any]:
        return {"map": derp_map([self.relays[name].node("900a")]), "region": 900}


@pytest.fixture
async def mesh(
    relays: Relays,
    member: MakeMember,
    authority: Authority,
    addresses: Iterator[str],
    tmp_path: Path,
    clients: GoClients,
) -> Mesh:
    """Names: stock, flags, settings."""
    mesh_key = secrets.token_hex(32)
    region = Region(addresses, tmp_path / "region", 1, mesh_key, authority.issue)
    node = region.nodes[0]
    stock, flags = (member(make, f"{make}.test", mesh_key) for make in ("stock", "ours"))
    stock.mesh_with([flags, node])
    flags.mesh_with([stock, node])
    region.write_settings(others={"stock": stock, "flags": flags})
    mesh = Mesh({"stock": stock, "flags": flags, "settings": node}, mesh_key)
    for relay in (flags, node, stock):  # stock last: it dials once, and then only each five seconds
        await relays.start(relay)
    await meshed(mesh, clients)
    return mesh


async def meshed(mesh: Mesh, clients: GoClients) -> None:
    """Wait until every relay watches every other, each of its workers for itself."""
    for relay in mesh.relays.values():
        watching = sum(other.workers for other in mesh.relays.values() if other is not relay)
        async with asyncio.timeout(HANG):
            while (await counted(relay))["derp_watchers"] < watching:  # noqa: ASYNC110 -- no event tells it
                await asyncio.sleep(0.02)
    for name, relay in mesh.relays.items():
        watcher = await clients.dial(**mesh.dial_options(name), mesh_key=mesh.mesh_key, watch=True)
        for other in mesh.relays.values():
            if other is not relay:
                await watcher.expect("peer_present", about(other.key))
        await watcher.close()


def about(key: str) -> Callable[[Event], bool]:
    """Events about this client."""
    return lambda event: event["key"] == key


async def deliver(source: StockClient, target: StockClient, packet: bytes) -> None:
    """Send a packet until it arrives. The relays learn of each other's clients a moment after these have connected;
    until then a relay answers that the target is not here, to disco packets, three times and then once a second."""
    arrival = asyncio.ensure_future(target.receive(source.key))
    while not arrival.done():
        await source.send(target.key, DISCO + packet)
        refusal = asyncio.ensure_future(source.expect("peer_gone", about(target.key)))
        await asyncio.wait((arrival, refusal), return_when=asyncio.FIRST_COMPLETED, timeout=0.25)
        refusal.cancel()
    assert await arrival == DISCO + packet


async def test_packets_cross_every_link_both_ways(mesh: Mesh, clients: GoClients) -> None:
    on = {name: await clients.dial(**mesh.dial_options(name)) for name in mesh.relays}
    for source, target in permutations(mesh.relays, 2):
        await deliver(on[source], on[target], f"{source} to {target}".encode())
        big = secrets.token_bytes(65536)
        await on[source].send(on[target].key, big)
        assert await on[target].receive(on[source].key) == big


async def test_a_peer_that_leaves_is_gone_for_those_it_wrote_to(mesh: Mesh, clients: GoClients) -> None:
    for home, elsewhere in permutations(mesh.relays, 2):
        listener = await clients.dial(**mesh.dial_options(home))
        leaver = await clients.dial(**mesh.dial_options(elsewhere))
        await deliver(leaver, listener, b"hello")
        await leaver.close()
        gone = await listener.expect("peer_gone")
        assert (gone["key"], gone["reason"]) == (leaver.key, DISCONNECTED), f"{home} of one on {elsewhere}"


async def test_a_client_that_moves_is_followed(mesh: Mesh, clients: GoClients) -> None:
    private_key = f"privkey:{secrets.token_hex(32)}"
    sender = await clients.dial(**mesh.dial_options("stock"))
    for name in ("flags", "settings", "stock", "settings"):
        mover = await clients.dial(**mesh.dial_options(name), private_key=private_key)
        await deliver(sender, mover, name.encode())
        await mover.close()


def has_mesh_keys(*keys: str) -> Callable[[dict[str, Any]], bool]:
    """Whether these are in force, as a relay says."""
    marks = [MeshKey.parse(key).fingerprint() for key in keys]
    return lambda status: status["meshKeys"] == {"current": marks[0], "accepted": marks}


async def test_rotating_the_mesh_key_drops_no_link(mesh: Mesh, clients: GoClients) -> None:
    """Of one relay among others that know only the old key, stock ones among them: what stands keeps standing."""
    node = mesh.relays["settings"]
    assert isinstance(node, Node)
    on = {name: await clients.dial(**mesh.dial_options(name)) for name in mesh.relays}
    since = {name: link["since"] for name, link in (await node.status())["mesh"].items()}
    old, new = mesh.mesh_key, secrets.token_hex(32)
    for keys in ([old, new], [new, old], [new]):
        node.workdir.joinpath("mesh.key").write_text("".join(f"{key}\n" for key in keys))
        await node.until(has_mesh_keys(*keys))
        assert {name: link["since"] for name, link in (await node.status())["mesh"].items()} == since
        for name in ("stock", "flags"):
            await deliver(on[name], on["settings"], keys[0].encode())
            await deliver(on["settings"], on[name], keys[0].encode())


@pytest.mark.parametrize("name", ["stock", "flags", "settings"])
async def test_a_forwarded_packet_makes_no_second_hop(mesh: Mesh, clients: GoClients, name: str) -> None:
    elsewhere = "flags" if name != "flags" else "settings"
    target = await clients.dial(**mesh.dial_options(elsewhere))
    neighbour = await clients.dial(**mesh.dial_options(name))
    await deliver(neighbour, target, b"the relay knows the way")
    peer = await clients.dial(**mesh.dial_options(name), mesh_key=mesh.mesh_key)
    await peer.forward(STRANGER, target.key, DISCO)
    gone = await peer.expect("peer_gone")
    assert (gone["key"], gone["reason"]) == (target.key, NOT_HERE)
    await neighbour.send(target.key, b"next")
    assert await target.receive() == b"next"


async def test_a_lost_relay_takes_only_its_own_clients(mesh: Mesh, clients: GoClients) -> None:
    for name in ("stock", "flags"):
        victim = await clients.dial(**mesh.dial_options(name))
        survivor = await clients.dial(**mesh.dial_options("settings"))
        await deliver(victim, survivor, b"hello")
        await mesh.relays[name].kill()
        gone = await survivor.expect("peer_gone", about(victim.key))
        assert gone["reason"] == DISCONNECTED
        await survivor.ping()


async def test_a_restarted_relay_joins_again(mesh: Mesh, clients: GoClients) -> None:
    for name, relay in mesh.relays.items():
        await relay.kill()
        await relay.start()
        there = await clients.dial(**mesh.dial_options(name))
        for other in mesh.relays:
            if other != name:
                here = await clients.dial(**mesh.dial_options(other))
                await deliver(here, there, f"{other} to {name}".encode())
                await deliver(there, here, f"{name} to {other}".encode())


# -- membership while running: ours only, stock derper has none


@pytest.fixture
async def three(addresses: Iterator[str], tmp_path: Path, relays: Relays) -> Region:
    """Three of ours; the third runs but is not a member yet."""
    region = Region(addresses, tmp_path / "three", 3)
    region.write_settings(region.nodes[:2])
    for node in region.nodes[:2]:
        await relays.start(node)
    return region


async def dial_node(clients: GoClients, region: Region, number: int) -> StockClient:
    return await clients.dial(map=region.map(), region=900, node=f"900{'abc'[number]}")


async def test_a_node_joins_and_leaves_while_the_others_run(three: Region, clients: GoClients, relays: Relays) -> None:
    steady = [await dial_node(clients, three, number) for number in (0, 1)]
    await deliver(steady[0], steady[1], b"before")
    three.write_settings()
    await relays.start(three.nodes[2])
    joined = await dial_node(clients, three, 2)
    for client in steady:
        await deliver(client, joined, b"welcome")
        await deliver(joined, client, b"thank you")
    three.write_settings(three.nodes[:2])
    await steady[0].expect("peer_gone", about(joined.key))
    await deliver(steady[0], steady[1], b"after")
    for client in steady:
        assert client.events.take("disconnected") is None


@pytest.mark.parametrize(
    ("change", "complaint"),
    [({"certName": WRONG_PIN}, f"not {WRONG_PIN}"), ({"serverKey": STRANGER}, f"not {STRANGER}")],
    ids=["pin", "server key"],
)
async def test_a_peer_that_is_not_who_it_should_be_gets_no_link(
    three: Region, change: dict[str, str], complaint: str
) -> None:
    watching, watched = three.nodes[:2]
    await watching.until(lambda status: status["mesh"]["t-1"]["connected"])
    await watched.kill()
    watched.changes = change
    digest = three.write_settings([watching, watched])
    await watching.until(lambda status: status["settings"] == digest and not status["mesh"]["t-1"]["connected"])
    watched.changes = {}
    await watched.start()
    status = await watching.until(lambda status: complaint in (status["mesh"]["t-1"]["error"] or ""))
    assert not status["mesh"]["t-1"]["connected"]
