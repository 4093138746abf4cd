"""The same traffic on both relays gives the same numbers under the same names."""

from __future__ import annotations

import asyncio
import re
import secrets
from pathlib import Path

import pytest

from ..stock_metrics import GO_ONLY, STOCK, STOCK_LIMITS, families
from .conftest import Both, Relays
from .metrics import counted, samples, varz
from .peers import GoClients
from .pki import Authority, Certificate
from .processes import HANG
from .relays import Relay, RelayOptions, derp_map, one_worker

DISCO = "TS💬".encode() + bytes(80)
STRANGER = f"nodekey:{'17' * 32}"
MESH_KEY = secrets.token_hex(32)

# Numbers that depend on more than what clients do: time, the process, how many frames are written at once.
NOT_COMPARED = re.compile(
    r"process_|uptime_|goroutines|node_boot|version|python_version|derper_(?!tls_request|tls_active)|derp_average_queue|derp_tcp_rtt"
    r"|derp_buffered|derp_mesh_update|derp_current_file|derp_memstats|tls_listener|stun_"
)


def comparable(text: str) -> dict[str, float]:
    skipped = (NOT_COMPARED, GO_ONLY)
    return {name: value for name, value in samples(text).items() if not any(p.match(name) for p in skipped)}


async def traffic(relay: Relay, clients: GoClients) -> None:
    """A little of everything; returns when the relay has noticed it all."""
    region = {"map": derp_map([relay.node("900a")]), "region": 900}
    a, b, leaver = [await clients.dial(**region) for _ in range(3)]
    watcher = await clients.dial(**region, mesh_key=MESH_KEY, watch=True)
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


@pytest.mark.parametrize("both", [RelayOptions(mesh_key=MESH_KEY)], indirect=True)
async def test_the_same_traffic_gives_the_same_numbers(both: Both, clients: GoClients) -> None:
    for relay in (both.stock, both.ours):
        await traffic(relay, clients)
    wanted = comparable(await varz(both.stock))
    assert wanted["derp_current_home_connections"] == 1
    assert wanted["derp_peer_gone_disconnected_frames"] == 2
    assert comparable(await varz(both.ours)) == wanted


async def test_names_types_and_labels(both: Both) -> None:
    """After a first client: some labels appear when they are first needed."""
    stock, ours = [families(await varz(relay)) for relay in (both.stock, both.ours)]
    wanted = {name: family for name, family in stock.items() if not GO_ONLY.match(name)}
    assert {name: ours.get(name) for name in wanted} == wanted
    assert {name for name in ours if not name.startswith("derper_")} - {"python_version"} == {
        name for name in wanted if not name.startswith("derper_")
    }
    later = "derp_tcp_rtt"  # its labels come with the first sample
    assert {name: family for name, family in wanted.items() if name != later} == {
        name: family for name, family in STOCK.items() if name != later
    }


async def test_labels_that_are_there_from_the_start(both: Both) -> None:
    """Else a rate over a counter that was not there misses its first event."""
    stock, ours = [await counted(relay) for relay in (both.stock, both.ours)]
    wanted = {name for name in stock if "{" in name and not GO_ONLY.match(name) and not name.startswith("version")}
    assert wanted >= {'stun_requests{disposition="read_error"}', 'derp_bytes_dropped{reason="queue_tail",kind="disco"}'}
    assert ours.keys() >= wanted


