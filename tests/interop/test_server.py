"""Stock clients on a relay: every test runs with stock derper, which is the reference, and with ours."""

from __future__ import annotations

import asyncio
import secrets
from typing import Any

import pytest

from .conftest import Relays
from .peers import GoClients, StockClient, acquaint
from .pki import Authority
from .processes import HANG, PeerError
from .relays import DERP_PORT, STUN_PORT, DERPMap, Relay, RelayOptions, derp_map, free_port

DISCONNECTED, NOT_HERE = 0, 1
WRONG_PIN = f"sha256-raw:{'00' * 32}"
DISCO = "TS💬".encode() + bytes(80)
"""Looks like a disco message: only such a packet to an unknown peer is answered."""

STRANGER = f"nodekey:{'17' * 32}"


def region(*relays: Relay) -> dict[str, Any]:
    """The options to dial a region of these relays."""
    return {
        "map": derp_map(relay.node(f"900{letter}") for relay, letter in zip(relays, "abc", strict=False)),
        "region": 900,
    }


@pytest.fixture
async def pair(relay: Relay, clients: GoClients) -> tuple[StockClient, StockClient]:
    """Two clients of one relay, which knows both."""
    a, b = await clients.dial(**region(relay)), await clients.dial(**region(relay))
    if relay.workers > 1:  # one hears of the other's clients a moment later
        await acquaint(a, b)
        await acquaint(b, a)
    return a, b


# -- connecting


async def test_fast_start(relay: Relay, clients: GoClients) -> None:
    client = await clients.dial(**region(relay))
    assert client.fast_start
    assert client.about["tls"] == "TLS 1.3"
    assert client.server_key == relay.key
    await client.ping()


async def test_slow_start_over_tls_1_2(relay: Relay, clients: GoClients) -> None:
    client = await clients.dial(**region(relay), tls12=True)
    assert not client.fast_start
    assert client.about["tls"] == "TLS 1.2"
    assert client.server_key == relay.key
    await client.ping()


async def test_by_url_with_a_certificate_from_an_authority(
    make: str, relays: Relays, authority: Authority, clients: GoClients
) -> None:
    options = RelayOptions(certificate=authority.issue("relay.test"), host_name="relay.test")
    relay = await relays.start(relays.make(make, options))
    where = {"url": relay.url, "dial_to": relay.derp_address}
    client = await clients.dial(**where, ca=authority.pem)
    assert client.server_key == relay.key
    with pytest.raises(PeerError, match="unknown authority"):
        await clients.dial(**where)


async def test_the_printed_map_entry_works_as_it_is(relay: Relay, clients: GoClients) -> None:
    node = relay.printed_node() | {"DERPPort": DERP_PORT, "STUNPort": STUN_PORT}
    client = await clients.dial(map=derp_map([node]), region=900)
    assert client.server_key == relay.key


async def test_a_wrong_pin_is_refused(relay: Relay, clients: GoClients) -> None:
    wrong: DERPMap = derp_map([relay.node("900a", CertName=WRONG_PIN)])
    with pytest.raises(PeerError, match="cert hash does not match"):
        await clients.dial(map=wrong, region=900)


async def test_a_pin_with_another_name_is_refused(relay: Relay, clients: GoClients) -> None:
    other: DERPMap = derp_map([relay.node("900a", HostName="other.test")])
    with pytest.raises(PeerError, match="cert does not match server name"):
        await clients.dial(map=other, region=900)


async def test_no_rate_is_asked_of_clients(relay: Relay, clients: GoClients) -> None:
    client = await clients.dial(**region(relay))
    assert (client.about["bytes_per_second"], client.about["burst_bytes"]) == (0, 0)


# -- packets


@pytest.mark.parametrize("size", [0, 1, 31, 32, 1400, 4096, 65535, 65536])
async def test_packets_of_every_size_both_ways(pair: tuple[StockClient, StockClient], size: int) -> None:
    a, b = pair
    packet = secrets.token_bytes(size)
    await a.send(b.key, packet)
    assert await b.receive(a.key) == packet
    await b.send(a.key, packet)
    assert await a.receive(b.key) == packet


async def test_packets_stay_in_order(pair: tuple[StockClient, StockClient]) -> None:
    a, b = pair
    packets = [number.to_bytes(4, "big") * 100 for number in range(30)]
    for packet in packets:
        await a.send(b.key, packet)
    assert [await b.receive(a.key) for _ in packets] == packets


