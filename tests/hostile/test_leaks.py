"""Clients come and go in every way there is, and nothing of them stays: descriptors, tasks, table entries, memory."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import pytest
from aiohttp import web

from derper.wire import frames
from derper.wire.keys import NodePrivate

from .kit import FAST, MIB, WEBSOCKET, Figures, HostileRelay, Raw, at_once, login_of, message, relay

LEAK = 400  # bytes for each connection; what one of ours costs is tens of times that
SLACK = 8 * MIB  # the allocator's
AT_ONCE = 20
KEYS = [NodePrivate.generate() for _ in range(50)]


async def close_cleanly(node: HostileRelay, number: int) -> None:
    """Login, a packet to somebody, goodbye."""
    raw = await node.log_in(KEYS[number % len(KEYS)])
    raw.send(frames.send_packet(KEYS[number * 7 % len(KEYS)].public, b"hello"), frames.note_preferred(True))
    await raw.close()


async def reset(node: HostileRelay, number: int) -> None:
    """The same, but gone with a RST in the middle of a frame."""
    raw = await node.log_in(KEYS[number % len(KEYS)])
    raw.send(frames.send_packet(KEYS[number * 3 % len(KEYS)].public, bytes(1000))[:-1])
    raw.reset()


async def leave_during_tls(node: HostileRelay, number: int) -> None:
    """A TLS handshake, or an HTTP head, that is broken off."""
    raw = await node.connect(tls=False)
    raw.send(b"\x16\x03\x01\x02\x00\x01\x00" if node.tls else b"GET /derp HT")
    if number % 2:
        raw.reset()
    else:
        await raw.close()


async def leave_during_the_head(node: HostileRelay, number: int) -> None:
    """Half a head."""
    raw = await node.connect()
    raw.send(FAST[: 5 + number % 60])
    await raw.close()


async def leave_during_the_login(node: HostileRelay, number: int) -> None:
    """Half a CLIENT_INFO."""
    raw = await node.connect()
    raw.send(FAST, login_of(KEYS[0], node.server_key)[: 5 + number % 100])
    if number % 2:
        raw.reset()
    else:
        await raw.close()


async def be_refused(node: HostileRelay, number: int) -> None:
    """A login that the relay ends: a wrong box, or a client that the admission controller does not know."""
    raw = await node.connect()
    raw.send(FAST, frames.frame(2, bytes(100)) if number % 2 else login_of(STRANGER, node.server_key))
    await raw.rest()
    await raw.close()


async def speak_websocket(node: HostileRelay, number: int) -> None:
    """A login over WebSocket, then a goodbye, or none."""
    raw = await node.connect()
    raw.send(WEBSOCKET, message(login_of(KEYS[number % len(KEYS)], node.server_key)))
    await raw.reader.readuntil(b"\r\n\r\n")
    if number % 2:
        raw.reset()
    else:
        raw.send(message(b"\x03\xe8", kind=8))
        await raw.close()


async def ask_for_a_page(node: HostileRelay, number: int) -> None:
    """HTTP, kept open until the client goes."""
    raw = await node.connect()
    raw.send(b"GET /derp/probe HTTP/1.1\r\nHost: x\r\n\r\n")
    await raw.reader.readuntil(b"\r\n\r\n")
    await raw.close()


STRANGER = NodePrivate.generate()
WAYS: Mapping[str, Callable[[HostileRelay, int], Awaitable[None]]] = {
    way.__name__: way
    for way in (
        close_cleanly,
        reset,
        leave_during_tls,
        leave_during_the_head,
        leave_during_the_login,
        be_refused,
        speak_websocket,
        ask_for_a_page,
    )
}


async def controller(request: web.Request) -> web.Response:
    """Admits all but the stranger."""
    asked = await request.json()
    return web.json_response({"Allow": asked["NodePublic"] != str(STRANGER.public)})


@asynccontextmanager
async def guarded(
    workdir: Path, loop: str = "uvloop", *, tls: bool = True, workers: int = 1
) -> AsyncIterator[HostileRelay]:
    """A relay that asks the controller."""
    app = web.Application()
    app.router.add_post("/verify", controller)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    url = f"http://127.0.0.1:{runner.addresses[0][1]}/verify"
    try:
        flags = [f"-verify-client-url={url}", f"-workers={workers}"]
        async with relay(workdir, loop, tls=tls, flags=flags) as node:
            yield node
    finally:
        await runner.cleanup()


async def come_and_go(node: HostileRelay, count: int) -> None:
    """`count` connections in a random mixture of all ways, after a tenth as many to warm up."""
    rng = random.Random(count)

    async def come(number: int) -> None:
        await rng.choice(list(WAYS.values()))(node, number)

    await at_once(max(count // 10, 300), AT_ONCE, come)
    await node.until(lambda now: now.links == 0)
    before = await node.trimmed()
    await at_once(count, AT_ONCE, come)
    await node.as_before(before)
    after = await node.trimmed()
    assert after.clients == after.tables == 0, after.values
    for now, then in zip(after.parts, before.parts, strict=True):
        assert now["memory"] - then["memory"] < SLACK + LEAK * count, (then, now)
    print(
        f"\n{count} connections, {node.loop.partition('.')[0]}, {'TLS' if node.tls else 'plain'}:"
        f" descriptors {before.descriptors} > {after.descriptors}, tasks {before.tasks} > {after.tasks},"
        f" memory {before.memory / MIB:.1f} > {after.memory / MIB:.1f} MiB",
        end="",
    )


@pytest.mark.parametrize("tls", [True, False], ids=["tls", "plain"])
@pytest.mark.parametrize("loop", ["uvloop", "asyncio"])
async def test_nothing_is_left_of_a_thousand(tmp_path: Path, loop: str, tls: bool) -> None:
    async with guarded(tmp_path, loop, tls=tls) as node:
        await come_and_go(node, 1000)


async def test_nothing_is_left_of_a_thousand_with_two_workers(tmp_path: Path) -> None:
    """In neither of them, nor in the supervisor."""
    async with guarded(tmp_path, workers=2) as node:
        await come_and_go(node, 1000)


@pytest.mark.parametrize("workers", [1, 2])
async def test_memory_returns_after_waves(tmp_path: Path, workers: int) -> None:
    """The system has it back, without being asked for it: glibc alone would keep more after each wave."""
    async with relay(tmp_path, flags=[f"-workers={workers}"]) as node:
        await (await node.log_in()).close()
        before = (await node.trimmed()).memory
        clients: list[Raw] = []

        async def come(_: int) -> None:
            clients.append(await node.log_in())

        for _ in range(3):
            await at_once(1000, 1000, come)
            most = before + ((await node.figures()).memory - before) // 3
            await asyncio.gather(*(raw.close() for raw in clients))
            clients.clear()
            await node.until(partial(holds_less, most))


def holds_less(most: int, now: Figures) -> bool:
    return now.memory < most


@pytest.mark.slow
@pytest.mark.parametrize("loop", ["uvloop", "asyncio"])
async def test_nothing_is_left_of_ten_thousand(tmp_path: Path, loop: str) -> None:
    async with guarded(tmp_path, loop) as node:
        await come_and_go(node, 10_000)


@pytest.mark.parametrize("way", WAYS)
async def test_each_way_works(tmp_path: Path, way: str) -> None:
    """Alone, so that a failure has a name, and a way that does not do what it says is noticed."""
    async with guarded(tmp_path) as node:
        first = await node.figures()
        for number in range(2):
            await WAYS[way](node, number)
        after = await node.until(lambda now: now.links == 0 and now.accepted >= first.accepted + 2)
        assert after.clients == after.tables == 0


async def test_a_leak_would_be_seen(tmp_path: Path) -> None:
    """The window shows what is there: an open connection is a descriptor, a link, a client and table entries."""
    async with relay(tmp_path) as node:
        other = await node.log_in()  # the first one also costs what all share
        before = await node.until(lambda now: now.clients == 1)
        raw = await node.log_in()
        during = await node.figures()
        assert during.descriptors == before.descriptors + 1
        assert (during.links, during.clients, during.tables) == (2, 2, 2)
        await raw.close()
        await node.as_before(before)
        await other.close()


def test_the_loops_are_those_asked_for(tmp_path: Path) -> None:
    async def ask(loop: str) -> str:
        async with relay(tmp_path / loop, loop) as node:
            return node.loop

    assert asyncio.run(ask("uvloop")).startswith("uvloop")
    assert asyncio.run(ask("asyncio")).startswith("asyncio")
