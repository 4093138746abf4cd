"""Attacks on a relay, and what they cost everybody else: nothing that can be seen, and nothing that stays."""

from __future__ import annotations

import asyncio
import os
import ssl
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from derper.wire import frames
from derper.wire.keys import NodePrivate

from ..interop.processes import HANG
from .kit import FAST, MIB, WEBSOCKET, Figures, HostileRelay, Raw, at_once, bystanders, login_of, message, relay

SHORT = (
    "derper.net.doorman.HEAD_SECONDS=2",
    "derper.net.listener.HEAD_SECONDS=2",
    "derper.net.link.LOGIN_SECONDS=2",
    "derper.server._KEEP_ALIVE_HTTP=2",
)
GROWTH = 16 * MIB  # what a second wave may add; a leak of it all would be more


two_workers_too = pytest.mark.parametrize("node", [1, 2], indirect=True)


@pytest.fixture
async def node(tmp_path: Path, request: pytest.FixtureRequest) -> AsyncIterator[HostileRelay]:
    """With time-outs of two seconds; with as many workers as a test asks for."""
    async with relay(tmp_path, settings=SHORT, flags=[f"-workers={getattr(request, 'param', 1)}"]) as running:
        yield running


async def settled(node: HostileRelay) -> Figures:
    """After first connections, which everything is loaded for, in each worker."""
    before = await node.figures()

    async def come(_: int) -> None:
        await (await node.log_in()).close()

    await at_once(20, 20, come)
    return await node.until(lambda now: now.links <= before.links)


async def test_heads_that_never_end(node: HostileRelay) -> None:
    """Slowloris: a byte now and then, for ever.  Each is cut off when its time is up, however busy it looks."""
    async with bystanders(node, "400 slow heads"):
        before = await settled(node)

        async def drip(_: int) -> None:
            raw = await node.connect()
            ended = asyncio.create_task(raw.rest())
            for byte in FAST[:-2] + b"X: " + b"x" * 1000:
                raw.send(bytes([byte]))
                await asyncio.wait([ended], timeout=0.1)
                if ended.done():
                    break
            assert await ended == b""
            await raw.close()

        await at_once(400, 200, drip)
        await node.as_before(before)


async def test_tls_that_never_ends(node: HostileRelay) -> None:
    """A ClientHello in pieces, or whole, and then silence."""
    hello = client_hello()
    async with bystanders(node, "600 half-open TLS handshakes"):
        before = await settled(node)

        async def half_open(number: int) -> None:
            raw = await node.connect(tls=False)
            for piece in (hello[:1], hello[1:5], hello[5 : [5, 60, len(hello)][number % 3]]):
                raw.send(piece)
                await asyncio.sleep(0.01)
            await raw.rest()
            await raw.close()

        await at_once(600, 300, half_open)
        after = await node.as_before(before)
        assert after.tls_errors - before.tls_errors == 600


async def test_connections_that_say_nothing(tmp_path: Path) -> None:
    """More than may shake hands at once: some are refused, the pair goes on, and those who come later are served."""
    crowded = (*SHORT, "derper.net.listener._ARRIVALS_AT_ONCE=300")
    async with relay(tmp_path, settings=crowded) as node, bystanders(node, "2,000 silent connections"):
        before = await settled(node)
        silent = [await node.connect(tls=False) for _ in range(2000)]
        during = await node.until(lambda now: now.accepted + now.rejected >= before.accepted + 2000)
        assert during.links - before.links <= 300
        await asyncio.gather(*(raw.rest() for raw in silent))
        await asyncio.gather(*(raw.close() for raw in silent))
        await node.as_before(before)
        await (await node.dial()).close()
        after = await node.until(lambda now: now.links <= before.links)
        assert after.rejected - before.rejected >= 1000


@two_workers_too
async def test_connections_that_are_gone_at_once(node: HostileRelay) -> None:
    """A flood of connects, each reset as soon as it stands."""
    async with bystanders(node, "3,000 connects and resets"):
        before = await settled(node)

        async def knock(_: int) -> None:
            (await node.connect(tls=False)).reset()

        await at_once(3000, 100, knock)
        await node.as_before(before)


@two_workers_too
async def test_logins_with_wrong_boxes(node: HostileRelay) -> None:
    """Each costs the relay a Curve25519; it must not cost anybody else."""
    async with bystanders(node, "1,000 logins with wrong boxes"):
        before = await settled(node)
        wrong = (
            frames.frame(2, os.urandom(120)),
            frames.frame(2, bytes(120)),
            login_of(NodePrivate.generate(), NodePrivate.generate().public),
            frames.HEADER.pack(2, 1 << 30),
        )

        async def guess(number: int) -> None:
            raw = await node.connect()
            raw.send(FAST, wrong[number % len(wrong)])
            await raw.rest()
            await raw.close()

        await at_once(1000, 50, guess)
        after = await node.as_before(before)
        assert after.protocol_errors - before.protocol_errors == 1000
        assert after.clients == before.clients


