"""A connection before the doorman: hellos in pieces, refusals, what proxies say."""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
from collections.abc import AsyncIterator, Callable
from ipaddress import ip_address, ip_network
from struct import pack
from typing import TypeVar

import pytest

from derper.net import listener as listener_module
from derper.net import peek as peek_module
from derper.net.peek import Peek, first_look
from derper.net.sockets import tcp_descriptor
from derper.relay.proxies import Proxies
from derper.relay.session import Remote
from derper.wire import clienthello, handshake
from derper.wire.handshake import ClientInfo

from ..tls import trusting
from .hellos import hello, names, real_hello, records
from .loopback import FAST, HOST_NAME, PATIENCE, LoopbackRelay, RawClient, private, relay, until

T = TypeVar("T")

pytestmark = pytest.mark.both_loops

SIGNATURE = b"\r\n\r\n\0\r\nQUIT\n"
FROM_CLIENT = SIGNATURE + b"\x21\x11" + pack(">H4s4sHH", 12, bytes((192, 0, 2, 7)), bytes(4), 5678, 443)
LOOPBACK = (ip_network("127.0.0.0/8"),)
PAGE = b"GET /robots.txt HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"


@pytest.fixture
async def node() -> AsyncIterator[LoopbackRelay]:
    async with relay(tls=True) as running:
        yield running


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """One entry for each look at a connection's first bytes: the pause that would follow."""
    counted: list[float] = []
    real = Peek.look

    def look(self: Peek[object]) -> None:
        counted.append(self._pause)
        real(self)

    monkeypatch.setattr(Peek, "look", look)
    return counted


class Tunnel:
    """TLS over a connection, whose pieces the test cuts."""

    def __init__(self, client: RawClient) -> None:
        self.client = client
        self.inward, self.outward = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.tls = trusting().wrap_bio(self.inward, self.outward, server_hostname=HOST_NAME)

    def first(self) -> bytes:
        with pytest.raises(ssl.SSLWantReadError):
            self.tls.do_handshake()
        return self.outward.read()

    async def page(self) -> bytes:
        """Finish the handshake, and ask for a page."""
        await self._step(self.tls.do_handshake)
        self.tls.write(PAGE)
        self.client.send(self.outward.read())
        return await self._step(self.tls.read)

    async def _step(self, call: Callable[[], T]) -> T:
        async with asyncio.timeout(PATIENCE):
            while True:
                try:
                    return call()
                except ssl.SSLWantReadError:
                    self.inward.write(await self.client.reader.read(1 << 16))


