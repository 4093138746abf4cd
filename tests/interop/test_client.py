"""Our client on stock derper: what a mesh link, the prober and the tests rely on."""

from __future__ import annotations

import json
import secrets
import ssl
from dataclasses import replace

import pytest

from derper import derpmap
from derper.client import Client, DialError, Endpoint, Options, dial_endpoint, dial_node, dial_region
from derper.derpmap import DERPNode
from derper.wire import frames
from derper.wire.client import PeerGone, PeerPresent, Pong
from derper.wire.keys import MeshKey, NodePrivate

from .conftest import Relays
from .peers import GoClients
from .pki import Authority
from .relays import DERP_PORT, Relay, RelayOptions, derp_map

WRONG_PIN = f"sha256-raw:{'00' * 32}"


@pytest.fixture
async def stock(relays: Relays) -> Relay:
    """A stock relay with a self-signed certificate for its address."""
    return await relays.start(relays.make("stock"))


def node_of(relay: Relay) -> DERPNode:
    parsed = derpmap.from_json(json.dumps(derp_map([relay.node("900a")])))
    return parsed.regions[900].nodes[0]


async def dial(relay: Relay, options: Options | None = None) -> Client:
    return await dial_node(node_of(relay), NodePrivate.generate(), options)


@pytest.mark.parametrize("fast_start", [True, False])
async def test_packets_both_ways_with_a_stock_client(stock: Relay, clients: GoClients, fast_start: bool) -> None:
    ours = await dial(stock, Options(fast_start=fast_start))
    theirs = await clients.dial_relay(stock)
    assert str(ours.server_key) == stock.key
    for size in (0, 1, 1400, 65536):
        packet = secrets.token_bytes(size)
        await theirs.send(str(ours.public_key), packet)
        received = await ours.receive_packet()
        assert (str(received.source), received.data) == (theirs.key, packet)
        ours.send(received.source, packet)
        assert await theirs.receive(str(ours.public_key)) == packet
    await ours.close()


async def test_the_pin_must_match(stock: Relay) -> None:
    with pytest.raises(DialError) as refused:
        await dial_node(replace(node_of(stock), cert_name=WRONG_PIN), NodePrivate.generate())
    assert refused.value.stage == "tls"


async def test_without_a_pin_a_self_signed_certificate_is_refused(stock: Relay) -> None:
    with pytest.raises(DialError) as refused:
        await dial_node(replace(node_of(stock), cert_name=""), NodePrivate.generate())
    assert refused.value.stage == "tls"


@pytest.mark.parametrize(("cert_name", "host_name"), [("", "stock.test"), ("stock.test", "stock.test")])
async def test_a_certificate_is_checked_by_name(
    relays: Relays, authority: Authority, cert_name: str, host_name: str
) -> None:
    options = RelayOptions(certificate=authority.issue("stock.test"), host_name="stock.test")
    stock = await relays.start(relays.make("stock", options))
    roots = ssl.create_default_context(cadata=authority.pem)
    endpoint = Endpoint((stock.address,), DERP_PORT, host_name, cert_name, roots=roots)
    client = await dial_endpoint(endpoint, NodePrivate.generate())
    assert str(client.server_key) == stock.key
    await client.close()
    with pytest.raises(DialError) as refused:
        await dial_endpoint(replace(endpoint, cert_name="other.test"), NodePrivate.generate())
    assert refused.value.stage == "tls"


async def test_another_server_key_is_refused(stock: Relay) -> None:
    with pytest.raises(DialError, match="key"):
        await dial(stock, Options(server_key=NodePrivate.generate().public))


async def test_ping_and_peer_gone(stock: Relay) -> None:
    ours = await dial(stock)
    stranger = NodePrivate.generate().public
    ours.send(stranger, frames.DISCO_MAGIC + bytes(80))
    event = await ours.receive()
    assert event == PeerGone(stranger, frames.PeerGoneReason.NOT_HERE)
    ours.write(frames.ping(b"12345678"))
    assert await ours.receive() == Pong(b"12345678")
    await ours.close()


async def test_a_watcher_sees_clients_come_and_go(relays: Relays, clients: GoClients) -> None:
    mesh_key = secrets.token_hex(32)
    stock = await relays.start(relays.make("stock", RelayOptions(mesh_key=mesh_key)))
    watcher = await dial(stock, Options(mesh_key=MeshKey.parse(mesh_key), watch=True))
    own = await watcher.receive()
    assert isinstance(own, PeerPresent)
    assert own.peer == watcher.public_key
    client = await clients.dial_relay(stock)
    come = await watcher.receive()
    assert isinstance(come, PeerPresent)
    assert str(come.peer) == client.key
    assert f"{come.ip}:{come.port}" == client.about["local"]
    await client.close()
    gone = await watcher.receive()
    assert isinstance(gone, PeerGone)
    assert str(gone.peer) == client.key
    await watcher.close()


async def test_watching_needs_the_mesh_key(stock: Relay) -> None:
    client = await dial(stock, Options(watch=True))
    with pytest.raises(ConnectionError):
        await client.receive()


async def test_a_region_is_dialed_in_order(relays: Relays) -> None:
    first, second = [await relays.start(relays.make("stock")) for _ in range(2)]
    text = json.dumps(derp_map([first.node("900a"), second.node("900b")]))
    region = derpmap.from_json(text).regions[900]
    client = await dial_region(region, NodePrivate.generate())
    assert str(client.server_key) == first.key
    await client.close()
    await first.kill()
    client = await dial_region(region, NodePrivate.generate())
    assert str(client.server_key) == second.key
    await client.close()


async def test_a_node_that_accepts_tcp_and_fails_is_an_error(relays: Relays) -> None:
    first, second = [await relays.start(relays.make("stock")) for _ in range(2)]
    text = json.dumps(derp_map([first.node("900a", CertName=WRONG_PIN), second.node("900b")]))
    with pytest.raises(DialError) as refused:
        await dial_region(derpmap.from_json(text).regions[900], NodePrivate.generate())
    assert refused.value.stage == "tls"
