"""The listening socket: limits, options, handshakes that fail."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import ssl
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import Any

import pytest

from derper.net import acceptor as acceptor_module
from derper.net import listener as listener_module
from derper.net import sockets
from derper.net.acceptor import Acceptor
from derper.net.listener import Listener, SocketOptions, bind_tcp
from derper.net.tls import ServerTLS
from derper.relay.limits import TokenBucket

from ..tls import trusting
from .loopback import HOST_NAME, LoopbackRelay, RawClient, pair_for, private, relay, until

pytestmark = pytest.mark.both_loops


@pytest.fixture
async def node() -> AsyncIterator[LoopbackRelay]:
    async with relay(tls=True) as running:
        yield running


@pytest.mark.parametrize("garbage", [b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01\xff\xff" + bytes(100), b"\x00" * 2000])
async def test_garbage_instead_of_tls(node: LoopbackRelay, garbage: bytes) -> None:
    client = await node.connect()
    client.send(garbage)
    await client.rest()
    await until(lambda: not node.listener._arrivals)
    assert node.listener.tls_errors == 1
    assert not node.hub.links


async def test_who_says_nothing_is_dropped(node: LoopbackRelay, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listener_module, "HEAD_SECONDS", 0.02)
    client = await node.connect()
    assert await client.rest() == b""
    await until(lambda: not node.listener._arrivals)
    assert node.listener.tls_errors == 1


async def test_who_leaves_in_the_handshake(node: LoopbackRelay) -> None:
    client = await node.connect()
    client.send(b"\x16\x03\x01")
    await client.close()
    await until(lambda: node.listener.tls_errors)
    assert not node.listener._arrivals


async def test_failed_handshakes_leave_no_descriptors(node: LoopbackRelay) -> None:
    async def fail() -> None:
        client = await node.connect()
        client.send(b"hello\r\n\r\n")
        await client.rest()
        await client.close()

    await fail()
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(50):
        await fail()
    await until(lambda: len(os.listdir("/proc/self/fd")) <= before)
    assert node.listener.tls_errors == 51


async def test_the_accept_limit(node: LoopbackRelay) -> None:
    loop = asyncio.get_running_loop()
    node.listener.limit = TokenBucket(1e-9, 2, loop.time())
    for _ in range(2):
        await node.connect(ssl=trusting())
    for _ in range(3):
        assert await (await node.connect()).rest() == b""
    assert (node.listener.accepted, node.listener.rejected) == (2, 3)
    node.listener.limit = None
    await node.connect(ssl=trusting())


async def test_without_a_certificate_nobody_is_served(node: LoopbackRelay) -> None:
    node.tls.load([], datetime.now(UTC))
    with pytest.raises(ssl.SSLError, match="INTERNAL_ERROR"):
        await node.connect(ssl=trusting())


async def test_closing_refuses_new_connections_and_keeps_the_old(node: LoopbackRelay) -> None:
    served = await node.connect(ssl=trusting())
    waiting = await node.connect()
    await until(lambda: node.listener._arrivals)
    port = node.listener.port
    node.listener.close()
    node.listener.close()
    with pytest.raises(ConnectionRefusedError):
        await asyncio.open_connection("127.0.0.1", port)
    assert await waiting.rest() == b""
    served.send(b"GET /robots.txt HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
    assert (await served.rest()).startswith(b"HTTP/1.1 200 ")
    assert not node.listener._arrivals


async def test_too_many_handshakes_at_once(node: LoopbackRelay, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listener_module, "_ARRIVALS_AT_ONCE", 1)
    first = await node.connect()
    await until(lambda: node.listener._arrivals)
    assert await (await node.connect()).rest() == b""
    await first.close()
    await until(lambda: not node.listener._arrivals)
    await node.connect(ssl=trusting())
    assert node.listener.rejected == 1


async def test_a_silent_client_gives_way(node: LoopbackRelay, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listener_module, "_ARRIVALS_AT_ONCE", 1)
    monkeypatch.setattr(listener_module, "_ARRIVAL_GRACE", 0.0)
    await node.connect(ssl=trusting())  # from the first one on, TLS has descriptors of its own
    await until(lambda: not node.listener._arrivals)
    silent = await node.connect()
    await until(lambda: node.listener._arrivals)
    before = len(os.listdir("/proc/self/fd"))
    await node.connect(ssl=trusting())
    assert await silent.rest() == b""
    await silent.close()
    # The silent one's two ends went, the other's came.
    await until(lambda: len(os.listdir("/proc/self/fd")) == before)


async def test_too_many_that_others_have_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listener_module, "_ARRIVALS_AT_ONCE", 0)
    monkeypatch.setattr(Listener, "_give_up_oldest", lambda _: False)
    listener = Listener(lambda _: asyncio.Protocol(), choose=None, options=SocketOptions())
    with socket.socket() as conn:
        assert not listener.take(conn, ("127.0.0.1", 1))
    assert (listener.accepted, listener.rejected) == (0, 1)


async def test_out_of_file_descriptors(node: LoopbackRelay, monkeypatch: pytest.MonkeyPatch) -> None:
    """It rests, and goes on."""
    monkeypatch.setattr(acceptor_module, "_OUT_OF_FILES_PAUSE", 0.01)
    assert node.listener._acceptor is not None
    acceptor, failed = node.listener._acceptor, asyncio.Event()
    real = acceptor._sock

    class NoFiles:
        def accept(self) -> None:
            failed.set()
            acceptor._sock = real
            raise OSError(errno.EMFILE, "Too many open files")

        def fileno(self) -> int:
            return real.fileno()

    port = node.listener.port
    acceptor._sock = NoFiles()  # type: ignore[assignment]
    client = RawClient(*await asyncio.open_connection("127.0.0.1", port, ssl=trusting()))
    assert failed.is_set()
    client.send(b"GET /robots.txt HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
    assert (await client.rest()).startswith(b"HTTP/1.1 200 ")
    await client.close()


async def test_while_it_rests_it_takes_nothing() -> None:
    """Not even those that came with the one after which it is to rest; and a new rest begins anew."""
    loop = asyncio.get_running_loop()
    offered: list[float] = []
    rests = [0.02, 0.06, 0.0]

    def offer(conn: socket.socket, _address: object) -> bool:
        offered.append(loop.time())
        conn.close()
        acceptor.rest(rests[len(offered) - 1])
        if len(offered) == 1:
            acceptor.rest(0.1)
        return True

    acceptor = Acceptor(bind_tcp("127.0.0.1", 0, SocketOptions()), offer)
    clients = [socket.create_connection(("127.0.0.1", acceptor.port)) for _ in range(3)]
    await until(lambda: len(offered) == 3)
    assert offered[1] - offered[0] >= 0.09
    assert offered[2] - offered[1] >= 0.05
    for client in clients:
        client.close()
    acceptor.close()


async def test_socket_options() -> None:
    accepted: list[socket.socket] = []

    class Keep(asyncio.Protocol):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            accepted.append(transport.get_extra_info("socket"))

    listener = Listener.listen("127.0.0.1", 0, lambda _: Keep(), choose=None, options=SocketOptions(600.0, 15.0))
    plain = Listener.listen("127.0.0.1", 0, lambda _: Keep(), choose=None, options=SocketOptions(-1.0, 0.0))
    writers = []
    for one in (listener, plain):
        _, writer = await asyncio.open_connection("127.0.0.1", one.port)
        writers.append(writer)
    await until(lambda: len(accepted) == 2)
    for sock, keep_alive, timeout in zip(accepted, (1, 0), (15_000, 0), strict=True):
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) == 1
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == keep_alive
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == timeout
    assert accepted[0].getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 600
    with socket.socket() as sock:
        SocketOptions(keep_alive=0.0).apply(sock)  # Go's default
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 15
    for writer in writers:
        writer.close()
        await writer.wait_closed()
    listener.close()
    plain.close()


# -- binding


@pytest.mark.parametrize("host", ["", "::", "0.0.0.0"])
def test_all_addresses_of_both_families(host: str) -> None:
    with sockets.bind(host, 0, socket.SOCK_STREAM) as sock:
        port = sock.getsockname()[1]
        sock.listen()
        for host in ("127.0.0.1", "::1"):
            with socket.create_connection((host, port)):
                pass


def test_one_address() -> None:
    for host, family in (("127.0.0.1", socket.AF_INET), ("::1", socket.AF_INET6)):
        with sockets.bind(host, 0, socket.SOCK_DGRAM) as sock:
            assert (sock.family, sock.getsockname()[0]) == (family, host)


def test_a_name_with_addresses_of_both_families(monkeypatch: pytest.MonkeyPatch) -> None:
    real = socket.getaddrinfo

    def both(_host: str, port: int, **options: Any) -> list[Any]:
        return [*real("::1", port, **options), *real("127.0.0.1", port, **options)]

    monkeypatch.setattr(socket, "getaddrinfo", both)
    with sockets.bind("localhost", 0, socket.SOCK_DGRAM) as sock:
        assert sock.getsockname()[0] == "127.0.0.1"


def test_without_ipv6(monkeypatch: pytest.MonkeyPatch) -> None:
    real = socket.socket

    def no_ipv6(family: int, kind: int) -> socket.socket:
        if family == socket.AF_INET6:
            raise OSError(errno.EAFNOSUPPORT, "Address family not supported by protocol")
        return real(family, kind)

    monkeypatch.setattr(socket, "socket", no_ipv6)
    with sockets.bind("", 0, socket.SOCK_STREAM) as sock:
        assert sock.getsockname()[0] == "0.0.0.0"


def test_a_name_that_is_none() -> None:
    with pytest.raises(OSError, match="no host name"):
        sockets.bind("x" * 64, 0, socket.SOCK_STREAM)


def test_a_port_in_use() -> None:
    with sockets.bind("127.0.0.1", 0, socket.SOCK_STREAM) as sock:
        sock.listen()
        for host in ("127.0.0.1", ""):
            with pytest.raises(OSError, match="Address already in use") as caught:
                sockets.bind(host, sock.getsockname()[1], socket.SOCK_STREAM)
            assert caught.value.errno == errno.EADDRINUSE


async def test_a_context_that_changes_between_connections() -> None:
    """The listener asks for it each time."""
    tls = ServerTLS(private(1).public.hex())
    tls.load([pair_for(HOST_NAME)], datetime.now(UTC))
    listener = Listener.listen("127.0.0.1", 0, lambda _: asyncio.Protocol(), choose=tls.choose, options=SocketOptions())
    seen = []
    for pair in (pair_for(HOST_NAME), pair_for("other.derp.internal")):
        tls.load([pair], datetime.now(UTC))
        reader, writer = await asyncio.open_connection("127.0.0.1", listener.port, ssl=trusting())
        seen.append(writer.get_extra_info("ssl_object").getpeercert(True))
        del reader
        writer.close()
        await writer.wait_closed()
    assert seen[0] != seen[1]
    listener.close()
