"""DERP over WebSocket: stock clients that are told to use it, and messages as bytes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path

import pytest
from websockets.frames import Frame, Opcode
from websockets.protocol import Protocol, Side

from derper.wire import frames, handshake
from derper.wire.frames import FrameType
from derper.wire.handshake import ClientInfo
from derper.wire.keys import NodePrivate, NodePublic

from ..tls import trusting
from .conftest import Both, Relays
from .metrics import counted
from .peers import GoClients
from .pki import Authority
from .processes import HANG
from .raw import raw_clients
from .relays import DERP_PORT, Relay, RelayOptions, derp_map
from .test_upgrade import get, same

PACKETS = [b"", b"x", b"y" * 1400, b"z" * 4091]
"""None is so long that stock derper would send it in two writes, the second longer than stock clients take."""


# -- stock clients


@pytest.fixture
async def browsers(websocket_peers: Path, ca_file: Path, tmp_path: Path) -> AsyncIterator[GoClients]:
    """Stock clients that speak WebSocket, as they do in a browser."""
    env = {"TS_DEBUG_DERP_WS_CLIENT": "1", "SSL_CERT_FILE": str(ca_file)}
    async with GoClients(websocket_peers, tmp_path / "browsers", env) as process:
        yield process


@pytest.fixture
async def verified(make: str, relays: Relays, authority: Authority, addresses: Iterator[str]) -> Relay:
    """A relay whose certificate the authority has signed."""
    address = next(addresses)
    options = RelayOptions(certificate=authority.issue(address))
    return await relays.start(relays.make(make, options, address=address))


async def test_with_a_plain_client(
    verified: Relay, clients: GoClients, browsers: GoClients, authority: Authority
) -> None:
    """Packets both ways, alone and as many at once as stock derper queues."""
    plain = await clients.dial(url=verified.url, ca=authority.pem)
    browser = await browsers.dial(url=verified.url)
    assert browser.server_key == plain.server_key == verified.key
    for packet in PACKETS:
        await plain.send(browser.key, packet)
        assert await browser.receive(plain.key) == packet
        await browser.send(plain.key, packet)
        assert await plain.receive(browser.key) == packet
    await browser.send(plain.key, b"many" * 300, count=25)
    for _ in range(25):
        assert await plain.receive(browser.key) == b"many" * 300
    await browser.ping()


async def test_between_browsers(verified: Relay, browsers: GoClients) -> None:
    a, b = await browsers.dial(url=verified.url), await browsers.dial(url=verified.url)
    await a.send(b.key, b"over there")
    assert await b.receive(a.key) == b"over there"
    await b.close()
    await a.send(b.key, frames.DISCO_MAGIC + bytes(56))
    assert (await a.expect("peer_gone"))["key"] == b.key
    numbers = await counted(verified)
    assert numbers["derp_websocket_accepts"] == numbers['derp_tcp_rtt{le="non-tcp"}'] == 2


async def test_the_end_of_a_relay(verified: Relay, browsers: GoClients) -> None:
    browser = await browsers.dial(url=verified.url)
    await verified.stop()
    await browser.expect("disconnected")


async def test_bursts_towards_a_browser(
    verified: Relay, clients: GoClients, browsers: GoClients, authority: Authority
) -> None:
    """However much comes at once, no message is longer than a stock client takes."""
    plain = await clients.dial(url=verified.url, ca=authority.pem)
    browser = await browsers.dial(url=verified.url)
    for _ in range(20):
        await plain.send(browser.key, b"b" * 1400, count=20)
        for _ in range(20):
            assert await browser.receive(plain.key) == b"b" * 1400


# -- through an HTTP proxy


@asynccontextmanager
async def http_proxy(host: str, address: str) -> AsyncIterator[tuple[str, list[bytes]]]:
    """A proxy that knows one host: its URL, and the lines with which it was asked."""
    asked: list[bytes] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked.append((await reader.readuntil(b"\r\n\r\n")).partition(b"\r\n")[0])
        assert asked[-1] == f"CONNECT {host} HTTP/1.1".encode()
        onward = await asyncio.open_connection(address, DERP_PORT)
        writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
        await asyncio.gather(_pump(reader, onward[1]), _pump(onward[0], writer))

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", asked


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with suppress(OSError):
        while data := await reader.read(1 << 16):
            writer.write(data)
            await writer.drain()
    writer.close()


@pytest.mark.parametrize("websocket", [False, True], ids=["plain", "websocket"])
async def test_through_an_http_proxy(
    make: str,
    websocket: bool,
    relays: Relays,
    authority: Authority,
    websocket_peers: Path,
    ca_file: Path,
    tmp_path: Path,
) -> None:
    """The client asks a proxy for the relay by name, which only the proxy can resolve."""
    options = RelayOptions(certificate=authority.issue("relay.example"), host_name="relay.example")
    relay = await relays.start(relays.make(make, options))
    async with AsyncExitStack() as stack:
        proxy, asked = await stack.enter_async_context(http_proxy(f"relay.example:{DERP_PORT}", relay.address))
        env = {"HTTPS_PROXY": proxy, "SSL_CERT_FILE": str(ca_file), "TS_DEBUG_DERP_WS_CLIENT": "1" if websocket else ""}
        process = await stack.enter_async_context(GoClients(websocket_peers, tmp_path / "behind", env))
        where = {"url": relay.url} if websocket else {"map": derp_map([relay.node("900a")]), "region": 900}
        a, b = await process.dial(**where), await process.dial(**where)
        await a.send(b.key, b"through the proxy")
        assert await b.receive(a.key) == b"through the proxy"
        assert len(asked) == 2
        await a.close()
        await b.close()


# -- the handshake

KEY = "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ=="
RIGHT = ("Upgrade: websocket", "Connection: Upgrade", KEY, "Sec-WebSocket-Version: 13", "Sec-WebSocket-Protocol: derp")


def asks(*lines: str, without: str = "", method: str = "GET", version: str = "HTTP/1.1") -> bytes:
    """A handshake with these lines in place of what begins as they do."""
    names = {line.partition(":")[0] for line in lines} | {without}
    kept = [line for line in RIGHT if line.partition(":")[0] not in names]
    return get("/derp", *kept, *lines, method=method, version=version)


async def test_handshakes(both: Both) -> None:
    """Any origin, no extension, the subprotocol among others."""
    cases: dict[str, bytes | Sequence[bytes]] = {
        "as it should be": asks(),
        "in any case": asks("upgrade: WebSocket", "connection: keep-alive, upgrade", without="Upgrade"),
        "two Connections": asks("Connection: close", "Connection: upgrade"),
        "spaces around the key": asks(KEY.replace(": ", ":   ") + "  "),
        "compression": asks("Sec-WebSocket-Extensions: permessage-deflate; client_max_window_bits"),
        "an origin": asks("Origin: https://any.example"),
        "no origin in particular": asks("Origin: null"),
        "several protocols": asks("Sec-WebSocket-Protocol: chat, derp, superchat"),
        "in two fields": asks("Sec-WebSocket-Protocol: xderp", "Sec-WebSocket-Protocol: derp"),
        "fast start": asks("Derp-Fast-Start: 1"),
        "a query": asks().replace(b"/derp", b"/derp?x=y"),
        "behind another request": [get("/generate_204"), asks()],
    }
    said = await same(both, cases)
    assert {(one.statuses[-1], one.end) for one in said.values()} == {(101, "derp")}
    assert {(await counted(relay))["derp_websocket_accepts"] for relay in (both.stock, both.ours)} == {len(cases)}


async def test_wrong_handshakes(both: Both) -> None:
    cases = {
        "HTTP/1.0": asks(version="HTTP/1.0"),
        "no Connection": asks(without="Connection"),
        "another Connection": asks("Connection: keep-alive"),
        "POST": asks(method="POST"),
        "version 8": asks("Sec-WebSocket-Version: 8"),
        "versions": asks("Sec-WebSocket-Version: 13, 8"),
        "an odd version": asks('Sec-WebSocket-Version: "\xe9\\'),
        "no version": asks(without="Sec-WebSocket-Version"),
        "no key": asks(without="Sec-WebSocket-Key"),
        "two keys": asks(KEY, KEY),
        "a short key": asks("Sec-WebSocket-Key: c2hvcnQ="),
        "no base64": asks("Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZ!=="),
        "base64 without padding": asks("Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ"),
        "an empty key": asks("Sec-WebSocket-Key:"),
        "closing": asks("Sec-WebSocket-Version: 8", "Connection: close", "Connection: upgrade"),
    }
    said = await same(both, cases)
    assert {status for one in said.values() for status in one.statuses} == {400, 405, 426}


async def test_subprotocols(both: Both) -> None:
    """Without "derp" in it, it is an early client's DERP; with more than that, WebSocket, which is closed."""
    early = {
        "none": asks(without="Sec-WebSocket-Protocol"),
        "another": asks("Sec-WebSocket-Protocol: chat"),
        "in capitals": asks("Sec-WebSocket-Protocol: DERP"),
        "in a second field": asks("Sec-WebSocket-Protocol: chat", "Sec-WebSocket-Protocol: derp"),
    }
    said = await same(both, early)
    assert all(b"upgrade: DERP" in one.answers[0][1] for one in said.values())
    for protocols in ("derpy", "Derp, derp", "derp2,DERP"):
        request = asks(f"Sec-WebSocket-Protocol: {protocols}")
        stock, ours = [await refused(relay, request) for relay in (both.stock, both.ours)]
        assert stock == (1008, "client must speak the derp subprotocol")
        assert ours == stock


