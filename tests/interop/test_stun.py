"""STUN: the same datagrams to both relays, and answers of the same bytes."""

from __future__ import annotations

import asyncio
import socket
import struct
import zlib
from collections.abc import Mapping

from derper.wire import stun

from .conftest import Both, Relays
from .metrics import counted
from .peers import GoClients
from .processes import HANG
from .relays import Relay, RelayOptions, free_port

TX = bytes(range(1, 13))
MARK = b"the next one"
REQUEST = stun.request(TX)


def attribute(kind: int, value: bytes, padding: bytes = b"\0") -> bytes:
    return struct.pack(">HH", kind, len(value)) + value + padding * (-len(value) % 4)


def request(*attributes: bytes, length: int | None = None, kind: int = 1, cookie: int = 0x2112A442) -> bytes:
    body = b"".join(attributes)
    return struct.pack(">HHL", kind, len(body) + 8 if length is None else length, cookie) + TX + body


def signed(message: bytes) -> bytes:
    """With a fingerprint at its end."""
    return message + struct.pack(">HHL", 0x8028, 4, zlib.crc32(message) ^ 0x5354554E)


def signed_early() -> bytes:
    """A fingerprint of 0, which is right: four bytes behind it see to that.  The last one is too long to count."""
    forged = attribute(0x8028, bytes(4)) + attribute(0x8028, bytes.fromhex("c4b0c567") + bytes(8))
    return request(SOFTWARE, forged, length=len(SOFTWARE + forged))


SOFTWARE = attribute(0x8022, b"tailnode")
DATAGRAMS: Mapping[str, bytes] = {
    "the stock request": REQUEST,
    "a long fingerprint behind the one that counts": signed_early(),
    "a wrong length in the header": signed(request(SOFTWARE, length=0)),
    "an attribute in front": signed(request(attribute(0x0006, b"user"), SOFTWARE)),
    "an attribute behind": signed(request(SOFTWARE, attribute(0x0006, b"user"))),
    "an attribute with padding": signed(request(SOFTWARE, attribute(0x0006, b"a", b"x"))),
    "an empty attribute": signed(request(SOFTWARE, attribute(0x0006, b""))),
    "software twice": signed(request(attribute(0x8022, b"another one"), SOFTWARE)),
    "many attributes": signed(request(SOFTWARE, *[attribute(0x8000 + n, bytes(n)) for n in range(30)])),
    "a large datagram": signed(request(SOFTWARE, attribute(0x0006, bytes(60_000)))),
    "a transaction of zeros": stun.request(bytes(12)),
    "a fingerprint in the middle too": signed(request(SOFTWARE, attribute(0x8028, b"1234"))),
    "a long fingerprint at the end": request(SOFTWARE, attribute(0x8028, b"12345678")),
    "another software": signed(request(attribute(0x8022, b"tailnodE"))),
    "more software": signed(request(attribute(0x8022, b"tailnodes"))),
    "no software": signed(request()),
    "no fingerprint": request(SOFTWARE),
    "no attribute": request(),
    "a wrong fingerprint": REQUEST[:-1] + bytes([REQUEST[-1] ^ 1]),
    "a fingerprint that is not at the end": signed(request(SOFTWARE)) + attribute(0x0006, b"user"),
    "an indication": signed(request(SOFTWARE, kind=0x0011)),
    "a success": signed(request(SOFTWARE, kind=0x0101)),
    "another method": signed(request(SOFTWARE, kind=0x0003)),
    "the first two bits": signed(request(SOFTWARE, kind=0x4001)),
    "another cookie": signed(request(SOFTWARE, cookie=0x2112A443)),
    "a broken attribute": signed(request(SOFTWARE, struct.pack(">HH", 6, 0xFFFF))),
    "half an attribute": signed(request(SOFTWARE, b"\0\x06")),
    "nothing": b"",
    "a DNS question": bytes.fromhex("123401000001000000000000037777770000010001"),
    "a byte too much": REQUEST + b"\0",
    "64 KiB of zeros": bytes(65_000),
    **{f"its first {size} bytes": REQUEST[:size] for size in (1, 19, 20, 24, 31, 32, 39)},
}
ANSWERED = list(DATAGRAMS)[:12]


class Asker:
    """A UDP socket of its own.  Relays answer in order, so a good request behind each one ends the wait for it."""

    def __init__(self, host: str) -> None:
        self._socket = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.bind((host, 0))
        self._socket.setblocking(False)
        self.port: int = self._socket.getsockname()[1]

    async def ask(self, relay: Relay, datagram: bytes) -> bytes | None:
        """The answer, None if there is none."""
        loop = asyncio.get_running_loop()
        for data in (datagram, stun.request(MARK)):
            await loop.sock_sendto(self._socket, data, (relay.address, relay.options.stun_port))
        answer = None
        async with asyncio.timeout(HANG):
            while (received := await loop.sock_recv(self._socket, 1 << 16))[8:20] != MARK:
                assert answer is None
                answer = received
        return answer

    async def answers(self, relay: Relay) -> dict[str, bytes | None]:
        return {what: await self.ask(relay, datagram) for what, datagram in DATAGRAMS.items()}

    def close(self) -> None:
        self._socket.close()


async def test_answers_of_the_same_bytes(both: Both) -> None:
    asker = Asker("127.0.0.1")
    stock, ours = [await asker.answers(relay) for relay in (both.stock, both.ours)]
    asker.close()
    assert ours == stock
    assert [what for what, answer in stock.items() if answer] == ANSWERED


async def test_over_ipv6(make: str, relays: Relays) -> None:
    options = RelayOptions(derp_port=free_port("::1"), stun_port=free_port("::1"))
    relay = await relays.start(relays.make(make, options, address="::1"))
    asker = Asker("::1")
    answers = await asker.answers(relay)
    assert [what for what, answer in answers.items() if answer] == ANSWERED
    assert answers["the stock request"] == stun.response(TX, "::1", asker.port)
    asker.close()


async def test_stock_clients_learn_their_address(make: str, relays: Relays, clients: GoClients) -> None:
    relay = await relays.start(relays.make(make))
    answer = await clients.stun(relay.stun_address)
    assert answer.answered
    assert answer.mapped == answer.local


async def test_they_are_counted(both: Both) -> None:
    seen = []
    for relay in (both.stock, both.ours):
        before = await stun_counts(relay)
        asker = Asker("127.0.0.1")
        await asker.answers(relay)
        asker.close()
        seen.append({name: value - before[name] for name, value in (await stun_counts(relay)).items()})
    assert seen[1] == seen[0]
    assert seen[0]['stun_requests{disposition="not_stun"}'] == len(DATAGRAMS) - len(ANSWERED)
    assert seen[0]['stun_requests{disposition="success"}'] == len(ANSWERED) + len(DATAGRAMS)
    assert seen[0]['stun_addrfamily{family="ipv4"}'] == len(ANSWERED) + len(DATAGRAMS)


async def stun_counts(relay: Relay) -> dict[str, float]:
    return {name: value for name, value in (await counted(relay)).items() if name.startswith("stun_")}