@pytest.mark.parametrize("size", [1, 7, 100, 516])
async def test_a_hello_in_pieces(
    node: LoopbackRelay, looks: list[float], size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is looked at a few times only, however many pieces there are, and without a pause."""
    monkeypatch.setattr(peek_module, "_PAUSE", 1000.0)
    client = await node.connect()
    client.writer.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    tunnel = Tunnel(client)
    first = tunnel.first()
    for start in range(0, len(first), size):
        client.send(first[start : start + size])
        await asyncio.sleep(0)
    assert (await tunnel.page()).startswith(b"HTTP/1.1 200 ")
    assert len(looks) <= 5
    assert not node.listener._arrivals


async def test_a_hello_in_several_records(node: LoopbackRelay, looks: list[float]) -> None:
    """As large ones come.  OpenSSL gives the answer, so it has read all of them."""
    client = await node.connect()
    message = real_hello(HOST_NAME)[5:]
    data = records(message, 100, 1, 200)
    for piece in (data[:90], data[90:]):
        seen = len(looks)
        client.send(piece)
        await until(lambda seen=seen: len(looks) > seen)
    assert (await client.exactly(3))[:1] == b"\x16"
    await client.close()


async def test_a_system_that_counts_no_bytes(
    node: LoopbackRelay, looks: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is a pause between the looks, and it grows."""
    monkeypatch.setattr(peek_module, "_PAUSE", 0.001)
    monkeypatch.setattr(socket, "SO_RCVLOWAT", socket.SO_RCVBUF)
    client = await node.connect()
    tunnel = Tunnel(client)
    first = tunnel.first()
    client.send(first[:100])
    await until(lambda: len(looks) > 5)
    client.send(first[100:])
    assert (await tunnel.page()).startswith(b"HTTP/1.1 200 ")
    assert looks[-1] >= 8 * looks[0]


@pytest.mark.parametrize("half", [b"\x16", real_hello()[:100]])
async def test_who_says_half_and_leaves(node: LoopbackRelay, looks: list[float], half: bytes) -> None:
    client = await node.connect()
    client.send(half)
    client.writer.write_eof()
    assert await client.rest() == b""
    await until(lambda: node.listener.tls_errors)
    assert not node.listener._arrivals
    assert len(looks) <= 4


@pytest.mark.parametrize(
    ("data", "answer"),
    [
        (PAGE, b"HTTP/1.0 400 Bad Request\r\n\r\nClient sent an HTTP request to an HTTPS server.\n"),
        (PAGE + bytes(10_000), b"HTTP/1.0 400 Bad Request\r\n\r\nClient sent an HTTP request to an HTTPS server.\n"),
        (records(hello(names((0, b"other.example")))), b"\x15\x03\x03\x00\x02\x02\x50"),
        (records(hello(names((0, b"a.")))), b"\x15\x03\x01\x00\x02\x02\x32"),
        (records(hello(version=0x0302)), b"\x15\x03\x01\x00\x02\x02\x46"),
        (b"SSH-2.0-x\r\n", b""),
    ],
)
async def test_refusals_arrive(node: LoopbackRelay, data: bytes, answer: bytes) -> None:
    """Also where the client has sent more than was read: no reset overtakes the answer."""
    client = await node.connect()
    client.send(data)
    async with asyncio.timeout(PATIENCE):
        assert await client.reader.read() == answer  # a reset would be an error
    assert node.listener.tls_errors == 1


async def test_a_client_reads_its_own_library_s_words(node: LoopbackRelay) -> None:
    with pytest.raises(ssl.SSLError, match="internal error"):
        await node.connect(ssl=trusting(), server_hostname="other.example")
    context = trusting()
    context.set_alpn_protocols(["h2"])
    with pytest.raises(ssl.SSLError, match="no application protocol"):
        await node.connect(ssl=context, server_hostname=HOST_NAME)


async def test_closing_in_the_middle(node: LoopbackRelay) -> None:
    """Whoever waits for a hello, its rest, or the end of the handshake."""
    clients = [await node.connect() for _ in range(3)]
    clients[1].send(real_hello()[:100])
    clients[2].send(real_hello(HOST_NAME))
    await clients[2].exactly(1)
    await until(lambda: len(node.listener._arrivals) == 3)
    (with_transport,) = [arrival.sock for arrival in node.listener._arrivals if arrival.is_handed_over]
    sweeper = node.listener._sweeper
    node.listener.close()
    assert with_transport.fileno() >= 0  # it is the transport's to close
    assert sweeper is not None
    assert sweeper.cancelled()
    for client in clients:
        await client.rest()
    assert not node.listener._arrivals


async def test_half_a_hello_is_dropped_in_time(node: LoopbackRelay, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listener_module, "HEAD_SECONDS", 0.05)
    clients = [await node.connect() for _ in range(2)]
    for client in clients:
        client.send(real_hello()[:100])
    for client in clients:
        assert await client.rest() == b""
    assert node.listener.tls_errors == 2


# -- proxies


async def remote_of_client(node: LoopbackRelay, first: bytes, request: bytes = FAST) -> Remote:
    """Log in behind `first`, and see where the relay thinks that the client is."""
    client = await node.connect()
    key = private(1)
    client.send(first, request, handshake.client_info_frame(key, node.public_key, ClientInfo()))
    await client.frame()
    await client.frame()
    remote: Remote = node.session(key).remote
    await client.close()
    return remote


CLIENT = Remote(ip_address("192.0.2.7"), 5678)


async def test_the_proxys_client() -> None:
    async with relay() as node:
        node.listener.proxies = Proxies(LOOPBACK, protocol=True)
        assert await remote_of_client(node, FROM_CLIENT) == CLIENT


async def test_a_proxy_speaks_before_tls(node: LoopbackRelay) -> None:
    node.listener.proxies = Proxies(LOOPBACK, protocol=True)
    client = await node.connect()
    tunnel = Tunnel(client)
    for byte in FROM_CLIENT:
        client.send(bytes((byte,)))
        await asyncio.sleep(0)
    client.send(tunnel.first())
    assert (await tunnel.page()).startswith(b"HTTP/1.1 200 ")


async def test_a_proxys_own_connection() -> None:
    async with relay() as node:
        node.listener.proxies = Proxies(LOOPBACK, protocol=True)
        remote = await remote_of_client(node, SIGNATURE + b"\x20\0\0\0")
        assert remote.ip == ip_address("127.0.0.1")


async def test_a_client_on_the_proxys_own_machine() -> None:
    """Its loopback address would be taken for one of ours: the proxy's address is the truth."""
    first = SIGNATURE + b"\x21\x11" + pack(">H4s4sHH", 12, bytes((127, 0, 0, 9)), bytes(4), 5678, 443)
    async with relay() as node:
        node.listener.proxies = Proxies(LOOPBACK, protocol=True)
        remote = await remote_of_client(node, first)
        assert remote.ip == ip_address("127.0.0.1")
        assert remote.port != 5678


async def test_who_is_no_proxy_is_served_as_before() -> None:
    async with relay() as node:
        for proxies in (Proxies(), Proxies((ip_network("192.0.2.0/24"),), protocol=True), Proxies(LOOPBACK)):
            node.listener.proxies = proxies
            assert (await remote_of_client(node, b"")).ip == ip_address("127.0.0.1")


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"PROXY TCP4 192.0.2.7 192.0.2.8 1 2\r\n", "it speaks version 1 of the PROXY protocol; let it send version 2"),
        (PAGE, "its connection does not begin with a PROXY protocol header; let it send version 2"),
    ],
)
async def test_a_proxy_that_is_not_set_up(data: bytes, why: str, caplog: pytest.LogCaptureFixture) -> None:
    """It is said once, not at each connection."""
    async with relay() as node:
        node.listener.proxies = Proxies(LOOPBACK, protocol=True)
        with caplog.at_level(logging.WARNING):
            for _ in range(2):
                client = await node.connect()
                client.send(data)
                assert await client.rest() == b""
        assert [record.getMessage() for record in caplog.records] == [f"127.0.0.1 is a trusted proxy, but {why}"]
        assert (node.listener.proxy_errors, node.listener.tls_errors) == (2, 0)


