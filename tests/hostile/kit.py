"""The relay and the pair as the tests see them, and connections without manners."""

from __future__ import annotations

import asyncio
import socket
import ssl
import struct
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from derper.client import Client, Endpoint, Options, dial_endpoint
from derper.wire import handshake
from derper.wire.handshake import ClientInfo
from derper.wire.keys import NodePrivate, NodePublic

from ..interop.processes import HANG, LineProcess
from ..tls import trusting
from ..unit.loopback import FAST

__all__ = [
    "FAST",
    "MIB",
    "WEBSOCKET",
    "Figures",
    "HostileRelay",
    "Raw",
    "at_once",
    "bystanders",
    "login_of",
    "message",
    "relay",
]

MIB = 1 << 20
LISTENS_ON = "127.0.0.1"
_ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Figures:
    """What the relay holds, and what it counted; see `tests.hostile.relay`."""

    values: dict[str, Any]

    def __getattr__(self, name: str) -> int:
        return int(self.values[name])

    @property
    def parts(self) -> list[dict[str, int]]:
        """Of each process: the relay's, or the supervisor's and then those of the workers."""
        found: list[dict[str, int]] = self.values["parts"]
        return found

    def is_no_more_than(self, before: Figures) -> bool:
        """Connections, tasks, descriptors, entries of tables: of each process."""
        names = ("links", "clients", "tables", "tasks", "descriptors")
        parts = zip(self.parts, before.parts, strict=True)
        return all(now.get(name, 0) <= then.get(name, 0) for now, then in parts for name in names)


class HostileRelay(LineProcess):
    """A relay process, `port` and `pin` are how to dial it."""

    def __init__(self, workdir: Path, loop: str, *, tls: bool, settings: Sequence[str], flags: Sequence[str]) -> None:
        workdir.mkdir(parents=True, exist_ok=True)
        derper = [f"-a={LISTENS_ON}:0", "-http-port=-1", "-stun=false", f"-c={workdir / 'derper.key'}"]
        if tls:
            derper += ["-certmode=manual", f"-certdir={workdir}", f"-hostname={LISTENS_ON}"]
        argv = [sys.executable, "-m", "tests.hostile.relay", loop, *settings, "--", *derper, *flags]
        super().__init__(argv, workdir / "log", {"PYTHONPATH": str(_ROOT)})
        self.workdir = workdir
        self.tls = tls
        self.port = 0
        self.pin = ""
        self.loop = ""

    async def start(self) -> None:
        await super().start()
        ready = await self.events.expect("ready")
        self.port, self.pin, self.loop = ready["port"], ready["pin"], str(ready["loop"])

    @property
    def server_key(self) -> NodePublic:
        return NodePrivate.from_config((self.workdir / "derper.key").read_text()).public

    async def figures(self) -> Figures:
        return Figures(await self.command("figures"))

    async def trimmed(self) -> Figures:
        """The same without the memory that is free."""
        return Figures(await self.command("trim"))

    async def until(self, holds: Callable[[Figures], bool]) -> Figures:
        """Ask until it holds; what a relay does is over when it says so."""
        figures = await self.figures()
        try:
            async with asyncio.timeout(HANG):
                while not holds(figures):
                    await asyncio.sleep(0.05)
                    figures = await self.figures()
        except TimeoutError:
            raise AssertionError(f"still {figures.values}") from None
        return figures

    async def as_before(self, before: Figures) -> Figures:
        """Wait until it holds no more than then."""
        return await self.until(lambda now: now.is_no_more_than(before))

    async def dial(self, key: NodePrivate | None = None, options: Options | None = None) -> Client:
        """A client with manners; only with TLS."""
        endpoint = Endpoint((LISTENS_ON,), self.port, LISTENS_ON, self.pin)
        return await dial_endpoint(endpoint, key or NodePrivate.generate(), options)

    async def connect(self, *, tls: bool | None = None) -> Raw:
        """A connection on which nothing was said yet; with TLS if the relay has it."""
        context = trusting() if (self.tls if tls is None else tls) else None
        async with asyncio.timeout(HANG):
            reader, writer = await asyncio.open_connection(
                LISTENS_ON, self.port, ssl=context, ssl_handshake_timeout=HANG if context else None
            )
        return Raw(reader, writer)

    async def log_in(self, key: NodePrivate | None = None) -> Raw:
        """A connection that has logged in."""
        raw = await self.connect()
        key = key or NodePrivate.generate()
        raw.send(FAST, login_of(key, self.server_key))
        await raw.frame()
        await raw.frame()
        return raw