@one_worker("other nodes count a link of each")
async def test_the_numbers_of_a_mesh(
    make: str, relays: Relays, clients: GoClients, authority: Authority, ca_file: Path
) -> None:
    """Two relays of one make, a client on each, and one on both.

    Stock derper counts itself as a client, too: its peer tells it of everybody who is connected there.
    """
    itself = 1 if make == "stock" else 0
    first, second = [
        relays.make(make, mesh_options(authority.issue(name), name, ca_file)) for name in ("first.test", "second.test")
    ]
    first.mesh_with([second])
    second.mesh_with([first])
    for relay in (first, second):
        await relays.start(relay)
    on_first, on_second = [{"map": derp_map([relay.node("900a")]), "region": 900} for relay in (first, second)]
    a, b = await clients.dial(**on_first), await clients.dial(**on_second)
    twin_key = f"privkey:{secrets.token_hex(32)}"
    twins = [await clients.dial(**options, private_key=twin_key) for options in (on_first, on_second)]
    for relay in (first, second):
        await until(relay, {"derp_watchers": 1, "derp_clients_total": 4 + itself})
    await a.send(b.key, bytes(100), count=3)
    await a.send(b.key, DISCO)
    for _ in range(4):
        await b.receive()
    await b.send(twins[0].key, b"to the one who is here")
    await twins[1].receive()
    await b.send(a.key, b"back")
    await a.receive()
    await until(first, {"derp_packets_forwarded_out": 4})
    await twins[1].close()
    await b.close()
    await a.expect("peer_gone", lambda event: event["key"] == b.key)
    here = {"derp_clients_local": 3, "derp_clients_remote": itself, "derp_current_connections": 3}
    await until(
        first,
        {
            **here,
            "derp_accepts": 3,
            "derp_packets_received": 4,
            'derp_packets_received_kind{kind="disco"}': 1,
            "derp_bytes_received": 300 + len(DISCO),
            "derp_packets_sent": 1,
            "derp_packets_forwarded_out": 4,
            "derp_packets_forwarded_in": 1,
            "derp_peer_gone_disconnected_frames": 1,
            "derp_multiforwarder_created": 0,
        },
    )
    await until(
        second,
        {
            "derp_clients_local": 1,
            "derp_clients_remote": 2 + itself,
            "derp_packets_received": 2,
            "derp_packets_sent": 5,
            "derp_packets_forwarded_in": 4,
            "derp_packets_forwarded_out": 1,
            "derp_peer_gone_disconnected_frames": 2,
        },
    )


def mesh_options(certificate: Certificate, name: str, ca_file: Path) -> RelayOptions:
    """A relay that the others of its mesh can verify by name."""
    environ = {"SSL_CERT_FILE": str(ca_file)}
    return RelayOptions(certificate=certificate, host_name=name, mesh_key=MESH_KEY, env=environ)


async def until(relay: Relay, wanted: dict[str, float]) -> None:
    """Wait until the relay shows these numbers."""
    found: dict[str, float] = {}
    try:
        async with asyncio.timeout(HANG / 4):
            while found != wanted:
                everything = await counted(relay)
                found = {name: everything[name] for name in wanted}
    except TimeoutError:
        assert found == wanted


@pytest.mark.parametrize(
    ("text", "rate", "burst"),
    [
        ('{"PerClientRateLimitBytesPerSec": 250000, "PerClientRateBurstBytes": 500000}', 250000, 500000),
        ('{"PerClientRateLimitBytesPerSec": 250000}', 250000, 65568),
        ('{"PerClientRateBurstBytes": 500000}', 0, 0),
    ],
)
async def test_rate_limits(
    make: str, relays: Relays, clients: GoClients, tmp_path: Path, text: str, rate: int, burst: int
) -> None:
    """Only with -rate-config; the limits in force, and how often a client had to wait."""
    path = tmp_path / "rate.json"
    path.write_text(text)
    relay = await relays.start(relays.make(make, RelayOptions(flags=(f"-rate-config={path}",))))
    region = {"map": derp_map([relay.node("900a")]), "region": 900}
    a, b = [await clients.dial(**region) for _ in range(2)]
    await a.send(b.key, bytes(60_000), count=10)
    for _ in range(10):
        await b.receive()
    found = await varz(relay)
    names = [f"derp_rate_limit_per_client_{name}" for name in ("burst_bytes", "bytes_per_second", "waited")]
    kinds = families(found)
    assert [kinds[name] for name in names] == [STOCK_LIMITS[name] for name in names]
    numbers = samples(found)
    assert [numbers[name] for name in names[:2]] == [burst, rate]
    assert (numbers[names[2]] > 0) == (rate > 0)


async def test_round_trip_times(make: str, relays: Relays, clients: GoClients) -> None:
    """A sample of each client every ten seconds."""
    relay = await relays.start(relays.make(make))
    await clients.dial_relay(relay)
    name = 'derp_tcp_rtt{le="10ms"}'
    async with asyncio.timeout(HANG):
        while name not in (found := await counted(relay)):  # noqa: ASYNC110 -- for what no event tells
            await asyncio.sleep(0.2)
    assert found[name] == 1


async def test_text_form(both: Both) -> None:
    """Each line of stock derper's text, but for the numbers, is a line of ours; help of the process apart."""
    stock, ours = [
        {re.sub(r" -?[0-9.e+-]+$", " N", line) for line in (await varz(relay)).splitlines()}
        for relay in (both.stock, both.ours)
    ]
    runtime = re.compile(r"(# (TYPE|HELP) )?(go_|memstats_|version\{)|# skipping")
    assert {line for line in stock - ours if not runtime.match(line)} == set()
