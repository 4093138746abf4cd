"""The peers against each other: stock clients and tailnet nodes on stock relays.

These prove the harness, and they are the reference: our relay must do the same (test_server.py, test_mesh.py, ...).
"""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from .gobuild import Peers
from .peers import GoClients, TailnetHarness
from .pki import Authority
from .processes import PeerError
from .relays import RelayOptions, StockDerper, derp_map

WRONG_PIN = f"sha256-raw:{'00' * 32}"


@pytest.fixture
async def stock(peers: Peers, addresses: Iterator[str], tmp_path: Path) -> AsyncIterator[StockDerper]:
    """A stock relay with a self-signed certificate for its address."""
    async with StockDerper(peers.derper, next(addresses), tmp_path / "stock") as relay:
        yield relay


async def test_two_clients_exchange_packets(stock: StockDerper, clients: GoClients) -> None:
    region = derp_map([stock.node("900a")])
    a = await clients.dial(map=region, region=900)
    b = await clients.dial(map=region, region=900)
    await a.send(b.key, b"there")
    assert await b.receive(a.key) == b"there"
    await b.send(a.key, b"back" * 16_384)
    assert await a.receive(b.key) == b"back" * 16_384
    assert a.server_key == stock.key
    assert a.fast_start
    assert await a.ping() > 0


async def test_pin_is_checked(stock: StockDerper, clients: GoClients) -> None:
    assert stock.printed_node()["HostName"] == stock.address
    await clients.dial_relay(stock)
    with pytest.raises(PeerError, match="cert hash does not match"):
        await clients.dial(map=derp_map([stock.node("900a", CertName=WRONG_PIN)]), region=900)
    with pytest.raises(PeerError, match="certificate signed by unknown authority"):
        await clients.dial(map=derp_map([stock.node("900a", CertName="")]), region=900)


async def test_stun_and_netcheck(stock: StockDerper, clients: GoClients) -> None:
    answer = await clients.stun(f"{stock.address}:3478")
    assert answer.answered
    assert answer.mapped == answer.local
    report = await clients.netcheck(derp_map([stock.node("900a")]))
    assert report["udp"]
    assert report["preferred"] == 900
    assert not (await clients.stun(f"{stock.address}:3479", patience=0.1)).answered


async def test_mesh_of_two(
    peers: Peers, addresses: Iterator[str], authority: Authority, ca_file: Path, tmp_path: Path, clients: GoClients
) -> None:
    mesh_key = secrets.token_hex(32)
    one, two = (
        StockDerper(
            peers.derper,
            next(addresses),
            tmp_path / name,
            RelayOptions(
                certificate=authority.issue(f"{name}.test"),
                host_name=f"{name}.test",
                mesh_key=mesh_key,
                env={"SSL_CERT_FILE": str(ca_file)},
            ),
        )
        for name in ("one", "two")
    )
    one.mesh_with([two])
    two.mesh_with([one])
    async with one, two:
        region = derp_map([one.node("900a"), two.node("900b")])
        watcher = await clients.dial(map=region, region=900, node="900b", mesh_key=mesh_key, watch=True)
        await watcher.expect("peer_present", lambda e: e["key"] == one.key)
        a = await clients.dial(map=region, region=900, node="900a")
        b = await clients.dial(map=region, region=900, node="900b")
        assert (a.server_key, b.server_key) == (one.key, two.key)
        await watcher.expect("peer_present", lambda e: e["key"] == b.key)
        await a.send(b.key, b"over the mesh")
        assert await b.receive(a.key) == b"over the mesh"


async def test_tailnet_pair_talks_through_the_relay(stock: StockDerper, peers: Peers, tmp_path: Path) -> None:
    async with TailnetHarness(peers.peers, derp_map([stock.node("900a")]), tmp_path / "net") as net:
        summary = await net.http("a", "b", count=20, size=5000)
        assert (summary.ok, summary.failed) == (20, 0), summary.errors
        assert await net.relay_of("a") == await net.relay_of("b") == "900a"
        status = await net.status("a")
        assert status["home"] == "r900"
        assert status["peers"]["b"]["direct"] == ""


async def test_tailnet_takes_a_new_map(
    peers: Peers, addresses: Iterator[str], stock: StockDerper, tmp_path: Path
) -> None:
    async with StockDerper(peers.derper, next(addresses), tmp_path / "next") as following:
        old, new = derp_map([stock.node("900a")]), derp_map([following.node("900b")])
        async with TailnetHarness(peers.peers, old, tmp_path / "net") as net:
            traffic = await net.start_traffic("a", "b")
            await traffic.next_ok()
            await net.set_map(new)
            for name in net.nodes:
                await net.connected(name, "900b")
            await stock.kill()
            await traffic.next_ok(5)
            summary = await traffic.stop()
            assert summary.failed == 0, summary.errors