class Raw:
    """A connection that says what it is told to."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    def send(self, *data: bytes) -> None:
        self.writer.write(b"".join(data))

    async def frame(self) -> tuple[int, bytes]:
        async with asyncio.timeout(HANG):
            kind, length = struct.unpack(">BI", await self.reader.readexactly(5))
            return kind, await self.reader.readexactly(length)

    async def rest(self) -> bytes:
        """Everything until the relay ends it, in whatever way."""
        data = b""
        async with asyncio.timeout(HANG):
            try:
                while piece := await self.reader.read(1 << 16):
                    data += piece
            except (ConnectionError, ssl.SSLError):
                pass
        return data

    def stop_reading(self) -> None:
        transport = self.writer.transport
        assert isinstance(transport, asyncio.Transport)
        transport.pause_reading()

    async def close(self) -> None:
        """Say goodbye."""
        self.writer.close()
        try:
            async with asyncio.timeout(HANG):
                await self.writer.wait_closed()
        except (OSError, ssl.SSLError):
            pass

    def reset(self) -> None:
        """Be gone, with a RST."""
        sock = self.writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.writer.transport.abort()


def login_of(key: NodePrivate, server: NodePublic) -> bytes:
    """CLIENT_INFO."""
    return handshake.client_info_frame(key, server, ClientInfo())


async def at_once(count: int, most: int, work: Callable[[int], Awaitable[object]]) -> None:
    """Do `work` so many times, `most` at a time."""
    numbers = iter(range(count))

    async def worker() -> None:
        for number in numbers:
            await work(number)

    await asyncio.gather(*(worker() for _ in range(most)))


@asynccontextmanager
async def relay(
    workdir: Path, loop: str = "uvloop", *, tls: bool = True, settings: Sequence[str] = (), flags: Sequence[str] = ()
) -> AsyncIterator[HostileRelay]:
    """A running relay; it has to end by itself, and with nothing unexpected in its log."""
    process = HostileRelay(workdir, loop, tls=tls, settings=settings, flags=flags)
    async with process:
        yield process
        assert await process.stop() == 0, process.log_text()
    log = process.log_text()
    assert "Traceback" not in log, log


class Bystanders(LineProcess):
    """The pair; `figures` once `stop_sending` has returned."""

    def __init__(self, node: HostileRelay) -> None:
        argv = [sys.executable, "-m", "tests.hostile.pair", str(node.port), node.pin]
        super().__init__(argv, node.workdir / "pair.log", {"PYTHONPATH": str(_ROOT), "PYTHONUNBUFFERED": "1"})

    async def start(self) -> None:
        await super().start()
        await self.events.expect("ready")


@asynccontextmanager
async def bystanders(node: HostileRelay, what: str) -> AsyncIterator[None]:
    """A pair that exchanges packets throughout; at the end every one has arrived, in order, and nobody was cut off."""
    async with Bystanders(node) as pair:
        yield
        told = await pair.command("stop")
    print(f"\n{what}: {told['sent']} packets, median {told['median_ms']} ms, worst {told['worst_ms']} ms", end="")
    assert not told["closed"], told
    assert told["received"] == told["sent"] > 0, told
    assert not told["out_of_order"], told


WEBSOCKET = (
    b"GET /derp HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
    b"Sec-WebSocket-Protocol: derp\r\nSec-WebSocket-Version: 13\r\n"
    b"Sec-WebSocket-Key: MDEyMzQ1Njc4OTAxMjM0NQ==\r\n\r\n"
)


def message(payload: bytes, *, kind: int = 2, fin: int = 0x80) -> bytes:
    """A frame of a WebSocket client, masked with zeros."""
    size = len(payload)
    length = bytes((0x80 | size,)) if size < 126 else b"\xfe" + size.to_bytes(2, "big")
    return bytes((fin | kind,)) + length + bytes(4) + payload
