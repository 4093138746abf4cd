"""The same traffic on both relays gives the same numbers under the same names."""

from __future__ import annotations

import secrets
import ssl

import aiohttp
import pytest

from .conftest import Relays
from .peers import GoClients
from .processes import HANG
from .relays import Relay, RelayOptions, derp_map

DISCO = "TS💬".encode() + bytes(80)
STRANGER = f"nodekey:{'17' * 32}"
METRICS_PORT = 9090

NAMES = {
    "derp_accepts",
    "derp_bytes_received",
    "derp_bytes_sent",
    "derp_clients_local",
    "derp_clients_remote",
    "derp_clients_total",
    "derp_current_connections",
    "derp_current_dup_client_conns",
    "derp_current_dup_client_keys",
    "derp_current_home_connections",
    "derp_current_notideal_connections",
    "derp_got_ping",
    "derp_home_moves_in",
    "derp_home_moves_out",
    "derp_packets_dropped",
    "derp_packets_forwarded_in",
    "derp_packets_forwarded_out",
    "derp_packets_received",
    "derp_packets_received_kind",
    "derp_packets_sent",
    "derp_peer_gone_disconnected_frames",
    "derp_peer_gone_not_here_frames",
    "derp_sent_pong",
    "derp_total_dup_client_conns",
    "derp_unknown_frames",
    "derp_watchers",
}


async def scrape(url: str) -> dict[str, float]:
    """The samples of NAMES, by name and labels."""
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    timeout = aiohttp.ClientTimeout(HANG)
    async with aiohttp.ClientSession(timeout=timeout) as session, session.get(url, ssl=context) as answer:
        assert answer.status == 200
        text = await answer.text()
    samples = (line.rpartition(" ") for line in text.splitlines() if not line.startswith("#"))
    return {name: float(value) for name, _, value in samples if name.partition("{")[0] in NAMES}


async def traffic(relay: Relay, clients: GoClients, mesh_key: str) -> None:
    """A little of everything; returns when the relay has noticed it all."""
    region = {"map": derp_map([relay.node("900a")]), "region": 900}
    a, b, leaver = [await clients.dial(**region) for _ in range(3)]
    watcher = await clients.dial(**region, mesh_key=mesh_key, watch=True)
    twin_key = f"privkey:{secrets.token_hex(32)}"
    twins = [await clients.dial(**region, private_key=twin_key) for _ in range(2)]
    unreachable = relay.node("900b", IPv4="127.0.0.1", DERPPort=1)
    await clients.dial(map=derp_map([unreachable, relay.node("900a")]), region=900)
    for preferred in (True, False, True):
        await a.note_preferred(preferred)
    for size in (10, 1000):
        await a.send(b.key, bytes(size))
        await b.receive()
    await leaver.send(a.key, DISCO)
    await a.receive()
    await a.send(STRANGER, DISCO)
    await a.expect("peer_gone")
    await b.send(STRANGER, b"not disco")
    await watcher.forward(STRANGER, b.key, b"forwarded")
    await b.receive()
    await twins[0].ping()
    for client in (a, b, watcher):
        await client.ping()
    await leaver.close()
    await a.expect("peer_gone")
    await watcher.expect("peer_gone")


async def test_the_same_traffic_gives_the_same_numbers(relays: Relays, clients: GoClients) -> None:
    mesh_key = secrets.token_hex(32)
    stock = await relays.start(relays.make("stock", RelayOptions(mesh_key=mesh_key)))
    ours = relays.make("ours", RelayOptions(mesh_key=mesh_key))
    ours.argv.append(f"-metrics-addr={ours.address}:{METRICS_PORT}")
    await relays.start(ours)
    for relay in (stock, ours):
        await traffic(relay, clients, mesh_key)
    wanted = await scrape(f"https://{stock.derp_address}/debug/varz")
    assert {name.partition("{")[0] for name in wanted} == NAMES
    assert wanted["derp_current_home_connections"] == 1
    assert await scrape(f"http://{ours.address}:{METRICS_PORT}/metrics") == pytest.approx(wanted)