async def test_to_oneself(relay: Relay, clients: GoClients) -> None:
    client = await clients.dial(**region(relay))
    await client.send(client.key, b"echo")
    assert await client.receive(client.key) == b"echo"


async def test_a_slow_reader_costs_its_own_packets_only(relay: Relay, clients: GoClients) -> None:
    a, slow, b = [await clients.dial(**region(relay)) for _ in range(3)]
    await slow.pause()
    await a.send(slow.key, b"the message that it waits for")
    await slow.expect("recv")
    await a.send(slow.key, bytes(1400), count=20_000)
    await a.send(b.key, b"past it")
    assert await b.receive(a.key) == b"past it"
    await slow.resume()


# -- peer gone


async def test_an_unknown_peer_is_not_here(relay: Relay, clients: GoClients) -> None:
    client = await clients.dial(**region(relay))
    await client.send(STRANGER, DISCO)
    gone = await client.expect("peer_gone")
    assert (gone["key"], gone["reason"]) == (STRANGER, NOT_HERE)


async def test_only_disco_is_answered(relay: Relay, clients: GoClients) -> None:
    client = await clients.dial(**region(relay))
    await client.send(STRANGER, b"not disco" * 10)
    await client.ping()
    assert client.events.take("peer_gone") is None


async def test_answers_about_unknown_peers_are_limited(relay: Relay, clients: GoClients) -> None:
    client = await clients.dial(**region(relay))
    await client.send(STRANGER, DISCO, count=50)
    for _ in range(3):
        await client.expect("peer_gone")
    await client.ping()
    assert client.events.take("peer_gone") is None


async def test_who_received_from_a_peer_learns_that_it_left(pair: tuple[StockClient, StockClient]) -> None:
    a, b = pair
    await b.send(a.key, b"I was here")
    await a.receive(b.key)
    await b.close()
    gone = await a.expect("peer_gone")
    assert (gone["key"], gone["reason"]) == (b.key, DISCONNECTED)


# -- ping, home, keep-alive


async def test_pings_are_answered(relay: Relay, clients: GoClients) -> None:
    client = await clients.dial(**region(relay))
    for _ in range(10):
        await client.ping()


async def test_note_preferred_is_accepted(relay: Relay, clients: GoClients) -> None:
    client = await clients.dial(**region(relay))
    for preferred in (True, False, True):
        await client.note_preferred(preferred)
    await client.ping()


@pytest.mark.slow
async def test_keep_alives_come_about_once_a_minute(relays: Relays, clients: GoClients) -> None:
    """Both makes at once, because it takes so long."""
    both = [await relays.start(relays.make(make)) for make in ("stock", "ours")]
    connected = [await clients.dial(**region(relay)) for relay in both]
    await asyncio.gather(*(client.expect("keep_alive", patience=2 * HANG) for client in connected))


# -- two connections with one key


@pytest.fixture
async def twins(relay: Relay, clients: GoClients) -> tuple[StockClient, StockClient, StockClient]:
    """A sender, and the older and the newer of two connections with one key."""
    private_key = f"privkey:{secrets.token_hex(32)}"
    sender = await clients.dial(**region(relay))
    older = await clients.dial(**region(relay), private_key=private_key)
    newer = await clients.dial(**region(relay), private_key=private_key)
    return sender, older, newer


async def test_the_newer_connection_receives(twins: tuple[StockClient, StockClient, StockClient]) -> None:
    sender, older, newer = twins
    await sender.send(newer.key, b"who?")
    assert await newer.receive() == b"who?"
    await older.ping()
    assert older.events.take("recv") is None


async def test_the_last_writer_receives(twins: tuple[StockClient, StockClient, StockClient]) -> None:
    sender, older, newer = twins
    await older.send(sender.key, b"me")
    await sender.receive()
    await sender.send(older.key, b"you")
    assert await older.receive() == b"you"
    await newer.send(sender.key, b"me again")
    await sender.receive()
    await sender.send(newer.key, b"you again")
    assert await newer.receive() == b"you again"


async def test_the_older_connection_receives_when_the_newer_has_left(
    twins: tuple[StockClient, StockClient, StockClient],
) -> None:
    sender, older, newer = twins
    await newer.send(sender.key, b"I was here")
    await sender.receive()
    await newer.close()
    await older.send(sender.key, b"I still am")
    await sender.receive()
    assert sender.events.take("peer_gone") is None
    await sender.send(older.key, b"good")
    assert await older.receive() == b"good"


