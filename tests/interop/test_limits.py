"""Limits: how many may come, how much each may send, how long one may not read."""

from __future__ import annotations

import asyncio
import json
import re
import secrets
import signal
import time
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from typing import Any

import pytest

from derper.wire import frames
from derper.wire.frames import FrameType

from .conftest import Both, Relays
from .metrics import counted
from .peers import GoClients
from .processes import HANG, ProcessEndedError
from .raw import RawClient, RawClients
from .relays import Relay, RelayOptions
from .sockopts import options_of

BURST = 65568
"""The least burst of a client: one largest frame."""


async def start(relays: Relays, make: str, *flags: str, mesh_key: str | None = None) -> Relay:
    return await relays.start(relays.make(make, RelayOptions(flags=flags, mesh_key=mesh_key)))


# -- sockets


@pytest.mark.parametrize(
    "both",
    [
        RelayOptions(flags=flags)
        for flags in (
            (),
            ("-tcp-keepalive-time=77s", "-tcp-user-timeout=8s"),
            ("-tcp-keepalive-time=1500ms", "-tcp-user-timeout=1500ms"),
            ("-tcp-keepalive-time=0", "-tcp-user-timeout=0"),
        )
    ],
    ids=["default", "set", "fractions", "zero"],
    indirect=True,
)
async def test_options_of_accepted_sockets(both: Both, raw: RawClients) -> None:
    found = []
    for relay in (both.stock, both.ours):
        client = await raw.login(relay)
        try:
            found.append(options_of(relay.pid, (client.host, client.port)))
        except PermissionError:
            pytest.skip("the system shows nobody another process's sockets")
    assert found[0] == found[1]
    assert found[0]["keep_alive"] == 1


# -- new connections


@pytest.mark.parametrize(
    "flags",
    [
        ("-accept-connection-limit=0.001",),
        ("-accept-connection-limit=+Inf", "-accept-connection-burst=1"),
        ("-accept-connection-limit=0", "-accept-connection-burst=1000"),
    ],
)
async def test_accept_limits_that_limit_nobody(make: str, relays: Relays, raw: RawClients, flags: tuple[str]) -> None:
    relay = await start(relays, make, *flags)
    before = await counted(relay)
    for _ in range(5):
        await raw.login(relay)
    after = await counted(relay)
    name = "tls_listener_accepted_connections"
    assert after[name] - before[name] >= 5
    assert after["tls_listener_rejected_connections"] == 0


async def hung_up(relay: Relay) -> None:
    """Connect until the relay closes a connection on which nothing was said."""
    readers = []
    async with AsyncExitStack() as stack:
        for _ in range(10):
            try:
                reader, writer = await asyncio.open_connection(relay.address, relay.options.derp_port)
            except ConnectionRefusedError:  # a stock derper has ended by now
                break
            stack.callback(writer.close)
            readers.append(asyncio.ensure_future(reader.read(1)))
        done, rest = await asyncio.wait(readers, timeout=HANG, return_when=asyncio.FIRST_COMPLETED)
        for task in rest:
            task.cancel()
        await asyncio.gather(*readers, return_exceptions=True)
        assert done


async def test_more_connections_than_the_limit_allows(make: str, relays: Relays, raw: RawClients) -> None:
    """Stock derper takes its own refusal for a broken listener, and ends."""
    relay = await start(relays, make, "-accept-connection-limit=0.001", "-accept-connection-burst=8")
    client = await raw.login(relay)
    await hung_up(relay)
    if make == "stock":
        assert await relay.ended(HANG) == 1
        assert "cannot accept connection; rate limited" in relay.log_text()
    else:
        assert await client.until_echo() is not None


async def test_a_burst_of_nothing(make: str, relays: Relays) -> None:
    """Nobody comes in, even without a limit; and for stock derper that is the end."""
    relay = relays.make(make, RelayOptions(flags=("-accept-connection-burst=0",)))
    if make == "stock":
        with suppress(ProcessEndedError):
            await relays.start(relay)
        assert await relay.ended(HANG) == 1
        assert "cannot accept connection; rate limited" in relay.log_text()
    else:
        await relays.start(relay)  # the system accepts for the relay
        await hung_up(relay)
        assert relay.running


# -- what each client may send


def rate_file(folder: Path, content: object) -> Path:
    path = folder / "rate.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def rate(bytes_per_second: int, burst: int = 0) -> dict[str, int]:
    return {"PerClientRateLimitBytesPerSec": bytes_per_second, "PerClientRateBurstBytes": burst}