async def test_logins_that_stop_in_the_middle(node: HostileRelay) -> None:
    """256 KiB are promised, and all but the last byte sent."""
    async with bystanders(node, "200 logins of 256 KiB without an end"):
        before = await settled(node)

        async def stall(_: int) -> None:
            raw = await node.connect()
            raw.send(FAST, frames.HEADER.pack(2, 256 << 10), bytes((256 << 10) - 1))
            await raw.rest()
            await raw.close()

        await at_once(200, 200, stall)
        once = await node.as_before(before)
        await at_once(200, 200, stall)
        again = await node.as_before(before)
        assert again.memory - once.memory < GROWTH


@two_workers_too
async def test_one_slow_reader_among_fast_ones(node: HostileRelay) -> None:
    """Everybody sends to it, it reads nothing: it loses its own packets and then its connection, and nobody else's."""
    async with bystanders(node, "a slow reader and five who flood it"):
        before = await settled(node)
        slow_key = NodePrivate.generate()
        slow = await node.log_in(slow_key)
        slow.stop_reading()
        senders = [await node.log_in() for _ in range(5)]
        packets = frames.send_packet(slow_key.public, bytes(1200)) * 50

        async def flood(sender: Raw) -> None:
            while True:
                sender.send(packets)
                await sender.writer.drain()
                await asyncio.sleep(0.01)

        floods = [asyncio.create_task(flood(sender)) for sender in senders]
        during = await node.until(lambda now: now.dropped > before.dropped)
        assert during.queued <= 64 + 2
        after = await node.until(lambda now: now.write_timeouts > before.write_timeouts)
        assert after.memory - before.memory < GROWTH
        for task in floods:
            task.cancel()
        slow.writer.transport.abort()
        for sender in senders:
            await sender.close()
        await node.as_before(before)


async def test_a_thousand_clients_at_once(node: HostileRelay) -> None:
    """After a restart of a region's neighbour: all are served."""
    async with bystanders(node, "1,000 clients at once"):
        before = await settled(node)
        clients: list[Raw] = []

        async def come(_: int) -> None:
            clients.append(await node.log_in())

        await at_once(1000, 1000, come)
        during = await node.figures()
        assert during.clients - before.clients == 1000
        for raw in clients:
            raw.send(frames.ping(b"12345678"))
        assert {(await raw.frame())[0] for raw in clients} == {frames.FrameType.PONG}
        await asyncio.gather(*(raw.close() for raw in clients))
        await node.as_before(before)


@two_workers_too
async def test_a_key_that_many_fight_for(node: HostileRelay) -> None:
    """Thirty clients with one key, all talking: each packet goes to one of them, and the others are left in peace."""
    async with bystanders(node, "30 clients with one key"):
        before = await settled(node)
        key, sender = NodePrivate.generate(), await node.log_in()
        fighters = [await node.log_in(key) for _ in range(30)]
        assert (await node.figures()).duplicates - before.duplicates == 29
        got: dict[bytes, int] = {}

        async def read(raw: Raw) -> None:
            while True:
                kind, payload = await raw.frame()
                if kind == frames.FrameType.RECV_PACKET:
                    got[payload[32:]] = got.get(payload[32:], 0) + 1

        readers = [asyncio.create_task(read(raw)) for raw in fighters]
        for number in range(500):
            fighters[number * 7 % 30].send(frames.ping(number.to_bytes(8, "big")))
            sender.send(frames.send_packet(key.public, number.to_bytes(4, "big")))
        await node.until(lambda now: now.received - before.received >= 500)
        while len(got) < 500:  # noqa: ASYNC110 -- they are on their way
            await asyncio.sleep(0.01)
        assert set(got.values()) == {1}
        for reader in readers:
            reader.cancel()
        await asyncio.gather(*(raw.close() for raw in (*fighters, sender)))
        await node.as_before(before)


@two_workers_too
async def test_frames_that_are_none(node: HostileRelay) -> None:
    """After the login: frames too long, of no known type, for the mesh, and noise."""
    async with bystanders(node, "300 clients that talk nonsense"):
        before = await settled(node)
        nonsense = (
            frames.HEADER.pack(4, 1 << 20),
            frames.watch_conns(),
            frames.close_peer(bytes(32)),
            frames.HEADER.pack(0x42, 0xFFFFFFFF) + os.urandom(100_000),
            frames.ping(b"12345678") * 5000,
            frames.send_packet(os.urandom(32), bytes(64 << 10)) * 4,
        )

        async def talk(number: int) -> None:
            raw = await node.log_in()
            raw.send(nonsense[number % len(nonsense)], frames.note_preferred(True))
            raw.stop_reading()
            await asyncio.sleep(0.01)
            raw.reset()

        await at_once(300, 30, talk)
        await node.as_before(before)