# -- the mesh key


@pytest.fixture
async def meshed(make: str, relays: Relays) -> tuple[Relay, str]:
    """A relay with a mesh key, and that key."""
    key = secrets.token_hex(32)
    return await relays.start(relays.make(make, RelayOptions(mesh_key=key))), key


@pytest.mark.parametrize("mesh_key", ["", "ab" * 32])
async def test_mesh_frames_need_the_mesh_key(meshed: tuple[Relay, str], clients: GoClients, mesh_key: str) -> None:
    where = region(meshed[0]) | {"mesh_key": mesh_key}
    watcher = await clients.dial(**where, watch=True)
    await watcher.expect("disconnected")
    victim, forwarder, closer = [await clients.dial(**where) for _ in range(3)]
    await forwarder.forward(STRANGER, victim.key, b"forged")
    await forwarder.expect("disconnected")
    await closer.close_peer(victim.key)
    await closer.expect("disconnected")
    await victim.ping()
    assert victim.events.take("recv") is None


async def test_a_watcher_sees_clients_come_and_go(meshed: tuple[Relay, str], clients: GoClients) -> None:
    where = region(meshed[0])
    before = await clients.dial(**where)
    watcher = await clients.dial(**where, mesh_key=meshed[1], watch=True)
    present = await watcher.expect("peer_present", lambda e: e["key"] == before.key)
    assert present["addr"] == before.about["local"]
    after = await clients.dial(**where, prober=True)
    come = await watcher.expect("peer_present", lambda e: e["key"] == after.key)
    assert come["addr"] == after.about["local"]
    regular, mesh_peer, prober = 1, 2, 4
    own = await watcher.expect("peer_present", lambda e: e["key"] == watcher.key)
    assert (present["flags"], own["flags"], come["flags"]) == (regular, mesh_peer, prober)
    await before.close()
    gone = await watcher.expect("peer_gone")
    assert (gone["key"], gone["reason"]) == (before.key, DISCONNECTED)


async def test_a_mesh_peer_forwards_and_closes(meshed: tuple[Relay, str], clients: GoClients) -> None:
    where = region(meshed[0])
    client = await clients.dial(**where)
    peer = await clients.dial(**where, mesh_key=meshed[1])
    await peer.forward(STRANGER, client.key, b"from elsewhere")
    assert await client.receive(STRANGER) == b"from elsewhere"
    await peer.forward(STRANGER, f"nodekey:{'18' * 32}", DISCO)
    gone = await peer.expect("peer_gone")
    assert gone["reason"] == NOT_HERE
    await peer.close_peer(client.key)
    await client.expect("disconnected")


# -- STUN


async def test_stun_tells_the_address(relay: Relay, clients: GoClients) -> None:
    answer = await clients.stun(relay.stun_address)
    assert answer.answered
    assert answer.mapped == answer.local


async def test_netcheck_prefers_the_region(relay: Relay, clients: GoClients) -> None:
    report = await clients.netcheck(region(relay)["map"])
    assert report["udp"]
    assert report["preferred"] == 900


# -- IPv6


@pytest.fixture
async def relay6(make: str, relays: Relays) -> Relay:
    """A relay at ::1, with a self-signed certificate for that."""
    options = RelayOptions(derp_port=free_port("::1"), stun_port=free_port("::1"))
    return await relays.start(relays.make(make, options, address="::1"))


async def test_over_ipv6(relay6: Relay, clients: GoClients) -> None:
    a, b = [await clients.dial(**region(relay6)) for _ in range(2)]
    assert a.server_key == relay6.key
    await a.send(b.key, b"six")
    assert await b.receive(a.key) == b"six"


async def test_stun_over_ipv6(relay6: Relay, clients: GoClients) -> None:
    answer = await clients.stun(relay6.stun_address)
    assert answer.answered
    assert answer.mapped == answer.local


async def test_the_certificate_file_of_an_ipv6_address(relay6: Relay) -> None:
    """Its name leaves out the colons: who replaces a stock relay must find the certificate that is pinned."""
    assert {path.name for path in relay6.workdir.glob("*1.crt")} == {"1.crt"}
