"""A relay on a loopback socket, and a client that writes bytes."""

from __future__ import annotations

import asyncio
import random
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime
from functools import cache, partial
from typing import Any

from aiohttp import web

from derper import certs
from derper.certs import CertificatePair
from derper.client import Client, Endpoint, Options, dial_endpoint
from derper.net import debug
from derper.net.admission import Admission
from derper.net.debug import Access, Debug, Facts
from derper.net.doorman import Doorman, Reception
from derper.net.http import Site, connections, public_app
from derper.net.hub import Hub
from derper.net.listener import Listener, SocketOptions
from derper.net.tls import ServerTLS
from derper.relay.admission import AdmissionPolicy
from derper.relay.limits import Limits
from derper.wire import handshake
from derper.wire.frames import HEADER, HEADER_LEN, FrameType
from derper.wire.handshake import ClientInfo
from derper.wire.keys import NodePrivate

__all__ = [
    "FAST",
    "HOST_NAME",
    "UPGRADE",
    "LoopbackRelay",
    "RawClient",
    "free_port",
    "pair_for",
    "private",
    "relay",
    "until",
]

HOST_NAME = "node.derp.internal"
UPGRADE = b"GET /derp HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: DERP\r\n\r\n"
FAST = UPGRADE[:-2] + b"Derp-Fast-Start: 1\r\n\r\n"
PATIENCE = 30.0  # seconds; only to end a hang


def facts(hub: Hub) -> Facts:
    """What the debug pages of a hub without a relay show."""

    async def clients(most: int) -> list[dict[str, object]]:
        return [{"number": number, "name": "<x>"} for number in range(min(most, 1002))]

    async def text(text: str) -> str:
        return text

    async def gather(question: str) -> list[object]:
        if question == "check":
            return [await debug.faults(hub)]
        return [{"traffic": debug.traffic(hub), "tasks": debug.tasks(), "collect": None}[question]]

    title = {"Uptime": "1h", "<Version>": "&"}
    return Facts(lambda: title, lambda: text('{"a": 1}\n'), lambda: text("a 1\n"), clients, gather)


def private(number: int) -> NodePrivate:
    """A private key."""
    return NodePrivate(bytes([number]) * 32)


@cache
def pair_for(*names: str) -> CertificatePair:
    """A certificate of ours; making one takes a moment."""
    return certs.self_signed(names, now=datetime.now(UTC))


def free_port() -> int:
    """A port of 127.0.0.1 that is free, and none that the system gives to outgoing connections in the meantime."""
    while True:
        port = random.randrange(20000, 32000)
        with socket.socket() as sock, suppress(OSError):
            sock.bind(("127.0.0.1", port))
            return port


async def until(condition: Any) -> None:
    """Give the loop turns until the condition holds."""
    async with asyncio.timeout(PATIENCE):
        while not condition():  # noqa: ASYNC110 -- for what no event tells
            await asyncio.sleep(0.001)


class RawClient:
    """A client that knows bytes, heads and frames, and has no manners."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    def send(self, *data: bytes) -> None:
        self.writer.write(b"".join(data))

    async def head(self) -> bytes:
        async with asyncio.timeout(PATIENCE):
            return await self.reader.readuntil(b"\r\n\r\n")

    async def exactly(self, count: int) -> bytes:
        async with asyncio.timeout(PATIENCE):
            return await self.reader.readexactly(count)

    async def frame(self) -> tuple[int, bytes]:
        kind, length = HEADER.unpack(await self.exactly(HEADER_LEN))
        return kind, await self.exactly(length)

    async def rest(self) -> bytes:
        """Everything until the connection ends, in whatever way."""
        data = b""
        async with asyncio.timeout(PATIENCE):
            with suppress(ConnectionResetError):
                while piece := await self.reader.read(1 << 16):
                    data += piece
        return data

    async def login(self, key: NodePrivate, server: bytes, info: ClientInfo | None = None) -> None:
        """Fast start, up to SERVER_INFO."""
        self.send(FAST, handshake.client_info_frame(key, server, info or ClientInfo()))
        assert (await self.frame())[0] == FrameType.SERVER_KEY
        kind, payload = await self.frame()
        assert kind == FrameType.SERVER_INFO
        handshake.open_server_info(key, server, payload)

    async def close(self) -> None:
        self.writer.close()
        with suppress(OSError):
            await self.writer.wait_closed()


class LoopbackRelay:
    """Hub, listener, and what they need."""

    def __init__(
        self, hub: Hub, listener: Listener, reception: Reception, tls: ServerTLS, problems: list[dict[str, Any]]
    ) -> None:
        self.hub = hub
        self.reception = reception
        self.listener = listener
        self.tls = tls
        self.problems = problems
        self.raw_clients: list[RawClient] = []

    @property
    def public_key(self) -> bytes:
        return self.hub.private_key.public

    @property
    def endpoint(self) -> Endpoint:
        pin = certs.pin(pair_for(HOST_NAME).leaf)
        return Endpoint(("127.0.0.1",), self.listener.port, HOST_NAME, pin)

    async def connect(self, **options: Any) -> RawClient:
        """A connection on which nothing was said yet."""
        client = RawClient(*await asyncio.open_connection("127.0.0.1", self.listener.port, **options))
        self.raw_clients.append(client)
        return client

    async def log_in(self, key: NodePrivate, info: ClientInfo | None = None, **options: Any) -> RawClient:
        """A connection that has logged in."""
        client = await self.connect(**options)
        await client.login(key, self.public_key, info)
        return client

    async def dial(self, key: NodePrivate, options: Options | None = None) -> Client:
        """A DERP client; only with TLS."""
        return await dial_endpoint(self.endpoint, key, options)

    def session(self, key: NodePrivate) -> Any:
        return self.hub.router.active[key.public]


@asynccontextmanager
async def relay(
    number: int = 0xF0,
    *,
    tls: bool = False,
    admission: Admission | None = None,
    limits: Limits | None = None,
    serve_derp: bool = True,
    home: str = "blank",
) -> AsyncIterator[LoopbackRelay]:
    """A running relay.  At the end nothing may be left of its connections, and no callback may have failed."""
    problems: list[dict[str, Any]] = []
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda _, context: problems.append(context))
    admission = admission or Admission(AdmissionPolicy(is_open=True))
    hub = Hub(private(number), admission, limits=limits)
    hub.start()
    server_tls = ServerTLS(hub.private_key.public.hex())
    if tls:
        server_tls.load([pair_for(HOST_NAME)], datetime.now(UTC))
    app = public_app(Site(hub.counters, home, serve_derp, debug=Debug(Access(), facts(hub))), tls=tls)
    runner = web.AppRunner(app, access_log=None, handle_signals=False)
    await runner.setup()
    assert runner.server is not None
    reception = Reception(hub, connections(runner.server, 30.0), serve_derp=serve_derp)
    choose = server_tls.choose if tls else None
    listener = Listener.listen("127.0.0.1", 0, partial(Doorman, reception), choose=choose, options=SocketOptions())
    running = LoopbackRelay(hub, listener, reception, server_tls, problems)
    try:
        yield running
        for client in running.raw_clients:
            await client.close()
    finally:
        listener.close()
        hub.stop()
        await hub.closed(tuple(hub.links), PATIENCE)
        await admission.close()
        await runner.cleanup()
    router = hub.router
    left = [hub.links, hub.paused, router.active, router.watchers, router._duplicates, router._interested]
    left += [hub.stalls._written, hub.stalls._since]
    assert not any(left), left
    assert hub.kept_alive == hub.round_trips.followed == 0
    assert hub.counters.current_connections == 0
    assert not problems, problems
