"""What changes under stock clients that stay connected: certificates, mesh keys, and at last the relay's end."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Iterator
from pathlib import Path

import pytest

from .conftest import Relays
from .gobuild import Peers
from .peers import GoClients, TailnetHarness
from .pki import self_signed
from .processes import PeerError
from .region import Node, Region
from .relays import derp_map


@pytest.fixture
async def region(addresses: Iterator[str], tmp_path: Path, relays: Relays) -> Region:
    """One node; its certificate is of generation 1."""
    region = Region(addresses, tmp_path / "region", 1)
    await relays.start(region.nodes[0])
    return region


@pytest.fixture
def node(region: Region) -> Node:
    return region.nodes[0]


async def apply(region: Region) -> None:
    """Write the settings, and wait until all nodes run with them."""
    digest = region.write_settings()
    for node in region.nodes:
        await node.until(lambda status: status["settings"] == digest)


async def test_a_pin_is_rotated_by_name(region: Region, node: Node, clients: GoClients) -> None:
    old = {"map": region.map(), "region": 900}
    steady = await clients.dial(**old)

    node.add_generation(2, self_signed("t-0-g2.derp.internal"))
    await apply(region)
    new = {"map": region.map(), "region": 900}
    assert new["map"] != old["map"]
    for where in (old, new):
        await (await clients.dial(**where)).ping()

    del node.stems[0]
    await apply(region)
    await (await clients.dial(**new)).ping()
    with pytest.raises(PeerError):
        await clients.dial(**old)
    await steady.ping()
    assert steady.events.take("disconnected") is None


async def test_a_client_without_a_name_gets_the_first_certificate(
    region: Region, node: Node, clients: GoClients
) -> None:
    nameless = {"map": derp_map([node.node("900a", HostName=node.address)]), "region": 900}
    assert (await clients.dial(**nameless)).about["certificates"][0] == "t-0-g1.derp.internal"
    node.add_generation(2, self_signed("t-0-g2.derp.internal"))
    await apply(region)
    assert (await clients.dial(**nameless)).about["certificates"][0] == "t-0-g1.derp.internal"


async def test_a_broken_certificate_keeps_the_old_one(region: Region, node: Node, clients: GoClients) -> None:
    where = {"map": region.map(), "region": 900}
    node.workdir.joinpath(f"{node.host_name}.crt").write_text("not a certificate")
    await node.until(lambda status: bool(status["problems"]))
    await (await clients.dial(**where)).ping()
    assert (await clients.stun(node.stun_address)).answered


async def test_a_mesh_key_is_rotated(region: Region, node: Node, clients: GoClients) -> None:
    """The first line is presented, all are accepted; who is connected stays."""
    where = {"map": region.map(), "region": 900, "watch": True}
    old, new = region.mesh_key, secrets.token_hex(32)
    steady = await clients.dial(**where, mesh_key=old)
    node.workdir.joinpath("mesh.key").write_text(f"{new}\n{old}\n")
    await until_accepted(clients, where, new)
    await (await clients.dial(**where, mesh_key=old)).expect("peer_present")
    node.workdir.joinpath("mesh.key").write_text(f"{new}\n")
    await until_refused(clients, where, old)
    await steady.ping()
    assert steady.events.take("disconnected") is None


async def until_accepted(clients: GoClients, where: dict[str, object], key: str) -> None:
    """Watch with this key, again and again until that is allowed: each try is answered, by presence or by the end."""
    while await watch(clients, where, key) != "peer_present":
        pass


async def until_refused(clients: GoClients, where: dict[str, object], key: str) -> None:
    while await watch(clients, where, key) != "disconnected":
        pass


async def watch(clients: GoClients, where: dict[str, object], key: str) -> str:
    client = await clients.dial(**where, mesh_key=key)
    answers = [asyncio.ensure_future(client.expect(name)) for name in ("peer_present", "disconnected")]
    done, rest = await asyncio.wait(answers, return_when=asyncio.FIRST_COMPLETED)
    for task in rest:
        task.cancel()
    await client.close()
    return str(done.pop().result()["event"])


async def test_a_relay_that_stops_says_so(node: Node, region: Region, clients: GoClients) -> None:
    where = {"map": region.map(), "region": 900}
    connected = [await clients.dial(**where) for _ in range(3)]
    status = await node.stop()
    assert status == 0
    for client in connected:
        await client.expect("restarting")
        await client.expect("disconnected")
    with pytest.raises(PeerError, match="connection refused"):
        await clients.dial(**where)


async def test_rotation_under_traffic(addresses: Iterator[str], tmp_path: Path, relays: Relays, peers: Peers) -> None:
    """Both generations served, then the new map, then the old generation retired: no request fails."""
    region = Region(addresses, tmp_path / "three", 3)
    for node in region.nodes:
        await relays.start(node)
    async with TailnetHarness(peers.peers, region.map(), tmp_path / "net") as net:
        traffic = await net.start_traffic("a", "b")
        await traffic.next_ok(10)
        for node in region.nodes:
            node.add_generation(2, self_signed(f"{node.name}-g2.derp.internal"))
        await apply(region)
        await net.set_map(region.map())
        await traffic.next_ok(10)
        for node in region.nodes:
            del node.stems[0]
        await apply(region)
        await traffic.next_ok(10)
        assert [await net.relay_of(name) for name in net.nodes] == ["900a", "900a"]
        summary = await traffic.stop()
        print(summary)
        assert summary.failed == 0, summary.errors


async def test_packets_follow_a_client_that_moves(
    addresses: Iterator[str], tmp_path: Path, relays: Relays, clients: GoClients
) -> None:
    """Its node is killed or told to stop; what is sent before it is on another one reaches it there."""
    region = Region(addresses, tmp_path / "three", 3)
    await asyncio.gather(*map(relays.start, region.nodes))
    for node in region.nodes:
        await node.until_meshed()
    last, there = region.nodes[-1], {"map": region.map(), "region": 900, "node": "900c"}
    sender = await clients.dial(**there)
    for node, name, end in ((region.nodes[0], "900a", "stop"), (region.nodes[1], "900b", "kill")):
        private_key = f"privkey:{secrets.token_hex(32)}"
        mover = await clients.dial(**there | {"node": name}, private_key=private_key)
        await mover.send(sender.key, b"hello")
        await sender.receive(mover.key)
        ending = asyncio.ensure_future(getattr(node, end)())
        assert (await sender.expect("peer_gone"))["key"] == mover.key
        await sender.send(mover.key, b"wait for me")
        again = await clients.dial(**there, private_key=private_key)
        assert await again.receive(sender.key) == b"wait for me"
        await ending
    assert "derper_packets_moved 2\n" in await last.metrics_get("/metrics")