# -- messages


class Socket:
    """A WebSocket client of bytes."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._protocol = Protocol(Side.CLIENT, max_size=None)
        self._derp = bytearray()
        self.private = NodePrivate.generate()
        self.key = self.private.public
        self.sizes: list[int] = []  # of the messages
        self.pongs: list[bytes] = []

    async def open(self, request: bytes) -> None:
        self._writer.write(request)
        head = await self._reader.readuntil(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 101 "), head

    async def login(self) -> None:
        _, key = await self.frame()
        server = NodePublic(key[len(frames.MAGIC) :])
        self.send(handshake.client_info_frame(self.private, server, ClientInfo()))
        assert (await self.frame())[0] == FrameType.SERVER_INFO

    def say(self, *said: Frame) -> None:
        self._writer.write(b"".join(frame.serialize(mask=True) for frame in said))

    def write(self, data: bytes) -> None:
        self._writer.write(data)

    def send(self, data: bytes) -> None:
        self.say(Frame(Opcode.BINARY, data))

    async def frame(self) -> tuple[int, bytes]:
        """The next DERP frame."""
        while len(self._derp) < 5 or len(self._derp) < (end := 5 + int.from_bytes(self._derp[1:5], "big")):
            assert await self._read(), f"closed: {self._protocol.close_rcvd}"
        kind, payload = self._derp[0], bytes(self._derp[5:end])
        del self._derp[:end]
        return kind, payload

    async def until_close(self) -> tuple[int, str] | None:
        """Code and reason with which the relay closes; None if it just does."""
        with suppress(ConnectionResetError):
            while self._protocol.close_rcvd is None and await self._read():
                pass
        close = self._protocol.close_rcvd
        return None if close is None else (int(close.code), close.reason)

    async def _read(self) -> bool:
        async with asyncio.timeout(HANG):
            data = await self._reader.read(1 << 16)
        if not data:
            return False
        self._protocol.receive_data(data)
        for event in self._protocol.events_received():
            assert isinstance(event, Frame)
            if event.opcode is Opcode.BINARY:
                self._derp += event.data
                self.sizes.append(len(event.data))
            if event.opcode is Opcode.PONG:
                self.pongs.append(bytes(event.data))
        for answer in self._protocol.data_to_send():
            if answer:
                self._writer.write(answer)
        return True


@asynccontextmanager
async def socket(relay: Relay, request: bytes) -> AsyncIterator[Socket]:
    """An open WebSocket."""
    async with asyncio.timeout(HANG):
        reader, writer = await asyncio.open_connection(relay.address, DERP_PORT, ssl=trusting())
        client = Socket(reader, writer)
        await client.open(request)
    try:
        yield client
    finally:
        writer.transport.abort()


@asynccontextmanager
async def logged_in(relay: Relay) -> AsyncIterator[Socket]:
    async with socket(relay, asks()) as client:
        await client.login()
        yield client


async def refused(relay: Relay, request: bytes) -> tuple[int, str] | None:
    async with socket(relay, request) as client:
        return await client.until_close()


async def ends(relay: Relay, said: Sequence[Frame] | bytes) -> tuple[int, str] | None:
    """How a relay closes after this."""
    async with logged_in(relay) as client:
        if isinstance(said, bytes):
            client.write(said)
        else:
            client.say(*said)
        return await client.until_close()


def raw(first: int, size: int, data: bytes = b"", *, mask: bool = True) -> bytes:
    """A frame's bytes, with a mask of zeros."""
    return bytes([first, size | (0x80 if mask else 0)]) + (bytes(4) if mask else b"") + data


