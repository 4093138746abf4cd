"""Clients that would rather be on another node of the region are sent there, slowly, when it is back."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from derper.client import Client, Options, dial_endpoint
from derper.net.rebalance import Rebalance

from .loopback import private, until
from .relays import Region, running

pytestmark = pytest.mark.both_loops

LATER = timedelta(seconds=61)


class Pair:
    """Two meshed nodes, 900a and 900b; clients of the second would rather be on the first."""

    def __init__(self, region: Region) -> None:
        self.region = region
        self.home, self.other = region.nodes
        self.clients: list[Client] = []

    def settings(self, per_minute: float) -> None:
        self.region.settings(self.home, self.other, rebalance={"clientsPerMinute": per_minute})

    @property
    def rebalance(self) -> Rebalance:
        assert self.other.relay._rebalance is not None
        return self.other.relay._rebalance

    def look(self) -> None:
        self.rebalance.look(datetime.now(UTC) + LATER)

    async def come(self, count: int, ideal: str = "900a") -> list[Client]:
        new = []
        for number in range(len(self.clients) + 1, len(self.clients) + count + 1):
            new.append(await dial_endpoint(self.other.endpoint, private(number), Options(ideal_node=ideal)))
        self.clients += new
        hub = self.other.relay.hub
        assert hub is not None
        await until(lambda: all(client.public_key in hub.router.active for client in new))
        return new

    def here(self) -> int:
        hub = self.other.relay.hub
        assert hub is not None
        return sum(not session.can_mesh for session in hub.router.sessions())


@pytest.fixture
async def pair(tmp_path: Path) -> AsyncIterator[Pair]:
    pair = Pair(Region(tmp_path, 2))
    pair.region.write(pair.home, pair.other)
    async with running(pair.home.relay, pair.other.relay):
        await until(lambda: pair.home.meshed(pair.other) and pair.other.meshed(pair.home))
        pair.settings(600)
        await until(lambda: pair.rebalance.options.clients_per_minute == 600)
        yield pair
        for client in pair.clients:
            await client.close()


async def test_it_is_off_by_default(pair: Pair) -> None:
    pair.region.settings(pair.home, pair.other)
    await until(lambda: pair.rebalance.options.clients_per_minute == 0)
    await pair.come(1)
    pair.look()
    assert pair.here() == 1


async def test_strays_are_sent_back_at_the_rate(pair: Pair) -> None:
    """600 in a minute are 10 at once at most."""
    await pair.come(12)
    await pair.come(3, ideal="")
    pair.look()
    assert pair.here() == 5
    assert pair.other.relay.hub is not None
    assert pair.other.relay.hub.counters.sent_back == 10


async def test_the_other_node_must_have_been_there_for_a_while(pair: Pair) -> None:
    await pair.come(1)
    pair.rebalance.look(datetime.now(UTC) + timedelta(seconds=30))
    assert pair.here() == 1
    await pair.home.relay.close()
    await until(lambda: not pair.other.meshed(pair.home))
    pair.look()
    assert pair.here() == 1


async def test_a_node_that_nobody_knows_is_not_waited_for(pair: Pair) -> None:
    await pair.come(1, ideal="900z")
    pair.look()
    assert pair.here() == 1


async def test_who_comes_back_is_left_alone(pair: Pair) -> None:
    (client,) = await pair.come(1)
    pair.look()
    await until(lambda: client.closed_because is not None)
    pair.clients.append(await dial_endpoint(pair.other.endpoint, private(1), Options(ideal_node="900a")))
    await until(lambda: pair.here() == 1)
    pair.look()
    assert pair.here() == 1


async def test_packets_follow_who_is_sent_back(pair: Pair) -> None:
    (stray,) = await pair.come(1)
    (friend,) = await pair.come(1, ideal="")
    pair.look()
    hub = pair.other.relay.hub
    assert hub is not None
    friend.send(stray.public_key, b"wait")
    await until(lambda: hub.counters.packets_received == 1)
    again = await pair.home.dial(private(1))
    pair.clients.append(again)
    async with asyncio.timeout(10):
        assert (await again.receive_packet()).data == b"wait"
