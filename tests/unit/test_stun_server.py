"""The STUN socket: both families, garbage, and silence."""

from __future__ import annotations

import asyncio
import socket

import pytest

from derper.net.stun import STUNServer
from derper.wire import stun

from .loopback import PATIENCE, until

pytestmark = pytest.mark.both_loops
TX = b"123456789012"


class Asker(asyncio.DatagramProtocol):
    def __init__(self) -> None:
        self.answers: asyncio.Queue[bytes] = asyncio.Queue()
        self.transport: asyncio.DatagramTransport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport  # type: ignore[assignment]

    def datagram_received(self, data: bytes, addr: object) -> None:
        self.answers.put_nowait(data)

    async def answer(self) -> bytes:
        async with asyncio.timeout(PATIENCE):
            return await self.answers.get()


async def asker(host: str, port: int) -> Asker:
    _, protocol = await asyncio.get_running_loop().create_datagram_endpoint(Asker, remote_addr=(host, port))
    return protocol


@pytest.mark.parametrize(
    ("listen", "host", "family"),
    [("127.0.0.1", "127.0.0.1", "ipv4"), ("::1", "::1", "ipv6"), ("", "127.0.0.1", "ipv4"), ("", "::1", "ipv6")],
)
async def test_it_tells_the_client_its_address(listen: str, host: str, family: str) -> None:
    server = await STUNServer.listen(listen, 0, lambda: True)
    client = await asker(host, server.port)
    client.transport.sendto(stun.request(TX))
    own = client.transport.get_extra_info("sockname")[:2]
    assert stun.parse_response(await client.answer()) == (TX, (own[0], own[1]))
    assert dict(server.families) == {family: 1}
    client.transport.close()
    server.close()


async def test_garbage_and_silence() -> None:
    serving = False
    server = await STUNServer.listen("127.0.0.1", 0, lambda: serving)
    client = await asker("127.0.0.1", server.port)
    for packet in (b"", b"x" * 1400, stun.request(TX)[:-1], stun.request(TX)):
        client.transport.sendto(packet)
    await until(lambda: server.dispositions["silent"] == 1)
    serving = True
    client.transport.sendto(stun.request(TX[::-1]))
    assert stun.parse_response(await client.answer())[0] == TX[::-1]
    assert client.answers.empty()
    assert server.dispositions["success"] == 1
    assert server.dispositions["not_stun"] >= 2  # uvloop sends no empty datagrams
    client.transport.close()
    server.close()


async def test_a_port_in_use() -> None:
    with socket.socket(type=socket.SOCK_DGRAM) as taken:
        taken.bind(("127.0.0.1", 0))
        with pytest.raises(OSError, match="already in use"):
            await STUNServer.listen("127.0.0.1", taken.getsockname()[1], lambda: True)


async def test_an_answer_that_cannot_be_sent() -> None:
    server = await STUNServer.listen("127.0.0.1", 0, lambda: True)
    server.error_received(OSError())
    assert server.dispositions["write_error"] == 1
    server.close()