async def test_goodbyes(both: Both) -> None:
    """Code and reason come back; a client without manners is told what is wrong."""
    cases: Mapping[str, Sequence[Frame] | bytes] = {
        "normal": [Frame(Opcode.CLOSE, b"\x03\xe8")],
        "going away": [Frame(Opcode.CLOSE, b"\x03\xe9bye")],
        "an application's": [Frame(Opcode.CLOSE, b"\x0f\xa0")],
        "text": [Frame(Opcode.TEXT, b"hello")],
        "a frame that ends the session": [Frame(Opcode.BINARY, frames.watch_conns())],
    }
    for name, case in cases.items():
        stock, ours = await ends(both.stock, case), await ends(both.ours, case)
        assert stock is not None, name
        assert ours == stock, name


async def test_protocol_errors(both: Both) -> None:
    """The same code; the reason is the library's."""
    cases = {
        "a reserved bit": raw(0xC2, 1, b"x"),
        "an unknown opcode": raw(0x83, 0),
        "a fragmented ping": raw(0x09, 0),
        "a long ping": bytes([0x89, 0xFE, 0, 126]) + bytes(4 + 126),
        "a continuation of nothing": raw(0x80, 1, b"x"),
        "a message in a message": raw(0x02, 1, b"\x7f") + raw(0x82, 1, b"x"),
        "a close with half a code": raw(0x88, 1, b"x"),
        "a close with a reserved code": raw(0x88, 2, b"\x03\xed"),
    }
    for name, case in cases.items():
        stock, ours = await ends(both.stock, case), await ends(both.ours, case)
        assert stock is not None, name
        assert ours is not None, name
        assert ours[0] == stock[0] == 1002, name