async def test_a_limited_client_is_read_more_slowly_and_loses_nothing(
    make: str, relays: Relays, raw: RawClients, tmp_path: Path
) -> None:
    relay = await start(relays, make, f"-rate-config={rate_file(tmp_path, rate(200_000))}")
    sender, receiver = await raw.login(relay), await raw.login(relay)
    count, size = 200, 2000
    packets = [number.to_bytes(4, "big") * (size // 4) for number in range(count)]
    began = time.monotonic()
    sender.write(*(frames.send_packet(receiver.key, packet) for packet in packets))
    for packet in packets:
        assert await receiver.expect(FrameType.RECV_PACKET) == sender.key + packet
    assert time.monotonic() - began >= (count * size - 2 * BURST) / 200_000
    metrics = await counted(relay)
    assert metrics["derp_rate_limit_per_client_waited"] > 0
    assert sum(value for name, value in metrics.items() if name.startswith("derp_packets_dropped")) == 0


async def test_clients_are_not_told_of_the_limit(make: str, relays: Relays, clients: GoClients, tmp_path: Path) -> None:
    relay = await start(relays, make, f"-rate-config={rate_file(tmp_path, rate(200_000))}")
    client = await clients.dial_relay(relay)
    assert (client.about["bytes_per_second"], client.about["burst_bytes"]) == (0, 0)


async def test_a_new_limit_holds_for_connected_clients(
    make: str, relays: Relays, raw: RawClients, tmp_path: Path
) -> None:
    """Under the first limit the second half would take hours."""
    relay = await start(relays, make, f"-rate-config={rate_file(tmp_path, rate(100))}")
    sender, receiver = await raw.login(relay), await raw.login(relay)
    sender.write(frames.send_packet(receiver.key, bytes(1000)))
    await receiver.expect(FrameType.RECV_PACKET)
    rate_file(tmp_path, {})
    relay.send_signal(signal.SIGHUP)
    await relay.logged("rate config applied: client-rate=0 bytes/sec, client-burst=0 bytes")
    sender.write(*[frames.send_packet(receiver.key, bytes(30_000))] * 30)
    for _ in range(30):
        await receiver.expect(FrameType.RECV_PACKET)
    rate_file(tmp_path, rate(50_000))
    relay.send_signal(signal.SIGHUP)
    await relay.logged(f"rate config applied: client-rate=50000 bytes/sec, client-burst={BURST} bytes")
    sender.write(*[frames.send_packet(receiver.key, bytes(10_000))] * 10)
    async with asyncio.timeout(HANG):
        while (await counted(relay))["derp_rate_limit_per_client_waited"] == 0:  # noqa: ASYNC110 - polled
            await asyncio.sleep(0.02)
    metrics = await counted(relay)
    assert metrics["derp_rate_limit_per_client_bytes_per_second"] == 50_000
    assert metrics["derp_rate_limit_per_client_burst_bytes"] == BURST


async def test_mesh_peers_have_no_limit(make: str, relays: Relays, raw: RawClients, tmp_path: Path) -> None:
    mesh_key = secrets.token_hex(32)
    relay = await start(relays, make, f"-rate-config={rate_file(tmp_path, rate(1))}", mesh_key=mesh_key)
    peer, receiver = await raw.login(relay, mesh_key=mesh_key), await raw.login(relay)
    peer.write(frames.watch_conns())
    await peer.expect(FrameType.PEER_PRESENT, receiver.key)  # the peer's worker knows it
    packets = [number.to_bytes(4, "big") * 2500 for number in range(50)]
    for forwarded, packet in enumerate(packets):
        frame = frames.forward_packet(peer.key, receiver.key, packet)
        peer.write(frame if forwarded % 2 else frames.send_packet(receiver.key, packet))
        assert await receiver.expect(FrameType.RECV_PACKET) == peer.key + packet
    assert (await counted(relay))["derp_rate_limit_per_client_waited"] == 0


_RATE, _BURST = "PerClientRateLimitBytesPerSec", "PerClientRateBurstBytes"
CONFIGS: list[tuple[Any, tuple[int, int] | None]] = [
    (rate(1000, 200_000), (1000, 200_000)),
    (rate(1000, 5), (1000, BURST)),
    ({_RATE: 1000}, (1000, BURST)),
    (rate(0, 200_000), (0, 0)),
    ({_RATE.lower(): 7, _BURST.upper(): 70_000}, (7, 70_000)),
    ({_RATE: 7, "other": [1.5, {}]}, (7, BURST)),
    ({_RATE: 8, _BURST: None}, (8, BURST)),
    (f'{{"{_RATE}": 7, "{_RATE.lower()}": 9}}', (9, BURST)),
    ("null", (0, 0)),
    ({_RATE: 18446744073709551615}, (18446744073709551615, BURST)),
    ("", None),
    ("{", None),
    ("{} {}", None),
    ("[]", None),
    ("7", None),
    ({_RATE: "7"}, None),
    ({_RATE: 7.0}, None),
    (f'{{"{_RATE}": 1e3}}', None),
    (f'{{"{_RATE}": -0}}', None),
    ({_RATE: -7}, None),
    ({_RATE: True}, None),
    ({_RATE: {}}, None),
    ({_RATE: 18446744073709551616}, None),
    ("\ufeff{}", None),
]


async def test_rate_configs_are_read_alike(make: str, relays: Relays, raw: RawClients, tmp_path: Path) -> None:
    relay = await start(relays, make, f"-rate-config={rate_file(tmp_path, {_RATE: 5})}")
    at_first = len(re.findall("rate config applied", relay.log_text()))  # several workers and their supervisor
    applied: list[str] = []
    failures = 0
    for content, limits in CONFIGS:
        rate_file(tmp_path, content)
        relay.send_signal(signal.SIGHUP)
        if limits is None:
            failures += 1
            refused = "rate config reload failed|rate limits: .*; the old one stays in force"
            await relay.logged(refused, failures * relay.workers)
        else:
            applied.append(f"client-rate={limits[0]} bytes/sec, client-burst={limits[1]} bytes")
            await relay.logged("rate config applied", at_first + len(applied) * relay.workers)
    told = re.findall("rate config applied: (.*)", relay.log_text())
    assert set(told[:at_first]) == {"client-rate=5 bytes/sec, client-burst=65568 bytes"}
    assert told[at_first :: relay.workers] == applied
    client = await raw.login(relay)
    assert await client.until_echo() is not None


@pytest.mark.parametrize("content", ["{", {_RATE: "7"}, None])
async def test_a_relay_does_not_start_with_a_broken_rate_config(
    make: str, relays: Relays, tmp_path: Path, content: object
) -> None:
    path = rate_file(tmp_path, content) if content is not None else tmp_path / "missing"
    with pytest.raises(ProcessEndedError, match="status 1"):
        await start(relays, make, f"-rate-config={path}")


async def test_the_signal_without_a_rate_config(make: str, relays: Relays, raw: RawClients) -> None:
    """Stock derper dies of it; ours reads all its files."""
    relay = await start(relays, make)
    client = await raw.login(relay)
    relay.send_signal(signal.SIGHUP)
    if make == "stock":
        assert await relay.ended(HANG) == -signal.SIGHUP
    else:
        await relay.logged("certificates: read")
        assert await client.until_echo() is not None


# -- who does not read


class Sleeper:
    """A client that does not read, and one that writes to it without end."""

    def __init__(self, writer: RawClient, reader: RawClient) -> None:
        self.writer = writer
        self.reader = reader

    @classmethod
    async def of(cls, relay: Relay, raw: RawClients, mesh_key: str = "") -> Sleeper:
        reader = await raw.login(relay, mesh_key=mesh_key)
        reader.stop_reading()
        return cls(await raw.login(relay), reader)

    async def feed(self) -> None:
        """More than buffers hold, some time or other: the system's grow while they are full."""
        self.writer.write(*[frames.send_packet(self.reader.key, bytes(60_000))] * 40)
        assert await self.writer.until_echo() is not None


async def closed(relay: Relay, *sleepers: Sleeper) -> None:
    """Feed the sleepers until the relay has closed one."""
    async with asyncio.timeout(HANG):
        while (await counted(relay))["derp_sclient_write_timeouts"] == 0:
            for sleeper in sleepers:
                await sleeper.feed()
            await asyncio.sleep(0.05)


@pytest.mark.parametrize("flags", [(), ("-tcp-write-timeout=300ms",)])
async def test_who_does_not_read_is_closed(make: str, relays: Relays, raw: RawClients, flags: tuple[str, ...]) -> None:
    relay = await start(relays, make, *flags)
    await closed(relay, await Sleeper.of(relay, raw))


async def test_who_does_not_read_is_borne_without_a_time_out(make: str, relays: Relays, raw: RawClients) -> None:
    """Another relay with the usual time-out tells when it would have been over."""
    patient, clock = await start(relays, make, "-tcp-write-timeout=0"), await start(relays, make)
    sleeper = await Sleeper.of(patient, raw)
    for _ in range(5):
        await sleeper.feed()
    await closed(clock, sleeper, await Sleeper.of(clock, raw))
    metrics = await counted(patient)
    assert (metrics["derp_sclient_write_timeouts"], metrics["derp_clients_local"]) == (0, 2)


async def test_the_write_time_out_is_not_for_mesh_peers(make: str, relays: Relays, raw: RawClients) -> None:
    mesh_key = secrets.token_hex(32)
    relay = await start(relays, make, "-tcp-write-timeout=300ms", mesh_key=mesh_key)
    peer = await Sleeper.of(relay, raw, mesh_key)
    for _ in range(5):
        await peer.feed()
    await closed(relay, peer, await Sleeper.of(relay, raw))
    metrics = await counted(relay)
    assert (metrics["derp_sclient_write_timeouts"], metrics["derp_clients_local"]) == (1, 3)
