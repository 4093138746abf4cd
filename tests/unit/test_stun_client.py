"""Asking a STUN server: loss, late and foreign answers, nobody there."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest

from derper.stun_client import ask
from derper.wire import stun

Reply = Callable[[list[bytes]], list[bytes]]


class Server(asyncio.DatagramProtocol):
    """Answers with what `reply` makes of the transactions seen so far."""

    def __init__(self, reply: Reply) -> None:
        self.reply = reply
        self.seen: list[bytes] = []
        self.transport: asyncio.DatagramTransport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport  # type: ignore[assignment]

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        self.seen.append(stun.parse_request(data))
        for answer in self.reply(self.seen):
            self.transport.sendto(answer, addr)


@asynccontextmanager
async def serving(reply: Reply) -> AsyncIterator[tuple[Server, int]]:
    loop = asyncio.get_running_loop()
    transport, server = await loop.create_datagram_endpoint(lambda: Server(reply), local_addr=("127.0.0.1", 0))
    try:
        yield server, transport.get_extra_info("sockname")[1]
    finally:
        transport.close()


def answer(transaction: bytes, address: str = "192.0.2.1") -> bytes:
    return stun.response(transaction, address, 1234)


async def test_an_answer_tells_the_address() -> None:
    async with serving(lambda seen: [answer(seen[-1])]) as (server, port):
        found = await ask("127.0.0.1", port)
    assert found.address == ("192.0.2.1", 1234)
    assert found.seconds >= 0
    assert len(server.seen) == 1


async def test_a_lost_request_is_repeated_with_a_transaction_of_its_own() -> None:
    async with serving(lambda seen: [answer(seen[-1])] if len(seen) == 3 else []) as (server, port):
        await ask("127.0.0.1", port, tries=3, patience=0.01)
    assert len(set(server.seen)) == 3


async def test_a_late_answer_counts_from_its_own_request() -> None:
    """The first request is answered when the second one comes: no less than the patience lies between."""
    async with serving(lambda seen: [answer(seen[0])] if len(seen) == 2 else []) as (_, port):
        found = await ask("127.0.0.1", port, tries=2, patience=0.05)
    assert found.seconds >= 0.04


async def test_what_answers_no_request_is_ignored() -> None:
    foreign = answer(b"x" * 12, "198.51.100.1")
    async with serving(lambda seen: [b"", b"junk", foreign, seen[-1], answer(seen[-1])]) as (server, port):
        found = await ask("127.0.0.1", port)
    assert found.address == ("192.0.2.1", 1234)
    assert len(server.seen) == 1


async def test_silence() -> None:
    async with serving(lambda seen: []) as (server, port):
        with pytest.raises(TimeoutError, match=rf"no answer from 127\.0\.0\.1 port {port} to 2 requests"):
            await ask("127.0.0.1", port, tries=2, patience=0.01)
    assert len(server.seen) == 2


async def test_nobody_listens() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    with pytest.raises(ConnectionRefusedError):
        await ask("127.0.0.1", port)