async def test_two_clients_that_chatter(node: HostileRelay) -> None:
    """Megabytes of frames without content, and of pings: each is work, and each is read only in its turn."""
    async with bystanders(node, "two clients that send a million tiny frames"):
        before = await settled(node)
        quiet, pinging = await node.log_in(), await node.log_in()
        pongs = asyncio.create_task(pinging.rest())
        for _ in range(50):
            quiet.send(frames.HEADER.pack(0x42, 0) * 10_000)
            pinging.send(frames.ping(b"12345678") * 500)
            await quiet.writer.drain()
            await pinging.writer.drain()
        quiet.send(frames.ping(b"the end."))
        assert await quiet.frame() == (frames.FrameType.PONG, b"the end.")
        await quiet.close()
        pinging.reset()
        await pongs
        await node.as_before(before)


async def test_requests_that_never_end(node: HostileRelay) -> None:
    """On a connection whose first request was answered: a second head without an end, and a body that never comes."""
    async with bystanders(node, "200 slow requests on kept connections"):
        before = await settled(node)
        starts = (b"GET /robots.txt HTTP/1.1\r\nX: ", b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\n")

        async def linger(number: int) -> None:
            raw = await node.connect()
            raw.send(b"GET /robots.txt HTTP/1.1\r\nHost: x\r\n\r\n", starts[number % 2])
            ended = asyncio.create_task(raw.rest())
            while not ended.done():
                raw.send(b"x")
                await asyncio.wait([ended], timeout=0.2)
            await raw.close()

        await at_once(200, 200, linger)
        await node.as_before(before)


@two_workers_too
async def test_websockets_that_misbehave(node: HostileRelay) -> None:
    """Text, no mask, lengths of 2^62, fragments without an end, pings without reading, a login in bytes."""
    login = login_of(NodePrivate.generate(), node.server_key)
    talk = (
        message(b"text", kind=1),
        message(login).replace(b"\xfe", b"\x7e", 1),  # not masked
        b"\x82\xff\x40" + bytes(11),
        message(login) + message(b"", fin=0) + message(b"", kind=0, fin=0) * 2000,
        message(login) + message(b"ping" * 30, kind=9) * 5000,
        b"".join(message(bytes([byte])) for byte in login + frames.ping(b"12345678") * 100),
        message(login, fin=0xC0),
        message(login) + message(frames.HEADER.pack(4, 1 << 20)),
    )
    async with bystanders(node, "200 WebSocket clients that misbehave"):
        before = await settled(node)

        async def misbehave(number: int) -> None:
            raw = await node.connect()
            raw.send(WEBSOCKET)
            await raw.reader.readuntil(b"\r\n\r\n")
            raw.stop_reading()
            raw.send(talk[number % len(talk)])
            await asyncio.sleep(0.05)
            raw.reset()

        await at_once(200, 20, misbehave)
        await node.as_before(before)


async def test_a_websocket_of_tiny_frames(node: HostileRelay) -> None:
    """A frame is work whatever is in it: one client sends them as fast as it can."""
    async with bystanders(node, "100,000 WebSocket frames of a byte"):
        before = await settled(node)
        raw = await node.connect()
        raw.send(WEBSOCKET, message(login_of(NodePrivate.generate(), node.server_key)))
        unknown = frames.HEADER.pack(0x42, 100_000)
        raw.send(b"".join(message(bytes([byte])) for byte in unknown))
        for _ in range(100):
            raw.send(message(b"x") * 1000)
            await raw.writer.drain()
        raw.send(message(frames.ping(b"12345678")))
        found = b""
        while b"12345678" not in found:
            async with asyncio.timeout(HANG):
                found += await raw.reader.readexactly(1)
        await raw.close()
        await node.as_before(before)


def client_hello() -> bytes:
    """What a TLS client says first."""
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = ssl.create_default_context().wrap_bio(incoming, outgoing, server_hostname="example.com")
    with pytest.raises(ssl.SSLWantReadError):
        client.do_handshake()
    return outgoing.read()


async def test_resets_at_the_door(tmp_path: Path) -> None:
    """Who resets a connection before TLS holds no place at the door: the time-out there is half a minute."""
    patient = ("derper.net.listener.HEAD_SECONDS=10000",)
    async with relay(tmp_path, settings=patient) as node:
        before = await settled(node)
        for number in range(100):
            raw = await node.connect(tls=False)
            raw.send(b"\x16\x03\x01\x02\x00\x01\x00")
            await asyncio.sleep(0.01 * (number % 2))
            raw.reset()
        await node.as_before(before)