async def test_unmasked_frames(both: Both) -> None:
    unmasked = raw(0x82, 1, b"\x7f", mask=False)
    stock, ours = await ends(both.stock, unmasked), await ends(both.ours, unmasked)
    assert stock is not None
    assert ours is not None
    assert (stock[0], ours[0]) == (1000, 1002)


async def test_any_message_boundaries(relay: Relay) -> None:
    """A byte in each message, several frames in one, messages in pieces with pings between them."""
    async with logged_in(relay) as client:
        packets = [frames.send_packet(client.key, bytes([n]) * n) for n in range(8)]
        for byte in packets[7]:
            client.send(bytes([byte]))
        client.send(b"".join(packets))
        for n, packet in enumerate(packets):
            client.say(
                Frame(Opcode.BINARY, packet[:20], fin=False),
                Frame(Opcode.PING, b"%d" % n),
                Frame(Opcode.CONT, b"", fin=False),
                Frame(Opcode.CONT, packet[20:]),
                Frame(Opcode.PONG, b"unasked"),
                Frame(Opcode.BINARY, b""),
            )
        for n in (7, *range(8), *range(8)):
            assert await client.frame() == (FrameType.RECV_PACKET, client.key + bytes([n]) * n)
        assert client.pongs == [b"%d" % n for n in range(8)]


async def test_the_longest_packet(both: Both) -> None:
    """Both ways: stock derper breaks its own clients with it, or closes on them."""
    packet = b"x" * frames.MAX_PACKET
    async with logged_in(both.ours) as client:
        client.send(frames.send_packet(client.key, packet))
        assert await client.frame() == (FrameType.RECV_PACKET, client.key + packet)
        assert max(client.sizes) <= 32 << 10
        client.send(b"\x7f" * (66 << 10))
        assert (await client.until_close() or (0,))[0] == 1009
    async with logged_in(both.stock) as client:
        client.send(frames.send_packet(client.key, packet))
        assert (await client.until_close() or (0,))[0] == 1009


async def test_a_slow_browser_costs_its_own_packets_only(relay: Relay) -> None:
    async with logged_in(relay) as slow, raw_clients() as clients:
        a, b = await clients.login(relay), await clients.login(relay)
        for _ in range(200):
            a.write(*(frames.send_packet(slow.key, b"s" * 1400) for _ in range(50)))
            a.write(frames.send_packet(b.key, b"still there?"))
            assert await b.expect(FrameType.RECV_PACKET) == a.key + b"still there?"