FORWARDED = FAST[:-2] + b"X-Forwarded-For: 198.51.100.1\r\nx-forwarded-for: 192.0.2.8, 127.0.0.9\r\n\r\n"


async def test_what_a_proxy_forwards() -> None:
    """It is believed of trusted proxies only, and behind the header of the PROXY protocol too."""
    async with relay() as node:
        assert (await remote_of_client(node, b"", FORWARDED)).ip == ip_address("127.0.0.1")
        node.reception.proxies = Proxies(LOOPBACK)
        assert (await remote_of_client(node, b"", FORWARDED)) == Remote(ip_address("192.0.2.8"), 0)
        node.listener.proxies = node.reception.proxies = Proxies(LOOPBACK, protocol=True)
        assert await remote_of_client(node, FROM_CLIENT, FORWARDED) == CLIENT
        assert (await remote_of_client(node, SIGNATURE + b"\x20\0\0\0", FORWARDED)).ip == ip_address("192.0.2.8")


# -- what is there at once


def test_the_first_look() -> None:
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    with ours, theirs:
        first = real_hello()
        assert first_look(ours, clienthello.parse) is None
        theirs.send(first[:100])
        assert first_look(ours, clienthello.parse) is None
        theirs.send(first[100:])
        assert first_look(ours, clienthello.parse) == clienthello.parse(first)
        assert ours.recv(len(first)) == first
        theirs.send(b"GET / HTTP/1.1\r\n")
        assert first_look(ours, clienthello.parse) is None
        theirs.close()
        ours.recv(100)
        assert first_look(ours, clienthello.parse) is None
    assert first_look(ours, clienthello.parse) is None


def test_the_descriptor_of_a_tcp_connection() -> None:
    def over(sock: socket.socket | None) -> int | None:
        return tcp_descriptor(asyncio.Transport({"socket": sock}))

    with socket.socket(socket.AF_INET6) as sock:
        assert over(sock) == sock.fileno()
    assert over(sock) is None
    with socket.socket(socket.AF_UNIX) as sock:
        assert over(sock) is None
    assert over(None) is None
