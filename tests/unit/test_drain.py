"""A relay that drains: in which order, and what its clients notice."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from derper.net.link import Link
from derper.net.listener import Listener
from derper.net.mesh import Mesh
from derper.server import Relay
from derper.wire.client import ReceivedPacket, Restarting

from .loopback import PATIENCE, RawClient, private, until
from .relays import ALICE, BOB, CAROL, FAST, Region, ask_stun, by_flags, get, running

pytestmark = pytest.mark.both_loops


@pytest.fixture
def region(tmp_path: Path) -> Region:
    return Region(tmp_path, 3)


async def test_the_order_of_the_drain(region: Region, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second, _ = region.nodes
    region.write(first, second)
    steps: list[str] = []

    def noted(kind: type, method: str, step: str) -> None:
        original = getattr(kind, method)

        def wrapper(self: Any, *args: Any) -> Any:
            if self in watched and step not in steps:
                steps.append(step)
                if step == "port":
                    assert first.relay.reasons() == ["draining"]
                    assert not first.relay.serving()
            return original(self, *args)

        monkeypatch.setattr(kind, method, wrapper)

    noted(Listener, "close", "port")
    noted(Link, "close", "clients")
    noted(Mesh, "stop", "mesh")
    watched: set[object] = set()
    async with running(first.relay, second.relay):
        await until(lambda: first.meshed(second) and second.meshed(first))
        assert first.relay.hub is not None
        assert first.relay.stun is not None
        clients = [await first.dial(private(number)) for number in range(1, 31)]
        idle = RawClient(*await asyncio.open_connection("127.0.0.1", first.port))
        stun_port = first.relay.stun.port
        watched |= {first.relay.listener, first.relay.mesh, *first.relay.hub.links}
        drain = asyncio.ensure_future(first.relay.drain())
        await asyncio.sleep(0)
        assert first.relay.reasons() == ["draining"]
        with pytest.raises(ConnectionRefusedError):
            await asyncio.open_connection("127.0.0.1", first.port)
        assert [await client.receive() for client in clients] == [Restarting(0.0, 5.0)] * 30
        for client in clients:
            with pytest.raises(ConnectionError):
                await client.receive()
            await client.close()
        await drain
        assert steps == ["port", "clients", "mesh"]
        assert await idle.rest() == b""
        await idle.close()
        with pytest.raises(OSError, match=r"(?i:refused|connect)"):
            await get(first.metrics_port, "/healthz")
        asker = asyncio.ensure_future(ask_stun(stun_port))
        await until(lambda: not first.relay.hub or not first.relay.hub.links)
        assert not asker.done()
        asker.cancel()
        await until(lambda: not second.meshed(first))


async def test_while_it_drains_it_says_so_and_stun_is_silent(region: Region) -> None:
    node = region.nodes[0]
    region.write(node)
    node.relay._timings = replace(FAST, drain_step=PATIENCE)  # until the test has seen enough
    async with running(node.relay):
        clients = [await node.dial(private(number)) for number in range(1, 4)]
        assert node.relay.stun is not None
        drain = asyncio.ensure_future(node.relay.drain())
        asker = asyncio.ensure_future(ask_stun(node.relay.stun.port))
        await until(lambda: node.relay.stun is not None and node.relay.stun.dispositions["silent"] == 1)
        assert await node.ready() == (503, "draining\n")
        assert (await node.status())["draining"] is True
        assert await get(node.metrics_port, "/healthz") == (200, "ok\n")
        assert not asker.done()
        for task in (asker, drain):
            task.cancel()
        await node.relay.close()
        for client in clients:
            await client.close()


async def test_clients_left_behind_are_still_reached_while_others_leave(region: Region) -> None:
    first, second, _ = region.nodes
    region.write(first, second)
    first.relay._timings = replace(FAST, drain_steps=2, drain_step=PATIENCE)
    async with running(first.relay, second.relay):
        await until(lambda: first.meshed(second) and second.meshed(first))
        clients = [await first.dial(private(number)) for number in (1, 2)]
        other = await second.dial(CAROL)
        assert second.relay.hub is not None
        router = second.relay.hub.router
        await until(lambda: all(client.public_key in router.forwarders for client in clients))
        drain = asyncio.ensure_future(first.relay.drain())
        for client in clients:
            assert await client.receive() == Restarting(0.0, 5.0)
        await until(lambda: len([c for c in clients if c.closed_because is not None]) == 1)
        (left,) = [client for client in clients if client.closed_because is None]
        other.send(left.public_key, b"hello")
        assert await left.receive_packet() == ReceivedPacket(CAROL.public, b"hello")
        drain.cancel()
        await first.relay.close()
        for client in (*clients, other):
            await client.close()


async def test_packets_follow_clients_that_move(region: Region) -> None:
    """What is sent while a client is on its way from the node that drains to another one arrives there."""
    first, second, third = region.nodes
    region.write(first, second, third)
    async with running(first.relay, second.relay, third.relay):
        nodes = (first, second, third)
        await until(lambda: all(node.meshed(*(other for other in nodes if other is not node)) for node in nodes))
        alice, bob = await third.dial(ALICE), await first.dial(BOB)
        assert third.relay.hub is not None
        hub = third.relay.hub
        await until(lambda: BOB.public in hub.router.forwarders)
        drain = asyncio.ensure_future(first.relay.drain())
        await until(lambda: bob.closed_because is not None and BOB.public not in hub.router.forwarders)
        alice.send(BOB.public, b"one")
        await until(lambda: hub.counters.packets_received == 1)
        again = await second.dial(BOB)
        assert await again.receive_packet() == ReceivedPacket(ALICE.public, b"one")
        assert hub.counters.moved == 1
        await drain
        for client in (alice, bob, again):
            await client.close()


async def test_a_relay_that_was_about_to_listen_drains(region: Region, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its files came a moment before the signal: it must not listen any more."""
    node = region.nodes[0]
    about_to, go_on = asyncio.Event(), asyncio.Event()
    original = Relay._runner

    async def slow(self: Relay, app: Any) -> Any:
        about_to.set()
        await go_on.wait()
        return await original(self, app)

    async def meanwhile(self: Relay, hub: object) -> None:
        go_on.set()
        assert self._poll_task is not None
        await asyncio.wait([self._poll_task], timeout=0.1)

    monkeypatch.setattr(Relay, "_runner", slow)
    monkeypatch.setattr(Relay, "_close_clients", meanwhile)
    async with running(node.relay):
        region.write(node)
        await about_to.wait()
        await node.relay.drain()
        assert node.relay.listener is None


async def test_a_client_that_does_not_read_does_not_hold_up_the_drain(region: Region) -> None:
    node = region.nodes[0]
    region.write(node)
    async with running(node.relay):
        alice = await node.dial(ALICE)
        transport: Any = alice._transport
        transport.pause_reading()
        assert node.relay.hub is not None
        (session,) = node.relay.hub.router.sessions()
        while session.paused_since is None:
            session.deliver(BOB.public, b"\x05" + (32 + 60_000).to_bytes(4, "big") + BOB.public + bytes(60_000), 1, 0.0)
            await asyncio.sleep(0)
        async with asyncio.timeout(PATIENCE):
            await node.relay.drain()
        await alice.close()


async def test_a_request_without_end_does_not_hold_up_the_end(tmp_path: Path) -> None:
    """aiohttp waits ten seconds for the rest of a body that nobody wants."""
    relay = await by_flags(tmp_path, "-a", "127.0.0.1:0")
    await relay.start()
    assert relay.listener is not None
    _, writer = await asyncio.open_connection("127.0.0.1", relay.listener.port)
    writer.write(b"POST /robots.txt HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\nabc")
    (runner,) = relay._runners
    await until(lambda: runner.server is not None and runner.server.connections)
    async with asyncio.timeout(8):
        await relay.drain()
    writer.close()
